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
from normswap.layers.in_place import shallow_copy
from normswap.model_state import call_model, preserved_state, registered_hooks, seeded, training_flags
from normswap.surgery.arguments import describe_inputs, describe_shapes
from normswap.surgery.graphs.exported_program import export_facts
from normswap.surgery.graphs.module_trace import mentions_norm_function
from normswap.surgery.graphs.tracing import (
    GraphFacts,
    Trace,
    compile_graph,
    outputs_match,
    read_graph,
    run_isolated,
    trace_model,
)
from normswap.surgery.model_outputs import flatten_leaves
from normswap.surgery.module_tree import ModuleEntry, modules_by_name, walk_modules
from normswap.surgery.norms.classes import KNOWN_NORMS, NormTable, is_norm_layer
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
    entry: ModuleEntry
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _ForwardRecorder(TorchFunctionMode):
    """Keeps the stack of running modules and takes notes; also sees calls of torch's functions."""

    def __init__(self, model: nn.Module, norms: NormTable) -> None:
        super().__init__()
        self.observation = Observation()
        self.stack: list[_Call] = []
        self._norms = norms
        # By the storage object, not its address: those of meta tensors and of empty ones are all 0.
        self._parameter_storages = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._producers: MutableMapping[Tensor, str] = WeakIdKeyDictionary()

    def make_pre_hook(self, entry: ModuleEntry) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.stack.append(_Call(entry, args, kwargs))
            name = entry.names[0]
            self.observation.runs[name] = self.observation.runs.get(name, 0) + 1
            x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
            if x is not None and is_norm_layer(entry.module, self._norms):
                self.observation.shapes.setdefault(name, []).append(tuple(x.shape))
                self._record_norm_call(name)
                if x in self._producers:
                    self.observation.producers.setdefault(name, self._producers[x])

        return hook

    def make_post_hook(self, entry: ModuleEntry) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            # A child that failed and was caught is still on top.
            while any(call.entry is entry for call in self.stack):
                self.stack.pop()
            if isinstance(output, Tensor):
                self._producers[output] = entry.names[0]

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = NORM_CALLS.get(func)
        if call and self.stack and not is_norm_layer(self.stack[-1].entry.module, self._norms):
            self._record_functional_call(call, dict(zip(call.parameters, args, strict=False)) | (kwargs or {}))
        output = func(*args, **(kwargs or {}))
        if type(output) is Tensor and output not in self._producers:
            self._producers[output] = getattr(func, "__name__", "").strip("_")
        return output

    def _record_functional_call(self, call: NormCall, arguments: dict[str, Any]) -> None:
        x, owner = arguments["input"], self.stack[-1]
        if x.untyped_storage()._cdata in self._parameter_storages:
            return
        name = owner.entry.names[0]
        shapes_by_owner = self.observation.functional if call.kind == "bn" else self.observation.instance
        shapes_by_owner.setdefault(name, []).append(tuple(x.shape))
        if call.kind == "in" and arguments.get("running_mean") is not None:
            self.observation.tracked.add(name)
        self._record_norm_call(name)
        self.observation.owner_inputs.setdefault(name, (owner.args, owner.kwargs))

    def _record_norm_call(self, name: str) -> None:
        self.observation.calls.append(name)
        self.observation.order.setdefault(name, len(self.observation.order))


def observe_forward(
    model: nn.Module, example_inputs: Any, entries: tuple[ModuleEntry, ...], *, norms: NormTable = KNOWN_NORMS
) -> Observation:
    """Run `model` once on `example_inputs` (tensor, tuple or dict) and return what was seen.

    Raises:
        ModelError: the forward pass failed.
    """
    recorder = _ForwardRecorder(model, norms)
    modules = [entry.module for entry in entries]
    with (
        training_flags(modules, training=False),
        preserved_state(modules),
        seeded(0),
        torch.no_grad(),
        registered_hooks(_hook_registrations(recorder, entries)),
        recorder,
    ):
        try:
            recorder.observation.outputs = flatten_leaves(call_model(model, example_inputs))
        except Exception as error:
            raise ModelError(_error_message(recorder, example_inputs, error)) from error
    return recorder.observation


def _hook_registrations(recorder: _ForwardRecorder, entries: tuple[ModuleEntry, ...]) -> Iterator[Callable[[], Any]]:
    for entry in entries:
        if not isinstance(entry.module, torch.jit.ScriptModule):  # those take no hooks
            yield _pre_hook(recorder, entry)
            yield _post_hook(recorder, entry)


def _pre_hook(recorder: _ForwardRecorder, entry: ModuleEntry) -> Callable[[], Any]:
    return lambda: entry.module.register_forward_pre_hook(recorder.make_pre_hook(entry), with_kwargs=True)


def _post_hook(recorder: _ForwardRecorder, entry: ModuleEntry) -> Callable[[], Any]:
    # Not always_call: after a failure the stack must still show where it happened.
    return lambda: entry.module.register_forward_hook(recorder.make_post_hook(entry))


def _error_message(recorder: _ForwardRecorder, inputs: Any, error: Exception) -> str:
    where = "the model"
    if recorder.stack:
        call = recorder.stack[-1]
        name = call.entry.names[0] or "the model"
        where = f"{name} ({type(call.entry.module).__name__}, fed {describe_shapes((call.args, call.kwargs))})"
    return f"the model fails on an input of {describe_inputs(inputs)}, in {where}: {first_line(error)}"


SYMBOLIC_TRACE, EXPORT, FORWARD_PASS, MODULE_TREE = "symbolic trace", "torch.export", "forward pass", "module tree"


