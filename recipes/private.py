"""Fine-tunes a network under differential privacy with Opacus, on shifted digits.

With `norm = "switch"` the converted network is trained; with `norm = "opacus"` (and `convert.enabled = false`) its Batch
Normalization is first replaced by Opacus' own `ModuleValidator.fix`, a GroupNorm that does not keep the function.
"""

import warnings
from typing import Any

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
    """Train under the budget (epsilon, delta) of `own.options`, and log what was spent."""
    recipe, options = run.recipe, dict(run.options)
    if recipe.convert.untrained == "calibrate":
        raise SystemExit('convert.untrained = "calibrate" reads private images, which epsilon does not cover: "keep"')
    if options.get("norm") == "opacus":
        replace_norms(model)
    data = open_data(recipe.data.train_split, options.get("images_seed", 0))
    spent = train_privately(
        model,
        data,
        run.build_optimizer,
        batch_size=recipe.data.batch_size,
        epochs=recipe.train.epochs,
        device=run.device,
        epsilon=options["epsilon"],
        delta=options["delta"],
        max_grad_norm=options["max_grad_norm"],
    )
    run.log({"step": 0, "epsilon": spent, "delta": options["delta"]})


def replace_norms(model: nn.Module) -> None:
    """Replace each Batch Normalization by what Opacus makes of it."""
    fixed = ModuleValidator.fix(model)
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            model.set_submodule(name, fixed.get_submodule(name))


def train_privately(
    model: nn.Module,
    data: TensorDataset,
    build_optimizer: Any,
    *,
    batch_size: int,
    epochs: int,
    epsilon: float,
    delta: float,
    max_grad_norm: float,
    device: torch.device | str = "cpu",
) -> float:
    """Train with batches by Poisson sampling and noise on clipped gradients; return the epsilon that was spent."""
    normswap.privacy.prepare(model)
    optimizer = build_optimizer(model)
    engine = PrivacyEngine()
    with warnings.catch_warnings():
        # The first layer's input needs no gradient, and random numbers of torch are enough for a measurement.
        warnings.filterwarnings("ignore", "Full backward hook|Secure RNG")
        private, private_optimizer, loader = engine.make_private_with_epsilon(
            module=model.train(),
            optimizer=optimizer,
            data_loader=DataLoader(data, batch_size=batch_size),
            target_epsilon=epsilon,
            target_delta=delta,
            epochs=epochs,
            max_grad_norm=max_grad_norm,
        )
        for _ in range(epochs):
            for images, labels in loader:
                private_optimizer.zero_grad()
                F.cross_entropy(private(images.to(device)), labels.to(device)).backward()
                private_optimizer.step()
    private.to_standard_module()
    normswap.privacy.restore(model)
    return float(engine.get_epsilon(delta))
