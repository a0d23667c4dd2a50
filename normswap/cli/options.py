"""Options that several commands share, how their values are parsed, and how a command opens its file."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.checkpoints.file_output import copy_folder
from normswap.cli.console import stage
from normswap.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from normswap.checkpoints.loading import OpenedModel
    from normswap.checkpoints.reading import Checkpoint, CheckpointHeader
    from normswap.finetune.data.datasets import Data

_DTYPES = (
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("uint8", "int8", "int16", "int32", "int64", "bool"),
)
# As `normswap.surgery.selection.KINDS`, which is not imported here since it imports torch.
_KINDS = ("bn", "in", "gn1", "gn")


# --- values -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputSpec:
    """One example input of `--input`: a shape, a dtype (None for the model's own), and the network's entry or None."""

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
    if (dtype or "float32") not in _DTYPES:
        raise click.BadParameter(f"expected a dtype among {', '.join(_DTYPES)}, got {dtype!r}")
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


def example_inputs(specs: Sequence[InputSpec]) -> "Callable[[nn.Module], Any] | None":
    """Return a function that makes the inputs for a model: a tensor, or a tuple of tensors; None without specs."""
    return partial(_make_inputs, tuple(specs)) if specs else None


def _make_inputs(specs: Sequence[InputSpec], model: "nn.Module") -> Any:
    import torch

    from normswap.checkpoints.loading import floating_dtype, random_tensor

    dtypes = [getattr(torch, spec.dtype) if spec.dtype else floating_dtype(model) for spec in specs]
    tensors = tuple(
        random_tensor(spec.shape, dtype, seed) for seed, (spec, dtype) in enumerate(zip(specs, dtypes, strict=True))
    )
    return tensors[0] if len(tensors) == 1 else tensors


# --- files ------------------------------------------------------------------------------------------------------------


def read_header(path: Path, *, output: Path | None = None) -> "CheckpointHeader":
    """Read the record in a file, and show that on the terminal; raises as the library's `read_header`.

    Args:
        output: the file that will be written, None if none is.
    """
    with stage("starting"):
        from normswap.checkpoints import reading

        return reading.read_header(path, folder=copy_folder(output))


def read_file(
    source: "Path | CheckpointHeader", *, trust: bool, entry: str | None = None, arch: str | None = None
) -> "Checkpoint":
    """Read a file, and show that on the terminal; raises as the library's `read_checkpoint`.

    Args:
        arch: `--arch`; of an exported program only the weights are read if it is given.
    """
    header = read_header(source) if isinstance(source, Path) else source
    with stage(f"reading {header.path.name}"):
        from normswap.checkpoints.reading import read_checkpoint

        trust = trust and not header.loads_weights_only(arch)
        return read_checkpoint(header, trust=trust, entry=entry, mmap=True)


def open_model(
    checkpoint: "Checkpoint", *, arch: str | None, inputs: Sequence[InputSpec], trust: bool
) -> "OpenedModel":
    """Build the model in a file, and show that on the terminal; raises as the library's `open_model`."""
    with stage("building the model"):
        from normswap.checkpoints import loading

        return loading.open_model(checkpoint, arch, inputs=example_inputs(inputs), trust=trust)


def move_model(model: "nn.Module", device: str) -> "nn.Module":
    """Move a model to the value of `--device`, in place, and return it.

    Raises:
        ModelError: the model cannot be moved there.
    """
    from normswap.text import first_line

    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {device}: the model cannot be moved there: {first_line(error)}") from error


# --- data sets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """The size of images given by `--input-size`; `channels` is None for the model's own."""

    height: int
    width: int
    channels: int | None = None


def parse_size(_context: Any, _parameter: Any, text: str | None) -> Size | None:
    """Return the size that `224`, `224x320` or `1x28x28` describes.

    Raises:
        click.BadParameter: another form.
    """
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", text):
        raise click.BadParameter(f"expected a size in pixels such as 224, 224x320 or 1x28x28, got {text!r}")
    *channels, height, width = [int(part) for part in text.split("x")] if "x" in text else [int(text)] * 2
    return Size(height, width, channels[0] if channels else None)


data_option = click.option(
    "--data",
    "source",
    required=True,
    metavar="SPEC",
    help="Data set: folder:PATH, digits, digits:shifted, or a timm name such as torch/NAME.",
)


def output_option(suffix: str) -> Callable[..., Any]:
    """Return the option for the output of a command whose default name has `suffix` before its ending."""
    return click.option(
        "-o",
        "--output",
        type=click.Path(),
        help=f"The file to write. Default: model.{suffix}.pt next to model.pt, in the same format.",
    )


def data_set_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a data set that `open_data_set` reads, except `--data` and `--batch-size`."""
    for option in (
        click.option(
            "--input-size",
            callback=parse_size,
            metavar="[Cx]HxW",
            help="Size of the images in pixels. Default: the size in timm's configuration of the model.",
        ),
        click.option(
            "--data-root", metavar="PATH", help="Folder of the data set, if --data is a name such as torch/NAME."
        ),
        click.option("--split", default="train", show_default=True, help="Part of the data set."),
    ):  # the last one is shown first
        command = option(command)
    return command


def open_data_set(source: str, model: "nn.Module", architecture: str | None, options: dict[str, Any]) -> "Data":
    """Open a data set for a model, and show that on the terminal.

    Args:
        source: the value of `--data`.
        model: its configuration gives the size of the images, unless `options` do.
        architecture: the name that builds the model, None if it is unknown.
        options: the values of the other options of the data set.

    Raises:
        DataError: it cannot be opened, or the size of the images is unknown.
    """
    from normswap.checkpoints.architecture.registry import default_input_shape
    from normswap.finetune.data.datasets import open_data
    from normswap.finetune.data.loaders import DataSettings

    shape = default_input_shape(model, architecture)
    size: Size | None = options["input_size"]
    if shape is not None:
        size = Size(size.height, size.width, size.channels or shape[1]) if size else Size(shape[2], shape[3], shape[1])
    settings = DataSettings(
        source,
        split=options["split"],
        root=options["data_root"],
        image_size=None if size is None else (size.height, size.width),
        channels=None if size is None else size.channels,
        batch_size=options["batch_size"],
        workers=options.get("workers", 0),
        seed=options.get("seed", 0),
    )
    with stage(f"opening {source}"):
        return open_data(settings, use="calibration", model=model)


# --- options ----------------------------------------------------------------------------------------------------------

arch_option = click.option(
    "--arch",
    metavar="ZOO:NAME[,KEY=VALUE...]",
    help="The model of the tensors: timm:NAME, torchvision:NAME, hf:FOLDER or path/file.py:function, with "
    "keywords such as num_classes=10. Not needed for files that normswap wrote.",
)
entry_option = click.option(
    "--entry",
    metavar="NAME",
    help="Which of several sets of weights in the file to use, such as state_dict_ema; dots separate nested entries.",
)
# `convert` accepts several networks of one file: each of these options once for all, or once for each, in order.
archs_option = click.option(
    "--arch",
    "archs",
    multiple=True,
    metavar="ZOO:NAME[,KEY=VALUE...]",
    help="The model of the tensors: timm:NAME, torchvision:NAME, hf:FOLDER or path/file.py:function, with "
    "keywords such as num_classes=10; none: convert by tensor names only. Not needed for files that normswap wrote. "
    "With several --entry give one, or one for each in the same order.",
)
entries_option = click.option(
    "--entry",
    "entries",
    multiple=True,
    metavar="NAME",
    help="Which of several sets of weights in the file to convert, such as state_dict_ema; dots separate nested "
    "entries and the first part of names inside a state dict. Repeat it to convert several networks.",
)
named_inputs_option = click.option(
    "--input",
    "inputs",
    metavar="[ENTRY=]SIZES[:DTYPE]",
    multiple=True,
    callback=_parse_named_inputs,
    help="Size of an example input, such as 2x3x224x224; repeat it if the model takes several inputs. With several "
    "--entry give one, one for each in the same order, or name the network: g=2x100. Default: the size in timm's "
    "configuration.",
)
input_option = click.option(
    "--input",
    "inputs",
    metavar="SIZES[:DTYPE]",
    multiple=True,
    callback=_parse_inputs,
    help="Size of an example input, such as 2x3x224x224; repeat it if the model takes several inputs. Default: the "
    "size in timm's configuration.",
)
kinds_option = click.option(
    "--kinds",
    metavar="KIND[,KIND...]",
    callback=_parse_kinds,
    help="Which norms to swap: bn (default), in (InstanceNorm), gn1 and gn (GroupNorm of one group, of several); such "
    "as bn,in.",
)
trust_option = click.option(
    "--trust",
    is_flag=True,
    help="Run the code that a file names: pickled objects, Python files. Only if you trust its source.",
)
force_option = click.option("--force", is_flag=True, help="Replace an existing output file.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
tolerance_option = click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    help="Largest relative L2 difference, in float64, that counts as the same function. Default: 1e-9.",
)
