"""Images with labels as a loader: image folders, timm's other data sets, scikit-learn's digits.

Data sets and transforms are timm's. What can only be streamed (`wds/`, `tfds/`, `hfids/`) comes in timm's own order. An
image that cannot be decoded is left out by timm, which warns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from normswap.errors import DataError
from normswap.finetune.data.digits import CLASSES, DigitImages, prepare_digits
from normswap.finetune.data.loaders import USAGE_SPECS, DataSettings, EpochLoader, Loader, StreamLoader, Use
from normswap.finetune.model_source import limit_hub_wait
from normswap.surgery.arguments import require_module
from normswap.text import first_line

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_FOLDER_PREFIX = "folder:"
# Scikit-learn's digits, and which domain of `normswap.finetune.data.digits` each is.
_DIGITS = {"digits": "source", "digits:shifted": "target"}
_STREAMED_PREFIXES = ("wds/", "tfds/", "hfids/")
_TIMM_PREFIXES = ("torch/", "hfds/", *_STREAMED_PREFIXES)
# What is fetched if it is not there, also unasked.
_HUB_PREFIXES = ("hfds/", "hfids/")


@dataclass(frozen=True)
class Data:
    """Batches of images (N, C, H, W) and labels (N,), as often as they are asked for.

    `classes` and `class_names` are None where nothing tells them, `images` where the data is streamed; `settings` are
    complete. With `checked_classes` every label is held against that number.
    """

    settings: DataSettings
    loader: Loader
    images: int | None
    classes: int | None
    class_names: tuple[str, ...] | None
    checked_classes: int | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self.loader)

    def epoch(self, number: int, *, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, whose order and augmentation follow from its number and the seed.

        Args:
            first: how many batches to leave out at its start.

        Raises:
            DataError: a label that the model has no class for, or images that cannot be read.
        """
        for images, labels in self.loader.epoch(number, first=first):
            if self.checked_classes is not None:
                self._check(labels, self.checked_classes)
            yield images, labels

    def _check(self, labels: Tensor, classes: int) -> None:
        outside = labels[(labels < 0) | (labels >= classes)]
        if len(outside):
            raise DataError(
                f"{self.settings.source}: expected labels from 0 to {classes - 1}, as the model has {classes} classes, "
                f"got {int(outside[0])}: build the model with num_classes={int(labels.max()) + 1} or more"
            )


