"""Data sets as batches, epoch by epoch.

The order is drawn from seed and epoch, and each image is augmented under a random state made of seed, epoch and its
index: what an epoch yields follows from its number, with any number of workers.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from normswap.errors import DataError
from normswap.model_state import seeded

# MERGED DOC: Where every random number of a run comes from: the seed and a position, never what was drawn before.

# MERGED DOC: What is said of a data set before it is opened: where it lies, what its images become, what they are for.


def derive_seed(*numbers: int) -> int:
    """Return a seed of 32 bits that follows from all numbers and their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_generators(seed: int) -> None:
    """Set the generators of Python, numpy and torch, those of devices that are in use included."""
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which takes milliseconds for devices that are not there.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


Use = Literal["training", "calibration", "evaluation"]


@dataclass(frozen=True)
class UsageSpec:
    """What a use asks of the data: images in random order, augmented, in whole batches only, with labels."""

    shuffled: bool
    augmented: bool
    drop_last: bool
    labelled: bool


USAGE_SPECS: Mapping[str, UsageSpec] = {
    "training": UsageSpec(shuffled=True, augmented=True, drop_last=True, labelled=True),
    # Folders come class by class, and a batch of one class has statistics of its own.
    "calibration": UsageSpec(shuffled=True, augmented=False, drop_last=False, labelled=False),
    "evaluation": UsageSpec(shuffled=False, augmented=False, drop_last=False, labelled=True),
}


@dataclass(frozen=True)
class DataSettings:
    """Which images, and how they become batches. What is None is as the model's `pretrained_cfg` says.

    Attributes:
        source: `folder:PATH` with a folder per class, in PATH/SPLIT where there is one; `digits`, or
            `digits:shifted`, of another domain; or a name of timm's, `torch/cifar10`, `hfds/NAME`, `wds/NAME`.
        split: `train`, `validation`, `test`, or what the data set calls it.
        root: where a data set of timm's lies, or is put if `download` is set.
        image_size: height and width in pixels.
        channels: 1 (grey) or 3.
        mean, std: per channel, of pixels from 0 to 1.
        crop_pct: the share of the resized image that is cut out of its middle.
        augmentation: for training, options of `timm.data.create_transform` such as `{"auto_augment": "rand-m9"}`.
        class_names: the folders of the classes in the order of their labels, as `Data.class_names` of the training
            split has them; by default those that are there.
    """

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


class Loader(Protocol):
    """What yields the batches of an epoch, and knows how many there are where that can be known."""

    def epoch(self, number: int, *, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


class _EpochSampler(Sampler[tuple[int, int]]):
    """The images of one process in the order of an epoch, each with the epoch, from which its augmentation follows."""

    def __init__(self, total: int, settings: DataSettings, usage: UsageSpec, shard: tuple[int, int]) -> None:
        self.epoch = self.first = 0
        self._total, self._seed, self._shuffled, self._shard = total, settings.seed, usage.shuffled, shard
        # All processes take the same number of steps in training; nothing is left out elsewhere.
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
    """A data set by (epoch, index), each image augmented under a random state that follows from these and the seed."""

    def __init__(self, dataset: Any, settings: DataSettings, usage: UsageSpec) -> None:
        self._dataset, self._seed, self._augment = dataset, settings.seed, usage.augmented

    def __getitem__(self, item: tuple[int, int]) -> Any:
        epoch, index = item
        if not self._augment:
            return self._dataset[index]
        with seeded(derive_seed(self._seed, epoch, index), cpu_only=True):
            return self._dataset[index]


class EpochLoader:
    """Batches of a data set that knows its images by number."""

    def __init__(self, dataset: Any, settings: DataSettings, usage: UsageSpec, shard: tuple[int, int]) -> None:
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
            generator=torch.Generator(),  # of its own: else each epoch would draw from the caller's
        )

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, number: int, *, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._order.epoch, self._order.first = number, first * (self._loader.batch_size or 1)
        try:
            yield from _report_read_errors(self._source, self._loader)
        finally:
            self._order.first = 0


class StreamLoader:
    """Batches of a data set of timm's that can only be streamed."""

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
        self._dataset.set_epoch(number)
        yield from islice(_report_read_errors(self._source, self._loader), first, None)


def _report_read_errors(source: str, loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, and what timm says where it finds no image that can be read."""
    try:
        yield from loader
    except RuntimeError as error:
        if "Failed to load" not in str(error):
            raise
        raise DataError(f"{source}: {str(error).strip().splitlines()[-1]}: are these images?") from error
