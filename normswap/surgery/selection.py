"""Settings by pattern: what is said of single sites, over what the arguments say of all.

An entry maps a pattern to some of `gate`, `branches`, `bn_statistics`, `train_gates` and `synchronize`. Where several
patterns match one site the later entry wins, key by key.
"""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

from normswap.errors import LayerError, PlanError
from normswap.layers.gating import BnStatistics, Branch, Gate, check_bn_statistics, check_branches, check_gate
from normswap.surgery.arguments import require_type

# MERGED DOC: Patterns on the names of sites: globs, or regular expressions after `re:`. One that matches nothing is an error.


# All names of one site, the fqn first.
Names = tuple[str, ...]


def matched(pattern: str, sites: Sequence[Names], what: str = "norm sites") -> list[str]:
    """Return the fqns of the sites that have a name which `pattern` matches.

    Args:
        what: what the sites are called in the error.

    Raises:
        PlanError: the pattern is no regular expression, or matches nothing, with the nearest fqns.
    """
    matching = [names[0] for names in sites if any(_matches(pattern, name) for name in names)]
    if not matching:
        fqns = [names[0] for names in sites]
        close_names = difflib.get_close_matches(pattern, fqns, n=3, cutoff=0.4) or fqns[:3]
        raise PlanError(f"the pattern {pattern!r} matches none of the {len(fqns)} {what}; nearest: {close_names}")
    return matching


def first_matching_patterns(
    patterns: Iterable[str], sites: Sequence[Names], what: str = "norm sites"
) -> dict[str, str]:
    """Return by fqn the first of `patterns`, or of the one pattern given alone, that matches a site.

    Args:
        what: as in `matched`.

    Raises:
        PlanError: as `matched`.
    """
    found: dict[str, str] = {}
    require_type(patterns, Iterable, "include, exclude", "a list of patterns such as ['layer4.*']")
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for fqn in matched(pattern, sites, what):
            found.setdefault(fqn, pattern)
    return found


def _matches(pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise PlanError(f"expected a regular expression after `re:`, got {pattern!r}: {error}") from None


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


def resolve_settings(settings: Any, sites: Sequence[Names], what: str = "norm sites") -> dict[str, SiteSettings]:
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
