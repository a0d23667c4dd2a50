"""Facts on a whole model: one observed forward pass, and a graph that agrees with it.

The observed pass runs in evaluation mode without gradients and restores flags, buffers, attributes, hooks and the
random state. It shows real shapes, real calls and modules that are in no registry. A graph shows which function made
an input, and which modules call functions that normalize: by symbolic tracing, else by `torch.export`. Without a graph
that agrees with the pass, the pass alone counts, and without example inputs the module tree.
"""

import logging
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from normswap.errors import ModelError
from normswap.layers.in_place import shallow_copy
from normswap.layers.switch_norm import SwitchNormAct
from normswap.model_state import call_model, preserved_on_write, registered_hooks, seeded, training_flags
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
from normswap.surgery.model_outputs import Leaves, flatten_leaves, read_leaves
from normswap.surgery.module_tree import ModuleEntry, modules_by_name, walk_modules
from normswap.surgery.norms.classes import KNOWN_NORMS, NormSpec, NormTable, is_norm_layer
from normswap.surgery.norms.functions import NORM_CALLS, NormCall
from normswap.text import first_line

_logger = logging.getLogger(__name__)

Shape = tuple[int, ...]


@dataclass
class Observation:
    """One observed forward pass; modules are named by their first name.

    Attributes:
        calls: the norm layers, and the owners of calls of functions that normalize, call by call.
        order: the same without repetition, each with its position.
        shapes: the input shapes of each norm layer, call by call.
        producers: the module or function whose output is the input of a norm layer.
        functional, instance: the input shapes of batch_norm and instance_norm calls on activations, by owner.
        tracked: the owners of instance_norm calls with running statistics.
        runs: how often each module ran.
        owner_inputs: the arguments of the first run of an owner.
        outputs: the leaves of the output of the model, by path.
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
    outputs: Leaves = field(default_factory=Leaves)

    def functional_calls(self, kind: str) -> dict[str, list[Shape]]:
        """Return the input shapes of the calls of functions of `kind` (`bn` or `in`), by owner."""
        return self.functional if kind == "bn" else self.instance


@dataclass
class _Call:
    entry: ModuleEntry
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _ForwardRecorder(TorchFunctionMode):
    """Records the pass: hooks keep the stack of running modules, and the mode sees calls of torch functions."""

    def __init__(self, model: nn.Module, norms: NormTable) -> None:
        super().__init__()
        self.observation = Observation()
        self.stack: list[_Call] = []
        self._norms = norms
        # By the storage object, not its address, which is 0 for all meta tensors and empty tensors.
        self._parameter_storages = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._producers: MutableMapping[Tensor, str] = WeakIdKeyDictionary()

    def make_pre_hook(self, entry: ModuleEntry) -> Callable[..., None]:
        """Return the hook that records the start of a module and the input of a norm layer."""

        def _hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.stack.append(_Call(entry, args, kwargs))
            name = entry.names[0]
            self.observation.runs[name] = self.observation.runs.get(name, 0) + 1
            x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
            if x is not None and is_norm_layer(entry.module, self._norms):
                self.observation.shapes.setdefault(name, []).append(tuple(x.shape))
                self._record_norm_call(name)
                if x in self._producers:
                    self.observation.producers.setdefault(name, self._producers[x])

        return _hook

    def make_post_hook(self, entry: ModuleEntry) -> Callable[..., None]:
        """Return the hook that records the end of a module and its output."""

        def _hook(_module: nn.Module, _args: Any, output: Any) -> None:
            # A child whose error the model caught is still on top.
            while any(call.entry is entry for call in self.stack):
                self.stack.pop()
            if isinstance(output, Tensor):
                self._producers[output] = entry.names[0]

        return _hook

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
        self.observation.functional_calls(call.kind).setdefault(name, []).append(tuple(x.shape))
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
    """Run `model` once on `example_inputs` (tensor, tuple or dict) and return what happened.

    Raises:
        ModelError: a module is lazy, or the forward pass failed; the message names the module and its input shapes.
    """
    _check_no_lazy_modules(entries)
    recorder = _ForwardRecorder(model, norms)
    modules = [entry.module for entry in entries]
    with (
        training_flags(modules, training=False),
        preserved_on_write(modules, "weights"),
        seeded(0),
        torch.no_grad(),
        registered_hooks(_hook_registrations(recorder, entries)),
        recorder,
    ):
        try:
            recorder.observation.outputs = read_leaves(call_model(model, example_inputs))
        except Exception as error:
            raise ModelError(_error_message(recorder, example_inputs, error)) from error
    return recorder.observation


def _check_no_lazy_modules(entries: tuple[ModuleEntry, ...]) -> None:
    """Refuse lazy modules: their first forward pass fixes their sizes, and it must not be the observed one."""
    for entry in entries:
        tensors = (*entry.module._parameters.values(), *entry.module._buffers.values())
        if any(tensor is not None and is_lazy(tensor) for tensor in tensors):
            name = entry.names[0] or "the model"
            raise ModelError(f"{name} ({type(entry.module).__name__}) is lazy and has no sizes yet: run it once first")


def _hook_registrations(recorder: _ForwardRecorder, entries: tuple[ModuleEntry, ...]) -> Iterator[Callable[[], Any]]:
    for entry in entries:
        if not isinstance(entry.module, torch.jit.ScriptModule):  # does not support these hooks
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
        shapes = describe_shapes((call.args, call.kwargs))
        where = f"{name} ({type(call.entry.module).__name__}, with an input of {shapes})"
    return f"the model fails on an input of {describe_inputs(inputs)}, in {where}: {first_line(error)}"


def shape_problem(spec: NormSpec, shapes: Sequence[tuple[int, ...]]) -> str | None:
    """Return why a norm with inputs of these shapes cannot become its target, or None."""
    ranks = spec.target._ranks if spec.target is not None else ()
    # Two dimensions are (N, C) for a SwitchNorm1d, and (C, L) without a batch for an InstanceNorm1d.
    wrong = next((s for s in shapes if (ranks and len(s) not in ranks) or (spec.kind == "in" and len(s) < 3)), None)
    if wrong is None:
        return None
    shape = "x".join(map(str, wrong))
    if ranks and len(wrong) > ranks[0]:
        any_rank = "SwitchNormAct" if issubclass(spec.target, SwitchNormAct) else "SwitchNorm"  # type: ignore[arg-type]
        accepted = " or ".join(f"{rank}-D" for rank in ranks)
        return (
            f"has an input of {shape}, and the target of its reader in norms= takes {accepted} input: register it with "
            f"target={any_rank}, which takes any rank"
        )
    return f"has an input of {shape}, and Switchable Normalization takes (N, C, *spatial): add the batch dimension"


def execution_order(
    entry: ModuleEntry, facts: GraphFacts | None, observation: Observation | None
) -> tuple[int | None, str]:
    """Return the place of a site in the order of execution, and its source; a forward pass wins over a graph."""
    if observation is not None and entry.names[0] in observation.order:
        return observation.order[entry.names[0]], "forward pass"
    traced_order = (
        [facts.order.index(name) for name in entry.names if name in facts.order] if facts and not observation else []
    )
    return (traced_order[0], "symbolic trace") if traced_order else (None, "module tree")


SYMBOLIC_TRACE, EXPORT, FORWARD_PASS, MODULE_TREE = "symbolic trace", "torch.export", "forward pass", "module tree"


@dataclass(frozen=True)
class ModelFacts:
    """What a graph of a whole model shows.

    Attributes:
        path: the first source that could be used: `symbolic trace`, `torch.export`, `forward pass` or `module tree`.
        reasons: why the sources before it could not be used, by path; empty if none was needed.
        facts: what the graph in evaluation mode shows, None without a graph.
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
        """Why the sources before could not be used, in one line; empty if the first one could."""
        return "; ".join(f"{path}: {reason}" for path, reason in self.reasons)


