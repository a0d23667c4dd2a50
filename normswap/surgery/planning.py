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
from normswap.layers.gating import BN_STATISTICS, BRANCHES, BnStatistics, Branch, Gate, check_gate
from normswap.surgery.arguments import describe_shapes
from normswap.surgery.discovery.sites import NormSite, find_norm_sites
from normswap.surgery.module_tree import class_name, modules_by_name
from normswap.surgery.norms.classes import KINDS, KNOWN_NORMS, NormTable, base_kind, branch_of_kind
from normswap.surgery.plan import ANY_CLASS, NEVER_FILLED, Skip, Swap, SwapPlan, check_starting_branch, swap_notes
from normswap.surgery.selection import Names, Settings, SiteSettings, first_matching_patterns, matched, resolve_settings
from normswap.surgery.wrappers import unwrap

# LN of fewer values than this at one position erases the signal (two values normalise to +1 and -1).
_MIN_LN_VALUES = 8
_MAX_LISTED = 5


@dataclass(frozen=True)
class Defaults:
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
    norms: NormTable = KNOWN_NORMS,
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
    defaults = _check_defaults(kinds, gate, branches, bn_statistics, train_frozen_gates, synchronize)
    model = unwrap(model)
    sites = find_norm_sites(model, example_inputs, norms=norms)
    names = [(site.fqn, *site.aliases) for site in sites]
    included, excluded = first_matching_patterns(include, names), first_matching_patterns(exclude, names)
    site_settings = resolve_settings(settings or {}, names)
    swaps: list[Swap] = []
    skips: list[Skip] = []
    size_dependent: list[NormSite] = []
    for site in sites:
        reason = _skip_reason(site, defaults, bool(include), included.get(site.fqn), excluded.get(site.fqn))
        decision = _decide_site(site, defaults, site_settings[site.fqn]) if reason is None else reason
        if reason is None and "in" in _allowed_branches(site, defaults, site_settings[site.fqn]):
            size_dependent.append(site)
        if isinstance(decision, Swap):
            swaps.append(decision)
        else:
            skips.append(Skip(site.fqn, site.class_name, site.kind, decision))
    inputs = None if example_inputs is None else describe_shapes(example_inputs)
    swapped = {swap.fqn for swap in swaps}
    notes = [*_notes(example_inputs, [site for site in sites if site.fqn in swapped])]
    notes += _size_notes(model, example_inputs, size_dependent, norms)
    if {swap.fqn for swap in swaps if swap.synchronize} - {site.fqn for site in sites if site.synchronize}:
        notes.append(_SYNCHRONIZED)
    notes += _kept_notes(swaps, {site.fqn for site in sites if _stays_in_evaluation(site)})
    notes += [*_unused_settings(settings or {}, names, swapped), *swap_notes(swaps)]
    return SwapPlan(tuple(swaps), tuple(skips), class_name(model), inputs, tuple(notes))


def _check_defaults(
    kinds: Sequence[str],
    gate: Gate,
    branches: Sequence[Branch] | None,
    bn_statistics: BnStatistics,
    train_frozen_gates: bool,
    synchronize: bool,
) -> Defaults:
    """The arguments, checked."""
    if bn_statistics not in BN_STATISTICS:
        raise PlanError(f"bn_statistics: expected one of {BN_STATISTICS}, got {bn_statistics!r}")
    if isinstance(kinds, str) or not kinds or not set(kinds) <= {*KINDS}:
        raise PlanError(f"kinds: expected some of {tuple(KINDS)}, got {kinds!r}")
    allowed = BRANCHES
    for kind in kinds:
        allowed = check_starting_branch(BRANCHES if branches is None else branches, kind)
    return Defaults(tuple(kinds), check_gate(gate), allowed, bn_statistics, train_frozen_gates, synchronize)


