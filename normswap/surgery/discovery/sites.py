"""Norm sites: every place where a model normalizes, as facts; what happens to them is decided in `planning`.

A site is a module, or a call of a function such as `F.batch_norm` in the forward of its owner. The facts come from the
module tree, from a graph of the model and, with example inputs, from one observed forward pass. A batch_norm call can
be swapped if the forward of its owner can be rewritten. Instance_norm calls, and batch_norm calls on samples folded
into the channels, have no batch statistics: they are listed with that reason.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress, cycle
from math import prod
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from normswap.surgery.arguments import check_norm_table
from normswap.surgery.discovery.whole_model import (
    ModelFacts,
    Observation,
    Shape,
    execution_order,
    modules_naming_norms,
    observe_forward,
    read_model_facts,
    shape_problem,
)
from normswap.surgery.graphs.module_trace import (
    ModuleTrace,
    ModuleTraceCache,
    calls_norm_function,
    mentioned_norm_kinds,
)
from normswap.surgery.graphs.rewriting import compile_rewritten_forward, is_rewritten, unused_names
from normswap.surgery.graphs.tracing import GraphFacts, outputs_match, run_isolated
from normswap.surgery.module_tree import (
    ModelTrainingFlags,
    ModuleEntry,
    class_name,
    model_training_flags,
    never_updated,
    walk_modules,
)
from normswap.surgery.norms.classes import KNOWN_NORMS, NO_BATCH_STATISTICS, NormSpec, NormTable, read_norm
from normswap.surgery.norms.functions import (
    call_name,
    call_tensors,
    is_batch_norm_call,
    is_folded,
    norm_arguments,
    norm_call,
    norm_nodes,
    reads_activation,
    unsupported_use,
)
from normswap.surgery.wrappers import check_not_prepared, unwrap
from normswap.text import join_fqn


@dataclass(frozen=True)
class NormSite:
    """One place where a model normalizes: a module, or a call of a function such as `F.batch_norm` and its owner.

    Attributes:
        fqn, aliases: the first name and the others; for a functional site, the names that its new layer will have.
        kind, class_name, num_features, eps, momentum: the kind, the class or function, and its values; None or 0 if
            they are unknown. `num_features` is the number of channels.
        frozen: it normalizes with running statistics also in training.
        kept_in_evaluation: the model's own `train()` leaves it in evaluation mode.
        trainable: one of its own parameters requires a gradient, or it has none.
        registered: its tensors are in the model's state dict; false if only a Python container refers to the module.
        synchronize: it uses the joint batch of all processes in training (SyncBatchNorm).
        has_running_stats: it is a batch norm that uses running statistics in evaluation.
        untrained: its running statistics were never updated: mean 0, variance 1, and no batch was counted.
        num_groups: the number of groups of a GroupNorm.
        owner: the fqn of the module whose forward makes the call; None for a module site.
        shapes: distinct input shapes (N, C, *spatial) in the observed pass, None without one.
        calls: the number of calls per forward pass in evaluation mode, None if not observed.
        order: its place in the order of execution, None if it was not seen to run.
        producer: the module or function whose output is its input, if known.
        seen_by: the source of `order`: "forward pass", "symbolic trace", or "module tree" if it was not seen to run.
        problem: why it cannot be swapped, or None.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> (site,) = normswap.find_norm_sites(model, torch.randn(2, 3, 16, 16))
        >>> site.num_features, site.positions
        (8, 196)
    """

    fqn: str
    aliases: tuple[str, ...]
    kind: str
    class_name: str
    num_features: int = 0
    eps: float | None = None
    momentum: float | None = None
    frozen: bool = False
    kept_in_evaluation: bool = False
    trainable: bool = True
    registered: bool = True
    synchronize: bool = False
    has_running_stats: bool = False
    untrained: bool = False
    num_groups: int = 1
    owner: str | None = None
    shapes: tuple[Shape, ...] | None = None
    calls: int | None = None
    order: int | None = None
    producer: str | None = None
    seen_by: str = "module tree"
    problem: str | None = None

    __module__ = "normswap"

    @property
    def positions(self) -> int | None:
        """The smallest number of spatial positions per sample in `shapes`, None if no input was observed."""
        return min((prod(shape[2:]) for shape in self.shapes), default=None) if self.shapes else None


# --- functional sites -------------------------------------------------------------------------------------------------

_FUNCTIONS = {"bn": "torch.nn.functional.batch_norm", "in": "torch.nn.functional.instance_norm"}
_CHILD_NAMES = {"bn": "batch_norm", "in": "instance_norm"}
_CALL_PROBLEM = f"{NO_BATCH_STATISTICS}; to swap it, use nn.InstanceNorm2d instead of the call, and kinds=('bn', 'in')"
_TRACKED = (
    "instance_norm with running statistics uses those of each sample in training and the running ones in evaluation, "
    "which no mix of branches computes: left as it is"
)
_FOLDED = f"the samples are folded into the channels, so each is normalized by itself: {_CALL_PROBLEM}"


def functional_sites(
    entry: ModuleEntry, facts: GraphFacts | None, observation: Observation | None, traces: ModuleTraceCache
) -> list[NormSite]:
    """One site per call in the owner's own forward, or one per kind with a problem if that cannot be traced."""
    own = traces.get(entry.module)
    if own.evaluation:
        kinds = {kind for kind in _CHILD_NAMES if norm_nodes(own.evaluation, kind)}
        # Other observed calls normalize a kernel that was computed into a new tensor, or are not in the graph.
        kernels = any(map(is_batch_norm_call, own.evaluation.nodes))
        kinds |= set() if kernels else _observed_kinds(entry, observation)
    else:
        kinds = _observed_kinds(entry, observation) or mentioned_norm_kinds(entry.module)
    return [
        site
        for kind in _CHILD_NAMES
        if kind in kinds
        for site in _functional_sites_of_kind(kind, entry, own, facts, observation)
    ]


