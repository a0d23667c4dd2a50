"""Options that several commands share, and how their values are read."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from normswap.documents import jsonable

if TYPE_CHECKING:
    import torch
    from torch import nn

_FLOATING = ("float16", "bfloat16", "float32", "float64")
_INTEGER = ("int32", "int64")
_SEED = 0
# As `normswap.surgery.norms.KINDS`, which is not imported for a look at --help.
_KINDS = ("bn", "in", "gn1")


@dataclass(frozen=True)
class InputSpec:
    """One example input as `--input` gives it: a shape, and a dtype or None for the model's own."""

    shape: tuple[int, ...]
    dtype: str | None = None


def parse_input(text: str) -> InputSpec:
    """Return the input that `2x3x224x224[:dtype]` describes.

    Raises:
        click.BadParameter: another form, an empty dimension, or an unknown dtype.
    """
    sizes, _, dtype = text.partition(":")
    if not re.fullmatch(r"\d+(x\d+)*", sizes) or "0" in sizes.split("x"):
        raise click.BadParameter(f"expected sizes such as 2x3x224x224[:dtype], got {text!r}")
    if (dtype or "float32") not in _FLOATING + _INTEGER:
        raise click.BadParameter(f"expected a dtype among {', '.join(_FLOATING + _INTEGER)}, got {dtype!r}")
    return InputSpec(tuple(map(int, sizes.split("x"))), dtype or None)


def _parse_inputs(_context: click.Context, _parameter: click.Parameter, texts: Sequence[str]) -> tuple[InputSpec, ...]:
    return tuple(map(parse_input, texts))


def _parse_kinds(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    kinds = tuple(word.strip() for word in text.split(","))
    if not {*kinds} <= {*_KINDS}:
        raise click.BadParameter(f"expected some of {', '.join(_KINDS)} with commas between, got {text!r}")
    return kinds


def example_inputs(specs: Sequence[InputSpec], model: "nn.Module", architecture: str | None) -> Any:
    """Return a tensor, a tuple of tensors for several specs, or None where nothing tells the shape.

    Values are random normal (integers: 0 to 9) from a fixed seed. Without specs the shape is the one that timm's
    configuration of `model` gives, with batch size 2.
    """
    from normswap.checkpoints.architecture import default_input_shape

    if not specs:
        shape = default_input_shape(model, architecture)
        if shape is None:
            return None
        specs = (InputSpec(shape),)
    tensors = tuple(_random(spec, _dtype_of(model), _SEED + index) for index, spec in enumerate(specs))
    return tensors[0] if len(tensors) == 1 else tensors


def _random(spec: InputSpec, default: "torch.dtype", seed: int) -> "torch.Tensor":
    import torch

    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, spec.dtype) if spec.dtype else default
    if not dtype.is_floating_point:
        return torch.randint(0, 10, spec.shape, generator=generator, dtype=dtype)
    return torch.randn(spec.shape, generator=generator).to(dtype)


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
