"""Norm sites: the module tree, a graph and one observed forward pass in one ordered tuple of facts.

Discovery never decides: a site says what is there and what is known of it, `plan` says what becomes of it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from normswap.errors import ModelError
from normswap.surgery.arguments import require_type
from normswap.surgery.functional_sites import calls_a_norm, functional_sites, tensors_used
from normswap.surgery.graph_rewrite import is_rewritten
from normswap.surgery.norm_site import NormSite, order_of
from normswap.surgery.norms import KNOWN_NORMS, Norms, NormSpec, read_norm, refused_shape
from normswap.surgery.observation import Observation, observe_forward
from normswap.surgery.own_forward import OwnForwards
from normswap.surgery.own_mode import OwnFlags, own_flags
from normswap.surgery.tracing import GraphFacts
from normswap.surgery.tracing_paths import WholeModel, read_whole_model, suspects
from normswap.surgery.tree import Place, class_name, walk_modules
from normswap.surgery.wrapping import check_not_prepared, unwrap


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
