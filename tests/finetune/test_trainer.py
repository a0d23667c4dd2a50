"""`run_recipe`: the files of a run, resumed runs, and errors."""

import contextlib
import copy
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

import normswap
from normswap.cli import main
from normswap.errors import (
    ArchitectureError,
    CheckpointError,
    DataError,
    NormswapError,
    NothingToDo,
    RecipeError,
    RunInterrupted,
    TrainingError,
)
from normswap.finetune import optimization, run_files, setup
from normswap.finetune.data.datasets import open_data
from normswap.finetune.optimization import gate_penalty
from normswap.finetune.recipe import Recipe, parse_recipe
from normswap.finetune.run_files import Journal, read_journal
from normswap.finetune.setup import prepare
from normswap.finetune.tables import TrainTable
from normswap.finetune.tasks import classification
from normswap.finetune.trainer import run_recipe
from normswap.surgery.importance import gated_modules

ARCHITECTURE = "timm:test_resnet,num_classes=10,output_stride=8"
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def recipe(folder: Path, **tables: dict[str, Any]) -> Recipe:
    """A run of few steps on shifted digits, with these keys over it."""
    data = {
        "model": {"architecture": ARCHITECTURE},
        "data": {"source": "digits:shifted", "image_size": 32, "batch_size": 2},
        "train": {"steps": 4, "importance_lr": 0.05},
        "run": {"output": str(folder / "run"), "log_every": 2},
    }
    if "checkpoint" in tables.get("model", {}):
        data["model"] = {}
    return parse_recipe(
        "mine",
        {table: {**keys, **tables.get(table, {})} for table, keys in data.items()}
        | {table: keys for table, keys in tables.items() if table not in data},
    )


def weights_of(folder: Path) -> dict[str, Tensor]:
    return dict(torch.load(folder / "model.pt"))


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[Any]]:
    """A finished run: its folder, its outcome, its records."""
    folder = tmp_path_factory.mktemp("finished")
    written: list[Any] = []
    outcome = run_recipe(recipe(folder, train={"ema_decay": 0.9}, run={"evaluate_every": 2}), on_record=written.append)
    return folder / "run", outcome, written


# --- what a run writes ------------------------------------------------------------------------------------------------


def test_a_run_ends_with_a_model_that_load_understands(finished: tuple[Path, Any, list[Any]]) -> None:
    folder, outcome, _ = finished
    loaded = normswap.load(folder / "model.pt")
    assert outcome.model == folder / "model.pt"
    assert [step.action for step in loaded.history] == ["converted", "finetuned"]
    assert loaded.history[-1].source == "mine"
    assert normswap.importance_weights(loaded.model) == outcome.importance
    model = normswap.load(folder / "state.pt").model  # the moving average, which was evaluated
    assert_same(dict(model.state_dict()), dict(loaded.model.state_dict()))
    trained = normswap.load(folder / "state.pt", entry="state_dict").model
    assert not torch.equal(trained.conv1[0].weight, model.conv1[0].weight)
    assert any(not layer.is_at("bn") for layer in gated_modules(trained).values())


def test_the_log_reports_losses_evaluations_and_importance_weights(finished: tuple[Path, Any, list[Any]]) -> None:
    folder, outcome, written = finished
    records = read_journal(folder)
    assert [record["step"] for record in records] == [0, 0, 2, 2, 4, 4]
    assert json.loads(json.dumps(written)) == records
    assert records[0]["recipe"]["train"]["steps"] == 4
    assert records[1]["evaluation"] == outcome.before.to_dict()
    assert records[-1]["evaluation"] == outcome.after.to_dict()
    line = records[4]
    assert line["loss"] > 0
    assert line["importance_lr"] == pytest.approx(5 * line["lr"])
    first = next(iter(line["importance"].values()))
    assert sum(first["mean"].values()) == pytest.approx(1)
    assert list((folder / "tensorboard").iterdir())


