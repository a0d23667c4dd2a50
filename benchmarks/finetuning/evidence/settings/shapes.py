"""Segmentation of generated shapes at 64 pixels: ImageNet's EfficientNet-Lite0 as the encoder, and a new decoder.

The BN layers of the decoder have never been trained: their statistics are 0 and 1.
"""

import math

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.finetuning import pretrained
from benchmarks.finetuning.evidence.settings.task import Examples, Task, mean_iou

SOURCES = (pretrained,)
SIZE = 64
CLASSES = 3  # background, disc, triangle
SHAPES_PER_IMAGE = 2
TRAIN, VALIDATION, TEST = 3200, 200, 1000
_STAGES = (0, 1, 2, 3)  # of the encoder: at 1/2, 1/4, 1/8 and 1/16 of the resolution
_WIDTHS = (24, 32, 48, 64)  # of the decoder at the same resolutions


def segmented(seed: int) -> Task:
    """A network whose encoder was trained on ImageNet, and images with masks."""
    sets = [draw(count, seed=1000 * seed + part) for part, count in enumerate((TRAIN, VALIDATION, TEST))]
    torch.manual_seed(seed)
    return Task(SegmentationNetwork().eval(), *sets, to_input=pretrained.to_input, score=mean_iou)


class SegmentationNetwork(nn.Module):
    """The first four stages of EfficientNet-Lite0, and a decoder with skip connections as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        name = pretrained.ARCHITECTURE.removeprefix("timm:")
        self.encoder = timm.create_model(name, features_only=True, out_indices=_STAGES)
        weights = pretrained.load_efficientnet_lite0()[0].state_dict()
        self.encoder.load_state_dict({name: weights[name] for name in self.encoder.state_dict()})
        channels = self.encoder.feature_info.channels()
        inputs = [own + below for own, below in zip(channels, (*_WIDTHS[1:], 0), strict=True)]
        self.stages = nn.ModuleList(
            nn.Sequential(*_conv(entering, width), *_conv(width, width))
            for entering, width in zip(inputs, _WIDTHS, strict=True)
        )
        self.head = nn.Conv2d(_WIDTHS[0], CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, CLASSES, H, W)."""
        features = self.encoder(images)
        x = self.stages[3](features[3])
        for level in (2, 1, 0):
            x = torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), features[level]], 1)
            x = self.stages[level](x)
        return F.interpolate(self.head(x), scale_factor=2.0, mode="bilinear", align_corners=False)


def _conv(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def draw(count: int, *, seed: int) -> Examples:
    """Return images (N, 3, SIZE, SIZE) of 8 bits with shapes on textured ground, and masks (N, SIZE, SIZE)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=generator)

    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    texture = F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    image = uniform(0.0, 0.5, 3) + 0.08 * texture
    mask = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    for _ in range(SHAPES_PER_IMAGE):
        kind = torch.randint(1, CLASSES, (count, 1, 1), generator=generator)
        radius, angle = uniform(10, 16), uniform(0, 2 * math.pi)
        down, right = rows - uniform(12, SIZE - 12), columns - uniform(12, SIZE - 12)
        u, v = (
            down * angle.cos() + right * angle.sin(),
            right * angle.cos() - down * angle.sin(),
        )
        disc = u**2 + v**2 < radius**2
        triangle = (u > -radius / 2) & (u + math.sqrt(3) * v.abs() < radius)
        inside = torch.where(kind == 1, disc, triangle)
        mask = torch.where(inside, kind, mask)
        image = torch.where(inside[:, None], uniform(0.4, 1.0, 3) + 0.04 * texture, image)
    image = image + 0.03 * torch.randn(image.shape, generator=generator)
    contrast = uniform(math.log(0.4), 0.0, 1).exp()
    image = 0.5 + contrast * (image - 0.5) + uniform(-0.2, 0.2, 1)
    return Examples((image.clamp(0, 1) * 255).round().to(torch.uint8), mask)
