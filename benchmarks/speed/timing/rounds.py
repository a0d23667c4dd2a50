"""Time several works in one process: in short rounds, in random order, with the same clock.

The load of a shared machine changes within seconds. Works that run within milliseconds of each other meet the same
load, so their ratio depends on it less than their times.
"""

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

# (work, number of calls) -> seconds of a call
Clock = Callable[[Callable[[], Any], int], float]

_SLICE = 1.5e-3  # seconds; works are called several times in a row, shorter ones more often
_CALLS = (6, 30)
_LONG, _FEW = 5e-3, 2  # seconds; works that take longer are called twice
_ORDER = random.Random(0)
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt
_FLUSHED = 2**28  # bytes, several times the L2 cache of any GPU


@dataclass(frozen=True)
class Work:
    """What is timed. It runs in every `every`-th round."""

    run: Callable[[], Any]
    every: int = 1


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next allocation, as torch does on a GPU.

    Otherwise page faults, which take as long as several passes over an activation, hit works at random.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_MAX, 0)


def wall_time(run: Callable[[], Any], calls: int) -> float:
    """Return the shortest wall time of some calls in seconds."""
    return _shortest(time.perf_counter, run, calls)


def cpu_time(run: Callable[[], Any], calls: int) -> float:
    """Return the shortest CPU time of this thread during some calls in seconds: other processes take none of it."""
    return _shortest(time.thread_time, run, calls)


def _shortest(now: Callable[[], float], run: Callable[[], Any], calls: int) -> float:
    """Return the time of the call that other processes disturbed least, without that of the clock.

    A call during which the process was interrupted continues with caches that another process filled.
    """
    times = []
    for _ in range(calls):
        start = now()
        run()
        times.append(now() - start)
    return max(min(times) - _overhead(now), 1e-9)


@cache
def _overhead(now: Callable[[], float]) -> float:
    return min(-(now() - now()) for _ in range(1000))


def cuda_clock() -> Clock:
    """Return a clock that measures the time between two events on the GPU, with flushed caches."""
    flush = torch.empty(_FLUSHED, dtype=torch.uint8, device="cuda")

    def device_time(run: Callable[[], Any], calls: int) -> float:
        times = []
        for _ in range(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)

    return device_time


# One round: the seconds of each work that ran in it.
Round = dict[str, float]


def run_block(works: Mapping[str, Work], clock: Clock, seconds: float) -> list[Round]:
    """Run works in rounds for about so many seconds, at least one round, after one call of each.

    A work is called several times in a row, all works equally often. The first call of a short work is not timed,
    because it finds the caches filled by another work.
    """
    for work in works.values():
        work.run()
    calls = _count_calls(clock(next(iter(works.values())).run, 1))
    rounds: list[Round] = []
    with _no_collection():
        end = time.perf_counter() + seconds
        while not rounds or time.perf_counter() < end:
            names = [name for name, work in works.items() if len(rounds) % work.every == 0]
            _ORDER.shuffle(names)  # else the same work always leaves its caches to the same next one
            times = {name: _slice(works[name].run, clock, calls) for name in names}
            rounds.append({name: times[name] for name in works if name in times})
    return rounds


def _count_calls(once: float) -> int:
    """Return how often to call each work in a row if one call takes so many seconds."""
    least, most = _CALLS
    return _FEW if once > _LONG else max(least, min(most, round(_SLICE / max(once, 1e-9))))


def _slice(run: Callable[[], Any], clock: Clock, calls: int) -> float:
    if calls > _FEW:
        run()
    return clock(run, calls)


@contextmanager
def _no_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