def test_the_loss_is_that_of_the_images_and_the_penalty_pulls_at_the_gates(tmp_path: Path) -> None:
    train = {"steps": 1, "lr": 0.0, "importance_lr": 0.1, "gate_max_step": 0.0, "batch_penalty": 50.0, "clip": 0.0}
    run = recipe(tmp_path, train=train, convert={"bn_statistics": "batch"})
    prepared = prepare(run)
    images, labels = next(iter(prepared.training))
    prepared.model.train()
    expected = torch.nn.functional.cross_entropy(prepared.model(images), labels)
    written: list[Any] = []
    outcome = run_recipe(run, on_record=written.append)
    (loss,) = [record["loss"] for record in written if "loss" in record]
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    shares = [share for site in outcome.importance.values() for share in (site.mean["bn"], site.var["bn"])]
    assert max(shares) < 0.01  # whatever the images ask for, at this penalty


def test_the_one_hot_penalty_begins_in_the_middle_of_the_run() -> None:
    model = normswap.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(4))).model
    normswap.set_importance(model, {"0": {"ln": 0.5, "bn": 0.5}})
    table = TrainTable(one_hot_penalty=0.1)
    assert gate_penalty(model, table, 0.49) == 0
    penalty = gate_penalty(model, table, 0.5)
    assert isinstance(penalty, Tensor)
    assert penalty.item() == pytest.approx(0.1)


def test_gates_move_by_the_limit_of_the_recipe(tmp_path: Path) -> None:
    train = {"steps": 2, "importance_lr": 50.0, "optimizer": "adam", "gate_warmup_steps": 2}
    outcome = run_recipe(recipe(tmp_path, train=train))
    shares = [share for site in outcome.importance.values() for share in (site.mean["bn"], site.var["bn"])]
    assert min(shares) == pytest.approx(0.95, abs=1e-5)  # half of 0.5 / 15 sites, then all of it


