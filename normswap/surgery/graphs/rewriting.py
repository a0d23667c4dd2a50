"""Rewriting of functional sites: the batch_norm calls in the forward of one module call new children instead.

The own forward of the module is traced with its children as leaves, in training and in evaluation mode, and the
rewritten module runs the graph of its current mode. If optional arguments decide what runs, the graphs are used for
their defaults only; other calls run the original forward, with its batch_norm calls redirected. The module stays the
same object and an instance of its class, and gains one child with gates per site. In a `torch.fx.GraphModule`, whose
graph is its code, the nodes themselves are replaced. All of it can be undone.
"""

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from normswap.errors import LayerError, SwapError
from normswap.layers.gated_module import FunctionalSwitchNorm
from normswap.layers.in_place import shallow_copy
from normswap.surgery.graphs.module_trace import ModuleTrace, trace_module_forward
from normswap.surgery.graphs.tracing import compile_graph
from normswap.surgery.norms.functions import (
    NORM_CALLS,
    all_results,
    as_results,
    attribute_tensor,
    batch_norm_nodes,
    call_name,
    is_batch_norm_call,
    norm_arguments,
)

# --- the original forward with redirected calls -----------------------------------------------------------------------

_MODULE_CALL_CODE = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}


class _Redirection(TorchFunctionMode):
    """Redirects the batch_norm calls of one forward, also those in its helper functions, to the gates in order."""

    def __init__(self, gates: list[nn.Module | None]) -> None:
        super().__init__()
        self.gates = gates
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = NORM_CALLS.get(func)
        if call is None or call.kind != "bn" or is_called_inside_submodule(run_original_forward.__code__):
            return func(*args, **kwargs)
        self.count += 1
        gate = self.gates[self.count - 1] if self.count <= len(self.gates) else None
        if gate is None:
            return func(*args, **kwargs)
        arguments = dict(zip(call.parameters, args, strict=False)) | kwargs | dict(call.fixed_arguments)
        arguments.pop("cudnn_enabled", None)
        y = gate(arguments.pop("input"), **arguments)
        return y if call.results is None else all_results(call, y, arguments)


def run_original_forward(forward: Callable[..., Any], gates: list[nn.Module | None], *args: Any, **kwargs: Any) -> Any:
    """Run `forward` with its batch_norm calls redirected to `gates`, one per call in order, None for a kept call.

    Raises:
        LayerError: it makes batch_norm calls, and their number differs from that of `gates`.
    """
    with _Redirection(gates) as redirection:
        result = forward(*args, **kwargs)
    if redirection.count not in (0, len(gates)):
        raise LayerError(
            f"{forward.__qualname__} was rewritten for {len(gates)} batch_norm calls, but makes {redirection.count} "
            "with these arguments: move each call into a small module, then convert again"
        )
    return result


