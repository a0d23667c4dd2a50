"""Random changes of an image together with its mask or boxes, by torchvision."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torchvision import tv_tensors
from torchvision.transforms import v2


@dataclass(frozen=True)
class JointAugmentation:
    """Random changes in training; the values are those of the keys in `[data]`."""

    crop_scale: tuple[float, float] | None = None
    flip: float = 0.0
    color_jitter: float = 0.0


def build_transforms(
    size: tuple[int, int] | None, augmentation: JointAugmentation | None, *, channels: int = 3
) -> list[v2.Transform]:
    """Return the transforms to images of floats from 0 to 1, resized, and changed at random if asked.

    Args:
        size: height and width; None keeps those of each image.
        augmentation: None changes nothing at random.
    """
    crop, change = None if augmentation is None else augmentation.crop_scale, augmentation or JointAugmentation()
    jitter = (change.color_jitter,) * 3
    steps: tuple[tuple[bool, Callable[[], v2.Transform]], ...] = (
        (channels == 1, lambda: v2.Grayscale(1)),
        (size is not None and crop is None, lambda: v2.Resize(size, antialias=True)),
        (size is not None and crop is not None, lambda: v2.RandomResizedCrop(size, scale=crop, antialias=True)),
        (change.flip > 0, lambda: v2.RandomHorizontalFlip(change.flip)),
        (change.color_jitter > 0, lambda: v2.ColorJitter(*jitter)),
        (True, lambda: v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)),
    )
    return [build() for is_used, build in steps if is_used]


def find_box_values(sample: tuple[Tensor, Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return what belongs to the boxes of a sample: of boxes that a crop removes, it is removed too."""
    return sample[1]["labels"], sample[1]["iscrowd"]


def to_plain(target: Any) -> Any:
    """Return a mask or a dict of boxes as plain tensors."""
    return tree_map(_to_plain_tensor, target)


def _to_plain_tensor(leaf: Tensor) -> Tensor:
    return leaf.as_subclass(Tensor)


class TransformedDataset(torch.utils.data.Dataset[Any]):
    """A data set of images with masks or boxes, transformed jointly; its tensors are plain ones.

    Args:
        dataset: items are an image and a target, as tensors of torchvision.
        transforms: applied in order to both.
        finish: applied to the target at the end.
    """

    def __init__(self, dataset: Any, transforms: list[v2.Transform], finish: Callable[[Any], Any] = to_plain) -> None:
        self._dataset, self._transform, self._finish = dataset, v2.Compose(transforms), finish

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, target = self._transform(*self._dataset[index])
        return image.as_subclass(Tensor), self._finish(target)
