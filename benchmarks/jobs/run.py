"""Measure the recipes of all jobs (`make jobs BUDGET=60m`) -> docs/measured/jobs.md.

Resumes: each run is one JSON line, keyed by the recipe, its Python file and the overrides. `--status` prints what is
left; `--rewrite` only writes the page; `--jobs NAME ...` restricts the run to some jobs.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import normswap
from benchmarks.jobs.catalog import JOBS
from benchmarks.jobs.plan import SEEDS, Job, Run, arm_names, digest, overrides, trials
from benchmarks.jobs.report import best_rate, page
from benchmarks.paths import PAGES, RESULTS
from benchmarks.provenance import provenance
from benchmarks.records import append_line, read_lines
from normswap.finetune.recipe import find_shipped, read_recipe

RECORDS = RESULTS / "jobs.jsonl"
_UNITS = {"m": 60, "h": 3600}


def main() -> None:
    """Run what the records do not contain, until the budget ends, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="60m", help="for how long new runs start, such as 60m or 2h")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, each with one thread")
    parser.add_argument("--jobs", nargs="*", default=sorted(JOBS), help="the recipes to measure")
    parser.add_argument("--status", action="store_true", help="only print what is left")
    parser.add_argument("--rewrite", action="store_true", help="only write the page")
    options = parser.parse_args()
    jobs = [JOBS[name] for name in options.jobs]
    if options.status:
        for job in jobs:
            print(f"{job.recipe}: {len(list(_next_runs(job)))} runs can start")
        return
    if not options.rewrite:
        deadline = time.monotonic() + float(options.budget[:-1]) * _UNITS[options.budget[-1]]
        _measure(jobs, deadline, options.workers)
    (PAGES / "jobs.md").write_text(page(JOBS, read_records()))
    print(f"wrote {PAGES / 'jobs.md'}")


def read_records() -> dict[str, dict[str, Any]]:
    """Return the records by key."""
    return read_lines(RECORDS, key="key")


def key_of(job: Job, run: Run) -> str:
    """Return the key of a run: a digest of everything that it computes from."""
    names = [job.recipe, *([job.source] if job.source else [])]
    shipped = [find_shipped(name) for name in names]
    texts = [recipe.text for recipe in shipped] + [p.read_text() for recipe in shipped for p in recipe.companions]
    return digest("\n".join([*run_fields(run), *overrides(job, run), *texts]))


def run_fields(run: Run) -> list[str]:
    """Return the fields of a run as texts."""
    return [str(value) for value in run]


def _next_runs(job: Job) -> Iterator[Run]:
    """Yield the runs that are missing and can start: trials first, then the seeds of arms whose rate is chosen."""
    known = read_records()
    missing = [run for run in trials(job) if key_of(job, run) not in known]
    yield from missing
    found = [record for record in known.values() if record["job"] == job.recipe]
    for seed in SEEDS:
        for arm in arm_names(job):
            if any(run.arm == arm for run in missing):
                continue
            run = Run(job.recipe, arm, best_rate(found, arm), seed, job.test)
            if key_of(job, run) not in known:
                yield run


def _measure(jobs: list[Job], deadline: float, workers: int) -> None:
    """Run jobs in parallel processes; new runs start until the deadline."""
    folder = Path(tempfile.gettempdir()) / "normswap-jobs"
    folder.mkdir(exist_ok=True)
    sources = [(job, seed) for job in jobs if job.source for seed in SEEDS]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(_ensure_source, *zip(*sources, strict=True), [folder] * len(sources)) if sources else ())
        while time.monotonic() < deadline:
            runs = [(job, run) for job in jobs for run in _next_runs(job)][: 4 * workers]
            if not runs:
                return
            futures = [pool.submit(_execute, job, run, folder, deadline) for job, run in runs]
            for future in as_completed(futures):
                record = future.result()
                if record is not None:
                    append_line(RECORDS, record)
                    print(f"{record['job']}, {record['arm']}, {record['rate']:g}, seed {record['seed']}: "
                          f"{record['figures']} ({record['seconds']:.0f} s)", flush=True)  # fmt: skip


def _source_file(job: Job, seed: int, folder: Path) -> Path:
    """Where the source network of a seed is. Seeds that choose the rate share that of seed 0."""
    recipe = find_shipped(job.source or "")
    name = digest("\n".join([recipe.text, *(path.read_text() for path in recipe.companions)]))
    return folder / f"{job.source}-{seed if seed in SEEDS else 0}-{name}"


def _ensure_source(job: Job, seed: int, folder: Path) -> None:
    """Train the source network of a job, unless it exists."""
    torch.set_num_threads(1)
    output = _source_file(job, seed, folder)
    if not (output / "model.pt").exists():
        recipe = read_recipe(job.source or "", [f"run.output={output}", f"train.seed={seed}"])
        normswap.run_recipe(recipe, overwrite=True)


def _execute(job: Job, run: Run, folder: Path, deadline: float) -> dict[str, Any] | None:
    """Run a recipe and return its record; None if the deadline has passed."""
    if time.monotonic() > deadline:
        return None
    torch.set_num_threads(1)
    keys = overrides(job, run)
    if job.source:
        keys.append(f"model.checkpoint={_source_file(job, run.seed, folder) / 'model.pt'}")
    with tempfile.TemporaryDirectory() as output:
        start = time.thread_time()
        outcome = normswap.run_recipe(read_recipe(job.recipe, [*keys, f"run.output={output}/run"]))
        seconds = time.thread_time() - start
    shares = [share for site in outcome.importance.values() for side in site for share in [side.get("bn", 0.0)]]
    return {
        "key": key_of(job, run),
        **run._asdict(),
        "before": dict(outcome.before.figures),
        "figures": dict(outcome.after.figures),
        "unit": outcome.after.unit,
        "steps": outcome.steps,
        "seconds": seconds,
        "bn_share": sum(shares) / len(shares) if shares else None,
        "provenance": provenance(),
    }


if __name__ == "__main__":
    main()
