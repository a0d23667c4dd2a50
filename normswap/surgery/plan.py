"""The plan: an immutable list of swaps and skips without tensors, each with its reason.

`planning` makes a plan. It can be printed, stored as JSON and edited; `conversion.apply_plan` applies it exactly and
decides nothing. Swaps and skips together are all sites that were found.
"""

import json
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NotRequired, Self, TypedDict, TypeVar

from normswap.errors import PlanError
from normswap.layers.gating import BnStatistics, Branch, Gate
from normswap.schema import SchemaError, read_record
from normswap.surgery.arguments import require_type
from normswap.surgery.selection import (
    KINDS,
    Names,
    Settings,
    SiteSettings,
    Start,
    base_kind,
    branch_of_kind,
    check_num_groups,
    check_start_gate,
    check_starting_branch,
    matched,
    resolve_settings,
)
from normswap.text import pluralize, printable_as

T = TypeVar("T")

# Plans of version 1 have no start, groups and matched branches.
PLAN_VERSION = 2
_ADDED_FIELDS: Mapping[str, Any] = {"start": None, "num_groups": 1, "matched": False, "untrained": False}
# The class of a norm of which only the tensor names are known.
ANY_CLASS = "*"
_MAX_LISTED = 5


@dataclass(frozen=True)
class Swap:
    """A site that becomes Switchable Normalization, with its options.

    Attributes:
        fqn, class_name, kind: the name of the site, the class (or function) of the old norm and its kind.
        num_features: the number of channels.
        gate, branches, bn_statistics: the options of the new layer.
        train_gates: whether the gate parameters require a gradient.
        owner: for a functional site, the module whose forward is rewritten; None for a module site.
        synchronize: whether the `bn` branch uses the joint batch of all processes in training.
        start: where a Batch Normalization without `bn` branch starts: at `ln`, at `ln` of groups of channels (`gn`) or
            at equal weights (`uniform`); None if the site starts at its old norm.
        num_groups: the number of groups of channels of the `ln` branch.
        matched: whether the branches are matched to the running statistics of the old norm.
        untrained: whether the running statistics of the old norm were never updated.
    """

    fqn: str
    class_name: str
    num_features: int
    gate: Gate
    branches: tuple[Branch, ...]
    bn_statistics: BnStatistics
    train_gates: bool
    kind: str = "bn"
    owner: str | None = None
    synchronize: bool = False
    start: Start | None = None
    num_groups: int = 1
    matched: bool = False
    untrained: bool = False

    @property
    def vertex(self) -> Branch:
        """The branch where a simplex gate starts with weight 1: that of the old norm, or `ln` for such a start."""
        return "ln" if self.start in ("ln", "gn") else branch_of_kind(self.kind)

    @property
    def creates_running_stats(self) -> bool:
        """Whether the `bn` branch needs new running statistics, because the old norm has none."""
        return self.vertex != "bn" and "bn" in self.branches

    @property
    def starts_statistics(self) -> bool:
        """The old name of `creates_running_stats`."""
        warnings.warn(
            "Swap.starts_statistics is creates_running_stats now: use that name", DeprecationWarning, stacklevel=2
        )
        return self.creates_running_stats


@dataclass(frozen=True)
class Skip:
    """A site that stays as it is, with a reason that says what to do to have it swapped."""

    fqn: str
    class_name: str
    kind: str
    reason: str


