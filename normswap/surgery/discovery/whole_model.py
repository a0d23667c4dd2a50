"""One forward pass, watched: which modules ran, on what shapes, in which order, and who normalized by a function.

Runs in evaluation without gradients, on the model as it is; flags, buffers, attributes, hooks and the random state
are put back. It knows what tracing cannot: real shapes, real calls, modules that are in no registry. The model's own
error is passed on with the module that raised it and the shapes that were fed.
"""

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from normswap.errors import ModelError
from normswap.layers.in_place import shallow_twin
from normswap.model_state import call_model, hooked, preserved_state, seeded, training_flags
from normswap.surgery.arguments import describe_inputs, describe_shapes
from normswap.surgery.graphs.exported_program import export_facts
from normswap.surgery.graphs.module_trace import could_normalize
from normswap.surgery.graphs.tracing import GraphFacts, Trace, agree, compile_graph, outcome, read_graph, trace_model
from normswap.surgery.model_outputs import leaf_list
from normswap.surgery.module_tree import Place, modules_by_name, walk_modules
from normswap.surgery.norms.classes import KNOWN_NORMS, Norms, is_norm_layer
from normswap.surgery.norms.functions import NORM_CALLS, NormCall
from normswap.text import first_line

# MERGED DOC: Which path tells about a whole model: symbolic tracing, else `torch.export`, else the forward pass alone.


Shape = tuple[int, ...]


@dataclass
class Observation:
    """What one forward pass showed, by first name of each module.

    `shapes` holds the input shapes of norm layers, call by call; `producers` the module or function that made it;
    `functional` the input shapes of batch_norm calls on activations by the module that made them, `instance` those of
    instance_norm and `tracked` who gave it running statistics; `runs` how often each module ran and `owner_inputs` what
    the first run with such a call was given; `calls` the norm layers and owners as they normalized, call by call, and
    `order` as they first did; `outputs` paths and leaves of what the model returned.
    """

    calls: list[str] = field(default_factory=list)
    order: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, list[Shape]] = field(default_factory=dict)
    producers: dict[str, str] = field(default_factory=dict)
    functional: dict[str, list[Shape]] = field(default_factory=dict)
    instance: dict[str, list[Shape]] = field(default_factory=dict)
    tracked: set[str] = field(default_factory=set)
    runs: dict[str, int] = field(default_factory=dict)
    owner_inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)


@dataclass
class _Call:
    place: Place
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Watcher(TorchFunctionMode):
    """Keeps the stack of running modules and takes notes; also sees calls of torch's functions."""

    def __init__(self, model: nn.Module, norms: Norms) -> None:
        super().__init__()
        self.notes = Observation()
        self.stack: list[_Call] = []
        self._norms = norms
        # By the storage object, not its address: those of meta tensors and of empty ones are all 0.
        self._kernels = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._makers: MutableMapping[Tensor, str] = WeakIdKeyDictionary()

    def enter(self, place: Place) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.stack.append(_Call(place, args, kwargs))
            name = place.names[0]
            self.notes.runs[name] = self.notes.runs.get(name, 0) + 1
            x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
            if x is not None and is_norm_layer(place.module, self._norms):
                self.notes.shapes.setdefault(name, []).append(tuple(x.shape))
                self._normalized(name)
                if x in self._makers:
                    self.notes.producers.setdefault(name, self._makers[x])

        return hook

    def leave(self, place: Place) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            # A child that failed and was caught is still on top.
            while any(call.place is place for call in self.stack):
                self.stack.pop()
            if isinstance(output, Tensor):
                self._makers[output] = place.names[0]

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = NORM_CALLS.get(func)
        if call and self.stack and not is_norm_layer(self.stack[-1].place.module, self._norms):
            self._functional_call(call, dict(zip(call.parameters, args, strict=False)) | (kwargs or {}))
        output = func(*args, **(kwargs or {}))
        if type(output) is Tensor and output not in self._makers:
            self._makers[output] = getattr(func, "__name__", "").strip("_")
        return output

    def _functional_call(self, call: NormCall, arguments: dict[str, Any]) -> None:
        x, owner = arguments["input"], self.stack[-1]
        if x.untyped_storage()._cdata in self._kernels:
            return
        name = owner.place.names[0]
        seen = self.notes.functional if call.kind == "bn" else self.notes.instance
        seen.setdefault(name, []).append(tuple(x.shape))
        if call.kind == "in" and arguments.get("running_mean") is not None:
            self.notes.tracked.add(name)
        self._normalized(name)
        self.notes.owner_inputs.setdefault(name, (owner.args, owner.kwargs))

    def _normalized(self, name: str) -> None:
        self.notes.calls.append(name)
        self.notes.order.setdefault(name, len(self.notes.order))


