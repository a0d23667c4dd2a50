"""Data sets as batches, epoch by epoch.

The order is drawn from seed and epoch, and each image is augmented under a random state made of seed, epoch and its
index: what an epoch yields follows from its number, with any number of workers.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from normswap.errors import DataError
from normswap.finetune.image_source import DataSettings, Manner
from normswap.finetune.randomness import mixed
from normswap.modes import seeded


class Loader(Protocol):
    """What yields the batches of an epoch, and knows how many there are where that can be known."""

    def epoch(self, number: int, *, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


class _Order(Sampler[tuple[int, int]]):
    """The images of one process in the order of an epoch, each with the epoch, from which its augmentation follows."""

    def __init__(self, total: int, settings: DataSettings, manner: Manner, shard: tuple[int, int]) -> None:
        self.epoch = self.first = 0
        self._total, self._seed, self._shuffled, self._shard = total, settings.seed, manner.shuffled, shard
        # All processes take the same number of steps in training; nothing is left out elsewhere.
        self._share = total // shard[1] if manner.whole_batches else len(range(shard[0], total, shard[1]))

    def __len__(self) -> int:
        return self._share - self.first

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = self.epoch, list(range(self._total))
        if self._shuffled:
            generator = torch.Generator().manual_seed(mixed(self._seed, epoch))
            order = torch.randperm(self._total, generator=generator).tolist()
        rank, world = self._shard
        return iter([(epoch, index) for index in order[rank::world][self.first : self._share]])


class _Augmented(Dataset[Any]):
    """A data set by (epoch, index), each image augmented under a random state that follows from these and the seed."""

    def __init__(self, dataset: Any, settings: DataSettings, manner: Manner) -> None:
        self._dataset, self._seed, self._random = dataset, settings.seed, manner.augmented

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        if not self._random:
            return self._dataset[index]
        with seeded(mixed(self._seed, epoch, index), cpu_only=True):
            return self._dataset[index]


class Epochs:
    """Batches of a data set that knows its images by number."""

    def __init__(self, dataset: Any, settings: DataSettings, manner: Manner, shard: tuple[int, int]) -> None:
        self._source = settings.source
        self._order = _Order(len(dataset), settings, manner, shard)
        self._loader: DataLoader[Any] = DataLoader(
            _Augmented(dataset, settings, manner),
            batch_size=settings.batch_size,
            sampler=self._order,
            num_workers=settings.workers,
            drop_last=manner.whole_batches,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=settings.workers > 0,
            generator=torch.Generator(),  # of its own: else each epoch would draw from the caller's
        )

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, number: int, *, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._order.epoch, self._order.first = number, first * (self._loader.batch_size or 1)
        try:
            yield from _told(self._source, self._loader)
        finally:
            self._order.first = 0


class Stream:
    """Batches of a data set of timm's that can only be streamed."""

    def __init__(self, dataset: Any, settings: DataSettings, manner: Manner) -> None:
        self._source, self._dataset = settings.source, dataset
        dataset.set_loader_cfg(num_workers=settings.workers)
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=settings.batch_size,
            num_workers=settings.workers,
            drop_last=manner.whole_batches,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, number: int, *, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._dataset.set_epoch(number)
        yield from islice(_told(self._source, self._loader), first, None)


def _told(source: str, loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, and what timm says where it finds no image that can be read."""
    try:
        yield from loader
    except RuntimeError as error:
        if "Failed to load" not in str(error):
            raise
        raise DataError(f"{source}: {str(error).strip().splitlines()[-1]}: are these images?") from error