def _skip_reason(
    site: NormSite, defaults: Defaults, filtered: bool, included: str | None, excluded: str | None
) -> str | None:
    """Why a site is not to be swapped, whatever its branches would be."""
    if site.problem is not None:
        return site.problem
    if excluded is not None:
        return f"excluded by the pattern {excluded!r}"
    if filtered and included is None:
        return "matches no include pattern"
    kind = base_kind(site.kind)
    if kind not in defaults.kinds:
        wanted = tuple(word for word in KINDS if word == kind or word in defaults.kinds)
        idle = "" if kind == "bn" else ", which has no batch statistics to lose at small batches"
        return (
            f"is {KINDS[kind][1]}{idle}: stays as it is, unless asked for with kinds={wanted} "
            f"(--kinds {','.join(wanted)})"
        )
    return None


def _decide_site(site: NormSite, defaults: Defaults, site_settings: SiteSettings) -> Swap | str:
    """The swap of a site, or the reason why nothing is to be had of one."""
    allowed = _allowed_branches(site, defaults, site_settings)
    usable = _usable_branches(site)
    branches = tuple(branch for branch in usable if branch in allowed)
    if len(branches) == 1:
        return _nothing_to_switch(site, branches[0], allowed)
    default_statistics: BnStatistics = (
        "running" if site.frozen or _stays_in_evaluation(site) else defaults.bn_statistics
    )
    swap = Swap(
        fqn=site.fqn,
        class_name=site.class_name,
        num_features=site.num_features,
        gate=site_settings.get("gate", defaults.gate),
        branches=branches,
        bn_statistics=site_settings.get("bn_statistics", default_statistics) if "bn" in branches else "batch",
        train_gates=site_settings.get("train_gates", site.trainable or defaults.train_frozen_gates),
        kind=site.kind,
        owner=site.owner,
        synchronize="bn" in branches and site_settings.get("synchronize", site.synchronize or defaults.synchronize),
    )
    return _new_statistics_problem(site, swap) or swap


def _allowed_branches(site: NormSite, defaults: Defaults, site_settings: SiteSettings) -> tuple[Branch, ...]:
    """The branches that the user lets a site have: `bn` beside another norm only where it is asked for by name."""
    if "branches" in site_settings:
        try:
            return check_starting_branch(site_settings["branches"], site.kind)
        except PlanError as error:
            raise PlanError(f"settings of {site.fqn!r}: {error}") from None
    not_requested = "bn" if branch_of_kind(site.kind) != "bn" else None
    return tuple(branch for branch in defaults.branches if branch != not_requested)


def _usable_branches(site: NormSite) -> tuple[Branch, ...]:
    """The branches that leave a signal: IN needs more than one position, LN more than a few values.

    Where IN and LN are one, and where the old norm itself leaves none, its own branch is the one that stays.
    """
    vertex, single = branch_of_kind(site.kind), site.positions == 1
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


def _new_statistics_problem(site: NormSite, swap: Swap) -> str | None:
    if not swap.creates_running_stats:
        return None
    if swap.bn_statistics == "running":
        return f"needs bn_statistics='batch' or 'renorm' for its `bn` branch, {NEVER_FILLED}: set it, or leave `bn` out"
    observed = {shape[1] for shape in site.shapes or ()}
    if observed and observed != {site.num_features}:
        return f"was made for {site.num_features} channels and fed {sorted(observed)}: correct that, or leave `bn` out"
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


