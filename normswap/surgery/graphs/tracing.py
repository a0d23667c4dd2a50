"""FX graphs of whole models, to know order, producers and functional calls.

A trace is always made of a twin that shares the parameters, since tracing can leave a `Proxy` in a module's state.
A failed trace is a value with a reason, never an exception; one that succeeds says what the graph does not hold.
Nothing is decided or changed here.
"""

import itertools
import linecache
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.layers.gated_module import GatedModule
from normswap.model_state import (
    ModuleState,
    changed_attributes,
    module_state,
    preserved_on_write,
    preserved_state,
    random_state,
    seeded,
    training_flags,
)
from normswap.surgery.model_outputs import flatten_leaves
from normswap.surgery.module_tree import deep_copy, walk_modules
from normswap.surgery.norms.classes import KNOWN_NORMS, NormTable, is_norm_layer, looks_like_norm
from normswap.surgery.norms.functions import norm_arguments, norm_call, reads_activation
from normswap.text import first_line, join_fqn

# MERGED DOC: Runs that leave nothing behind, to hold a traced forward against the real one before it is believed.


@dataclass(frozen=True)
class Trace:
    """A graph, or the reason why there is none.

    `omission` tells what the code does that its graph does not hold: good enough to read, not to run in its place.
    `entered` names the modules whose forward was traced through, the root included; `constants` are the tensors that
    the forward makes out of nothing, which the graph reads as attributes of the root.
    """

    graph: fx.Graph | None
    reason: str | None = None
    omission: str | None = None
    entered: frozenset[str] = frozenset()
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphFacts:
    """What a whole-model graph tells.

    `calls` holds the fqns of the modules that normalize, call by call: norm layers and `functional_owners`, which call
    a function that normalizes on an activation in their own forward. `producers` is by fqn of a norm layer, and
    `kernel_owners` are those that call such a function on a kernel.
    """

    calls: tuple[str, ...]
    producers: Mapping[str, str]
    functional_owners: tuple[str, ...]
    kernel_owners: frozenset[str] = frozenset()

    @property
    def order(self) -> tuple[str, ...]:
        """The modules that normalize as they first do."""
        return tuple(dict.fromkeys(self.calls))


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
        self._initial_autocast_depth = _autocast_depth()
        self.entered = {""}
        self.switches_context = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = self._is_leaf(m) or super().is_leaf_module(m, module_qualified_name)
        if not leaf:
            self.entered.add(module_qualified_name)
        return leaf

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled() or _autocast_depth() != self._initial_autocast_depth:
            self.switches_context = True
        return super().create_node(*args, **kwargs)


def copy_for_tracing(module: nn.Module) -> nn.Module:
    """Return a deep copy of `module` that shares its parameters; buffers are copied, for tracing may update them."""
    return deep_copy(module, {id(parameter): parameter for parameter in module.parameters()})


def trace_model(model: nn.Module, *, training: bool, norms: NormTable = KNOWN_NORMS) -> Trace:
    """Trace the whole of `model` with norm layers as leaves, or say why it cannot be traced."""
    reason = None
    for is_leaf, wrapped in _leaf_rules(norms):
        with preserved_on_write(
            model.modules(), "everything"
        ):  # code run for real reaches the parameters that the twin shares
            trace = trace_copy(lambda: remove_hooks(copy_for_tracing(model)), is_leaf, wrapped, training=training)
        if trace.graph is not None:
            return trace
        reason = reason or trace.reason
    return Trace(None, reason)


def trace_copy(
    make_copy: Callable[[], nn.Module],
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
            module_copy = make_copy()
            with training_flags(module_copy.modules(), training=training):
                states = {name: module_state(module) for name, module in module_copy.named_modules()}
                random_state_before = random_state()
                graph = _with_plain_assertions(tracer.trace(module_copy, concrete))
                omission = "it draws random numbers in Python" if random_state() != random_state_before else None
                written = _written_attributes(module_copy, states, graph)
                new_attributes = vars(module_copy).keys() - states[""].attributes.keys()
                constants = {name: vars(module_copy)[name] for name in new_attributes & _attributes_read(graph)}
        except Exception as error:  # noqa: BLE001 - tracing runs the user's code on proxies: anything may come
            return Trace(None, f"{type(error).__name__}: {first_line(error)}")
    if tracer.switches_context:
        omission = "it switches gradients or autocast for a part of what it does"
    elif written:
        omission = f"it writes to {', '.join(written)}"
    return Trace(graph, None, omission, frozenset(tracer.entered), constants)


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


def _written_attributes(module_copy: nn.Module, states: dict[str, ModuleState], graph: fx.Graph) -> list[str]:
    """What tracing changed in the state of the modules, other than the constants that the tracer stores there."""
    stored = _attributes_read(graph)
    written = [
        join_fqn(owner, name)
        for owner, module in module_copy.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)  # they cache their methods
        for name in changed_attributes(states.get(owner, ModuleState({}, {})), module_state(module))
    ]
    return [name for name in written if name not in stored]


