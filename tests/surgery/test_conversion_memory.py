"""What a conversion in place allocates: almost nothing, for it moves no weights."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normswap import convert, revert

ALLOWED = 0.1  # of the size of the model: the peak is at most 1.1 times that size


class _Allocations(TorchDispatchMode):
    """Counts the bytes of every storage that an operation brings into being, also of those that are freed again."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        made = {_storage(leaf): leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        self.bytes += sum(leaf.untyped_storage().nbytes() for key, leaf in made.items() if key not in known)
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def size_of(model: nn.Module) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in (*model.parameters(), *model.buffers()))


def allocated_by(action: Callable[[], Any]) -> int:
    with _Allocations() as allocations:
        action()
    return allocations.bytes


MODELS = {
    "timm resnet50": lambda: timm.create_model("resnet50"),
    "timm mobilenetv3_small_050": lambda: timm.create_model("mobilenetv3_small_050"),
    "torchvision densenet121": lambda: torchvision.models.densenet121(),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_converting_in_place_needs_less_than_a_tenth_of_the_model(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert allocated_by(lambda: convert(model, inplace=True, match=False)) < ALLOWED * size_of(model)
    assert allocated_by(lambda: revert(model)) < ALLOWED * size_of(model)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_constants_of_matched_branches_are_small(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = size_of(model)
    convert(model, inplace=True)
    assert before < size_of(model) < (1 + ALLOWED) * before


def test_the_count_sees_a_copy_of_the_model() -> None:
    model = MODELS["timm resnet50"]()
    assert allocated_by(lambda: convert(model)) > size_of(model)


def test_the_count_sees_storages_and_no_views() -> None:
    x = torch.zeros(10)
    assert allocated_by(lambda: x.view(2, 5)) == 0
    assert allocated_by(lambda: x + 1) == 40