def _size_notes(model: nn.Module, inputs: Any, sites: Sequence[NormSite], norms: NormTable) -> list[str]:
    """Notes on sites that would have other branches at the model's default input size; it runs at that size only if
    some site may.
    """
    default = _default_size(model)
    observed = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() == 4), None)
    if (
        default is None
        or len(default) != 3
        or observed is None
        or not any(_may_differ(s, observed, default) for s in sites)
    ):
        return []
    size = observed.shape[:2] + default[1:]
    resized = tree_map_only(Tensor, lambda leaf: leaf.new_zeros(size) if leaf.shape == observed.shape else leaf, inputs)
    try:
        resized_sites = {site.fqn: site for site in find_norm_sites(model, resized, norms=norms)}
    except ModelError:  # it runs at the given size, and nothing is known of the other one
        return []
    pairs = [
        ("in" in _usable_branches(site), "in" in _usable_branches(resized_sites[site.fqn]))
        for site in sites
        if site.fqn in resized_sites
    ]
    given, wanted = ("x".join(map(str, shape)) for shape in (observed.shape[-2:], default[1:]))
    use = "use --input " + "x".join(map(str, size))
    notes = []
    if count := pairs.count((False, True)):
        notes.append(
            f"The example input ({given}) is smaller than the model's default ({wanted}). {_count_layers(count)} with a 1x1 "
            f"map here {_were(count)} planned without instance norm; {use}."
        )
    if count := pairs.count((True, False)):
        notes.append(
            f"The example input ({given}) is larger than the model's default ({wanted}). {_count_layers(count)} with a 1x1 "
            f"map at {wanted} {_were(count)} planned with instance norm, which has no variance there; {use}."
        )
    return notes


def _may_differ(site: NormSite, observed: Tensor, default: tuple[int, ...]) -> bool:
    """Whether a map of the site is 1x1 at one of two input sizes and larger at the other, as far as scaling tells."""
    maps = [shape[2:] for shape in site.shapes or () if len(shape) == 4]
    grows = any(given < wanted for given, wanted in zip(observed.shape[-2:], default[1:], strict=True))
    return any(
        grows
        if one == (1, 1)
        else all(
            own * wanted < 2 * given for own, given, wanted in zip(one, observed.shape[-2:], default[1:], strict=True)
        )
        for one in maps
    )


def _count_layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


_SYNCHRONIZED = (
    "synchronized where the old norms were not: in training by several processes, statistics of the joint batch are "
    "another function than local ones"
)


def _stays_in_evaluation(site: NormSite) -> bool:
    """Whether the model's own `train()` leaves a batch norm in evaluation, where it uses running statistics."""
    return site.kept_in_evaluation and site.kind == "bn" and not site.frozen


def _kept_notes(swaps: Sequence[Swap], kept_fqns: set[str]) -> list[str]:
    """What becomes of the sites that the model's own `train()` leaves in evaluation."""
    running = [swap.fqn for swap in swaps if swap.fqn in kept_fqns and swap.bn_statistics == "running"]
    others = [swap.fqn for swap in swaps if swap.fqn in kept_fqns and swap.bn_statistics != "running"]
    notes = []
    if running:
        notes.append(
            "use running statistics in training too, since the model's own train() leaves them in evaluation: "
            f"{_join_limited(running)}"
        )
    if others:
        notes.append(
            "the model's own train() leaves them in evaluation, but they are set to use batch statistics, which is "
            f"another function in training: {_join_limited(others)}"
        )
    return notes


def _join_limited(names: Sequence[str]) -> str:
    more = f" (+{len(names) - _MAX_LISTED} more)" if len(names) > _MAX_LISTED else ""
    return ", ".join(name or "the model" for name in names[:_MAX_LISTED]) + more


def _unused_settings(settings: Settings, names: Sequence[Names], swapped: set[str]) -> list[str]:
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
    incomplete = [swap for swap in plan.swaps if swap.class_name == ANY_CLASS]
    if not incomplete:
        return plan
    site_settings: Settings = {
        f"re:{re.escape(swap.fqn.removeprefix(prefix))}": {"gate": swap.gate, "branches": swap.branches}
        for swap in incomplete
    }
    completed = plan_swaps(model, include=tuple(site_settings), settings=site_settings)
    by_name = modules_by_name(unwrap(model))
    swapped = {id(by_name[swap.fqn]) for swap in completed.swaps if swap.fqn in by_name}
    names = [swap.fqn.removeprefix(prefix) for swap in incomplete]
    missing = [name for name in names if id(by_name.get(name)) not in swapped]
    if missing:
        reason = next((skip.reason for skip in completed.skips if skip.fqn == missing[0]), "no norm of a known class")
        raise PlanError(
            f"{len(missing)} sites of the plan cannot be swapped in this model, such as {missing[0]}: {reason}"
        )
    return completed
