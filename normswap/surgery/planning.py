"""plan_swaps: what becomes of every norm site of a model. All decisions are made here, and only here.

The arguments are the ground; settings by pattern override them site by site.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from normswap.errors import ModelError, PlanError
from normswap.layers.importance import BN_STATISTICS, BRANCHES, BnStatistics, Branch, Gate, check_gate
from normswap.surgery.arguments import describe_shapes
from normswap.surgery.norm_site import NormSite
from normswap.surgery.norms import KINDS, KNOWN_NORMS, Norms, requested_kind, vertex_of
from normswap.surgery.patterns import Names, first_matches, matched
from normswap.surgery.plan import ANY_CLASS, NEVER_FILLED, Skip, Swap, SwapPlan, notes_on, with_vertex
from normswap.surgery.settings import Settings, SiteSettings, settle
from normswap.surgery.sites import find_norm_sites
from normswap.surgery.tree import class_name, modules_by_name
from normswap.surgery.wrapping import unwrap

# LN of fewer values than this at one position erases the signal (two values normalise to +1 and -1).
_MIN_LN_VALUES = 8
_MOST_NAMED = 5


@dataclass(frozen=True)
class _Ground:
    """What the arguments say of all sites."""

    kinds: tuple[str, ...]
    gate: Gate
    branches: tuple[Branch, ...]
    bn_statistics: BnStatistics
    train_frozen_gates: bool
    synchronize: bool


def plan_swaps(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    kinds: Sequence[str] = ("bn",),
    gate: Gate = "simplex",
    branches: Sequence[Branch] | None = None,
    bn_statistics: BnStatistics = "batch",
    train_frozen_gates: bool = False,
    synchronize: bool = False,
    settings: Settings | None = None,
    norms: Norms = KNOWN_NORMS,
) -> SwapPlan:
    """Decide for every norm site of `model` whether and how it is swapped. The model is left as it is.

    Args:
        model: any module, wrapped or not; all names are those of the model inside.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for one forward pass in
            evaluation. Without it spatial sizes are unknown.
        include, exclude: names of the sites to swap, and of those to leave: glob patterns on dotted names such as
            `["layer4.*"]`, or regular expressions after `re:`. `exclude` wins; without `include` all sites are meant.
        kinds: which norms are swapped: `"bn"` (default), `"in"` (InstanceNorm, which starts at its own branch) and
            `"gn1"` (GroupNorm of one group, which starts at `ln`).
        gate: how importance weights follow from their parameters: `"simplex"` (default) starts as exactly the same
            function, `"softmax"` at the uniform mix, which is another function.
        branches: the branches that a site may have, some of `"in"`, `"ln"`, `"bn"`, with the one where each kind
            starts. Default: all that the shape and the kind of a site allow. Only `settings` give a site of kind `in`
            or `gn1` a `bn` branch, whose running statistics begin then.
        bn_statistics: what the `bn` branches use in training: `"batch"` (default), `"running"` or `"renorm"`. Sites
            that were frozen, and those that the model's own `train()` leaves in evaluation, use running statistics
            whatever it says.
        train_frozen_gates: let gates learn also at sites whose own parameters are all frozen.
        synchronize: let the `bn` branch of every site take in training the batch of all processes; without it only
            those do that did so before (SyncBatchNorm).
        settings: by pattern, some of `gate`, `branches`, `bn_statistics` (of such sites too), `train_gates` and
            `synchronize`, which override the arguments above. If several patterns match a site, the later one wins, key
            by key. Branches that the shape of a site leaves no signal are left out of these as well.
        norms: the table of norm classes, `KNOWN_NORMS` or `KNOWN_NORMS | {TheirNorm: read_batch_norm}`.

    Returns:
        The plan: swaps and skips, which together are all sites that were found. `print(plan)` shows it as a table.

    Raises:
        PlanError: a pattern matches no site, or an option or setting is unknown.
        ModelError: the forward pass on `example_inputs` failed.
        ArgumentError: an argument is of a wrong type.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> normswap.plan_swaps(model, torch.randn(2, 3, 16, 16))
        SwapPlan(torch.nn.modules.container.Sequential, 1 swap, 0 skips)
    """
    ground = _ground(kinds, gate, branches, bn_statistics, train_frozen_gates, synchronize)
    model = unwrap(model)
    sites = find_norm_sites(model, example_inputs, norms=norms)
    names = [(site.fqn, *site.aliases) for site in sites]
    included, excluded = first_matches(include, names), first_matches(exclude, names)
    told = settle(settings or {}, names)
    swaps: list[Swap] = []
    skips: list[Skip] = []
    sized: list[NormSite] = []
    for site in sites:
        reason = _reason_to_stay(site, ground, bool(include), included.get(site.fqn), excluded.get(site.fqn))
        decision = _decide(site, ground, told[site.fqn]) if reason is None else reason
        if reason is None and "in" in _allowed(site, ground, told[site.fqn]):
            sized.append(site)
        if isinstance(decision, Swap):
            swaps.append(decision)
        else:
            skips.append(Skip(site.fqn, site.class_name, site.kind, decision))
    inputs = None if example_inputs is None else describe_shapes(example_inputs)
    swapped = {swap.fqn for swap in swaps}
    notes = [*_notes(example_inputs, [site for site in sites if site.fqn in swapped])]
    notes += _size_notes(model, example_inputs, sized, norms)
    if {swap.fqn for swap in swaps if swap.synchronize} - {site.fqn for site in sites if site.synchronize}:
        notes.append(_SYNCHRONIZED)
    notes += _kept_notes(swaps, {site.fqn for site in sites if _is_kept(site)})
    notes += [*_idle_settings(settings or {}, names, swapped), *notes_on(swaps)]
    return SwapPlan(tuple(swaps), tuple(skips), class_name(model), inputs, tuple(notes))


def _ground(
    kinds: Sequence[str],
    gate: Gate,
    branches: Sequence[Branch] | None,
    bn_statistics: BnStatistics,
    train_frozen_gates: bool,
    synchronize: bool,
) -> _Ground:
    """The arguments, checked."""
    if bn_statistics not in BN_STATISTICS:
        raise PlanError(f"bn_statistics: expected one of {BN_STATISTICS}, got {bn_statistics!r}")
    if isinstance(kinds, str) or not kinds or not set(kinds) <= {*KINDS}:
        raise PlanError(f"kinds: expected some of {tuple(KINDS)}, got {kinds!r}")
    allowed = BRANCHES
    for kind in kinds:
        allowed = with_vertex(BRANCHES if branches is None else branches, kind)
    return _Ground(tuple(kinds), check_gate(gate), allowed, bn_statistics, train_frozen_gates, synchronize)


def _reason_to_stay(
    site: NormSite, ground: _Ground, filtered: bool, included: str | None, excluded: str | None
) -> str | None:
    """Why a site is not to be swapped, whatever its branches would be."""
    if site.problem is not None:
        return site.problem
    if excluded is not None:
        return f"excluded by the pattern {excluded!r}"
    if filtered and included is None:
        return "matches no include pattern"
    kind = requested_kind(site.kind)
    if kind not in ground.kinds:
        wanted = tuple(word for word in KINDS if word == kind or word in ground.kinds)
        idle = "" if kind == "bn" else ", which has no batch statistics to lose at small batches"
        return (
            f"is {KINDS[kind][1]}{idle}: stays as it is, unless asked for with kinds={wanted} "
            f"(--kinds {','.join(wanted)})"
        )
    return None


def _decide(site: NormSite, ground: _Ground, told: SiteSettings) -> Swap | str:
    """The swap of a site, or the reason why nothing is to be had of one."""
    allowed = _allowed(site, ground, told)
    sensible = _branches(site)
    branches = tuple(branch for branch in sensible if branch in allowed)
    if len(branches) == 1:
        return _nothing_to_switch(site, branches[0], allowed)
    frozen_or_all: BnStatistics = "running" if site.frozen or _is_kept(site) else ground.bn_statistics
    swap = Swap(
        fqn=site.fqn,
        class_name=site.class_name,
        num_features=site.num_features,
        gate=told.get("gate", ground.gate),
        branches=branches,
        bn_statistics=told.get("bn_statistics", frozen_or_all) if "bn" in branches else "batch",
        train_gates=told.get("train_gates", site.trainable or ground.train_frozen_gates),
        kind=site.kind,
        owner=site.owner,
        synchronize="bn" in branches and told.get("synchronize", site.synchronize or ground.synchronize),
    )
    return _problem_of_fresh_statistics(site, swap) or swap


def _allowed(site: NormSite, ground: _Ground, told: SiteSettings) -> tuple[Branch, ...]:
    """The branches that the user lets a site have: `bn` beside another norm only where it is asked for by name."""
    if "branches" in told:
        try:
            return with_vertex(told["branches"], site.kind)
        except PlanError as error:
            raise PlanError(f"settings of {site.fqn!r}: {error}") from None
    unasked = "bn" if vertex_of(site.kind) != "bn" else None
    return tuple(branch for branch in ground.branches if branch != unasked)


def _branches(site: NormSite) -> tuple[Branch, ...]:
    """The branches that leave a signal: IN needs more than one position, LN more than a few values.

    Where IN and LN are one, and where the old norm itself leaves none, its own branch is the one that stays.
    """
    vertex, single = vertex_of(site.kind), site.positions == 1
    dropped = {"in"} if single or (_channels(site) == 1 and vertex == "ln") else set()
    if _channels(site) == 1 or (single and _channels(site) < _MIN_LN_VALUES):
        dropped.add("ln")
    return tuple(branch for branch in BRANCHES if branch == vertex or branch not in dropped)


def _channels(site: NormSite) -> int:
    """The fewest channels that were fed: an InstanceNorm without weight takes any number, whatever it was told."""
    return min(shape[1] for shape in site.shapes) if site.shapes else site.num_features


def _nothing_to_switch(site: NormSite, left: Branch, allowed: tuple[Branch, ...]) -> str:
    if allowed == (left,):
        return f"only the branch {left} is allowed: nothing to switch to"
    single, channels = site.positions == 1, _channels(site)
    reason = (
        f"{channels} channel{'s' * (channels != 1)}{' at one spatial position' * single} "
        f"leave{'s' * (channels == 1)} only the branch {left}: nothing to switch to"
    )
    return reason + "; plan with an input of the real size if this one is smaller" * single


def _problem_of_fresh_statistics(site: NormSite, swap: Swap) -> str | None:
    if not swap.starts_statistics:
        return None
    if swap.bn_statistics == "running":
        return f"needs bn_statistics='batch' or 'renorm' for its `bn` branch, {NEVER_FILLED}: set it, or leave `bn` out"
    fed = {shape[1] for shape in site.shapes or ()}
    if fed and fed != {site.num_features}:
        return f"was made for {site.num_features} channels and fed {sorted(fed)}: correct that, or leave `bn` out"
    return None


def _notes(inputs: Any, swapped: Sequence[NormSite]) -> list[str]:
    notes = []
    if inputs is None:
        notes.append(
            "planned without an example input: spatial sizes are unknown; a layer that is fed a 1x1 map gives the "
            "weight of instance norm to layer norm and warns; give an input of the real size"
        )
    unregistered = [site.fqn for site in swapped if not site.registered]
    if unregistered:
        notes.append(
            f"in no state dict, since they are held in a Python container only: {', '.join(unregistered)}; use "
            "nn.ModuleList if they are to be saved"
        )
    return notes


def _size_notes(model: nn.Module, inputs: Any, sites: Sequence[NormSite], norms: Norms) -> list[str]:
    """Notes on sites that would have other branches at the model's default input size; it runs at that size only if
    some site may.
    """
    default = _default_size(model)
    fed = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() == 4), None)
    if default is None or len(default) != 3 or fed is None or not any(_may_differ(s, fed, default) for s in sites):
        return []
    size = fed.shape[:2] + default[1:]
    resized = tree_map_only(Tensor, lambda leaf: leaf.new_zeros(size) if leaf.shape == fed.shape else leaf, inputs)
    try:
        there = {site.fqn: site for site in find_norm_sites(model, resized, norms=norms)}
    except ModelError:  # it runs at the given size, and nothing is known of the other one
        return []
    pairs = [("in" in _branches(site), "in" in _branches(there[site.fqn])) for site in sites if site.fqn in there]
    given, wanted = ("x".join(map(str, shape)) for shape in (fed.shape[-2:], default[1:]))
    use = "use --input " + "x".join(map(str, size))
    notes = []
    if count := pairs.count((False, True)):
        notes.append(
            f"The example input ({given}) is smaller than the model's default ({wanted}). {_layers(count)} with a 1x1 "
            f"map here {_were(count)} planned without instance norm; {use}."
        )
    if count := pairs.count((True, False)):
        notes.append(
            f"The example input ({given}) is larger than the model's default ({wanted}). {_layers(count)} with a 1x1 "
            f"map at {wanted} {_were(count)} planned with instance norm, which has no variance there; {use}."
        )
    return notes


def _may_differ(site: NormSite, fed: Tensor, default: tuple[int, ...]) -> bool:
    """Whether a map of the site is 1x1 at one of two input sizes and larger at the other, as far as scaling tells."""
    maps = [shape[2:] for shape in site.shapes or () if len(shape) == 4]
    grows = any(given < wanted for given, wanted in zip(fed.shape[-2:], default[1:], strict=True))
    return any(
        grows
        if one == (1, 1)
        else all(own * wanted < 2 * given for own, given, wanted in zip(one, fed.shape[-2:], default[1:], strict=True))
        for one in maps
    )


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


_SYNCHRONIZED = (
    "synchronized where the old norms were not: in training by several processes, statistics of the joint batch are "
    "another function than local ones"
)


def _is_kept(site: NormSite) -> bool:
    """Whether the model's own `train()` leaves a batch norm in evaluation, where it uses running statistics."""
    return site.kept_in_evaluation and site.kind == "bn" and not site.frozen


