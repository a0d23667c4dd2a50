"""Functional sites: the calls of functions that normalize, in the own forward of the module that makes them.

A batch_norm call can be rewritten where its owner's forward can. An instance_norm call is named and explained, as is a
batch_norm call on samples that were folded into the channels: neither has batch statistics to lose.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress, cycle
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from normswap.errors import ModelError
from normswap.layers.switch_norm import FunctionalSwitchNorm
from normswap.surgery.arguments import require_type
from normswap.surgery.discovery.whole_model import (
    Observation,
    Shape,
    WholeModel,
    observe_forward,
    read_whole_model,
    suspects,
)
from normswap.surgery.graphs.module_trace import OwnForward, OwnForwards, mentioned_kinds
from normswap.surgery.graphs.rewriting import compile_forward, free_names, is_rewritten
from normswap.surgery.graphs.tracing import GraphFacts, agree, outcome
from normswap.surgery.module_tree import OwnFlags, Place, class_name, modules_by_name, own_flags, walk_modules
from normswap.surgery.norms.classes import KNOWN_NORMS, Norms, NormSpec, read_norm, refused_shape
from normswap.surgery.norms.functions import (
    call_name,
    is_batch_norm_call,
    is_folded,
    norm_arguments,
    norm_call,
    norm_nodes,
    other_use,
    reads_activation,
)
from normswap.surgery.wrappers import check_not_prepared, unwrap
from normswap.text import join

# MERGED DOC: `NormSite`: what is known of one place where a model normalizes.

# MERGED DOC: Norm sites: the module tree, a graph and one observed forward pass in one ordered tuple of facts.


@dataclass(frozen=True)
class NormSite:
    """One place where a model normalizes: a module with all its names, or a functional call and its owner.

    Attributes:
        fqn, aliases: the first name and the others; of a functional site the name that its gates will have.
        kind, class_name, num_features, eps, momentum: what it is; None or 0 where the place does not tell.
        frozen: normalizes with running statistics in training too.
        kept_in_evaluation: the model's own `train()` leaves it in evaluation.
        trainable: some parameter of its own requires a gradient, or it has none of its own.
        registered: its tensors are in the model's state dict (false: held in a Python container only).
        owner: fqn of the module whose forward calls a function that normalizes; None for a module site.
        shapes: distinct input shapes (N, C, *spatial) in the observed pass, None without one.
        calls: calls per forward pass in evaluation, None if not observed.
        order: place in the order of execution, None if it was not seen to run.
        producer: module or function whose output it reads, where known.
        seen_by: what told the order: "forward pass", "symbolic trace", or "module tree" where it was not seen to run.
        problem: why it cannot be swapped, or None.
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
    owner: str | None = None
    shapes: tuple[Shape, ...] | None = None
    calls: int | None = None
    order: int | None = None
    producer: str | None = None
    seen_by: str = "module tree"
    problem: str | None = None

    @property
    def positions(self) -> int | None:
        """Smallest number of spatial positions per sample that was fed, None where nothing was."""
        return min((_positions(shape) for shape in self.shapes), default=None) if self.shapes else None


def _positions(shape: Shape) -> int:
    return int(torch.Size(shape[2:]).numel())


def order_of(place: Place, facts: GraphFacts | None, seen: Observation | None) -> tuple[int | None, str]:
    """When the site runs and what told so; the forward pass knows better than the graph."""
    if seen is not None and place.names[0] in seen.order:
        return seen.order[place.names[0]], "forward pass"
    traced = [facts.order.index(name) for name in place.names if name in facts.order] if facts and not seen else []
    return (traced[0], "symbolic trace") if traced else (None, "module tree")


