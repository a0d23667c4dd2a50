"""Labelled images as batches: image folders, timm's other data sets, scikit-learn's digits.

Data sets and transforms are timm's. A data set that can only be streamed (`wds/`, `tfds/`, `hfids/`) keeps timm's own
order. timm skips an image that it cannot decode, and warns. Without a network, downloads fail after seconds with one
message instead of many retries.
"""

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from torch import Tensor, nn
from torch.utils.data import IterableDataset

from normswap.errors import DataError
from normswap.finetune.data.digits import CLASSES, DigitImages, prepare_digits
from normswap.finetune.data.loaders import USAGE_SPECS, DataSettings, EpochLoader, Loader, StreamLoader, Use
from normswap.surgery.arguments import require_module, require_type
from normswap.text import first_line

logger = logging.getLogger(__name__)

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
    "test": ("test", "testing"),
}
FOLDER_PREFIX = "folder:"
# The domains of `normswap.finetune.data.digits` by the source that selects them.
_DIGITS = {"digits": "source", "digits:shifted": "target"}
_STREAMED_PREFIXES = ("wds/", "tfds/", "hfids/")
_TORCHVISION_PREFIX = "torch/"
_TIMM_PREFIXES = (_TORCHVISION_PREFIX, "hfds/", *_STREAMED_PREFIXES)
# Data sets of the hub, which timm downloads even without `download`.
_HUB_PREFIXES = ("hfds/", "hfids/")


@dataclass(frozen=True)
class Data:
    """Batches of images (N, C, H, W) and labels (N,), as `normswap.open_data` returns them. Iterating starts again.

    Attributes:
        settings: the settings of the data, with every None replaced.
        loader: reads the batches.
        images: the number of images; None if the data is streamed.
        classes, class_names: the number and the names of the classes; None if the data set does not know them.
        checked_classes: the number of classes that every label is checked against; None: no check.
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
        """Yield the batches of an epoch; the seed and the number of the epoch determine order and augmentation.

        Args:
            number: the number of the epoch, from 0.
            first: the number of batches to skip at its start.

        Raises:
            DataError: the model has no class for a label, or images cannot be read.
        """
        for images, labels in self.loader.epoch(number, first=first):
            if self.checked_classes is not None:
                self._check(labels, self.checked_classes)
            yield images, labels

    def _check(self, labels: Tensor, classes: int) -> None:
        outside = labels[(labels < 0) | (labels >= classes)]
        if len(outside):
            raise DataError(
                f"{self.settings.source}: expected labels from 0 to {classes - 1}, since the model has {classes} "
                f"classes, got {int(outside[0])}: build the model with num_classes={int(labels.max()) + 1} or more"
            )


def open_data(
    settings: DataSettings,
    *,
    use: Use = "evaluation",
    model: nn.Module | None = None,
    classes: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Data:
    """Open a data set as batches of images and labels.

    Args:
        settings: the data set, its split and the form of its batches.
        use: `"training"` shuffles, augments and drops an incomplete last batch; `"calibration"` shuffles only;
            `"evaluation"` reads every image once, in order.
        model: completes the settings: image size, channels, mean and std from its `pretrained_cfg`, as timm has it.
        classes: the number of classes of the model; other labels are refused, except in calibration.
        shard: rank and world size; each process reads its own part of the images.

    Returns:
        The batches: iterating yields images (N, C, H, W) and labels (N,).

    Raises:
        ArgumentError: `model` is not a module, or `settings` no `DataSettings`.
        DataError: the source or split is unknown; a folder is missing or has no images; there is a single class to
            train on, or more classes than the model has; the image size is unknown; there are fewer images than a
            batch needs.

    Examples:
        >>> import normswap
        >>> settings = normswap.DataSettings("digits", split="test", image_size=(32, 32), batch_size=50)
        >>> data = normswap.open_data(settings)
        >>> images, labels = next(iter(data))
        >>> images.shape, len(data), data.classes
        (torch.Size([50, 3, 32, 32]), 4, 10)
    """
    require_type(settings, DataSettings, "settings", "a DataSettings, such as DataSettings('digits')")
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
    return Data(settings, loader, len(dataset), found, class_names, checked)


def complete_settings(settings: DataSettings, model: nn.Module | None) -> DataSettings:
    """Return the settings with every None replaced: from the model's `pretrained_cfg`, or else by timm's defaults.

    Raises:
        DataError: the image size is unknown, or the number of channels is neither 1 nor 3.
    """
    config = getattr(model, "pretrained_cfg", None)
    config = config if isinstance(config, Mapping) else {}
    if settings.image_size is None and not config.get("input_size"):
        raise DataError("image size unknown: pass image_size=(224, 224)")
    resolved: dict[str, Any] = _timm().resolve_data_config({"img_size": None}, pretrained_cfg=dict(config))
    channels = settings.channels or resolved["input_size"][0]
    if channels not in (1, 3):
        raise DataError(f"expected a model for images of 1 or 3 channels, got {channels}: pass your own batches")
    full_crop = settings.source in _DIGITS  # whose strokes reach the border
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
    """One value per channel; a grey image takes the mean of the three colours."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