def observe_forward(
    model: nn.Module, example_inputs: Any, places: tuple[Place, ...], *, norms: Norms = KNOWN_NORMS
) -> Observation:
    """Run `model` once on `example_inputs` (tensor, tuple or dict) and return what was seen.

    Raises:
        ModelError: the forward pass failed.
    """
    watcher = _Watcher(model, norms)
    modules = [place.module for place in places]
    with (
        training_flags(modules, training=False),
        preserved_state(modules),
        seeded(0),
        torch.no_grad(),
        hooked(_registrations(watcher, places)),
        watcher,
    ):
        try:
            watcher.notes.outputs = leaf_list(call_model(model, example_inputs))
        except Exception as error:
            raise ModelError(_failure(watcher, example_inputs, error)) from error
    return watcher.notes


def _registrations(watcher: _Watcher, places: tuple[Place, ...]) -> Iterator[Callable[[], Any]]:
    for place in places:
        if not isinstance(place.module, torch.jit.ScriptModule):  # those take no hooks
            yield _pre_hook(watcher, place)
            yield _post_hook(watcher, place)


def _pre_hook(watcher: _Watcher, place: Place) -> Callable[[], Any]:
    return lambda: place.module.register_forward_pre_hook(watcher.enter(place), with_kwargs=True)


def _post_hook(watcher: _Watcher, place: Place) -> Callable[[], Any]:
    # Not always_call: after a failure the stack must still show where it happened.
    return lambda: place.module.register_forward_hook(watcher.leave(place))


def _failure(watcher: _Watcher, inputs: Any, error: Exception) -> str:
    where = "the model"
    if watcher.stack:
        call = watcher.stack[-1]
        name = call.place.names[0] or "the model"
        where = f"{name} ({type(call.place.module).__name__}, fed {describe_shapes((call.args, call.kwargs))})"
    return f"the model fails on an input of {describe_inputs(inputs)}, in {where}: {first_line(error)}"


SYMBOLIC_TRACE, EXPORT, FORWARD_PASS, MODULE_TREE = "symbolic trace", "torch.export", "forward pass", "module tree"


@dataclass(frozen=True)
class WholeModel:
    """What is known of a whole model besides its modules.

    Attributes:
        path: the first that served: `symbolic trace`, `torch.export`, `forward pass`, or `module tree` if none did.
        reasons: why those before it did not, by path; empty where they were not needed.
        facts: what its graph tells of evaluation, None where there is none to be believed.
        owners: the modules that call a function that normalizes, in either mode, by the names of the graphs.
        entered: the names of the modules that were traced through in both modes.
    """

    path: str
    reasons: tuple[tuple[str, str], ...] = ()
    facts: GraphFacts | None = None
    owners: tuple[str, ...] = ()
    entered: frozenset[str] = frozenset()

    @property
    def reason(self) -> str:
        """Why the paths before did not serve, in one line; empty where the first one did."""
        return "; ".join(f"{path}: {reason}" for path, reason in self.reasons)


def tracing_path(model: nn.Module, example_inputs: Any = None, *, norms: Norms = KNOWN_NORMS) -> WholeModel:
    """Return which path tells about `model`, why those before it do not, and what it tells. The model is left as it is.

    Raises:
        ModelError: the forward pass on `example_inputs` failed.
    """
    places = walk_modules(model)
    seen = None if example_inputs is None else observe_forward(model, example_inputs, places, norms=norms)
    return read_whole_model(model, example_inputs, places, seen, norms, asked=bool(suspects(places, norms)))


def suspects(places: tuple[Place, ...], norms: Norms) -> tuple[Place, ...]:
    """Return the modules, norm layers apart, whose own code names a function that normalizes."""
    return tuple(p for p in places if not is_norm_layer(p.module, norms) and could_normalize(p.module))


