"""The functions that normalize, as calls in code and as nodes of a graph: what they are, and what they are given.

One table for the functions of Python, and for the ATen operators that exported programs hold, before and after they are
decomposed. Forms of one backend only (cudnn, miopen) are in no exported program, and not here.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

_TENSORS = ("input", "running_mean", "running_var", "weight", "bias")
_ATEN_TENSORS = ("input", "weight", "bias", "running_mean", "running_var")
_NUMBERS = ("momentum", "eps")
_aten = torch.ops.aten


@dataclass(frozen=True)
class NormCall:
    """A function that normalizes.

    Attributes:
        kind: `bn`, or `in` for instance normalization.
        parameters: in their order, under the names of `F.batch_norm`.
        settled: arguments that its name tells.
        results: of a form that returns a tuple whose first item is the normalized tensor: how many there are, None of
            one that returns just that.
        updated: which of the results are running statistics after their update, by argument: a form that has them
            leaves what it is given as it was.
    """

    kind: str
    parameters: tuple[str, ...]
    fixed_arguments: Mapping[str, Any] = field(default_factory=dict)
    results: int | None = None
    updated: Mapping[int, str] = field(default_factory=dict)


# `cudnn_enabled` says nothing of the function.
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
    """Return what a node that calls one of the functions calls, on whatever; None of every other node."""
    return NORM_CALLS.get(node.target) if node.op == "call_function" else None


def is_batch_norm_call(node: fx.Node) -> bool:
    """Say whether a node calls batch_norm, on whatever."""
    call = norm_call(node)
    return call is not None and call.kind == "bn"


def norm_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a node that normalizes by the names of `F.batch_norm`."""
    call = NORM_CALLS[node.target]
    named = dict(zip(call.parameters, node.args, strict=False))
    named |= {name: value for name, value in node.kwargs.items() if name in call.parameters}
    named.pop("cudnn_enabled", None)
    return named | dict(call.fixed_arguments)


def norm_nodes(graph: fx.Graph, kind: str) -> list[fx.Node]:
    """Return the nodes of this kind that normalize an activation, in order; calls on kernels are none of them."""
    return [
        node
        for node in graph.nodes
        if (call := norm_call(node)) and call.kind == kind and reads_activation(norm_arguments(node)["input"])
    ]


def batch_norm_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that call batch_norm on an activation, in order."""
    return norm_nodes(graph, "bn")


def normalized(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that hold the normalized tensor: the call, or what takes the first item of its tuple."""
    if NORM_CALLS[node.target].results is None:
        return [node]
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]


def unsupported_use(node: fx.Node) -> str | None:
    """Say what is made of a call's results that a swap could not serve, None where the normalized tensor is all.

    A functional form returns the running statistics after their update, to be written back or given to the next call.
    A swapped call updates them in place, which is the same where that is all that becomes of them.
    """
    call = NORM_CALLS[node.target]
    if call.results is None:
        return None
    indices = [user.args[1] if user.target is operator.getitem else None for user in node.users]
    unsupported = [index for index in indices if index != 0 and index not in call.updated]
    if unsupported:
        return "more than its first result is used"
    not_written_back = [name for index, name in call.updated.items() if not _is_written_back(node, index, name)]
    return f"what it makes of {' and '.join(not_written_back)} is not just written back" if not_written_back else None


def _is_written_back(node: fx.Node, index: int, name: str) -> bool:
    """Say whether a running statistic, and its update at `index` of a call's results, are for nothing but updating."""
    statistic = norm_arguments(node)[name]
    updates = [user for user in node.users if user.args[1] == index]
    users = [user for update in updates for user in update.users]
    return bool(users) and all(_is_update(_original_buffer(statistic), user) for user in (*users, *statistic.users))


def _is_update(stored: fx.Node, user: fx.Node) -> bool:
    return norm_call(user) is not None or (user.target is _aten.copy_.default and user.args[0] is stored)


def _original_buffer(statistic: fx.Node) -> fx.Node:
    """The place of a running statistic that came through other calls of a functional form."""
    while statistic.target is operator.getitem:
        call, index = statistic.args
        name = NORM_CALLS[call.target].updated.get(index) if norm_call(call) else None  # type: ignore[union-attr, arg-type]
        if name is None:
            break
        statistic = norm_arguments(call)[name]  # type: ignore[arg-type]
    return statistic


def is_folded(node: fx.Node) -> bool:
    """Say whether a call normalizes samples that were folded into the channels, (1, N * C, ...): each by itself."""
    source = norm_arguments(node)["input"]
    if source.target not in _VIEWS or source.op not in ("call_function", "call_method"):
        return False
    sizes = source.args[1] if isinstance(source.args[1], list | tuple) else source.args[1:]
    before = getattr(source.args[0].meta.get("val"), "shape", None)
    return bool(sizes) and sizes[0] == 1 and (before is None or before[0] != 1)


def reads_activation(value: Any, sources: frozenset[str] | None = None) -> bool:
    """Say whether a value depends on what flows through the model: a kernel that is standardised does not.

    Args:
        sources: the names of the placeholders that the model is fed; by default all are.
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
    """Stand in a graph where a call returned a tuple: the normalized tensor, and whatever else is read of it."""
    return results


# A leaf for every FX tracer, so that a graph that is traced again can still be put back.
fx.wrap("as_results")


def all_results(call: NormCall, y: Any, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a call with these arguments returns besides, updated in place where it has running statistics."""
    count = call.results or 1
    return (y, *(arguments.get(call.updated.get(index, "")) for index in range(1, count)))
