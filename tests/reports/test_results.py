"""How results print: `repr` in one line, `str` and notebooks as the tables of the command line; `help` is readable."""

import inspect
import io
import json
import pickle
import pydoc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import normswap
from normswap.reports.tables import plan_summary, verification_table
from normswap.surgery.plan import Skip, SwapPlan
from normswap.text import pluralize
from tests.helpers import files

FUNCTIONS = {name: f for name in normswap.__all__ if inspect.isfunction(f := getattr(normswap, name))}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One result of every function, of a network with many sites."""
    path = tmp_path_factory.mktemp("results") / "model.pt"
    torch.manual_seed(0)
    model, x = files.small_model(), torch.randn(files.SHAPE)
    conversion = normswap.convert(model, x, exclude=["layer4.*"])
    normswap.save(conversion.model, path, plan=conversion.plan, architecture=files.ARCH)
    trained = files.small_model()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return {
        "conversion": conversion,
        "plan": conversion.plan,
        "verification": normswap.verify(model, conversion.model, [x]),
        "failed": normswap.verify(model, files.small_model(), [x]),
        "calibration": normswap.calibrate(normswap.convert(model).model, [x]),
        "training": normswap.convert_training(trained, optimizer, scheduler, example_inputs=x),
        "loaded": normswap.load(path),
        "bare": normswap.load(path)._replace(plan=None, history=(), rest={"epoch": 3}),
        "weights": normswap.importance_weights(conversion.model),
    }


REPRS = {
    "conversion": r"Conversion\(ResNet, 12 swaps, 3 skips\)",
    "plan": r"SwapPlan\(timm\.models\.resnet\.ResNet, 12 swaps, 3 skips\)",
    "verification": r"Verification\(passed, max_rel_error=\d\.\de-\d\d, inputs='2x3x64x64'\)",
    "failed": r"Verification\(failed: outputs in evaluation, .*max_rel_error=.*\)",
    "calibration": r"Calibration\(15 layers, 0 skipped, 1 batch\)",
    "training": r"TrainingConversion\(ResNet, 15 swaps, 0 skips, StepLR\)",
    "loaded": r"Loaded\(ResNet, 12 swaps\)",
    "bare": r"Loaded\(ResNet, not converted, rest: epoch\)",
    "weights": r"SiteImportance\(12 sites\)",
}
TABLES = {
    "conversion": ("ResNet  converted", "12  swap  in+ln+bn", "3 "),
    "plan": ("Sites by kind", "excluded by the pattern 'layer4.*'"),
    "verification": ("outputs in evaluation", "gradients", "same"),
    "failed": ("DIFFERS", "Sites that differ most"),
    "calibration": ("Statistics that changed most", "5 more, at most"),
    "training": ("ResNet  converted", "15  swap", "Gates  learning rate 0.1, no weight decay", "Schedulers  StepLR"),
    "loaded": ("ResNet  loaded", "12  swap  in+ln+bn", "History", "saved"),
    "bare": ("Plan  not converted", "Also in the file  epoch"),
    "weights": ("Importance weights", "layer1.0.bn1", "1.00"),
}


@pytest.mark.parametrize("name", REPRS)
def test_a_result_says_in_one_line_what_it_is(results: dict[str, Any], name: str) -> None:
    shown = repr(results[name])
    assert re.fullmatch(REPRS[name], shown)
    assert len(shown) < 300


@pytest.mark.parametrize("name", TABLES)
def test_a_result_prints_as_a_table(results: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    shown = str(results[name])
    assert all(part in shown for part in TABLES[name]), shown
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 100
    page = results[name]._repr_html_()
    assert page.startswith("<pre>")
    assert TABLES[name][0].split("  ")[0] in page


@pytest.mark.parametrize(("name", "table"), [("plan", plan_summary), ("verification", verification_table)])
def test_the_table_is_that_of_the_command_line(results: dict[str, Any], name: str, table: Any) -> None:
    console = Console(file=io.StringIO(), width=100, highlight=False)
    console.print(table(results[name]))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert [line.rstrip() for line in printed.strip().splitlines()] == str(results[name]).splitlines()


def test_notebooks_escape_what_a_file_says() -> None:
    plan = SwapPlan((), (Skip("<b>", "<i>", "bn", "<script>alert(1)</script>"),), "<img>", None, ("<a href=x>",))
    page = plan._repr_html_()
    assert "&lt;script&gt;" in page
    assert not {"<script>", "<a href", "<b>", "<i>"} & {*re.findall(r"<[^>]*>", page)}


def test_importance_weights_stay_a_dict(results: dict[str, Any]) -> None:
    weights = results["weights"]
    assert isinstance(weights, dict)
    assert {**weights} == weights == pickle.loads(pickle.dumps(weights))
    assert json.loads(json.dumps(weights))["bn1"][0] == {"in": 0.0, "ln": 0.0, "bn": 1.0}
    assert str(normswap.importance_weights(nn.Linear(1, 1)))  # an empty one prints too


def test_results_still_unpack(results: dict[str, Any]) -> None:
    model, plan, replaced = results["conversion"]
    assert isinstance(model, nn.Module)
    assert plan == results["plan"]
    assert len(replaced) == 12
    assert len(results["loaded"]) == 4


@pytest.mark.parametrize(("number", "words"), [(0, "0 swaps"), (1, "1 swap"), (2, "2 swaps")])
def test_things_are_counted_in_words(number: int, words: str) -> None:
    assert pluralize(number, "swap") == words


# help()


@pytest.mark.parametrize("name", ["convert", "plan_swaps", "find_norm_sites", "apply_plan"])
def test_help_prints_no_table_of_classes(name: str) -> None:
    shown = pydoc.plain(pydoc.render_doc(FUNCTIONS[name]))
    assert "= KNOWN_NORMS" in shown
    assert "functools.partial" not in shown
    assert len(str(inspect.signature(FUNCTIONS[name]))) < 1500


def test_the_table_of_norms_is_read_only_and_can_be_extended() -> None:
    class Own(nn.BatchNorm2d):
        pass

    longer = normswap.KNOWN_NORMS | {Own: normswap.read_batch_norm}
    assert longer == {Own: normswap.read_batch_norm} | normswap.KNOWN_NORMS == dict(longer)
    assert len(longer) == len(normswap.KNOWN_NORMS) + 1
    assert Own not in normswap.KNOWN_NORMS
    with pytest.raises(TypeError, match="does not support item assignment"):
        normswap.KNOWN_NORMS[Own] = normswap.read_batch_norm  # type: ignore[index]


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - {"read_recipe", "run_recipe"}))
def test_every_argument_is_explained_in_place(name: str) -> None:
    arguments = inspect.getdoc(FUNCTIONS[name]).partition("Args:")[2]  # type: ignore[union-attr]
    arguments = re.split(r"^\w+:$", arguments, flags=re.M)[0]
    explained = {
        n for line in re.findall(r"^    \*{0,2}(\w+(?:, \w+)*): \S", arguments, re.M) for n in line.split(", ")
    }
    assert {*inspect.signature(FUNCTIONS[name]).parameters} - explained - {"module"} == set()


@pytest.mark.parametrize(
    "name",
    [
        *("convert", "plan_swaps", "find_norm_sites", "verify", "calibrate", "save", "load", "param_groups"),
        *("importance_weights", "convert_file"),
    ],
)
def test_the_example_in_a_docstring_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import doctest

    monkeypatch.chdir(tmp_path)
    found = doctest.DocTestFinder(recurse=False).find(FUNCTIONS[name], name, globs={})
    results = [doctest.DocTestRunner().run(test) for test in found]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0
