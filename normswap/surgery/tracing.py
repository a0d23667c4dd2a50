"""FX graphs of whole models, to know order, producers and functional calls of batch_norm.

A trace is always made of a twin that shares the parameters, since tracing can leave a `Proxy` in a module's state.
A failed trace is a value with a reason, never an exception; one that succeeds says what the graph does not hold.
Nothing is decided or changed here.
"""

import copy
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from normswap.modes import ModuleState, changed_names, module_state, random_state, seeded, training_flags
from normswap.surgery.norms import KNOWN_NORMS, Norms, is_norm_layer, looks_like_norm
from normswap.surgery.tree import join

# The calls that make a functional site, with the order of their parameters under the names of `F.batch_norm`.
BATCH_NORM_CALLS: Mapping[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    # Of exported programs; the last argument, cudnn_enabled, says nothing of the function.
    torch.ops.aten.batch_norm.default: (
        *("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled"),
    ),
}


@dataclass(frozen=True)
class Trace:
    """A graph, or the reason why there is none.

    `omission` tells what the code does that its graph does not hold: good enough to read, not to run in its place.
    `entered` names the modules whose forward was traced through, the root included.
    """

    graph: fx.Graph | None
    reason: str | None = None
    omission: str | None = None
    entered: frozenset[str] = frozenset()


@dataclass(frozen=True)
class GraphFacts:
    """What a whole-model graph tells.

    `order` holds the fqns of the modules that normalize, as they are called: norm layers and `functional_owners`,
    which call `F.batch_norm` on an activation in their own forward. `producers` is by fqn of a norm layer.
    """

    order: tuple[str, ...]
    producers: Mapping[str, str]
    functional_owners: tuple[str, ...]


class _Tracer(fx.Tracer):
    """A tracer with our leaf rule; buffers stay symbolic, so that their updates are recorded.

    It also notes the modules that it enters, and whether the code switches gradients or autocast for a while.
    """

    proxy_buffer_attributes = True

    # Both have defaults because torch makes a tracer without arguments when it unpickles a GraphModule.
    def __init__(
        self, is_leaf: Callable[[nn.Module], bool] = lambda _: True, wrapped: tuple[Callable[..., Any], ...] = ()
    ) -> None:
        super().__init__(autowrap_functions=wrapped)
        self._is_leaf = is_leaf
        self._depth = _autocast_depth()
        self.entered = {""}
        self.switches_context = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = self._is_leaf(m) or super().is_leaf_module(m, module_qualified_name)
        if not leaf:
            self.entered.add(module_qualified_name)
        return leaf

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled() or _autocast_depth() != self._depth:
            self.switches_context = True
        return super().create_node(*args, **kwargs)


def sharing_twin(module: nn.Module) -> nn.Module:
    """Return a deep copy of `module` that shares its parameters; buffers are copied, for tracing may update them."""
    return _twin(module, {id(parameter): parameter for parameter in module.parameters()})


