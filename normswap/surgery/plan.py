"""The plan: an immutable list of swaps and skips without tensors, each with its reason.

`planning` makes a plan. It can be printed, stored as JSON and edited; `conversion.apply_plan` applies it exactly and
decides nothing. Swaps and skips together are all sites that were found.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NotRequired, Self, TypedDict, TypeVar

from normswap.errors import PlanError
from normswap.layers.gating import BnStatistics, Branch, Gate
from normswap.schema import SchemaError, read_record
from normswap.surgery.arguments import require_type
from normswap.surgery.selection import (
    Settings,
    SiteSettings,
    branch_of_kind,
    check_starting_branch,
    resolve_settings,
)
from normswap.text import pluralize, printable_as

T = TypeVar("T")

PLAN_VERSION = 1
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

    @property
    def vertex(self) -> Branch:
        """The branch that computes the function of the old norm; a simplex gate starts with weight 1 there."""
        return branch_of_kind(self.kind)

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

    def __repr__(self) -> str:
        return (
            f"SwapPlan({self.model_class}, {pluralize(len(self.swaps), 'swap')}, {pluralize(len(self.skips), 'skip')})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain lists, dicts, strings and numbers."""
        return {"version": PLAN_VERSION, **asdict(self)}

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
        return _check_consistent(replace(swap, branches=check_starting_branch(swap.branches, swap.kind)))
    except PlanError as error:
        raise PlanError(f"swap of {swap.fqn!r}: {error}") from None


def _check_consistent(swap: Swap) -> Swap:
    if swap.creates_running_stats and swap.bn_statistics == "running":
        raise PlanError(f"bn_statistics: expected 'batch' or 'renorm', {NEVER_FILLED}; got 'running'")
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
    if any(swap.gate == "softmax" for swap in swaps):
        notes.append("Softmax gates start at the uniform mix: the converted model computes another function.")
    return notes


def list_names(names: Sequence[str]) -> str:
    """Return the first names of sites for a message, and how many more there are."""
    more = f" (+{len(names) - _MAX_LISTED} more)" if len(names) > _MAX_LISTED else ""
    return ", ".join(name or "the model" for name in names[:_MAX_LISTED]) + more


def _apply_settings(swap: Swap, site_settings: SiteSettings) -> Swap:
    try:
        requested = check_starting_branch(site_settings.get("branches", swap.branches), swap.kind)
        kept = tuple(b for b in requested if b in swap.branches or (b == "bn" and swap.vertex != "bn"))
        if len(kept) == 1 and "branches" in site_settings:
            raise PlanError(f"branches: {requested} leave only {kept[0]!r} of {swap.branches}: nothing to switch to")
        changes: dict[str, Any] = {**site_settings, "branches": kept}
        return _check_consistent(replace(swap, **changes))
    except PlanError as error:
        raise PlanError(f"settings of {swap.fqn!r}: {error}") from None
