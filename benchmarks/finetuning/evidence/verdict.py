"""What the records say about the default: cells won and lost, means over cells, runs that ended near chance.

A cell is a setting at a batch size. It is compared as soon as all nine arms have a score there.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

from benchmarks.finetuning.evidence.arms import ALL, ARMS, REPORTED
from benchmarks.finetuning.evidence.comparison import Estimate, estimates, is_significant, paired, rivals_of, tolerance
from benchmarks.finetuning.evidence.plan import BATCHES, SEEDS, SETTINGS, Record, Records, find, planned, scores_of

Scores = dict[int, dict[str, dict[int, float]]]  # by batch size, arm and seed


@dataclass(frozen=True)
class Cell:
    """One setting at one batch size: the default against the best of the other arms and against two strong rivals."""

    setting: str
    batch: int
    best: str
    to_best: Estimate
    to_frozen: Estimate
    to_group_norm: Estimate

    @property
    def is_lost(self) -> bool:
        """Return whether the default is further below the best arm than the tolerance."""
        return self.to_best.mean < -tolerance(self.to_best)


def scores(records: Records, setting: str) -> Scores:
    """Return the test scores of all arms of the tables."""
    return {batch: scores_of(records, setting, batch, arms=(*ARMS, *REPORTED)) for batch in BATCHES}


def column(found: Scores, arm: str) -> dict[int, dict[int, float]]:
    """Return the scores of one arm by batch size and seed."""
    return {batch: arms[arm] for batch, arms in found.items()}


def arm_estimates(found: Scores, arm: str) -> dict[int, Estimate]:
    """Return mean and standard error of an arm by batch size."""
    return estimates({batch: [*seeds.values()] for batch, seeds in column(found, arm).items()})


def cells(records: Records) -> Iterator[Cell]:
    """Yield the cells in which every one of the nine arms has a score."""
    for setting in SETTINGS:
        found = scores(records, setting)
        for batch, arms in found.items():
            if not all(arms[arm] for arm in ARMS):
                continue
            best = rivals_of(means(arms))[0]
            yield Cell(setting, batch, best, *(difference(found, batch, arm) for arm in (best, "frozen", "gn_matched")))


def means(arms: dict[str, dict[int, float]]) -> dict[str, float]:
    """Return the mean of each of the nine arms over the seeds that all of them have."""
    shared = [seed for seed in SEEDS if all(seed in arms[arm] for arm in ARMS)]
    return {arm: mean(arms[arm][seed] for seed in shared) if shared else math.nan for arm in ARMS}


def difference(found: Scores, batch: int, arm: str) -> Estimate:
    """Return the paired difference of the default to an arm at a batch size."""
    return paired(column(found, "default"), column(found, arm))[batch]


def means_over_cells(records: Records) -> dict[str, float]:
    """Return the mean of each arm over all complete cells."""
    complete = [means(scores(records, cell.setting)[cell.batch]) for cell in cells(records)]
    return {arm: mean(cell[arm] for cell in complete) for arm in ARMS} if complete else {}


def deaths(records: Records) -> list[Record]:
    """Return the runs of the page that ended near chance or with a loss that is not finite."""
    runs = {record["key"]: record for job in planned(records, tuple(SETTINGS)) if (record := find(records, job))}
    return [record for record in runs.values() if is_dead(record)]


def is_dead(record: Record) -> bool:
    """Return whether a run ended near chance."""
    score = record["validation"] if record["test"] is None else record["test"]
    return record["loss"] is None or score <= SETTINGS[record["setting"]].near_chance


def deaths_of_default_alone(records: Records) -> list[Record]:
    """Return the dead runs of the default for which the same cell, seed and network rate did not kill frozen BN."""
    dead = deaths(records)
    frozen = {_place(record) for record in dead if record["arm"] == "frozen"}
    return [record for record in dead if record["arm"] == "default" and _place(record) not in frozen]


def _place(record: Record) -> tuple[str, int, int, float]:
    return record["setting"], record["batch"], record["seed"], record["rate"]


@dataclass(frozen=True)
class Verdict:
    """The targets of the evidence, as far as the records go.

    Args:
        lost: cells in which the default is further below the best arm than the tolerance.
        above_frozen, above_group_norm: number of cells in which it is significantly better.
        best_mean: the arm with the best mean over cells.
        dead: runs of the default near chance where frozen BN is not.
    """

    cells: int
    planned_cells: int
    lost: list[Cell]
    above_frozen: int
    above_group_norm: int
    best_mean: str
    dead: int

    @property
    def is_met(self) -> bool:
        """Return whether all targets are met, on all cells."""
        complete = self.cells == self.planned_cells
        return complete and not self.lost and not self.dead and self.best_mean == "default"


def verdict(records: Records) -> Verdict:
    """Compare the records with the targets."""
    found = [*cells(records)]
    over_cells = means_over_cells(records)
    return Verdict(
        cells=len(found),
        planned_cells=len(SETTINGS) * len(BATCHES),
        lost=[cell for cell in found if cell.is_lost],
        above_frozen=sum(is_significant(cell.to_frozen) for cell in found),
        above_group_norm=sum(is_significant(cell.to_group_norm) for cell in found),
        best_mean=max(over_cells, key=lambda arm: over_cells[arm]) if over_cells else "",
        dead=len(deaths_of_default_alone(records)),
    )


def title(arm: str) -> str:
    """Return the name of an arm in tables."""
    return ALL[arm].title