def _observed_kinds(entry: ModuleEntry, observation: Observation | None) -> set[str]:
    return {kind for kind in _CHILD_NAMES if observation and entry.names[0] in observation.functional_calls(kind)}


def _functional_sites_of_kind(
    kind: str, entry: ModuleEntry, own: ModuleTrace, facts: GraphFacts | None, observation: Observation | None
) -> list[NormSite]:
    owner, module = entry.names[0], entry.module
    nodes = norm_nodes(own.evaluation, kind) if own.evaluation else []
    observed_shapes = _observed_shapes(kind, owner, own, observation) if observation else []
    order, seen_by = execution_order(entry, facts, observation)
    owner_problem = _problem_of_owner(entry, own, len(nodes), observed_shapes, observation) if kind == "bn" else None
    sites = []
    for index, name in enumerate(unused_names(module, max(1, len(nodes)), _CHILD_NAMES[kind])):
        node = nodes[index] if nodes else None
        shapes = observed_shapes[index :: len(nodes)] if nodes else observed_shapes
        actual_kind, call_problem = _kind_and_problem(kind, node, owner, shapes, observation)
        statistics = call_tensors(module, node, ("running_mean", "running_var"))
        sites.append(
            NormSite(
                fqn=join_fqn(owner, name),
                aliases=tuple(join_fqn(alias, name) for alias in entry.names[1:]),
                kind=actual_kind,
                class_name=_FUNCTIONS[kind] if node is None else call_name(node.target),
                num_features=_channels(module, node, shapes),
                frozen=kind == "bn" and _is_frozen(own, index),
                trainable=_affine_trainable(module, node),
                registered=entry.registered,
                has_running_stats=actual_kind == "bn" and len(statistics) == 2 and not _uses_batch_in_evaluation(node),
                untrained=actual_kind == "bn" and never_updated(*statistics),
                owner=owner,
                shapes=tuple(dict.fromkeys(shapes)) if observation else None,
                calls=len(shapes) if observation else None,
                order=order,
                seen_by=seen_by,
                problem=call_problem or owner_problem,
            )
        )
    return sites


