"""The records of the evidence: outcomes, comparisons after the swap, learned weights and conditions, as JSON.

An arm is compared at the learning rate with the best accuracy on the validation images.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.finetuning.training import Outcome
from benchmarks.records import read_document, write_document


@dataclass(frozen=True)
class SwapComparison:
    """The original and the converted network before fine-tuning: test accuracies in percent, float32 output error."""

    seed: int
    source_original: float
    source_converted: float
    target_original: float
    target_converted: float
    relative_error: float

    @property
    def is_equal(self) -> bool:
        """Return true if both pairs of accuracies are exactly equal."""
        return self.source_original == self.source_converted and self.target_original == self.target_converted


@dataclass(frozen=True)
class Section:
    """All outcomes of one setting: every arm, seed and rate."""

    title: str
    tuning: dict[str, Any]
    outcomes: list[Outcome]


@dataclass(frozen=True)
class Evidence:
    """All results of one run.

    Args:
        protocol: the constants of `protocol`, by name.
        weights: importance weights of the converted arm: by seed, by site, for means and variances, by branch.
    """

    date: str
    machine: str
    versions: dict[str, str]
    seconds: float
    seeds: list[int]
    protocol: dict[str, Any]
    after_swap: list[SwapComparison]
    weights: list[dict[str, list[dict[str, float]]]]
    sections: list[Section]


def choose(outcomes: Iterable[Outcome]) -> Outcome:
    """Return the outcome with the best validation accuracy; if several are equal, the one with the lowest rate."""
    return min(outcomes, key=lambda outcome: (-outcome.validation, outcome.rate))


def chosen(section: Section, arm: str) -> list[Outcome]:
    """Return one outcome per seed for `arm`, each at its selected rate."""
    seeds = sorted({outcome.seed for outcome in section.outcomes})
    return [choose(o for o in section.outcomes if o.arm == arm and o.seed == seed) for seed in seeds]


def arms_of(section: Section) -> list[str]:
    """Return the arms of a section in the order of the runs."""
    return list(dict.fromkeys(outcome.arm for outcome in section.outcomes))


def write_json(evidence: Evidence, path: Path) -> None:
    """Write all results."""
    write_document(path, asdict(evidence))


def read_json(path: Path) -> Evidence:
    """Read results written by `write_json`."""
    stored = read_document(path)
    stored["after_swap"] = [SwapComparison(**entry) for entry in stored["after_swap"]]
    stored["sections"] = [
        Section(entry["title"], entry["tuning"], [Outcome(**outcome) for outcome in entry["outcomes"]])
        for entry in stored["sections"]
    ]
    return Evidence(**stored)
