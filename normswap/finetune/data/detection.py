"""Images with boxes: generated shapes, and data sets in the layout of COCO.

Label 0 is the background, as torchvision's detectors expect; the classes count from 1.
"""

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets, tv_tensors
from torchvision.transforms.v2 import functional

from normswap.errors import DataError
from normswap.finetune.data.datasets import find_split, split_synonyms
from normswap.finetune.data.loaders import DataSettings
from normswap.finetune.data.shapes import CLASS_NAMES, STYLES, ShapeScenes
from normswap.text import first_line

_COCO_PREFIX = "coco:"
_SHAPES_SIZE = 128  # pixels per side, if the recipe sets none


class BoxedImages(NamedTuple):
    """A data set of images with boxes as tensors of torchvision, and the names of its classes, without background."""

    dataset: Any
    class_names: tuple[str, ...]


def open_boxed_images(settings: DataSettings) -> BoxedImages:
    """Return the images and boxes of a split; a target has `boxes` (M, 4), `labels` (M,) from 1, `iscrowd` (M,).

    Raises:
        DataError: the source or the split is unknown, or a file cannot be read.
    """
    if settings.source in STYLES:
        return BoxedImages(_ShapeBoxes(settings), CLASS_NAMES)
    if settings.source.startswith(_COCO_PREFIX):
        return _open_coco(settings)
    raise DataError(f"data {settings.source!r}: expected data with boxes: {', '.join(['coco:PATH', *STYLES])}")


def make_target(
    boxes: Sequence[Sequence[float]] | Tensor, labels: Sequence[int] | Tensor, crowd: Sequence[int], image: Tensor
) -> dict[str, Any]:
    """Return a target of boxes x, y, x, y, which may be none."""
    corners = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=tuple(image.shape[-2:])),
        "labels": torch.as_tensor(labels, dtype=torch.int64),
        "iscrowd": torch.as_tensor(crowd, dtype=torch.int64),
    }


class _ShapeBoxes(Dataset[Any]):
    """Generated scenes with the boxes of their shapes."""

    def __init__(self, settings: DataSettings) -> None:
        size = max(settings.image_size or (_SHAPES_SIZE,))
        self._scenes = ShapeScenes(settings.source, find_split(settings), size=size, seed=settings.seed)

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        scene = self._scenes[index]
        target = make_target(scene.boxes, scene.labels, [0] * len(scene.labels), scene.image)
        return tv_tensors.Image(scene.image), target


# --- COCO -------------------------------------------------------------------------------------------------------------


def _open_coco(settings: DataSettings) -> BoxedImages:
    folder = Path(settings.source.removeprefix(_COCO_PREFIX))
    names = dict.fromkeys((settings.split, *split_synonyms(settings.split)))
    split = next((name for name in names if _annotations(folder, name).is_file()), None)
    if split is None:
        raise DataError(f"{_annotations(folder, settings.split)}: no such file: expected the annotations of COCO")
    if not (folder / split).is_dir():
        raise DataError(f"{folder / split}: no such folder: expected the images of {_annotations(folder, split).name}")
    return _read_coco(folder / split, _annotations(folder, split))


def _annotations(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"instances_{split}.json"


def _read_coco(images: Path, annotations: Path) -> BoxedImages:
    try:
        with redirect_stdout(StringIO()):  # pycocotools prints what it does
            dataset: Any = datasets.CocoDetection(str(images), str(annotations))
    except ImportError:
        raise DataError("data 'coco:PATH': pycocotools is not installed: pip install pycocotools") from None
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise DataError(f"{annotations}: cannot be read: {first_line(error)}: expected annotations of COCO") from error
    categories = {int(number): str(entry["name"]) for number, entry in sorted(dataset.coco.cats.items())}
    if not categories or not dataset.coco.anns:
        raise DataError(f"{annotations}: expected categories and boxes, got none")
    return BoxedImages(
        _CocoBoxes(dataset, {number: label for label, number in enumerate(categories, 1)}), (*categories.values(),)
    )


class _CocoBoxes(Dataset[Any]):
    """Images of COCO; their labels count the categories from 1, in the order of their numbers."""

    def __init__(self, dataset: Any, labels: Mapping[int, int]) -> None:
        self._dataset, self._labels = dataset, labels

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        try:
            picture, found = self._dataset[index]
        except OSError as error:
            raise DataError(f"{self._dataset.root}: an image cannot be read: {first_line(error)}") from error
        image = functional.to_image(picture)
        found = [entry for entry in found if min(entry["bbox"][2:]) > 0]  # detectors refuse boxes without area
        boxes = [(x, y, x + width, y + height) for x, y, width, height in (entry["bbox"] for entry in found)]
        labels = [self._labels[entry["category_id"]] for entry in found]
        return image, make_target(boxes, labels, [entry.get("iscrowd", 0) for entry in found], image)
