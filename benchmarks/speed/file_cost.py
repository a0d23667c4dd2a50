"""Measure time and memory of the conversion of a file relative to a copy (`make bench`) -> docs/measured/file-cost.md.

Each case runs in a new process, which imports torch and normswap before the measurement. The command alternates with
`cp` of the same file.
"""

import argparse
import hashlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch

from benchmarks.paths import PAGES, ROOT
from benchmarks.provenance import provenance

MODEL = "resnet50"
ROUNDS = 2
INPUT = "2x3x64x64"
PASS_MODELS = ("resnet50", "efficientnet_b0", "regnety_032")
PASS_ROUNDS = 3
PASS_TARGET = 3  # float32 passes, forward and backward, of a verified conversion
_FIELDS = ("VmRSS", "RssAnon")

CASES = {
    "from tensor names only (`--arch none --no-verify`)": ["--arch", "none", "--no-verify"],
    "with the architecture (`--no-verify`)": ["--arch", f"timm:{MODEL}", "--no-verify"],
    f"with verification (`--input {INPUT}`)": ["--arch", f"timm:{MODEL}", "--input", INPUT],
}


def main() -> None:
    """Measure, print and write docs/measured/file-cost.md."""
    rows = []
    floor = ""
    with tempfile.TemporaryDirectory() as folder:
        model = timm.create_model(MODEL)
        for name, write in (("model.pt", torch.save), ("model.safetensors", safetensors.torch.save_file)):
            path = Path(folder, name)
            write(model.state_dict(), path)
            floor = floor or _floor(path)
            rows += [(name, what, *_measured(path, options)) for what, options in CASES.items()]
        passes = [_passes_row(name, Path(folder, f"{name}.pt")) for name in PASS_MODELS]
    text = _document(rows, floor, passes)
    (PAGES / "file-cost.md").write_text(text)
    print(text)