def open_data(
    settings: DataSettings,
    *,
    use: Use = "evaluation",
    model: nn.Module | None = None,
    classes: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Data:
    """Open a data set for a model.

    Args:
        settings: what is None in them is filled in from `model`.
        use: `"training"` shuffles, augments and leaves out a last batch that is not full; `"calibration"` shuffles
            only; `"evaluation"` takes every image once, in order.
        classes: how many the model tells apart; labels beyond are refused, but for calibration, which needs none.
        shard: which part of how many, one for each process: rank and world size.

    Raises:
        DataError: an unknown source or split; a folder that is missing or without images; a single class to train on,
            more classes than the model has; no image size; fewer images than a batch.
    """
    usage = USAGE_SPECS[use]
    settings = complete_settings(settings, model if model is None else require_module(model))
    dataset, class_names = _open_source(settings)
    found = None if class_names is None else len(class_names)
    if usage.labelled:
        _check_classes(settings, class_names, classes, training=use == "training")
    dataset.transform = _make_transform(settings, augmented=usage.augmented)
    checked = classes if usage.labelled else None
    if isinstance(dataset, IterableDataset):
        return Data(settings, StreamLoader(dataset, settings, usage), None, found, class_names, checked)
    loader = EpochLoader(dataset, settings, usage, shard)
    if not len(loader):
        raise DataError(
            f"{settings.source}: {len(dataset)} images ({shard[1]} processes) are fewer than one batch of "
            f"{settings.batch_size}: choose a smaller batch size"
        )
    return Data(settings, loader, len(dataset), found, class_names, checked)


def complete_settings(settings: DataSettings, model: nn.Module | None) -> DataSettings:
    """Return the settings with what is None filled in: from the model's `pretrained_cfg`, or else timm's defaults.

    Raises:
        DataError: nothing tells the image size, or the number of channels is neither 1 nor 3.
    """
    config = getattr(model, "pretrained_cfg", None)
    config = config if isinstance(config, Mapping) else {}
    if settings.image_size is None and not config.get("input_size"):
        raise DataError("nothing tells the size of images: give image_size=(224, 224)")
    resolved: dict[str, Any] = _timm().resolve_data_config({"img_size": None}, pretrained_cfg=dict(config))
    channels = settings.channels or resolved["input_size"][0]
    if channels not in (1, 3):
        raise DataError(f"expected images of 1 or 3 channels, the model takes {channels}: bring batches of your own")
    full_crop = settings.source in _DIGITS  # their strokes reach the border
    return replace(
        settings,
        image_size=settings.image_size or tuple(resolved["input_size"][1:]),
        channels=channels,
        mean=_per_channel(settings.mean or resolved["mean"], channels),
        std=_per_channel(settings.std or resolved["std"], channels),
        interpolation=settings.interpolation or resolved["interpolation"],
        crop_pct=settings.crop_pct or (1.0 if full_crop else resolved["crop_pct"]),
    )


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value a channel; a grey image takes the average of those for colours."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


# --- data sets --------------------------------------------------------------------------------------------------------


def _open_source(settings: DataSettings) -> tuple[Any, tuple[str, ...] | None]:
    """The data set, whose `transform` is to be set, and the names of its classes where it knows them."""
    if settings.source in _DIGITS:
        return _open_digits(settings)
    if settings.source.startswith(_FOLDER_PREFIX):
        return _open_folder(settings)
    if settings.source.lower().startswith(_TIMM_PREFIXES):
        return _open_named(settings)
    raise DataError(
        f"data {settings.source!r}: expected folder:PATH, digits, digits:shifted, or a name such as "
        f"{', '.join(f'{start}NAME' for start in _TIMM_PREFIXES)}"
    )


def _open_folder(settings: DataSettings) -> tuple[Any, tuple[str, ...]]:
    folder = _split_folder(Path(settings.source.removeprefix(_FOLDER_PREFIX)), settings.split)
    class_to_idx = None if settings.class_names is None else {name: i for i, name in enumerate(settings.class_names)}
    try:
        dataset: Any = _timm().create_dataset(
            "", root=str(folder), search_split=False, input_img_mode=_image_mode(settings)
        )
    except RuntimeError as error:
        raise DataError(f"{folder}: no images in it: expected a folder per class with images in it") from error
    names = tuple(dataset.reader.class_to_idx)
    if class_to_idx is None:
        return dataset, names
    unknown_classes = [name for name in names if name not in class_to_idx]
    if unknown_classes:
        raise DataError(
            f"{folder}: {len(unknown_classes)} folders are none of the {len(class_to_idx)} classes: {', '.join(unknown_classes[:3])}"
        )
    return _timm().create_dataset(
        "", root=str(folder), search_split=False, input_img_mode=_image_mode(settings), class_map=class_to_idx
    ), tuple(class_to_idx)


def _split_folder(folder: Path, split: str) -> Path:
    """The folder of a split, or the folder itself where it is not divided."""
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with a folder of images per class, there is none")
    for name in (split, *_split_synonyms(split)):
        if (folder / name).is_dir():
            return folder / name
    others = [name for names in _SPLITS.values() for name in names if (folder / name).is_dir()]
    if others:
        raise DataError(f"{folder}: has no split {split!r}: choose one of {', '.join(others)}")
    return folder


def _split_synonyms(split: str) -> tuple[str, ...]:
    return next((names for names in _SPLITS.values() if split in names), ())


def _open_named(settings: DataSettings) -> tuple[Any, tuple[str, ...] | None]:
    if not settings.download and not settings.source.lower().startswith(_HUB_PREFIXES):
        return _open_timm(settings)
    with limit_hub_wait() as network:
        try:
            return _open_timm(settings)
        except DataError as error:
            if network.is_reachable or not isinstance(error.__cause__, OSError | RuntimeError):
                raise
            raise DataError(
                f"{error}; {network.reason}, or name the folder of the data with data.root (--data-root)"
            ) from error


def _open_timm(settings: DataSettings) -> tuple[Any, tuple[str, ...] | None]:
    try:
        dataset: Any = _timm().create_dataset(
            settings.source,
            root=settings.root,
            split=settings.split,
            download=settings.download,
            batch_size=settings.batch_size,
            seed=settings.seed,
            input_img_mode=None if settings.source.startswith("torch/") else _image_mode(settings),
        )
    except (RuntimeError, ImportError, OSError, ValueError, AssertionError, TypeError) as error:
        raise DataError(f"data {settings.source!r}: cannot be opened: {first_line(error)}") from error
    names = getattr(dataset, "classes", None)
    return dataset, tuple(map(str, names)) if names else None


def _image_mode(settings: DataSettings) -> str:
    return "L" if settings.channels == 1 else "RGB"


def _open_digits(settings: DataSettings) -> tuple[Any, tuple[str, ...]]:
    try:
        digits = prepare_digits(seed=settings.seed, size=max(settings.image_size or ()))
    except ImportError:
        raise DataError("data 'digits': needs scikit-learn: pip install scikit-learn") from None
    domain = getattr(digits, _DIGITS[settings.source])
    split = next((name for name, synonyms in _SPLITS.items() if settings.split in synonyms), None)
    if split is None:
        raise DataError(
            f"data {settings.source!r}: has no split {settings.split!r}: choose one of {', '.join(_SPLITS)}"
        )
    return DigitImages(getattr(domain, split), _image_mode(settings)), tuple(map(str, range(CLASSES)))


def _check_classes(
    settings: DataSettings, names: tuple[str, ...] | None, classes: int | None, *, training: bool
) -> None:
    if names is None:
        return
    if training and len(names) < 2:
        raise DataError(
            f"{settings.source}: expected several classes to train on, got {', '.join(names) or 'images alone'}: "
            "put the images of each class in a folder of its own"
        )
    if classes is not None and len(names) > classes:
        raise DataError(
            f"{settings.source}: has {len(names)} classes, the model {classes}: build the model with "
            f"num_classes={len(names)}"
        )


def _make_transform(settings: DataSettings, *, augmented: bool) -> Any:
    try:
        return _timm().create_transform(
            (settings.channels, *(settings.image_size or ())),
            is_training=augmented,
            mean=settings.mean,
            std=settings.std,
            interpolation=settings.interpolation,
            crop_pct=settings.crop_pct,
            **(settings.augmentation if augmented else {}),
        )
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise DataError(
            f"augmentation {dict(settings.augmentation)}: {first_line(error)}: see timm.data.create_transform"
        ) from error


def _timm() -> Any:
    # As anything: it is typed in some of its versions only.
    import timm.data

    return timm.data
