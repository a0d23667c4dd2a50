"""The grid and the records of the study of batch dependence, as JSON.

Each run is recorded when it ends, so an interrupted study resumes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.finetuning.batch_dependence.training import FineTuning
from benchmarks.records import read_document, write_document

TASKS = {"shift": "to shifted digits", "transfer": "to digits 5 to 9, without a shift"}
PENALTIES = (0.0, 0.01, 0.03, 0.1)
BATCH_SIZES = (1, 2, 4, 16)
# Batch renormalization, which is an alternative to the penalty at a batch size of 1.
RENORM_PENALTIES = (0.0, 0.03)
RENORM_BATCH_SIZE = 1
STEPS = FineTuning().steps
RATE = 0.03  # the rate selected most often in a comparison of rates for the converted network


class Cell(NamedTuple):
    """The configuration of one run. `statistics` is what the `bn` branch uses in training: `batch` or `renorm`."""

    task: str
    statistics: str
    batch_size: int
    penalty: float
    seed: int


@dataclass(frozen=True)
class Run:
    """The result of one run.

    Args:
        accuracy: on the test images in evaluation mode, in percent.
        bn_share: mean importance weight of BN over sites and gates after the last step, from 0 to 1.
        is_finite: true if the loss of the last step is finite.
        steps, rate: of the network. The learning rate of the gates is `rate * gate_rate`.
    """

    task: str
    statistics: str
    batch_size: int
    penalty: float
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
        """Return the configuration of the run."""
        return Cell(self.task, self.statistics, self.batch_size, self.penalty, self.seed)


@dataclass
class Study:
    """All runs so far and the conditions of the measurement."""

    provenance: str
    runs: list[Run]


def cells(seeds: Sequence[int]) -> Iterator[Cell]:
    """Yield the configuration of every run, one seed after the other."""
    for seed in seeds:
        for task in TASKS:
            for batch_size in BATCH_SIZES:
                for penalty in PENALTIES:
                    yield Cell(task, "batch", batch_size, penalty, seed)
            for penalty in RENORM_PENALTIES:
                yield Cell(task, "renorm", RENORM_BATCH_SIZE, penalty, seed)


def read_study(path: Path) -> Study | None:
    """Read a study written by `write_study`, or return None if there is none."""
    stored: dict[str, Any] | None = read_document(path)
    if stored is None:
        return None
    return Study(stored["provenance"], [Run(**run) for run in stored["runs"]])


def write_study(study: Study, path: Path) -> None:
    """Write all runs."""
    write_document(path, asdict(study))
