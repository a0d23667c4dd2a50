"""What commands show while they run, what they say if they are interrupted, and who speaks of several processes."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import normswap
from normswap.cli import console, main
from tests.helpers import files

DIGITS = ["--data", "digits", "--input-size", "32", "--batch-size", "20", "--batches", "3"]
SHORT = {
    "model.architecture": "timm:test_resnet,num_classes=10",
    "data.source": "digits",
    "data.image_size": "32",
    "data.batch_size": "2",
    "train.steps": "2",
    "train.warmup_steps": "0",
    "run.log_every": "1",
    "run.output": "run",
    "convert.enabled": "true",
}
FINETUNE = [
    "finetune",
    "digits_source",
    *(word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")),
]
pytestmark = pytest.mark.slow


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A converted network as `sn.pt` in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    conversion = normswap.convert(files.small_model(), torch.randn(files.SHAPE))
    normswap.save(conversion.model, "sn.pt", plan=conversion.plan, architecture=files.ARCH)
    return tmp_path


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def shown(result: Result) -> str:
    """What was printed on stderr, without what rules a terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", result.stderr)


# --- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here", "terminal")
def test_calibrate_shows_how_many_batches_of_all_are_done() -> None:
    result = run("calibrate", "sn.pt", *DIGITS)
    assert result.exit_code == 0, result.output
    assert re.search(r"calibrating .* 3/3 ", shown(result))
    result = run("calibrate", "sn.pt", *DIGITS[:-2], "--batches", "2", "--layer-by-layer", "-o", "other.pt")
    assert re.search(r"calibrating .* 2/2 .*pass \d+", shown(result))


@pytest.mark.usefixtures("here", "terminal")
def test_finetune_shows_loss_rate_and_shares_and_names_log_and_picture() -> None:
    result = run(*FINETUNE)
    assert result.exit_code == 0, result.output
    assert re.search(r"training .* 2/2 .*loss \d+\.\d+ lr \S+ in \d\.\d\d ln \d\.\d\d bn \d\.\d\d", shown(result))
    for line in ("wrote run/model.pt", "log run/log.jsonl", "picture run/course.png"):
        assert line in result.stdout.splitlines()
        assert Path(line.split()[1]).is_file()


# --- interrupted ------------------------------------------------------------------------------------------------------


def interrupt(*_args: Any, **_keys: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "place",
    [
        "normswap.finetune.data.datasets.open_data",
        "normswap.running_stats.calibration.calibrate",
        "normswap.checkpoints.saving.write_content",
    ],
)
def test_calibrate_interrupted_says_that_nothing_was_written(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir())
    monkeypatch.setattr(place, interrupt)
    result = run("calibrate", "sn.pt", *DIGITS)
    assert (result.exit_code, result.stderr) == (130, "interrupted; nothing was written\n")
    assert sorted(os.listdir()) == before


@pytest.mark.usefixtures("here")
def test_finetune_interrupted_at_once_says_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("normswap.finetune.tasks.classification.open_data", interrupt)
        result = run(*FINETUNE)
    assert (result.exit_code, result.stderr) == (130, "interrupted; no state was saved\n")
    assert not Path("run").exists()
    with monkeypatch.context() as patch:
        patch.setattr("normswap.finetune.trainer.write_model", interrupt)
        result = run(*FINETUNE)
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted; the last saved state is in run: continue with --resume\n")


# --- several processes ------------------------------------------------------------------------------------------------


def test_a_command_of_one_process_works_in_the_first_one_alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "1")
    result = run("calibrate", "sn.pt", *DIGITS)
    assert (result.exit_code, result.stdout) == (0, "")
    # A training script may have started it as a command of its own, and wait for the output.
    assert result.stderr.startswith("process 1 of a launcher such as torchrun: nothing done")
    assert result.stderr.endswith("env -u TORCHELASTIC_RUN_ID normswap calibrate ...\n")
    assert not (here / "sn.calibrated.pt").exists()
    monkeypatch.setenv("RANK", "0")
    assert "wrote sn.calibrated.pt" in run("calibrate", "sn.pt", *DIGITS).output
    # A RANK that no launcher has set means nothing.
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("RANK", "1")
    assert "wrote other.pt" in run("calibrate", "sn.pt", *DIGITS, "-o", "other.pt").output


@pytest.mark.usefixtures("here")
def test_other_processes_print_errors_with_their_rank_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "3")

    def fail(*_args: Any, **_keys: Any) -> None:
        print("a line", "another on stderr", file=sys.stderr)
        raise normswap.NormswapError("it failed")

    monkeypatch.setattr("normswap.finetune.trainer.run_recipe", fail)
    result = run(*FINETUNE)
    assert (result.exit_code, result.output) == (2, "[rank 3] error: it failed\n")
    monkeypatch.setattr("normswap.finetune.trainer.run_recipe", lambda *_args, **_keys: 1 / 0)
    assert isinstance(run(*FINETUNE).exception, ZeroDivisionError)  # a defect keeps its traceback
    assert console._errors is None
    # Without a store that all processes share an error is printed twice rather than not at all.
    assert console._is_first_to_report("it failed", {"WORLD_SIZE": "2"})


@pytest.mark.multiprocess
@pytest.mark.skipif(importlib.util.find_spec("torch.distributed.run") is None, reason="needs torchrun")
def test_an_error_of_all_processes_is_printed_once(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "normswap", "finetune", "digits_source", "--set", "train.lr=-1"],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode != 0
    printed = [line for line in (done.stdout + done.stderr).splitlines() if "train.lr: expected" in line]
    assert len(printed) == 1, printed
    assert re.fullmatch(r"\[rank [01]\] error: digits_source: train\.lr: expected at least 0, got -1", printed[0])
