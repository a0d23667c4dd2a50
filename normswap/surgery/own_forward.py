"""The own forward of one module as a pair of graphs, fit to run in its place - or the reason why none is.

The children are leaves, and the graphs are made in training and in evaluation. A trace freezes whatever is no tensor,
so one is handed on only where nothing of that kind can differ at the next call: code that draws numbers, keeps state,
makes tensors, switches contexts or depends on optional arguments is refused in words.
"""

import inspect
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import fx, nn

from normswap.surgery.tracing import BATCH_NORM_CALLS, Trace, batch_norm_nodes, sharing_twin, trace_with


@dataclass(frozen=True)
class OwnForward:
    """The forward of one module with its children as leaves, in both modes, or the reason why there is none."""

    training: fx.Graph | None
    evaluation: fx.Graph | None
    reason: str | None = None


def trace_own_forward(module: nn.Module) -> OwnForward:
    """Trace `module.forward` alone, once in training and once in evaluation. The module is left as it is."""
    if isinstance(module, fx.GraphModule):  # its graph is its code, in both modes
        return OwnForward(module.graph, module.graph)
    reason = _fixed_code(module)
    graphs: list[fx.Graph] = []
    for training in () if reason else (True, False):
        trace = _trace(module, training=training)
        reason = trace.reason or trace.omission
        if trace.graph is None or reason:
            break
        options = deciding_options(module, training=training)
        reason = _constant(module, trace.graph)
        if options:
            reason = f"what it does depends on its optional arguments ({', '.join(options)})"
        if reason:
            break
        graphs.append(trace.graph)
    if reason:
        return OwnForward(None, None, reason)
    calls = [len(batch_norm_nodes(graph)) for graph in graphs]
    if calls[0] != calls[1]:
        return OwnForward(None, None, f"it calls batch_norm {calls[0]}x in training and {calls[1]}x in evaluation")
    return OwnForward(graphs[0], graphs[1])


def mentions_batch_norm(module: nn.Module) -> bool:
    """Say whether the code of `module.forward`, here or in a base class, names a batch_norm function."""
    names = {call.__name__ for call in BATCH_NORM_CALLS}
    found = [vars(cls).get("forward") for cls in type(module).__mro__]
    forwards = [inspect.unwrap(forward) for forward in found if isinstance(forward, FunctionType)]
    return any(names & _names_in(forward.__code__) for forward in forwards if isinstance(forward, FunctionType))


def _names_in(code: CodeType) -> set[str]:
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return {*code.co_names}.union(*inner)


def _trace(module: nn.Module, *, training: bool, concrete: dict[str, Any] | None = None) -> Trace:
    return trace_with(lambda: sharing_twin(module), lambda _: True, training=training, concrete=concrete)


def _fixed_code(module: nn.Module) -> str | None:
    """Why the forward of the class is not what runs, or is no code to be rewritten."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript, whose code is fixed: convert the Python model, then script it again"
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


def deciding_options(module: nn.Module, *, training: bool = False) -> dict[str, Any]:
    """Return the optional arguments of the forward with their defaults if they decide what it does, else none."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    plain = (type(None), bool, int, float, str)
    defaults = {p.name: p.default for p in parameters if isinstance(p.default, plain)}
    if not defaults:
        return {}
    free, settled = (_trace(module, training=training, concrete=concrete).graph for concrete in (None, defaults))
    same = free is not None and settled is not None and _operations(free) == _operations(settled)
    return {} if same else defaults


def _operations(graph: fx.Graph) -> list[Any]:
    """What a graph runs, without the assertions that concrete arguments bring."""
    asserting = {node for node in graph.nodes if getattr(node.target, "__name__", "") == "_assert"}
    for node in graph.nodes:
        if node.users and asserting.issuperset(node.users):
            asserting.add(node)
    return [node.target for node in graph.nodes if node.op != "placeholder" and node not in asserting]
