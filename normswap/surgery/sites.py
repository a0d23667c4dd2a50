"""Norm sites: the module tree, the FX graph and one observed forward pass in one ordered tuple of facts.

Discovery never decides: a site says what is there and what is known of it, `plan` says what becomes of it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from normswap.errors import ModelError
from normswap.layers.modules import FunctionalSwitchNorm
from normswap.surgery.graph_rewrite import compile_forward, free_names, is_rewritten
from normswap.surgery.norms import KNOWN_NORMS, Norms, NormSpec, is_norm_layer, read_norm, refused_shape
from normswap.surgery.observation import Observation, Shape, observe_forward
from normswap.surgery.own_forward import mentions_batch_norm, trace_own_forward
from normswap.surgery.tracing import (
    GraphFacts,
    batch_norm_arguments,
    batch_norm_nodes,
    call_name,
    is_batch_norm_call,
    read_graph,
    trace_model,
)
from normswap.surgery.tree import Place, class_name, join, modules_by_name, walk_modules
from normswap.surgery.trial import agree, outcome
from normswap.surgery.wrapping import unwrap


@dataclass(frozen=True)
class NormSite:
    """One place where a model normalizes: a module with all its names, or a functional call and its owner.

    Attributes:
        fqn, aliases: the first name and the others; of a functional site the name that its gates will have.
        kind, class_name, num_features, eps, momentum: what it is; None or 0 where the place does not tell.
        frozen: normalizes with running statistics in training too, weight and bias are buffers.
        trainable: some parameter of its own requires a gradient, or it has none of its own.
        registered: its tensors are in the model's state dict (false: held in a Python container only).
        owner: fqn of the module whose forward calls `F.batch_norm`; None for a module site.
        shapes: distinct input shapes (N, C, *spatial) in the observed pass, None without one.
        calls: calls per forward pass in evaluation, None if not observed.
        order: place in the order of execution, None if it was not seen to run.
        producer: module or function whose output it reads, where known.
        seen_by: what told the order: "forward pass", "graph", or "module tree" where it was not seen to run.
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


def find_norm_sites(
    model: nn.Module, example_inputs: Any = None, *, norms: Norms = KNOWN_NORMS
) -> tuple[NormSite, ...]:
    """Find every place where `model` normalizes, in order of execution where that is known.

    Args:
        model: any module; it is left as it is. Names are those of the model inside wrappers.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for one forward pass in
            evaluation. Without it shapes, calls and modules' real order stay unknown.
        norms: table of known norm classes, see `normswap.surgery.norms`.

    Raises:
        ModelError: the forward pass on `example_inputs` failed, or sizes are not settled before one.
    """
    model = unwrap(model)
    places = walk_modules(model)
    by_name = {name: place for place in places for name in place.names}
    seen = None
    if example_inputs is not None:
        _refuse_lazy(places)
        seen = observe_forward(model, example_inputs, places, norms=norms)
    facts, owners = _read_traces(model, places, by_name, seen, norms)
    functional = {owner: _functional_sites(by_name[owner], facts, seen) for owner in owners}
    spoken_for = {by_name[owner].module for owner, sites in functional.items() if sites}
    modules = [
        _module_site(place, spec, facts, seen)
        for place in places
        if place.module not in spoken_for and (spec := read_norm(place.module, norms)) is not None
    ]
    calls = [site for sites in functional.values() for site in sites]
    rewritten = {place.names[0] for place in places if is_rewritten(place.module)}
    used = _tensors_used(
        by_name, {site.owner for site in calls if site.owner is not None and not site.problem} | rewritten
    )
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


def _read_traces(
    model: nn.Module, places: tuple[Place, ...], by_name: dict[str, Place], seen: Observation | None, norms: Norms
) -> tuple[GraphFacts | None, tuple[str, ...]]:
    """What the graph in evaluation tells, and the first names of the modules that call batch_norm, in either mode."""

    def is_norm_fqn(name: str) -> bool:
        place = by_name.get(name)
        return place is not None and is_norm_layer(place.module, norms)

    traces = [trace_model(model, training=training, norms=norms) for training in (False, True)]
    facts = [read_graph(trace.graph, is_norm_fqn) for trace in traces if trace.graph is not None]
    owners = [by_name[owner].names[0] for found in facts for owner in found.functional_owners]
    owners += seen.functional if seen else ()
    # Whatever a trace did not pass through is asked itself.
    entered = traces[0].entered | traces[1].entered if len(facts) == 2 else frozenset()
    unread = [place for place in places if entered.isdisjoint(place.names)]
    ran = seen.runs if seen else {}
    owners += [p.names[0] for p in unread if _calls_batch_norm(p.module, norms, ran=p.names[0] in ran)]
    evaluation = facts[0] if traces[0].graph is not None else None
    return evaluation, tuple(dict.fromkeys(owners))


def _calls_batch_norm(module: nn.Module, norms: Norms, *, ran: bool) -> bool:
    """Ask a module's own forward; where it cannot be traced, its code, so that a call in it is not lost.

    Of one that `ran` a call would have been seen, unless it makes it in training only: the code tells whether to ask.
    """
    if type(module).__module__.startswith("torch.nn.") or is_norm_layer(module, norms):
        return False
    if ran and not mentions_batch_norm(module):
        return False
    own = trace_own_forward(module)
    return bool(batch_norm_nodes(own.evaluation)) if own.evaluation else mentions_batch_norm(module)


