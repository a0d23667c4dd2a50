"""The option --input: sizes, dtypes and defaults."""

from collections.abc import Callable, Sequence
from typing import Any

import click
import pytest
import timm
import torch
from torch import nn

from normswap.checkpoints.loading import default_inputs
from normswap.cli.options import InputSpec, example_inputs, parse_input
from tests.helpers import files


def make_inputs(specs: Sequence[InputSpec], model: nn.Module) -> Any:
    make = example_inputs(specs)
    assert make is not None
    return make(model)


def test_inputs_are_parsed() -> None:
    assert parse_input("2x3x224x224") == InputSpec((2, 3, 224, 224))
    assert parse_input("7:int64") == InputSpec((7,), "int64")
    assert parse_input("2x10:bfloat16") == InputSpec((2, 10), "bfloat16")


INPUTS: dict[str, tuple[Callable[[], nn.Module], str | None, tuple[int, ...] | None]] = {
    "timm": (lambda: timm.create_model("test_resnet"), "timm:test_resnet", (2, 3, 160, 160)),
    "channels": (
        lambda: timm.create_model("test_resnet", in_chans=1),
        "timm:test_resnet,in_chans=1",
        (2, 1, 160, 160),
    ),
    "size": (lambda: timm.create_model("test_vit"), "timm:test_vit,img_size=96", (2, 3, 96, 96)),
    "two sizes": (lambda: timm.create_model("test_vit"), "timm:test_vit,img_size=(96,64)", (2, 3, 96, 64)),
    "a pickled timm model": (lambda: timm.create_model("test_resnet"), None, (2, 3, 160, 160)),
    "anything else": (files.TiedNet, None, None),
}


@pytest.mark.parametrize(("build", "architecture", "shape"), INPUTS.values(), ids=INPUTS)
def test_the_default_input_is_of_the_real_size(
    build: Callable[[], nn.Module], architecture: str | None, shape: tuple[int, ...] | None
) -> None:
    assert example_inputs(()) is None
    x = default_inputs(build(), architecture)
    assert (None if x is None else tuple(x.shape)) == shape


def test_several_inputs_are_several_arguments() -> None:
    model = files.TiedNet()
    specs = (InputSpec((2, 3)), InputSpec((4,), "int64"), InputSpec((2, 3), "float16"))
    first, second, third = make_inputs(specs, model)
    assert (first.shape, second.dtype, third.dtype) == ((2, 3), torch.int64, torch.float16)
    assert 0 <= int(second.min()) <= int(second.max()) <= 9
    assert not torch.equal(first.half(), third)
    assert torch.equal(first, make_inputs(specs, model)[0])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "bool", "float16", "bfloat16",
                                   "float32", "float64", "complex64", "complex128"])  # fmt: skip
def test_an_input_of_any_dtype_is_made(dtype: str) -> None:
    x = make_inputs((parse_input(f"4x3x9x9:{dtype}"),), files.TiedNet())
    assert (x.dtype, x.shape) == (getattr(torch, dtype), (4, 3, 9, 9))
    values = set(x.flatten().tolist())
    assert len(values) == 2 if dtype == "bool" else len(values) > 5
    if dtype == "uint8":
        assert max(values) > 200
    if "int" in dtype and dtype != "uint8":
        assert values <= set(range(10))


def test_an_unknown_dtype_of_an_input_is_refused() -> None:
    with pytest.raises(click.BadParameter, match=r"expected a dtype among float16, .*bool, got 'uint4'"):
        parse_input("2x3:uint4")


def test_inputs_have_the_type_of_the_model() -> None:
    assert make_inputs((InputSpec((2, 3)),), files.TiedNet().double()).dtype == torch.float64
