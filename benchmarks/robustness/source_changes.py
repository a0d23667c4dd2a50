"""Change source files at random moments while they are converted (`make fuzz`).

A conversion must either write the tensors of one version of the file, or end with exit code 2, an error of one line
and no output. A signal, a traceback or tensors of two versions are failures. All runs are forked from this process,
which has already imported torch. The tests run a few changes.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor

from normswap.cli import main as command_line

SEED = 5

State = dict[str, Tensor]


def _truncated(path: Path, _new: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def _overwritten(path: Path, new: Path) -> None:
    """Truncate the file and write it again in place, as trainers do."""
    shutil.copyfile(new, path)


def _patched(path: Path, new: Path) -> None:
    """Write in place without truncation and restore the old modification time."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.write(new.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replaced(path: Path, new: Path) -> None:
    twin = path.with_name("twin")
    shutil.copyfile(new, twin)
    os.replace(twin, path)


CHANGES: tuple[Callable[[Path, Path], None], ...] = (_truncated, _overwritten, _patched, _replaced)
WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "last.pt": torch.save,
    "legacy.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "last.safetensors": safetensors.torch.save_file,
}


@dataclass
class Outcome:
    """Counts of how the runs ended, and descriptions of the failures."""

    ended: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


def change_all(folder: Path, *, runs: int, seed: int) -> Outcome:
    """Start `runs` conversions and change the source of each at a random moment."""
    random, outcome = Random(seed), Outcome()
    model = timm.create_model("test_resnet", num_classes=7)
    first: State = model.state_dict()
    second = {key: value + 1 for key, value in first.items()}
    for name, write in WRITERS.items():
        for version, state in (("first", first), ("second", second)):
            (folder / version).mkdir(exist_ok=True)
            write(state, folder / version / name)
    seconds: dict[str, float] = {}
    for index in range(runs):
        name = [*WRITERS][index % len(WRITERS)]
        change = CHANGES[index // len(WRITERS) % len(CHANGES)]
        seconds.setdefault(name, _seconds(folder, name))
        delay = random.uniform(0, 1.1 * seconds[name])
        status, error = _run(
            folder, name, lambda path, new, change=change, delay=delay: _later(delay, change, path, new)
        )
        result = _result(folder, status, error, (first, second))
        outcome.ended[result] += 1
        if result not in ("refused", "converted"):
            outcome.broken.append(f"{name}, {change.__name__} after {delay:.3f} s: {result}")
    return outcome


def _later(delay: float, change: Callable[[Path, Path], None], path: Path, new: Path) -> None:
    time.sleep(delay)
    change(path, new)


def _seconds(folder: Path, name: str) -> float:
    started = time.monotonic()
    status, error = _run(folder, name, lambda _path, _new: None)
    if status != 0:
        raise SystemExit(f"error: a run without a change failed with status {status}: {error}")
    return time.monotonic() - started


def _run(folder: Path, name: str, meanwhile: Callable[[Path, Path], None]) -> tuple[int, str]:
    """Return the exit code of a conversion, negative for a signal, and its text on stderr."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    source = shutil.copy(folder / "first" / name, work / name)
    pid = _forked(
        ["convert", str(source), "--arch", "none", "--no-verify", "-o", str(work / "out.pt")], folder / "stderr"
    )
    meanwhile(Path(source), folder / "second" / name)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), (folder / "stderr").read_text()


def _forked(arguments: list[str], errors: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status: Any = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        command_line(arguments)
    except SystemExit as end:
        status = end.code
    finally:
        sys.stderr.flush()
        os._exit(int(status or 0))


def _result(folder: Path, status: int, error: str, versions: tuple[State, State]) -> str:
    """Return `refused`, `converted`, or a description of the failure."""
    left = sorted(entry.name for entry in (folder / "work").iterdir() if entry.name not in WRITERS)
    if status == 2 and not left and error.startswith("error: ") and error.count("\n") == 1:
        return "refused"
    if status != 0 or left != ["out.pt"]:
        return f"exit code {status}, files {left}, stderr {error[-200:]!r}"
    written = torch.load(folder / "work" / "out.pt")
    complete = (all(torch.equal(written[key], value) for key, value in version.items()) for version in versions)
    return "converted" if any(complete) else "tensors of two versions"


def main() -> int:
    """Change sources and print the results as JSON; exit code 1 if there is a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", metavar="N", type=int, default=100, help="number of conversions (default 100)")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the moments (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # before any parallel work: fork does not copy other threads
    folder = Path(tempfile.mkdtemp(prefix="normswap-changes-"))
    try:
        outcome = change_all(folder, runs=options.runs, seed=options.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(vars(outcome)))
    return int(bool(outcome.broken))


if __name__ == "__main__":
    sys.exit(main())
