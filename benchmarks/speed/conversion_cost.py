"""Measure the time of conversion and start-up (`make bench`) -> docs/measured/cost.md.

Build, forward pass and conversion are measured in turn in one process: their ratio depends little on the load of the
machine.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import normswap
from benchmarks.paths import PAGES
from benchmarks.provenance import provenance

MODELS = ("resnet50", "efficientnet_b0", "densenet121", "mobilenetv3_large_100", "regnety_002")
ROUNDS = 7
STARTS = 9


def main() -> None:
    """Measure, print and write docs/measured/cost.md."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    conversion = [_conversion_row(name) for name in MODELS]
    starts = _start_rows()
    text = _document(conversion, starts)
    (PAGES / "cost.md").write_text(text)
    print(text)


def _conversion_row(name: str) -> tuple[str, int, float, float, float, float]:
    """Build, run and convert one model in turn; return its name, sites, median seconds of each, and the ratio."""
    build_times, forward_times, convert_times = [], [], []
    sites = 0
    for _ in range(ROUNDS):
        gc.collect()
        model: nn.Module
        seconds, model = _timed(lambda: timm.create_model(name).eval())
        build_times.append(seconds)
        x = torch.randn(2, *model.pretrained_cfg["input_size"])
        with torch.no_grad():
            forward_times.append(_timed(lambda model=model, x=x: model(x))[0])
        seconds, conversion = _timed(lambda model=model, x=x: normswap.convert(model, x))
        convert_times.append(seconds)
        sites = len(conversion.plan.swaps)
    build, forward, convert = map(statistics.median, (build_times, forward_times, convert_times))
    return name, sites, build, forward, convert, convert / (build + forward)


def _start_rows() -> list[tuple[str, float]]:
    commands = {
        "`python -c pass`": [sys.executable, "-c", "pass"],
        "`import normswap`": [sys.executable, "-c", "import normswap"],
        "`normswap --help`": [str(Path(sys.executable).with_name("normswap")), "--help"],
        "`import torch`": [sys.executable, "-c", "import torch"],
    }
    times: dict[str, list[float]] = {what: [] for what in commands}
    for _ in range(STARTS):
        for what, command in commands.items():
            times[what].append(_timed(lambda c=command: subprocess.run(c, check=True, capture_output=True))[0])
    return [(what, statistics.median(seconds)) for what, seconds in times.items()]


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _document(conversion: list[tuple[str, int, float, float, float, float]], starts: list[tuple[str, float]]) -> str:
    lines = [
        "# Time of conversion and start-up",
        "",
        "Written by `make bench` (`python -m benchmarks.speed.conversion_cost`).",
        provenance(),
        "",
        "`normswap.convert(model, x)` without verification: discovery, tracing, one forward pass with hooks, planning,",
        "copying and swapping. One thread, batch size 2, default input size of the model; medians of",
        f"{ROUNDS} rounds in one process. The ratio is convert / (build + one forward pass).",
        "",
        "| model | sites | build, s | forward, s | convert, s | ratio |",
        "|---|---|---|---|---|---|",
        *(f"| {n} | {s} | {b:.2f} | {f:.2f} | {c:.2f} | {r:.2f} |" for n, s, b, f, c, r in conversion),
        "",
        f"Start-up, medians of {STARTS} new processes:",
        "",
        "| command | seconds |",
        "|---|---|",
        *(f"| {what} | {seconds:.2f} |" for what, seconds in starts),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
