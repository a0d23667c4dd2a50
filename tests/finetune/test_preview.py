"""`preview_recipe`, `finetune --dry-run` and `recipes validate`: what a run would do, without its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import normswap
from normswap.errors import DataError, RecipeError, TrainingError
from normswap.finetune.recipe import Recipe, parse_recipe
from normswap.finetune.run_files import read_journal
from tests.finetune.test_own_task import FILE, write_task
from tests.helpers.command_line import ok, run

pytestmark = pytest.mark.slow


def recipe(folder: Path, file: Path = FILE, **train: Any) -> Recipe:
    """Ten steps of the task in a file, with AdamW."""
    return parse_recipe(
        "own",
        {
            "task": "own",
            "own": {"file": str(file), "options": {"width": 4}},
            "data": {"batch_size": 3},
            "train": {"steps": 10, "lr": 0.01, "optimizer": "adamw", "clip": 0.0, **train},
            "run": {"output": str(folder / "run"), "log_every": 1},
        },
    )


def test_the_preview_states_what_the_run_then_does(tmp_path: Path) -> None:
    found = normswap.preview_recipe(recipe(tmp_path, warmup_steps=4), trust=True)
    assert not (tmp_path / "run").exists()
    normswap.run_recipe(recipe(tmp_path, warmup_steps=4), trust=True)
    lines = [record for record in read_journal(tmp_path / "run") if "loss" in record]
    assert found.loss == pytest.approx(lines[0]["loss"], rel=1e-6)
    # The log has the rates of the step that comes next.
    after = {record["step"] + 1: record for record in lines}
    inner = [rate for rate in found.rates if rate.step in after]
    assert [(r.lr, r.importance_lr) for r in inner] == [
        (pytest.approx(after[r.step]["lr"]), pytest.approx(after[r.step]["importance_lr"])) for r in inner
    ]
    assert [rate.step for rate in found.rates] == [1, 3, 5, 8, 10]
    assert (found.steps, found.batches, found.sites, found.inputs) == (10, 8, 1, ((3, 1, 32),))


def test_the_memory_is_counted_tensor_by_tensor(tmp_path: Path) -> None:
    found = normswap.preview_recipe(recipe(tmp_path, ema_decay=0.9), trust=True)
    conv, norm, linear, gates = 4 * 5 + 4, 2 * 4, 4 * 2 + 2, 2 * 3
    assert found.parameters == found.trained == conv + norm + linear + gates
    memory = found.memory
    assert memory.gradients == 4 * found.parameters
    # Two moments of every parameter, and the number of steps of each of the eight tensors.
    assert memory.optimizer == 4 * (2 * found.parameters + 8)
    assert memory.average == memory.weights > 4 * found.parameters
    # At least the waves and the outputs of convolution and norm are saved.
    assert memory.activations >= 4 * (3 * 32 + 2 * 3 * 4 * 28)
    assert memory.total == sum((memory.weights, memory.gradients, memory.optimizer, memory.average, memory.activations))


def test_a_run_that_would_end_at_once_is_refused(tmp_path: Path) -> None:
    nan = write_task(tmp_path, "def compute_loss(model, batch):\n    return model(batch[0]).sum() / 0 * 0")
    with pytest.raises(TrainingError, match="the loss of the first batch is nan: check the data"):
        normswap.preview_recipe(recipe(tmp_path, nan), trust=True)
    with pytest.raises(RecipeError, match="is Python code"):
        normswap.preview_recipe(recipe(tmp_path))
    with pytest.raises(DataError, match="no such folder"):
        normswap.preview_recipe(normswap.read_recipe("digits_source", ["data.source=folder:absent"]))


def test_the_commands_print_the_preview_and_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("--set", "train.epochs=1", "--set", "train.warmup_steps=0", "--set", "data.batch_size=300")
    text = ok("finetune", "digits_source", "--dry-run", *small).stdout
    assert "373,658 parameters" in text
    assert "300 samples\n" in text.replace("  ", "").replace(" \n", "\n")
    assert "2 steps, 1.0 epochs of 2 batches" in text
    assert "300x3x32x32" in text
    found = json.loads(ok("finetune", "digits_source", "--dry-run", "--json", *small).stdout)
    assert (found["steps"], found["memory"]["average"]) == (2, 0)
    valid = ok("recipes", "validate", "digits_source", *small).stdout
    assert valid == "digits_source: valid (2 steps, 0 converted norms)\n"
    refused = run("recipes", "validate", "digits_source", "--set", "train.optimizer=no_such")
    assert (refused.exit_code, "train.optimizer = 'no_such'" in refused.stderr) == (2, True)
    assert not list(tmp_path.iterdir())
    assert torch.is_grad_enabled()