def is_called_inside_submodule(forward: CodeType) -> bool:
    """Whether a module that a forward called is running, judged by the stack frames up to that of `forward`."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code is not forward:
        if frame.f_code in _MODULE_CALL_CODE:
            return True
        frame = frame.f_back
    return False


# --- modules ----------------------------------------------------------------------------------------------------------

# The attribute of a rewritten module with the name of the child for each batch_norm call of its own forward, in order.
_SITE_NAMES = "_switch_norm_names"

SiteNames = tuple[str | None, ...]


def unused_names(module: nn.Module, count: int, stem: str = "batch_norm") -> list[str]:
    """Return `count` attribute names that `module` does not have, for the gates of its sites in order."""
    names: list[str] = []
    number = 0
    while len(names) < count:
        name = f"{stem}_{number}" if number else stem
        if not hasattr(module, name):
            names.append(name)
        number += 1
    return names


def compile_rewritten_forward(
    module: nn.Module, site_names: SiteNames | None = None, *, own: ModuleTrace | None = None
) -> Callable[..., Any]:
    """Return a forward function compiled from the graphs of `module`, which is not changed.

    Args:
        site_names: for each batch_norm call in order, the child of `module` to call instead, None to keep the call;
            default: the children of a module that is rewritten already.
        own: the trace of a `module` that is not rewritten yet, if there is one; replaced calls change its graphs.

    Raises:
        SwapError: the forward cannot be traced, or its graph cannot run in its place.
    """
    original = _original_copy(module) if is_rewritten(module) else module
    if site_names is None:
        site_names = module.__dict__.get(_SITE_NAMES, ())
    if own is None or original is not module:
        own = trace_module_forward(original)
    if own.training is None or own.evaluation is None:
        raise SwapError(f"the forward of {type(module).__name__} cannot be rewritten: {own.reason}")
    order = {mode: _names_by_call(graph, site_names) for mode, graph in ((True, own.training), (False, own.evaluation))}
    name = f"forward of {type(module).__qualname__}"
    training, evaluation = (compile_graph(swap_calls(g, site_names), name) for g in (own.training, own.evaluation))
    original_forward = type(original).forward

    @functools.wraps(original_forward)
    def run_graph(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (training if self.training else evaluation)(self, *args, **kwargs)

    return _dispatch_on_options(run_graph, original_forward, own, order) if own.options else run_graph


def _names_by_call(graph: fx.Graph, site_names: SiteNames) -> SiteNames:
    """For each batch_norm call, also those on kernels, the child to call instead, None for a kept call."""
    names = dict(zip(batch_norm_nodes(graph), site_names, strict=False))
    return tuple(names.get(node) for node in graph.nodes if is_batch_norm_call(node))


def _dispatch_on_options(
    run_graph: Callable[..., Any], original_forward: Callable[..., Any], own: ModuleTrace, order: dict[bool, SiteNames]
) -> Callable[..., Any]:
    """Return a forward that runs the graphs if all options have their defaults, else the original forward."""
    signature = inspect.signature(original_forward)

    @functools.wraps(original_forward)
    def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        passed = [name for name in own.options if name in bound.arguments]
        if all(_is_default(bound.arguments[name], own.options[name]) for name in passed):
            for name in passed:  # the graphs have other names for them
                del bound.arguments[name]
            return run_graph(*bound.args, **bound.kwargs)
        gates = [None if name is None else self.get_submodule(name) for name in order[self.training]]
        return run_original_forward(original_forward, gates, self, *args, **kwargs)

    return _forward


def _is_default(value: Any, default: Any) -> bool:
    """Whether an argument has its default value; a value of another type, such as a tensor, is not compared."""
    return type(value) is type(default) and bool(value == default)


def rewrite_forward(
    module: nn.Module, gates: dict[str, FunctionalSwitchNorm], site_names: SiteNames, own: ModuleTrace
) -> None:
    """Replace batch_norm calls in the own forward of `module` by calls of new children.

    Args:
        gates: the new children by name.
        site_names: for each batch_norm call in order, the name of its child, None for a kept call.
        own: the trace of `module`; its graphs are changed.

    Raises:
        SwapError: the forward cannot be traced; the module is unchanged.
    """
    original = type(module)
    if is_rewritten(module):
        # Its remaining calls are those that were kept before.
        remaining = iter(site_names)
        earlier = module.__dict__[_SITE_NAMES]
        site_names = tuple(next(remaining, None) if name is None else name for name in earlier)
        original = original.original_class  # type: ignore[attr-defined]
    forward = compile_rewritten_forward(module, site_names, own=own)
    for name, child in gates.items():
        module.add_module(name, child)
    module.__dict__[_SITE_NAMES] = site_names
    module.__class__ = _rewritten_class(original, forward)


def restore_forward(module: nn.Module) -> None:
    """Undo `rewrite_forward`: restore the class and the forward, and remove the new children."""
    for name in module.__dict__.pop(_SITE_NAMES):
        if name is not None:
            del module._modules[name]
    module.__class__ = type(module).original_class  # type: ignore[attr-defined]


def is_rewritten(module: nn.Module) -> bool:
    """Whether `module` runs a rewritten forward."""
    return isinstance(module, _RewrittenForward)


class _RewrittenForward(nn.Module):
    """Second base of a rewritten module. Graphs are not pickled: a copy or unpickled module is rewritten again."""

    original_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self.original_class,), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__class__ = _rewritten_class(self.original_class, compile_rewritten_forward(self))  # type: ignore[assignment]


def _original_copy(module: nn.Module) -> nn.Module:
    """Return a copy with the same tensors and children, the original class and no gates."""
    module_copy = shallow_copy(module)
    restore_forward(module_copy)
    return module_copy


def _blank(original: type[nn.Module]) -> nn.Module:
    cls = _rewritten_class(original, original.forward)
    return cls.__new__(cls)


def _rewritten_class(original: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    body = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "original_class": original,
        "forward": forward,
    }
    return type(original.__name__, (_RewrittenForward, original), body)


def swap_calls(graph: fx.Graph, site_names: SiteNames) -> fx.Graph:
    """Replace each batch_norm call of `graph`, in order, by a call of the named child (None: keep); return `graph`."""
    for node, name in zip(batch_norm_nodes(graph), site_names, strict=False):
        if name is None:
            continue
        call, arguments = NORM_CALLS[node.target], norm_arguments(node)
        with graph.inserting_before(node):
            new = graph.call_module(name, (arguments.pop("input"),), arguments)
            new.meta = dict(node.meta)
            if "cudnn_enabled" in call.parameters[: len(node.args)]:  # no part of the function, but restored
                new.meta["cudnn_enabled"] = node.args[call.parameters.index("cudnn_enabled")]
            if call.results is not None:
                new = graph.call_function(as_results, all_results(call, new, arguments))
                new.meta["is_wrapped"] = True
        replace_node(graph, node, new)
    return graph


def replace_node(graph: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    """Replace `node` by `new`, which takes over its metadata."""
    new.meta = {**node.meta, **new.meta}
    node.replace_all_uses_with(new)
    graph.erase_node(node)


# --- graph modules ----------------------------------------------------------------------------------------------------


def edit_graph(
    module: fx.GraphModule, gates: dict[str, FunctionalSwitchNorm], site_names: tuple[str | None, ...]
) -> None:
    """Replace batch_norm nodes in the graph of `module` by calls of new children.

    Args:
        gates: the new children by name.
        site_names: for each batch_norm node in order, the name of its child, None for a kept node.
    """
    for child_name, child in gates.items():
        module.add_module(child_name, child)
    module.graph = swap_calls(copy.deepcopy(module.graph), site_names)


def restore_graph(module: fx.GraphModule) -> None:
    """Undo `edit_graph`: restore the calls of the original functions, and remove the new children."""
    calls = {call_name(call): call for call in NORM_CALLS}
    gates = _functional_gates(module)
    graph = copy.deepcopy(module.graph)
    for node in _gate_calls(graph, gates):
        call = calls[gates[str(node.target)].replaced_call]
        args, kwargs = _arguments_of(node, NORM_CALLS[call].parameters)
        with graph.inserting_before(node):
            restored = graph.call_function(call, args, kwargs)
        wrapped_result = next((user for user in node.users if user.target is as_results), None)
        replace_node(graph, wrapped_result or node, restored)
        if wrapped_result is not None:
            restored.meta.pop("is_wrapped", None)
            graph.erase_node(node)
    for name in gates:
        module.delete_submodule(name)
    module.graph = graph


def _arguments_of(node: fx.Node, parameters: tuple[str, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the original call of a gate: by position up to the first one that is missing."""
    cudnn = node.meta.get("cudnn_enabled", torch.backends.cudnn.enabled)
    values = {"input": node.args[0], "cudnn_enabled": cudnn, **node.kwargs}
    first_missing = next((index for index, name in enumerate(parameters) if name not in values), len(parameters))
    keyword_arguments = {name: values[name] for name in parameters[first_missing:] if name in values}
    return tuple(values[name] for name in parameters[:first_missing]), keyword_arguments


