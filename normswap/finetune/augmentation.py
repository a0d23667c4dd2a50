"""Mixing the images of a batch, by timm: mixup and cutmix."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from normswap.finetune.recipe_tables import DataTable

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def batch_mixer(data: DataTable, *, classes: int) -> Mix:
    """Return what turns images and labels into images and targets: labels, or shares of the classes (N, classes)."""
    if not (data.mixup or data.cutmix):
        return lambda images, labels: (images, labels)
    import timm.data

    # Labels are smoothed in the loss, with mixing and without it alike.
    package: Any = timm.data  # typed in some of its versions only
    return package.Mixup(data.mixup, data.cutmix, label_smoothing=0.0, num_classes=classes)  # type: ignore[no-any-return]
