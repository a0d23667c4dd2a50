"""Functional sites: rewriting the FX graph of the one module that calls `F.batch_norm` itself.

Only that module's own forward is traced, with its children as leaves, once in training and once in evaluation;
the rewritten module runs the graph of its present mode, so it obeys `train()` and `eval()` in everything that its
forward does. Where optional arguments decide what runs, the graphs serve the calls that leave these at their defaults,
and all others run as they are written. The module object stays and remains an instance of its class, with its methods,
attributes, buffers and parameters; it gains one small child per site that holds the gates.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from normswap.errors import SwapError
from normswap.layers.adoption import shallow_twin
from normswap.layers.modules import FunctionalSwitchNorm
from normswap.surgery.as_written import run_as_written
from normswap.surgery.calls import (
    NORM_CALLS,
    all_results,
    as_results,
    batch_norm_nodes,
    is_batch_norm_call,
    norm_arguments,
)
from normswap.surgery.own_forward import OwnForward, trace_own_forward
from normswap.surgery.tracing import compile_graph

# Where a rewritten module keeps, per batch_norm call of its own forward in order, the child that replaced it.
_SITE_NAMES = "_switch_norm_names"

SiteNames = tuple[str | None, ...]


def free_names(module: nn.Module, count: int, stem: str = "batch_norm") -> list[str]:
    """Return `count` attribute names that `module` does not have, for the gates of its sites in order."""
    names: list[str] = []
    number = 0
    while len(names) < count:
        name = f"{stem}_{number}" if number else stem
        if not hasattr(module, name):
            names.append(name)
        number += 1
    return names


def compile_forward(
    module: nn.Module, site_names: SiteNames | None = None, *, own: OwnForward | None = None
) -> Callable[..., Any]:
    """Return a forward function for `module` made from the graphs of its class's; the module is left as it is.

    Args:
        site_names: for each batch_norm call in order the child of `module` to call in its place, None to keep it;
            by default those that are in its place already.
        own: what was traced of a `module` that is not rewritten yet, if somebody has done that; its graphs are
            changed where calls are replaced.

    Raises:
        SwapError: the forward cannot be traced, or not so that the graph may run in its place.
    """
    original = _as_it_was(module) if is_rewritten(module) else module
    if site_names is None:
        site_names = module.__dict__.get(_SITE_NAMES, ())
    if own is None or original is not module:
        own = trace_own_forward(original)
    if own.training is None or own.evaluation is None:
        raise SwapError(f"the forward of {type(module).__name__} cannot be rewritten: {own.reason}")
    order = {mode: _names_by_call(graph, site_names) for mode, graph in ((True, own.training), (False, own.evaluation))}
    name = f"forward of {type(module).__qualname__}"
    training, evaluation = (compile_graph(swap_calls(g, site_names), name) for g in (own.training, own.evaluation))
    written = type(original).forward

    @functools.wraps(written)
    def by_graph(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (training if self.training else evaluation)(self, *args, **kwargs)

    return _by_arguments(by_graph, written, own, order) if own.options else by_graph


def _names_by_call(graph: fx.Graph, site_names: SiteNames) -> SiteNames:
    """For each batch_norm call, those on kernels included, the child in its place, None for a call that stays."""
    names = dict(zip(batch_norm_nodes(graph), site_names, strict=False))
    return tuple(names.get(node) for node in graph.nodes if is_batch_norm_call(node))


def _by_arguments(
    by_graph: Callable[..., Any], written: Callable[..., Any], own: OwnForward, order: dict[bool, SiteNames]
) -> Callable[..., Any]:
    """Return a forward that runs the graphs where the options are at their defaults, and else what is written."""
    signature = inspect.signature(written)

    @functools.wraps(written)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        given = [name for name in own.options if name in bound.arguments]
        if all(_is(bound.arguments[name], own.options[name]) for name in given):
            for name in given:  # the graphs have them under other names
                del bound.arguments[name]
            return by_graph(*bound.args, **bound.kwargs)
        gates = [None if name is None else self.get_submodule(name) for name in order[self.training]]
        return run_as_written(written, gates, self, *args, **kwargs)

    return forward


def _is(value: Any, default: Any) -> bool:
    """Say whether an argument is at its default; what has another type, such as a tensor, is not even compared."""
    return type(value) is type(default) and bool(value == default)


def rewrite_forward(
    module: nn.Module, gates: dict[str, FunctionalSwitchNorm], site_names: SiteNames, own: OwnForward
) -> None:
    """Put SN in place of batch_norm calls in `module`'s own forward.

    Args:
        gates: the new children by name.
        site_names: for each batch_norm call in order the name of its child, None for a call that stays.
        own: what was traced of `module`; its graphs are changed.

    Raises:
        SwapError: the forward cannot be traced; the module is as it was.
    """
    original = type(module)
    if is_rewritten(module):
        # Its remaining calls are those that were left in place before.
        remaining = iter(site_names)
        earlier = module.__dict__[_SITE_NAMES]
        site_names = tuple(next(remaining, None) if name is None else name for name in earlier)
        original = original.original_class  # type: ignore[attr-defined]
    forward = compile_forward(module, site_names, own=own)
    for name, child in gates.items():
        module.add_module(name, child)
    module.__dict__[_SITE_NAMES] = site_names
    module.__class__ = _rewritten_class(original, forward)


def restore_forward(module: nn.Module) -> None:
    """Undo `rewrite_forward`: class, forward and children are what they were."""
    for name in module.__dict__.pop(_SITE_NAMES):
        if name is not None:
            del module._modules[name]
    module.__class__ = type(module).original_class  # type: ignore[attr-defined]


def is_rewritten(module: nn.Module) -> bool:
    """Say whether `module` runs a rewritten forward."""
    return isinstance(module, _RewrittenForward)


class _RewrittenForward(nn.Module):
    """What a rewritten module is besides its own class. Graphs are not pickled: a copy is rewritten again."""

    original_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self.original_class,), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__class__ = _rewritten_class(self.original_class, compile_forward(self))  # type: ignore[assignment]


def _as_it_was(module: nn.Module) -> nn.Module:
    """Return a twin on the same tensors and children, of the original class and without the gates."""
    twin = shallow_twin(module)
    restore_forward(twin)
    return twin


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
    """Make `graph` call the named child for each batch_norm call in order, None to keep it; return the graph."""
    for node, name in zip(batch_norm_nodes(graph), site_names, strict=False):
        if name is None:
            continue
        call, arguments = NORM_CALLS[node.target], norm_arguments(node)
        with graph.inserting_before(node):
            new = graph.call_module(name, (arguments.pop("input"),), arguments)
            new.meta = dict(node.meta)
            if "cudnn_enabled" in call.parameters[: len(node.args)]:  # says nothing of the function, but is put back
                new.meta["cudnn_enabled"] = node.args[call.parameters.index("cudnn_enabled")]
            if call.results is not None:
                new = graph.call_function(as_results, all_results(call, new, arguments))
                new.meta["is_wrapped"] = True
        replace_node(graph, node, new)
    return graph


def replace_node(graph: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    """Put `new` in the place of `node`, with what is known of it."""
    new.meta = {**node.meta, **new.meta}
    node.replace_all_uses_with(new)
    graph.erase_node(node)
