"""A part of `make fuzz`, and that its checks would notice what they look for."""

import json
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import click
import pytest

pytest.importorskip("resource", reason="limits the memory of processes (setrlimit)")

from benchmarks.paths import ROOT
from benchmarks.robustness import run, workers
from benchmarks.robustness import trial as trial_module
from benchmarks.robustness.files import KINDS, Material, Payloads, plant, register
from benchmarks.robustness.mutations import FOLDER_MUTATIONS, MUTATIONS, files_in
from benchmarks.robustness.trial import Bench, Trial

MUTATED = 300
pytestmark = pytest.mark.slow


@pytest.mark.multiprocess
def test_damaged_files_never_end_in_a_traceback_a_file_or_code_that_ran() -> None:
    """In a process of its own, which forks: this one may have threads."""
    command = [sys.executable, "-m", run.__name__, "--json", "--workers", "1", "--mutations", str(MUTATED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    trials = [Trial.from_dict(data) for data in json.loads(done.stdout)]
    assert sorted(trial.index for trial in trials) == list(range(MUTATED))
    assert [trial.failures for trial in trials if trial.failures] == []
    assert {trial.kind for trial in trials} == {kind.name for kind in KINDS}
    assert {trial.mutation for trial in trials} == {*MUTATIONS, *FOLDER_MUTATIONS}
    answers = Counter((trial.answers["convert"], trial.answers["load"]) for trial in trials)
    assert answers["2", "refused"] > MUTATED // 3
    assert answers["0", "loaded"] > MUTATED // 50


@pytest.fixture
def payloads(tmp_path: Path) -> Payloads:
    return plant(tmp_path)


@pytest.mark.parametrize("index", range(6))
def test_the_payloads_would_run(payloads: Payloads, index: int) -> None:
    """Else it proves nothing that they do not."""
    pickle.loads(payloads.pickles[index])
    assert payloads.marker.exists()
    assert len(payloads.pickles) == 6


@pytest.fixture
def bench(tmp_path: Path, payloads: Payloads, monkeypatch: pytest.MonkeyPatch) -> Bench:
    register()
    monkeypatch.setattr(trial_module, "KINDS", KINDS[:1])
    return Bench(tmp_path / "good", payloads)


# torch reads no newer protocol than 3 with weights_only.
READ = (
    "state dict",
    "legacy pickle",
    "safetensors",
    "Lightning checkpoint",
    "torch shards",
    "distributed checkpoint",
    ".pt2 of torch.export",
)


@pytest.mark.parametrize("name", READ)
def test_undamaged_files_are_converted(tmp_path: Path, bench: Bench, name: str) -> None:
    kind = next(kind for kind in KINDS if kind.name == name)
    trial = Trial(0, kind.name)
    kind.make(tmp_path / f"a{kind.suffix}")
    bench._command(trial, "convert", [str(tmp_path / f"a{kind.suffix}"), "--arch", str(kind.arch), "--no-verify"])
    assert (trial.answers, trial.failures) == ({"convert": "0"}, [])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The bytes of the files of every kind."""
    register()
    folder = tmp_path_factory.mktemp("good")
    for index, kind in enumerate(KINDS):
        kind.make(folder / f"{index}{kind.suffix}")
    return [file.read_bytes() for file in files_in(folder)]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_the_same_for_the_same_seed(good: list[bytes], payloads: Payloads, name: str) -> None:
    made = 0
    for data in good:
        first, second = (MUTATIONS[name](data, Material(Random(3), data[::-1], payloads)) for _ in range(2))
        assert first == second
        made += first is not None
    assert made > 0


def _raises(_arguments: Sequence[str], _marker: Path) -> None:
    raise ZeroDivisionError("by zero")


def _writes_and_fails(arguments: Sequence[str], _marker: Path) -> None:
    if "-o" in arguments:
        Path(arguments[-1]).write_text("half")
    click.echo("error: no", err=True)
    sys.exit(2)


def _fails_in_two_lines(_arguments: Sequence[str], _marker: Path) -> None:
    click.echo("error: no\nand no", err=True)
    sys.exit(2)


def _leaves_a_temporary(arguments: Sequence[str], _marker: Path) -> None:
    if "-o" in arguments:
        Path(arguments[-1]).write_text("whole")
        Path(arguments[-1]).with_name(".out.pt.01234567.partial").touch()


def _runs_code(_arguments: Sequence[str], marker: Path) -> None:
    marker.touch()


def _asks_for_memory(_arguments: Sequence[str], _marker: Path) -> None:
    click.echo("error: you tried to allocate 1 TB: can't allocate memory", err=True)
    sys.exit(2)


def _ends_otherwise(_arguments: Sequence[str], _marker: Path) -> None:
    sys.exit(3)


DEFECTS: dict[str, tuple[Callable[[Sequence[str], Path], None], str]] = {
    "a traceback": (_raises, "inspect: ZeroDivisionError: by zero"),
    "a file on failure": (_writes_and_fails, "convert exited 2 and wrote ["),
    "two lines": (_fails_in_two_lines, "inspect: expected one line that starts with error:, got error: no"),
    "a temporary": (_leaves_a_temporary, ".partial"),
    "code that ran": (_runs_code, "planted code ran"),
    "too much memory": (_asks_for_memory, "requested more memory than allowed"),
    "another exit code": (_ends_otherwise, "inspect: exit code 3"),
}


@pytest.mark.parametrize(("defect", "message"), DEFECTS.values(), ids=DEFECTS)
def test_a_defect_is_noticed(
    tmp_path: Path,
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    defect: Callable[[Sequence[str], Path], None],
    message: str,
) -> None:
    @click.command(context_settings={"ignore_unknown_options": True})
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def broken(arguments: Sequence[str]) -> None:
        defect(arguments, bench.payloads.marker)

    monkeypatch.setattr(trial_module, "main", broken)
    (tmp_path / "scratch").mkdir()
    trial = bench.trial(0, seed=0, scratch=tmp_path / "scratch")
    assert message in " | ".join(trial.failures)


def test_a_traceback_of_load_is_noticed(tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr(trial_module.normswap, "load", broken)
    (tmp_path / "scratch").mkdir()
    assert "load: RecursionError: too deep" in bench.trial(0, seed=0, scratch=tmp_path / "scratch").failures


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_worker_that_hangs_or_dies_costs_one_mutation(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trial(index: int, *, seed: int, scratch: Path) -> Trial:
        if index == 1:
            os._exit(7)
        if index == 3:
            time.sleep(60)
        return Trial(index, "state dict", "none")

    monkeypatch.setattr(bench, "trial", trial)
    monkeypatch.setattr(workers, "SECONDS", 2.0)
    trials = list(workers.run_all(bench, count=6, seed=0, workers=2, scratch=tmp_path / "scratch"))
    assert {t.index: t.failures for t in trials} == {
        **{index: [] for index in (0, 2, 4, 5)},
        1: ["died with status 7"],
        3: ["more than 2 s"],
    }


def test_the_page_counts_what_came_of_it() -> None:
    refused = {"inspect": "2", "convert": "2", "load": "refused"}
    page = run.document(
        [
            Trial(0, "state dict", "truncation", refused),
            Trial(1, "state dict", "bit flips", {"inspect": "0", "convert": "0", "load": "loaded"}),
            Trial(2, "TorchScript", "truncation", refused, ["inspect: ValueError: no"], 3.5),
        ],
        seed=9,
    )
    assert "3 damaged files (seed 9)" in page
    assert "**1 failures.** Slowest trial: 3.5 s (TorchScript, truncation)." in page
    assert "| state dict | 2 | 1 | 1 | 1 | 0 |" in page
    assert "| truncation | 2 | 2 | 0 | 0 | 1 |" in page
    assert "- 2 (TorchScript, truncation): inspect: ValueError: no" in page
