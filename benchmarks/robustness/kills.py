"""Kill runs at random moments while they convert and save (`make fuzz`).

A killed run must leave no file, the old file or the complete new file. All runs are forked from this process, which has
already imported torch; half of them replace an old file. Every third run is killed while it writes, which its temporary
file shows; the others are killed at a random moment. The tests run 20 kills.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import timm
import torch

import normswap
from normswap.cli import main as command_line

ARCH = "timm:test_resnet,num_classes=7"
SEED = 4
_SPAN = 1.1  # times the duration of a run, so some runs end before the kill
_PATIENCE = 60.0  # seconds


@dataclass
class Outcome:
    """The results of all kills.

    Attributes:
        left: counts of `nothing`, `old` and `new` at the target.
        temporaries: number of temporary files found after kills.
        broken: kills with another result.
        remains: temporary files that the last run did not remove.
    """

    left: Counter[str] = field(default_factory=Counter)
    temporaries: int = 0
    broken: list[str] = field(default_factory=list)
    remains: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Return true if there is a failure, or if no kill hit a run while it was writing."""
        return bool(self.broken or self.remains) or not self.temporaries


class Work:
    """A converted network, two ways to write it, and the expected content of the file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.target = folder / "out" / "new.pt"
        self.target.parent.mkdir()
        model = timm.create_model("test_resnet", num_classes=7).eval()
        torch.save(model.state_dict(), folder / "source.pt")
        self.conversion = normswap.convert(model)
        self.expected = self.conversion.model.state_dict()
        torch.save({"old": torch.arange(100_000)}, folder / "old.pt")

    def save(self) -> None:
        """Write with `normswap.save`."""
        normswap.save(self.conversion.model, self.target, plan=self.conversion.plan, architecture=ARCH)

    def convert(self) -> None:
        """Write with `normswap convert`."""
        arguments = ["convert", str(self.folder / "source.pt"), "--arch", ARCH, "--no-verify", "--force"]
        command_line([*arguments, "-o", str(self.target)], standalone_mode=False)

    def reset(self, *, old: bool) -> None:
        """Write the old file at the target, or remove it. Temporary files stay for the next run."""
        self.target.unlink(missing_ok=True)
        if old:
            shutil.copyfile(self.folder / "old.pt", self.target)

    def left(self, *, old: bool) -> str:
        """Return the state of the target: `nothing`, `old`, `new`, or a description of the failure."""
        if not self.target.exists():
            return "the old file is missing" if old else "nothing"
        if old and self.target.read_bytes() == (self.folder / "old.pt").read_bytes():
            return "old"
        try:
            found = normswap.load(self.target).model.state_dict()
        except normswap.NormswapError as error:
            return f"incomplete file: {error}"
        same = found.keys() == self.expected.keys() and all(torch.equal(found[k], self.expected[k]) for k in found)
        return "new" if same else "different tensors"

    def temporaries(self) -> list[str]:
        return [entry.name for entry in self.target.parent.iterdir() if entry.name.endswith(".partial")]


def kill_all(work: Work, *, kills: int, seed: int) -> Outcome:
    """Start and kill `kills` runs, then let one run end."""
    random = Random(seed)
    writers = (work.save, work.convert)
    seconds = [_complete_run(work, writer) for writer in writers]
    outcome = Outcome()
    for index in range(kills):
        old = index % 2 == 0
        work.reset(old=old)
        which = (index // 2) % 2
        pid = _forked(writers[which])
        if index % 3 == 0:
            # A new temporary file shows that the run is writing. The run can end before the kill.
            _wait_for_a_new_temporary(work, {*work.temporaries()}, seconds[which])
            time.sleep(random.uniform(0, 0.005))
        else:
            time.sleep(random.uniform(0, _SPAN * seconds[which]))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        outcome.temporaries += len(work.temporaries())
        state = work.left(old=old)
        outcome.left[state] += 1
        if state not in ("nothing", "old", "new"):
            outcome.broken.append(f"kill {index}: {state}")
    _complete_run(work, work.save)
    outcome.remains = work.temporaries()
    return outcome


def _complete_run(work: Work, writer: Callable[[], None]) -> float:
    """Return the seconds of a complete run, which must leave the new file."""
    work.reset(old=True)
    started = time.monotonic()
    _, status = os.waitpid(_forked(writer), 0)
    seconds = time.monotonic() - started
    if status != 0 or work.left(old=True) != "new":
        raise SystemExit(f"error: a run without a kill failed with status {status}: {work.left(old=True)}")
    return seconds


def _forked(writer: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        writer()
        status = 0
    finally:
        os._exit(status)


def _wait_for_a_new_temporary(work: Work, before: set[str], seconds: float) -> None:
    """Wait until there is a new temporary file, or until 10 times the duration of a run has passed."""
    deadline = time.monotonic() + min(_PATIENCE, 10 * seconds)
    while {*work.temporaries()} <= before and time.monotonic() < deadline:
        time.sleep(0.0002)


def main() -> int:
    """Kill runs and print the results as JSON; exit code 1 if there is a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", metavar="N", type=int, default=100, help="number of runs to kill (default 100)")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the moments (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # before any parallel work: fork does not copy other threads
    folder = Path(tempfile.mkdtemp(prefix="normswap-kills-"))
    try:
        outcome = kill_all(Work(folder), kills=options.kills, seed=options.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(vars(outcome)))
    return int(outcome.failed)


if __name__ == "__main__":
    sys.exit(main())
