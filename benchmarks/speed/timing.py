"""Entrants raced against each other in one process: round after round, in rotating order, by one clock."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

Clock = Callable[[Callable[[], Any]], float]

ROUNDS = (5, 101)
_SLOW = 3  # times the first entrant; what takes longer runs in every second round only
_SHORT = 5e-3  # seconds; where the first entrant takes less, all are called several times in a row
_CALLS = 10
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt
_FLUSHED = 2**28  # bytes, several times the L2 cache of any GPU


@dataclass(frozen=True)
class Entrant:
    """What is timed, what is done after each call outside the time, and what has to hold around both."""

    work: Callable[[], Any]
    tidy: Callable[[], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next allocation, as torch does on a GPU.

    Else page faults, which cost several passes over an activation, fall on whom the state of the heap picks.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_MAX, 0)


def wall_time(work: Callable[[], Any]) -> float:
    """Return the seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cpu_time(work: Callable[[], Any]) -> float:
    """Return the seconds for which this thread runs during `work`, whatever else the machine does."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def cuda_clock() -> Clock:
    """Return a clock of the device: between two events, with its caches flushed before the first."""
    rubbish = torch.empty(_FLUSHED, dtype=torch.uint8, device="cuda")

    def device_time(work: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        rubbish.zero_()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    return device_time


def race(entrants: Mapping[str, Entrant], clock: Clock, seconds: float) -> dict[str, dict[int, float]]:
    """Return what each entrant took, by number of the round.

    Args:
        entrants: by name; the first runs in every round.
        seconds: about how long the race may take; decides on the number of rounds, within `ROUNDS`.
    """
    for entrant in entrants.values():
        _run(entrant, clock, 1)  # warm-up
    base = next(iter(entrants.values()))
    # As many calls for all: the first one of several finds caches that another entrant has filled.
    calls = max(1, min(_CALLS, int(_SHORT / max(_run(base, clock, 1), 1e-9))))
    once = {name: _run(entrant, clock, calls) for name, entrant in entrants.items()}
    slow = _SLOW * next(iter(once.values()))
    every = {name: 2 if one > slow else 1 for name, one in once.items()}
    least, most = ROUNDS
    rounds = max(least, min(most, int(seconds / sum(once[name] * calls / every[name] for name in entrants))))
    found: dict[str, dict[int, float]] = {name: {} for name in entrants}
    with _no_collection():
        for turn in range(rounds):
            for name in _rotated([*entrants], turn):
                if turn % every[name] == 0:
                    found[name][turn] = _run(entrants[name], clock, calls)
    return found


def ratios(found: Mapping[str, Mapping[int, float]], base: str) -> dict[str, float]:
    """Return for each entrant the median of its ratios to `base` in the same round."""
    return {
        name: statistics.median(time / found[base][turn] for turn, time in times.items())
        for name, times in found.items()
    }


def medians(found: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Return for each entrant the median of its rounds."""
    return {name: statistics.median(times.values()) for name, times in found.items()}


def _run(entrant: Entrant, clock: Clock, calls: int) -> float:
    times = []
    with entrant.around():
        for _ in range(calls):
            times.append(clock(entrant.work))
            entrant.tidy()
    return statistics.median(times)


def _rotated(names: list[str], turn: int) -> list[str]:
    start = turn % len(names)
    return names[start:] + names[:start]


@contextmanager
def _no_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