def _measured(path: Path, options: list[str]) -> tuple[float, float, float]:
    """Return the time relative to `cp`, and the peak memory in file sizes: resident, and without mapped files."""
    ratios, resident, anonymous = [], [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        subprocess.run(["cp", path, path.with_suffix(".copy")], check=True)
        copying = time.perf_counter() - start
        command = [sys.executable, "-m", "benchmarks.speed.file_cost", "--child", str(path), *options]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        ratios.append(found["seconds"] / copying)
        resident.append(found["VmRSS"] / path.stat().st_size)
        anonymous.append(found["RssAnon"] / path.stat().st_size)
    return statistics.median(ratios), max(resident), max(anonymous)


def _passes_row(name: str, path: Path) -> tuple[str, str, float]:
    """Return a network, its input, and the processor time of its verified conversion in passes."""
    model = timm.create_model(name)
    torch.save(model.state_dict(), path)
    command = [sys.executable, "-m", "benchmarks.speed.file_cost", "--passes", name, str(path)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    size = "x".join(map(str, (2, *model.pretrained_cfg["input_size"])))
    return name, size, json.loads(done.stdout.splitlines()[-1])["passes"]


def passes(name: str, path: str) -> None:
    """Convert a file, and train its network for a step, in turn; print the ratio of their processor times."""
    import rich.console  # noqa: F401

    import normswap.checkpoints.saving
    import normswap.reports.tables
    import normswap.verification.equivalence  # noqa: F401
    from normswap.cli import main as command

    torch.set_num_threads(1)
    model = timm.create_model(name).train()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])

    def seconds(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def train() -> None:
        model.zero_grad()
        model(x).sum().backward()

    def convert() -> None:
        command(["convert", path, "--arch", f"timm:{name}", "--force"], standalone_mode=False)

    train()  # the first pass allocates memory and compiles kernels
    ratios = []
    for _ in range(PASS_ROUNDS):
        around = [seconds(train)]
        converting = seconds(convert)
        around.append(seconds(train))
        ratios.append(converting / statistics.mean(around))
    print(json.dumps({"passes": statistics.median(ratios)}))


def _floor(path: Path) -> str:
    """Return sentences on the CPU time of the digests and the checksum relative to a copy."""
    data = path.read_bytes()

    def seconds(work: Callable[[], object]) -> float:
        found = []
        for _ in range(5):
            start = time.thread_time()
            work()
            found.append(time.thread_time() - start)
        return min(found)

    copying = seconds(lambda: shutil.copyfile(path, path.with_suffix(".copy")))
    hashing, summing = seconds(lambda: hashlib.sha256(data)), seconds(lambda: zlib.crc32(data))
    size = len(data) / 1e9
    return (
        f"CPU throughput on this machine: copy {size / copying:.1f} GB/s, SHA-256 {size / hashing:.1f} GB/s, CRC-32 "
        f"of a zip archive {size / summing:.1f} GB/s. A conversion computes two digests (of the source, in a second "
        f"thread, and of the content), writes the file, compares it once and waits for the disk; `cp` does not wait. "
        f"The two digests alone take {2 * hashing / copying:.1f} times the CPU time of a copy, the CRC-32 "
        f"{summing / copying:.1f} times."
    )


def child(arguments: list[str]) -> None:
    """Convert one file in this process and print its time and memory."""
    # Import before the measurement what the command imports when needed.
    import rich.console  # noqa: F401

    import normswap.checkpoints.saving
    import normswap.reports.tables
    import normswap.verification.equivalence  # noqa: F401
    from normswap.cli import main as command

    torch.set_num_threads(1)
    base = _memory()
    peak, stopped = dict(base), threading.Event()

    def watch() -> None:
        while not stopped.wait(0.002):
            for name, value in _memory().items():
                peak[name] = max(peak[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        command(["convert", *arguments, "--force"], standalone_mode=False)
    finally:
        seconds = time.perf_counter() - start
        stopped.set()
        watcher.join()
    print(json.dumps({"seconds": seconds, **{name: peak[name] - base[name] for name in _FIELDS}}))


def _memory() -> dict[str, int]:
    text = Path("/proc/self/status").read_text()
    return {name: int(_match(name, text)[1]) * 1024 for name in _FIELDS}


def _match(name: str, text: str) -> Any:
    return re.search(rf"{name}:\s+(\d+)", text)


def _document(
    rows: list[tuple[str, str, float, float, float]], floor: str, passes: list[tuple[str, str, float]]
) -> str:
    return "\n".join(
        [
            "# Time and memory of file conversion",
            "",
            "Written by `make bench` (`python -m benchmarks.speed.file_cost`).",
            provenance(),
            "",
            f"`normswap convert` on the state dict of timm `{MODEL}` (S = 102 MB), one thread, without imports.",
            f"Time is relative to `cp` of the same file, median of {ROUNDS}. Memory is the peak without interpreter",
            "and its imports, in units of S, with and without pages mapped from files, which the system can reclaim.",
            "",
            "| file | mode | time / cp | memory / S | not mapped / S |",
            "|---|---|---|---|---|",
            *(f"| {f} | {what} | {ratio:.1f} | {rss:.2f} | {anon:.2f} |" for f, what, ratio, rss, anon in rows),
            "",
            textwrap.fill(floor, 118),
            "",
            "## Processor time of a verified conversion",
            "",
            "`normswap convert FILE` with the default input, verified, relative to one forward and backward pass of",
            "the original in training, in float32, on the same input: processor time of one process with one thread,",
            f"the two in turn, median of {PASS_ROUNDS}. Target: at most {PASS_TARGET}.",
            "",
            "| network | input | passes |",
            "|---|---|---|",
            *(
                f"| {name} | {size} | "
                + (f"{ratio:.2f} met |" if ratio <= PASS_TARGET else f"**{ratio:.2f} not met** |")
                for name, size, ratio in passes
            ),
            "",
        ]
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    elif sys.argv[1:2] == ["--passes"]:
        passes(*sys.argv[2:])
    else:
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
        main()
