"""The course of a training run, read from the records of its log: losses, accuracies, importance weights by depth.

A log may have been written by another version or edited by hand: records without the expected numbers are left out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from normswap.finetune.tasks.interface import NO_FIGURES
from normswap.layers.gating import BRANCHES
from normswap.surgery.importance import SiteWeights

_DEPTHS = ("first", "middle", "last")
Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Course:
    """What changed over the steps of a run.

    Attributes:
        losses: mean training loss since the point before, by step.
        evaluation_losses, figures: the loss and the leading metric of each evaluation, by step.
        importance: the importance weights of every site by fqn, by step.
        figure_name, is_percent: the name of the leading metric, and whether it is in percent.
    """

    losses: Points = ()
    evaluation_losses: Points = ()
    figures: Points = ()
    importance: tuple[tuple[int, Mapping[str, SiteWeights]], ...] = ()
    figure_name: str = "accuracy"
    is_percent: bool = True

    @property
    def figure_label(self) -> str:
        """The name of the leading metric with its unit."""
        return f"{self.figure_name}, %" if self.is_percent else self.figure_name

    @property
    def last_step(self) -> int:
        """The last step of any record."""
        return max((step for series in self._series() for step, _ in series), default=0)

    def _series(self) -> tuple[Sequence[tuple[int, Any]], ...]:
        return self.losses, self.evaluation_losses, self.figures, self.importance

    def __bool__(self) -> bool:
        """Whether there is anything to draw."""
        return any(self._series())

    def depths(self) -> dict[str, tuple[str, ...]]:
        """Return the sites in up to three groups of equal size by depth: a title, and the fqns of its sites."""
        return group_by_depth(tuple(self.importance[-1][1]) if self.importance else ())

    def mean_importance(self, kind: str, fqns: Iterable[str]) -> tuple[list[int], dict[str, list[float]]]:
        """Return the steps, and for each branch its importance weight at these steps, averaged over sites.

        Args:
            kind: `"mean"` or `"var"`.
            fqns: the sites.
        """
        group = tuple(fqns)
        known = [(step, [sites[fqn] for fqn in group if fqn in sites]) for step, sites in self.importance]
        known = [(step, sites) for step, sites in known if sites]
        return [step for step, _ in known], {
            branch: [mean_weight([getattr(site, kind) for site in sites], branch) for _, sites in known]
            for branch in BRANCHES
        }


def group_by_depth(fqns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return sites in up to three groups of equal size by depth: a title, and the fqns of its sites.

    Args:
        fqns: the sites in the order of the model.
    """
    count = min(len(_DEPTHS), len(fqns))
    names = {1: ("all",), 2: (_DEPTHS[0], _DEPTHS[-1])}.get(count, _DEPTHS)
    bounds = [round(index * len(fqns) / count) for index in range(count + 1)] if count else []
    groups = (tuple(fqns[start:end]) for start, end in pairwise(bounds))
    return {
        f"{name} {len(group)} sites" if len(group) > 1 else f"{name} site: {group[0] or '(the model)'}": group
        for name, group in zip(names, groups, strict=False)
    }


def mean_weight(weights: Sequence[Mapping[str, float]], branch: str) -> float:
    """Return the mean importance weight of a branch; a site without it counts 0."""
    return sum(each.get(branch, 0.0) for each in weights) / len(weights)


def read_course(records: Iterable[Any]) -> Course:
    """Return the course of a run from the records of its log, in the order of the steps."""
    known = [record for record in records if isinstance(record, Mapping) and _is_step(record.get("step"))]
    ordered = sorted(known, key=lambda record: int(record["step"]))
    evaluations = [
        (record["step"], record["evaluation"]) for record in ordered if isinstance(record.get("evaluation"), Mapping)
    ]
    importance = [(record["step"], _read_sites(record.get("importance"))) for record in ordered]
    name, unit = _leading_figure(evaluations)
    return Course(
        _points((record["step"], record.get("loss")) for record in ordered),
        _points((step, found.get("loss")) for step, found in evaluations),
        _points((step, found.get(name)) for step, found in evaluations),
        tuple((step, sites) for step, sites in importance if sites),
        name,
        unit == "%",
    )


def _leading_figure(evaluations: Iterable[tuple[int, Mapping[str, Any]]]) -> tuple[str, str]:
    """The name and the unit of the first metric in the evaluations."""
    for _, found in evaluations:
        names = [name for name, value in found.items() if name not in NO_FIGURES and _is_number(value)]
        if names:
            return names[0], str(found.get("unit", "%"))
    return "accuracy", "%"


def _is_step(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _points(pairs: Iterable[tuple[int, Any]]) -> Points:
    return tuple((step, float(value)) for step, value in pairs if _is_number(value))


def _read_sites(value: Any) -> dict[str, SiteWeights]:
    """The importance weights in a record; sites in another form are left out."""
    if not isinstance(value, Mapping):
        return {}
    sites = {fqn: _read_site(site) for fqn, site in value.items()}
    return {str(fqn): site for fqn, site in sites.items() if site is not None}


def _read_site(value: Any) -> SiteWeights | None:
    found = [value.get(kind) for kind in SiteWeights._fields] if isinstance(value, Mapping) else []
    sides = [side for side in found if isinstance(side, Mapping)]
    if len(sides) < len(SiteWeights._fields):
        return None
    if not all(branch in BRANCHES and _is_number(weight) for side in sides for branch, weight in side.items()):
        return None
    return SiteWeights(*({str(branch): float(weight) for branch, weight in side.items()} for side in sides))