def _module_site(place: Place, spec: NormSpec, facts: GraphFacts | None, seen: Observation | None) -> NormSite:
    name = place.names[0]
    own = list(place.module.parameters(recurse=False))
    shapes = seen.shapes.get(name, []) if seen else None
    order, seen_by = _order(place, facts, seen)
    producer = next((facts.producers[alias] for alias in place.names if facts and alias in facts.producers), None)
    return NormSite(
        fqn=name,
        aliases=place.names[1:],
        kind=spec.kind,
        class_name=class_name(place.module),
        num_features=spec.num_features,
        eps=spec.eps,
        momentum=spec.momentum,
        frozen=spec.frozen,
        trainable=not spec.frozen and (not own or any(parameter.requires_grad for parameter in own)),
        registered=place.registered,
        synchronize=spec.synchronize,
        shapes=None if shapes is None else tuple(dict.fromkeys(shapes)),
        calls=None if shapes is None else len(shapes),
        order=order,
        producer=producer or (seen.producers.get(name) if seen else None),
        seen_by=seen_by,
        problem=spec.problem or refused_shape(spec, shapes or ()),
    )


def _order(place: Place, facts: GraphFacts | None, seen: Observation | None) -> tuple[int | None, str]:
    """When the site runs and what told so; the forward pass knows better than the graph."""
    if seen is not None and place.names[0] in seen.order:
        return seen.order[place.names[0]], "forward pass"
    traced = [facts.order.index(name) for name in place.names if name in facts.order] if facts and not seen else []
    return (traced[0], "graph") if traced else (None, "module tree")


def _functional_sites(place: Place, facts: GraphFacts | None, seen: Observation | None) -> list[NormSite]:
    """One site per `F.batch_norm` call in the owner's own forward, or one with a problem if that is unreadable."""
    owner, module = place.names[0], place.module
    fed = seen.functional.get(owner, []) if seen else []
    runs = max(1, seen.runs.get(owner, 0)) if seen else 1
    own = trace_own_forward(module)
    nodes = batch_norm_nodes(own.evaluation) if own.evaluation else []
    if own.evaluation and not nodes and any(map(is_batch_norm_call, own.evaluation.nodes)):
        return []  # what was seen is a kernel, computed into a new tensor
    problem = own.reason and (
        f"the forward of {type(module).__name__} cannot be rewritten ({own.reason}): move its F.batch_norm call into a "
        "module of its own, or use nn.BatchNorm"
    )
    if not problem and seen and len(fed) not in (0, runs * len(nodes)):
        problem = "not every F.batch_norm call runs in every pass: move the call into a module of its own"
    if not problem and seen and owner in seen.owner_inputs and not isinstance(module, fx.GraphModule):
        problem = _differs_from_eager(module, *seen.owner_inputs[owner])
    order, seen_by = _order(place, facts, seen)
    sites = []
    for index, name in enumerate(free_names(module, max(1, len(nodes)))):
        shapes = fed[index :: len(nodes)] if nodes else fed
        sites.append(
            NormSite(
                fqn=join(owner, name),
                aliases=tuple(join(alias, name) for alias in place.names[1:]),
                kind="bn",
                class_name=call_name(nodes[index].target) if nodes else "torch.nn.functional.batch_norm",
                num_features=_channels(module, nodes[index] if nodes else None, shapes),
                trainable=_affine_trainable(module, nodes[index] if nodes else None),
                registered=place.registered,
                owner=owner,
                shapes=tuple(dict.fromkeys(shapes)) if seen else None,
                calls=len(shapes) if seen else None,
                order=order,
                seen_by=seen_by,
                problem=problem,
            )
        )
    return sites


def _tensors_used(by_name: dict[str, Place], owners: set[str]) -> dict[int, str]:
    """By identity, the tensors that functional sites read, those swapped before included, each with its owner."""
    used: dict[int, str] = {}
    for owner in owners:
        module = by_name[owner].module
        graph = trace_own_forward(module).evaluation
        for arguments in map(_site_arguments(module), graph.nodes) if graph else ():
            tensors = [_attribute(module, arguments.get(name)) for name in _OWN_TENSORS]
            used |= {id(tensor): owner for tensor in tensors if tensor is not None}
    return used


def _site_arguments(module: nn.Module) -> Callable[[fx.Node], dict[str, Any]]:
    gates = {name for name, child in module.named_children() if isinstance(child, FunctionalSwitchNorm)}

    def arguments(node: fx.Node) -> dict[str, Any]:
        if is_batch_norm_call(node):
            return batch_norm_arguments(node)
        return node.kwargs if node.op == "call_module" and node.target in gates else {}

    return arguments


_OWN_TENSORS = ("running_mean", "running_var", "weight", "bias")


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


def _differs_from_eager(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """A trace can succeed and be wrong: hold it against the module itself, in both modes, on what it was fed."""

    def run(forward: Callable[..., Any]) -> Any:
        return forward(module, *copy.deepcopy(args), **copy.deepcopy(kwargs))

    forwards = type(module).forward, compile_forward(module)
    for training in (True, False):
        real, traced = (outcome(module, partial(run, forward), training=training) for forward in forwards)
        if not agree(real, traced):
            return "its traced forward differs from the real one: move its F.batch_norm call into a module of its own"
    return None


def _channels(module: nn.Module, node: Any, shapes: list[Shape]) -> int:
    if shapes:
        return shapes[0][1]
    for name in ("running_mean", "weight"):
        tensor = _attribute(module, batch_norm_arguments(node).get(name)) if node is not None else None
        if tensor is not None:
            return tensor.shape[0]
    return 0


def _affine_trainable(module: nn.Module, node: Any) -> bool:
    arguments = batch_norm_arguments(node) if node is not None else {}
    tensors = [_attribute(module, arguments.get(name)) for name in ("weight", "bias")]
    own = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    return not own or any(tensor.requires_grad for tensor in own)


def _attribute(module: nn.Module, node: Any) -> Tensor | None:
    if getattr(node, "op", None) != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    found = getattr(modules_by_name(module).get(owner), name, None)
    return found if isinstance(found, Tensor) else None
