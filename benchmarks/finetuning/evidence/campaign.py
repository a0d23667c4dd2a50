"""Run what is missing, in worker processes with one thread each, until nothing is left or the budget is spent."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.finetuning.evidence import training
from benchmarks.finetuning.evidence.arms import ALL
from benchmarks.finetuning.evidence.plan import SELECTION_SEED, SETTINGS, Job, Record, find, key_of, planned
from benchmarks.finetuning.evidence.settings.task import Task
from benchmarks.provenance import machine
from benchmarks.records import append_line

# Time of a run relative to a plain network's, until a run of the arm is recorded.
_SLOWER = {"renorm": 1.4, "uniform": 1.5}
_SLOWER_BY_NORMSWAP = 2.0
_KEPT_TASKS = 2


class Campaign:
    """The records of a campaign, and what is left of it.

    Args:
        path: the file of records, one JSON object per line.
        records: what the file contains, by key.
        settings: names of the settings to run.
    """

    def __init__(self, path: Path, records: dict[str, Record], settings: tuple[str, ...]) -> None:
        self.path = path
        self.records = records
        self.settings = settings
        self.failed: list[Job] = []

    def left(self) -> list[Job]:
        """Return the runs that are not recorded, in order. Those without a rate wait for others."""
        return [job for job in planned(self.records, self.settings) if find(self.records, job) is None]

    def run(
        self, *, budget: float, executor: Executor, workers: int, clock: Callable[[], float] = time.monotonic
    ) -> int:
        """Run jobs until nothing is left or the next would end after the budget; return the number of runs.

        A run that fails is reported and left out; `failed` lists these.

        Args:
            budget: seconds.
            executor: what runs the jobs.
            workers: the number of jobs at a time.
            clock: the time in seconds.
        """
        end, done, running = clock() + budget, 0, dict[Future[Record], Job]()
        while True:
            active = {*running.values(), *self.failed}
            ready = [job for job in self.left() if job.rate is not None and job not in active]
            for job in ready[: workers - len(running)]:
                if clock() + self.estimate(job) <= end:
                    running[executor.submit(run_job, job)] = job
            if not running:
                return done
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                if error := future.exception():
                    self.failed.append(job)
                    print(f"FAILED: {job}: {type(error).__name__}: {error}", flush=True)
                    continue
                record = future.result()
                append_line(self.path, record)
                self.records[record["key"]] = record
                done += 1
                left = end - clock()
                print(f"[{max(left, 0) / 60:5.1f} min left] {_line(job, record)}", flush=True)

    def estimate(self, job: Job) -> float:
        """Return the seconds that a run takes, by the records of the same kind, or else by the protocol."""
        setting = SETTINGS[job.setting]
        similar = [
            record["seconds"] / record["steps"]
            for record in self.records.values()
            if (record["setting"], record["arm"], record["batch"]) == (job.setting, job.arm, job.batch)
        ]
        if similar:
            return median(similar) * job.steps
        slower = _SLOWER.get(job.arm, _SLOWER_BY_NORMSWAP if _is_converted(job.arm) else 1.0)
        return slower * setting.seconds[job.batch] * job.steps / setting.steps[job.batch]


def _is_converted(arm: str) -> bool:
    return not any(arm.startswith(name) for name in ("bn", "gn", "ln", "frozen", "fully", "reestimated", "renorm"))


def _line(job: Job, record: Record) -> str:
    test = "" if record["test"] is None else f", test {record['test']:.1f}"
    return (
        f"{job.stage}: {SETTINGS[job.setting].title}, batch {job.batch}, {ALL[job.arm].title}, seed {job.seed}, "
        f"rate {job.rate:g}{'' if job.gate_rate is None else f', gates {job.gate_rate:g}'}: "
        f"validation {record['validation']:.1f}{test} ({record['seconds']:.0f} s)"
    )


def status(campaign: Campaign) -> str:
    """Return a table of what is left: runs by setting and stage, and the core-hours that they take."""
    total: dict[tuple[str, str], list[float]] = {}
    for job in planned(campaign.records, campaign.settings):
        counts = total.setdefault((job.setting, job.stage), [0, 0, 0.0])
        if find(campaign.records, job) is not None:
            counts[0] += 1
        else:
            counts[1] += 1
            counts[2] += campaign.estimate(job)
    lines = [f"{'setting':28} {'stage':18} {'done':>5} {'left':>5} {'minutes on one core':>20}"]
    lines += [
        f"{SETTINGS[setting].title:28} {stage:18} {done:5} {left:5} {seconds / 60:20.1f}"
        for (setting, stage), (done, left, seconds) in total.items()
    ]
    lines += ["", "left by arm and batch size:", *_by_arm(campaign.left())]
    runs, seconds = sum(counts[1] for counts in total.values()), sum(counts[2] for counts in total.values())
    return "\n".join([*lines, "", f"{runs} runs are left, about {seconds / 3600:.1f} hours on one core"])


def _by_arm(left: list[Job]) -> list[str]:
    counts: dict[tuple[str, str], Counter[int]] = {}
    for job in left:
        counts.setdefault((job.setting, job.arm), Counter())[job.batch] += 1
    return [
        f"  {SETTINGS[setting].title}, {ALL[arm].title}: "
        + ", ".join(f"batch {batch}: {count}" for batch, count in sorted(found.items()))
        for (setting, arm), found in counts.items()
    ]


# --- in a worker ------------------------------------------------------------------------------------------------------


def pool(workers: int) -> ProcessPoolExecutor:
    """Return processes with one thread each."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_use_one_thread)


def _use_one_thread() -> None:
    torch.set_num_threads(1)  # small inputs are not faster with two threads; one thread sums in a fixed order


@lru_cache(maxsize=_KEPT_TASKS)
def load_task(setting: str, seed: int) -> Task:
    """Return the data and the network of a setting with a seed."""
    return SETTINGS[setting].load(seed)


def run_job(job: Job) -> Record:
    """Run one job and return its record."""
    if job.rate is None:
        raise ValueError(f"expected a job with a rate, got {job}")
    task = load_task(job.setting, job.seed)
    start, cpu = time.monotonic(), time.process_time()
    outcome = training.run(
        ALL[job.arm],
        task,
        rate=job.rate,
        gate_rate=job.gate_rate,
        steps=job.steps,
        batch=job.batch,
        seed=job.seed,
        tests=job.seed != SELECTION_SEED,
    )
    return {
        "key": key_of(job),
        **{name: value for name, value in job._asdict().items() if name != "stage"},
        **_rounded(asdict(outcome)),
        "seconds": round(time.process_time() - cpu, 1),
        "elapsed": round(time.monotonic() - start, 1),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "timm", "normswap")},
    }


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _rounded_value(value) if isinstance(value, float) else value for name, value in values.items()}


def _rounded_value(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
