"""`torch.export`: facts from the graph of a model, and programs that are converted and exported again.

`torch.export` runs the real code on tensors without data, and is the second source of facts after symbolic tracing. A
converted program is exported on the example inputs of the original with the same dynamic dimensions, and compared with
the original. If its signature would differ, it is refused.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves, tree_map_only

from normswap.errors import ModelError, SwapError
from normswap.model_state import call_arguments, preserved_state, seeded, training_flags
from normswap.surgery.arguments import describe_inputs
from normswap.surgery.graphs.tracing import GraphFacts, copy_for_tracing, remove_hooks
from normswap.surgery.model_outputs import relative_l2
from normswap.surgery.norms.functions import norm_arguments, norm_call, reads_activation
from normswap.text import first_line

# --- facts from a graph -----------------------------------------------------------------------------------------------


def export_facts(model: nn.Module, example_inputs: Any, is_norm_fqn: Callable[[str], bool]) -> GraphFacts | str:
    """Export `model` in evaluation mode and return the facts in its graph, or the reason why that failed."""
    args, kwargs = call_arguments(example_inputs)
    with preserved_state(model.modules()), seeded(0), suppress_output():
        try:
            module_copy = remove_hooks(copy_for_tracing(model))
            with training_flags(module_copy.modules(), training=False):
                program = torch.export.export(module_copy, args, kwargs, strict=False)
            return read_program(program, is_norm_fqn)
        except Exception as error:  # noqa: BLE001 - it runs the user's code, and raises many errors of its own
            return f"{type(error).__name__}: {first_line(error)}"


def read_program(program: torch.export.ExportedProgram, is_norm_fqn: Callable[[str], bool]) -> GraphFacts:
    """Return the calls, producers and owners of functional calls in an exported program."""
    user_inputs = frozenset(
        spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT
    )
    calls: list[str] = []
    producers: dict[str, str] = {}
    owners: dict[bool, list[str]] = {True: [], False: []}
    current_layer = None  # the call of a norm layer that the current nodes belong to
    for node in (node for node in program.graph.nodes if node.op == "call_function"):
        stack = _module_stack(node)
        layer = next((key for key, fqn in stack.items() if is_norm_fqn(fqn)), None)
        if layer is not None:
            calls += [stack[layer]] * (layer != current_layer)
            _record_producer(node, layer, user_inputs, producers)
        elif norm_call(node):
            owner, on_activation = (
                list(stack.values())[-1],
                reads_activation(norm_arguments(node)["input"], user_inputs),
            )
            owners[on_activation].append(owner)
            calls += [owner] * on_activation
        current_layer = layer
    return GraphFacts(tuple(calls), producers, tuple(dict.fromkeys(owners[True])), frozenset(owners[False]))


def _module_stack(node: fx.Node) -> dict[str, str]:
    """The names of the modules whose code made a node, the root first; the keys distinguish calls of one module."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return {key: _strip_call_index(name) for key, (name, _) in stack.items()}


def _strip_call_index(name: str) -> str:
    """Remove the number of the call, which torch adds to the name of a module from the second call on."""
    return re.sub(r"@\d+$", "", name)


def _record_producer(node: fx.Node, layer: str, user_inputs: frozenset[str], producers: dict[str, str]) -> None:
    """Record the module or function whose output is the input of a norm layer, at the node that reads it."""
    outer_inputs = [
        read for read in node.all_input_nodes if layer not in _module_stack(read) or read.op == "placeholder"
    ]
    source = next((read for read in outer_inputs if reads_activation(read, user_inputs)), None)
    if source is not None:
        producers.setdefault(_module_stack(node)[layer], _producer_name(source))


def _producer_name(source: fx.Node) -> str:
    """The name of a layer of torch, which is a leaf of a symbolic trace; for other code, the function."""
    name, cls = list((source.meta.get("nn_module_stack") or {"": ("", "")}).values())[-1]
    if source.op != "placeholder" and str(cls).startswith("torch.nn.modules."):
        return _strip_call_index(name)
    schema = getattr(source.target, "_schema", None)
    return schema.name.partition("::")[2] if schema is not None else str(source.target)