@printable_as("plan")
@dataclass(frozen=True, repr=False)
class SwapPlan:
    """All decisions for one model; `print` shows them as a table.

    Attributes:
        swaps, skips: the decisions, which together are all sites that were found.
        model_class: the class of the model.
        inputs: the shapes of the example inputs, None if there were none.
        notes: sentences on what the user should know.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> plan = normswap.plan_swaps(model, torch.randn(2, 3, 16, 16))
        >>> [swap.fqn for swap in plan.swaps]
        ['1']
        >>> normswap.SwapPlan.from_json(plan.to_json()) == plan
        True
    """

    swaps: tuple[Swap, ...]
    skips: tuple[Skip, ...]
    model_class: str
    inputs: str | None = None
    notes: tuple[str, ...] = ()

    __module__ = "normswap"

    @property
    def untrained(self) -> tuple[str, ...]:
        """The swapped sites whose running statistics were never updated."""
        return tuple(swap.fqn for swap in self.swaps if swap.untrained)

    def __repr__(self) -> str:
        return (
            f"SwapPlan({self.model_class}, {pluralize(len(self.swaps), 'swap')}, {pluralize(len(self.skips), 'skip')})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain lists, dicts, strings and numbers; of version 1 if older versions can apply it."""
        data = asdict(self)
        if all(getattr(swap, name) == default for swap in self.swaps for name, default in _ADDED_FIELDS.items()):
            for swap in data["swaps"]:
                for name in _ADDED_FIELDS:
                    del swap[name]
            return {"version": 1, **data}
        return {"version": PLAN_VERSION, **data}

    def to_json(self) -> str:
        """Return the plan as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the plan in `data`, with the changes of its optional `settings`.

        Settings change the swaps that their patterns match. Branches that a swap does not have stay left out, since
        the shape of its site gives them no variance.

        Args:
            data: what `to_dict` returned, or JSON of it; `settings` as in `SwapOptions` may be added.

        Raises:
            PlanError: it is not a plan or a newer version; a field is missing, unknown or of a wrong type; settings
                are wrong, match no swap or leave one branch.
        """
        if isinstance(data, Mapping) and type(version := data.get("version")) is int and version > PLAN_VERSION:
            raise PlanError(f"the plan has version {version}, and this normswap reads {PLAN_VERSION}: update normswap")
        document = _read(_PlanDocument, data, "the plan")
        swaps = tuple(_check_swap(swap) for swap in document["swaps"])
        plan = cls(swaps, document["skips"], document["model_class"], document["inputs"], document["notes"])
        return plan._with_settings(document["settings"]) if "settings" in document else plan

    def _with_settings(self, settings: Settings) -> Self:
        site_settings = resolve_settings(settings, [(swap.fqn,) for swap in self.swaps], "swaps of the plan")
        swaps = tuple(_apply_settings(swap, site_settings[swap.fqn]) for swap in self.swaps)
        return replace(self, swaps=swaps, notes=tuple(dict.fromkeys((*self.notes, *swap_notes(swaps)))))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the plan in a JSON text.

        Raises:
            PlanError: it is not JSON, or as `from_dict`.
        """
        require_type(text, str | bytes, "text", "a plan as JSON, such as Path('plan.json').read_text()")
        try:
            data = json.loads(text)
        except (
            ValueError,
            RecursionError,
        ) as error:  # a ValueError also for bytes that are not UTF-8, and huge numbers
            raise PlanError(
                f"expected a plan as JSON, as SwapPlan.to_json() writes it (normswap convert --save-plan); {error}"
            ) from None
        return cls.from_dict(data)


class _PlanDocument(TypedDict):
    version: int
    swaps: tuple[Swap, ...]
    skips: tuple[Skip, ...]
    model_class: str
    inputs: str | None
    notes: tuple[str, ...]
    settings: NotRequired[Mapping[str, SiteSettings]]


def require_plan(plan: object) -> None:
    """Refuse a value that is not a `SwapPlan`.

    Raises:
        ArgumentError: it is something else.
    """
    expected = "a SwapPlan (conversion.plan, plan_swaps(model), or SwapPlan.from_json(Path('plan.json').read_text()))"
    require_type(plan, SwapPlan, "plan", expected)


def _read(kind: type[T], data: Any, name: str) -> T:
    try:
        return read_record(kind, data, name)
    except SchemaError as error:
        raise PlanError(str(error)) from None


def _check_swap(swap: Swap) -> Swap:
    """Return a swap of a file with its branches in canonical order, if it can be applied."""
    try:
        return _check_consistent(replace(swap, branches=check_starting_branch(swap.branches, swap.kind, swap.start)))
    except PlanError as error:
        raise PlanError(f"swap of {swap.fqn!r}: {error}") from None


def _check_consistent(swap: Swap) -> Swap:
    if swap.creates_running_stats and swap.bn_statistics == "running":
        raise PlanError(f"bn_statistics: expected 'batch' or 'renorm', {NEVER_FILLED}; got 'running'")
    if base_kind(swap.kind) != "bn" and (swap.start is not None or swap.matched):
        name, value, old_norm = ("start", None, swap.start) if swap.start else ("matched", False, swap.matched)
        raise PlanError(f"{name}: expected {value} at {KINDS[swap.kind][1]}; got {old_norm!r}")
    check_start_gate(swap.start, swap.gate)
    if check_num_groups(swap.num_groups) > 1 and swap.num_features % swap.num_groups:
        raise PlanError(f"num_groups: expected a divisor of {swap.num_features} channels, got {swap.num_groups}")
    return swap


# Why new running statistics cannot be used as constants.
NEVER_FILLED = "since the old norm has no running statistics and new ones (mean 0, variance 1) would never be updated"


def swap_notes(swaps: Sequence[Swap]) -> list[str]:
    """Return notes on further changes by these swaps."""
    notes = []
    without_statistics = [swap.fqn for swap in swaps if swap.creates_running_stats]
    if without_statistics:
        notes.append(
            f"The old norms have no running statistics, so the `bn` branches of {list_names(without_statistics)} start "
            "with mean 0 and variance 1: train, or call normswap.update_statistics, before evaluation."
        )
    unfrozen = [swap.fqn for swap in swaps if swap.kind == "frozen bn" and swap.bn_statistics != "running"]
    if unfrozen:
        notes.append(
            "Frozen norms are set to use batch statistics, which changes the function in training: "
            f"{list_names(unfrozen)}."
        )
    started = [swap.fqn for swap in swaps if swap.start is not None]
    if started:
        notes.append(
            f"These sites start without `bn`, so the converted model computes another function: {list_names(started)}. "
            "Measure the distance with normswap.measure_distance."
        )
    if any(swap.gate == "softmax" for swap in swaps):
        notes.append("Softmax gates start at the uniform mix: the converted model computes another function.")
    return notes


def input_notes(inputs: Any, unregistered: Sequence[str]) -> list[str]:
    """Return notes on missing example inputs, and on the swapped sites that are in no state dict."""
    notes = []
    if inputs is None:
        notes.append(
            "Planned without example inputs, so spatial sizes are unknown. At a 1x1 map, a layer moves the weight of "
            "instance norm to layer norm and warns; pass example_inputs= of the real size."
        )
    if unregistered:
        notes.append(
            f"Not in the state dict, since only a Python container refers to them: {list_names(unregistered)}. Use "
            "nn.ModuleList to have them saved."
        )
    return notes


def unused_settings(settings: Settings, names: Sequence[Names], swapped: set[str]) -> list[str]:
    """Return a note for each pattern that matches skipped sites only."""
    unused = [pattern for pattern in settings if swapped.isdisjoint(matched(pattern, names))]
    return [
        f"The settings of {pattern!r} have no effect: the pattern matches only skipped sites." for pattern in unused
    ]


def statistics_notes(swaps: Sequence[Swap], with_statistics: Collection[str]) -> list[str]:
    """Return notes on sites whose running statistics are missing or were never updated.

    Args:
        with_statistics: the fqns of the sites that have running statistics.
    """
    untrained = [swap.fqn for swap in swaps if swap.untrained and swap.bn_statistics == "running"]
    missing = [
        swap.fqn
        for swap in swaps
        if "bn" in swap.branches and swap.fqn not in with_statistics and not swap.creates_running_stats
    ]
    notes = []
    if untrained:
        notes.append(
            "Running statistics that were never updated (mean 0, variance 1) do not normalize: "
            f"{list_names(untrained)}. Compute them with normswap.calibrate(model, batches, only=...), or start these "
            "sites at `in` and `ln` with untrained='uniform'."
        )
    if missing:
        notes.append(f"Without running statistics, as before, these sites depend on the batch: {list_names(missing)}.")
    return notes


def with_untrained(plan: SwapPlan, untrained: Collection[str]) -> SwapPlan:
    """Return a plan whose untrained sites are these: a plan for a model that has no weights yet knows none."""
    swaps = tuple(replace(swap, untrained=swap.fqn in untrained) for swap in plan.swaps)
    fqns = {swap.fqn for swap in swaps}
    outdated = statistics_notes(plan.swaps, fqns)
    notes = [note for note in plan.notes if note not in outdated] + statistics_notes(swaps, fqns)
    return replace(plan, swaps=swaps, notes=tuple(notes))


def synchronization_notes(swaps: Sequence[Swap], synchronized: Collection[str]) -> list[str]:
    """Return a note if sites become synchronized that are not among `synchronized`."""
    new = [swap for swap in swaps if swap.synchronize and swap.fqn not in synchronized]
    if not new:
        return []
    if all(swap.bn_statistics == "running" for swap in new):
        return ["Running statistics are not synchronized: to use the joint batch, pass bn_statistics='batch' too."]
    return [
        "Synchronized although the old norms were not: with several processes, training uses statistics of the joint "
        "batch, which changes the function."
    ]


def kept_notes(swaps: Sequence[Swap], kept_fqns: Collection[str], statistics: BnStatistics) -> list[str]:
    """Return notes on the sites that the model's own `train()` leaves in evaluation mode.

    Args:
        kept_fqns: the fqns of these sites.
        statistics: the statistics of all other `bn` branches.
    """
    running = [swap.fqn for swap in swaps if swap.fqn in kept_fqns and swap.bn_statistics == "running"]
    others = [
        swap.fqn
        for swap in swaps
        if swap.fqn in kept_fqns and "bn" in swap.branches and swap.bn_statistics != "running"
    ]
    notes = []
    if running and statistics != "running":
        notes.append(
            "The model's own train() leaves these norms in evaluation mode, so they use running statistics in training "
            f"too: {list_names(running)}."
        )
    if others:
        notes.append(
            "The model's own train() leaves these norms in evaluation mode, but settings make them use batch "
            f"statistics, which changes the function in training: {list_names(others)}."
        )
    return notes


def list_names(names: Sequence[str]) -> str:
    """Return the first names of sites for a message, and how many more there are."""
    more = f" (+{len(names) - _MAX_LISTED} more)" if len(names) > _MAX_LISTED else ""
    return ", ".join(name or "the model" for name in names[:_MAX_LISTED]) + more


def _apply_settings(swap: Swap, site_settings: SiteSettings) -> Swap:
    try:
        changed = _with_start(swap, site_settings)
        requested = check_starting_branch(site_settings.get("branches", changed.branches), swap.kind, changed.start)
        added = "bn" if swap.vertex != "bn" and swap.start is None else None
        kept = tuple(branch for branch in requested if branch in changed.branches or branch == added)
        if len(kept) == 1 and "branches" in site_settings and changed.start is None:
            raise PlanError(f"branches: {requested} leave only {kept[0]!r} of {swap.branches}: nothing to switch to")
        others: dict[str, Any] = {
            name: value for name, value in site_settings.items() if name not in ("start", "match", "num_groups")
        }
        changed = replace(changed, **{**others, "branches": kept})
        is_matched = site_settings.get("match", swap.matched) and changed.gate == "simplex"
        return _check_consistent(replace(changed, matched=is_matched))
    except PlanError as error:
        raise PlanError(f"settings of {swap.fqn!r}: {error}") from None


def _with_start(swap: Swap, site_settings: SiteSettings) -> Swap:
    """A swap with the start and the number of groups of its settings, and the branches of this start."""
    start: Start | None = site_settings.get("start", swap.start)
    if "num_groups" in site_settings and (start == "ln" or base_kind(swap.kind) != "bn"):
        raise PlanError("num_groups: expected a Batch Normalization that does not start at 'ln': leave num_groups out")
    groups = math.gcd(site_settings.get("num_groups", 32), swap.num_features)
    if start == swap.start:
        return replace(swap, num_groups=groups) if "num_groups" in site_settings else swap
    branches = tuple(branch for branch in swap.branches if branch != "bn")
    if start is None:
        return replace(swap, start=None, branches=(*branches, "bn"), bn_statistics="running", num_groups=1)
    return replace(
        swap, start=start, branches=branches, bn_statistics="batch", num_groups=groups if start == "gn" else 1
    )
