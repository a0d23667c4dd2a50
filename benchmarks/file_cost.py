"""What converting a file costs in time and memory, against copying it -> docs/file-cost.md.

Run by `make bench`. Every case is a process of its own that has torch and normswap loaded before it starts counting;
time is that of the command, interleaved with `cp` of the same file.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
MODEL = "resnet50"
ROUNDS = 2
INPUT = "2x3x64x64"
_FIELDS = ("VmRSS", "RssAnon")

CASES = {
    "by names alone (`--arch none`)": ["--arch", "none"],
    "with the architecture (`--no-verify`)": ["--arch", f"timm:{MODEL}", "--no-verify"],
    f"with the proof in float64 (`--input {INPUT}`)": ["--arch", f"timm:{MODEL}", "--input", INPUT],
}


def main() -> None:
    """Measure, print and write docs/file-cost.md."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = timm.create_model(MODEL)
        for name, write in (("model.pt", torch.save), ("model.safetensors", safetensors.torch.save_file)):
            path = Path(folder, name)
            write(model.state_dict(), path)
            rows += [(name, what, *_measured(path, options)) for what, options in CASES.items()]
    text = _document(rows)
    (ROOT / "docs" / "file-cost.md").write_text(text)
    print(text)


def _measured(path: Path, options: list[str]) -> tuple[float, float, float]:
    """Time over that of `cp`, and the most memory above the loaded interpreter, all and without mapped files, in S."""
    ratios, resident, anonymous = [], [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        subprocess.run(["cp", path, path.with_suffix(".copy")], check=True)
        copying = time.perf_counter() - start
        command = [sys.executable, __file__, "--child", str(path), *options]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        ratios.append(found["seconds"] / copying)
        resident.append(found["VmRSS"] / path.stat().st_size)
        anonymous.append(found["RssAnon"] / path.stat().st_size)
    return statistics.median(ratios), max(resident), max(anonymous)


def child(arguments: list[str]) -> None:
    """Convert one file in this process and print what it took."""
    import rich.console  # noqa: F401 - loaded before counting begins

    from normswap.cli import main as command

    torch.set_num_threads(1)
    base = _memory()
    peak, over = dict(base), threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            for name, value in _memory().items():
                peak[name] = max(peak[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        command(["convert", *arguments, "--force"], standalone_mode=False)
    finally:
        seconds = time.perf_counter() - start
        over.set()
        watcher.join()
    print(json.dumps({"seconds": seconds, **{name: peak[name] - base[name] for name in _FIELDS}}))


def _memory() -> dict[str, int]:
    text = Path("/proc/self/status").read_text()
    return {name: int(_match(name, text)[1]) * 1024 for name in _FIELDS}


def _match(name: str, text: str) -> Any:
    return re.search(rf"{name}:\s+(\d+)", text)


def _document(rows: list[tuple[str, str, float, float, float]]) -> str:
    return "\n".join(
        [
            "# What converting a file costs",
            "",
            "Written by `make bench` (`benchmarks/file_cost.py`).",
            provenance(),
            "",
            f"`normswap convert` on the state dict of timm `{MODEL}` (S = 102 MB), one thread, imports done before.",
            f"Time over that of `cp` on the same file, median of {ROUNDS}; most memory above the loaded interpreter in",
            "units of S, with and without pages that are mapped from files and that the system can take back.",
            "",
            "| file | how | time / cp | memory / S | of that not mapped |",
            "|---|---|---|---|---|",
            *(f"| {f} | {what} | {ratio:.1f} | {rss:.2f} | {anon:.2f} |" for f, what, ratio, rss, anon in rows),
            "",
        ]
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