_FUNCTIONS = {"bn": "torch.nn.functional.batch_norm", "in": "torch.nn.functional.instance_norm"}
_STEMS = {"bn": "batch_norm", "in": "instance_norm"}
_BY_ITSELF = (
    "has no batch statistics to lose at small batches: stays as it is, since of other kinds only modules are swapped "
    "(use nn.InstanceNorm and kinds=('bn', 'in') to have it swapped)"
)
_TRACKED = (
    "instance_norm with running statistics uses each sample's own in training and the running ones in evaluation, and "
    "no mix of SN does both: stays as it is"
)
_FOLDED = f"a call on samples folded into the channels normalizes each by itself, and {_BY_ITSELF}"


def calls_a_norm(module: nn.Module, forwards: OwnForwards, *, ran: bool) -> bool:
    """Ask the own forward of a suspected module; where it cannot be traced, its code, so that a call in it is not lost.

    Of one that `ran` a call would have been seen, unless it makes it in training only: the code tells whether to ask.
    """
    if type(module).__module__.startswith("torch.nn."):
        return False
    if ran and not mentioned_kinds(module):
        return False
    own = forwards.of(module)
    return any(norm_nodes(own.evaluation, kind) for kind in _STEMS) if own.evaluation else bool(mentioned_kinds(module))


def functional_sites(
    place: Place, facts: GraphFacts | None, seen: Observation | None, forwards: OwnForwards
) -> list[NormSite]:
    """One site per call in the owner's own forward, or one of each kind with a problem if that is unreadable."""
    own = forwards.of(place.module)
    if own.evaluation:
        kinds = {kind for kind in _STEMS if norm_nodes(own.evaluation, kind)}
        # What else was seen is a kernel, computed into a new tensor, or a call that the graph does not show.
        kernels = any(map(is_batch_norm_call, own.evaluation.nodes))
        kinds |= set() if kernels else _seen_kinds(place, seen)
    else:
        kinds = _seen_kinds(place, seen) or mentioned_kinds(place.module)
    return [site for kind in _STEMS if kind in kinds for site in _sites_of_kind(kind, place, own, facts, seen)]


def _seen_kinds(place: Place, seen: Observation | None) -> set[str]:
    return {kind for kind in _STEMS if seen and place.names[0] in _seen_calls(kind, seen)}


def _seen_calls(kind: str, seen: Observation) -> dict[str, list[Shape]]:
    return seen.functional if kind == "bn" else seen.instance


def _sites_of_kind(
    kind: str, place: Place, own: OwnForward, facts: GraphFacts | None, seen: Observation | None
) -> list[NormSite]:
    owner, module = place.names[0], place.module
    nodes = norm_nodes(own.evaluation, kind) if own.evaluation else []
    fed = _fed(kind, owner, own, seen) if seen else []
    order, seen_by = order_of(place, facts, seen)
    general = _problem_of_owner(place, own, len(nodes), fed, seen) if kind == "bn" else None
    sites = []
    for index, name in enumerate(free_names(module, max(1, len(nodes)), _STEMS[kind])):
        node = nodes[index] if nodes else None
        shapes = fed[index :: len(nodes)] if nodes else fed
        told_kind, own_problem = _kind_and_problem(kind, node, owner, shapes, seen)
        sites.append(
            NormSite(
                fqn=join(owner, name),
                aliases=tuple(join(alias, name) for alias in place.names[1:]),
                kind=told_kind,
                class_name=_FUNCTIONS[kind] if node is None else call_name(node.target),
                num_features=_channels(module, node, shapes),
                frozen=kind == "bn" and _is_frozen(own, index),
                trainable=_affine_trainable(module, node),
                registered=place.registered,
                owner=owner,
                shapes=tuple(dict.fromkeys(shapes)) if seen else None,
                calls=len(shapes) if seen else None,
                order=order,
                seen_by=seen_by,
                problem=own_problem or general,
            )
        )
    return sites


