"""Options that several commands share, and how their values are read."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from normswap.text import jsonable

if TYPE_CHECKING:
    import torch
    from torch import nn

_FLOATING_DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
# The random integers of each: token ids that every vocabulary has, or the values of an image.
_INTEGER_RANGES = {"uint8": 256, "int8": 10, "int16": 10, "int32": 10, "int64": 10, "bool": 2}
_SEED = 0
# As `normswap.surgery.selection.KINDS`, which is not imported for a look at --help.
_KINDS = ("bn", "in", "gn1")


@dataclass(frozen=True)
class InputSpec:
    """One example input as `--input` gives it: a shape, a dtype or None for the model's own, and the entry of the
    network that it is for, or None.
    """

    shape: tuple[int, ...]
    dtype: str | None = None
    entry: str | None = None


def parse_input(text: str) -> InputSpec:
    """Return the input that `2x3x224x224[:dtype]` describes.

    Raises:
        click.BadParameter: another form, an empty dimension, or an unknown dtype.
    """
    sizes, _, dtype = text.partition(":")
    if not re.fullmatch(r"\d+(x\d+)*", sizes) or "0" in sizes.split("x"):
        raise click.BadParameter(f"expected sizes such as 2x3x224x224[:dtype], got {text!r}")
    known = (*_FLOATING_DTYPES, *_INTEGER_RANGES)
    if (dtype or "float32") not in known:
        raise click.BadParameter(f"expected a dtype among {', '.join(known)}, got {dtype!r}")
    return InputSpec(tuple(map(int, sizes.split("x"))), dtype or None)


def _parse_inputs(_context: click.Context, _parameter: click.Parameter, texts: Sequence[str]) -> tuple[InputSpec, ...]:
    return tuple(map(parse_input, texts))


def _parse_named_inputs(
    _context: click.Context, _parameter: click.Parameter, texts: Sequence[str]
) -> tuple[InputSpec, ...]:
    named = (text.rpartition("=") for text in texts)
    return tuple(replace(parse_input(sizes), entry=entry if equals else None) for entry, equals, sizes in named)


def _parse_kinds(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    kinds = tuple(word.strip() for word in text.split(","))
    if not {*kinds} <= {*_KINDS}:
        raise click.BadParameter(f"expected some of {', '.join(_KINDS)} with commas between, got {text!r}")
    return kinds


def example_inputs(specs: Sequence[InputSpec], model: "nn.Module", architecture: str | None) -> Any:
    """Return a tensor, a tuple of tensors for several specs, or None where nothing tells the shape.

    Values are random normal (integers: 0 to 9, of `uint8` 0 to 255, booleans both) from a fixed seed. Without specs
    the shape is the one that timm's configuration of `model` gives, with batch size 2.
    """
    from normswap.checkpoints.architecture.registry import default_input_shape

    if not specs:
        shape = default_input_shape(model, architecture)
        if shape is None:
            return None
        specs = (InputSpec(shape),)
    tensors = tuple(_make_random(spec, _dtype_of(model), _SEED + index) for index, spec in enumerate(specs))
    return tensors[0] if len(tensors) == 1 else tensors


def _make_random(spec: InputSpec, default: "torch.dtype", seed: int) -> "torch.Tensor":
    import torch

    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, spec.dtype) if spec.dtype else default
    if spec.dtype in _INTEGER_RANGES:
        return torch.randint(0, _INTEGER_RANGES[spec.dtype], spec.shape, generator=generator).to(dtype)
    draw = torch.complex64 if dtype.is_complex else torch.float32
    return torch.randn(spec.shape, generator=generator, dtype=draw).to(dtype)


def _dtype_of(model: "nn.Module") -> "torch.dtype":
    import torch

    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document on stdout; numbers that JSON does not have become null."""
    click.echo(json.dumps(jsonable(document), indent=2))


arch_option = click.option(
    "--arch",
    metavar="NAME[,KEY=VALUE...]",
    help="What the tensors belong to: timm:NAME, torchvision:NAME, hf:FOLDER or path/file.py:function, with keywords "
    "such as num_classes=10. Files that normswap wrote say it themselves.",
)
entry_option = click.option(
    "--entry",
    metavar="NAME",
    help="Which weights of several in the file are meant, such as state_dict_ema; dots between nested entries.",
)
# `convert` takes several networks of one file: each of these options once for all, or once for each in their order.
archs_option = click.option(
    "--arch",
    "archs",
    multiple=True,
    metavar="ZOO:NAME[,KEY=VALUE...]",
    help="What the tensors belong to: timm:NAME, torchvision:NAME, hf:FOLDER or path/file.py:function, with keywords "
    "such as num_classes=10; none: convert by names alone. Files that normswap wrote say it themselves. With several "
    "--entry give one, or one for each in their order.",
)
entries_option = click.option(
    "--entry",
    "entries",
    multiple=True,
    metavar="NAME",
    help="Which weights of several in the file are meant, such as state_dict_ema; dots between nested entries, and "
    "before the first part of names inside a state dict. Repeat it to convert several networks.",
)
named_inputs_option = click.option(
    "--input",
    "inputs",
    metavar="[ENTRY=]SIZES[:DTYPE]",
    multiple=True,
    callback=_parse_named_inputs,
    help="Example input such as 2x3x224x224; repeat it for several arguments. With several --entry give one, one for "
    "each in their order, or name the network: g=2x100. Default: what timm's configuration says.",
)
input_option = click.option(
    "--input",
    "inputs",
    metavar="SIZES[:DTYPE]",
    multiple=True,
    callback=_parse_inputs,
    help="Example input such as 2x3x224x224; repeat it for several arguments. Default: what timm's configuration says.",
)
kinds_option = click.option(
    "--kinds",
    metavar="KIND[,KIND...]",
    callback=_parse_kinds,
    help="Which norms to swap: bn (default), in (InstanceNorm), gn1 (GroupNorm of one group); such as bn,in.",
)
trust_option = click.option(
    "--trust", is_flag=True, help="Run the code that a pickled module names. Only for files whose origin you trust."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
tolerance_option = click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    help="Relative L2 in float64 that still counts as the same function. Default: 1e-9.",
)