def gate_call_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes that call gates of functional sites."""
    return _gate_calls(module.graph, _functional_gates(module))


def _functional_gates(module: fx.GraphModule) -> dict[str, FunctionalSwitchNorm]:
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    return {n: m for n, m in module.named_modules() if n in called and isinstance(m, FunctionalSwitchNorm)}


def _gate_calls(graph: fx.Graph, gates: dict[str, FunctionalSwitchNorm]) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_module" and str(node.target) in gates]


# --- the tensors of the sites -----------------------------------------------------------------------------------------


class SiteTensors(NamedTuple):
    """The tensors of a module from which the arguments of a functional site come; None for one from elsewhere."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def functional_site_tensors(module: nn.Module) -> dict[str, SiteTensors]:
    """Return the tensors of each functional site of a rewritten module or of a GraphModule, by the name of its child.

    Raises:
        SwapError: the forward of a rewritten module cannot be traced any more.
    """
    calls = _site_arguments(module)
    return {
        name: SiteTensors(*(attribute_tensor(module, _source(arguments.get(each))) for each in SiteTensors._fields))
        for name, arguments in calls.items()
    }


def _site_arguments(module: nn.Module) -> dict[str, Mapping[str, Any]]:
    if isinstance(module, fx.GraphModule):
        return {str(node.target): node.kwargs for node in gate_call_nodes(module)}
    if not is_rewritten(module):
        return {}
    own = trace_module_forward(_original_copy(module))
    if own.training is None:
        raise SwapError(f"the forward of {type(module).__name__} cannot be traced any more: {own.reason}")
    calls = zip(module.__dict__[_SITE_NAMES], batch_norm_nodes(own.training), strict=False)
    return {name: norm_arguments(node) for name, node in calls if name is not None}


def _source(node: Any) -> Any:
    """The node from which an argument is computed, such as a table of which it is one row."""
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node
