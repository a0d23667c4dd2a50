"""What the code of a module could call, read without running it: a cheap "no" before anything is traced.

Followed are the methods of its class, the functions and objects that its instance holds, and from each the functions
and classes that the code names; of modules only their names, since each module of a model is asked itself. Code of
torch is taken by its name only. What is reached through computed names or containers is not seen; a forward pass and
a trace still are there for that.
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
from normswap.surgery.norms.functions import NORM_CALLS, batch_norm_nodes

# MERGED DOC: The own forward of one module as a pair of graphs, fit to run in its place - or the reason why none is.


def names_in(code: CodeType) -> set[str]:
    """Return the names of globals and attributes that a piece of code uses, in inner functions too."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return {*code.co_names}.union(*inner)


def name_uses(code: CodeType) -> Iterator[tuple[str, bool]]:
    """Yield each use of a name in a piece of code, and whether as an attribute of the first argument, `self.name`."""
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
    """Say whether code of `module`, its children's apart, names a function that normalizes."""
    if isinstance(module, fx.GraphModule):  # the graph tells, and its code is made of it
        return True
    return any(_reaches_norm_function(obj, module) for obj in (type(module), *_instance_objects(module)))


def _instance_objects(module: nn.Module) -> Iterator[Any]:
    """What the instance holds besides modules, tensors and plain values, also in its own containers."""
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


# Functions and classes from which none is reached: large libraries are followed once, not once a module.
_WITHOUT_NORM_CALLS: WeakSet[Any] = WeakSet()


def _reaches_norm_function(start: Any, module: nn.Module) -> bool:
    """Follow everything that `start` leads to until a function that normalizes is named."""
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
    """Whether the code means children of `module` that are called like functions that normalize."""
    uses = [(name, is_self_attribute) for name, is_self_attribute in name_uses(function.__code__) if name in names]
    return all(
        is_self_attribute and isinstance(getattr(module, name, None), nn.Module) for name, is_self_attribute in uses
    )


def _functions_of(obj: Any) -> Iterator[FunctionType]:
    """The functions that a function, method, partial, class or object brings along, as far as they are Python's."""
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
                if isinstance(member, _MEMBERS) and name != "__init__":  # what that makes, the instance holds
                    yield from _functions_of(member)


def _objects_named_in(function: FunctionType, names: set[str]) -> Iterator[Any]:
    """The functions and classes that the code of a function names: globals, what it encloses, members of modules."""
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
    except ValueError:  # named, but not assigned yet
        return False


def _is_external(obj: Any) -> bool:
    return (getattr(obj, "__module__", None) or "builtins").partition(".")[0] in _EXTERNAL_PACKAGES


@dataclass(frozen=True)
class ModuleTrace:
    """The forward of one module with its children as leaves, in both modes, or the reason why there is none.

    `options` are the optional arguments that decide what it does, with the defaults that the graphs are made for.
    """

    training: fx.Graph | None
    evaluation: fx.Graph | None
    reason: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def trace_module_forward(module: nn.Module) -> ModuleTrace:
    """Trace `module.forward` alone, once in training and once in evaluation. The module is left as it is."""
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
        return ModuleTrace(None, None, f"it calls batch_norm {calls[0]}x in training and {calls[1]}x in evaluation")
    return ModuleTrace(graphs[0], graphs[1], None, options)


class ModuleTraceCache:
    """The own forwards of modules that stay as they are meanwhile: each is traced once, for all who ask."""

    def __init__(self) -> None:
        self._cache: dict[int, tuple[nn.Module, ModuleTrace]] = {}  # by identity, which holding the module keeps

    def get(self, module: nn.Module) -> ModuleTrace:
        if id(module) not in self._cache:
            self._cache[id(module)] = module, trace_module_forward(module)
        return self._cache[id(module)][1]


def mentioned_norm_kinds(module: nn.Module) -> set[str]:
    """Return the kinds of the functions that normalize which the code of `module.forward`, here or in a base, names.

    A child that is called like one of them, `self.batch_norm`, is not meant.
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
    """The trace for the defaults of whatever options decide what the forward does, and these options."""
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
    """Why the forward of the class is not what runs, or is no code to be rewritten."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript, whose code is fixed: convert the Python model, then trace or export it"
    if "forward" in vars(module):
        return "its forward is overridden on the instance: remove that first"
    return None


def _constant_problem(module: nn.Module, graph: fx.Graph) -> str | None:
    """A tensor that the forward makes out of nothing exists on the traced twin only."""
    targets = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    if all(_has_attribute(module, target) for target in targets):
        return None
    return "it makes a tensor of constants at every call: register it as a buffer"


def _has_attribute(module: nn.Module, path: str) -> bool:
    found: Any = module
    for name in path.split("."):
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def control_flow_options(module: nn.Module) -> dict[str, Any]:
    """Return the optional arguments of the forward with their defaults if they decide what it does, else none."""
    return _trace_with_defaults(module, training=False)[1]


def _plain_defaults(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(type(module).forward).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, _PLAIN_DEFAULTS)}


_PLAIN_DEFAULTS = (type(None), bool, int, float, str)


def _operations(graph: fx.Graph) -> list[Any]:
    """What a graph runs, without the assertions that concrete arguments bring."""
    assertion_nodes = {node for node in graph.nodes if getattr(node.target, "__name__", "") == "_assert"}
    for node in graph.nodes:
        if node.users and assertion_nodes.issuperset(node.users):
            assertion_nodes.add(node)
    return [node.target for node in graph.nodes if node.op != "placeholder" and node not in assertion_nodes]
