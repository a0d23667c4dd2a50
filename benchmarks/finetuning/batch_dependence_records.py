"""What the study of the price of batch dependence runs and keeps: its grid, one record a run, as JSON and back.

A record is written as soon as its run is over, so that an interrupted study goes on where it was.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.finetuning.protocol import FineTuning

TASKS = {"shift": "to shifted digits", "transfer": "to digits 5 to 9, without a shift"}
PRICES = (0.0, 0.01, 0.03, 0.1)
BATCH_SIZES = (1, 2, 4, 16)
# Values of the running statistics in training too: a rival to the price where it matters.
RENORM_PRICES = (0.0, 0.03)
RENORM_BATCH_SIZE = 1
STEPS = FineTuning().steps
RATE = 0.03  # which the converted network chose most often in the evidence


class Cell(NamedTuple):
    """One run to make: what a batch holds, what BN costs, what the `bn` branch takes in training."""

    task: str
    statistics: str
    batch_size: int
    price: float
    seed: int


@dataclass(frozen=True)
class Run:
    """What one run gave.

    Args:
        accuracy: on the test images in evaluation, in percent.
        bn_share: mean importance weight of BN over sites and gates after the last step, from 0 to 1.
        is_finite: whether the loss stayed finite to the last step.
        steps, rate: of the network; the gates' rate is that times `gate_rate`.
    """

    task: str
    statistics: str
    batch_size: int
    price: float
    seed: int
    accuracy: float
    bn_share: float
    is_finite: bool
    seconds: float
    steps: int
    rate: float
    gate_rate: float

    @property
    def cell(self) -> Cell:
        """What was asked for."""
        return Cell(self.task, self.statistics, self.batch_size, self.price, self.seed)


@dataclass
class Study:
    """All runs so far, and where they were made."""

    provenance: str
    runs: list[Run]


def cells(seeds: Sequence[int]) -> Iterator[Cell]:
    """Yield every run of the study, seed after seed, so that what is there early is even."""
    for seed in seeds:
        for task in TASKS:
            for batch_size in BATCH_SIZES:
                for price in PRICES:
                    yield Cell(task, "batch", batch_size, price, seed)
            for price in RENORM_PRICES:
                yield Cell(task, "renorm", RENORM_BATCH_SIZE, price, seed)


def read_study(path: Path) -> Study | None:
    """Return what `write_study` wrote; None where there is nothing yet."""
    if not path.exists():
        return None
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Study(stored["provenance"], [Run(**run) for run in stored["runs"]])


def write_study(study: Study, path: Path) -> None:
    """Write all runs, whole or not at all."""
    lines = ",\n".join("  " + json.dumps(asdict(run)) for run in study.runs)
    draft = path.with_suffix(".draft")
    draft.write_text(
        f'{{\n "provenance": {json.dumps(study.provenance)},\n "runs": [\n{lines}\n ]\n}}\n', encoding="utf-8"
    )
    os.replace(draft, path)
