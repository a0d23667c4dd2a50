"""Settings by pattern: what is said of single sites, over what the arguments say of all.

An entry maps a pattern to some of `gate`, `branches`, `bn_statistics`, `train_gates` and `synchronize`. Where several
patterns match one site the later entry wins, key by key.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

from normswap.errors import LayerError, PlanError
from normswap.layers.importance import (
    BnStatistics,
    Branch,
    Gate,
    check_bn_statistics,
    check_branches,
    check_gate,
)
from normswap.surgery.patterns import Names, matched


class SiteSettings(TypedDict, total=False):
    """What can be set for single sites; `train_gates` says whether their importance weights learn, `synchronize`
    whether their batch is that of all processes.
    """

    gate: Gate
    branches: Sequence[Branch]
    bn_statistics: BnStatistics
    train_gates: bool
    synchronize: bool


Settings = Mapping[str, SiteSettings]


def settle(settings: Any, sites: Sequence[Names], what: str = "norm sites") -> dict[str, SiteSettings]:
    """Return by fqn what `settings` say of each site, checked.

    Args:
        settings: mapping from patterns to mappings; it may come from a file.
        sites: all names of each site.
        what: what the sites are called in the error.

    Raises:
        PlanError: not such a mapping, an unknown key, a bad value, or a pattern that matches nothing.
    """
    found = {names[0]: SiteSettings() for names in sites}
    for pattern, entry in _mapping(settings, "settings", {"layer4.*": _EXAMPLE}).items():
        checked = _checked(pattern, entry)
        for fqn in matched(pattern, sites, what):
            found[fqn].update(checked)
    return found


def _checked(pattern: str, entry: Any) -> SiteSettings:
    checked: dict[str, Any] = {}
    for key, value in _mapping(entry, f"settings of {pattern!r}", _EXAMPLE).items():
        if key not in _CHECKS:
            raise PlanError(f"settings of {pattern!r}: expected keys among {sorted(_CHECKS)}, got {key!r}")
        try:
            checked[key] = _CHECKS[key](value)
        except (LayerError, TypeError) as error:  # of a value that is no string: unhashable, or no sequence
            raise PlanError(f"settings of {pattern!r}: {error}") from None
    return checked  # type: ignore[return-value]


def _mapping(value: Any, what: str, example: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise PlanError(f"{what}: expected a mapping from names such as {example}, got {value!r}")
    return value


def _check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise LayerError(f"{name}: expected True or False, got {value!r}")
    return value


_EXAMPLE = {"branches": ["ln", "bn"]}

_CHECKS: Mapping[str, Callable[[Any], Any]] = {
    "gate": check_gate,
    "branches": check_branches,
    "bn_statistics": check_bn_statistics,
    "train_gates": partial(_check_flag, "train_gates"),
    "synchronize": partial(_check_flag, "synchronize"),
}
