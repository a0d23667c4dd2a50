"""Which path tells about a whole model: symbolic tracing, else `torch.export`, else the forward pass alone.

Norm modules are all seen by the forward pass, and so are the functions that normalize in evaluation. So a graph is
asked only where there is no pass, or where some code names such a function. It is checked before it is believed: with
an example input, it must show the calls that were seen, and where it would tell something that the pass did not show,
give the model's own outputs too. One that is wrong is dropped with the reason, and the next path is taken.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from normswap.layers.adoption import shallow_twin
from normswap.modes import call_model
from normswap.surgery.code_reading import could_normalize
from normswap.surgery.exporting import export_facts
from normswap.surgery.norms import KNOWN_NORMS, Norms, is_norm_layer
from normswap.surgery.observation import Observation, observe_forward
from normswap.surgery.tracing import GraphFacts, Trace, compile_graph, read_graph, trace_model
from normswap.surgery.tree import Place, modules_by_name, walk_modules
from normswap.surgery.trial import agree, outcome

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
