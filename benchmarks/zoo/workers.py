"""Run each model in a forked process with limits of time and memory.

A process writes its record after every stage, so the record of a crash, a hang or a kill shows the stage. Processes are
forked because the parent has already imported torch and the zoos; an import per model would take hours.
"""

import gc
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.zoo.catalog import Entry
from benchmarks.zoo.records import FAILED, Record

Work = Callable[[Entry, Callable[[Record], None]], object]

_POLL_SECONDS = 0.05
_LOG_TAIL = 600


@dataclass(frozen=True)
class Limits:
    """The limits of time and memory for one model."""

    seconds: float
    gigabytes: float


@dataclass
class _Child:
    pid: int
    entry: Entry
    scratch: Path
    started: float
    kill_reason: str = ""


def run_all(
    work: Work, jobs: Iterable[Entry], *, workers: int, limits: Limits, scratch: Path, blank: Callable[[Entry], Record]
) -> Iterator[Record]:
    """Run `work` on every job and yield their records in the order in which they end."""
    scratch.mkdir(parents=True, exist_ok=True)
    gc.collect()
    gc.freeze()  # otherwise garbage collection in each child copies the memory of the parent
    pending = iter(jobs)
    running: list[_Child] = []
    exhausted = False
    try:
        while running or not exhausted:
            while not exhausted and len(running) < workers:
                entry = next(pending, None)
                if entry is None:
                    exhausted = True
                else:
                    running.append(_start(work, entry, scratch / f"{os.getpid()}-{time.monotonic_ns()}", limits))
            for child in list(running):
                status = _ended(child, limits)
                if status is not None:
                    running.remove(child)
                    yield _collect(child, status, blank)
            time.sleep(_POLL_SECONDS)
    finally:
        for child in running:
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)


def _start(work: Work, entry: Entry, scratch: Path, limits: Limits) -> _Child:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return _Child(pid, entry, scratch, time.monotonic())
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.alarm(int(limits.seconds) + 60)  # in case the parent has ended
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        log = os.open(scratch.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work(entry, lambda record: _save(scratch, record))
        code = 0
    except BaseException as error:  # noqa: BLE001 - the child must not return into the code of the parent
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _save(scratch: Path, record: Record) -> None:
    temporary = scratch.with_suffix(".new")
    temporary.write_text(record.to_json())
    temporary.replace(scratch.with_suffix(".json"))


def _ended(child: _Child, limits: Limits) -> int | None:
    pid, status = os.waitpid(child.pid, os.WNOHANG)
    if pid:
        return status
    if not child.kill_reason:
        used = _resident_gigabytes(child.pid)
        if time.monotonic() - child.started > limits.seconds:
            child.kill_reason = f"time limit of {limits.seconds:.0f} s"
        elif used > limits.gigabytes:
            child.kill_reason = f"memory limit of {limits.gigabytes:g} GB"
        if child.kill_reason:
            os.kill(child.pid, signal.SIGKILL)
    return None


def _resident_gigabytes(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):  # the process has ended, or this system has no /proc
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def _collect(child: _Child, status: int, blank: Callable[[Entry], Record]) -> Record:
    result, log = child.scratch.with_suffix(".json"), child.scratch.with_suffix(".log")
    record = Record.from_json(result.read_text()) if result.exists() else blank(child.entry)
    if status != 0:
        reason = child.kill_reason or f"the process ended with status {os.waitstatus_to_exitcode(status)}"
        record.outcome = FAILED
        record.failures.append(f"{reason}, in the stage: {record.stage}")
        record.trace = log.read_text(errors="replace")[-_LOG_TAIL:] if log.exists() else ""
    for path in (result, log, child.scratch.with_suffix(".new")):
        path.unlink(missing_ok=True)
    record.seconds["total"] = round(time.monotonic() - child.started, 3)
    return record