# --- data sets --------------------------------------------------------------------------------------------------------


def _open_source(settings: DataSettings) -> tuple[Any, tuple[str, ...] | None]:
    """The data set, without its `transform`, and the names of its classes if it knows them."""
    if settings.source in _DIGITS:
        return _open_digits(settings)
    if settings.source.startswith(FOLDER_PREFIX):
        return _open_folder(settings)
    if settings.source.lower().startswith(_TIMM_PREFIXES):
        return _open_named(settings)
    raise DataError(
        f"data {settings.source!r}: expected folder:PATH, digits, digits:shifted, or a name such as "
        f"{', '.join(f'{start}NAME' for start in _TIMM_PREFIXES)}"
    )


def _open_folder(settings: DataSettings) -> tuple[Any, tuple[str, ...]]:
    folder = split_folder(Path(settings.source.removeprefix(FOLDER_PREFIX)), settings.split)
    class_to_idx = None if settings.class_names is None else {name: i for i, name in enumerate(settings.class_names)}
    try:
        dataset: Any = _timm().create_dataset(
            "", root=str(folder), search_split=False, input_img_mode=_image_mode(settings)
        )
    except RuntimeError as error:
        raise DataError(f"{folder}: has no images: expected one folder of images per class") from error
    names = tuple(dataset.reader.class_to_idx)
    if class_to_idx is None:
        return dataset, names
    unknown_classes = [name for name in names if name not in class_to_idx]
    if unknown_classes:
        raise DataError(
            f"{folder}: {len(unknown_classes)} folders do not name one of the {len(class_to_idx)} classes: "
            f"{', '.join(unknown_classes[:3])}"
        )
    return _timm().create_dataset(
        "", root=str(folder), search_split=False, input_img_mode=_image_mode(settings), class_map=class_to_idx
    ), tuple(class_to_idx)


