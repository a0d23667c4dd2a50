"""The plan: an immutable, tensor-free list of swaps and skips, each with its reason. All decisions are made here.

A plan can be printed, stored as JSON, edited and fed back; `conversion.apply_plan` carries it out to the letter and
decides nothing. swaps + skips = sites found.
"""

import difflib
import fnmatch
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from torch import nn
from torch.utils._pytree import tree_leaves

from normswap.errors import PlanError
from normswap.layers.importance import (
    BN_STATISTICS,
    BRANCHES,
    BnStatistics,
    Branch,
    Gate,
    check_branches,
    check_gate,
)
from normswap.surgery.norm_site import NormSite
from normswap.surgery.norms import KNOWN_NORMS, Norms
from normswap.surgery.observation import describe_shapes
from normswap.surgery.sites import find_norm_sites
from normswap.surgery.tree import class_name

PLAN_VERSION = 1

# LN of fewer values than this at one position erases the signal (two values normalise to +1 and -1).
_MIN_LN_VALUES = 8


@dataclass(frozen=True)
class Swap:
    """A site that becomes Switchable Normalization, and with which options.

    `train_gates` tells whether its importance weights require a gradient; `owner` is the module whose forward is
    rewritten, for a functional site; `synchronize` records that the norm pooled its statistics over processes.
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


@dataclass(frozen=True)
class Skip:
    """A site that stays as it is, and the reason, which tells the user what to do."""

    fqn: str
    class_name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class SwapPlan:
    """All decisions for one model: `swaps` + `skips` = sites found.

    `inputs` holds the shapes of the example input it was made with, `notes` what the user should know of it.
    """

    swaps: tuple[Swap, ...]
    skips: tuple[Skip, ...]
    model_class: str
    inputs: str | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain lists, dicts, strings and numbers."""
        return {"version": PLAN_VERSION, **asdict(self)}

    def to_json(self) -> str:
        """Return the plan as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the plan in `data`.

        Raises:
            PlanError: not a plan, of a newer version, or a field is missing, unknown or of the wrong kind.
        """
        data = _checked(data, {"version": int, **_types(cls)}, "the plan")
        if data.pop("version") > PLAN_VERSION:
            raise PlanError(f"the plan is of a newer version than {PLAN_VERSION}: update normswap")
        swaps = tuple(_swap(item) for item in data.pop("swaps"))
        skips = tuple(Skip(**_checked(item, _types(Skip), "a skip")) for item in data.pop("skips"))
        return cls(swaps, skips, data["model_class"], data["inputs"], tuple(data["notes"]))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the plan in a JSON text.

        Raises:
            PlanError: not JSON, or as `from_dict`.
        """
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise PlanError(f"expected a plan as JSON, written by --save-plan; {error}") from None


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


def _types(record: type) -> dict[str, Any]:
    return {field.name: _FIELD_TYPES[field.name] for field in fields(record)}


def _checked(data: Any, types: dict[str, Any], what: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise PlanError(f"expected {what} as a JSON object, got {type(data).__name__}")
    missing, unknown = types.keys() - data.keys(), data.keys() - types.keys()
    if missing or unknown:
        parts = [f"lacks {sorted(missing)}"] * bool(missing) + [f"has unknown fields {sorted(unknown)}"] * bool(unknown)
        raise PlanError(f"{what} {' and '.join(parts)}: expected {sorted(types)}")
    for name, kind in types.items():
        if not isinstance(data[name], kind):
            raise PlanError(f"{what}: {name} has an unexpected value {data[name]!r}")
    return dict(data)


def _swap(data: Any) -> Swap:
    data = _checked(data, _types(Swap), "a swap")
    where = f"swap of {data['fqn']!r}"
    if data["bn_statistics"] not in BN_STATISTICS:
        raise PlanError(f"{where}: expected bn_statistics among {BN_STATISTICS}, got {data['bn_statistics']!r}")
    try:
        return Swap(**{**data, "gate": check_gate(data["gate"]), "branches": _with_bn(data["branches"])})
    except (TypeError, ValueError) as error:  # of a value that is no string: unhashable, or no branch
        raise PlanError(f"{where}: {error}") from None


def _with_bn(branches: Sequence[str]) -> tuple[Branch, ...]:
    chosen = check_branches(branches)
    if "bn" not in chosen:
        raise PlanError(f"branches: expected `bn` among them, the function starts there; got {chosen}")
    return chosen


def plan_swaps(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    gate: Gate = "simplex",
    branches: Sequence[Branch] | None = None,
    bn_statistics: BnStatistics = "batch",
    train_frozen_gates: bool = False,
    norms: Norms = KNOWN_NORMS,
) -> SwapPlan:
    """Decide for every norm site of `model` whether and how it is swapped. The model is left as it is.

    Args:
        example_inputs: tensor, tuple or dict for one forward pass; without it spatial sizes are unknown.
        include, exclude: glob patterns on fqns, or regular expressions after `re:`; exclude wins.
        gate: `"simplex"` starts as exactly the same function, `"softmax"` at the uniform mix, which is another.
        branches: restrict the branches that a site would get by its shape; must hold `bn`.
        bn_statistics: of sites that are not frozen; frozen ones always use the running statistics.
        train_frozen_gates: let gates learn at sites whose own parameters are all frozen.
        norms: table of known norm classes.

    Raises:
        PlanError: a pattern matches no site, or an option is unknown.
        ModelError: the forward pass on `example_inputs` failed.
    """
    if bn_statistics not in BN_STATISTICS:
        raise PlanError(f"bn_statistics: expected one of {BN_STATISTICS}, got {bn_statistics!r}")
    allowed = _with_bn(BRANCHES if branches is None else branches)
    sites = find_norm_sites(model, example_inputs, norms=norms)
    included, excluded = _matches(include, sites), _matches(exclude, sites)
    swaps: list[Swap] = []
    skips: list[Skip] = []
    for site in sites:
        chosen = tuple(branch for branch in _branches(site) if branch in allowed)
        reason = _skip_reason(site, chosen, allowed, bool(include), included.get(site), excluded.get(site))
        if reason is not None:
            skips.append(Skip(site.fqn, site.class_name, site.kind, reason))
            continue
        swaps.append(
            Swap(
                fqn=site.fqn,
                class_name=site.class_name,
                num_features=site.num_features,
                gate=check_gate(gate),
                branches=chosen,
                bn_statistics="running" if site.frozen else bn_statistics,
                train_gates=site.trainable or train_frozen_gates,
                kind=site.kind,
                owner=site.owner,
                synchronize=site.synchronize,
            )
        )
    inputs = None if example_inputs is None else describe_shapes(example_inputs)
    notes = tuple(_notes(model, example_inputs, swaps, sites))
    return SwapPlan(tuple(swaps), tuple(skips), class_name(model), inputs, notes)


def _branches(site: NormSite) -> tuple[Branch, ...]:
    """The branches that leave a signal: IN needs more than one position, LN more than a few values."""
    single = site.positions == 1
    dropped = {"in"} if single else set()
    if site.num_features == 1 or (single and site.num_features < _MIN_LN_VALUES):
        dropped.add("ln")
    return tuple(branch for branch in BRANCHES if branch not in dropped)


def _skip_reason(
    site: NormSite,
    chosen: tuple[Branch, ...],
    allowed: tuple[Branch, ...],
    filtered: bool,
    included: str | None,
    excluded: str | None,
) -> str | None:
    if site.problem is not None:
        return site.problem
    if excluded is not None:
        return f"excluded by the pattern {excluded!r}"
    if filtered and included is None:
        return "matches no include pattern"
    if chosen == ("bn",):
        if allowed == ("bn",):
            return "only the branch bn is allowed: nothing to switch to"
        return (
            f"{site.num_features} channels at one spatial position leave only the branch bn: nothing to switch to; "
            "plan with an input of the real size if this one is smaller"
        )
    return None


def _matches(patterns: Iterable[str], sites: Sequence[NormSite]) -> dict[NormSite, str]:
    """Return the first matching pattern of each site that one matches.

    Raises:
        PlanError: a pattern is no regular expression, or matches nothing.
    """
    found: dict[NormSite, str] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = [site for site in sites if any(_match(pattern, name) for name in (site.fqn, *site.aliases))]
        if not hits:
            names = [site.fqn for site in sites]
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
            raise PlanError(f"the pattern {pattern!r} matches none of the {len(names)} norm sites; nearest: {near}")
        for site in hits:
            found.setdefault(site, pattern)
    return found


def _match(pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise PlanError(f"expected a regular expression after `re:`, got {pattern!r}: {error}") from None


def _notes(model: nn.Module, inputs: Any, swaps: list[Swap], sites: Sequence[NormSite]) -> list[str]:
    notes = []
    if inputs is None:
        notes.append(
            "planned without an example input: spatial sizes are unknown, and a site that meets one position raises "
            "once `in` has weight; give an input of the real size"
        )
    default = _default_size(model)
    fed = next((tuple(leaf.shape) for leaf in tree_leaves(inputs) if hasattr(leaf, "shape") and leaf.dim() == 4), None)
    if default and fed and (fed[-2] < default[-2] or fed[-1] < default[-1]):
        notes.append(
            f"planned at {fed[-2]}x{fed[-1]}, below the model's default {default[-2]}x{default[-1]}: sites with one "
            "position here may have more there"
        )
    unregistered = [site.fqn for site in sites if not site.registered and site.problem is None]
    if unregistered:
        notes.append(
            f"in no state dict, since they are held in a Python container only: {', '.join(unregistered)}; use "
            "nn.ModuleList if they are to be saved"
        )
    if any(swap.gate == "softmax" for swap in swaps):
        notes.append("softmax gates start at the uniform mix: the converted model is not the same function")
    return notes


def _default_size(model: nn.Module) -> tuple[int, ...] | None:
    """The input size (C, H, W) that timm's configuration gives the model, if it has one."""
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    return tuple(size) if size else None
