"""Forked workers that run mutations with limits of time and memory. A worker that dies costs one mutation.

Workers are forked because the parent has already imported torch. A worker reports every mutation on a pipe. If a worker
is silent for too long, the parent kills it, records the mutation as a failure and starts a worker for the rest.
"""

import json
import os
import resource
import select
import shutil
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.robustness.files import KINDS
from benchmarks.robustness.trial import Bench, Trial

SECONDS = 20.0  # limit for one mutation
GIGABYTES = 2.0  # limit of memory for one mutation


@dataclass
class _Worker:
    pid: int
    pipe: int
    rest: Sequence[int]
    last_report: float
    text: bytes = b""


def run_all(bench: Bench, *, count: int, seed: int, workers: int, scratch: Path) -> Iterator[Trial]:
    """Run mutations 0 to `count` - 1 and yield their trials as they end."""
    running = [
        _start(bench, range(first, count, workers), seed, scratch / str(first)) for first in range(min(workers, count))
    ]
    try:
        while running:
            ready, _, _ = select.select([worker.pipe for worker in running], [], [], 0.5)
            for worker in list(running):
                trials, alive = _read_reports(worker) if worker.pipe in ready else ([], True)
                yield from trials
                late = time.monotonic() - worker.last_report > SECONDS
                if alive and not late:
                    continue
                running.remove(worker)
                lost = _end(worker, late=late)
                if lost is not None:
                    yield lost
                    if len(worker.rest) > 1:
                        folder = scratch / str(worker.rest[0])
                        running.append(_start(bench, worker.rest[1:], seed, folder))
    finally:
        for worker in running:
            os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)


def _start(bench: Bench, indices: Sequence[int], seed: int, scratch: Path) -> _Worker:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return _Worker(pid, reading, indices, time.monotonic())
    status = 1
    try:
        os.close(reading)
        _limit_memory()
        for index in indices:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            trial = bench.trial(index, seed=seed, scratch=scratch)
            os.write(writing, json.dumps(trial.to_dict()).encode() + b"\n")
        status = 0
    except BaseException:  # noqa: BLE001 - the child must not return into the code of the parent
        traceback.print_exc()
    finally:
        os._exit(status)


def _limit_memory() -> None:
    """Limit the memory to that of the parent and `GIGABYTES` more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + int(GIGABYTES * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _read_reports(worker: _Worker) -> tuple[list[Trial], bool]:
    """Return the trials reported by a worker, and false if it has closed the pipe."""
    data = os.read(worker.pipe, 1 << 16)
    *lines, worker.text = (worker.text + data).split(b"\n")
    worker.rest = worker.rest[len(lines) :]
    worker.last_report = time.monotonic()
    return [Trial.from_dict(json.loads(line)) for line in lines], bool(data)


def _end(worker: _Worker, *, late: bool) -> Trial | None:
    """End a worker. Return a failed trial for the mutation that stopped it, or None if it was complete."""
    if late:
        os.kill(worker.pid, signal.SIGKILL)
    _, status = os.waitpid(worker.pid, 0)
    os.close(worker.pipe)
    if not worker.rest:
        return None
    index = worker.rest[0]
    reason = f"more than {SECONDS:.0f} s" if late else f"died with status {os.waitstatus_to_exitcode(status)}"
    return Trial(index, KINDS[index % len(KINDS)].name, "unknown", failures=[reason], seconds=SECONDS if late else 0.0)