@contextmanager
def suppress_output() -> Iterator[None]:
    """Suppress logs, warnings and prints of torch while it exports, saves or loads."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)


# --- programs ---------------------------------------------------------------------------------------------------------

_LIMIT = 1e-4
_RESPONSE_FACTOR = 10
_MAX_BOUND = 2**31  # torch stores its largest number for "no bound"


def program_module(program: ExportedProgram) -> nn.Module:
    """Return a module that computes the program on the program's own parameters and buffers.

    Raises:
        SwapError: torch cannot create it.
    """
    try:
        with suppress_output():
            module: nn.Module = program.module()
    except Exception as error:
        raise SwapError(
            f"torch cannot create a module from the program ({first_line(error)}): export the model again"
        ) from error
    return module


def program_inputs(program: ExportedProgram) -> Any:
    """Return the example inputs of a program in the form of `convert`: a tuple or a dict.

    None if it has none, or both positional and keyword inputs, since a program must be called as it was exported.
    """
    args, kwargs = program.example_inputs or ((), {})
    if args and kwargs:
        return None
    return tuple(args) or kwargs or None


def reexport(program: ExportedProgram, converted: nn.Module, inputs: Any = None) -> ExportedProgram:
    """Export the converted module of a program, for the same inputs and with the same dynamic dimensions.

    Args:
        inputs: example inputs, if the program has none.

    Raises:
        SwapError: there are no inputs, torch cannot export the module, or the dynamic dimensions would differ.
    """
    if program.example_inputs is None and inputs is None:
        raise SwapError(
            "the program has no example inputs, which are needed to export it again: pass some, such as "
            "example_inputs=torch.randn(2, 3, 224, 224)"
        )
    args, kwargs = _call_arguments(program, inputs)
    try:
        shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
        for leaf, dims in zip(tree_leaves((args, kwargs)), _dynamic_dimensions(program), strict=True):
            if dims and isinstance(leaf, Tensor):
                shapes[leaf] = dims
        with suppress_output(), torch.enable_grad():
            reexported = torch.export.export(
                converted, args, kwargs, dynamic_shapes=shapes if len(shapes) else None, strict=False
            )
    except Exception as error:
        raise SwapError(
            f"the converted program cannot be exported again ({first_line(error)}): {_ALTERNATIVES}"
        ) from error
    if _signature(reexported) != _signature(program):
        raise SwapError(f"the converted program would accept other inputs than the original: {_ALTERNATIVES}")
    return reexported


_ALTERNATIVES = (
    "convert the Python model and export that, or use normswap.convert(program.module()) without exporting it; "
    "normswap.load(path, architecture='timm:NAME') reads the weights alone"
)


class Difference(NamedTuple):
    """The relative L2 between outputs and buffers of two programs in their own precision, and its limit."""

    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether they compute the same function, up to rounding."""
        return self.error <= self.limit


def difference(original: ExportedProgram, reexported: ExportedProgram, inputs: Any = None) -> Difference:
    """Return the difference of two programs on example inputs, in their own precision, which is part of a graph.

    The limit is 1e-4, or, if that is larger, ten times the change of the original's outputs when its inputs change by
    one unit in the last place.

    Args:
        inputs: example inputs, if the original has none.

    Raises:
        ModelError: a program fails on the inputs.
    """
    call = _call_arguments(original, inputs)
    first, second = program_module(original), program_module(reexported)
    names = [name for name, _ in first.named_buffers()]
    reference, found = (_run(module, names, call) for module in (first, second))
    error = _max_distance(reference, found)
    if error <= _LIMIT:
        return Difference(error, _LIMIT)
    perturbed = _run(first, names, tree_map_only(Tensor, _perturb, call))
    return Difference(error, max(_LIMIT, _RESPONSE_FACTOR * _max_distance(reference, perturbed)))


def check_equivalent(original: ExportedProgram, reexported: ExportedProgram, inputs: Any = None) -> float:
    """Return the error of `difference`.

    Raises:
        SwapError: the error exceeds the limit.
    """
    found = difference(original, reexported, inputs)
    if not found.passed:
        raise SwapError(
            f"the converted program computes another function (relative L2 {found.error:.1e}, expected at most "
            f"{found.limit:.1e}): {_ALTERNATIVES}"
        )
    return found.error


def _call_arguments(program: ExportedProgram, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs of a program, or else `inputs`."""
    args, kwargs = program.example_inputs or call_arguments(inputs)
    return tuple(args), dict(kwargs)


def _run(module: nn.Module, buffers: list[str], call: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Any]:
    """The leaves of the output, and the buffers after the run; the state is restored."""
    with preserved_state(module.modules()), seeded(0), torch.no_grad():
        try:
            outputs = tree_leaves(module(*call[0], **call[1]))
        except Exception as error:
            raise ModelError(f"the program fails on {describe_inputs(call)}: {first_line(error)}") from error
        found = dict(module.named_buffers())
        return [*outputs, *(found[name].clone() if name in found else None for name in buffers)]


def _max_distance(reference: list[Any], found: list[Any]) -> float:
    if len(reference) != len(found):
        return float("inf")
    return max(map(relative_l2, reference, found), default=0.0)


def _perturb(tensor: Tensor) -> Tensor:
    return tensor * (1 + torch.finfo(tensor.dtype).eps) if tensor.is_floating_point() else tensor


def _dynamic_dimensions(program: ExportedProgram) -> list[Mapping[int, Any]]:
    """For each input, flat, its dynamic dimensions and their bounds."""
    return [
        {index: _bounds(program, size) for index, size in enumerate(shape) if isinstance(size, torch.SymInt)}
        for shape in _input_shapes(program)
    ]


def _bounds(program: ExportedProgram, size: torch.SymInt) -> Any:
    allowed = program.range_constraints.get(size.node.expr)
    lower, upper = (_finite_bound(bound) for bound in (allowed.lower, allowed.upper)) if allowed else (None, None)
    return Dim.DYNAMIC(min=lower, max=upper)


def _finite_bound(bound: Any) -> int | None:
    return int(bound) if bound.is_Integer and abs(int(bound)) < _MAX_BOUND else None


def _signature(program: ExportedProgram) -> list[tuple[int | None, ...]]:
    """The shape of each input, with None for a dynamic dimension."""
    return [tuple(None if isinstance(n, torch.SymInt) else n for n in shape) for shape in _input_shapes(program)]


def _input_shapes(program: ExportedProgram) -> list[tuple[Any, ...]]:
    input_names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return [_shape(values.get(name)) for name in input_names]


def _shape(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, torch.SymInt) else tuple(getattr(value, "shape", ()))
