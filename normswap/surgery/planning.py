"""plan_swaps: what happens to every norm site of a model. All decisions are made here, and only here.

The options are defaults for all sites; their `settings` override them by pattern. Nothing here changes the model.
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from normswap.errors import ModelError, PlanError
from normswap.layers.gating import BRANCHES, BnStatistics, Branch, Gate
from normswap.surgery.arguments import describe_shapes
from normswap.surgery.discovery.sites import NormSite, find_norm_sites, observe_sites
from normswap.surgery.discovery.whole_model import Observation
from normswap.surgery.module_tree import class_name, modules_by_name
from normswap.surgery.norms.classes import KNOWN_NORMS, NO_BATCH_STATISTICS, NormTable
from normswap.surgery.plan import (
    ANY_CLASS,
    NEVER_FILLED,
    Skip,
    Swap,
    SwapPlan,
    input_notes,
    kept_notes,
    statistics_notes,
    swap_notes,
    synchronization_notes,
    unused_settings,
    with_untrained,
)
from normswap.surgery.selection import (
    KINDS,
    Settings,
    SiteFilter,
    SiteSettings,
    Start,
    SwapOptions,
    base_kind,
    branch_of_kind,
    check_start_gate,
    check_starting_branch,
    choose_options,
    describe_filter,
    first_matching_patterns,
    resolve_settings,
)
from normswap.surgery.wrappers import unwrap
from normswap.text import pluralize

_logger = logging.getLogger(__name__)

# At one position, LN over fewer values than this erases the signal (two values normalize to +1 and -1).
_MIN_LN_VALUES = 8


def plan_swaps(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    options: SwapOptions | None = None,
    include: SiteFilter | Iterable[SiteFilter] | None = None,
    exclude: SiteFilter | Iterable[SiteFilter] | None = None,
    kinds: Sequence[str] | None = None,
    gate: Gate | None = None,
    branches: Sequence[Branch] | None = None,
    bn_statistics: BnStatistics | None = None,
    train_frozen_gates: bool | None = None,
    synchronize: bool | None = None,
    start: Start | None = None,
    num_groups: int | None = None,
    match: bool | None = None,
    untrained: Literal["keep", "uniform"] | None = None,
    settings: Settings | None = None,
    norms: NormTable = KNOWN_NORMS,
) -> SwapPlan:
    """Decide for every norm site of `model` whether and how it is swapped; the model is not changed.

    Args:
        model: any module. All names are those of the model inside wrappers such as DataParallel.
        example_inputs: a tensor (N, C, ...), a tuple of positional or a dict of keyword arguments for one forward pass
            in evaluation mode. Without it the spatial sizes are unknown.
        options: a `SwapOptions`, in place of the arguments from `include` to `settings`.
        include, exclude, kinds, gate, branches, bn_statistics, train_frozen_gates, synchronize: fields of
            `SwapOptions`, which explains them; None (default) is the default there.
        start, num_groups, match, untrained, settings: the other fields of `SwapOptions`.
        norms: the table of norm classes: `KNOWN_NORMS`, or `KNOWN_NORMS | {TheirNorm: read_batch_norm}`.

    Returns:
        The plan. Its swaps and skips together are all sites that were found; `print(plan)` shows it as a table.

    Raises:
        PlanError: a filter matches no site, or an option is unknown or wrong.
        ModelError: the forward pass on `example_inputs` failed.
        ArgumentError: an argument is of a wrong type.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> normswap.plan_swaps(model, torch.randn(2, 3, 16, 16))
        SwapPlan(torch.nn.modules.container.Sequential, 1 swap, 0 skips)
        >>> wide = normswap.plan_swaps(model, include=lambda module, fqn: module.num_features >= 8)
        >>> [swap.fqn for swap in wide.swaps]
        ['1']
    """
    chosen = choose_options(
        options,
        {
            "include": include,
            "exclude": exclude,
            "kinds": kinds,
            "gate": gate,
            "branches": branches,
            "bn_statistics": bn_statistics,
            "train_frozen_gates": train_frozen_gates,
            "synchronize": synchronize,
            "start": start,
            "num_groups": num_groups,
            "match": match,
            "untrained": untrained,
            "settings": settings,
        },
    )
    return make_plan(model, example_inputs, chosen, norms)


def make_plan(model: nn.Module, example_inputs: Any, options: SwapOptions, norms: NormTable = KNOWN_NORMS) -> SwapPlan:
    """Do what `plan_swaps` does, with options that are checked already."""
    return plan_and_observe(model, example_inputs, options, norms)[0]


def plan_and_observe(
    model: nn.Module, example_inputs: Any, options: SwapOptions, norms: NormTable = KNOWN_NORMS
) -> tuple[SwapPlan, Observation | None]:
    """Do what `make_plan` does, and return the observed forward pass too, so that a verification need not repeat it."""
    model = unwrap(model)
    sites, observation = observe_sites(model, example_inputs, norms=norms)
    names = [(site.fqn, *site.aliases) for site in sites]
    modules = _modules_of_sites(model, sites)
    included = first_matching_patterns(options.include, names, modules=modules)
    excluded = first_matching_patterns(options.exclude, names, modules=modules)
    site_settings = resolve_settings(options.settings, names)
    swaps: list[Swap] = []
    skips: list[Skip] = []
    size_dependent: list[NormSite] = []
    for site in sites:
        reason = _skip_reason(site, options, included.get(site.fqn), excluded.get(site.fqn))
        decision = _decide_site(site, options, site_settings[site.fqn]) if reason is None else reason
        if reason is None and "in" in _allowed_branches(site, options, site_settings[site.fqn]):
            size_dependent.append(site)
        if isinstance(decision, Swap):
            swaps.append(decision)
        else:
            skips.append(Skip(site.fqn, site.class_name, site.kind, decision))
    swapped = {swap.fqn for swap in swaps}
    notes = [
        *input_notes(example_inputs, [site.fqn for site in sites if site.fqn in swapped and not site.registered]),
        *_size_notes(model, example_inputs, size_dependent, norms),
        *synchronization_notes(swaps, {site.fqn for site in sites if site.synchronize}),
        *kept_notes(swaps, {site.fqn for site in sites if _stays_in_evaluation(site)}, options.bn_statistics),
        *statistics_notes(swaps, {site.fqn for site in sites if site.has_running_stats}),
        *unused_settings(options.settings, names, swapped),
        *swap_notes(swaps),
    ]
    inputs = None if example_inputs is None else describe_shapes(example_inputs)
    return SwapPlan(tuple(swaps), tuple(skips), class_name(model), inputs, tuple(notes)), observation


def _modules_of_sites(model: nn.Module, sites: Sequence[NormSite]) -> dict[str, nn.Module]:
    """The module of each site by its fqn: for a functional site, the one whose forward makes the call."""
    by_name = modules_by_name(model)
    return {site.fqn: by_name[site.fqn if site.owner is None else site.owner] for site in sites}


# --- decisions --------------------------------------------------------------------------------------------------------


def _skip_reason(
    site: NormSite, options: SwapOptions, included: SiteFilter | None, excluded: SiteFilter | None
) -> str | None:
    """Why a site is not swapped, whatever its branches are."""
    if site.problem is not None:
        return site.problem
    if excluded is not None:
        return f"excluded by {describe_filter(excluded)}"
    if options.include and included is None:
        return "no filter of include matches it"
    kind = base_kind(site.kind)
    if kind not in options.kinds:
        wanted = tuple(word for word in KINDS if word == kind or word in options.kinds)
        why = "kinds= does not include" if kind == "bn" else NO_BATCH_STATISTICS
        return f"is {KINDS[kind][1]}, which {why}; pass kinds={wanted} to swap it"
    return None


def _decide_site(site: NormSite, options: SwapOptions, site_settings: SiteSettings) -> Swap | str:
    """The swap of a site, or the reason why it is skipped."""
    start = _start(site, options, site_settings)
    allowed = _allowed_branches(site, options, site_settings)
    branches = tuple(branch for branch in _usable_branches(site, start) if branch in allowed)
    if len(branches) == 1 and start is None:
        return _single_branch_reason(site, branches[0], allowed)
    if not branches:
        return _no_branch_reason(site, start)
    gate = site_settings.get("gate", options.gate)
    is_matched = gate == "simplex" and site.has_running_stats and base_kind(site.kind) == "bn" and branches != ("bn",)
    swap = Swap(
        fqn=site.fqn,
        class_name=site.class_name,
        num_features=site.num_features,
        gate=gate,
        branches=branches,
        bn_statistics=site_settings.get("bn_statistics", _default_statistics(site, options))
        if "bn" in branches
        else "batch",
        train_gates=len(branches) > 1
        and site_settings.get("train_gates", site.trainable or options.train_frozen_gates),
        kind=site.kind,
        owner=site.owner,
        synchronize="bn" in branches and site_settings.get("synchronize", site.synchronize or options.synchronize),
        start=start,
        num_groups=_num_groups(site, options, site_settings, start) if "ln" in branches else 1,
        matched=is_matched and site_settings.get("match", options.match),
        untrained=site.untrained,
    )
    return _new_statistics_problem(site, swap) or swap


def _default_statistics(site: NormSite, options: SwapOptions) -> BnStatistics:
    """The statistics of the `bn` branch without settings: the batch where there are no running statistics yet."""
    if site.frozen or _stays_in_evaluation(site):
        return "running"
    return "batch" if options.bn_statistics == "running" and not site.has_running_stats else options.bn_statistics


def _start(site: NormSite, options: SwapOptions, site_settings: SiteSettings) -> Start | None:
    """Where a Batch Normalization without `bn` starts; None for a site that starts at its old norm."""
    if base_kind(site.kind) != "bn":
        for name in ("start", "num_groups"):
            if site_settings.get(name) is not None:
                raise PlanError(
                    f"settings of {site.fqn!r}: {name}: expected a Batch Normalization, got {KINDS[site.kind][1]}, "
                    f"which has no batch statistics: leave {name} out of its settings"
                )
        return None
    untrained_start = "uniform" if site.untrained and options.untrained == "uniform" else options.start
    start: Start | None = site_settings.get("start", untrained_start)
    try:
        check_start_gate(start, site_settings.get("gate", options.gate))
    except PlanError as error:
        raise PlanError(f"settings of {site.fqn!r}: {error}") from None
    return start


def _num_groups(site: NormSite, options: SwapOptions, site_settings: SiteSettings, start: Start | None) -> int:
    """The groups of channels of the `ln` branch, each with enough values."""
    if base_kind(site.kind) != "bn":
        return site.num_groups
    if start == "ln" and "num_groups" in site_settings:
        raise PlanError(f"settings of {site.fqn!r}: num_groups: start='ln' has one group: pass start='gn'")
    wanted = site_settings.get("num_groups", options.num_groups if start == "gn" else 1)
    groups = math.gcd(wanted, site.num_features)
    least = _MIN_LN_VALUES if site.positions == 1 else 1
    return next(g for g in range(groups, 0, -1) if groups % g == 0 and (g == 1 or site.num_features // g >= least))


def _allowed_branches(site: NormSite, options: SwapOptions, site_settings: SiteSettings) -> tuple[Branch, ...]:
    """The branches that the user allows; `bn` at a norm of another kind only if settings ask for it."""
    start = _start(site, options, site_settings)
    without_bn = start is not None or branch_of_kind(site.kind) != "bn"
    general = tuple(branch for branch in options.branches or BRANCHES if not (without_bn and branch == "bn"))
    try:
        return check_starting_branch(site_settings.get("branches", general), site.kind, start)
    except PlanError as error:
        raise PlanError(f"settings of {site.fqn!r}: {error}") from None


def _usable_branches(site: NormSite, start: Start | None = None) -> tuple[Branch, ...]:
    """The branches whose variance is not trivial: IN needs two positions, LN more than a few values.

    If IN and LN are the same (one channel per group), or the old norm has a trivial variance itself, its own branch
    stays.
    """
    first, single = "ln" if start else branch_of_kind(site.kind), site.positions == 1
    channels = _channels(site) // site.num_groups
    dropped = {"in"} if single or (channels == 1 and first == "ln") else set()
    is_erased = single and channels < _MIN_LN_VALUES
    if channels == 1 or is_erased:
        dropped.add("ln")
    usable = (branch for branch in BRANCHES if branch == first or branch not in dropped)
    return tuple(branch for branch in usable if start is None or (branch != "bn" and not is_erased))


def _channels(site: NormSite) -> int:
    """The fewest channels of the observed inputs; an InstanceNorm without weight takes any number of them."""
    return min(shape[1] for shape in site.shapes) if site.shapes else site.num_features


def _no_branch_reason(site: NormSite, start: Start | None) -> str:
    channels = _channels(site)
    return (
        f"{pluralize(channels, 'channel')} at one spatial position have no variance without the batch, and "
        f"start={start!r} would erase the signal: left as it is; if real inputs are larger, pass example_inputs= of "
        "their size"
    )


def _single_branch_reason(site: NormSite, left: Branch, allowed: tuple[Branch, ...]) -> str:
    if allowed == (left,):
        return f"only the branch {left} is allowed: nothing to switch to"
    single, channels = site.positions == 1, _channels(site)
    reason = (
        f"{pluralize(channels, 'channel')}{f' in {site.num_groups} groups' if site.num_groups > 1 else ''}"
        f"{' at one spatial position' * single} "
        f"leave{'s' * (channels == 1)} only the branch {left}: nothing to switch to"
    )
    return reason + "; if real inputs are larger, pass example_inputs= of their size" * single


def _new_statistics_problem(site: NormSite, swap: Swap) -> str | None:
    if not swap.creates_running_stats:
        return None
    if swap.bn_statistics == "running":
        return (
            f"its `bn` branch cannot use running statistics, {NEVER_FILLED}: set bn_statistics to 'batch' or 'renorm', "
            "or leave `bn` out of its branches"
        )
    observed = {shape[1] for shape in site.shapes or ()}
    if observed and observed != {site.num_features}:
        return (
            f"has {site.num_features} channels, but its inputs have {sorted(observed)}: correct num_features, or leave "
            "`bn` out of its branches"
        )
    return None


def _stays_in_evaluation(site: NormSite) -> bool:
    """Whether the model's own `train()` leaves a batch norm in evaluation mode, with its running statistics."""
    return site.kept_in_evaluation and site.kind == "bn" and not site.frozen


