"""The models of a zoo: how to build each one, its example inputs, and a small sample."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

ZOOS = ("timm", "torchvision", "transformers")


@dataclass(frozen=True)
class Entry:
    """One model of a zoo, before it is built.

    Attributes:
        family: the source file or group of the model; the sample has one model of each family.
        build: returns the model with random parameters on the default device.
        inputs: example inputs in order of preference, smallest first; each is a tensor, a tuple or a dict.
        view: for a model that selects boxes or keypoints, a wrapper that returns the outputs before the selection.
        smaller: an input for a model that is too slow on the first of `inputs`.
        reduced: how the configuration differs from the default size.
    """

    zoo: str
    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Sequence[Any]]
    view: Callable[[nn.Module], nn.Module] | None = None
    smaller: Callable[[nn.Module], Any] | None = None
    reduced: str = ""

    @property
    def key(self) -> str:
        """Return the name that is unique over all zoos."""
        return f"{self.zoo}:{self.name}"


def entries(zoo: str) -> Iterator[Entry]:
    """Yield every model of a zoo, with and without batch norms."""
    yield from _module(zoo).entries()


def _module(zoo: str) -> Any:
    return import_module(f"benchmarks.zoo.{zoo}_models")


def sample() -> list[Entry]:
    """Return the smallest model of every timm file with batch norms and of every family of torchvision."""
    chosen = {zoo: set(_module(zoo).SAMPLE) for zoo in ("timm", "torchvision")}
    return [entry for zoo, names in chosen.items() for entry in entries(zoo) if entry.name in names]


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return normal noise on the CPU, equal for equal arguments."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
