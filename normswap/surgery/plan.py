"""The plan: an immutable, tensor-free list of swaps and skips, each with its reason.

`planning` makes it. A plan can be printed, stored as JSON, edited and fed back; `conversion.apply_plan` carries it out
to the letter and decides nothing. swaps + skips = sites found.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from normswap.errors import PlanError
from normswap.layers.gating import BN_STATISTICS, BnStatistics, Branch, Gate, check_branches, check_gate
from normswap.surgery.arguments import require_type
from normswap.surgery.norms.classes import branch_of_kind
from normswap.surgery.selection import SiteSettings, resolve_settings
from normswap.text import pluralize, printable_as

PLAN_VERSION = 1
# The class of a norm that is known by the names of its tensors only.
ANY_CLASS = "*"


@dataclass(frozen=True)
class Swap:
    """A site that becomes Switchable Normalization, and with which options.

    `train_gates` tells whether its importance weights require a gradient; `owner` is the module whose forward is
    rewritten, for a functional site; `synchronize` tells that its batch is that of all processes.
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
        """The branch that computes what the old norm does, where a simplex gate starts."""
        return branch_of_kind(self.kind)

    @property
    def creates_running_stats(self) -> bool:
        """Whether its `bn` branch has to begin running statistics, since the old norm has none."""
        return self.vertex != "bn" and "bn" in self.branches


@dataclass(frozen=True)
class Skip:
    """A site that stays as it is, and the reason, which tells the user what to do."""

    fqn: str
    class_name: str
    kind: str
    reason: str


