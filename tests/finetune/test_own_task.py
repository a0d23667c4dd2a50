"""Tasks that a Python file defines: its functions, its options, and consent to run it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import normswap
from normswap.checkpoints.architecture.registry import import_python_file
from normswap.checkpoints.reading import read_checkpoint
from normswap.errors import NormswapError, RecipeError
from normswap.finetune.recipe import Recipe, parse_recipe, read_recipe, shipped_recipes
from normswap.finetune.run_files import differing_keys, read_journal
from normswap.finetune.trainer import run_recipe

EXPECTED = "task: expected one of classification, segmentation, detection, own"
FILE = Path(__file__).with_name("own_task.py")
pytestmark = pytest.mark.slow


def recipe(folder: Path, file: Path = FILE, **tables: Any) -> Recipe:
    """A run of four steps of the task in a file."""
    data = {
        "task": "own",
        "own": {"file": str(file), **tables.pop("own", {})},
        "data": {"batch_size": 3, "evaluation_batch_size": 5},
        "train": {"steps": 4, "importance_lr": 0.05, **tables.pop("train", {})},
        "run": {"output": str(folder / "run"), "log_every": 2},
    }
    return parse_recipe("own", {**data, **tables})


def write_task(folder: Path, addition: str) -> Path:
    """The task of `own_task.py` with some lines at its end."""
    path = folder / "task.py"
    path.write_text(FILE.read_text() + "\n\n" + addition)
    return path


def test_a_file_defines_model_data_loss_and_metrics(tmp_path: Path) -> None:
    outcome = run_recipe(recipe(tmp_path, own={"options": {"width": 6}}), trust=True)
    assert list(outcome.after.figures) == ["accuracy of classes", "accuracy of signs"]
    assert (outcome.after.images, outcome.after.loss, outcome.after.unit) == (24, None, "")
    # The file builds the model, whose options the record has.
    loaded = normswap.load(outcome.model, trust=True)
    record = read_checkpoint(outcome.model).record
    assert record is not None
    assert record.architecture == f"{FILE}:build_model,width=6"
    assert [type(module).__name__ for module in loaded.model][1] == "SwitchNorm1d"
    # The figures are those of the model that was saved, counted by hand.
    waves, labels = _validation()
    with torch.no_grad():
        right = (loaded.model.eval()(waves).argmax(1) == labels).float().mean()
    assert outcome.after.figures["accuracy of signs"] == pytest.approx(right.item())
    records = [record["evaluation"] for record in read_journal(tmp_path / "run") if "evaluation" in record]
    assert records[-1] == {**outcome.after.figures, "images": 24, "unit": ""}


def _validation() -> tuple[torch.Tensor, torch.Tensor]:
    waves = torch.randn(24, 1, 32, generator=torch.Generator().manual_seed(1))
    return waves, (waves[:, 0].mean(1) > 0).long()


def test_an_interrupted_own_task_ends_like_one_that_was_not(tmp_path: Path) -> None:
    whole = run_recipe(recipe(tmp_path / "whole"), trust=True)
    parts = recipe(tmp_path / "parts", run={"output": str(tmp_path / "parts" / "run"), "save_every": 2})

    def stop(step: int, _steps: int) -> None:
        if step == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_recipe(parts, trust=True, on_step=stop)
    resumed = run_recipe(parts, trust=True, resume=True)
    assert resumed.before == whole.before
    states = [torch.load(outcome.model) for outcome in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_file_may_replace_the_training_loop(tmp_path: Path) -> None:
    file = write_task(
        tmp_path,
        "def train_model(model, run):\n"
        "    optimizer = run.build_optimizer(model)\n"
        "    for epoch in range(run.options['epochs']):\n"
        "        for batch in run.training.epoch(epoch):\n"
        "            optimizer.zero_grad()\n"
        "            compute_loss(model, batch).backward()\n"
        "            optimizer.step()\n"
        "        run.log({'step': epoch, 'loss of the loop': 1.5})\n",
    )
    outcome = run_recipe(recipe(tmp_path, file, own={"options": {"epochs": 2}}, train={"lr": 0.1}), trust=True)
    assert [r["step"] for r in read_journal(tmp_path / "run") if "loss of the loop" in r] == [0, 1]
    start = normswap.load(outcome.model, trust=True).model[0].weight
    assert not torch.equal(start, _built_weight(file))
    with pytest.raises(NormswapError, match=re.escape("contains a run already")):
        run_recipe(recipe(tmp_path, file, own={"options": {"epochs": 2}}), trust=True)


def _built_weight(file: Path) -> torch.Tensor:
    return import_python_file(file).build_model()[0].weight


@pytest.mark.parametrize(
    ("addition", "text"),
    [
        ("del compute_loss, build_metrics", "has no compute_loss, build_metrics"),
        (
            "def compute_loss(model, batch):\n    return model(batch[0])",
            "compute_loss: expected a scalar tensor, got (3, 2)",
        ),
        ("def compute_loss(model, batch):\n    return 1.5", "compute_loss: expected a scalar tensor, got float"),
        ("def build_metrics():\n    return []", "build_metrics: expected a dict of metrics by name, got []"),
        ("import no_such_package", "imports no_such_package, which is not installed: pip install 'normswap[recipes]'"),
        ("del build_model", "expected the function build_model, or model.checkpoint in the recipe"),
        ("def collate(samples):\n    return {'labels': []}", "a batch has no tensor: define example_inputs(batch)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, addition: str, text: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(text)):
        run_recipe(recipe(tmp_path, write_task(tmp_path, addition)), trust=True)


def test_options_that_no_function_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"own\.options: no function of .*own_task\.py takes depth"):
        run_recipe(recipe(tmp_path, own={"options": {"width": 4, "depth": 2}}), trust=True)


def test_a_file_runs_only_with_consent(tmp_path: Path) -> None:
    file = write_task(tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(RecipeError, match=r'own\.file: ".*task\.py" is Python code.*pass trust=True'):
        run_recipe(recipe(tmp_path, file))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"task": "clasification"}, f"{EXPECTED}, got 'clasification'; did you mean 'classification'?"),
        ({"task": 3}, f"{EXPECTED}, got 3"),
        ({"task": "own"}, 'own.file: expected the Python file of the task, such as own.file = "task.py"'),
        ({"own": {"file": "x.py"}}, 'own: used only with task = "own", got task = "classification"'),
    ],
)
def test_a_task_is_checked_when_a_recipe_is_read(data: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(text)):
        parse_recipe("mine", {"model": {"architecture": "timm:resnet18"}, "train": {"steps": 1}, **data})


def test_the_task_can_be_overridden_and_is_part_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text('task = "own"\n[own]\nfile = "task.py"\n[train]\nsteps = 1\n')
    own = read_recipe("mine.toml")
    assert (own.task, own.is_set_by_user("task"), own.to_dict()["task"]) == ("own", True, "own")
    other = read_recipe("mine.toml", ["task=classification", "own.file=none", "model.architecture=timm:resnet18"])
    assert other.task == "classification"
    assert set(differing_keys(own, other.to_dict())) == {"task", "own.file", "model.architecture"}


def test_files_are_looked_up_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "task.py").write_text(FILE.read_text())
    (tmp_path / "recipes" / "mine.toml").write_text(
        'task = "own"\n[own]\nfile = "task.py"\n[data]\nbatch_size = 2\n[train]\nsteps = 1\n'
    )
    monkeypatch.chdir(tmp_path)
    outcome = run_recipe(read_recipe("recipes/mine.toml"), trust=True)
    assert outcome.after.images == 24


def test_shipped_recipes_name_their_python_files() -> None:
    for shipped in shipped_recipes().values():
        assert all(f'"{path.name}' in shipped.text for path in shipped.companions)
