"""`export`: a network as a file that runs without normswap, compared with the network before the file appears."""

import pickle
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_leaves, tree_map_only

from normswap.checkpoints.formats.formats import write_plain_state_dict
from normswap.checkpoints.io.atomic_files import atomic_write, check_writable
from normswap.checkpoints.loading import default_inputs, floating_dtype
from normswap.errors import ModelError
from normswap.exporting.dynamic_shapes import (
    BATCH,
    FreeSize,
    name_dimensions,
    sample_cases,
    smallest_size,
    symbolic_dimensions,
    with_two_samples,
)
from normswap.exporting.export_options import (
    DTYPES,
    FIRST_OPSET,
    TARGETS,
    TRACED,
    ExportDtype,
    Exported,
    ExportOptions,
    Target,
    target_of,
)
from normswap.exporting.isolated_check import CodeUnavailable, IsolatedCheck, run_network
from normswap.exporting.plain_weights import original_network
from normswap.exporting.prepared_network import prepare_network
from normswap.exporting.published_layout import published_weights
from normswap.model_state import call_arguments
from normswap.surgery.arguments import read_path, require_module, require_type
from normswap.surgery.graphs.exported_program import suppress_output
from normswap.surgery.module_tree import copy_model, model_mode
from normswap.surgery.wrappers import unwrap
from normswap.text import first_line

Progress = Callable[[str], AbstractContextManager[Any]]
# What pickling raises for local classes, functions and open files.
_PICKLING_ERRORS = (pickle.PicklingError, AttributeError, TypeError)


