"""Recipes: what is read, what is refused, what is shipped."""

import copy
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from click.testing import CliRunner

from normswap.cli import main
from normswap.errors import RecipeError
from normswap.finetune.recipe import (
    TABLES,
    ConvertTable,
    Recipe,
    TrainTable,
    parse_recipe,
    read_recipe,
    shipped_recipes,
)
from normswap.finetune.run_files import differing_keys
from normswap.layers.gating import BnStatistics, Gate

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = {"model": {"architecture": "timm:test_resnet"}, "train": {"steps": 10}}


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def with_value(place: str, value: object) -> dict[str, dict[str, object]]:
    table, _, key = place.partition(".")
    return {**SMALLEST, table: {**SMALLEST.get(table, {}), key: value}}


def test_a_recipe_has_the_defaults_of_what_it_leaves_out() -> None:
    recipe = parse_recipe("mine", SMALLEST)
    assert (recipe.train.steps, recipe.train.batch_penalty, recipe.convert.enabled) == (10, 0.0, True)
    assert str(recipe.output) == "runs/mine"
    assert parse_recipe("mine", with_value("train.lr", 1)).train.lr == 1.0
    assert parse_recipe("mine", with_value("convert.include", ["a.*"])).convert.include == ("a.*",)
    assert parse_recipe("mine", with_value("data.crop_scale", [0.5, 1])).data.crop_scale == (0.5, 1.0)


REFUSED = [
    (with_value("train.learning_rate", 0.1), "unknown key train.learning_rate; [train] has the keys steps, epochs"),
    (with_value("train.momentun", 0.9), "unknown key train.momentun; did you mean train.momentum?"),
    (with_value("train.batch_size", 2), "unknown key train.batch_size; did you mean data.batch_size?"),
    (with_value("train.batchsize", 2), "unknown key train.batchsize; did you mean data.batch_size?"),
    (with_value("train.steps", 0), "train.steps: expected at least 1, got 0"),
    ({**SMALLEST, "trian": {}}, "unknown table [trian]; did you mean train?"),
    ({**SMALLEST, "data": 3}, "data: expected a table [data], got 3"),
    (with_value("train.lr", "fast"), "train.lr: expected a number, got 'fast'"),
    (with_value("train.steps", 2.5), "train.steps: expected a whole number, got 2.5"),
    (with_value("train.channels_last", 1), "train.channels_last: expected true or false, got 1"),
    (with_value("model.architecture", 3), "model.architecture: expected a string, got 3"),
    (with_value("convert.include", [1]), "convert.include[0]: expected a string, got 1"),
    (with_value("convert.include", "a"), "convert.include: expected a list of strings, got 'a'"),
    (with_value("data.crop_scale", [1.0]), "data.crop_scale: expected a list of 2 values, got [1.0]"),
    (
        with_value("data.crop_scale", [0.9, 0.5]),
        "data.crop_scale: expected 0 < smallest <= largest <= 1, got [0.9, 0.5]",
    ),
    (with_value("train.lr", -1), "train.lr: expected at least 0, got -1"),
    (with_value("train.lr", float("inf")), "train.lr: expected a finite number, got inf"),
    (with_value("data.flip", 2), "data.flip: expected 0 to 1, got 2"),
    (with_value("train.schedule", "step"), "train.schedule: expected 'constant' or 'linear' or 'cosine', got 'step'"),
    (with_value("convert.gate", "hard"), "convert.gate: expected 'simplex' or 'softmax', got 'hard'"),
    ({"train": {"steps": 1}}, "model: expected a checkpoint or an architecture"),
    ({"model": {"architecture": "a"}}, "train: expected either steps or epochs"),
    (with_value("train.epochs", 2), "train: expected either steps or epochs"),
    (with_value("train.warmup_steps", 10), "train.warmup_steps: expected fewer than the 10 steps, got 10"),
    (with_value("model.entry", "ema"), "model.entry: selects weights in a checkpoint"),
    (
        {"model": {"checkpoint": "a.pt", "pretrained": True}, "train": {"steps": 1}},
        "model.pretrained: the weights come from model.checkpoint",
    ),
    (
        {**SMALLEST, "data": {"mixup": 0.2, "batch_size": 1}},
        "data.mixup, data.cutmix: expected an even data.batch_size, got 1",
    ),
]


@pytest.mark.parametrize(("data", "text"), REFUSED, ids=[text[:45] for _, text in REFUSED])
def test_a_wrong_recipe_is_refused_with_what_to_type(data: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(text)):
        parse_recipe("mine", data)


