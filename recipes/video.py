"""How a patch moves, in generated clips of few frames: the task of the recipe `video`.

A clip (3, frames, size, size) shows an oval patch with a random texture that moves to the right, left, top or bottom,
turns to one of two sides, grows or shrinks. Clip and class follow from the index. In the domain "source" patches are
white on black. In "target" textures are finer, stronger and coloured, contrast and brightness differ from clip to clip,
and every frame has noise.
"""

import math
from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, interpolate
from torch.utils.data import Dataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor]

CLASSES = ("right", "left", "up", "down", "turns left", "turns right", "grows", "shrinks")
_FIRST_SEEDS = {"train": 0, "validation": 1_000_000, "test": 2_000_000}
_TARGET_SEED = 10_000_000
# Per frame: the step in halves of the clip, the angle, and the factor of growth.
_STEP, _ANGLE, _GROWTH = 0.22, math.radians(20), 1.25
_VIEW = 0.5  # the share of the image of a patch that a clip shows


class Clips(Dataset[Batch]):
    """Clips (3, frames, size, size) with their classes; number `index` has the seed `first + index`."""

    def __init__(self, *, first: int, count: int, domain: str, frames: int, size: int) -> None:
        self._first, self._count, self._domain, self._frames, self._size = first, count, domain, frames, size

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self._count:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self._first + index)
        label = index % len(CLASSES)
        clip = show(draw_patch(generator, self._domain), label, self._frames, self._size, generator)
        return light(clip, generator, self._domain), torch.tensor(label)


def draw_patch(generator: Generator, domain: str) -> Tensor:
    """Return an image (3, 64, 64) from 0 to about 1: an oval of a smooth random texture, longer than wide, on 0."""
    cells, channels, strength = (16, 3, 0.4) if domain == "target" else (8, 1, 0.15)
    coarse = torch.randn(1, channels, cells, cells, generator=generator)
    texture = interpolate(coarse, size=(64, 64), mode="bicubic", align_corners=False)[0].expand(3, -1, -1)
    angle, right, down = _uniform(generator, 0, math.pi), *(_uniform(generator, -0.1, 0.1) for _ in range(2))
    axis = torch.linspace(-1, 1, 64)
    x, y = axis - right, axis[:, None] - down
    along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    inside = (6 * (1 - (along / 0.36).square() - (across / 0.14).square())).sigmoid()
    return inside * (0.8 + strength * texture)


def show(patch: Tensor, label: int, frames: int, size: int, generator: Generator) -> Tensor:
    """Return the clip (3, frames, size, size) of a patch that moves as its class says."""
    time = torch.arange(frames) - (frames - 1) / 2
    speed = 0.8 + 0.4 * torch.rand(1, generator=generator)
    still = torch.zeros(frames)
    # A view that moves to the left shows a patch that moves to the right.
    x, y, angle, growth = (
        direction * speed * time if label in pair else still
        for pair, direction in (
            ((0, 1), (-1, 1)[label % 2] * _STEP),
            ((2, 3), (1, -1)[label % 2] * _STEP),
            ((4, 5), (1, -1)[label % 2] * _ANGLE),
            ((6, 7), (-1, 1)[label % 2] * math.log(_GROWTH)),
        )
    )
    scale = _VIEW * growth.exp()
    row = torch.stack([scale * angle.cos(), -scale * angle.sin(), _VIEW * x], 1)
    other = torch.stack([scale * angle.sin(), scale * angle.cos(), _VIEW * y], 1)
    grid = affine_grid(torch.stack([row, other], 1), [frames, 3, size, size], align_corners=False)
    moved = grid_sample(patch.expand(frames, -1, -1, -1), grid, align_corners=False)
    return moved.transpose(0, 1)


def light(clip: Tensor, generator: Generator, domain: str) -> Tensor:
    """Return a clip in the light of its domain, with pixels around 0."""
    if domain == "source":
        return (clip - 0.2) / 0.3
    contrast = math.exp(_uniform(generator, math.log(0.15), math.log(1.5)))
    colours = torch.tensor([_uniform(generator, 0.4, 1.0) for _ in range(3)])[:, None, None, None]
    noise = 0.2 * torch.randn(clip.shape, generator=generator)
    return contrast * (colours * clip / 0.3 + noise) + _uniform(generator, -1.5, 1.5)


def _uniform(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand(1, generator=generator).item()


# --- data, loss, metrics ----------------------------------------------------------------------------------------------


def open_data(
    split: str, domain: str = "target", count: int = 400, evaluation_count: int = 240, frames: int = 4, size: int = 24
) -> Clips:
    """Return the clips of a split."""
    first = _FIRST_SEEDS[split] + (_TARGET_SEED if domain == "target" else 0)
    number = count if split == "train" else evaluation_count
    return Clips(first=first, count=number, domain=domain, frames=frames, size=size)


def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy."""
    clips, labels = batch
    return cross_entropy(model(clips), labels)


def build_metrics() -> dict[str, Metric]:
    """Return the accuracy."""
    return {"accuracy": MulticlassAccuracy(len(CLASSES), average="micro")}


def update_metrics(metrics: Mapping[str, Metric], model: nn.Module, batch: Batch) -> None:
    """Add the predictions for a batch."""
    clips, labels = batch
    metrics["accuracy"].update(model(clips), labels)
