"""Render grey 8-bit images in colour, as they are or under a strong shift; one seed determines every random draw.

The shift gives each image its own colours, a smooth colour texture behind the object, noise, contrast and brightness.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from normswap.finetune.data.digits import Shift, shift_ink

STRONG = Shift(stroke=(0.5, 1.0), background=(0.0, 0.4), texture=0.15, noise=0.04)


def render(images: Tensor, *, size: int = 64, seed: int = 0, shift: Shift | None = None) -> Tensor:
    """Return grey images (N, H, W) of 8 bits as colour images (N, 3, size, size) of 8 bits.

    Args:
        images: grey images, the object light on a dark background.
        size: pixels per side.
        seed: of the shift.
        shift: the colours, texture, contrast and brightness; None gives grey images.
    """
    ink = F.interpolate(images[:, None] / 255, size=(size, size), mode="bilinear", align_corners=False)
    image = ink.expand(-1, 3, -1, -1) if shift is None else shift_ink(ink, shift, seed=seed)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)
