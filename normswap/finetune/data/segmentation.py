"""Images with a class per pixel: generated shapes, folders of images and masks, and VOC."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets, tv_tensors

from normswap.errors import DataError
from normswap.finetune.data.datasets import FOLDER_PREFIX, SPLITS, find_split, split_folder
from normswap.finetune.data.loaders import DataSettings
from normswap.finetune.data.shapes import CLASS_NAMES, STYLES, ShapeScenes
from normswap.text import first_line

VOC = "torch/voc"
_VOC_CLASSES = 21
_SUFFIXES = (".jpg", ".jpeg", ".png")
_INDEX_MODES = ("L", "P", "I", "I;16", "1")


class MaskedImages(NamedTuple):
    """A data set of images with masks as tensors of torchvision, and its number of classes."""

    dataset: Any
    classes: int


def open_masked_images(settings: DataSettings, *, classes: int | None, ignore_index: int) -> MaskedImages:
    """Return the images and masks of a split.

    Args:
        classes: those of the masks in a folder; None for data sets that know theirs.
        ignore_index: value of the pixels that do not count.

    Raises:
        DataError: the source or the split is unknown; a file has no mask; the number of classes is unknown, or another
            one than that of the data set.
    """
    if settings.source in STYLES:
        found = MaskedImages(_ShapeMasks(settings), len(CLASS_NAMES) + 1)
    elif settings.source == VOC:
        found = MaskedImages(_open_voc(settings), _VOC_CLASSES)
    elif settings.source.startswith(FOLDER_PREFIX):
        return _open_folder(settings, classes, ignore_index)
    else:
        known = ", ".join(["folder:PATH", *STYLES, VOC])
        raise DataError(f"data {settings.source!r}: expected data with masks: {known}")
    if classes not in (None, found.classes):
        raise DataError(f"data.classes: {settings.source} has {found.classes} classes, got {classes}: remove the key")
    return found


class _ShapeMasks(Dataset[Any]):
    """Generated scenes with the class of each pixel."""

    def __init__(self, settings: DataSettings) -> None:
        size = max(settings.image_size or ())
        self._scenes = ShapeScenes(settings.source, find_split(settings), size=size, seed=settings.seed)

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        scene = self._scenes[index]
        return tv_tensors.Image(scene.image), tv_tensors.Mask(scene.classes)


# --- folders ----------------------------------------------------------------------------------------------------------


def _open_folder(settings: DataSettings, classes: int | None, ignore_index: int) -> MaskedImages:
    if classes is None:
        raise DataError(f"{settings.source}: number of classes unknown: set data.classes, such as 3")
    expected = "the folders images and masks in train and in validation"
    folder = split_folder(Path(settings.source.removeprefix(FOLDER_PREFIX)), settings.split, expected)
    for name in ("images", "masks"):
        if not (folder / name).is_dir():
            raise DataError(f"{folder}: has no folder {name}: expected the folders images and masks")
    images = sorted(path for path in (folder / "images").iterdir() if path.suffix.lower() in _SUFFIXES)
    if not images:
        raise DataError(f"{folder / 'images'}: has no images: expected files {', '.join(_SUFFIXES)}")
    pairs = [(path, folder / "masks" / f"{path.stem}.png") for path in images]
    missing = [mask for _, mask in pairs if not mask.is_file()]
    if missing:
        raise DataError(f"{missing[0]}: no such file: {len(missing)} of {len(pairs)} images have no mask")
    return MaskedImages(_FolderMasks(pairs, classes, ignore_index), classes)


@dataclass(frozen=True)
class _FolderMasks(Dataset[Any]):
    """Pairs of files: an image, and a mask with the index of a class per pixel."""

    pairs: list[tuple[Path, Path]]
    classes: int
    ignore_index: int

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image_path, mask_path = self.pairs[index]
        image, mask = _read(image_path).convert("RGB"), _read(mask_path)
        if mask.mode not in _INDEX_MODES:
            raise DataError(f"{mask_path}: expected the index of a class per pixel, got a picture in {mask.mode}")
        if mask.size != image.size:
            raise DataError(f"{mask_path}: expected {_size(image)} pixels as {image_path.name}, got {_size(mask)}")
        values = _to_classes(mask)
        outside = values[((values < 0) | (values >= self.classes)) & (values != self.ignore_index)]
        if len(outside):
            raise DataError(
                f"{mask_path}: expected classes from 0 to {self.classes - 1}, or {self.ignore_index} for pixels that "
                f"do not count, got {int(outside[0])}: set data.classes or data.ignore_index"
            )
        return tv_tensors.Image(_to_pixels(image)), tv_tensors.Mask(values)


def _read(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}: expected an image file") from error
    return image


def _to_classes(mask: Image.Image) -> Tensor:
    """Return the values of a grey image, or the indices of the palette of another, as (H, W) of int64."""
    return torch.from_numpy(np.array(mask, dtype=np.int64))


def _to_pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


# --- VOC --------------------------------------------------------------------------------------------------------------

_VOC_SPLITS: Mapping[str, str] = dict.fromkeys(SPLITS["train"], "train") | dict.fromkeys(SPLITS["validation"], "val")


def _open_voc(settings: DataSettings) -> Dataset[Any]:
    """VOC 2012 with its masks, whose outlines are 255."""
    if settings.root is None:
        raise DataError(f"data {settings.source!r}: expected data.root, the folder of VOCdevkit")
    split = _VOC_SPLITS.get(settings.split, settings.split)
    try:
        dataset: Dataset[Any] = datasets.VOCSegmentation(
            settings.root, image_set=split, download=settings.download, transforms=_to_tensors
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"data {settings.source!r}: cannot be opened: {first_line(error)}") from error
    return dataset


def _to_tensors(image: Image.Image, mask: Image.Image) -> tuple[Any, Any]:
    return tv_tensors.Image(_to_pixels(image.convert("RGB"))), tv_tensors.Mask(_to_classes(mask))
