"""What a model returns is taken apart completely: nothing that holds numbers is left out without a name."""

import functools
import io
import os
import threading
import types
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, distributions, nn
from torch.nn.utils.rnn import pack_sequence

from normswap.surgery.model_outputs import count_numbers, read_leaves

Pair = namedtuple("Pair", "left right")


class Box:
    def __init__(self, item: Any) -> None:
        self.item = item


class Slotted:
    __slots__ = ("item",)

    def __init__(self, item: Any) -> None:
        self.item = item


@dataclass
class Result:
    logits: Any


class Share(float):
    pass


class Several(list):  # type: ignore[type-arg]
    loss: Any


def several(y: Tensor) -> Several:
    found = Several([y.sum().item()])
    found.loss = y
    return found


# How a tensor may be wrapped, and the path where it is found.
WRAPPED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "itself": (lambda y: y, "output"),
    "a list": (lambda y: [y], "output[0]"),
    "a tuple": (lambda y: ("a", y), "output[1]"),
    "a deque": (lambda y: deque([y]), "output[0]"),
    "a named tuple": (lambda y: Pair(None, y), "output.right"),
    "a mapping": (lambda y: OrderedDict(x=y), "output['x']"),
    "a user's mapping": (lambda y: UserDict(x=y), "output['x']"),
    "a mapping proxy": (lambda y: types.MappingProxyType({"x": y}), "output['x']"),
    "a dataclass": (Result, "output.logits"),
    "a plain object": (Box, "output.item"),
    "slots": (Slotted, "output.item"),
    "a namespace": (lambda y: types.SimpleNamespace(z=Box(y)), "output.z.item"),
    "a generator": (lambda y: (item for item in [y]), "output[0]"),
    "a map": (lambda y: map(abs, [-y]), "output[0]"),
    "a set": (lambda y: {y}, "output{0}"),
    "a list with attributes": (several, "output.loss"),
    "a distribution": (lambda y: distributions.Normal(y, 1.0, validate_args=False), "output.loc"),
    "a distribution inside": (
        lambda y: distributions.Independent(distributions.Normal(y, 1.0, validate_args=False), 1),
        "output.base_dist.loc",
    ),
    "a partial call": (lambda y: functools.partial(torch.add, y), "output.args[0]"),
    "a closure": (lambda y: lambda: y + 1, "output.y"),
    "a bound method": (lambda y: y.sum, "output.__self__"),
    "numpy": (lambda y: y.numpy(), "output"),
    "numpy of objects": (lambda y: numpy.array([y.sum().item(), "a"], dtype=object), "output[0]"),
    "numpy records": (lambda y: numpy.array([(1.0, 2)], dtype=[("a", "f8"), ("b", "i4")]), "output['a']"),
    "a numpy scalar": (lambda y: y.sum().numpy()[()], "output"),
    "sparse": (lambda y: y.to_sparse(), "output"),
    "compressed rows": (lambda y: y.view(1, -1).to_sparse_csr(), "output"),
    "packed": (lambda y: pack_sequence([y]), "output.data"),
    "numbers": (lambda y: y.tolist(), "output"),
    "a number": (lambda y: y.sum().item(), "output"),
    "a number of its own class": (lambda y: Share(y.sum()), "output"),
    "a decimal": (lambda y: Decimal(y.sum().item()), "output"),
    "a fraction": (lambda y: Fraction(y.sum().item()), "output"),
    "bytes in memory": (lambda y: io.BytesIO(y.numpy().tobytes()), "output.getvalue()"),
}


@pytest.mark.parametrize(("wrap", "path"), WRAPPED.values(), ids=WRAPPED)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_the_parts_of_a_value_are_found_under_their_paths(wrap: Callable[[Tensor], Any], path: str) -> None:
    leaves = read_leaves(wrap(torch.tensor([1.0, 2.5])))
    assert leaves.opaque == {}
    assert path in leaves.values
    assert isinstance(leaves.values[path], Tensor | float | bytes)


def endless() -> Iterator[int]:
    while True:
        yield 1


class Failing:
    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no attributes today")


# What may hold numbers and shows none, and the reason that is given.
OPAQUE: dict[str, tuple[Callable[[], Any], str]] = {
    "an endless iterator": (endless, "is an iterator of more than 100,000 items"),
    "a meta tensor": (lambda: torch.ones(1, device="meta"), "is on the meta device, where tensors have no values"),
    "an object of C": (lambda: memoryview(b"abc"), "is a builtins.memoryview, whose attributes cannot be read"),
    "an open file": (partial(open, os.devnull), "is an open file"),
    "an object that raises": (Failing, "no attributes today"),
    "too deep": (lambda: functools.reduce(lambda inner, _: [inner], range(60), 1), "is nested deeper than 50 levels"),
}


@pytest.mark.parametrize(("make", "reason"), OPAQUE.values(), ids=OPAQUE)
def test_what_cannot_be_taken_apart_is_named(make: Callable[[], Any], reason: str) -> None:
    value = make()
    leaves = read_leaves({"x": value})
    assert list(leaves.opaque.values()) == [reason]
    assert next(iter(leaves.opaque)).startswith("output['x']")
    if hasattr(value, "close"):
        value.close()


def test_what_is_no_data_is_left_out() -> None:
    cycle: list[Any] = [1.0]
    cycle.append(cycle)
    leaves = read_leaves([nn.Linear(1, 1), threading.Lock(), torch, Box, cycle, object()])
    assert leaves.opaque == {}
    assert [value for value in leaves.values.values() if isinstance(value, float)] == [1.0]


def test_only_numbers_count_as_comparable() -> None:
    assert count_numbers(read_leaves([None, "a", b"b", [], {}, torch.zeros(0)])) == 0
    assert count_numbers(read_leaves([True, 2.0, torch.zeros(3), numpy.zeros(2)])) == 7
