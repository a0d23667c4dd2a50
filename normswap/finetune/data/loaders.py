"""Data sets as batches, epoch by epoch, with the settings that describe a data set before it is opened.

Every random number follows from the seed and a position, never from earlier draws: the order of an epoch from its
number, the augmentation of an image from epoch and index. So an epoch is the same for any number of workers, and a run
can be resumed at any batch.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from normswap.errors import DataError
from normswap.model_state import seeded

# --- random numbers ---------------------------------------------------------------------------------------------------


def derive_seed(*numbers: int) -> int:
    """Return a 32-bit seed that depends on all numbers and their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, numpy and torch, including those of CUDA devices."""
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which takes milliseconds for backends that are not available.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


# --- settings ---------------------------------------------------------------------------------------------------------

Use = Literal["training", "calibration", "evaluation"]


@dataclass(frozen=True)
class UsageSpec:
    """How a use reads the data: in random order, augmented, without an incomplete last batch, with valid labels."""

    shuffled: bool
    augmented: bool
    drop_last: bool
    labelled: bool


USAGE_SPECS: Mapping[str, UsageSpec] = {
    "training": UsageSpec(shuffled=True, augmented=True, drop_last=True, labelled=True),
    # Folders are read class by class, and the statistics of a batch of one class are not those of the data.
    "calibration": UsageSpec(shuffled=True, augmented=False, drop_last=False, labelled=False),
    "evaluation": UsageSpec(shuffled=False, augmented=False, drop_last=False, labelled=True),
}


@dataclass(frozen=True)
class DataSettings:
    """Which images to read, and how to batch them. The `pretrained_cfg` of the model replaces every None.

    Attributes:
        source: `folder:PATH` with a folder per class, in PATH/SPLIT if that exists; `digits`, or the shifted domain
            `digits:shifted`; or a timm name, `torch/cifar10`, `hfds/NAME`, `wds/NAME`.
        split: `train`, `validation`, `test`, or the data set's own name.
        root: the folder of a timm data set, and the target if `download` is set.
        image_size: height and width in pixels.
        channels: 1 (grey) or 3.
        interpolation: the method that resizes images, by its name in timm, such as `bicubic`.
        mean, std: per channel, of pixels from 0 to 1.
        crop_pct: the fraction of the resized image that the centre crop keeps.
        batch_size: images per batch and process.
        workers: processes that read images; 0 reads them in the calling process.
        augmentation: for training, options of `timm.data.create_transform` such as `{"auto_augment": "rand-m9"}`.
        class_names: the folders of the classes in the order of their labels, such as the `Data.class_names` of the
            training split; None: the folders that exist, sorted.
        seed: of the order and the augmentation.

    Examples:
        >>> import normswap
        >>> normswap.DataSettings("folder:images", image_size=(224, 224), batch_size=4).split
        'train'
    """

    __module__ = "normswap"

    source: str
    split: str = "train"
    root: str | None = None
    download: bool = False
    image_size: tuple[int, int] | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    batch_size: int = 32
    workers: int = 0
    augmentation: Mapping[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    seed: int = 0


# --- loaders ----------------------------------------------------------------------------------------------------------


class Loader(Protocol):
    """Yields the batches of an epoch, and knows their number if the data set does."""

    def epoch(self, number: int, *, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


class _EpochSampler(Sampler[tuple[int, int]]):
    """The image indices of one process in the order of an epoch, each paired with the epoch for its augmentation."""

    def __init__(self, total: int, settings: DataSettings, usage: UsageSpec, shard: tuple[int, int]) -> None:
        self.epoch = self.first = 0
        self._total, self._seed, self._shuffled, self._shard = total, settings.seed, usage.shuffled, shard
        # In training all processes take the same number of steps; other uses read every image.
        self._num_samples = total // shard[1] if usage.drop_last else len(range(shard[0], total, shard[1]))

    def __len__(self) -> int:
        return self._num_samples - self.first

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = self.epoch, list(range(self._total))
        if self._shuffled:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, epoch))
            order = torch.randperm(self._total, generator=generator).tolist()
        rank, world = self._shard
        return iter([(epoch, index) for index in order[rank::world][self.first : self._num_samples]])


class _AugmentedDataset(Dataset[Any]):
    """A data set by (epoch, index); these and the seed determine the augmentation of an image."""

    def __init__(self, dataset: Any, settings: DataSettings, usage: UsageSpec) -> None:
        self._dataset, self._seed, self._augment = dataset, settings.seed, usage.augmented

    def __getitem__(self, item: tuple[int, int]) -> Any:
        epoch, index = item
        if not self._augment:
            return self._dataset[index]
        with seeded(derive_seed(self._seed, epoch, index), cpu_only=True):
            return self._dataset[index]


class EpochLoader:
    """Batches of a data set with random access.

    Args:
        dataset: a map-style data set of torch.
        collate: makes a batch of a list of samples; None: torch's own.

    Raises:
        DataError: the data set has fewer samples than one batch needs.
    """

    def __init__(
        self,
        dataset: Any,
        settings: DataSettings,
        usage: UsageSpec,
        shard: tuple[int, int],
        *,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self._source = settings.source
        self._order = _EpochSampler(len(dataset), settings, usage, shard)
        self._loader: DataLoader[Any] = DataLoader(
            _AugmentedDataset(dataset, settings, usage),
            batch_size=settings.batch_size,
            sampler=self._order,
            num_workers=settings.workers,
            drop_last=usage.drop_last,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=settings.workers > 0,
            generator=torch.Generator(),  # else each epoch would draw from the caller's generator
            collate_fn=collate,
        )
        if not len(self._loader):
            raise DataError(
                f"{settings.source}: {len(dataset)} images ({shard[1]} processes) are fewer than one batch of "
                f"{settings.batch_size}: choose a smaller batch size"
            )

    @property
    def num_samples(self) -> int:
        """The number of samples of this process."""
        return len(self._order)

    def __iter__(self) -> Iterator[Any]:
        return self.epoch(0)

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, number: int, *, first: int = 0) -> Iterator[Any]:
        """Yield the batches of an epoch from batch number `first` on."""
        self._order.epoch, self._order.first = number, first * (self._loader.batch_size or 1)
        try:
            yield from _report_read_errors(self._source, self._loader)
        finally:
            self._order.first = 0


class StreamLoader:
    """Batches of a timm data set that can only be streamed."""

    def __init__(self, dataset: Any, settings: DataSettings, usage: UsageSpec) -> None:
        self._source, self._dataset = settings.source, dataset
        dataset.set_loader_cfg(num_workers=settings.workers)
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=settings.batch_size,
            num_workers=settings.workers,
            drop_last=usage.drop_last,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, number: int, *, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from batch number `first` on; the stream is read from its start."""
        self._dataset.set_epoch(number)
        yield from islice(_report_read_errors(self._source, self._loader), first, None)


def _report_read_errors(source: str, loader: Iterable[Any]) -> Iterator[Any]:
    """The batches; timm's error for images that it cannot read becomes a DataError, as does that of a worker."""
    try:
        yield from loader
    except DataError as error:  # of a worker, whose message has a traceback
        raise DataError(
            str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")
        ) from None
    except RuntimeError as error:
        if "Failed to load" not in str(error):
            raise
        raise DataError(f"{source}: {str(error).strip().splitlines()[-1]}: expected image files") from error
