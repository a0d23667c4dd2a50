"""Runs killed at random moments while they convert and save: they leave nothing, the old file or the whole new one.

Run by `make fuzz` with 100 kills and by the tests with 20. Every run is forked from this process, which has imported
torch already; half of them replace an old file. Every third is killed while it writes, as seen by its temporary, the
others at any moment of the time that a whole run takes.
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
_SPAN = 1.1  # of a whole run's time, so that some are through before they are killed
_PATIENCE = 60.0  # seconds


@dataclass
class Outcome:
    """How many runs left nothing, the old or the new file; what is none of the three; temporaries before the end."""

    left: Counter[str] = field(default_factory=Counter)
    temporaries: int = 0
    broken: list[str] = field(default_factory=list)
    remains: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether anything is wrong, which no kill in the middle of writing would be too."""
        return bool(self.broken or self.remains) or not self.temporaries


class Work:
    """A converted network, two ways to write it, and what its file must hold."""

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
        """Write through Python."""
        normswap.save(self.conversion.model, self.target, plan=self.conversion.plan, architecture=ARCH)

    def convert(self) -> None:
        """Write through the command line's own function."""
        arguments = ["convert", str(self.folder / "source.pt"), "--arch", ARCH, "--no-verify", "--force"]
        command_line([*arguments, "-o", str(self.target)], standalone_mode=False)

    def reset(self, *, old: bool) -> None:
        """Put the old file at the target, or nothing; temporaries stay for the next run to find."""
        self.target.unlink(missing_ok=True)
        if old:
            shutil.copyfile(self.folder / "old.pt", self.target)

    def left(self, *, old: bool) -> str:
        """Say what is at the target: `nothing`, `old`, `new`, or what is wrong with it."""
        if not self.target.exists():
            return "the old file is gone" if old else "nothing"
        if old and self.target.read_bytes() == (self.folder / "old.pt").read_bytes():
            return "old"
        try:
            found = normswap.load(self.target).model.state_dict()
        except normswap.NormswapError as error:
            return f"no whole file: {error}"
        same = found.keys() == self.expected.keys() and all(torch.equal(found[k], self.expected[k]) for k in found)
        return "new" if same else "other tensors"

    def temporaries(self) -> list[str]:
        return [entry.name for entry in self.target.parent.iterdir() if entry.name.endswith(".partial")]


def kill_all(work: Work, *, kills: int, seed: int) -> Outcome:
    """Start and kill so many runs, then let one end."""
    random = Random(seed)
    writers = (work.save, work.convert)
    seconds = [_whole_run(work, writer) for writer in writers]
    outcome = Outcome()
    for index in range(kills):
        old = index % 2 == 0
        work.reset(old=old)
        which = (index // 2) % 2
        pid = _forked(writers[which])
        if index % 3 == 0:
            # The bytes are on their way from the moment that the temporary is new; where the run is through, so be it.
            _wait_for_a_new_temporary(work, {*work.temporaries()}, seconds[which])
            time.sleep(random.uniform(0, 0.005))
        else:
            time.sleep(random.uniform(0, _SPAN * seconds[which]))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        outcome.temporaries += len(work.temporaries())
        what = work.left(old=old)
        outcome.left[what] += 1
        if what not in ("nothing", "old", "new"):
            outcome.broken.append(f"kill {index}: {what}")
    _whole_run(work, work.save)
    outcome.remains = work.temporaries()
    return outcome


def _whole_run(work: Work, writer: Callable[[], None]) -> float:
    """The seconds that a run takes, which must leave the new file."""
    work.reset(old=True)
    started = time.monotonic()
    _, status = os.waitpid(_forked(writer), 0)
    seconds = time.monotonic() - started
    if status != 0 or work.left(old=True) != "new":
        raise SystemExit(f"a run that nobody killed failed with status {status}: {work.left(old=True)}")
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
    """Until there is one that was not there, or long after a run would be through."""
    deadline = time.monotonic() + min(_PATIENCE, 10 * seconds)
    while {*work.temporaries()} <= before and time.monotonic() < deadline:
        time.sleep(0.0002)


def main() -> int:
    """Kill, print what was left as JSON; exit status 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    torch.set_num_threads(1)  # before any parallel work: a forked process has no threads but its own
    folder = Path(tempfile.mkdtemp(prefix="normswap-kills-"))
    try:
        outcome = kill_all(Work(folder), kills=options.kills, seed=options.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(vars(outcome)))
    return int(outcome.failed)


if __name__ == "__main__":
    sys.exit(main())