@printable_as("plan")
@dataclass(frozen=True, repr=False)
class SwapPlan:
    """All decisions for one model: `swaps` + `skips` = sites found.

    `inputs` holds the shapes of the example input it was made with, `notes` what the user should know of it.
    """

    swaps: tuple[Swap, ...]
    skips: tuple[Skip, ...]
    model_class: str
    inputs: str | None = None
    notes: tuple[str, ...] = ()

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
        """Return the plan in `data`, with its swaps as its optional `settings` say.

        Settings change what is to be swapped, by patterns on the swaps' own names; of their branches those are kept
        that the swap has, since its shape leaves the others no signal.

        Raises:
            PlanError: not a plan, of a newer version, or a field is missing, unknown or of the wrong kind; settings
                are, match no swap, or leave it one branch.
        """
        data = _checked(data, {"version": int, **_field_types(cls)}, "the plan", optional={"settings"})
        if data.pop("version") > PLAN_VERSION:
            raise PlanError(f"the plan is of a newer version than {PLAN_VERSION}: update normswap")
        swaps = tuple(_read_swap(item) for item in data.pop("swaps"))
        skips = tuple(Skip(**_checked(item, _field_types(Skip), "a skip")) for item in data.pop("skips"))
        if not all(isinstance(note, str) for note in data["notes"]):
            raise PlanError(f"the plan: notes has an unexpected value {data['notes']!r:.80}")
        plan = cls(swaps, skips, data["model_class"], data["inputs"], tuple(data["notes"]))
        return plan._with_settings(data["settings"]) if "settings" in data else plan

    def _with_settings(self, settings: Any) -> Self:
        site_settings = resolve_settings(settings, [(swap.fqn,) for swap in self.swaps], "swaps of the plan")
        swaps = tuple(_apply_settings(swap, site_settings[swap.fqn]) for swap in self.swaps)
        return replace(self, swaps=swaps, notes=tuple(dict.fromkeys((*self.notes, *swap_notes(swaps)))))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the plan in a JSON text.

        Raises:
            PlanError: not JSON, or as `from_dict`.
        """
        require_type(text, str | bytes, "text", "a plan as JSON, such as Path('plan.json').read_text()")
        try:
            return cls.from_dict(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            raise PlanError(
                f"expected a plan as JSON, as SwapPlan.to_json() writes it (normswap convert --save-plan); {error}"
            ) from None


def require_plan(plan: object) -> None:
    """Refuse what is no `SwapPlan`.

    Raises:
        ArgumentError: it is something else.
    """
    expected = "a SwapPlan (conversion.plan, plan_swaps(model), or SwapPlan.from_json(Path('plan.json').read_text()))"
    require_type(plan, SwapPlan, "plan", expected)


_FIELD_TYPES: dict[str, Any] = {
    "fqn": str,
    "class_name": str,
    "num_features": int,
    "gate": str,
    "branches": list | tuple,
    "bn_statistics": str,
    "train_gates": bool,
    "kind": str,
    "owner": str | None,
    "synchronize": bool,
    "reason": str,
    "swaps": list | tuple,
    "skips": list | tuple,
    "model_class": str,
    "inputs": str | None,
    "notes": list | tuple,
}


def _field_types(record: type) -> dict[str, Any]:
    return {field.name: _FIELD_TYPES[field.name] for field in fields(record)}


def _checked(data: Any, types: dict[str, Any], what: str, optional: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise PlanError(f"expected {what} as a JSON object, got {type(data).__name__}")
    missing, unknown = types.keys() - data.keys(), data.keys() - types.keys() - (optional or set())
    if missing or unknown:
        parts = [f"lacks {sorted(missing)}"] * bool(missing) + [f"has unknown fields {sorted(unknown)}"] * bool(unknown)
        raise PlanError(f"{what} {' and '.join(parts)}: expected {sorted(types)}")
    for name, kind in types.items():
        if not isinstance(data[name], kind):
            raise PlanError(f"{what}: {name} has an unexpected value {data[name]!r:.80}")
    return dict(data)


def _read_swap(data: Any) -> Swap:
    data = _checked(data, _field_types(Swap), "a swap")
    where = f"swap of {data['fqn']!r}"
    if data["bn_statistics"] not in BN_STATISTICS:
        raise PlanError(f"{where}: expected bn_statistics among {BN_STATISTICS}, got {data['bn_statistics']!r}")
    try:
        branches = check_starting_branch(data["branches"], data["kind"])
        return _check_consistent(Swap(**{**data, "gate": check_gate(data["gate"]), "branches": branches}))
    except (TypeError, ValueError) as error:  # of a value that is no string: unhashable, or no branch
        raise PlanError(f"{where}: {error}") from None


def check_starting_branch(branches: Sequence[str], kind: str) -> tuple[Branch, ...]:
    """Return `branches` in canonical order if a site of `kind` can start among them.

    Raises:
        PlanError: the branch that computes the old norm is missing.
        LayerError: as `check_branches`.
    """
    chosen, vertex = check_branches(branches), branch_of_kind(kind)
    if vertex not in chosen:
        raise PlanError(f"branches: expected `{vertex}` among them, the function starts there; got {chosen}")
    return chosen


def _check_consistent(swap: Swap) -> Swap:
    if swap.creates_running_stats and swap.bn_statistics == "running":
        raise PlanError(f"bn_statistics: expected 'batch' or 'renorm', {NEVER_FILLED}; got 'running'")
    return swap


# Why running statistics that are only begun cannot be used as constants.
NEVER_FILLED = "since running statistics that start at 0 and 1 and are never updated are those of no data"


def swap_notes(swaps: Sequence[Swap]) -> list[str]:
    """Return what the user should know of these swaps."""
    notes = []
    without_statistics = [swap.fqn for swap in swaps if swap.creates_running_stats]
    if without_statistics:
        notes.append(
            f"begin running statistics, which say nothing before the first batches of training: {', '.join(without_statistics)}"
        )
    unfrozen = [swap.fqn for swap in swaps if swap.kind == "frozen bn" and swap.bn_statistics != "running"]
    if unfrozen:
        notes.append(
            f"frozen, but set to use batch statistics, which is another function in training: {', '.join(unfrozen)}"
        )
    if any(swap.gate == "softmax" for swap in swaps):
        notes.append("softmax gates start at the uniform mix: the converted model is not the same function")
    return notes


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
