"""Spread the time of a program over its comparisons, by their uncertainty."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from benchmarks.speed.timing.estimates import Block, estimate_ratios
from benchmarks.speed.timing.rounds import Clock, Work, run_block

_MOST_BLOCKS = 100

Key = TypeVar("Key", bound=Hashable)


def measure(
    comparisons: Mapping[Key, Callable[[], Mapping[str, Work]]],
    clock: Clock,
    base: str,
    *,
    seconds: float,
    block: float,
    least_blocks: int,
    precision: float,
    on_pass: Callable[[float, Mapping[Key, list[Block]]], None] = lambda _, __: None,
) -> dict[Key, list[Block]]:
    """Return the blocks of rounds of each comparison.

    The program passes over the comparisons again and again, one block each, so each of them sees the machine at many
    times. After `least_blocks` passes, comparisons whose ratios are all certain enough are left out, and each pass
    takes the less certain half of the others.

    Args:
        comparisons: functions that return the works of a comparison; called for each block, so that not all inputs need
            memory at once.
        seconds: total time; the first pass is always whole.
        block: seconds of one block.
        least_blocks: of each comparison, unless the time is over.
        precision: the uncertainty at which a ratio is certain enough.
        on_pass: called after each pass with the seconds since the start and the blocks.
    """
    start = time.perf_counter()
    blocks: dict[Key, list[Block]] = {key: [] for key in comparisons}
    chosen = [*comparisons]
    while chosen:
        for key in chosen:
            if all(blocks.values()) and time.perf_counter() - start > seconds:
                return blocks
            blocks[key].append(run_block(comparisons[key](), clock, block))
        on_pass(time.perf_counter() - start, blocks)
        if all(len(each) >= least_blocks for each in blocks.values()):
            chosen = _less_certain_half(blocks, base, precision)
    return blocks


def _less_certain_half(blocks: Mapping[Key, list[Block]], base: str, precision: float) -> list[Key]:
    widths = {
        key: max(ratio.uncertainty for ratio in estimate_ratios(each, base).values())
        for key, each in blocks.items()
        if len(each) < _MOST_BLOCKS
    }
    open_ = sorted((key for key in widths if widths[key] > precision), key=lambda key: -widths[key])
    return open_[: (len(open_) + 1) // 2]
