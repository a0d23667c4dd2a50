"""The own forward of one module: whether its code names a function that normalizes, and its trace in both modes.

Code is searched without running it, so that most modules need no trace. The search follows the methods of
the class, functions and objects in attributes of the instance, and the functions and classes that their code names. It
does not enter other modules, which are searched themselves, nor the code of torch. Names that are computed at run time
are missed; the forward pass and the trace find those calls. A trace has the children as leaves, so that its graph can
run in place of the forward.
"""

import dis
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakSet

import torch
from torch import fx, nn

from normswap.model_state import preserved_on_write
from normswap.surgery.graphs.tracing import Trace, copy_for_tracing, trace_copy
from normswap.surgery.norms.functions import NORM_CALLS, batch_norm_nodes, norm_nodes

# --- search in code ---------------------------------------------------------------------------------------------------


def names_in(code: CodeType) -> set[str]:
    """Return the names of globals and attributes that a code object uses, also in inner functions."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return {*code.co_names}.union(*inner)


def name_uses(code: CodeType) -> Iterator[tuple[str, bool]]:
    """Yield each use of a name in a code object, and whether it is an attribute of the first argument, `self.name`."""
    first = code.co_varnames[0] if code.co_argcount else None
    before: Any = None
    for instruction in dis.get_instructions(code):
        if instruction.argval in code.co_names:
            yield instruction.argval, before == first
        # From Python 3.13 on one instruction may load two variables.
        loaded = instruction.argval
        before = loaded[-1] if isinstance(loaded, tuple) and loaded else loaded
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from name_uses(constant)


def mentions_norm_function(module: nn.Module) -> bool:
    """Whether the code of `module`, without its children, names a function that normalizes."""
    if isinstance(module, fx.GraphModule):  # its code is generated, and its graph is read instead
        return True
    return any(_reaches_norm_function(obj, module) for obj in (type(module), *_instance_objects(module)))


def _instance_objects(module: nn.Module) -> Iterator[Any]:
    """The attributes of an instance, also inside containers, except modules, tensors and plain values."""
    for name, value in vars(module).items():
        if isinstance(value, dict | list | tuple | set):
            items = value.values() if isinstance(value, dict) else value
            yield from (item for item in items if name not in _REGISTRIES and not isinstance(item, _PLAIN_TYPES))
        elif not isinstance(value, _PLAIN_TYPES):
            yield value


_REGISTRIES = frozenset(vars(nn.Module()))
_PLAIN_TYPES = (type(None), bool, int, float, str, dict, list, tuple, set, torch.Tensor, nn.Module)
_EXTERNAL_PACKAGES = ("torch", "builtins", "numpy", "typing", "collections", "functools")
_MEMBERS = (FunctionType, staticmethod, classmethod, property)


@cache
def _norm_function_names() -> frozenset[str]:
    return frozenset(_name_of(function) for function in NORM_CALLS)


def _name_of(function: Any) -> str:
    if isinstance(function, torch._ops.OpOverload):
        return function._schema.name.partition("::")[2]
    return str(function.__name__)


# Functions and classes that lead to no function that normalizes: large libraries are searched once.
_WITHOUT_NORM_CALLS: WeakSet[Any] = WeakSet()


def _reaches_norm_function(start: Any, module: nn.Module) -> bool:
    """Whether `start` leads to code that names a function that normalizes."""
    pending, seen, has_namesake = [start], {}, False
    while pending:
        obj = pending.pop()
        key = obj if isinstance(obj, FunctionType | type) else type(obj)
        if id(obj) in seen or (not isinstance(obj, partial | MethodType) and key in _WITHOUT_NORM_CALLS):
            continue
        seen[id(obj)] = key
        if getattr(obj, "__name__", None) in _norm_function_names():
            return True
        for function in _functions_of(obj):
            names = names_in(function.__code__)
            if names & _norm_function_names():
                if not _are_submodules(names & _norm_function_names(), function, module):
                    return True
                has_namesake = True
            pending.extend(_objects_named_in(function, names))
    if not has_namesake:
        _WITHOUT_NORM_CALLS.update(key for key in seen.values() if key not in (partial, MethodType))
    return False


def _are_submodules(names: set[str], function: FunctionType, module: nn.Module) -> bool:
    """Whether all uses of these names are `self.name` of children of `module`."""
    uses = [(name, is_self_attribute) for name, is_self_attribute in name_uses(function.__code__) if name in names]
    return all(
        is_self_attribute and isinstance(getattr(module, name, None), nn.Module) for name, is_self_attribute in uses
    )


def _functions_of(obj: Any) -> Iterator[FunctionType]:
    """The Python functions of a function, method, partial, class or object."""
    if isinstance(obj, partial):
        yield from _functions_of(obj.func)
    elif isinstance(obj, MethodType):
        yield from _functions_of(obj.__func__)
    elif isinstance(obj, FunctionType):
        if not _is_external(obj):
            yield obj
            yield from _functions_of(getattr(obj, "__wrapped__", None))
    elif isinstance(obj, _MEMBERS):
        for name in ("__func__", "fget"):
            yield from _functions_of(getattr(obj, name, None))
    elif obj is not None:
        for cls in (obj if isinstance(obj, type) else type(obj)).__mro__:
            for name, member in vars(cls).items() if not _is_external(cls) else ():
                if isinstance(member, _MEMBERS) and name != "__init__":  # its results are attributes
                    yield from _functions_of(member)


def _objects_named_in(function: FunctionType, names: set[str]) -> Iterator[Any]:
    """The functions and classes that the code of a function names: globals, closure variables, module members."""
    closure_values = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    used_globals = [function.__globals__[name] for name in names if name in function.__globals__]
    for obj in (*used_globals, *closure_values, *(function.__defaults__ or ())):
        if isinstance(obj, ModuleType):
            members = (vars(obj).get(name) for name in names)
            yield from filter(_is_followed, members)
        elif _is_followed(obj):
            yield obj


def _is_followed(obj: Any) -> bool:
    if isinstance(obj, type):
        return not issubclass(obj, nn.Module)
    return isinstance(obj, FunctionType | MethodType | partial)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not assigned yet
        return False


def _is_external(obj: Any) -> bool:
    return (getattr(obj, "__module__", None) or "builtins").partition(".")[0] in _EXTERNAL_PACKAGES


# --- traces -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleTrace:
    """The forward of one module with its children as leaves, in both modes, or the reason why there is none.

    `options` are the optional arguments that decide what runs, with the defaults for which the graphs were made.
    """

    training: fx.Graph | None
    evaluation: fx.Graph | None
    reason: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def trace_module_forward(module: nn.Module) -> ModuleTrace:
    """Trace `module.forward` alone, in training and in evaluation mode; `module` is not changed."""
    if isinstance(module, fx.GraphModule):  # its graph is its code, in both modes
        return ModuleTrace(module.graph, module.graph)
    reason = _rewrite_problem(module)
    graphs: list[fx.Graph] = []
    options: dict[str, Any] = {}
    for training in () if reason else (True, False):
        trace, trace_options = _trace_with_defaults(module, training=training)
        options |= trace_options
        reason = trace.reason or trace.omission
        if trace.graph is None or reason:
            break
        reason = _constant_problem(module, trace.graph)
        if reason:
            break
        graphs.append(trace.graph)
    if reason:
        return ModuleTrace(None, None, reason)
    calls = [len(batch_norm_nodes(graph)) for graph in graphs]
    if calls[0] != calls[1]:
        return ModuleTrace(None, None, f"it makes {calls[0]} batch_norm calls in training and {calls[1]} in evaluation")
    return ModuleTrace(graphs[0], graphs[1], None, options)


class ModuleTraceCache:
    """Traces of modules that do not change in the meantime: each is traced once."""

    def __init__(self) -> None:
        self._cache: dict[
            int, tuple[nn.Module, ModuleTrace]
        ] = {}  # by id, which stays valid while the module is referenced

    def get(self, module: nn.Module) -> ModuleTrace:
        """Return the trace of `module`."""
        if id(module) not in self._cache:
            self._cache[id(module)] = module, trace_module_forward(module)
        return self._cache[id(module)][1]


def calls_norm_function(module: nn.Module, traces: ModuleTraceCache, *, was_run: bool) -> bool:
    """Whether the own forward of `module` calls a function that normalizes, by its trace, or else by its code.

    Args:
        was_run: `module` ran in the observed pass, which shows all calls except those that it makes in training only.
    """
    if type(module).__module__.startswith("torch.nn."):
        return False
    if was_run and not mentioned_norm_kinds(module):
        return False
    graph = traces.get(module).evaluation
    return any(norm_nodes(graph, kind) for kind in ("bn", "in")) if graph else bool(mentioned_norm_kinds(module))


def mentioned_norm_kinds(module: nn.Module) -> set[str]:
    """Return the kinds of the functions that normalize and are named in the forward of `module` or of a base class.

    A child with such a name, `self.batch_norm`, does not count.
    """
    found = [vars(cls).get("forward") for cls in type(module).__mro__]
    forwards = [inspect.unwrap(forward) for forward in found if isinstance(forward, FunctionType)]
    uses = (use for forward in forwards if isinstance(forward, FunctionType) for use in name_uses(forward.__code__))
    used_names = {
        name
        for name, is_self_attribute in uses
        if not (is_self_attribute and isinstance(getattr(module, name, None), nn.Module))
    }
    return {call.kind for function, call in NORM_CALLS.items() if function.__name__ in used_names}


def _trace_with_defaults(module: nn.Module, *, training: bool) -> tuple[Trace, dict[str, Any]]:
    """The trace with the options that decide what runs at their defaults, and these options."""
    symbolic_trace = _trace(module, training=training)
    defaults = _plain_defaults(module)
    if not defaults:
        return symbolic_trace, {}
    concrete_trace = _trace(module, training=training, concrete=defaults)
    if concrete_trace.graph is None or (
        symbolic_trace.graph is not None and _operations(symbolic_trace.graph) == _operations(concrete_trace.graph)
    ):
        return symbolic_trace, {}
    return concrete_trace, defaults


def _trace(module: nn.Module, *, training: bool, concrete: dict[str, Any] | None = None) -> Trace:
    with preserved_on_write(module.modules(), "everything"):
        return trace_copy(lambda: copy_for_tracing(module), lambda _: True, training=training, concrete=concrete)


def _rewrite_problem(module: nn.Module) -> str | None:
    """Why the forward of the class does not run, or has no Python code."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript, whose code is fixed: convert the Python model, then trace or export it"
    if "forward" in vars(module):
        return "its forward is overridden on the instance: remove that first"
    return None


def _constant_problem(module: nn.Module, graph: fx.Graph) -> str | None:
    """A tensor that the forward creates from constants exists only in the copy that was traced."""
    targets = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    if all(_has_attribute(module, target) for target in targets):
        return None
    return "it creates a tensor from constants in every call: register it as a buffer"


def _has_attribute(module: nn.Module, path: str) -> bool:
    found: Any = module
    for name in path.split("."):
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def control_flow_options(module: nn.Module) -> dict[str, Any]:
    """Return the optional arguments of the forward with their defaults if they decide what runs, else none."""
    return _trace_with_defaults(module, training=False)[1]


def _plain_defaults(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(type(module).forward).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, _PLAIN_DEFAULTS)}


_PLAIN_DEFAULTS = (type(None), bool, int, float, str)


def _operations(graph: fx.Graph) -> list[Any]:
    """The operations of a graph, without the assertions that concrete arguments add."""
    assertion_nodes = {node for node in graph.nodes if getattr(node.target, "__name__", "") == "_assert"}
    for node in graph.nodes:
        if node.users and assertion_nodes.issuperset(node.users):
            assertion_nodes.add(node)
    return [node.target for node in graph.nodes if node.op != "placeholder" and node not in assertion_nodes]
