"""Train the source network; fine-tune and measure one arm at one learning rate.

All arms get the same batches in the same order, the same number of steps and the same optimizer; they differ only as
`arms` defines. Accuracies are in percent, in evaluation mode.
"""

import math
import time
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.finetuning.arms import Arm, batch_norms, reestimate_statistics
from benchmarks.finetuning.protocol import NETWORK, NETWORK_OPTIONS, SOURCE_TRAINING, FineTuning, SourceTraining
from normswap import batch_dependence
from normswap.finetune.data.digits import Digits, Images

GATES = ("mean_weight", "var_weight")


@dataclass(frozen=True)
class Outcome:
    """The result of one arm at one learning rate. Accuracies are in percent.

    Args:
        source_before, target_before: on the test images, after the swap and before the first step.
        validation: on the validation images of the target, after fine-tuning; selects the learning rate.
        target, source: on the test images, after fine-tuning.
        is_finite: true if the loss of the last step is finite.
    """

    arm: str
    seed: int
    rate: float
    source_before: float
    target_before: float
    validation: float
    target: float
    source: float
    is_finite: bool
    seconds: float


def build_network(*, seed: int) -> nn.Module:
    """Return the untrained BN network."""
    torch.manual_seed(seed)
    return timm.create_model(NETWORK, pretrained=False, **NETWORK_OPTIONS)


def train_source(digits: Digits, *, seed: int, training: SourceTraining = SOURCE_TRAINING) -> nn.Module:
    """Return the BN network, trained on the training images of the source.

    Raises:
        RuntimeError: the validation accuracy is too low for a comparison.
    """
    model = build_network(seed=seed).train()
    pixels, labels = digits.source.train
    batches = len(labels) // training.batch_size
    optimizer = torch.optim.SGD(
        model.parameters(), training.rate, training.momentum, weight_decay=training.weight_decay, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.rate, total_steps=training.epochs * batches)
    for batch in batch_order(len(labels), steps=training.epochs * batches, batch_size=training.batch_size, seed=seed):
        optimizer.zero_grad()
        F.cross_entropy(model(pixels[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    reached = accuracy(model, digits.source.validation)
    if reached < training.least_validation_accuracy:
        raise RuntimeError(
            f"the source network reached {reached:.1f} % on the validation images, "
            f"expected at least {training.least_validation_accuracy} %; increase SourceTraining.epochs"
        )
    return model.eval()


def batch_order(count: int, *, steps: int, batch_size: int, seed: int) -> Tensor:
    """Return indices (steps, batch_size) into `count` images from successive random passes without remainders."""
    generator = torch.Generator().manual_seed(seed)
    per_pass = count // batch_size
    passes = math.ceil(steps / per_pass)
    order = [torch.randperm(count, generator=generator)[: per_pass * batch_size] for _ in range(passes)]
    return torch.cat(order).reshape(-1, batch_size)[:steps]


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Return the accuracy in evaluation mode, in percent. The mode of the model is restored."""
    was_training = model.training
    predictions = model.eval()(images.pixels).argmax(1)
    model.train(was_training)
    return 100 * float((predictions == images.labels).double().mean())


@torch.no_grad()
def relative_output_error(original: nn.Module, converted: nn.Module, pixels: Tensor) -> float:
    """Return the relative L2 distance between the outputs of two models in evaluation mode."""
    expected, got = original.eval()(pixels), converted.eval()(pixels)
    return float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected))


def finetune(
    model: nn.Module,
    images: Images,
    *,
    rate: float,
    settings: FineTuning,
    seed: int,
    freezes_statistics: bool = False,
    penalty: float = 0.0,
) -> list[float]:
    """Fine-tune `model` in place. Return the loss of every step, without the penalty on batch dependence."""
    model.train()
    if freezes_statistics:
        for layer in batch_norms(model):
            layer.eval()
    network, gates = split_parameters(model)
    optimizer = build_optimizer(network, gates, rate=rate, settings=settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    losses = []
    for batch in batch_order(len(images.labels), steps=settings.steps, batch_size=settings.batch_size, seed=seed):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.pixels[batch]), images.labels[batch])
        (loss + penalty * batch_dependence(model) if penalty else loss).backward()
        nn.utils.clip_grad_norm_(network, settings.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters of the network and those of the gates (none if the model is not converted)."""
    network: list[nn.Parameter] = []
    gates: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (gates if name.endswith(GATES) else network).append(parameter)
    return network, gates


def build_optimizer(
    network: list[nn.Parameter], gates: list[nn.Parameter], *, rate: float, settings: FineTuning
) -> torch.optim.Optimizer:
    """Return the optimizer. Gates have no weight decay, which would change the function without any data."""
    groups = [
        {"params": network, "weight_decay": settings.weight_decay},
        {"params": gates, "weight_decay": 0.0, "lr": rate * settings.gate_rate},
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, rate)
    return torch.optim.SGD(groups, rate, settings.momentum)


def run_arm(
    name: str, arm: Arm, network: nn.Module, digits: Digits, *, rate: float, settings: FineTuning, seed: int
) -> tuple[nn.Module, Outcome]:
    """Prepare, fine-tune and measure one arm at one learning rate; return its network and its result."""
    start = time.monotonic()
    model = arm.prepare(network, digits.target.train.pixels)
    source_before, target_before = accuracy(model, digits.source.test), accuracy(model, digits.target.test)
    losses = finetune(
        model,
        digits.target.train,
        rate=rate,
        settings=settings,
        seed=seed,
        freezes_statistics=arm.freezes_statistics,
    )
    if arm.reestimates_after:
        reestimate_statistics(model, digits.target.train.pixels)
    return model, Outcome(
        arm=name,
        seed=seed,
        rate=rate,
        source_before=source_before,
        target_before=target_before,
        validation=accuracy(model, digits.target.validation),
        target=accuracy(model, digits.target.test),
        source=accuracy(model, digits.source.test),
        is_finite=math.isfinite(losses[-1]),
        seconds=time.monotonic() - start,
    )
