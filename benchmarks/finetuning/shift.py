"""Render grey 8-bit images in colour, as they are or under a strong shift; one seed determines every random draw.

The shift gives each image its own colours, a smooth colour texture behind the object, noise, contrast and brightness.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shift:
    """How strong the shift is, for pixels from 0 to 1. Every value is drawn per image.

    Args:
        light, dark: range of each colour channel of a white and of a black pixel.
        texture: standard deviation of the smooth coloured texture; it covers black pixels only.
        texture_cells: cells per side of the coarse random grid from which the texture is interpolated.
        contrast: range of the log-uniform factor on the distance from mid-grey.
        brightness: largest brightness that is added or subtracted, after the contrast.
        noise: standard deviation of the noise per pixel and channel, before the contrast.
    """

    light: tuple[float, float] = (0.5, 1.0)
    dark: tuple[float, float] = (0.0, 0.4)
    texture: float = 0.15
    texture_cells: int = 6
    contrast: tuple[float, float] = (0.15, 1.0)
    brightness: float = 0.2
    noise: float = 0.04


STRONG = Shift()


def render(images: Tensor, *, size: int = 64, seed: int = 0, shift: Shift | None = None) -> Tensor:
    """Return grey images (N, H, W) of 8 bits as colour images (N, 3, size, size) of 8 bits.

    Args:
        images: grey images, the object light on a dark background.
        size: pixels per side.
        seed: of the shift.
        shift: the colours, texture, contrast and brightness; None gives grey images.
    """
    ink = F.interpolate(images[:, None] / 255, size=(size, size), mode="bilinear", align_corners=False)
    image = ink.expand(-1, 3, -1, -1) if shift is None else _shifted(ink, shift, seed)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _shifted(ink: Tensor, shift: Shift, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count, size = len(ink), ink.shape[-1]

    def uniform(low: float, high: float, channels: int) -> Tensor:
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=generator)

    light, dark = uniform(*shift.light, 3), uniform(*shift.dark, 3)
    cells = (count, 3, shift.texture_cells, shift.texture_cells)
    coarse = torch.randn(cells, generator=generator)
    texture = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    image = light * ink + (dark + shift.texture * texture) * (1 - ink)
    image = image + shift.noise * torch.randn(image.shape, generator=generator)
    contrast = uniform(math.log(shift.contrast[0]), math.log(shift.contrast[1]), 1).exp()
    return 0.5 + contrast * (image - 0.5) + uniform(-shift.brightness, shift.brightness, 1)
