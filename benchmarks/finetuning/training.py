"""The digits network: a small ResNet with BN, and its training on clean digits by SGD. Also the order of batches."""

import math
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.finetune.data.digits import Digits, Domain, Images, load_ink, render_source, split_indices

NETWORK = (
    "test_resnet"  # the smallest ResNet of timm: basic and bottleneck blocks, 15 BN sites, 0.37 million parameters
)
# With an output stride of 8 the last stage has 4 x 4 positions; by default it would have 1 x 1.
NETWORK_OPTIONS = {"in_chans": 3, "num_classes": 10, "output_stride": 8}
# Of unseen classes: the source has the first 5 classes, the target the others.
_SOURCE_CLASSES = 5


@dataclass(frozen=True)
class SourceTraining:
    """Training of the BN network on clean digits, by SGD with a one-cycle schedule."""

    epochs: int = 20
    batch_size: int = 64
    rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    least_validation_accuracy: float = 90.0


def build_network(*, seed: int) -> nn.Module:
    """Return the untrained BN network."""
    torch.manual_seed(seed)
    return timm.create_model(NETWORK, pretrained=False, **NETWORK_OPTIONS)


def train_source(digits: Digits, *, seed: int, training: SourceTraining | None = None) -> nn.Module:
    """Return the BN network, trained on the training images of the source.

    Raises:
        RuntimeError: the validation accuracy is too low for a comparison.
    """
    training = training or SourceTraining()
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
    """Return indices (steps, batch_size) into `count` inputs from successive random passes without remainders."""
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


def prepare_transfer(*, seed: int) -> Digits:
    """Return clean digits: 0 to 4 as the source, and 5 to 9 with labels from 0 as the target."""
    ink, labels = load_ink()
    parts: dict[str, list[Tensor]] = {}
    for (_, part), index in split_indices(len(labels), seed=seed).items():
        parts.setdefault(part, []).append(index)
    sets = {part: torch.cat(indices) for part, indices in parts.items()}

    def domain(*, source: bool) -> Domain:
        chosen = {part: index[(labels[index] < _SOURCE_CLASSES) == source] for part, index in sets.items()}
        offset = 0 if source else _SOURCE_CLASSES
        return Domain(**{part: Images(render_source(ink[i]), labels[i] - offset) for part, i in chosen.items()})

    return Digits(domain(source=True), domain(source=False))
