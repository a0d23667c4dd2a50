"""Generated scenes of shapes on textured ground, in two domains: with a class per pixel, and a box per shape.

For recipes that run anywhere. Seed, split and index determine a scene, whatever was drawn before.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from normswap.finetune.data.loaders import derive_seed

CLASS_NAMES = ("disc", "square", "triangle", "cross")
# Scenes of each split.
COUNTS: Mapping[str, int] = {"train": 2000, "validation": 200, "test": 400}
_MAX_SHAPES = 3
_RADIUS = (0.12, 0.22)  # of the side of the image
_MIN_VISIBLE = 0.3  # share of a shape; one that others hide further is no object, but its pixels keep their class


class Scene(NamedTuple):
    """An image (3, S, S) of 8 bits, classes (S, S), 0 for the ground, and boxes (M, 4) as x, y, x, y with labels."""

    image: Tensor
    classes: Tensor
    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Style:
    """How a domain is rendered, for pixels from 0 to 1. Every value is drawn per scene.

    Args:
        ground, shape: range of each colour channel of the ground and of a shape.
        texture: standard deviation of the coloured texture of the ground; that of a shape is half of it.
        texture_cells: cells per side of the coarse random grid from which the texture is interpolated.
        noise: standard deviation of the noise per pixel and channel, before the contrast.
        contrast: range of the log-uniform factor on the distance from mid-grey.
        brightness: largest brightness that is added or subtracted, after the contrast.
    """

    ground: tuple[float, float] = (0.0, 0.5)
    shape: tuple[float, float] = (0.4, 1.0)
    texture: float = 0.08
    texture_cells: int = 8
    noise: float = 0.03
    contrast: tuple[float, float] = (0.4, 1.0)
    brightness: float = 0.2


# The shifted domain: dark shapes on light ground, coarser texture, more noise, less contrast.
STYLES: Mapping[str, Style] = {
    "shapes": Style(),
    "shapes:shifted": Style((0.5, 1.0), (0.0, 0.6), 0.15, 12, 0.06, (0.2, 0.8), 0.25),
}


class ShapeScenes(Dataset[Scene]):
    """The scenes of a split.

    Args:
        source: the domain, a key of `STYLES`.
        split: `train`, `validation` or `test`.
        size: pixels per side.
        seed: of all scenes.
    """

    def __init__(self, source: str, split: str, *, size: int, seed: int) -> None:
        self._style, self._size = STYLES[source], size
        self._seeds = seed, [*STYLES].index(source), [*COUNTS].index(split)
        self._count = COUNTS[split]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Scene:
        return draw_scene(self._size, self._style, seed=derive_seed(*self._seeds, index))


def draw_scene(size: int, style: Style, *, seed: int) -> Scene:
    """Return a scene with one to three shapes, of which later ones hide earlier ones."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    coarse = torch.randn(1, 3, style.texture_cells, style.texture_cells, generator=generator)
    texture = style.texture * F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)[0]
    image, owner = uniform(*style.ground, 3, 1, 1) + texture, torch.zeros(size, size, dtype=torch.long)
    kinds = torch.randint(len(CLASS_NAMES), (1 + int(uniform(0, _MAX_SHAPES, 1)),), generator=generator)
    areas = []
    for number, kind in enumerate(kinds.tolist(), 1):
        inside = _draw_shape(size, kind, uniform(0, 1, 4).tolist())
        owner = torch.where(inside, number, owner)
        areas.append(int(inside.sum()))
        image = torch.where(inside, uniform(*style.shape, 3, 1, 1) + texture / 2, image)
    image = image + style.noise * torch.randn(image.shape, generator=generator)
    contrast = uniform(math.log(style.contrast[0]), math.log(style.contrast[1]), 1).exp()
    image = 0.5 + contrast * (image - 0.5) + uniform(-style.brightness, style.brightness, 1)
    classes = torch.cat([torch.zeros(1, dtype=torch.long), kinds + 1])[owner]
    visible = [owner == number for number in range(1, len(kinds) + 1)]
    kept = [n for n, (mask, area) in enumerate(zip(visible, areas, strict=True)) if mask.sum() >= _MIN_VISIBLE * area]
    boxes = torch.stack([bounding_box(visible[n]) for n in kept])  # nothing hides the last shape
    return Scene((image.clamp(0, 1) * 255).round().to(torch.uint8), classes, boxes, kinds[kept] + 1)


def bounding_box(mask: Tensor) -> Tensor:
    """Return the box x, y, x, y around the pixels of a mask (H, W), the edges of the outer pixels included."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def _draw_shape(size: int, kind: int, numbers: list[float]) -> Tensor:
    """The pixels of a shape, whose radius, place and angle follow from four numbers from 0 to 1."""
    radius = size * (_RADIUS[0] + (_RADIUS[1] - _RADIUS[0]) * numbers[0])
    margin, angle = 0.8 * radius, 2 * math.pi * numbers[3]
    axis = torch.arange(size) + 0.5
    down = (axis - margin - (size - 2 * margin) * numbers[1])[:, None]
    right = (axis - margin - (size - 2 * margin) * numbers[2])[None, :]
    u = down * math.cos(angle) + right * math.sin(angle)
    v = right * math.cos(angle) - down * math.sin(angle)
    return (
        u**2 + v**2 < radius**2,
        torch.maximum(u.abs(), v.abs()) < 0.8 * radius,
        (u > -radius / 2) & (u + math.sqrt(3) * v.abs() < radius),
        (torch.minimum(u.abs(), v.abs()) < 0.3 * radius) & (torch.maximum(u.abs(), v.abs()) < radius),
    )[kind]