def _kept_notes(swaps: Sequence[Swap], kept: set[str]) -> list[str]:
    """What becomes of the sites that the model's own `train()` leaves in evaluation."""
    running = [swap.fqn for swap in swaps if swap.fqn in kept and swap.bn_statistics == "running"]
    others = [swap.fqn for swap in swaps if swap.fqn in kept and swap.bn_statistics != "running"]
    notes = []
    if running:
        notes.append(
            "use running statistics in training too, since the model's own train() leaves them in evaluation: "
            f"{_shortened(running)}"
        )
    if others:
        notes.append(
            "the model's own train() leaves them in evaluation, but they are set to use batch statistics, which is "
            f"another function in training: {_shortened(others)}"
        )
    return notes


def _shortened(names: Sequence[str]) -> str:
    more = f" (+{len(names) - _MOST_NAMED} more)" if len(names) > _MOST_NAMED else ""
    return ", ".join(name or "the model" for name in names[:_MOST_NAMED]) + more


def _idle_settings(settings: Settings, names: Sequence[Names], swapped: set[str]) -> list[str]:
    """A note for each pattern of the settings that matches only what is skipped."""
    idle = [pattern for pattern in settings if swapped.isdisjoint(matched(pattern, names))]
    return [f"the settings of {pattern!r} have no effect: it matches skipped sites only" for pattern in idle]