def test_values_can_be_put_over_a_recipe(tmp_path: Path) -> None:
    path = written(tmp_path, '[model]\narchitecture = "timm:test_resnet"\n[train]\nsteps = 3\n')
    overrides = ["train.steps=none", "train.epochs=2", "train.optimizer=adamw", "data.crop_scale=[0.5, 1.0]"]
    recipe = read_recipe(path, overrides)
    assert (recipe.name, recipe.train.steps, recipe.train.epochs) == ("mine", None, 2)
    assert (recipe.train.optimizer, recipe.data.crop_scale) == ("adamw", (0.5, 1.0))
    for override, text in (
        ("steps=3", "overrides: expected table.key=value such as train.lr=0.01, got 'steps=3'"),
        ("trian.steps=3", "overrides='trian.steps=3': unknown table [trian]; did you mean train?"),
        ("train.stpes=3", "unknown key train.stpes; did you mean train.steps?"),
        ("train.stpes=none", "unknown key train.stpes; did you mean train.steps?"),
    ):
        with pytest.raises(RecipeError, match=re.escape(text)):
            read_recipe(path, [override])


def test_what_is_no_recipe_is_refused(tmp_path: Path) -> None:
    for source, text in (
        (tmp_path / "other.toml", "no such file; list the recipes that come with normswap: normswap recipes ls"),
        (written(tmp_path, "[model\n"), "not TOML: "),
        ("digits_smal_batch", "no recipe 'digits_smal_batch'; did you mean digits_small_batch?"),
    ):
        with pytest.raises(RecipeError, match=re.escape(text)):
            read_recipe(source)
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not TOML: "):
        read_recipe(tmp_path / "mine.toml")


def test_the_page_on_recipes_has_every_key_and_its_default() -> None:
    page = (ROOT / "docs" / "reference" / "recipes.md").read_text()
    for table, build in TABLES.items():
        (part,) = re.findall(rf"^## `\[{table}\]`\n(.*?)(?=^## |\Z)", page, re.M | re.S)
        found = dict(re.findall(r"^\| `(\w+)` \| (\S.*?) \| ", part, re.M))
        assert found.keys() == {key.name for key in fields(build)}
        for key in fields(build):
            default = getattr(build(), key.name)
            default = list(default) if isinstance(default, tuple) else default
            assert found[key.name] == ("-" if default is None else f"`{json.dumps(default)}`"), f"{table}.{key.name}"


# --- keys that were renamed -------------------------------------------------------------------------------------------

OLD_PRICE = with_value("train.batch_price", 0.5)
RENAMED = r"train\.batch_price of normswap was renamed to train\.batch_penalty"


def test_a_renamed_key_is_read_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match=RENAMED):
        recipe = parse_recipe("mine", OLD_PRICE)
    assert recipe.train.batch_penalty == 0.5
    assert recipe.written is not None
    assert "train.batch_penalty" in recipe.written
    path = written(tmp_path, '[model]\narchitecture = "a"\n[train]\nsteps = 3\nbatch_penalty = 0.1\n')
    with pytest.warns(DeprecationWarning, match=RENAMED):
        recipe = read_recipe(path, ["train.batch_price=0.2"])
    assert recipe.train.batch_penalty == 0.2
    with pytest.warns(DeprecationWarning, match=RENAMED):
        assert recipe.is_set_by_user("train.batch_price")
    with pytest.warns(DeprecationWarning, match=r"Recipe\.is_written of normswap was renamed to is_set_by_user"):
        assert recipe.is_written("train.batch_penalty")


def test_the_warning_names_the_line_that_uses_the_old_name() -> None:
    uses: list[Callable[[], object]] = [
        lambda: parse_recipe("mine", OLD_PRICE),
        lambda: TrainTable(steps=1).batch_price,  # type: ignore[attr-defined]
        lambda: read_recipe("digits_source", ["train.batch_price=0.2"]),
    ]
    for use in uses:
        with pytest.warns(DeprecationWarning, match=r"batch_price of normswap was renamed") as caught:
            use()
        assert [Path(warning.filename).name for warning in caught] == ["test_recipe.py"]


def test_a_renamed_key_together_with_its_new_name_is_refused() -> None:
    both = {**OLD_PRICE, "train": {**OLD_PRICE["train"], "batch_penalty": 0.1}}
    text = "train.batch_price was renamed to train.batch_penalty, and both are set: remove train.batch_price"
    with pytest.raises(RecipeError, match=re.escape(text)):
        parse_recipe("mine", both)
    with pytest.raises(TypeError, match=r"TrainTable\.batch_price was renamed to TrainTable\.batch_penalty, and both"):
        TrainTable(batch_price=0.1, batch_penalty=0.1)  # type: ignore[call-arg]


def test_a_renamed_field_is_an_argument_and_an_attribute_and_read_from_a_pickle() -> None:
    with pytest.warns(DeprecationWarning, match=r"TrainTable\.batch_price of normswap was renamed"):
        table = TrainTable(steps=1, batch_price=0.5)  # type: ignore[call-arg]
    assert table == TrainTable(steps=1, batch_penalty=0.5)
    with pytest.warns(DeprecationWarning, match=r"renamed to TrainTable\.batch_penalty"):
        assert table.batch_price == 0.5  # type: ignore[attr-defined]
    old = TrainTable.__new__(TrainTable)
    state = vars(table).copy()
    state["batch_price"] = state.pop("batch_penalty")
    old.__setstate__(state)  # type: ignore[attr-defined]
    assert old == table == pickle.loads(pickle.dumps(table)) == copy.copy(table)