@dataclass(frozen=True)
class ModelFacts:
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


def tracing_path(model: nn.Module, example_inputs: Any = None, *, norms: NormTable = KNOWN_NORMS) -> ModelFacts:
    """Return which path tells about `model`, why those before it do not, and what it tells. The model is left as it is.

    Raises:
        ModelError: the forward pass on `example_inputs` failed.
    """
    entries = walk_modules(model)
    observation = None if example_inputs is None else observe_forward(model, example_inputs, entries, norms=norms)
    return read_model_facts(
        model,
        example_inputs,
        entries,
        observation,
        norms,
        names_norm_functions=bool(modules_naming_norms(entries, norms)),
    )


def modules_naming_norms(entries: tuple[ModuleEntry, ...], norms: NormTable) -> tuple[ModuleEntry, ...]:
    """Return the modules, norm layers apart, whose own code names a function that normalizes."""
    return tuple(p for p in entries if not is_norm_layer(p.module, norms) and mentions_norm_function(p.module))


def read_model_facts(
    model: nn.Module,
    example_inputs: Any,
    entries: tuple[ModuleEntry, ...],
    observation: Observation | None,
    norms: NormTable,
    *,
    names_norm_functions: bool,
) -> ModelFacts:
    """Take the first path whose graph can be believed.

    Args:
        seen: the pass on `example_inputs`, None without one.
        asked: some code of the model names a function that normalizes.
    """
    first_names = {name: entry.names[0] for entry in entries for name in entry.names}
    by_name = modules_by_name(model)

    def is_norm_fqn(name: str) -> bool:
        return name in by_name and is_norm_layer(by_name[name], norms)

    names_norm_functions = names_norm_functions or (
        observation is not None and bool(observation.functional or observation.instance)
    )
    if observation is not None and not names_norm_functions:
        return ModelFacts(FORWARD_PASS)
    evaluation = trace_model(model, training=False, norms=norms)
    # The trace in training tells only of functions that normalize.
    training = trace_model(model, training=True, norms=norms) if names_norm_functions else Trace(None)
    facts = [read_graph(trace.graph, is_norm_fqn) for trace in (evaluation, training) if trace.graph is not None]
    trace_problem = evaluation.reason
    if evaluation.graph is not None and observation is not None:
        trace_problem = _call_mismatch(facts[0], observation, first_names, evaluation.entered)
        if (
            not trace_problem
            and _has_new_producers(facts[0], observation, first_names)
            and _outputs_differ(model, evaluation, example_inputs, observation)
        ):
            trace_problem = "its graph gives other outputs than the model"
    if trace_problem is None:
        owners = [owner for found in facts for owner in found.functional_owners]
        entered = evaluation.entered | training.entered if training.graph is not None else frozenset()
        return ModelFacts(SYMBOLIC_TRACE, (), facts[0], tuple(owners), entered)
    reasons = ((SYMBOLIC_TRACE, trace_problem),)
    if observation is None:
        return ModelFacts(MODULE_TREE, reasons, None, facts[0].functional_owners if facts else ())
    exported = export_facts(model, example_inputs, is_norm_fqn)
    export_problem = exported if isinstance(exported, str) else _call_mismatch(exported, observation, first_names)
    if isinstance(exported, GraphFacts) and export_problem is None:
        return ModelFacts(EXPORT, reasons, exported, exported.functional_owners)
    return ModelFacts(FORWARD_PASS, (*reasons, (EXPORT, str(export_problem))))


def _call_mismatch(
    facts: GraphFacts, observation: Observation, first_names: dict[str, str], entered: frozenset[str] | None = None
) -> str | None:
    """Say how the calls of a graph differ from those that were seen, None where they do not.

    Left out are the modules that the graph did not enter, and those that normalize kernels, which the pass cannot
    always tell from activations.
    """
    kernels = {first_names.get(name, name) for name in facts.kernel_owners}
    owners = {*observation.functional, *observation.instance}
    entered_names = owners if entered is None else {first_names.get(name, name) for name in entered}
    graph_names = [first_names.get(name, name) for name in facts.calls]
    graph_calls = [name for name in graph_names if name not in kernels]
    observed_calls = [
        name for name in observation.calls if name not in kernels and (name not in owners or name in entered_names)
    ]
    if graph_calls == observed_calls:
        return None
    if len(graph_calls) != len(observed_calls):
        return f"its graph normalizes {len(graph_calls)}x where the forward pass did {len(observed_calls)}x"
    traced_name, observed_name = next((a, b) for a, b in zip(graph_calls, observed_calls, strict=True) if a != b)
    return f"its graph normalizes in {traced_name or 'the model'} where the forward pass did in {observed_name or 'the model'}"


def _has_new_producers(facts: GraphFacts, observation: Observation, first_names: dict[str, str]) -> bool:
    """Say whether a graph tells a producer that the pass did not show: only then is it worth another pass."""
    return any(first_names.get(name, name) not in observation.producers for name in facts.producers)


def _outputs_differ(model: nn.Module, trace: Trace, example_inputs: Any, observation: Observation) -> bool:
    """Say whether a trace, run on the model's own modules and tensors, gives other outputs than were seen."""
    assert trace.graph is not None
    module_copy = shallow_copy(model)
    vars(module_copy).update(trace.constants)
    forward = partial(compile_graph(trace.graph, f"trace of {type(model).__qualname__}"), module_copy)
    return not outputs_match(
        observation.outputs, run_isolated(model, partial(call_model, forward, example_inputs), training=False)
    )