def read_whole_model(
    model: nn.Module,
    example_inputs: Any,
    places: tuple[Place, ...],
    seen: Observation | None,
    norms: Norms,
    *,
    asked: bool,
) -> WholeModel:
    """Take the first path whose graph can be believed.

    Args:
        seen: the pass on `example_inputs`, None without one.
        asked: some code of the model names a function that normalizes.
    """
    first_names = {name: place.names[0] for place in places for name in place.names}
    by_name = modules_by_name(model)

    def is_norm_fqn(name: str) -> bool:
        return name in by_name and is_norm_layer(by_name[name], norms)

    asked = asked or (seen is not None and bool(seen.functional or seen.instance))
    if seen is not None and not asked:
        return WholeModel(FORWARD_PASS)
    evaluation = trace_model(model, training=False, norms=norms)
    # The trace in training tells only of functions that normalize.
    training = trace_model(model, training=True, norms=norms) if asked else Trace(None)
    facts = [read_graph(trace.graph, is_norm_fqn) for trace in (evaluation, training) if trace.graph is not None]
    wrong = evaluation.reason
    if evaluation.graph is not None and seen is not None:
        wrong = _misses(facts[0], seen, first_names, evaluation.entered)
        if not wrong and _tells_more(facts[0], seen, first_names) and _differs(model, evaluation, example_inputs, seen):
            wrong = "its graph gives other outputs than the model"
    if wrong is None:
        owners = [owner for found in facts for owner in found.functional_owners]
        entered = evaluation.entered | training.entered if training.graph is not None else frozenset()
        return WholeModel(SYMBOLIC_TRACE, (), facts[0], tuple(owners), entered)
    reasons = ((SYMBOLIC_TRACE, wrong),)
    if seen is None:
        return WholeModel(MODULE_TREE, reasons, None, facts[0].functional_owners if facts else ())
    exported = export_facts(model, example_inputs, is_norm_fqn)
    untold = exported if isinstance(exported, str) else _misses(exported, seen, first_names)
    if isinstance(exported, GraphFacts) and untold is None:
        return WholeModel(EXPORT, reasons, exported, exported.functional_owners)
    return WholeModel(FORWARD_PASS, (*reasons, (EXPORT, str(untold))))


def _misses(
    facts: GraphFacts, seen: Observation, first_names: dict[str, str], entered: frozenset[str] | None = None
) -> str | None:
    """Say how the calls of a graph differ from those that were seen, None where they do not.

    Left out are the modules that the graph did not enter, and those that normalize kernels, which the pass cannot
    always tell from activations.
    """
    kernels = {first_names.get(name, name) for name in facts.kernel_owners}
    owners = {*seen.functional, *seen.instance}
    inside = owners if entered is None else {first_names.get(name, name) for name in entered}
    shown = [first_names.get(name, name) for name in facts.calls]
    told = [name for name in shown if name not in kernels]
    real = [name for name in seen.calls if name not in kernels and (name not in owners or name in inside)]
    if told == real:
        return None
    if len(told) != len(real):
        return f"its graph normalizes {len(told)}x where the forward pass did {len(real)}x"
    here, there = next((a, b) for a, b in zip(told, real, strict=True) if a != b)
    return f"its graph normalizes in {here or 'the model'} where the forward pass did in {there or 'the model'}"


def _tells_more(facts: GraphFacts, seen: Observation, first_names: dict[str, str]) -> bool:
    """Say whether a graph tells a producer that the pass did not show: only then is it worth another pass."""
    return any(first_names.get(name, name) not in seen.producers for name in facts.producers)


def _differs(model: nn.Module, trace: Trace, example_inputs: Any, seen: Observation) -> bool:
    """Say whether a trace, run on the model's own modules and tensors, gives other outputs than were seen."""
    assert trace.graph is not None
    twin = shallow_twin(model)
    vars(twin).update(trace.constants)
    forward = partial(compile_graph(trace.graph, f"trace of {type(model).__qualname__}"), twin)
    return not agree(seen.outputs, outcome(model, partial(call_model, forward, example_inputs), training=False))
