"""Time several entrants in one process: in rounds, in rotating order, with the same clock."""

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
_SLOW = 3  # entrants slower than so many times the first run in every second round only
_SHORT = 5e-3  # seconds; if the first entrant takes less, all are called several times in a row
_CALLS = 10
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt
_FLUSHED = 2**28  # bytes, several times the L2 cache of any GPU


@dataclass(frozen=True)
class Entrant:
    """The timed work, the cleanup after each call (not timed), and a context manager around both."""

    work: Callable[[], Any]
    tidy: Callable[[], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next allocation, as torch does on a GPU.

    Otherwise page faults, which take as long as several passes over an activation, hit entrants at random.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_MAX, 0)


def wall_time(work: Callable[[], Any]) -> float:
    """Return the wall time of `work` in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cpu_time(work: Callable[[], Any]) -> float:
    """Return the CPU time of this thread during `work` in seconds."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def cuda_clock() -> Clock:
    """Return a clock that measures the time between two events on the GPU, with flushed caches."""
    flush = torch.empty(_FLUSHED, dtype=torch.uint8, device="cuda")

    def device_time(work: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    return device_time


def race(entrants: Mapping[str, Entrant], clock: Clock, seconds: float) -> dict[str, dict[int, float]]:
    """Return the time of each entrant in seconds, by number of the round.

    Args:
        entrants: by name; the first runs in every round.
        seconds: approximate total time; determines the number of rounds, within `ROUNDS`.
    """
    for entrant in entrants.values():
        _run(entrant, clock, 1)  # warm-up
    base = next(iter(entrants.values()))
    # The same number of calls for all: the first call finds the caches filled by another entrant.
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
