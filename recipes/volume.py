"""Segmentation of generated volumes, ellipsoids and tubes in noise, by MONAI's 3-D U-Net: the task of `volume.toml`.

A volume is (1, edge, edge, edge). Labels: 0 background, 1 ellipsoid, 2 tube; both are equally bright, so the network
must know their shapes. In the domain "source" all volumes have the same brightness. In "target" contrast and brightness
differ from volume to volume, with a bias field and more noise: no volume fits the running statistics of the source.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Generator, Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import TensorDataset
from torchmetrics import Metric
from torchmetrics.segmentation import DiceScore

import normswap

CLASSES = 3
Batch = tuple[Tensor, Tensor]

# The seed of a volume is that of its split and domain plus its number.
_FIRST_SEEDS = {"train": 0, "validation": 1_000_000, "test": 2_000_000}
_TARGET_SEED = 10_000_000
_EDGE_PER_PAIR = 20  # an ellipsoid and a tube for each cube of this edge
_LOSS = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)


def build_model(width: int = 8) -> nn.Module:
    """Return a U-Net with Batch Normalization and three levels, with `width` channels at full resolution."""
    return UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=CLASSES,
        channels=(width, 2 * width, 4 * width),
        strides=(2, 2),
        num_res_units=1,
        norm="batch",
    )


def open_data(
    split: str,
    domain: str = "target",
    edge: int = 32,
    count: int = 64,
    evaluation_edge: int = 64,
    evaluation_count: int = 8,
) -> TensorDataset:
    """Return the volumes (N, 1, edge, edge, edge) of a split with their labels (N, edge, edge, edge)."""
    number, size = (count, edge) if split == "train" else (evaluation_count, evaluation_edge)
    first = _FIRST_SEEDS[split] + (_TARGET_SEED if domain == "target" else 0)
    volumes, labels = zip(*(make_volume(first + index, size, domain) for index in range(number)), strict=True)
    return TensorDataset(torch.stack(volumes), torch.stack(labels))


def make_volume(seed: int, edge: int, domain: str) -> Batch:
    """Return a volume (1, edge, edge, edge) and its labels (edge, edge, edge)."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(edge, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    labels = torch.zeros(grid.shape[1:], dtype=torch.long)
    for _ in range(round((edge / _EDGE_PER_PAIR) ** 3)):
        for label, is_inside in enumerate((_is_in_ellipsoid, _is_in_tube), start=1):
            labels[is_inside(grid, generator)] = label
    objects = (labels > 0).float()
    return _IMAGES[domain](objects, grid, generator)[None], labels


def _is_in_ellipsoid(grid: Tensor, generator: Generator) -> Tensor:
    centre, radius = _draw(generator, 0, grid.shape[-1], 3), _draw(generator, 2.5, 6, 3)
    return ((grid - centre) / radius).square().sum(0) < 1


def _is_in_tube(grid: Tensor, generator: Generator) -> Tensor:
    """Radius 1.5, length 24, any direction."""
    offset = grid - _draw(generator, 0, grid.shape[-1], 3)
    direction = normalize(torch.randn(3, 1, 1, 1, generator=generator), dim=0)
    along = (offset * direction).sum(0)
    return ((offset - along * direction).norm(dim=0) < 1.5) & (along.abs() < 12)


def _draw_source(objects: Tensor, _grid: Tensor, generator: Generator) -> Tensor:
    return objects + 0.3 * torch.randn(objects.shape, generator=generator)


def _draw_target(objects: Tensor, grid: Tensor, generator: Generator) -> Tensor:
    noise = 0.5 * torch.randn(objects.shape, generator=generator)
    field = 1 + (_draw(generator, -0.5, 0.5, 3) * (grid / grid.shape[-1] - 0.5)).sum(0)
    contrast, brightness = _draw(generator, 0.4, 2.5, 1)[0], _draw(generator, -3, 3, 1)[0]
    return contrast * (field * (objects + 0.4) + noise) + brightness


_IMAGES: dict[str, Callable[[Tensor, Tensor, Generator], Tensor]] = {"source": _draw_source, "target": _draw_target}


def _draw(generator: Generator, low: float, high: float, count: int) -> Tensor:
    """Return uniform random numbers (count, 1, 1, 1)."""
    return torch.rand(count, 1, 1, 1, generator=generator) * (high - low) + low


def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the sum of Dice loss and cross-entropy."""
    volumes, labels = batch
    loss: Tensor = _LOSS(model(volumes), labels[:, None])
    return loss


def build_metrics() -> dict[str, Metric]:
    """Return the Dice score, mean of ellipsoids and tubes."""
    return {"dice": DiceScore(num_classes=CLASSES, include_background=False, average="macro", input_format="index")}


def update_metrics(
    metrics: Mapping[str, Metric], model: nn.Module, batch: Batch, tile: int = 0, statistics: str = "sample"
) -> None:
    """Add the predictions for a batch, volume by volume."""
    for volume, label in zip(*(each.split(1) for each in batch), strict=True):
        found = predict(model, volume, tile, statistics).argmax(1)
        for metric in metrics.values():
            metric.update(found, label)


def predict(model: nn.Module, volume: Tensor, tile: int = 0, statistics: str = "sample") -> Tensor:
    """Return the scores (1, CLASSES, edge, edge, edge) of one volume.

    Args:
        model: the network, converted or not.
        volume: (1, 1, edge, edge, edge).
        tile: edge of the tiles, which do not overlap; 0: the whole volume at once.
        statistics: "sample": `in` and `ln` use the statistics of the volume for all its tiles; "tile": each its own.
    """
    if not tile:
        whole: Tensor = model(volume)
        return whole
    is_fixed = statistics == "sample" and bool(normswap.importance_weights(model))
    with normswap.fixed_sample_statistics(model, volume) if is_fixed else nullcontext():
        scores = sliding_window_inference(volume, (tile, tile, tile), 8, model, overlap=0)
    assert isinstance(scores, Tensor)
    return scores
