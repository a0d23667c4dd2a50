"""Read one damaged file with `normswap inspect`, `normswap convert` and `normswap.load`, and check the results."""

import re
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Self

import torch
from click.testing import CliRunner
from torch import nn

import normswap
from benchmarks.robustness.files import INPUT, KINDS, Kind, Material, Payloads, net
from benchmarks.robustness.hostile_mutations import HOLES
from benchmarks.robustness.mutations import mutate, mutate_folder
from normswap.cli import main

_MAX_MEMORY = re.compile(r"can't allocate memory|not enough memory|MemoryError|Cannot allocate memory", re.I)


@dataclass
class Trial:
    """The result of one mutation. `answers` has the exit code of each command and the result of `load`."""

    index: int
    kind: str
    mutation: str = ""
    answers: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the trial with these fields."""
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


class Bench:
    """Valid files of every kind, made once, and the trials on damaged copies of them."""

    def __init__(self, folder: Path, payloads: Payloads) -> None:
        self.payloads = payloads
        self.folder = folder
        self.good: dict[str, bytes] = {}
        self.good_folders: dict[str, Path] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for kind in KINDS:
            path = folder / f"good-{kind.name.replace(' ', '-')}{kind.suffix}"
            kind.make(path)
            if path.is_dir():
                self.good_folders[kind.name] = path
            else:
                self.good[kind.name] = path.read_bytes()

    def mutated(self, index: int, *, seed: int, folder: Path) -> tuple[Kind, str, Path]:
        """Write the damaged file or folder of mutation `index`, which is the same in every run."""
        random = Random(f"{seed}-{index}")
        kind = KINDS[index % len(KINDS)]
        path = folder / f"bad{kind.suffix}"
        use = Material(random, self.good[random.choice(sorted(self.good))], self.payloads)
        if kind.name in self.good_folders:
            shutil.copytree(self.good_folders[kind.name], path)
            return kind, mutate_folder(path, use), path
        name, changed = mutate(self.good[kind.name], use)
        path.write_bytes(changed)
        return kind, name, path

    def trial(self, index: int, *, seed: int, scratch: Path) -> Trial:
        """Run one mutation in the empty folder `scratch`."""
        started = time.monotonic()
        kind, mutation, path = self.mutated(index, seed=seed, folder=scratch)
        trial = Trial(index, kind.name, mutation)
        arch = ["--arch", kind.arch] if kind.arch else []
        out = scratch / f"out{kind.suffix if kind.written is None else kind.written}"
        self._command(trial, "inspect", [str(path), *arch, "--input", INPUT])
        self._command(trial, "convert", [str(path), *arch, "--input", INPUT, "-o", str(out)])
        written = {entry for entry in scratch.iterdir() if entry != path}
        if written != ({out} if trial.answers["convert"] == "0" else set()):
            trial.failures.append(f"convert exited {trial.answers['convert']} and wrote {sorted(map(str, written))}")
        self._load(trial, path, kind.arch)
        if self.payloads.marker.exists():
            trial.failures.append("planted code ran")
            self.payloads.marker.unlink()
        trial.seconds = time.monotonic() - started
        return trial

    def _command(self, trial: Trial, command: str, arguments: list[str]) -> None:
        result = CliRunner().invoke(main, [command, *arguments])
        trial.answers[command] = str(result.exit_code)
        error = result.exception
        if error is not None and not isinstance(error, SystemExit):
            trial.failures.append(f"{command}: {type(error).__name__}: {str(error)[:200]}")
        elif result.exit_code not in (0, 1, 2):
            trial.failures.append(f"{command}: exit code {result.exit_code}")
        elif result.exit_code and (not result.stderr.startswith("error: ") or result.stderr.count("\n") != 1):
            trial.failures.append(f"{command}: expected one line that starts with error:, got {result.stderr[:200]}")
        elif _MAX_MEMORY.search(result.stderr):
            trial.failures.append(f"{command}: requested more memory than allowed: {result.stderr[:200]}")

    def _load(self, trial: Trial, path: Path, arch: str | None) -> None:
        try:
            loaded = normswap.load(path, architecture=arch)
        except normswap.NormswapError as error:
            trial.answers["load"] = "refused"
            if _MAX_MEMORY.search(str(error)):
                trial.failures.append(f"load: requested more memory than allowed: {error}"[:200])
        except Exception as error:  # noqa: BLE001 - any other error is a failure
            trial.answers["load"] = "failed"
            trial.failures.append(f"load: {type(error).__name__}: {str(error)[:200]}")
        else:
            trial.answers["load"] = "loaded"
            if trial.mutation == HOLES and not _as_saved(loaded.model):
                trial.failures.append("load: a tensor differs from the files")


def _as_saved(model: nn.Module) -> bool:
    """Return true if the weights equal those of the valid files. These mutations change only the index."""
    good, found = net().state_dict(), model.state_dict()
    return all(torch.equal(tensor, found[key]) for key, tensor in good.items())
