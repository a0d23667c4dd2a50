"""Functions that normalize, as nodes of a graph: which node is such a call, its arguments and the use of its results.

One table has the functions of Python and the ATen operators of exported programs, before and after decomposition.
Operators of one backend (cudnn, miopen) do not occur in exported programs and are left out.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normswap.layers.gated_module import FunctionalSwitchNorm
from normswap.surgery.module_tree import modules_by_name

_TENSORS = ("input", "running_mean", "running_var", "weight", "bias")
_ATEN_TENSORS = ("input", "weight", "bias", "running_mean", "running_var")
_NUMBERS = ("momentum", "eps")
_aten = torch.ops.aten


@dataclass(frozen=True)
class NormCall:
    """A function that normalizes.

    Attributes:
        kind: `bn`, or `in` for instance normalization.
        parameters: its parameters in order, with the names of `F.batch_norm`.
        fixed_arguments: arguments that follow from its name, such as `training=False` of `..._no_training`.
        results: the length of the tuple that it returns, whose first item is the normalized tensor; None if it returns
            that tensor alone.
        updated: by index, the results that are updated running statistics, with the name of their argument; such a
            function leaves the arguments unchanged.
    """

    kind: str
    parameters: tuple[str, ...]
    fixed_arguments: Mapping[str, Any] = field(default_factory=dict)
    results: int | None = None
    updated: Mapping[int, str] = field(default_factory=dict)


# `cudnn_enabled` is read and dropped: it does not change the function.
NORM_CALLS: Mapping[Any, NormCall] = {
    F.batch_norm: NormCall("bn", (*_TENSORS, "training", *_NUMBERS)),
    torch.batch_norm: NormCall("bn", (*_ATEN_TENSORS, "training", *_NUMBERS, "cudnn_enabled")),
    F.instance_norm: NormCall("in", (*_TENSORS, "use_input_stats", *_NUMBERS)),
    torch.instance_norm: NormCall("in", (*_ATEN_TENSORS, "use_input_stats", *_NUMBERS, "cudnn_enabled")),
    _aten.batch_norm.default: NormCall("bn", (*_ATEN_TENSORS, "training", *_NUMBERS, "cudnn_enabled")),
    _aten.instance_norm.default: NormCall("in", (*_ATEN_TENSORS, "use_input_stats", *_NUMBERS, "cudnn_enabled")),
    _aten.native_batch_norm.default: NormCall("bn", (*_ATEN_TENSORS, "training", *_NUMBERS), results=3),
    _aten._native_batch_norm_legit.default: NormCall("bn", (*_ATEN_TENSORS, "training", *_NUMBERS), results=3),
    _aten._native_batch_norm_legit.no_stats: NormCall(
        "bn", ("input", "weight", "bias", "training", *_NUMBERS), {"running_mean": None, "running_var": None}, results=3
    ),
    _aten._native_batch_norm_legit_no_training.default: NormCall(
        "bn", (*_ATEN_TENSORS, *_NUMBERS), {"training": False}, results=3
    ),
    _aten._native_batch_norm_legit_functional.default: NormCall(
        "bn",
        (*_ATEN_TENSORS, "training", *_NUMBERS),
        results=5,
        updated={3: "running_mean", 4: "running_var"},
    ),
    _aten._batch_norm_no_update.default: NormCall("bn", (*_ATEN_TENSORS, *_NUMBERS), {"training": False}, results=4),
    _aten._batch_norm_with_update.default: NormCall("bn", (*_ATEN_TENSORS, *_NUMBERS), {"training": True}, results=4),
    _aten._batch_norm_with_update_functional.default: NormCall(
        "bn",
        (*_ATEN_TENSORS, *_NUMBERS),
        {"training": True},
        results=6,
        updated={4: "running_mean", 5: "running_var"},
    ),
}

_VIEWS = {"view", "reshape", torch.reshape, _aten.view.default, _aten.reshape.default}


def call_name(call: Any) -> str:
    """Return the name of one of `NORM_CALLS`, such as `torch.nn.functional.batch_norm`."""
    return str(call) if isinstance(call, torch._ops.OpOverload) else f"{call.__module__ or 'torch'}.{call.__name__}"


def norm_call(node: fx.Node) -> NormCall | None:
    """Return the function that a node calls if it is one of `NORM_CALLS`, whatever its input; else None."""
    return NORM_CALLS.get(node.target) if node.op == "call_function" else None


def is_batch_norm_call(node: fx.Node) -> bool:
    """Whether a node calls batch_norm, whatever its input."""
    call = norm_call(node)
    return call is not None and call.kind == "bn"


def norm_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by the names of `F.batch_norm`."""
    call = NORM_CALLS[node.target]
    named = dict(zip(call.parameters, node.args, strict=False))
    named |= {name: value for name, value in node.kwargs.items() if name in call.parameters}
    named.pop("cudnn_enabled", None)
    return named | dict(call.fixed_arguments)