def export(
    model: nn.Module,
    path: str | Path,
    *,
    to: Target | None = None,
    example_inputs: Any = None,
    fold: bool = True,
    opset: int | None = None,
    dtype: ExportDtype | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> Exported:
    """Write a network, converted or not, as a file that runs without normswap.

    Sites that compute their old norm become that norm again, the others compact layers in which branches without weight
    are absent. Batch size and sizes of images stay free. Before the file appears, it is run at three batch sizes and
    two sizes of images in a process that cannot import normswap, and compared with the network in evaluation.

    Args:
        model: the network; it is not changed. In evaluation its outputs must not depend on the other samples.
        path: the file to write, in an existing folder.
        to: the kind of file. `"onnx"`: an ONNX model with standard operators only. `"pt2"`: a program of
            `torch.export`. `"state-dict"`: plain weights for the original architecture, if every site computes its old
            norm. `"published-layout"`: weights as the authors of Switchable Normalization publish them. Default: by the
            suffix, if it is `.onnx` or `.pt2`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; needed for `"onnx"` and `"pt2"`,
            and to verify the other files. Default: images of the size in timm's configuration of the model.
        fold: in ONNX, fold BatchNorm into the convolution or linear layer before it. With False weights keep their
            names.
        opset: the version of ONNX operators, from 18 (default) to 23.
        dtype: the precision of the network in the file, default its own. Moments are computed in float32.
        verify: compare the file with the network.
        overwrite: replace an existing file.

    Returns:
        An `Exported`: the file, its free dimensions, and the errors of its outputs.

    Raises:
        ArgumentError: an argument has a wrong type or value, or does not apply to this kind of file.
        CheckpointError: the file exists, its name has another suffix, or it cannot be written.
        ModelError: the network cannot be traced, or the file computes another function; nothing is written.
        SwapError: the kind of file cannot contain a site.

    Examples:
        >>> import torch, normswap
        >>> model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)), torch.randn(2, 3, 16, 16)
        >>> converted = normswap.convert(model, x).model
        >>> exported = normswap.export(converted, "model.pt2", example_inputs=x)
        >>> [size.name for size in exported.free], exported.cases[0].relative_error < 1e-6
        (['batch', 'height', 'width'], True)
    """
    file = Path(read_path(path, "path", "the name of a file"))
    require_type(to, str | None, "to", f"one of {', '.join(TARGETS)}")
    require_type(opset, int | None, "opset", "a number")
    require_type(dtype, str | None, "dtype", f"one of {', '.join(DTYPES)}")
    for name, value in (("fold", fold), ("verify", verify), ("overwrite", overwrite)):
        require_type(value, bool, name, "True or False")
    options = ExportOptions(file, target_of(file, to), fold, opset, dtype, verify, overwrite)
    options.check()
    return run_export(unwrap(require_module(model)), options, example_inputs)


def run_export(
    model: nn.Module, options: ExportOptions, inputs: Any, progress: Progress = lambda _: nullcontext()
) -> Exported:
    """Export a network with checked options; `progress` shows the name of a stage. Raises as `export`."""
    if inputs is None:
        inputs = default_inputs(model, None)
    if inputs is None and options.to in TRACED:
        raise ModelError("the input size is unknown: pass example_inputs=torch.randn(2, 3, 224, 224)")
    network = copy_model(model)
    with model_mode(network, training=False):
        if options.to == "state-dict":
            return _export_weights(network, options, inputs, progress)
        if options.to == "published-layout":
            return _export_published(network, options, inputs)
        return _export_program(network, options, with_two_samples(inputs), progress)


# --- programs: ONNX and pt2 -------------------------------------------------------------------------------------------


def _export_program(network: nn.Module, options: ExportOptions, inputs: Any, progress: Progress) -> Exported:
    with warnings.catch_warnings(action="ignore"):  # a site with one position is refused below
        run_network(network, inputs)  # a network that fails says so in its own words
    own_dtype = floating_dtype(network)
    dtype = own_dtype if options.dtype is None else getattr(torch, options.dtype)
    cast_inputs = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    started = time.perf_counter()
    with progress(f"exporting to {options.to}"):
        prepared = prepare_network(network, None if dtype == own_dtype else dtype)
        with model_mode(prepared, training=False):
            content, traced = _trace_and_translate(prepared, cast_inputs, options)
    seconds = time.perf_counter() - started
    result = Exported(
        options.path,
        options.to,
        0,
        seconds,
        _name(dtype),
        opset=options.opset or FIRST_OPSET if options.to == "onnx" else None,
        nodes=len(content.graph.node) if options.to == "onnx" else None,
        folded=options.to == "onnx" and options.fold,
        free=traced.free,
        notes=traced.notes,
    )
    check = IsolatedCheck(network, sample_cases(cast_inputs, {size.name: size for size in traced.free}), dtype)
    with _written_file(options) as temporary:
        if options.to == "onnx":
            temporary.write_bytes(content.SerializeToString())
        else:
            with suppress_output(), open(temporary, "wb") as stream:
                torch.export.save(content, stream)
        if options.verify:
            with progress("running the file without normswap"):
                result = replace(result, cases=check.run(temporary, "onnx" if options.to == "onnx" else "pt2"))
    return _finished(result, options, inputs)


@dataclass(frozen=True)
class _Traced:
    """A traced program, its free dimensions, names for its symbols, and notes."""

    program: ExportedProgram
    free: tuple[FreeSize, ...]
    symbols: Mapping[str, str]
    notes: tuple[str, ...]


def _trace_and_translate(network: nn.Module, inputs: Any, options: ExportOptions) -> tuple[Any, _Traced]:
    """Return the program or the ONNX model of a prepared network, and what is known of its trace."""
    if options.to == "pt2":
        traced = _trace(network, inputs)
        return traced.program, traced
    from normswap.exporting.onnx_file import build_onnx
    from normswap.exporting.onnx_norms import NormTranslation

    translation = NormTranslation(network)
    with translation.tracing():
        traced = _trace(network, inputs)
    proto = build_onnx(
        traced.program,
        translation.table,
        opset=options.opset or FIRST_OPSET,
        fold=options.fold,
        symbols=traced.symbols,
        sizes={size.name: size.at_least for size in traced.free},
    )
    return proto, traced


def _trace(network: nn.Module, inputs: Any) -> _Traced:
    """Trace a network with free dimensions, or with fixed ones if torch cannot."""
    bound = smallest_size(network, inputs)
    notes: tuple[str, ...] = ()
    try:
        program = _export_with(network, inputs, bound)
    except Exception as error:  # noqa: BLE001 - torch raises anything for sizes that the model's code needs
        notes = (
            f"All sizes are fixed to those of the example, since torch cannot keep them free: {first_line(error)}",
        )
        try:
            program = _export_with(network, inputs, None)
        except Exception as error:
            raise ModelError(f"torch cannot trace the network: {first_line(error)}") from error
    free: dict[str, FreeSize] = {}
    symbols: dict[str, str] = {}
    for name, size, symbol in symbolic_dimensions(program, inputs):
        free.setdefault(name, FreeSize(name, 1 if name == BATCH else min(bound, size)))
        symbols.setdefault(str(symbol), name)
    return _Traced(program, tuple(free.values()), symbols, notes + _fixed_notes(inputs, free, notes))


def _export_with(network: nn.Module, inputs: Any, bound: int | None) -> ExportedProgram:
    """Trace a network; sizes of images are free from `bound` on, or fixed if it is None."""
    args, kwargs = call_arguments(inputs)
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and bound is not None and (names := name_dimensions(leaf)):
            shapes[leaf] = {
                i: Dim.AUTO if name == BATCH else Dim.AUTO(min=min(bound, leaf.shape[i])) for i, name in names.items()
            }
    with suppress_output(), torch.no_grad():
        return torch.export.export(network, args, kwargs, dynamic_shapes=shapes if len(shapes) else None, strict=False)


def _fixed_notes(inputs: Any, free: Mapping[str, FreeSize], notes: tuple[str, ...]) -> tuple[str, ...]:
    """A note on dimensions that the network itself fixes, such as that of position embeddings."""
    leaves = (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    wanted = dict.fromkeys(name for leaf in leaves for name in name_dimensions(leaf).values())
    fixed = [name for name in wanted if name not in free]
    if notes or not fixed:
        return ()
    return (f"{' and '.join(fixed)}: fixed to the size of the example input, since the network needs this size",)


# --- weights ----------------------------------------------------------------------------------------------------------


def _export_weights(network: nn.Module, options: ExportOptions, inputs: Any, progress: Progress) -> Exported:
    started = time.perf_counter()
    original = original_network(network)
    state = {name: value.detach().cpu() for name, value in original.state_dict().items() if isinstance(value, Tensor)}
    seconds = time.perf_counter() - started
    dtype = floating_dtype(network)
    result = Exported(options.path, options.to, 0, seconds, _name(dtype))
    with _written_file(options) as temporary:
        write_plain_state_dict(temporary, state, as_safetensors=options.path.suffix == ".safetensors")
        if options.verify and inputs is not None:
            check = IsolatedCheck(network, [inputs], dtype)
            with progress("running the file without normswap"):
                result = _check_weights(check, temporary, original, options, result)
    return _finished(result, options, inputs)


def _check_weights(
    check: IsolatedCheck, file: Path, original: nn.Module, options: ExportOptions, result: Exported
) -> Exported:
    """Add the comparison of weights with the network; a module that no other process can load is only noted."""
    blank = copy_model(original)
    with torch.no_grad():
        for tensor in (*blank.parameters(), *blank.buffers()):
            tensor.zero_()
    try:
        cases = check.run(file, "state-dict", module=blank, as_safetensors=options.path.suffix == ".safetensors")
    except CodeUnavailable as error:
        return replace(result, notes=(f"not verified: {error}",))
    except _PICKLING_ERRORS as error:
        return replace(result, notes=(f"not verified: the network cannot be pickled ({first_line(error)})",))
    return replace(result, cases=cases)


def _export_published(network: nn.Module, options: ExportOptions, inputs: Any) -> Exported:
    started = time.perf_counter()
    weights = published_weights(network)
    seconds = time.perf_counter() - started
    dtype = floating_dtype(network)
    result = Exported(options.path, options.to, 0, seconds, _name(dtype), notes=weights.notes)
    content = {"state_dict": OrderedDict((name, value.detach().cpu()) for name, value in weights.state.items())}
    with _written_file(options) as temporary:
        with open(temporary, "wb") as stream:
            torch.save(content, stream)
        if options.verify and inputs is not None:
            read_back = copy_model(network)
            read_back.load_state_dict(torch.load(temporary, weights_only=True)["state_dict"], strict=True)
            case = IsolatedCheck(network, [inputs], dtype).compare_in_process(read_back)
            note = "The file was read back into SN layers in this process: no library without normswap computes them."
            result = replace(result, cases=(case,), notes=(*result.notes, note))
    return _finished(result, options, inputs)


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def _written_file(options: ExportOptions) -> Iterator[Path]:
    """Yield a temporary file that becomes the output if the block succeeds."""
    check_writable(options.path, replace=options.overwrite)
    with atomic_write(options.path) as temporary:
        yield temporary


def _finished(result: Exported, options: ExportOptions, inputs: Any) -> Exported:
    notes = result.notes
    if not options.verify:
        notes += ("not verified: verify=False",)
    elif inputs is None:
        notes += ("not verified: the input size is unknown: pass example_inputs=torch.randn(2, 3, 224, 224)",)
    return replace(result, bytes=options.path.stat().st_size, notes=notes)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
