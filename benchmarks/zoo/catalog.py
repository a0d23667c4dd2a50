"""What a model zoo offers to the proof: how to build each model, what to feed it, and a small sample of them all."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

ZOOS = ("timm", "torchvision", "transformers")


@dataclass(frozen=True)
class Entry:
    """One model of a zoo, not yet built.

    Attributes:
        family: what models of one code base have in common; the sample holds one of each.
        build: makes the model with random parameters, on whatever device is the default.
        inputs: example inputs in order of preference, the small one first; a tensor, a tuple or a dict each.
        view: for a model that selects (boxes, keypoints): a thin module around it that gives what comes before.
        smaller: an input for a model that is too slow for this machine on the first of `inputs`.
        reduced: how it differs from the model's default size.
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
        """The name that is unique over all zoos."""
        return f"{self.zoo}:{self.name}"


def entries(zoo: str) -> Iterator[Entry]:
    """Return every model of a zoo, built or not: with and without batch norms."""
    yield from _module(zoo).entries()


def _module(zoo: str) -> Any:
    return import_module(f"benchmarks.zoo.{zoo}_models")


def sample() -> list[Entry]:
    """Return the smallest model of every timm file with batch norms and of every family of torchvision."""
    chosen = {zoo: set(_module(zoo).SAMPLE) for zoo in ("timm", "torchvision")}
    return [entry for zoo, names in chosen.items() for entry in entries(zoo) if entry.name in names]


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return normal noise, the same one at every call, on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