def _attributes_read(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "get_attr"}


def remove_hooks(module_copy: nn.Module) -> nn.Module:
    """Hooks of a deep copy may still reach the user's own objects, which must not be handed proxies."""
    for module in module_copy.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return module_copy


def _autocast_depth() -> int:
    """How many autocast contexts are open, also those that switch it off; torch tells only while it counts."""
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return int(depth)


def read_graph(graph: fx.Graph, is_norm_fqn: Callable[[str], bool]) -> GraphFacts:
    """Read calls, producers and owners of functional calls off a whole-model graph."""
    calls: list[str] = []
    producers: dict[str, str] = {}
    owners: dict[bool, list[str]] = {True: [], False: []}
    for node in graph.nodes:
        if node.op == "call_module" and is_norm_fqn(str(node.target)):
            fqn = str(node.target)
            calls.append(fqn)
            source = next((value for value in (*node.args, *node.kwargs.values()) if isinstance(value, fx.Node)), None)
            if source is not None:
                producers.setdefault(fqn, _node_name(source))
        elif norm_call(node):
            stack = node.meta.get("nn_module_stack") or {"": ("", None)}
            owner = next(reversed(stack.values()))[0]
            on_activation = reads_activation(norm_arguments(node)["input"])
            owners[on_activation].append(owner)
            calls += [owner] * on_activation
    return GraphFacts(tuple(calls), producers, tuple(dict.fromkeys(owners[True])), frozenset(owners[False]))


def compile_graph(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """Compile a graph to a function of (self, ...) that reads everything from `self`, under this name in tracebacks."""
    code = graph.python_code("self")
    # Tracebacks and debuggers show the generated lines.
    file = f"<normswap: {name} #{next(_counter)}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
    namespace = dict(code.globals)
    exec(compile(code.src, file, "exec"), namespace)
    return namespace["forward"]  # type: ignore[no-any-return]


_counter = itertools.count()


def _leaf_rules(norms: NormTable) -> list[tuple[Callable[[nn.Module], bool], tuple[Callable[..., Any], ...]]]:
    """From the rule that sees most to the one that traces most: the later ones hide code without norms."""

    def norm(module: nn.Module) -> bool:
        return is_norm_layer(module, norms)

    def is_without_norms(module: nn.Module) -> bool:
        return norm(module) or not any(is_norm_layer(m, norms) or looks_like_norm(m) for m in module.modules())

    rules: list[tuple[Callable[[nn.Module], bool], tuple[Callable[..., Any], ...]]] = []
    registry = sys.modules.get("timm.models._features_fx")
    if registry is not None:
        opaque = tuple(registry.get_notrace_modules())
        functions = tuple(registry.get_notrace_functions())
        rules.append((lambda m: norm(m) or (isinstance(m, opaque) and is_without_norms(m)), functions))
    else:
        rules.append((norm, ()))
    rules.append((is_without_norms, ()))
    return rules


def _node_name(node: fx.Node) -> str:
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target)


def run_isolated(module: nn.Module, run: Callable[[], Any], *, training: bool) -> list[Any]:
    """Return paths and leaves of what `run`, which calls `module`, returns, or the class of the error it raises."""
    modules = [entry.module for entry in walk_modules(module)]
    with preserved_state(modules), training_flags(modules, training=training), seeded(0), torch.no_grad():
        for gated in modules:
            if isinstance(gated, GatedModule):  # other processes may not be on trial
                gated.synchronize = False
        try:
            return flatten_leaves(run())
        except Exception as error:  # noqa: BLE001 - the user's code: where both sides fail alike, they agree
            return [type(error).__name__]


def outputs_match(first: list[Any], second: list[Any]) -> bool:
    """Say whether two outcomes are the same, up to rounding."""
    return len(first) == len(second) and all(map(_values_match, first, second))


def _values_match(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same_metadata = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return same_metadata and (a.is_meta or torch.allclose(a, b, equal_nan=True))
    if isinstance(a, float | complex) and type(a) is type(b):
        return bool(torch.isclose(torch.tensor(a), torch.tensor(b), equal_nan=True))
    return type(a) is type(b) and bool(a == b)
