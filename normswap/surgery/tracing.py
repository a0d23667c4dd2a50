"""FX graphs: of a whole model, to know its order and producers; of one module's own forward, to rewrite it.

A trace is always made of a twin that shares the parameters, since tracing can leave a `Proxy` in a module's state.
A failed trace is a value with a reason, never an exception. Nothing is decided or changed here.
"""

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from normswap.modes import training_flags
from normswap.surgery.norms import KNOWN_NORMS, Norms, is_norm_layer, looks_like_norm

# The calls that make a functional site, with the order of their parameters under the names of `F.batch_norm`.
BATCH_NORM_CALLS: Mapping[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}


@dataclass(frozen=True)
class Trace:
    """A graph, or the reason why there is none."""

    graph: fx.Graph | None
    reason: str | None = None


@dataclass(frozen=True)
class GraphFacts:
    """What a whole-model graph tells.

    `order` holds the fqns of the modules that normalize, as they are called: norm layers and `functional_owners`,
    which call `F.batch_norm` on an activation in their own forward. `producers` is by fqn of a norm layer.
    """

    order: tuple[str, ...]
    producers: Mapping[str, str]
    functional_owners: tuple[str, ...]


@dataclass(frozen=True)
class OwnTrace:
    """The forward of one module with its children as leaves, in training and in evaluation."""

    training: fx.Graph | None
    evaluation: fx.Graph | None
    reason: str | None = None


class _Tracer(fx.Tracer):
    """A tracer with our leaf rule; buffers stay symbolic, so that their updates are recorded."""

    proxy_buffer_attributes = True

    def __init__(self, is_leaf: Callable[[nn.Module], bool], wrapped: tuple[Callable[..., Any], ...] = ()) -> None:
        super().__init__(autowrap_functions=wrapped)
        self._is_leaf = is_leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


def sharing_twin(module: nn.Module) -> nn.Module:
    """Return a deep copy of `module` that shares its parameters; buffers are copied, for tracing may update them."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def trace_model(model: nn.Module, *, norms: Norms = KNOWN_NORMS) -> Trace:
    """Trace the whole of `model` with norm layers as leaves, or say why it cannot be traced."""
    reason = None
    for is_leaf, wrapped in _leaf_rules(norms):
        try:
            return Trace(trace_with(sharing_twin(model), is_leaf, wrapped))
        except Exception as error:  # noqa: BLE001 - tracing runs the user's code on proxies: anything may come
            reason = reason or f"{type(error).__name__}: {first_line(error)}"
    return Trace(None, reason)


def trace_with(
    twin: nn.Module, is_leaf: Callable[[nn.Module], bool], wrapped: tuple[Callable[..., Any], ...] = ()
) -> fx.Graph:
    """Trace a twin, whose state may be spoiled by it; raises whatever its code raises on proxies."""
    return _Tracer(is_leaf, wrapped).trace(twin)


def trace_own_forward(module: nn.Module) -> OwnTrace:
    """Trace `module.forward` alone, its children as leaves, once in training and once in evaluation."""
    graphs = []
    for training in (True, False):
        try:
            twin = sharing_twin(module)
            with training_flags([twin], training=training):
                graphs.append(trace_with(twin, lambda _: True))
        except Exception as error:  # noqa: BLE001 - as above
            return OwnTrace(None, None, f"{type(error).__name__}: {first_line(error)}")
    calls = [len(batch_norm_nodes(graph)) for graph in graphs]
    if calls[0] != calls[1]:
        return OwnTrace(None, None, f"it makes {calls[0]} batch_norm calls in training and {calls[1]} in evaluation")
    return OwnTrace(graphs[0], graphs[1])


def read_graph(graph: fx.Graph, is_norm_fqn: Callable[[str], bool]) -> GraphFacts:
    """Read order, producers and owners of functional calls off a whole-model graph."""
    order: list[str] = []
    producers: dict[str, str] = {}
    owners: list[str] = []
    for node in graph.nodes:
        if node.op == "call_module" and is_norm_fqn(str(node.target)):
            fqn = str(node.target)
            order.append(fqn)
            if node.args and isinstance(node.args[0], fx.Node):
                producers.setdefault(fqn, _describe(node.args[0]))
        elif _is_batch_norm_call(node) and _reads_activation(batch_norm_arguments(node)["input"]):
            stack = node.meta.get("nn_module_stack") or {"": ("", None)}
            owners.append(next(reversed(stack.values()))[0])
            order.append(owners[-1])
    return GraphFacts(tuple(dict.fromkeys(order)), producers, tuple(dict.fromkeys(owners)))


def batch_norm_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that call batch_norm on an activation, in order; calls on kernels are none of them."""
    return [
        node
        for node in graph.nodes
        if _is_batch_norm_call(node) and _reads_activation(batch_norm_arguments(node)["input"])
    ]


def batch_norm_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a batch_norm node by the names of `F.batch_norm`."""
    names = BATCH_NORM_CALLS[node.target]
    named = dict(zip(names, node.args, strict=False))
    return named | {name: value for name, value in node.kwargs.items() if name in names}


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _leaf_rules(norms: Norms) -> list[tuple[Callable[[nn.Module], bool], tuple[Callable[..., Any], ...]]]:
    """From the rule that sees most to the one that traces most: the later ones hide code without norms."""

    def norm(module: nn.Module) -> bool:
        return is_norm_layer(module, norms)

    def norm_free(module: nn.Module) -> bool:
        return norm(module) or not any(is_norm_layer(m, norms) or looks_like_norm(m) for m in module.modules())

    rules: list[tuple[Callable[[nn.Module], bool], tuple[Callable[..., Any], ...]]] = []
    registry = sys.modules.get("timm.models._features_fx")
    if registry is not None:
        opaque = tuple(registry.get_notrace_modules())
        functions = tuple(registry.get_notrace_functions())
        rules.append((lambda m: norm(m) or (isinstance(m, opaque) and norm_free(m)), functions))
    else:
        rules.append((norm, ()))
    rules.append((norm_free, ()))
    return rules


def _is_batch_norm_call(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in BATCH_NORM_CALLS


def _reads_activation(value: Any) -> bool:
    """Say whether a value depends on the model's input: a kernel that is standardised does not."""
    seen: set[fx.Node] = set()
    pending = [value] if isinstance(value, fx.Node) else []
    while pending:
        node = pending.pop()
        if node.op in ("placeholder", "call_module"):
            return True
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return False


def _describe(node: fx.Node) -> str:
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target)