def _fed(kind: str, owner: str, own: OwnForward, seen: Observation) -> list[Shape]:
    """The shapes that were seen, without those of kernels that were computed into new tensors."""
    shapes = _seen_calls(kind, seen).get(owner, [])
    graph = own.evaluation.nodes if own.evaluation else ()
    calls = [node for node in graph if (call := norm_call(node)) and call.kind == kind]
    if len(shapes) != max(1, seen.runs.get(owner, 0)) * len(calls):
        return shapes
    on_activations = [reads_activation(norm_arguments(node)["input"]) for node in calls]
    return list(compress(shapes, cycle(on_activations)))


def _problem_of_owner(
    place: Place, own: OwnForward, calls: int, fed: list[Shape], seen: Observation | None
) -> str | None:
    """Why no batch_norm call in the owner's forward can be rewritten."""
    owner, module = place.names[0], place.module
    if own.reason:
        return (
            f"the forward of {type(module).__name__} cannot be rewritten ({own.reason}): move its F.batch_norm call "
            "into a module of its own, or use nn.BatchNorm"
        )
    if seen and len(fed) not in (0, max(1, seen.runs.get(owner, 0)) * calls):
        return "not every F.batch_norm call runs in every pass: move the call into a module of its own"
    if seen and owner in seen.owner_inputs and not isinstance(module, fx.GraphModule):
        return _differs_from_eager(module, own, *seen.owner_inputs[owner])
    return None


def _kind_and_problem(
    kind: str, node: fx.Node | None, owner: str, shapes: list[Shape], seen: Observation | None
) -> tuple[str, str | None]:
    """What a call is, and why it stays whatever its owner's forward is like."""
    if kind == "in":
        tracked = norm_arguments(node).get("running_mean") is not None if node else seen and owner in seen.tracked
        return "in", _TRACKED if tracked else _BY_ITSELF
    if (node and is_folded(node)) or _was_fed_folded(owner, shapes, seen):
        return "in", _FOLDED
    use = other_use(node) if node else None
    return "bn", use and f"{use}: export the program again, and convert it without run_decompositions()"


def _was_fed_folded(owner: str, shapes: list[Shape], seen: Observation | None) -> bool:
    """Say whether every batch that a call was fed was one sample, with all samples' channels of a tensor given."""
    given = tree_leaves(seen.owner_inputs.get(owner)) if seen else []
    samples = {tuple(leaf.shape[:2]) for leaf in given if isinstance(leaf, Tensor) and leaf.dim() > 2}
    return bool(shapes) and all(
        shape[0] == 1 and any(n > 1 and n * channels == shape[1] for n, channels in samples) for shape in shapes
    )


def _is_frozen(own: OwnForward, index: int) -> bool:
    """Say whether a call uses the running statistics in both modes, as in a program exported in evaluation."""
    if own.training is None or own.evaluation is None:
        return False
    calls = (norm_nodes(graph, "bn")[index] for graph in (own.training, own.evaluation))
    return all(norm_arguments(node).get("training", False) is False for node in calls)