def test_outputs_that_died_are_reported_with_the_step(tmp_path: Path) -> None:
    train = {"steps": 101, "lr": 1e6, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    written: list[Any] = []
    with contextlib.suppress(TrainingError):  # the loss is not finite either
        run_recipe(recipe(tmp_path, train=train, run={"log_every": 101}), on_record=written.append)
    (warning,) = [note for record in written[1:] for note in record.get("notes", ())]
    assert re.match(
        r"step 100: the outputs of \S+ \(and \d+ more\) (are the same for all samples|are NaN or inf)", warning
    )


def test_the_learning_rate_follows_its_schedule() -> None:
    def factors(**keys: Any) -> list[float]:
        train = recipe(Path(), train={"steps": 4, "lr": 0.1, **keys}).train
        return [round(optimization.make_lr_lambda(train, 4)(step), 4) for step in range(5)]

    assert factors(schedule="linear") == [1, 0.75, 0.5, 0.25, 0]
    assert factors(schedule="constant") == [1] * 5
    assert factors(schedule="cosine", min_lr=0.01) == [1, 0.8682, 0.55, 0.2318, 0.1]
    assert factors(schedule="linear", warmup_steps=2) == [0.3333, 0.6667, 1, 0.5, 0]


def test_clipping_leaves_gates_alone(tmp_path: Path) -> None:
    still = {"lr": 0.01, "clip": 1e-12, "weight_decay": 0.0, "steps": 2}
    start = prepare(recipe(tmp_path, train=still)).model.state_dict()
    run_recipe(recipe(tmp_path, train=still))
    moved = {name for name, value in weights_of(tmp_path / "run").items() if (value - start[name]).abs().max() > 1e-9}
    parameters = {name for name, _ in normswap.load(tmp_path / "run" / "model.pt").model.named_parameters()}
    assert moved & parameters
    assert all(name.endswith(("mean_weight", "var_weight")) for name in moved & parameters)


def test_a_model_can_be_trained_as_it_is_and_with_another_head(tmp_path: Path) -> None:
    run = recipe(
        tmp_path,
        model={"architecture": "timm:test_resnet,output_stride=8", "new_head": True},
        convert={"enabled": False},
        train={"steps": 1},
    )
    outcome = run_recipe(run)
    assert outcome.importance == {}
    loaded = normswap.load(tmp_path / "run" / "model.pt")
    assert (loaded.plan, loaded.model.num_classes) == (None, 10)


# --- interrupted and taken up again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not(tmp_path: Path, number: int) -> None:
    keys: dict[str, Any] = {
        "data": {"flip": 0.5, "crop_scale": [0.5, 1.0], "batch_size": 4, "mixup": 0.2},
        "train": {"ema_decay": 0.9, "accumulation": 2, "steps": 5},
    }
    run_recipe(recipe(tmp_path / "whole", **keys))

    def stop(step: int, _steps: int) -> None:
        if step == 3:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    parts = recipe(tmp_path / "parts", **keys)
    with pytest.raises(
        RunInterrupted, match=r"stopped after step 3 of 5; the state is saved in .*: continue with resume=True"
    ) as e:
        run_recipe(parts, on_step=stop)
    assert (e.value.exit_code, signal.getsignal(number)) == (128 + number, before)
    run_recipe(parts, resume=True)
    assert_same(weights_of(tmp_path / "whole" / "run"), weights_of(tmp_path / "parts" / "run"))
    steps = [record["step"] for record in read_journal(tmp_path / "parts" / "run") if "loss" in record]
    assert steps == [2, 3, 4, 5]


def test_an_interruption_is_pickled_with_its_exit_code() -> None:
    error = RunInterrupted("stopped after step 3", signal.SIGTERM)
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert (type(twin), str(twin), twin.exit_code) == (RunInterrupted, "stopped after step 3", 143)
    assert RunInterrupted("in another process", None).exit_code == 128


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as a terminal's process answers it, which a worker of pytest ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    def insist(_step: int, _steps: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path), on_step=insist)


@pytest.mark.multiprocess
def test_two_processes_end_alike_interrupted_or_not(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).parents[1] / "helpers" / "finetuning_processes.py"
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*launch, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Both stop at the next look in common, whoever was asked.
    assert ["after step 4 of 6" in (tmp_path / f"stopped{rank}").read_text() for rank in (0, 1)] == [True, True]
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    records = read_journal(tmp_path / "whole")
    assert (records[0]["processes"], records[-1]["evaluation"]["images"]) == (2, 147)


def test_a_state_is_of_one_recipe_and_in_one_folder(finished: tuple[Path, Any, list[Any]], tmp_path: Path) -> None:
    folder, _, _ = finished
    same: dict[str, Any] = {"train": {"ema_decay": 0.9}, "run": {"evaluate_every": 2}}
    with pytest.raises(
        TrainingError, match="contains a run already: continue it with resume=True, or replace it with overwrite=True"
    ):
        run_recipe(recipe(folder.parent, **same))
    with pytest.raises(
        RecipeError, match=r"its recipe has other values of train\.lr: use those values, or start a run in"
    ):
        run_recipe(recipe(folder.parent, train={"ema_decay": 0.9, "lr": 0.5}, run={"evaluate_every": 2}), resume=True)
    with pytest.raises(CheckpointError, match="there is no run to resume; start one without resume=True"):
        run_recipe(recipe(tmp_path), resume=True)
    (tmp_path / "run").mkdir()
    torch.save(weights_of(folder), tmp_path / "run" / "state.pt")
    with pytest.raises(CheckpointError, match="no weights at 'state_dict'"):
        run_recipe(recipe(tmp_path), resume=True)
    torch.save({"state_dict": weights_of(folder)}, tmp_path / "run" / "state.pt")
    with pytest.raises(CheckpointError, match="not the state of a run"):
        run_recipe(recipe(tmp_path), resume=True)


# --- what cannot go on ------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_state(tmp_path: Path) -> None:
    wild = recipe(tmp_path, train={"lr": 1e30, "clip": 0.0, "steps": 6}, run={"save_every": 1, "log_every": 3})
    with pytest.raises(TrainingError, match=r"the loss of step (\d) is (nan|inf): the state after step \d") as error:
        run_recipe(wild)
    first = int(re.search(r"loss of step (\d)", str(error.value)).group(1))  # type: ignore[union-attr]
    kept = torch.load(tmp_path / "run" / "state.pt")
    assert kept["step"] == first - 1
    losses = [record["loss"] for record in read_journal(tmp_path / "run") if "loss" in record]
    assert all(map(math.isfinite, losses))
    with pytest.raises(TrainingError, match=r"no state was saved; lower train\.lr"):
        run_recipe(recipe(tmp_path / "other", train={"lr": 1e30, "clip": 0.0, "steps": 6}, run={"log_every": 6}))


@pytest.fixture
def file_size_limit() -> Iterator[Any]:
    """Makes the system refuse to let a file grow beyond so many bytes, as a full disk would; None undoes it."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_nothing(tmp_path: Path, file_size_limit: Any) -> None:
    def fill(step: int, _steps: int) -> None:
        if step == 3:
            file_size_limit(1_000_000)

    with pytest.raises(CheckpointError, match=r"state\.pt: cannot be written \(.*File too large"):
        run_recipe(recipe(tmp_path, run={"save_every": 2}), on_step=fill)
    file_size_limit(None)
    assert torch.load(tmp_path / "run" / "state.pt")["step"] == 2
    assert [path.name for path in (tmp_path / "run").glob("*state*")] == ["state.pt"]
    assert run_recipe(recipe(tmp_path, run={"save_every": 2}), resume=True).steps == 4


def test_a_log_that_cannot_be_written_is_reported(tmp_path: Path, file_size_limit: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(run_files, "_open_tensorboard", lambda *_: None)
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(TrainingError, match=r"log\.jsonl: cannot be written \(Is a directory\)"):
        Journal(tmp_path)
    (tmp_path / "log.jsonl").rmdir()
    with Journal(tmp_path) as log:
        log.write({"step": 1, "loss": float("nan")})
        file_size_limit(100)
        with pytest.raises(TrainingError, match=r"log\.jsonl: cannot be written \(File too large\): free some space"):
            log.write({"step": 2, "text": "x" * 200})
    assert read_journal(tmp_path)[0] == {"step": 1, "loss": None}


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    with caplog.at_level("INFO", logger="normswap"):
        assert [record["step"] for record in read_journal(tmp_path)] == [1, 2]
    assert "log.jsonl: dropped line 3, which is incomplete" in caplog.text
    with Journal(tmp_path, after=1) as log:
        log.write({"step": 3})
    assert [record["step"] for record in read_journal(tmp_path)] == [1, 3]


def test_tensorboard_leaves_the_environment_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    before = dict(os.environ)
    with Journal(tmp_path) as log:
        log.write({"step": 1, "loss": 0.5})
    assert os.environ == before
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("keys", "kind", "text"),
    [
        ({"model": {"checkpoint": "absent.pt"}}, CheckpointError, "absent.pt: no such file"),
        ({"model": {"architecture": "timm:no_such"}}, ArchitectureError, "timm has no model 'no_such'"),
        ({"data": {"source": "folder:absent"}}, DataError, "absent: no such folder"),
        ({"data": {"train_split": "all"}}, DataError, "has no split 'all'"),
        (
            {"data": {"source": "torch/cifar10", "root": "absent"}},
            DataError,
            "data 'torch/cifar10': cannot be opened: Dataset not found",
        ),
        ({"data": {"batch_size": 1000}}, DataError, "fewer than one batch of 1000"),
        (
            {"model": {"architecture": "timm:test_resnet,num_classes=4"}},
            DataError,
            "has 10 classes, but the model has 4",
        ),
        ({"model": {"architecture": "timm:test_vit,num_classes=10"}}, NothingToDo, "the model has no norm to convert"),
        ({"train": {"optimizer": "no_such"}}, RecipeError, "train.optimizer = 'no_such': "),
        (
            {"model": {"architecture": "torchvision:resnet18", "pretrained": True}},
            ArchitectureError,
            "only timm:NAME has published weights to download",
        ),
        (
            {"model": {"architecture": "torchvision:resnet18", "new_head": True}},
            ArchitectureError,
            "ResNet has no reset_classifier()",
        ),
        (
            {"model": {"architecture": "torchvision:fcn_resnet50"}},
            RecipeError,
            "expected a classifier that returns logits (N, classes), got",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_trained_is_reported_before_anything_is_written(
    tmp_path: Path, keys: dict[str, Any], kind: type[NormswapError], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=re.escape(text)):
        run_recipe(recipe(tmp_path, **keys))
    assert not list((tmp_path / "run").glob("*"))


def test_data_that_does_not_name_its_classes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    untold = partial(replace, classes=None)
    monkeypatch.setattr(classification, "open_data", lambda *args, **keys: untold(open_data(*args, **keys)))
    with pytest.raises(DataError, match="digits:shifted: number of classes unknown: use a folder per class"):
        run_recipe(recipe(tmp_path))


def test_a_conversion_that_fails_verification_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = [SimpleNamespace(name="gradients", passed=False)]
    monkeypatch.setattr(setup, "verify", lambda *_: SimpleNamespace(passed=False, checks=failed))
    message = r"nothing trained: the converted model does not compute the same function \(gradients\): convert\.exclude"
    with pytest.raises(NothingToDo, match=message):
        run_recipe(recipe(tmp_path))
    # Nor is one with other statistics in training, which verification does not compare by itself.
    with pytest.raises(NothingToDo, match=message):
        run_recipe(recipe(tmp_path, train={"steps": 1}, convert={"bn_statistics": "renorm"}))
    # Unless the recipe says so.
    assert run_recipe(recipe(tmp_path, train={"steps": 1}, convert={"verify": False})).steps == 1


def test_softmax_gates_are_trained_only_without_verification(tmp_path: Path) -> None:
    with pytest.raises(NothingToDo, match=r'another function: use convert\.gate = "simplex", or set convert\.verify'):
        run_recipe(recipe(tmp_path, train={"steps": 1}, convert={"gate": "softmax"}))
    done = run_recipe(recipe(tmp_path, train={"steps": 1}, convert={"gate": "softmax", "verify": False}))
    assert done.steps == 1


# --- the command, on a folder of images -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of three classes of colours, as a folder."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("validation", 3)):
        for number, name in enumerate(("red", "green", "blue")):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 100, (40, 48, 3), generator=generator, dtype=torch.uint8)
                pixels[..., number] += 150
                Image.fromarray(pixels.numpy()).save(place / f"{index}.png")
    return tmp_path / "images"


def invoke(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["finetune", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done.exit_code, done.stdout, done.stderr


def test_the_imagenet_recipe_runs_in_a_short_form(folder: Path, tmp_path: Path) -> None:
    short = {
        "model.architecture": "timm:test_resnet",
        "model.pretrained": "false",
        "data.source": f"folder:{folder}",
        "data.workers": "1",
        "data.image_size": "64",
        "train.epochs": "4",
        "train.accumulation": "2",
        "train.warmup_steps": "2",
        "train.ema_decay": "0.5",
        "run.log_every": "5",
        "run.output": str(tmp_path / "run"),
    }
    sets = [word for key, value in short.items() for word in ("--set", f"{key}={value}")]
    status, out, err = invoke("imagenet_small_batch", *sets)
    assert status == 0, err
    assert re.search(r"accuracy, % +\d+\.\d +\d+\.\d", out)
    assert "importance weights, mean of" in out
    assert "evaluated on 9 images" in out
    assert (tmp_path / "run" / "course.png").read_bytes().startswith(b"\x89PNG")
    loaded = normswap.load(tmp_path / "run" / "model.pt")
    assert loaded.model.num_classes == 3
    status, out, err = invoke("imagenet_small_batch", *sets)
    assert (status, "contains a run already" in err) == (2, True)
    status, out, err = invoke("imagenet_small_batch", *sets, "--resume", "--json")
    assert status == 0, err
    assert json.loads(out)["steps"] == 12


def test_the_command_reports_what_is_wrong_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, err = invoke("digits_source", "--set", "train.lr=-1")
    assert (status, out, err) == (2, "", "error: digits_source: train.lr: expected at least 0, got -1\n")
    with monkeypatch.context() as patch:
        patch.setattr("normswap.cli.commands.finetune.find_spec", lambda _: None)
        status, _, err = invoke("digits_source")
        assert (status, err) == (
            2,
            "error: fine-tuning needs accelerate and matplotlib: pip install 'normswap[finetune]'\n",
        )
    (tmp_path / "images").mkdir()
    status, _, err = invoke("digits_source", "--set", f"data.source=folder:{tmp_path / 'images'}")
    assert (status, err.count("\n"), "has no images" in err) == (2, 1, True)