# --- notes ------------------------------------------------------------------------------------------------------------


def _size_notes(model: nn.Module, inputs: Any, sites: Sequence[NormSite], norms: NormTable) -> list[str]:
    """Notes on sites that have other branches at the model's default input size.

    The model runs at that size only if the branches of some site may differ.
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
    except ModelError as error:
        _logger.debug("no note on the input size: the model failed at its default size %s: %s", size, error)
        return []
    pairs = [
        ("in" in _usable_branches(site), "in" in _usable_branches(resized_sites[site.fqn]))
        for site in sites
        if site.fqn in resized_sites
    ]
    given, wanted = ("x".join(map(str, shape)) for shape in (observed.shape[-2:], default[1:]))
    use = f"pass example_inputs=torch.randn({', '.join(map(str, size))})"
    notes = []
    if count := pairs.count((False, True)):
        notes.append(
            f"The example input ({given}) is smaller than the model's default ({wanted}). {pluralize(count, 'layer')} "
            f"with a 1x1 map here {_were(count)} planned without instance norm; {use}."
        )
    if count := pairs.count((True, False)):
        notes.append(
            f"The example input ({given}) is larger than the model's default ({wanted}). {pluralize(count, 'layer')} "
            f"with a 1x1 map at {wanted} {_were(count)} planned with instance norm, which has no variance there; {use}."
        )
    return notes


def _may_differ(site: NormSite, observed: Tensor, default: tuple[int, ...]) -> bool:
    """Whether a map of the site may be 1x1 at one of the two input sizes only, if maps scale with the input."""
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


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def _default_size(model: nn.Module) -> tuple[int, ...] | None:
    """The input size (C, H, W) that timm's configuration gives the model, if it has one."""
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    return tuple(size) if size else None


