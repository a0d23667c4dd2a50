"""Forked workers that carry out mutations within limits of time and memory: one that dies costs one mutation.

Forked, because the parent has imported torch already. A worker reports every mutation on a pipe; the parent kills one
that is silent for too long, notes the mutation it was at, and starts another behind it.
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

SECONDS = 20.0  # one mutation may take
GIGABYTES = 2.0  # and allocate


@dataclass
class _Worker:
    pid: int
    pipe: int
    rest: Sequence[int]
    heard: float
    text: bytes = b""


def run_all(bench: Bench, *, count: int, seed: int, workers: int, scratch: Path) -> Iterator[Trial]:
    """Carry out mutations 0 to `count` and yield them as they end."""
    running = [
        _start(bench, range(first, count, workers), seed, scratch / str(first)) for first in range(min(workers, count))
    ]
    try:
        while running:
            ready, _, _ = select.select([worker.pipe for worker in running], [], [], 0.5)
            for worker in list(running):
                trials, alive = _heard(worker) if worker.pipe in ready else ([], True)
                yield from trials
                late = time.monotonic() - worker.heard > SECONDS
                if alive and not late:
                    continue
                running.remove(worker)
                lost = _ended(worker, late=late)
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
    except BaseException:  # noqa: BLE001 - nothing may return into the parent's code
        traceback.print_exc()
    finally:
        os._exit(status)


def _limit_memory() -> None:
    """So much on top of what the parent had."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + int(GIGABYTES * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _heard(worker: _Worker) -> tuple[list[Trial], bool]:
    """The mutations that a worker reports, and whether more may come."""
    data = os.read(worker.pipe, 1 << 16)
    *lines, worker.text = (worker.text + data).split(b"\n")
    worker.rest = worker.rest[len(lines) :]
    worker.heard = time.monotonic()
    return [Trial.from_dict(json.loads(line)) for line in lines], bool(data)


def _ended(worker: _Worker, *, late: bool) -> Trial | None:
    """End a worker; the mutation that it died of, or None where it was through."""
    if late:
        os.kill(worker.pid, signal.SIGKILL)
    _, status = os.waitpid(worker.pid, 0)
    os.close(worker.pipe)
    if not worker.rest:
        return None
    index = worker.rest[0]
    reason = f"more than {SECONDS:.0f} s" if late else f"died with status {os.waitstatus_to_exitcode(status)}"
    return Trial(index, KINDS[index % len(KINDS)].name, "unknown", failures=[reason], seconds=SECONDS if late else 0.0)