def _differs_from_eager(
    module: nn.Module, own: OwnForward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """A trace can succeed and be wrong: hold it against the module itself, in both modes, on what it was fed."""

    def run(forward: Callable[..., Any]) -> Any:
        return forward(module, *copy.deepcopy(args), **copy.deepcopy(kwargs))

    forwards = type(module).forward, compile_forward(module, own=own)
    for training in (True, False):
        real, traced = (outcome(module, partial(run, forward), training=training) for forward in forwards)
        if not agree(real, traced):
            return "its traced forward differs from the real one: move its F.batch_norm call into a module of its own"
    return None


def tensors_used(owners: list[tuple[str, nn.Module]], forwards: OwnForwards) -> dict[int, str]:
    """By identity, the tensors that functional sites read, those swapped before included, each with its owner."""
    used: dict[int, str] = {}
    for owner, module in owners:
        graph = forwards.of(module).evaluation
        for arguments in map(_site_arguments(module), graph.nodes) if graph else ():
            tensors = [_attribute(module, arguments.get(name)) for name in _OWN_TENSORS]
            used |= {id(tensor): owner for tensor in tensors if tensor is not None}
    return used


def _site_arguments(module: nn.Module) -> Callable[[fx.Node], dict[str, Any]]:
    gates = {name for name, child in module.named_children() if isinstance(child, FunctionalSwitchNorm)}

    def arguments(node: fx.Node) -> dict[str, Any]:
        if is_batch_norm_call(node):
            return norm_arguments(node)
        return node.kwargs if node.op == "call_module" and node.target in gates else {}

    return arguments


_OWN_TENSORS = ("running_mean", "running_var", "weight", "bias")


def _channels(module: nn.Module, node: fx.Node | None, shapes: list[Shape]) -> int:
    if shapes:
        return shapes[0][1]
    for name in ("running_mean", "weight"):
        tensor = _attribute(module, norm_arguments(node).get(name)) if node is not None else None
        if tensor is not None:
            return tensor.shape[0]
    return 0


def _affine_trainable(module: nn.Module, node: fx.Node | None) -> bool:
    arguments = norm_arguments(node) if node is not None else {}
    tensors = [_attribute(module, arguments.get(name)) for name in ("weight", "bias")]
    own = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    return not own or any(tensor.requires_grad for tensor in own)


def _attribute(module: nn.Module, node: Any) -> Tensor | None:
    if getattr(node, "op", None) != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    found = getattr(modules_by_name(module).get(owner), name, None)
    return found if isinstance(found, Tensor) else None


def find_norm_sites(
    model: nn.Module, example_inputs: Any = None, *, norms: Norms = KNOWN_NORMS
) -> tuple[NormSite, ...]:
    """Find every place where `model` normalizes, in order of execution where that is known.

    Args:
        model: any module; it is left as it is. Names are those of the model inside wrappers.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for one forward pass in
            evaluation. Without it shapes, calls and modules' real order stay unknown.
        norms: the table of norm classes, `KNOWN_NORMS` or `KNOWN_NORMS | {TheirNorm: read_batch_norm}`.

    Returns:
        One `NormSite` per place, with its names, class, channels, shapes and what keeps it from being swapped.

    Raises:
        ModelError: the forward pass on `example_inputs` failed, or sizes are not settled before one.
        SwapError: the model is prepared for quantization.
        ArgumentError: `model` is no module, or `norms` no table.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> [(site.fqn, site.shapes) for site in normswap.find_norm_sites(model, torch.randn(2, 3, 16, 16))]
        [('1', ((2, 8, 14, 14),))]
    """
    check_not_prepared(model)
    model = unwrap(model)
    require_type(norms, Mapping, "norms", "a table such as KNOWN_NORMS | {TheirNorm: read_batch_norm}")
    places = walk_modules(model)
    by_name = {name: place for place in places for name in place.names}
    seen = None
    if example_inputs is not None:
        _refuse_lazy(places)
        seen = observe_forward(model, example_inputs, places, norms=norms)
    suspected = suspects(places, norms)
    whole = read_whole_model(model, example_inputs, places, seen, norms, asked=bool(suspected))
    forwards = OwnForwards()
    facts, owners = whole.facts, _owners(whole, suspected, by_name, seen, forwards)
    functional = {owner: functional_sites(by_name[owner], facts, seen, forwards) for owner in owners}
    spoken_for = {by_name[owner].module for owner, sites in functional.items() if sites}
    flags = own_flags(model)
    modules = [
        _module_site(place, spec, facts, seen, flags)
        for place in places
        if place.module not in spoken_for and (spec := read_norm(place.module, norms)) is not None
    ]
    calls = [site for sites in functional.values() for site in sites]
    rewritten = {place.names[0] for place in places if is_rewritten(place.module)}
    reading = {site.owner for site in calls if site.owner is not None and not site.problem} | rewritten
    used = tensors_used([(owner, by_name[owner].module) for owner in sorted(reading)], forwards)
    modules = [_unless_only_a_holder(site, by_name[site.fqn].module, used, facts, seen) for site in modules]
    # Sites that were seen to run come first, in their order; the others keep the order of the module tree.
    everything = modules + calls
    return tuple(sorted(everything, key=lambda site: (site.order is None, site.order or 0)))


def _refuse_lazy(places: tuple[Place, ...]) -> None:
    """A lazy module settles its sizes in its first forward pass, which must not be this one."""
    for place in places:
        tensors = (*place.module._parameters.values(), *place.module._buffers.values())
        if any(tensor is not None and is_lazy(tensor) for tensor in tensors):
            name = place.names[0] or "the model"
            raise ModelError(f"{name} ({type(place.module).__name__}) has no sizes yet: run one forward pass first")


def _owners(
    whole: WholeModel,
    suspected: tuple[Place, ...],
    by_name: dict[str, Place],
    seen: Observation | None,
    forwards: OwnForwards,
) -> tuple[str, ...]:
    """The first names of the modules that call a function that normalizes, in either mode."""
    owners = [by_name[owner].names[0] for owner in whole.owners]
    owners += [*seen.functional, *seen.instance] if seen else []
    # Whatever a trace did not pass through is asked itself.
    unread = [place for place in suspected if whole.entered.isdisjoint(place.names)]
    ran = seen.runs if seen else {}
    owners += [p.names[0] for p in unread if calls_a_norm(p.module, forwards, ran=p.names[0] in ran)]
    return tuple(dict.fromkeys(owners))


def _module_site(
    place: Place, spec: NormSpec, facts: GraphFacts | None, seen: Observation | None, flags: OwnFlags | None
) -> NormSite:
    name = place.names[0]
    own = list(place.module.parameters(recurse=False))
    shapes = seen.shapes.get(name, []) if seen else None
    order, seen_by = order_of(place, facts, seen)
    told = next((facts.producers[alias] for alias in place.names if facts and alias in facts.producers), None)
    return NormSite(
        fqn=name,
        aliases=place.names[1:],
        kind=spec.kind,
        class_name=class_name(place.module),
        num_features=spec.num_features,
        eps=spec.eps,
        momentum=spec.momentum,
        frozen=spec.frozen,
        kept_in_evaluation=flags is not None and not flags.training[name] and _has_statistics(place.module),
        trainable=not spec.frozen and (not own or any(parameter.requires_grad for parameter in own)),
        registered=place.registered,
        synchronize=spec.synchronize,
        shapes=None if shapes is None else tuple(dict.fromkeys(shapes)),
        calls=None if shapes is None else len(shapes),
        order=order,
        producer=seen.producers.get(name, told) if seen else told,
        seen_by=seen_by,
        problem=spec.problem or refused_shape(spec, shapes or ()) or _kept_in_training(name, spec, flags),
    )


def _has_statistics(module: nn.Module) -> bool:
    return getattr(module, "running_mean", None) is not None


def _kept_in_training(name: str, spec: NormSpec, flags: OwnFlags | None) -> str | None:
    """Own code that keeps norms in training does so by their class, which a conversion changes."""
    if flags is None or spec.kind != "bn" or spec.frozen or not flags.evaluation[name]:
        return None
    return "stays in training in the model's own eval(), which uses batch statistics there: not converted"


def _unless_only_a_holder(
    site: NormSite, module: nn.Module, used: dict[int, str], facts: GraphFacts | None, seen: Observation | None
) -> NormSite:
    """A norm that never runs, but whose tensors a functional site reads: gates of its own would be dead."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    owner = next((used[id(tensor)] for tensor in tensors if id(tensor) in used), None)
    if owner is None or site.problem or site.order is not None or (facts is None and seen is None):
        return site
    return replace(
        site,
        problem=f"does not run, but holds the tensors of a batch_norm call in {owner or 'the model'}: that is the site",
    )