def _observed_shapes(kind: str, owner: str, own: ModuleTrace, observation: Observation) -> list[Shape]:
    """The observed shapes, without those of kernels that were computed into new tensors."""
    shapes = observation.functional_calls(kind).get(owner, [])
    graph = own.evaluation.nodes if own.evaluation else ()
    calls = [node for node in graph if (call := norm_call(node)) and call.kind == kind]
    if len(shapes) != max(1, observation.runs.get(owner, 0)) * len(calls):
        return shapes
    on_activations = [reads_activation(norm_arguments(node)["input"]) for node in calls]
    return list(compress(shapes, cycle(on_activations)))


def _problem_of_owner(
    entry: ModuleEntry, own: ModuleTrace, calls: int, observed_shapes: list[Shape], observation: Observation | None
) -> str | None:
    """Why no batch_norm call in the owner's forward can be rewritten."""
    owner, module = entry.names[0], entry.module
    if own.reason:
        return (
            f"the forward of {type(module).__name__} cannot be rewritten ({own.reason}): move its F.batch_norm call "
            "into a small module, or use nn.BatchNorm"
        )
    if observation and len(observed_shapes) not in (0, max(1, observation.runs.get(owner, 0)) * calls):
        return "not every F.batch_norm call runs in every pass: move the call into a small module"
    if observation and owner in observation.owner_inputs and not isinstance(module, fx.GraphModule):
        return _differs_from_eager(module, own, *observation.owner_inputs[owner])
    return None


def _kind_and_problem(
    kind: str, node: fx.Node | None, owner: str, shapes: list[Shape], observation: Observation | None
) -> tuple[str, str | None]:
    """The kind of a call, and the reason against a swap that holds for any forward of its owner, or None."""
    if kind == "in":
        observed = observation is not None and owner in observation.tracked
        tracked = norm_arguments(node).get("running_mean") is not None if node else observed
        return "in", _TRACKED if tracked else _CALL_PROBLEM
    if (node and is_folded(node)) or _input_is_folded(owner, shapes, observation):
        return "in", _FOLDED
    use = unsupported_use(node) if node else None
    return "bn", use and f"{use}: export the program again, and convert it without run_decompositions()"


def _input_is_folded(owner: str, shapes: list[Shape], observation: Observation | None) -> bool:
    """Whether every input of a call was one sample (1, N * C, ...), with N and C those of an input of its owner."""
    given = tree_leaves(observation.owner_inputs.get(owner)) if observation else []
    samples = {tuple(leaf.shape[:2]) for leaf in given if isinstance(leaf, Tensor) and leaf.dim() > 2}
    return bool(shapes) and all(
        shape[0] == 1 and any(n > 1 and n * channels == shape[1] for n, channels in samples) for shape in shapes
    )


def _is_frozen(own: ModuleTrace, index: int) -> bool:
    """Whether a call uses running statistics in both modes, as in a program exported in evaluation mode."""
    if own.training is None or own.evaluation is None:
        return False
    calls = (norm_nodes(graph, "bn")[index] for graph in (own.training, own.evaluation))
    return all(norm_arguments(node).get("training", False) is False for node in calls)


def _uses_batch_in_evaluation(node: fx.Node | None) -> bool:
    """Whether a call uses the batch in evaluation too, or as an argument decides, as in some few-shot learners."""
    return node is not None and norm_arguments(node).get("training", False) is not False


