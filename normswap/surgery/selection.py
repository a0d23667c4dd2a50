"""Which sites are swapped and with which values: `SwapOptions`, filters on sites, and settings by pattern.

A filter is a glob on names (`layer4.*`), a regular expression after `re:`, or a function `(module, fqn) -> bool`; one
that matches no site is an error. The options are defaults for all sites; `settings` override them by pattern.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal, Self, TypedDict

from torch import nn

from normswap.errors import LayerError, PlanError
from normswap.layers.gating import BRANCHES, BnStatistics, Branch, Gate, check_branches
from normswap.schema import SchemaError, read_record, read_value
from normswap.surgery.arguments import require_type

# All names of one site, the fqn first.
Names = tuple[str, ...]
SiteFilter = str | Callable[[nn.Module, str], bool]


# The kinds of norms that `kinds=` accepts, each with the branch that computes it and its name.
KINDS: Mapping[str, tuple[Branch, str]] = MappingProxyType(
    {
        "bn": ("bn", "Batch Normalization"),
        "in": ("in", "Instance Normalization"),
        "gn1": ("ln", "GroupNorm of one group"),
        "gn": ("ln", "GroupNorm of several groups"),
    }
)

# Where a Batch Normalization starts that loses its `bn` branch: at `ln` (of groups of channels for `gn`), or at equal
# weights.
Start = Literal["ln", "gn", "uniform"]
_DEFAULT_GROUPS = 32


def base_kind(kind: str) -> str:
    """Return the key of `KINDS` for sites of `kind`; frozen BN and every other kind is `bn`."""
    return kind if kind in KINDS else "bn"


def branch_of_kind(kind: str) -> Branch:
    """Return the branch that computes, with weight 1, the function of a norm of `kind`."""
    return KINDS[base_kind(kind)][0]


class SiteSettings(TypedDict, total=False):
    """The values that `settings` can give to single sites.

    `train_gates` decides if the importance weights are trained, `synchronize` if the `bn` branch uses the joint batch
    of all processes. `num_groups` also groups the channels of the `ln` branch at a site that does not start at `gn`.
    """

    gate: Gate
    branches: Sequence[Branch]
    bn_statistics: BnStatistics
    train_gates: bool
    synchronize: bool
    start: Start | None
    match: bool
    num_groups: int


Settings = Mapping[str, SiteSettings]


# --- options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SwapOptions:
    """All arguments that decide which norms are swapped and how; `convert` and `plan_swaps` take it as `options=`.

    The constructor checks every value. A list becomes a tuple, and a single filter becomes a tuple of one.

    Args:
        include: filters for the sites to swap: glob patterns on dotted names such as `"layer4.*"`, regular expressions
            after `re:`, or functions `(module, fqn) -> bool`. Without any, all sites are included. A function gets the
            module of the site, or, for a call such as `F.batch_norm`, the module whose forward makes the call.
        exclude: filters for the sites to leave as they are; `exclude` wins over `include`.
        kinds: the norms to swap: `"bn"` (default), `"in"` (InstanceNorm, starts at the `in` branch), `"gn1"` and
            `"gn"` (GroupNorm of one group and of several groups, start at the `ln` branch of as many groups).
        gate: the map from gate parameters to importance weights: `"simplex"` (default) starts at exactly the original
            function, `"softmax"` (section 3.1 of the paper) at the uniform mix, which is another function.
        branches: the branches that a site may have, some of `"in"`, `"ln"`, `"bn"`; the branch at which each kind
            starts must be among them. Default: all that the shape and the kind of a site allow. Only `settings` can
            give a `bn` branch to a site of kind `in`, `gn1` or `gn`.
        bn_statistics: the statistics of the `bn` branches in training: `"running"` (default), as constants, so that
            nothing depends on the batch; `"batch"`, as Batch Normalization itself; or `"renorm"`. Sites that were
            frozen, and sites that the model's own `train()` leaves in evaluation mode, use running statistics; only
            `settings` change that. Sites without running statistics use those of the batch.
        train_frozen_gates: train the gates also at sites whose own parameters are all frozen.
        synchronize: let the `bn` branch of every site use the joint batch of all processes in training. Without it,
            only sites that were synchronized before (SyncBatchNorm) do so.
        start: None (default): each site starts at its old norm. `"ln"`, `"gn"`: each Batch Normalization starts at
            layer norm, or at group norm of `num_groups` groups, matched to its running statistics and without a `bn`
            branch: a network without batch statistics, whose function is close to the original. `"uniform"`: it starts
            at equal weights of `in` and `ln`, without `bn`.
        num_groups: the number of groups for `start="gn"`; a site has the greatest common divisor of it and its number
            of channels.
        match: match the `in` and `ln` branches of a Batch Normalization with a simplex gate to its running statistics,
            so that leaving `bn` hardly changes the function.
        untrained: what to do with a Batch Normalization whose running statistics were never updated: `"keep"` (default)
            the function, or start it as `"uniform"`.
        settings: values by pattern, some of `gate`, `branches`, `bn_statistics`, `train_gates`, `synchronize`, `start`,
            `match` and `num_groups`, which override the options above. If several patterns match a site, the later one
            wins, key by key.

    Raises:
        PlanError: a value is unknown or of a wrong type.

    Examples:
        >>> from normswap import SwapOptions
        >>> SwapOptions(include=("layer4.*",), branches=("bn", "ln")).branches
        ('ln', 'bn')
        >>> SwapOptions(gate="simplx")
        Traceback (most recent call last):
        ...
        normswap.PlanError: gate: expected 'simplex' or 'softmax', got 'simplx'; did you mean 'simplex'?
    """

    include: tuple[SiteFilter, ...] = ()
    exclude: tuple[SiteFilter, ...] = ()
    kinds: tuple[str, ...] = ("bn",)
    gate: Gate = "simplex"
    branches: tuple[Branch, ...] | None = None
    bn_statistics: BnStatistics = "running"
    train_frozen_gates: bool = False
    synchronize: bool = False
    start: Start | None = None
    num_groups: int = _DEFAULT_GROUPS
    match: bool = True
    untrained: Literal["keep", "uniform"] = "keep"
    settings: Settings = field(default_factory=dict, hash=False)

    __module__ = "normswap"

    def __post_init__(self) -> None:
        kinds = _read_kinds(self.kinds)
        start = _read(Start | None, self.start, "start")
        values = {
            "include": _read_filters("include", self.include),
            "exclude": _read_filters("exclude", self.exclude),
            "kinds": kinds,
            "gate": _read(Gate, self.gate, "gate"),
            "branches": self.branches if self.branches is None else _read_branches(self.branches, kinds, start),
            "bn_statistics": _read(BnStatistics, self.bn_statistics, "bn_statistics"),
            "train_frozen_gates": _read(bool, self.train_frozen_gates, "train_frozen_gates"),
            "synchronize": _read(bool, self.synchronize, "synchronize"),
            "start": start,
            "num_groups": check_num_groups(_read(int, self.num_groups, "num_groups")),
            "match": _read(bool, self.match, "match"),
            "untrained": _read(Literal["keep", "uniform"], self.untrained, "untrained"),
            "settings": read_settings(self.settings),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check_start()

    def _check_start(self) -> None:
        """Refuse a start, or a number of groups, that has no effect."""
        if self.start is not None and "bn" not in self.kinds:
            kinds = f"kinds={self.kinds}, since only Batch Normalization starts at another norm"
            raise PlanError(f"start={self.start!r} has no effect with {kinds}: add 'bn' to them, or leave start= out")
        if self.start is not None and self.bn_statistics != "running" and self.kinds == ("bn",) and not self.settings:
            value = f"bn_statistics={self.bn_statistics!r}"
            raise PlanError(f"{value} has no effect with start={self.start!r}, without `bn`: pass one of the two")
        check_start_gate(self.start, self.gate)
        starts = {self.start, *(entry.get("start") for entry in self.settings.values())}
        if self.num_groups != _DEFAULT_GROUPS and "gn" not in starts:
            raise PlanError(f"num_groups={self.num_groups} has no effect without start='gn': pass both, or none")

    @classmethod
    def default(cls) -> Self:
        """Return the options of `convert(model)` without arguments."""
        return cls()

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the options in plain data, as a parser of JSON or TOML returns it; missing names keep their default.

        Raises:
            PlanError: an unknown name, or a value that does not fit.

        Examples:
            >>> from normswap import SwapOptions
            >>> SwapOptions.from_dict({"include": ["layer4.*"], "kinds": ["bn", "in"]}).kinds
            ('bn', 'in')
        """
        try:
            return read_record(cls, data, "")
        except SchemaError as error:
            raise PlanError(str(error)) from None

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain data, which `from_dict` reads.

        Raises:
            PlanError: a filter is a function, which plain data cannot express.

        Examples:
            >>> from normswap import SwapOptions
            >>> options = SwapOptions(include="layer4.*", gate="softmax")
            >>> SwapOptions.from_dict(options.to_dict()) == options
            True
        """
        for name in ("include", "exclude"):
            for site_filter in getattr(self, name):
                if not isinstance(site_filter, str):
                    raise PlanError(
                        f"{name}: {describe_filter(site_filter)} cannot be written as plain data: use a pattern such "
                        "as 'layer4.*'"
                    )
        return asdict(self)


def choose_options(options: SwapOptions | None, keywords: Mapping[str, Any]) -> SwapOptions:
    """Return `options`, or those that the keyword form of `convert` and `plan_swaps` describes; None is a default.

    Raises:
        PlanError: `options` is given together with keywords, or a keyword has a wrong value.
        ArgumentError: `options` is not a `SwapOptions`.
    """
    given = {name: value for name, value in keywords.items() if value is not None}
    if options is None:
        return SwapOptions(**given)
    require_type(options, SwapOptions, "options", "a SwapOptions, such as SwapOptions(include=('layer4.*',))")
    if given:
        raise PlanError(
            f"got options= together with {', '.join(f'{name}=' for name in given)}: expected one of the two; "
            f"use dataclasses.replace(options, {next(iter(given))}=...)"
        )
    return options


def _read(kind: Any, value: Any, name: str) -> Any:
    try:
        return read_value(kind, value, name)
    except SchemaError as error:
        raise PlanError(str(error)) from None


def _read_filters(name: str, filters: Any) -> tuple[SiteFilter, ...]:
    if isinstance(filters, str) or callable(filters):
        _check_filter(name, filters)
        return (filters,)
    require_type(filters, Iterable, name, "a list of patterns such as ['layer4.*']")
    if isinstance(filters, bytes):
        raise PlanError(f"{name}: expected patterns (strings), got {filters!r:.80}: pass a str")
    found = tuple(filters)
    for each in found:
        _check_filter(name, each)
    return found


def _check_filter(name: str, site_filter: Any) -> None:
    """Refuse what is no filter, and a class or a module, which Python could call."""
    if isinstance(site_filter, nn.Module) or (isinstance(site_filter, type) and issubclass(site_filter, nn.Module)):
        cls = site_filter if isinstance(site_filter, type) else type(site_filter)
        raise PlanError(
            f"{name}: expected patterns (strings) or functions (module, fqn) -> bool, got the "
            f"{'class' if cls is site_filter else 'module'} {cls.__name__}: pass lambda module, fqn: "
            f"isinstance(module, {cls.__name__})"
        )
    if not isinstance(site_filter, str) and not callable(site_filter):
        raise PlanError(
            f"{name}: expected patterns (strings) or functions (module, fqn) -> bool, got {site_filter!r:.80}"
        )


def _read_kinds(kinds: Any) -> tuple[str, ...]:
    found = () if isinstance(kinds, str) or not isinstance(kinds, Iterable) else tuple(kinds)
    if not found or not all(isinstance(kind, str) and kind in KINDS for kind in found):
        raise PlanError(f"kinds: expected some of {tuple(KINDS)}, got {kinds!r:.80}: pass a list such as ['bn', 'in']")
    return tuple(kind for kind in KINDS if kind in found)


def _read_branches(branches: Any, kinds: Sequence[str], start: Start | None) -> tuple[Branch, ...]:
    for kind in kinds:
        branches = check_starting_branch(branches, kind, start if kind == "bn" else None)
    return branches  # type: ignore[no-any-return]


def check_num_groups(num_groups: int) -> int:
    """Return a number of groups if it is positive.

    Raises:
        PlanError: it is not.
    """
    if num_groups < 1:
        raise PlanError(f"num_groups: expected at least 1, got {num_groups}")
    return num_groups


def check_start_gate(start: Start | None, gate: Gate) -> None:
    """Refuse a softmax gate at a site that starts at one branch.

    Raises:
        PlanError: the gate cannot start there.
    """
    if start in ("ln", "gn") and gate == "softmax":
        raise PlanError(
            f"gate: expected 'simplex' with start={start!r}, since softmax gates start at equal weights: leave gate= "
            "out, or pass start='uniform'"
        )


def check_starting_branch(branches: Sequence[str], kind: str, start: Start | None = None) -> tuple[Branch, ...]:
    """Return `branches` in canonical order if the branch at which a site of `kind` starts is among them.

    Args:
        branches: names of branches.
        kind: the kind of the site.
        start: where a Batch Normalization starts that loses its `bn` branch.

    Raises:
        PlanError: that branch is missing, or `branches` is not a subset of the branches, or has `bn` despite `start`.
    """
    try:
        chosen = check_branches(branches)
    except LayerError:
        raise PlanError(f"branches: expected a non-empty subset of {BRANCHES}, got {branches!r}") from None
    if start is not None and "bn" in chosen:
        raise PlanError(f"branches: expected none of them `bn`, which start={start!r} leaves out; got {chosen}")
    first = branch_of_kind(kind) if start is None else "ln" if start in ("ln", "gn") else chosen[0]
    if first not in chosen:
        site = f"a site of kind {kind!r}" if start is None else f"start={start!r}"
        raise PlanError(f"branches: expected `{first}` among them, at which {site} starts; got {chosen}")
    return chosen


# --- filters ----------------------------------------------------------------------------------------------------------


def matched(
    site_filter: SiteFilter,
    sites: Sequence[Names],
    what: str = "norm sites",
    *,
    modules: Mapping[str, nn.Module] | None = None,
) -> list[str]:
    """Return the fqns of the sites that `site_filter` matches: a pattern by any name, a function by the first one.

    Args:
        what: how an error calls the sites.
        modules: the module of each site by fqn, which functions need.

    Raises:
        PlanError: the filter matches no site, the pattern is not a regular expression, or a function has no modules.
    """
    if isinstance(site_filter, str):
        matching = [names[0] for names in sites if any(_matches(site_filter, name) for name in names)]
    elif modules is None:
        raise PlanError(
            f"{describe_filter(site_filter)} needs the modules of a model, which are not known here: use a "
            "pattern such as 'layer4.*'"
        )
    else:
        matching = [names[0] for names in sites if site_filter(modules[names[0]], names[0])]
    if matching:
        return matching
    fqns = [names[0] for names in sites]
    nearest = get_close_matches(site_filter, fqns, n=3, cutoff=0.4) if isinstance(site_filter, str) else []
    listed = f"nearest: {nearest or fqns[:3]}" if isinstance(site_filter, str) else f"the first are {fqns[:3]}"
    raise PlanError(f"{describe_filter(site_filter)} matches none of the {len(fqns)} {what}; {listed}")


def first_matching_patterns(
    patterns: SiteFilter | Iterable[SiteFilter],
    sites: Sequence[Names],
    what: str = "norm sites",
    *,
    modules: Mapping[str, nn.Module] | None = None,
    argument: str = "include",
) -> dict[str, SiteFilter]:
    """Return by fqn the first filter of `patterns` that matches a site; sites that none matches are left out.

    Args:
        patterns: filters, or one alone.
        what, modules: as in `matched`.
        argument: the name of the argument with the filters, for an error.

    Raises:
        PlanError: as `matched`.
    """
    found: dict[str, SiteFilter] = {}
    for site_filter in _read_filters(argument, patterns):
        for fqn in matched(site_filter, sites, what, modules=modules):
            found.setdefault(fqn, site_filter)
    return found


def describe_filter(site_filter: SiteFilter) -> str:
    """Return a filter in words for a message: `the pattern 'layer4.*'`, `the function is_wide`."""
    if isinstance(site_filter, str):
        return f"the pattern {site_filter!r}"
    return f"the function {getattr(site_filter, '__qualname__', None) or repr(site_filter)}"


def _matches(pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise PlanError(f"expected a regular expression after `re:`, got {pattern!r}: {error}") from None


# --- settings ---------------------------------------------------------------------------------------------------------


def read_settings(settings: Any) -> Settings:
    """Return `settings`, checked and with the branches of every entry in canonical order.

    Raises:
        PlanError: no mapping from patterns to mappings, an unknown key or a bad value.
    """
    found: dict[str, SiteSettings] = _read(Mapping[str, SiteSettings], settings, "settings")
    for pattern, entry in found.items():
        if "branches" in entry:
            try:
                entry["branches"] = check_branches(entry["branches"])
            except LayerError as error:
                raise PlanError(f"settings[{pattern!r}].{error}") from None
        if entry.get("num_groups", 1) < 1:
            raise PlanError(f"settings[{pattern!r}].num_groups: expected at least 1, got {entry['num_groups']}")
    return found


def resolve_settings(settings: Any, sites: Sequence[Names], what: str = "norm sites") -> dict[str, SiteSettings]:
    """Return by fqn the values that `settings` give to each site.

    Args:
        settings: mapping from patterns to mappings; it may come from a file and is checked.
        sites: all names of each site.
        what: how an error calls the sites.

    Raises:
        PlanError: as `read_settings`, or a pattern matches no site.
    """
    found = {names[0]: SiteSettings() for names in sites}
    for pattern, entry in read_settings(settings).items():
        for fqn in matched(pattern, sites, what):
            found[fqn].update(entry)
    return found
