"""The own forward of one module as a pair of graphs, fit to run in its place - or the reason why none is.

The children are leaves, and the graphs are made in training and in evaluation. A trace freezes whatever is no tensor,
so one is handed on only where nothing of that kind can differ at the next call: code that draws numbers, keeps state,
makes tensors or switches contexts is refused in words. Where optional arguments decide what it does, the graphs are
those of their defaults, and are right for no other call.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from normswap.modes import preserved_before_writes
from normswap.surgery.calls import NORM_CALLS, batch_norm_nodes
from normswap.surgery.code_reading import uses_of_names
from normswap.surgery.tracing import Trace, sharing_twin, trace_with


@dataclass(frozen=True)
class OwnForward:
    """The forward of one module with its children as leaves, in both modes, or the reason why there is none.

    `options` are the optional arguments that decide what it does, with the defaults that the graphs are made for.
    """

    training: fx.Graph | None
    evaluation: fx.Graph | None
    reason: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def trace_own_forward(module: nn.Module) -> OwnForward:
    """Trace `module.forward` alone, once in training and once in evaluation. The module is left as it is."""
    if isinstance(module, fx.GraphModule):  # its graph is its code, in both modes
        return OwnForward(module.graph, module.graph)
    reason = _fixed_code(module)
    graphs: list[fx.Graph] = []
    options: dict[str, Any] = {}
    for training in () if reason else (True, False):
        trace, deciding = _trace_by_default(module, training=training)
        options |= deciding
        reason = trace.reason or trace.omission
        if trace.graph is None or reason:
            break
        reason = _constant(module, trace.graph)
        if reason:
            break
        graphs.append(trace.graph)
    if reason:
        return OwnForward(None, None, reason)
    calls = [len(batch_norm_nodes(graph)) for graph in graphs]
    if calls[0] != calls[1]:
        return OwnForward(None, None, f"it calls batch_norm {calls[0]}x in training and {calls[1]}x in evaluation")
    return OwnForward(graphs[0], graphs[1], None, options)


class OwnForwards:
    """The own forwards of modules that stay as they are meanwhile: each is traced once, for all who ask."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[nn.Module, OwnForward]] = {}  # by identity, which holding the module keeps

    def of(self, module: nn.Module) -> OwnForward:
        if id(module) not in self._known:
            self._known[id(module)] = module, trace_own_forward(module)
        return self._known[id(module)][1]


def mentioned_kinds(module: nn.Module) -> set[str]:
    """Return the kinds of the functions that normalize which the code of `module.forward`, here or in a base, names.

    A child that is called like one of them, `self.batch_norm`, is not meant.
    """
    found = [vars(cls).get("forward") for cls in type(module).__mro__]
    forwards = [inspect.unwrap(forward) for forward in found if isinstance(forward, FunctionType)]
    uses = (use for forward in forwards if isinstance(forward, FunctionType) for use in uses_of_names(forward.__code__))
    named = {name for name, own in uses if not (own and isinstance(getattr(module, name, None), nn.Module))}
    return {call.kind for function, call in NORM_CALLS.items() if function.__name__ in named}


def _trace_by_default(module: nn.Module, *, training: bool) -> tuple[Trace, dict[str, Any]]:
    """The trace for the defaults of whatever options decide what the forward does, and these options."""
    free = _trace(module, training=training)
    defaults = _plain_defaults(module)
    if not defaults:
        return free, {}
    settled = _trace(module, training=training, concrete=defaults)
    if settled.graph is None or (free.graph is not None and _operations(free.graph) == _operations(settled.graph)):
        return free, {}
    return settled, defaults


def _trace(module: nn.Module, *, training: bool, concrete: dict[str, Any] | None = None) -> Trace:
    with preserved_before_writes(module.modules(), "everything"):
        return trace_with(lambda: sharing_twin(module), lambda _: True, training=training, concrete=concrete)


def _fixed_code(module: nn.Module) -> str | None:
    """Why the forward of the class is not what runs, or is no code to be rewritten."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript, whose code is fixed: convert the Python model, then trace or export it"
    if "forward" in vars(module):
        return "its forward is overridden on the instance: remove that first"
    return None


def _constant(module: nn.Module, graph: fx.Graph) -> str | None:
    """A tensor that the forward makes out of nothing exists on the traced twin only."""
    targets = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    if all(_has(module, target) for target in targets):
        return None
    return "it makes a tensor of constants at every call: register it as a buffer"


def _has(module: nn.Module, path: str) -> bool:
    found: Any = module
    for name in path.split("."):
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def deciding_options(module: nn.Module) -> dict[str, Any]:
    """Return the optional arguments of the forward with their defaults if they decide what it does, else none."""
    return _trace_by_default(module, training=False)[1]


def _plain_defaults(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(type(module).forward).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, _PLAIN)}


_PLAIN = (type(None), bool, int, float, str)


def _operations(graph: fx.Graph) -> list[Any]:
    """What a graph runs, without the assertions that concrete arguments bring."""
    asserting = {node for node in graph.nodes if getattr(node.target, "__name__", "") == "_assert"}
    for node in graph.nodes:
        if node.users and asserting.issuperset(node.users):
            asserting.add(node)
    return [node.target for node in graph.nodes if node.op != "placeholder" and node not in asserting]
