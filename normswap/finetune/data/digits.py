"""Scikit-learn's 1,797 scanned digits as two domains: clean, and shifted in colour, texture, contrast and noise.

Real images without a download, for recipes that run anywhere and for measurements. The images are split before they are
rendered: the six sets come from disjoint scans, and one seed determines every random draw. Pixels are from -1 to 1.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

IMAGE_SIZE = 32
CLASSES = 10

# Images of each set; the six are disjoint.
SPLIT = {
    ("source", "train"): 700,
    ("source", "validation"): 100,
    ("source", "test"): 200,
    ("target", "train"): 400,
    ("target", "validation"): 147,
    ("target", "test"): 250,
}


class Images(NamedTuple):
    """Pixels (N, 3, size, size) from -1 to 1, and labels (N,)."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Domain:
    """The images of one domain, in three disjoint sets."""

    train: Images
    validation: Images
    test: Images


@dataclass(frozen=True)
class Digits:
    """Clean digits (source) and shifted ones (target), of different images."""

    source: Domain
    target: Domain


@dataclass(frozen=True)
class Shift:
    """How the target domain is rendered, for pixels from 0 to 1. Every value is drawn per image.

    Args:
        stroke, background: range of each colour channel of the strokes and of the background.
        texture: standard deviation of the smooth coloured texture of the background.
        texture_cells: cells per side of the coarse random grid from which the texture is interpolated.
        contrast: range of the log-uniform factor on the distance from mid-grey.
        brightness: largest brightness that is added or subtracted, after the contrast.
        noise: standard deviation of the noise per pixel and channel, before the contrast.
    """

    stroke: tuple[float, float] = (0.7, 1.0)
    background: tuple[float, float] = (0.0, 0.3)
    texture: float = 0.1
    texture_cells: int = 6
    contrast: tuple[float, float] = (0.15, 1.0)
    brightness: float = 0.2
    noise: float = 0.05


SHIFT = Shift()


def prepare_digits(*, seed: int, size: int = IMAGE_SIZE) -> Digits:
    """Return both domains; the seed determines the split and every random draw of the shift."""
    ink, labels = load_ink()
    index = split_indices(len(labels), seed=seed)
    source = {
        part: Images(render_source(ink[i], size=size), labels[i])
        for (domain, part), i in index.items()
        if domain == "source"
    }
    target = {
        part: Images(render_target(ink[i], seed=1000 * seed + draw, size=size), labels[i])
        for draw, ((domain, part), i) in enumerate(index.items())
        if domain == "target"
    }
    return Digits(Domain(**source), Domain(**target))


def load_ink() -> tuple[Tensor, Tensor]:
    """Return the scanned digits: ink (1797, 1, 8, 8) from 0 to 1, and labels (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)


def split_indices(total: int, *, seed: int) -> dict[tuple[str, str], Tensor]:
    """Return disjoint random indices for each (domain, part) of the split."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: sum(SPLIT.values())]
    return dict(zip(SPLIT, torch.split(order, list(SPLIT.values())), strict=True))


def render_source(ink: Tensor, *, size: int = IMAGE_SIZE) -> Tensor:
    """Return ink (N, 1, 8, 8) as white strokes on black, (N, 3, size, size)."""
    return _to_signed(_enlarge(ink, size, mode="bilinear").expand(-1, 3, -1, -1))


def render_target(ink: Tensor, *, seed: int, shift: Shift = SHIFT, size: int = IMAGE_SIZE) -> Tensor:
    """Return ink (N, 1, 8, 8) as coloured strokes on a coloured, textured background, (N, 3, size, size).

    Contrast and brightness differ between images; strokes stay lighter than the background.
    """
    return _to_signed(shift_ink(_enlarge(ink, size, mode="bilinear"), shift, seed=seed).clamp(0, 1))


def shift_ink(ink: Tensor, shift: Shift, *, seed: int) -> Tensor:
    """Return ink (N, 1, size, size) from 0 to 1 as shifted images (N, 3, size, size), not clamped to 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    count, size = len(ink), ink.shape[-1]

    def uniform(low: float, high: float, channels: int) -> Tensor:
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=generator)

    stroke, background = uniform(*shift.stroke, 3), uniform(*shift.background, 3)
    coarse = torch.randn(count, 3, shift.texture_cells, shift.texture_cells, generator=generator)
    texture = shift.texture * _enlarge(coarse, size, mode="bicubic")
    image = stroke * ink + (background + texture) * (1 - ink)
    image = image + shift.noise * torch.randn(image.shape, generator=generator)
    contrast = uniform(math.log(shift.contrast[0]), math.log(shift.contrast[1]), 1).exp()
    return 0.5 + contrast * (image - 0.5) + uniform(-shift.brightness, shift.brightness, 1)


def _enlarge(image: Tensor, size: int, *, mode: str) -> Tensor:
    return F.interpolate(image, size=(size, size), mode=mode, align_corners=False)


def _to_signed(image: Tensor) -> Tensor:
    return 2 * image - 1


class DigitImages(Dataset[Any]):
    """Rendered digits as a timm data set: items are `transform(8-bit Pillow image)` and the label.

    Args:
        images: the images of one set.
        mode: the Pillow mode of the images, `"RGB"` or `"L"`.
    """

    def __init__(self, images: Images, mode: str) -> None:
        self.transform: Any = None
        self._pixels = ((images.pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        self._labels = images.labels.tolist()
        self._mode = mode

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self._pixels[index].numpy()).convert(self._mode)), self._labels[index]