def _twin(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy` of a module, without its cost for what most modules hold most: numbers and empty registries."""
    if id(module) in memo:
        return memo[id(module)]  # type: ignore[no-any-return]
    cls = type(module)
    if any(getattr(cls, name, None) is not getattr(nn.Module, name, None) for name in _COPY_PROTOCOL):
        return copy.deepcopy(module, memo)
    twin = cls.__new__(cls)
    memo[id(module)] = twin
    for name, value in vars(module).items():
        if name == "_modules":
            vars(twin)[name] = {key: child if child is None else _twin(child, memo) for key, child in value.items()}
        elif name == "_parameters":
            vars(twin)[name] = value.copy()
        elif name == "_buffers":
            vars(twin)[name] = {key: _tensor_twin(buffer, memo) for key, buffer in value.items()}
        elif type(value) in _IMMUTABLE:
            vars(twin)[name] = value
        else:
            vars(twin)[name] = copy.deepcopy(value, memo) if not isinstance(value, dict) or value else type(value)()
    return twin


def _tensor_twin(buffer: torch.Tensor | None, memo: dict[int, Any]) -> torch.Tensor | None:
    if type(buffer) is not torch.Tensor or buffer.requires_grad or id(buffer) in memo:
        return copy.deepcopy(buffer, memo)
    memo[id(buffer)] = buffer.clone()
    return memo[id(buffer)]  # type: ignore[no-any-return]


_COPY_PROTOCOL = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__new__")
_IMMUTABLE = (bool, int, float, str, type(None))


def trace_model(model: nn.Module, *, training: bool, norms: Norms = KNOWN_NORMS) -> Trace:
    """Trace the whole of `model` with norm layers as leaves, or say why it cannot be traced."""
    reason = None
    for is_leaf, wrapped in _leaf_rules(norms):
        trace = trace_with(lambda: _without_hooks(sharing_twin(model)), is_leaf, wrapped, training=training)
        if trace.graph is not None:
            return trace
        reason = reason or trace.reason
    return Trace(None, reason)


def trace_with(
    make_twin: Callable[[], nn.Module],
    is_leaf: Callable[[nn.Module], bool],
    wrapped: tuple[Callable[..., Any], ...] = (),
    *,
    training: bool,
    concrete: dict[str, Any] | None = None,
) -> Trace:
    """Trace a twin, whose state may be spoiled by it, in training or in evaluation.

    Args:
        make_twin: makes it; what it raises is a reason like any other.
        concrete: values for arguments of its forward that are not to be symbolic.
    """
    tracer = _Tracer(is_leaf, wrapped)
    with seeded(0), torch.enable_grad():
        try:
            twin = make_twin()
            with training_flags(twin.modules(), training=training):
                states = {name: module_state(module) for name, module in twin.named_modules()}
                drawn = random_state()
                graph = _with_plain_assertions(tracer.trace(twin, concrete))
                omission = "it draws random numbers in Python" if random_state() != drawn else None
                written = _written_attributes(twin, states, graph)
        except Exception as error:  # noqa: BLE001 - tracing runs the user's code on proxies: anything may come
            return Trace(None, f"{type(error).__name__}: {first_line(error)}")
    if tracer.switches_context:
        omission = "it switches gradients or autocast for a part of what it does"
    elif written:
        omission = f"it writes to {', '.join(written)}"
    return Trace(graph, None, omission, frozenset(tracer.entered))


def _with_plain_assertions(graph: fx.Graph) -> fx.Graph:
    """Say `x is None` without FX's own helper: a GraphModule that names it breaks all later traces (torch 2.14)."""
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") == "_assert_is_none":
            value, message = node.args
            with graph.inserting_before(node):
                node.replace_all_uses_with(
                    graph.call_function(torch._assert, (graph.call_function(operator.eq, (value, None)), message))
                )
            graph.erase_node(node)
    return graph


def _written_attributes(twin: nn.Module, states: dict[str, ModuleState], graph: fx.Graph) -> list[str]:
    """What tracing changed in the state of the modules, other than the constants that the tracer stores there."""
    stored = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    written = [
        join(owner, name)
        for owner, module in twin.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)  # they cache their methods
        for name in changed_names(states.get(owner, ModuleState({}, {})), module_state(module))
    ]
    return [name for name in written if name not in stored]


def _without_hooks(twin: nn.Module) -> nn.Module:
    """Hooks of a deep copy may still reach the user's own objects, which must not be handed proxies."""
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


def _autocast_depth() -> int:
    """How many autocast contexts are open, also those that switch it off; torch tells only while it counts."""
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return int(depth)


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
        elif is_batch_norm_call(node) and _reads_activation(batch_norm_arguments(node)["input"]):
            stack = node.meta.get("nn_module_stack") or {"": ("", None)}
            owners.append(next(reversed(stack.values()))[0])
            order.append(owners[-1])
    return GraphFacts(tuple(dict.fromkeys(order)), producers, tuple(dict.fromkeys(owners)))


def batch_norm_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that call batch_norm on an activation, in order; calls on kernels are none of them."""
    return [
        node
        for node in graph.nodes
        if is_batch_norm_call(node) and _reads_activation(batch_norm_arguments(node)["input"])
    ]


def batch_norm_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a batch_norm node by the names of `F.batch_norm`."""
    names = BATCH_NORM_CALLS[node.target]
    named = dict(zip(names, node.args, strict=False))
    named |= {name: value for name, value in node.kwargs.items() if name in names}
    named.pop("cudnn_enabled", None)
    return named


def is_batch_norm_call(node: fx.Node) -> bool:
    """Say whether a node calls batch_norm, on whatever."""
    return node.op == "call_function" and node.target in BATCH_NORM_CALLS


def call_name(call: Any) -> str:
    """Return the name of one of `BATCH_NORM_CALLS`, such as `torch.nn.functional.batch_norm`."""
    return str(call) if isinstance(call, torch._ops.OpOverload) else f"{call.__module__ or 'torch'}.{call.__name__}"


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


def _reads_activation(value: Any) -> bool:
    """Say whether a value depends on what flows through the model: a kernel that is standardised does not."""
    seen: set[fx.Node] = set()
    pending = [value] if isinstance(value, fx.Node) else []
    while pending:
        node = pending.pop()
        if node.op == "placeholder" or (node.op == "call_module" and "parametrizations" not in str(node.target)):
            return True
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return False


def _describe(node: fx.Node) -> str:
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target)