def tracing_path(model: nn.Module, example_inputs: Any = None, *, norms: NormTable = KNOWN_NORMS) -> ModelFacts:
    """Return the facts on `model`, their source, and why better sources could not be used; `model` is not changed.

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
    """Return the modules, except norm layers, whose own code names a function that normalizes."""
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
    """Return the facts from the first source whose graph agrees with the observed pass.

    Args:
        observation: the pass on `example_inputs`, None without one.
        names_norm_functions: the code of some module names a function that normalizes.
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
    # The trace in training is needed only to find calls of functions that normalize.
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
            trace_problem = "the outputs of its graph differ from those of the model"
    if trace_problem is None:
        owners = [owner for found in facts for owner in found.functional_owners]
        entered = evaluation.entered | training.entered if training.graph is not None else frozenset()
        return ModelFacts(SYMBOLIC_TRACE, (), facts[0], tuple(owners), entered)
    _logger.debug("no symbolic trace of %s: %s", type(model).__name__, trace_problem)
    reasons = ((SYMBOLIC_TRACE, trace_problem),)
    if observation is None:
        return ModelFacts(MODULE_TREE, reasons, None, facts[0].functional_owners if facts else ())
    exported = export_facts(model, example_inputs, is_norm_fqn)
    export_problem = exported if isinstance(exported, str) else _call_mismatch(exported, observation, first_names)
    if isinstance(exported, GraphFacts) and export_problem is None:
        return ModelFacts(EXPORT, reasons, exported, exported.functional_owners)
    _logger.debug("no export of %s: %s", type(model).__name__, export_problem)
    return ModelFacts(FORWARD_PASS, (*reasons, (EXPORT, str(export_problem))))


def _call_mismatch(
    facts: GraphFacts, observation: Observation, first_names: dict[str, str], entered: frozenset[str] | None = None
) -> str | None:
    """Return how the calls of a graph differ from the observed ones, or None.

    Modules that the graph did not enter are left out, and modules that normalize kernels, which the pass cannot always
    distinguish from activations.
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
        return f"its graph has {len(graph_calls)} calls that normalize, the forward pass {len(observed_calls)}"
    traced_name, observed_name = next((a, b) for a, b in zip(graph_calls, observed_calls, strict=True) if a != b)
    traced_name, observed_name = traced_name or "the model", observed_name or "the model"
    return f"its graph normalizes in {traced_name}, the forward pass at that point in {observed_name}"


def _has_new_producers(facts: GraphFacts, observation: Observation, first_names: dict[str, str]) -> bool:
    """Whether a graph names a producer that the pass did not show: only then is a comparison worth another pass."""
    return any(first_names.get(name, name) not in observation.producers for name in facts.producers)


def _outputs_differ(model: nn.Module, trace: Trace, example_inputs: Any, observation: Observation) -> bool:
    """Whether a trace, run on the model's own modules and tensors, gives other outputs than the observed pass."""
    assert trace.graph is not None
    module_copy = shallow_copy(model)
    vars(module_copy).update(trace.constants)
    forward = partial(compile_graph(trace.graph, f"trace of {type(model).__qualname__}"), module_copy)
    return not outputs_match(
        flatten_leaves(observation.outputs),
        run_isolated(model, partial(call_model, forward, example_inputs), training=False),
    )
