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

    The program passes over all comparisons again and again, one block each, so each of them sees the machine at many
    times. Comparisons whose ratios are all certain enough are left out of later passes.

    Args:
        comparisons: functions that return the works of a comparison; called for each block, because where the memory
            of an input lies changes its times.
        seconds: total time, exceeded by at most one pass in the first.
        block: seconds of one block.
        least_blocks: of each comparison, unless the time is over.
        precision: the uncertainty at which a ratio is certain enough.
        on_pass: called after each pass with the seconds since the start and the blocks.
    """
    start = time.perf_counter()
    blocks: dict[Key, list[Block]] = {key: [] for key in comparisons}
    is_first = True
    open_ = [*comparisons]
    while open_:
        for key in open_:
            if not is_first and time.perf_counter() - start > seconds:
                return blocks
            blocks[key].append(run_block(comparisons[key](), clock, block))
        is_first = False
        on_pass(time.perf_counter() - start, blocks)
        open_ = [key for key in open_ if not _is_settled(blocks[key], base, least_blocks, precision)]
    return blocks


def _is_settled(blocks: list[Block], base: str, least_blocks: int, precision: float) -> bool:
    if not least_blocks <= len(blocks) < _MOST_BLOCKS:
        return len(blocks) >= _MOST_BLOCKS
    return all(ratio.uncertainty <= precision for ratio in estimate_ratios(blocks, base).values())
