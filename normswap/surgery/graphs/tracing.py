"""FX tracing: graphs of models and modules, the facts in them, and a comparison of a graph with the real forward.

A trace is made of a copy that shares the parameters, since tracing can leave a `Proxy` in the state of a module. A
trace that fails is a value with a reason, not an exception; one that succeeds lists the effects that its graph leaves
out.
"""

import itertools
import linecache
import logging
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
from normswap.surgery.model_outputs import flatten_leaves, read_leaves
from normswap.surgery.module_tree import deep_copy, walk_modules
from normswap.surgery.norms.classes import KNOWN_NORMS, NormTable, is_norm_layer, looks_like_norm
from normswap.surgery.norms.functions import norm_arguments, norm_call, reads_activation
from normswap.text import first_line, join_fqn

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """A graph, or the reason why there is none.

    Attributes:
        graph, reason: the graph, or why there is none.
        omission: an effect of the code that the graph leaves out; such a graph can be read, but not run in its place.
        entered: the names of the modules whose forward was traced through, with the root.
        constants: tensors that the forward creates from constants; the graph reads them as attributes of the root.
    """

    graph: fx.Graph | None
    reason: str | None = None
    omission: str | None = None
    entered: frozenset[str] = frozenset()
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphFacts:
    """The facts in the graph of a whole model.

    Attributes:
        calls: the fqns of the modules that normalize, call by call: norm layers and `functional_owners`.
        producers: by fqn of a norm layer, the module or function whose output is its input.
        functional_owners: the modules whose own forward calls a function that normalizes on an activation.
        kernel_owners: the modules whose own forward calls such a function on a kernel.
    """

    calls: tuple[str, ...]
    producers: Mapping[str, str]
    functional_owners: tuple[str, ...]
    kernel_owners: frozenset[str] = frozenset()

    @property
    def order(self) -> tuple[str, ...]:
        """The modules that normalize, in the order of their first call."""
        return tuple(dict.fromkeys(self.calls))


class _Tracer(fx.Tracer):
    """A tracer with a rule for leaves; buffers stay symbolic, so that their updates are recorded.

    It also records which modules it enters, and if the code switches gradients or autocast in a part of the forward.
    """

    proxy_buffer_attributes = True

    # Both have defaults because torch creates a tracer without arguments when it unpickles a GraphModule.
    def __init__(
        self, is_leaf: Callable[[nn.Module], bool] = lambda _: True, wrapped: tuple[Callable[..., Any], ...] = ()
    ) -> None:
        super().__init__(autowrap_functions=wrapped)
        self._is_leaf = is_leaf
        self._initial_autocast_depth = _autocast_depth()
        self.entered = {""}
        self.switches_context = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Apply the rule for leaves, and record a module that is traced through."""
        leaf = self._is_leaf(m) or super().is_leaf_module(m, module_qualified_name)
        if not leaf:
            self.entered.add(module_qualified_name)
        return leaf

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record if gradients or autocast are switched at this point."""
        if not torch.is_grad_enabled() or _autocast_depth() != self._initial_autocast_depth:
            self.switches_context = True
        return super().create_node(*args, **kwargs)


def copy_for_tracing(module: nn.Module) -> nn.Module:
    """Return a deep copy of `module` that shares its parameters; buffers are copied, since tracing may change them."""
    return deep_copy(module, {id(parameter): parameter for parameter in module.parameters()})


def trace_model(model: nn.Module, *, training: bool, norms: NormTable = KNOWN_NORMS) -> Trace:
    """Trace the whole of `model` with norm layers as leaves; the result has a graph or a reason."""
    reason = None
    for is_leaf, wrapped in _leaf_rules(norms):
        # Code that runs eagerly during a trace can change the shared parameters.
        with preserved_on_write(model.modules(), "everything"):
            trace = trace_copy(lambda: remove_hooks(copy_for_tracing(model)), is_leaf, wrapped, training=training)
        if trace.graph is not None:
            return trace
        _logger.debug("a trace of %s was dropped: %s", type(model).__name__, trace.reason)
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
    """Trace a copy of a module, in training or in evaluation mode.

    Args:
        make_copy: creates the copy, whose state the trace may damage; an error that it raises becomes the reason.
        is_leaf, wrapped: the modules and functions that are not traced through.
        concrete: values for arguments of the forward that are not symbolic.
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
        except Exception as error:  # noqa: BLE001 - tracing runs the user's code on proxies, which may raise anything
            return Trace(None, f"{type(error).__name__}: {first_line(error)}")
    if tracer.switches_context:
        omission = "it switches gradients or autocast in a part of its code"
    elif written:
        omission = f"it writes to {', '.join(written)}"
    return Trace(graph, None, omission, frozenset(tracer.entered), constants)


def _with_plain_assertions(graph: fx.Graph) -> fx.Graph:
    """Replace FX's helper `_assert_is_none`, since a GraphModule that calls it breaks later traces (torch 2.14)."""
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
    """The attributes that tracing changed, except the constants that the tracer stores."""
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
    """Remove the hooks of a copy, since they may pass proxies to the user's own objects; return the copy."""
    for module in module_copy.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return module_copy


def _autocast_depth() -> int:
    """The number of open autocast contexts, also disabled ones; torch returns it only when it changes the count."""
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return int(depth)


def read_graph(graph: fx.Graph, is_norm_fqn: Callable[[str], bool]) -> GraphFacts:
    """Return the calls, producers and owners of functional calls in the graph of a whole model."""
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
    """Compile a graph to a function of (self, ...) that reads all attributes from `self`.

    Args:
        name: the name of the code in tracebacks.
    """
    code = graph.python_code("self")
    # Tracebacks and debuggers show the generated lines.
    file = f"<normswap: {name} #{next(_counter)}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
    namespace = dict(code.globals)
    exec(compile(code.src, file, "exec"), namespace)
    return namespace["forward"]  # type: ignore[no-any-return]


_counter = itertools.count()


def _leaf_rules(norms: NormTable) -> list[tuple[Callable[[nn.Module], bool], tuple[Callable[..., Any], ...]]]:
    """The rules for leaves, in order: the first shows the most code, the later ones skip code without norms."""

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
    """Return paths and leaves of the result of `run`, which calls `module`, or the class of its error.

    The state of `module` and the random state are restored.
    """
    modules = [entry.module for entry in walk_modules(module)]
    with preserved_state(modules), training_flags(modules, training=training), seeded(0), torch.no_grad():
        for gated in modules:
            if isinstance(gated, GatedModule):  # other processes may not run this comparison
                gated.synchronize = False
        try:
            return flatten_leaves(read_leaves(run()))
        except Exception as error:  # noqa: BLE001 - the user's code: two sides that fail with one class agree
            return [type(error).__name__]


def outputs_match(first: list[Any], second: list[Any]) -> bool:
    """Whether two results of `run_isolated` are the same, up to rounding."""
    return len(first) == len(second) and all(map(_values_match, first, second))


def _values_match(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same_metadata = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return same_metadata and (a.is_meta or torch.allclose(a, b, equal_nan=True))
    if isinstance(a, float | complex) and type(a) is type(b):
        return bool(torch.isclose(torch.tensor(a), torch.tensor(b), equal_nan=True))
    return type(a) is type(b) and bool(a == b)
