"""Compare few layers with BatchNorm in 3 minutes, also on a busy machine (`make bench-quick`).

One thread, by its CPU time. The program prints each ratio with half of its 95 % confidence interval, and marks those
above 2 % with `?`. `--output` writes the ratios; `--against` compares with such a file and exits with status 1 if a
ratio grew by more than both uncertainties and 5 %.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import cpu_kind
from benchmarks.records import read_document, write_document
from benchmarks.speed.arms import ARMS, BASE, GROUP_NORM
from benchmarks.speed.layers import LAYOUTS, Setting, layer_works
from benchmarks.speed.records import Comparison, comparisons_from_json
from benchmarks.speed.timing.estimates import Ratio
from benchmarks.speed.timing.rounds import cpu_time, keep_freed_memory
from benchmarks.speed.timing.schedule import measure

SECONDS = 155.0
_BLOCK = 0.5
_LEAST_BLOCKS = 8
_PRECISION = 0.01  # finer than what counts as trusted, because an uncertainty is an estimate too
# Steps within a millisecond or so: on a busy machine longer calls are seldom left undisturbed.
_SHAPES = ((1, 64, 56, 56), (2, 256, 14, 14), (2, 2048, 7, 7), (2, 512, 7, 7))
_HALF = (2, 256, 14, 14)
_MODES = ("train", "eval")


def main() -> None:
    """Measure, print, and compare with an earlier run if asked."""
    options = _options()
    earlier = None if options.against is None else _read(options.against)
    torch.set_num_threads(1)
    keep_freed_memory()
    found = _measured(options.seconds)
    console = Console(width=None if sys.stdout.isatty() else 160)
    for mode in _MODES:
        console.print(table(mode, [each for each in found if each.mode == mode]))
    console.print("± is half of the 95 % confidence interval; ? marks ratios with more than 2 %.")
    if options.output is not None:
        write_document(options.output, {"kind": cpu_kind(), "comparisons": [each.to_json() for each in found]})
    if earlier is not None:
        kind, comparisons = earlier
        if kind != cpu_kind():
            console.print(f"Warning: {options.against} was measured on another processor: {kind}.", markup=False)
        worse = find_worse(found, comparisons)
        for line in worse:
            console.print(line, markup=False)
        console.print(f"{len(worse)} ratios are worse than in {options.against}.", markup=False)
        sys.exit(1 if worse else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the ratios to this JSON file")
    parser.add_argument("--against", type=Path, help="compare with a file that --output wrote")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"time for all ratios (default {SECONDS:g})")
    return parser.parse_args()


def _read(path: Path) -> tuple[str, list[Comparison]]:
    data: Any = read_document(path)
    if data is None:
        sys.exit(f"--against: there is no file {path}")
    return data["kind"], comparisons_from_json(data["comparisons"])


def _measured(seconds: float) -> list[Comparison]:
    arms = [arm for arm in ARMS if arm.name != GROUP_NORM]
    settings = [
        *(Setting(shape, layout, "fp32", 1, mode) for mode in _MODES for layout in LAYOUTS for shape in _SHAPES),
        *(Setting(_HALF, "contiguous", "bf16", 1, mode) for mode in _MODES),
    ]
    blocks = measure(
        {setting: cache(partial(layer_works, setting, arms)) for setting in settings},
        cpu_time,
        BASE,
        seconds=seconds,
        block=_BLOCK,
        least_blocks=_LEAST_BLOCKS,
        precision=_PRECISION,
        on_pass=lambda now, _: print(f"\r{now:.0f} of {seconds:.0f} s", end="", file=sys.stderr, flush=True),
    )
    print(file=sys.stderr)
    return [Comparison.of(setting.key, blocks[setting], BASE) for setting in settings]


def table(mode: str, found: Sequence[Comparison]) -> Table:
    """Return the ratios of one mode, one row per shape, layout and dtype."""
    names = [name for name in found[0].ratios if name != BASE]
    shown = Table(title=f"{mode}: CPU time / {BASE}")
    for column in ("shape", "layout", "dtype", f"{BASE}, ms"):
        shown.add_column(column)
    for name in names:
        shown.add_column(name, justify="right")
    for each in found:
        cells = [each.subject, each.layout, each.dtype, f"{each.seconds * 1e3:.3g}"]
        shown.add_row(*cells, *(_cell(each.ratios[name]) for name in names))
    return shown


def _cell(ratio: Ratio) -> str:
    return f"{ratio.value:.2f} ±{ratio.uncertainty:.1%}{' ' if ratio.is_trusted else '?'}"


def find_worse(found: Sequence[Comparison], earlier: Sequence[Comparison]) -> list[str]:
    """Return a line for each ratio that is worse than in an earlier run; what only one run has is left out."""
    before: Mapping[Any, Comparison] = {each.setting: each for each in earlier}
    lines = []
    for each in found:
        old = before[each.setting].ratios if each.setting in before else {}
        for name, ratio in each.ratios.items():
            if name in old and ratio.is_worse_than(old[name]):
                where = f"{each.subject} {each.layout} {each.dtype} {each.mode}, {name}"
                lines.append(f"{where}: {_cell(old[name]).strip()} -> {_cell(ratio).strip()}")
    return lines


if __name__ == "__main__":
    main()