def call_tensors(module: nn.Module, node: fx.Node | None, names: Sequence[str] = _TENSORS[1:]) -> list[Tensor]:
    """Return the tensors of `module` that a call of a function that normalizes reads, or the gate in its place.

    Args:
        node: a node of the graph of the forward of `module`; other nodes give no tensors.
        names: the arguments to look at.
    """
    arguments: Mapping[str, Any] = {}
    if node is not None and norm_call(node):
        arguments = norm_arguments(node)
    elif node is not None and isinstance(module._modules.get(str(node.target)), FunctionalSwitchNorm):
        arguments = node.kwargs
    tensors = (attribute_tensor(module, arguments.get(name)) for name in names)
    return [tensor for tensor in tensors if tensor is not None]


def attribute_tensor(module: nn.Module, node: Any) -> Tensor | None:
    """Return the tensor of `module` that a node of its graph reads, None if the node is something else."""
    if getattr(node, "op", None) != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    found = getattr(modules_by_name(module).get(owner), name, None)
    return found if isinstance(found, Tensor) else None


def norm_nodes(graph: fx.Graph, kind: str) -> list[fx.Node]:
    """Return the calls of this kind that normalize an activation, in order; calls on kernels are left out."""
    return [
        node
        for node in graph.nodes
        if (call := norm_call(node)) and call.kind == kind and reads_activation(norm_arguments(node)["input"])
    ]


def batch_norm_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that call batch_norm on an activation, in order."""
    return norm_nodes(graph, "bn")


def normalized(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose value is the normalized tensor: the call, or those that take item 0 of its tuple."""
    if NORM_CALLS[node.target].results is None:
        return [node]
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]


def unsupported_use(node: fx.Node) -> str | None:
    """Return which use of a call's results prevents a swap, or None.

    A swapped call returns the normalized tensor and updates running statistics in place. A function that returns the
    updated statistics can be swapped if the graph only writes them back, or passes them to the next call.
    """
    call = NORM_CALLS[node.target]
    if call.results is None:
        return None
    indices = [user.args[1] if user.target is operator.getitem else None for user in node.users]
    unsupported = [index for index in indices if index != 0 and index not in call.updated]
    if unsupported:
        return "more than its first result is used"
    not_written_back = [name for index, name in call.updated.items() if not _is_written_back(node, index, name)]
    return (
        f"uses its updated {' and '.join(not_written_back)} for more than the update itself"
        if not_written_back
        else None
    )


def _is_written_back(node: fx.Node, index: int, name: str) -> bool:
    """Whether a running statistic and its update, item `index` of the results, are used for nothing but the update."""
    statistic = norm_arguments(node)[name]
    updates = [user for user in node.users if user.args[1] == index]
    users = [user for update in updates for user in update.users]
    return bool(users) and all(_is_update(_original_buffer(statistic), user) for user in (*users, *statistic.users))


def _is_update(stored: fx.Node, user: fx.Node) -> bool:
    return norm_call(user) is not None or (user.target is _aten.copy_.default and user.args[0] is stored)


def _original_buffer(statistic: fx.Node) -> fx.Node:
    """The node of a running statistic before other calls updated it."""
    while statistic.target is operator.getitem:
        call, index = statistic.args
        name = NORM_CALLS[call.target].updated.get(index) if norm_call(call) else None  # type: ignore[union-attr, arg-type]
        if name is None:
            break
        statistic = norm_arguments(call)[name]  # type: ignore[arg-type]
    return statistic


def is_folded(node: fx.Node) -> bool:
    """Whether the samples of a call are folded into the channels, (1, N * C, ...), so each is normalized by itself."""
    source = norm_arguments(node)["input"]
    if source.target not in _VIEWS or source.op not in ("call_function", "call_method"):
        return False
    sizes = source.args[1] if isinstance(source.args[1], list | tuple) else source.args[1:]
    before = getattr(source.args[0].meta.get("val"), "shape", None)
    return bool(sizes) and sizes[0] == 1 and (before is None or before[0] != 1)


def reads_activation(value: Any, sources: frozenset[str] | None = None) -> bool:
    """Whether a value depends on the inputs of the model; a standardized kernel does not.

    Args:
        sources: the names of the placeholders that are inputs of the model; default: all.
    """
    seen: set[fx.Node] = set()
    pending = [value] if isinstance(value, fx.Node) else []
    while pending:
        node = pending.pop()
        if node.op == "placeholder" and (sources is None or node.name in sources):
            return True
        if node.op == "call_module" and "parametrizations" not in str(node.target):
            return True
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return False


def as_results(*results: Any) -> tuple[Any, ...]:
    """Return the arguments as a tuple: in a rewritten graph it takes the place of a call that returned a tuple."""
    return results


# A leaf for every FX tracer, so that a graph that is traced again can still be restored.
fx.wrap("as_results")


def all_results(call: NormCall, y: Any, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the whole result of a call whose normalized tensor is `y`; running statistics were updated in place."""
    count = call.results or 1
    return (y, *(arguments.get(call.updated.get(index, "")) for index in range(1, count)))