def test_the_state_of_a_run_may_have_a_renamed_key() -> None:
    recipe = parse_recipe("mine", with_value("train.batch_penalty", 0.5))
    stored = recipe.to_dict()
    stored["train"]["batch_price"] = stored["train"].pop("batch_penalty")
    with pytest.warns(DeprecationWarning, match=RENAMED):
        assert differing_keys(recipe, stored) == []
    with pytest.warns(DeprecationWarning, match=RENAMED):
        assert differing_keys(parse_recipe("mine", SMALLEST), stored) == ["train.batch_penalty"]


def test_choices_of_the_convert_table_are_those_of_the_layers() -> None:
    hints = get_type_hints(ConvertTable)
    assert set(get_args(get_args(hints["gate"])[0])) == set(get_args(Gate))
    assert set(get_args(hints["bn_statistics"])) == set(get_args(BnStatistics))


def test_two_runs_are_distinguished_by_their_keys() -> None:
    one, other = parse_recipe("mine", SMALLEST), parse_recipe("mine", with_value("train.seed", 3))
    assert differing_keys(one, one.to_dict()) == []
    assert differing_keys(one, other.to_dict()) == ["train.seed"]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_says_what_it_is_for(name: str) -> None:
    recipe = shipped_recipes()[name]
    assert isinstance(read_recipe(name), Recipe)
    for word in ("Data:", "Hardware:", "Time:", "Result:"):
        assert word in recipe.summary, f"{name} does not tell {word}"
    assert not re.search(r"\b[A-Z_]{4,}\b", recipe.summary), f"{name} has a blank to be filled in"


def test_recipes_can_be_listed_shown_and_copied(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["recipes", *arguments])
        return done.exit_code, done.output

    status, listed = run("ls")
    assert status == 0
    assert {line for line in listed.splitlines() if line and not line.startswith(" ")} == {*shipped_recipes()}
    assert run("show", "digits_source") == (0, shipped_recipes()["digits_source"].text)
    copy = tmp_path / "digits_source.toml"
    assert run("cp", "digits_source", str(tmp_path)) == (
        0,
        f"wrote {copy}; run it with: normswap finetune {copy}\n",
    )
    assert copy.read_text() == shipped_recipes()["digits_source"].text
    assert "exists already" in run("cp", "digits_source", str(tmp_path))[1]
    assert run("cp", "digits_source", str(tmp_path), "--force")[0] == 0
    status, output = run("cp", "digits_source", str(tmp_path / "a.txt"))
    assert (status, "expected a folder or a name that ends in .toml" in output) == (2, True)
    status, output = run("show", "digits")
    assert (status, "no recipe 'digits'; did you mean digits_source?" in output) == (2, True)


def test_the_command_shows_that_a_key_was_renamed(tmp_path: Path) -> None:
    overrides = ["--set", "train.batch_price=0.1", "--set", "train.lr=-1"]
    done = CliRunner().invoke(main, ["finetune", "digits_source", "--set", f"run.output={tmp_path}", *overrides])
    assert done.exit_code == 2
    assert "train.lr: expected at least 0" in done.stderr
    done = CliRunner().invoke(main, ["finetune", "digits_source", *overrides[:2], "--set", "model.checkpoint=no.pt"])
    assert done.stderr.count("warning: train.batch_price of normswap was renamed to train.batch_penalty") == 1


@pytest.mark.parametrize(
    ("source", "overrides", "text"),
    [
        (b"x.toml", (), "source: expected a path that ends in .toml or the name of a recipe, got b'x.toml'"),
        (None, (), "source: expected a path that ends in .toml or the name of a recipe, got None"),
        ("digits_source", "train.lr=3", "overrides: expected a list such as ['train.lr=0.01'], got 'train.lr=3'"),
        ("digits_source", {"train.lr": 3}, "overrides: expected a list such as ['train.lr=0.01'], got {"),
        ("digits_source", None, "overrides: expected a list such as ['train.lr=0.01'], got None"),
        ("digits_source", [3], "overrides: expected table.key=value such as train.lr=0.01, got 3"),
        ("digits_source", ["train.seed=" + 5000 * "9"], "train.seed: expected a whole number, got '999"),
        (
            "digits_source",
            ["convert.kinds=['bm']"],
            "convert.kinds[0]: expected 'bn' or 'in' or 'gn1' or 'gn', got 'bm'",
        ),
    ],
)
def test_wrong_arguments_of_read_recipe_are_refused(source: Any, overrides: Any, text: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(text)):
        read_recipe(source, overrides)


def test_a_recipe_with_a_number_of_too_many_digits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not TOML: Exceeds the limit"):
        read_recipe(written(tmp_path, f"[train]\nseed = {5000 * '9'}\n"))
