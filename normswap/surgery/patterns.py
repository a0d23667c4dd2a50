"""Patterns on the names of sites: globs, or regular expressions after `re:`. One that matches nothing is an error."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from normswap.errors import PlanError
from normswap.surgery.arguments import require_type

# All names of one site, the fqn first.
Names = tuple[str, ...]


def matched(pattern: str, sites: Sequence[Names], what: str = "norm sites") -> list[str]:
    """Return the fqns of the sites that have a name which `pattern` matches.

    Args:
        what: what the sites are called in the error.

    Raises:
        PlanError: the pattern is no regular expression, or matches nothing, with the nearest fqns.
    """
    hits = [names[0] for names in sites if any(_matches(pattern, name) for name in names)]
    if not hits:
        fqns = [names[0] for names in sites]
        near = difflib.get_close_matches(pattern, fqns, n=3, cutoff=0.4) or fqns[:3]
        raise PlanError(f"the pattern {pattern!r} matches none of the {len(fqns)} {what}; nearest: {near}")
    return hits


def first_matches(patterns: Iterable[str], sites: Sequence[Names], what: str = "norm sites") -> dict[str, str]:
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