def split_folder(folder: Path, split: str, expected: str = "a folder of images per class") -> Path:
    """Return the folder of a split, or the folder itself if it has no splits.

    Raises:
        DataError: there is no such folder, or it has other splits only; `expected` says what belongs into it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder: expected one with {expected}")
    for name in (split, *split_synonyms(split)):
        if (folder / name).is_dir():
            return folder / name
    others = [name for names in SPLITS.values() for name in names if (folder / name).is_dir()]
    if others:
        raise DataError(f"{folder}: has no split {split!r}: choose one of {', '.join(others)}")
    return folder


def split_synonyms(split: str) -> tuple[str, ...]:
    """Return the names under which data sets have a split."""
    return next((names for names in SPLITS.values() if split in names), ())


def find_split(settings: DataSettings) -> str:
    """Return which of the three splits of a data set of normswap the settings name; raises DataError if none."""
    split = next((name for name, synonyms in SPLITS.items() if settings.split in synonyms), None)
    if split is None:
        raise DataError(f"data {settings.source!r}: has no split {settings.split!r}: choose one of {', '.join(SPLITS)}")
    return split


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
            input_img_mode=None if settings.source.lower().startswith(_TORCHVISION_PREFIX) else _image_mode(settings),
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
        raise DataError("data 'digits': scikit-learn is not installed: pip install scikit-learn") from None
    domain = getattr(digits, _DIGITS[settings.source])
    return DigitImages(getattr(domain, find_split(settings)), _image_mode(settings)), tuple(map(str, range(CLASSES)))


def _check_classes(
    settings: DataSettings, names: tuple[str, ...] | None, classes: int | None, *, training: bool
) -> None:
    if names is None:
        return
    if training and len(names) < 2:
        raise DataError(
            f"{settings.source}: expected several classes to train on, got {', '.join(names) or 'none'}: put the "
            "images of each class in a folder of its own"
        )
    if classes is not None and len(names) > classes:
        raise DataError(
            f"{settings.source}: has {len(names)} classes, but the model has {classes}: build the model with "
            f"num_classes={len(names)}"
        )


def _make_transform(settings: DataSettings, *, augmented: bool) -> Any:
    try:
        transform = _timm().create_transform(
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
    # timm passes the images of torchvision's data sets on as they are, such as grey ones to a network for colours.
    is_raw = settings.source.lower().startswith(_TORCHVISION_PREFIX)
    return partial(_transform_in_mode, transform, _image_mode(settings)) if is_raw else transform


def _transform_in_mode(transform: Any, mode: str, image: Any) -> Any:
    return transform(image.convert(mode))


def _timm() -> Any:
    # As Any: only some of its versions are typed.
    import timm.data

    return timm.data


# --- downloads --------------------------------------------------------------------------------------------------------

_CONNECT_TIMEOUT = 4.0  # seconds for name resolution and a handshake
_READ_TIMEOUT = 10.0  # seconds without an answer, for libraries that set no limit


class HubStatus(NamedTuple):
    """Whether the hub, or the proxy before it, answers; if not, the reason and its remedy."""

    is_reachable: bool
    reason: str = ""


@contextmanager
def limit_hub_wait() -> Iterator[HubStatus]:
    """Yield whether the hub can be reached; if not, the block reads the cache only, and fails at once without it."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield HubStatus(False, "HF_HUB_OFFLINE forbids downloads: unset it")
        return
    if _can_connect(*_resolve_address(constants.ENDPOINT)):
        yield HubStatus(True)
        return
    host = urlsplit(constants.ENDPOINT).hostname
    logger.info("%s cannot be reached: only its cache is used", host)
    was_offline, old_timeout = constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    _set_offline(constants, True)
    socket.setdefaulttimeout(_READ_TIMEOUT)
    try:
        yield HubStatus(False, f"{host} cannot be reached: connect to the network")
    finally:
        _set_offline(constants, was_offline)
        socket.setdefaulttimeout(old_timeout)


def _set_offline(constants: Any, value: bool) -> None:
    import huggingface_hub.utils as utils

    constants.HF_HUB_OFFLINE = value
    # Older versions read the constant when they open a session.
    getattr(utils, "reset_sessions", lambda: None)()


def _resolve_address(url: str) -> tuple[str, int]:
    """The host and port of a request for `url`: those of a proxy, if one is configured."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    default = {"http": 80, "https": 443}.get(parts.scheme, 1080)
    return parts.hostname or "", parts.port or default


def _can_connect(host: str, port: int) -> bool:
    """Whether a connection opens in time. In a thread, since name resolution has no timeout of its own."""
    results: list[bool] = []

    def connect() -> None:
        """Append the result, in the thread."""
        try:
            socket.create_connection((host, port), _CONNECT_TIMEOUT).close()
            results.append(True)
        except OSError:
            results.append(False)

    thread = Thread(target=connect, name=f"connection to {host} (process {os.getpid()})", daemon=True)
    thread.start()
    thread.join(_CONNECT_TIMEOUT)
    return results == [True]