def _default_size(model: nn.Module) -> tuple[int, ...] | None:
    """The input size (C, H, W) that timm's configuration gives the model, if it has one."""
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    return tuple(size) if size else None


def complete_plan(model: nn.Module, plan: SwapPlan, *, prefix: str = "") -> SwapPlan:
    """Return `plan` settled for `model`, where it was made from the names of tensors alone; else `plan` itself.

    Args:
        prefix: what stands before the model's own names in those of the plan.

    Raises:
        PlanError: a planned site is not in the model, or is not of a kind that the plan can be carried out on.
    """
    unsettled = [swap for swap in plan.swaps if swap.class_name == ANY_CLASS]
    if not unsettled:
        return plan
    told: Settings = {
        f"re:{re.escape(swap.fqn.removeprefix(prefix))}": {"gate": swap.gate, "branches": swap.branches}
        for swap in unsettled
    }
    settled = plan_swaps(model, include=tuple(told), settings=told)
    by_name = modules_by_name(unwrap(model))
    swapped = {id(by_name[swap.fqn]) for swap in settled.swaps if swap.fqn in by_name}
    names = [swap.fqn.removeprefix(prefix) for swap in unsettled]
    missing = [name for name in names if id(by_name.get(name)) not in swapped]
    if missing:
        reason = next((skip.reason for skip in settled.skips if skip.fqn == missing[0]), "no norm of a known class")
        raise PlanError(
            f"{len(missing)} sites of the plan cannot be swapped in this model, such as {missing[0]}: {reason}"
        )
    return settled