# --- plans made from tensor names -------------------------------------------------------------------------------------


def complete_plan(model: nn.Module, plan: SwapPlan, *, prefix: str = "") -> SwapPlan:
    """Return a plan for `model` if `plan` was made from tensor names only, else `plan` itself.

    Args:
        prefix: the names in the plan start with it, those of the model do not.

    Raises:
        PlanError: a planned site is not in the model, or is not a norm that can be swapped.
    """
    incomplete = [swap for swap in plan.swaps if swap.class_name == ANY_CLASS]
    if not incomplete:
        return plan
    site_settings: Mapping[str, SiteSettings] = {
        f"re:{re.escape(swap.fqn.removeprefix(prefix))}": {
            "gate": swap.gate,
            "branches": swap.branches,
            "match": swap.matched,
        }
        for swap in incomplete
    }
    options = SwapOptions(
        include=tuple(site_settings), bn_statistics=incomplete[0].bn_statistics, settings=site_settings
    )
    completed = with_untrained(make_plan(model, None, options), [fqn.removeprefix(prefix) for fqn in plan.untrained])
    by_name = modules_by_name(unwrap(model))
    swapped = {id(by_name[swap.fqn]) for swap in completed.swaps if swap.fqn in by_name}
    names = [swap.fqn.removeprefix(prefix) for swap in incomplete]
    missing = [name for name in names if id(by_name.get(name)) not in swapped]
    if missing:
        reason = next(
            (skip.reason for skip in completed.skips if skip.fqn == missing[0]), "it is not a norm of a known class"
        )
        count = pluralize(len(missing), "site")
        raise PlanError(f"{count} of the plan cannot be swapped in this model, such as {missing[0]}: {reason}")
    return completed