def _differs_from_eager(
    module: nn.Module, own: ModuleTrace, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Compare a trace, which can succeed and be wrong, with the module itself, in both modes, on observed inputs."""

    def run(forward: Callable[..., Any]) -> Any:
        return forward(module, *copy.deepcopy(args), **copy.deepcopy(kwargs))

    traces = type(module).forward, compile_rewritten_forward(module, own=own)
    for training in (True, False):
        real, traced = (run_isolated(module, partial(run, forward), training=training) for forward in traces)
        if not outputs_match(real, traced):
            return "its traced forward differs from the real one: move its F.batch_norm call into a small module"
    return None


def _channels(module: nn.Module, node: fx.Node | None, shapes: list[Shape]) -> int:
    if shapes:
        return shapes[0][1]
    tensors = call_tensors(module, node, ("running_mean", "weight"))
    return tensors[0].shape[0] if tensors else 0


def _affine_trainable(module: nn.Module, node: fx.Node | None) -> bool:
    own = [each for each in call_tensors(module, node, ("weight", "bias")) if isinstance(each, nn.Parameter)]
    return not own or any(tensor.requires_grad for tensor in own)


# --- all sites of a model ---------------------------------------------------------------------------------------------


def find_norm_sites(
    model: nn.Module, example_inputs: Any = None, *, norms: NormTable = KNOWN_NORMS
) -> tuple[NormSite, ...]:
    """Find every place where `model` normalizes, in order of execution if that is known.

    Args:
        model: any module; it is not changed. Names are those of the model inside wrappers such as DataParallel.
        example_inputs: a tensor (N, C, ...), a tuple of positional or a dict of keyword arguments for one forward pass
            in evaluation mode. Without it the shapes, the calls and the real order are unknown.
        norms: the table of norm classes: `KNOWN_NORMS`, or `KNOWN_NORMS | {TheirNorm: read_batch_norm}`.

    Returns:
        One `NormSite` per place, with its names, class, channels and shapes, and why it cannot be swapped, if so.

    Raises:
        ModelError: the forward pass on `example_inputs` failed, or a lazy module has no sizes yet.
        SwapError: the model is prepared for quantization.
        ArgumentError: `model` is not a module, or `norms` not a table.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> [(site.fqn, site.shapes) for site in normswap.find_norm_sites(model, torch.randn(2, 3, 16, 16))]
        [('1', ((2, 8, 14, 14),))]
    """
    return observe_sites(model, example_inputs, norms=norms)[0]


def observe_sites(
    model: nn.Module, example_inputs: Any = None, *, norms: NormTable = KNOWN_NORMS
) -> tuple[tuple[NormSite, ...], Observation | None]:
    """Do what `find_norm_sites` does, and return the observed forward pass too; None without example inputs."""
    check_not_prepared(model)
    model = unwrap(model)
    check_norm_table(norms)
    entries = walk_modules(model)
    by_name = {name: entry for entry in entries for name in entry.names}
    observation = None
    if example_inputs is not None:
        observation = observe_forward(model, example_inputs, entries, norms=norms)
    naming_norms = modules_naming_norms(entries, norms)
    model_facts = read_model_facts(
        model, example_inputs, entries, observation, norms, names_norm_functions=bool(naming_norms)
    )
    traces = ModuleTraceCache()
    facts, owners = model_facts.facts, _owners(model_facts, naming_norms, by_name, observation, traces)
    functional = {owner: functional_sites(by_name[owner], facts, observation, traces) for owner in owners}
    functional_owners = {by_name[owner].module for owner, sites in functional.items() if sites}
    flags = model_training_flags(model)
    modules = [
        _module_site(entry, spec, facts, observation, flags)
        for entry in entries
        if entry.module not in functional_owners and (spec := read_norm(entry.module, norms)) is not None
    ]
    calls = [site for sites in functional.values() for site in sites]
    rewritten = {entry.names[0] for entry in entries if is_rewritten(entry.module)}
    owners_to_read = {site.owner for site in calls if site.owner is not None and not site.problem} | rewritten
    owner_by_tensor = _owner_by_tensor({owner: by_name[owner].module for owner in sorted(owners_to_read)}, traces)
    modules = [
        _mark_unused_norm(site, by_name[site.fqn].module, owner_by_tensor, facts, observation) for site in modules
    ]
    # Sites that ran come first, in their order; the others keep the order of the module tree.
    all_sites = modules + calls
    return tuple(sorted(all_sites, key=lambda site: (site.order is None, site.order or 0))), observation


def _owner_by_tensor(owners: Mapping[str, nn.Module], traces: ModuleTraceCache) -> dict[int, str]:
    """The owner of each tensor, by id, that a batch_norm call reads, also one that was swapped before."""
    found: dict[int, str] = {}
    for owner, module in owners.items():
        graph = traces.get(module).evaluation
        for node in graph.nodes if graph else ():
            if norm_call(node) is None or is_batch_norm_call(node):
                found |= {id(tensor): owner for tensor in call_tensors(module, node)}
    return found


def _owners(
    model_facts: ModelFacts,
    naming_norms: tuple[ModuleEntry, ...],
    by_name: dict[str, ModuleEntry],
    observation: Observation | None,
    traces: ModuleTraceCache,
) -> tuple[str, ...]:
    """The first names of the modules that call a function that normalizes, in training or in evaluation."""
    owners = [by_name[owner].names[0] for owner in model_facts.owners]
    owners += [*observation.functional, *observation.instance] if observation else []
    # Modules outside the trace of the whole model are traced by themselves.
    not_traced = [entry for entry in naming_norms if model_facts.entered.isdisjoint(entry.names)]
    was_run = observation.runs if observation else {}
    owners += [p.names[0] for p in not_traced if calls_norm_function(p.module, traces, was_run=p.names[0] in was_run)]
    return tuple(dict.fromkeys(owners))


def _module_site(
    entry: ModuleEntry,
    spec: NormSpec,
    facts: GraphFacts | None,
    observation: Observation | None,
    flags: ModelTrainingFlags | None,
) -> NormSite:
    name = entry.names[0]
    parameters = list(entry.module.parameters(recurse=False))
    statistics = [getattr(entry.module, name, None) for name in ("running_mean", "running_var", "num_batches_tracked")]
    has_statistics, is_batch_norm = statistics[0] is not None, spec.kind in ("bn", "frozen bn")
    shapes = observation.shapes.get(name, []) if observation else None
    order, seen_by = execution_order(entry, facts, observation)
    producer_name = next((facts.producers[alias] for alias in entry.names if facts and alias in facts.producers), None)
    return NormSite(
        fqn=name,
        aliases=entry.names[1:],
        kind=spec.kind,
        class_name=class_name(entry.module),
        num_features=spec.num_features,
        eps=spec.eps,
        momentum=spec.momentum,
        frozen=spec.frozen,
        kept_in_evaluation=flags is not None and not flags.training[name] and has_statistics,
        trainable=not spec.frozen and (not parameters or any(parameter.requires_grad for parameter in parameters)),
        registered=entry.registered,
        synchronize=spec.synchronize,
        has_running_stats=has_statistics and is_batch_norm,
        untrained=is_batch_norm and spec.target is not None and never_updated(*statistics),
        num_groups=spec.num_groups,
        shapes=None if shapes is None else tuple(dict.fromkeys(shapes)),
        calls=None if shapes is None else len(shapes),
        order=order,
        producer=observation.producers.get(name, producer_name) if observation else producer_name,
        seen_by=seen_by,
        problem=spec.problem or shape_problem(spec, shapes or ()) or _kept_in_training(name, spec, flags),
    )


def _kept_in_training(name: str, spec: NormSpec, flags: ModelTrainingFlags | None) -> str | None:
    """A model that leaves norms in training mode finds them by their class, which a conversion changes."""
    if flags is None or spec.kind != "bn" or spec.frozen or not flags.evaluation[name]:
        return None
    return "the model's own eval() leaves it in training mode, so it uses batch statistics there: left as it is"


def _mark_unused_norm(
    site: NormSite,
    module: nn.Module,
    owner_by_tensor: dict[int, str],
    facts: GraphFacts | None,
    observation: Observation | None,
) -> NormSite:
    """Give a norm a problem if it never runs and a functional site reads its tensors: its gates would not be used."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    owner = next((owner_by_tensor[id(tensor)] for tensor in tensors if id(tensor) in owner_by_tensor), None)
    if owner is None or site.problem or site.order is not None or (facts is None and observation is None):
        return site
    return replace(
        site,
        problem=f"does not run; the batch_norm call in {owner or 'the model'} uses its tensors and is the site",
    )
