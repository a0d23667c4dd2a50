"""What the evidence run keeps: outcomes, parity, learned weights, and where they came from; as JSON and back.

Decides only which learning rate an arm is judged at: the one with the best accuracy on validation images.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.finetuning.training import Outcome


@dataclass(frozen=True)
class Parity:
    """The network right after the swap beside the original: test accuracies in percent, float32 output error."""

    seed: int
    source_original: float
    source_converted: float
    target_original: float
    target_converted: float
    relative_error: float

    @property
    def is_equal(self) -> bool:
        """Whether both accuracies are equal, exactly."""
        return self.source_original == self.source_converted and self.target_original == self.target_converted


@dataclass(frozen=True)
class Section:
    """All outcomes of one setting: every arm, seed and rate."""

    title: str
    tuning: dict[str, Any]
    outcomes: list[Outcome]


@dataclass(frozen=True)
class Evidence:
    """One whole run.

    Args:
        protocol: the constants of `protocol`, by name.
        weights: per seed, per site: importance weights of means and of variances by branch, of the converted arm.
    """

    date: str
    machine: str
    versions: dict[str, str]
    seconds: float
    seeds: list[int]
    protocol: dict[str, Any]
    parity: list[Parity]
    weights: list[dict[str, list[dict[str, float]]]]
    sections: list[Section]


def choose(outcomes: Iterable[Outcome]) -> Outcome:
    """Return the outcome with the best validation accuracy; of equals, the one of the smallest rate."""
    return min(outcomes, key=lambda outcome: (-outcome.validation, outcome.rate))


def chosen(section: Section, arm: str) -> list[Outcome]:
    """Return one outcome per seed for `arm`, each at its chosen rate."""
    seeds = sorted({outcome.seed for outcome in section.outcomes})
    return [choose(o for o in section.outcomes if o.arm == arm and o.seed == seed) for seed in seeds]


def arms_of(section: Section) -> list[str]:
    """Return the arms of a section in the order in which they were run."""
    return list(dict.fromkeys(outcome.arm for outcome in section.outcomes))


def write_json(evidence: Evidence, path: Path) -> None:
    """Write all raw numbers."""
    path.write_text(json.dumps(asdict(evidence), indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Evidence:
    """Return what `write_json` wrote."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["parity"] = [Parity(**entry) for entry in stored["parity"]]
    stored["sections"] = [
        Section(entry["title"], entry["tuning"], [Outcome(**outcome) for outcome in entry["outcomes"]])
        for entry in stored["sections"]
    ]
    return Evidence(**stored)
