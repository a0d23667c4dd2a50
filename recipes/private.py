"""Fine-tunes a network under differential privacy with Opacus, on shifted digits.

With `norm = "switch"` the converted network is trained; with `norm = "opacus"` (and `convert.enabled = false`) its
Batch Normalization is first replaced by Opacus' own `ModuleValidator.fix`, a GroupNorm that loses the function.
"""

import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

import normswap.privacy
from normswap.finetune.data.digits import CLASSES, prepare_digits


def open_data(split: str, images_seed: int = 0) -> TensorDataset:
    """Return shifted digits, other images than those of digits_source; the seed is that of the source's images."""
    images = getattr(prepare_digits(seed=images_seed).target, split)
    return TensorDataset(images.pixels, images.labels)


def example_inputs(batch: list[Tensor]) -> Tensor:
    """Return random inputs: the conversion must not look at private images."""
    return torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(0))


def compute_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def build_metrics() -> dict[str, Metric]:
    """Return the accuracy, from 0 to 1."""
    return {"accuracy": MulticlassAccuracy(CLASSES, average="micro")}


def update_metrics(metrics: dict[str, Metric], model: nn.Module, batch: list[Tensor]) -> None:
    """Count the correct answers of a batch."""
    metrics["accuracy"].update(model(batch[0]).argmax(1), batch[1])


def train_model(model: nn.Module, run: Any) -> None:
    """Train within the budget of `own.options`, and log what was spent."""
    convert = run.recipe.convert
    if convert.enabled and convert.untrained == "calibrate":
        raise normswap.RecipeError(
            'convert.untrained = "calibrate" reads private images, which epsilon does not cover: set it to "keep"'
        )
    train_within_budget(model, run, **run.options)


def train_within_budget(
    model: nn.Module,
    run: Any,
    *,
    epsilon: float = 8.0,
    delta: float = 1e-3,
    max_grad_norm: float = 1.0,
    norm: Literal["switch", "opacus"] = "switch",
    images_seed: int = 0,
) -> None:
    """Train with batches by Poisson sampling and noise on clipped gradients.

    Args:
        epsilon, delta: the budget.
        max_grad_norm: the largest norm of the gradient of an image.
        norm: `"opacus"`: replace Batch Normalization by what Opacus makes of it.
        images_seed: of the images, as that of the run of digits_source.
    """
    if norm == "opacus":
        replace_norms(model)
    normswap.privacy.prepare(model)
    optimizer, epochs = run.build_optimizer(model), run.recipe.train.epochs
    data = open_data(run.recipe.data.train_split, images_seed)
    with warnings.catch_warnings():
        # Random numbers of torch are enough for a measurement; images need no gradient; a bound in between is looser.
        warnings.filterwarnings("ignore", "Secure RNG|Full backward hook|Optimal order is the")
        engine = PrivacyEngine()
        private, private_optimizer, loader = engine.make_private_with_epsilon(
            module=model.train(),
            optimizer=optimizer,
            data_loader=DataLoader(data, batch_size=run.recipe.data.batch_size),
            target_epsilon=epsilon,
            target_delta=delta,
            epochs=epochs,
            max_grad_norm=max_grad_norm,
        )
        for _ in range(epochs):
            for images, labels in loader:
                private_optimizer.zero_grad()
                F.cross_entropy(private(images.to(run.device)), labels.to(run.device)).backward()
                private_optimizer.step()
        spent = engine.get_epsilon(delta)
    private.to_standard_module()
    normswap.privacy.restore(model)
    run.log({"step": epochs * len(loader), "epsilon": float(spent)})


def replace_norms(model: nn.Module) -> None:
    """Replace each Batch Normalization by what Opacus makes of it."""
    fixed = ModuleValidator.fix(model)
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            model.set_submodule(name, fixed.get_submodule(name))
