"""Which runs the table of jobs needs: jobs, arms, learning rates, seeds.

An arm is the recipe of a job with some keys overridden. Each arm takes the best of its rates, by the leading metric on
validation data with a seed that is not reported; the seeds of the table are measured on test data.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

TRIAL_SEED = 100
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Job:
    """A recipe and how it is measured.

    Attributes:
        recipe, title: the name of the recipe, and that of the job in the table.
        source: the recipe whose result is the checkpoint of the job; None if the network is pretrained.
        rates: the learning rates to choose from.
        overrides: keys for all arms.
        arms: keys of single arms, beside or in place of those in `ARMS`.
        notes: a sentence for the page.
        validation, test: the splits.
    """

    recipe: str
    title: str
    source: str | None = None
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    overrides: tuple[str, ...] = ()
    arms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: str = ""
    validation: str = "validation"
    test: str = "test"


# What BN users do today, the strongest form of its replacement, and the recipe as it is.
ARMS: Mapping[str, tuple[str, ...]] = {
    "BN in training": ("convert.enabled=false",),
    "BN frozen": ("convert.start=none", "train.importance_lr=0"),
    "GN matched": ("convert.start=gn", "train.importance_lr=0"),
    "normswap": (),
}


class Run(NamedTuple):
    """One run: a job, an arm, a learning rate, a seed, and the split that it is measured on."""

    job: str
    arm: str
    rate: float
    seed: int
    split: str


def overrides(job: Job, run: Run) -> list[str]:
    """Return the overrides of the recipe for a run, without its files."""
    return [
        *job.overrides,
        *job.arms.get(run.arm, ARMS.get(run.arm, ())),
        f"train.lr={run.rate}",
        f"train.seed={run.seed}",
        f"data.evaluation_split={run.split}",
    ]


def trials(job: Job) -> Iterator[Run]:
    """Yield the runs that choose the rate of each arm."""
    for arm in arm_names(job):
        for rate in job.rates:
            yield Run(job.recipe, arm, rate, TRIAL_SEED, job.validation)


def arm_names(job: Job) -> list[str]:
    """Return the arms of a job in the order of the table."""
    return list({**ARMS, **job.arms})


def digest(text: str) -> str:
    """Return a short digest, which keys a record by what the run computed."""
    return sha256(text.encode()).hexdigest()[:12]
