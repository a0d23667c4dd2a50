"""Module paths and documented names of 0.1.0 still give their objects, with a `DeprecationWarning` if they moved.

`tests/golden/old_names.json` lists the names. A name that no page of the documentation showed and that no pickle holds
was internal, and may be gone.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from tests.helpers.golden_files import GOLDEN, load_networks, old_names_allowed, unpack

NAMES: dict[str, Any] = json.loads((GOLDEN / "old_names.json").read_text())
pytestmark = pytest.mark.multiprocess

SURVEY = Path(__file__).with_name("names_survey.py")

SHOWN = {(entry["module"], entry["name"]) for entry in NAMES["documented"]} | {*map(tuple, NAMES["pickled"])}

# Modules of the command line are internal.
MODULES = [
    module for module in NAMES["modules"] if not module.endswith("__main__") and not module.startswith("normswap.cli.")
]


@pytest.fixture(scope="module")
def survey() -> dict[str, Any]:
    """What became of all names, in a fresh process."""
    package = str(Path(normswap.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(SURVEY), str(GOLDEN / "old_names.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_an_old_module_path_gives_its_names(survey: dict[str, Any], module: str) -> None:
    found = survey["modules"][module]
    if found.get("optional"):
        pytest.skip(found["error"])
    assert "error" not in found, found["error"]
    gone = [name for name in found["missing"] if (module, name) in SHOWN]
    assert not gone, "these names were documented or pickled: give each an alias in normswap/renamed.py"
    assert not found["silent"], "these moved, and the old path gives them without a DeprecationWarning"


def test_names_in_docs_and_pickles_of_earlier_versions_still_work(survey: dict[str, Any]) -> None:
    assert not survey["undocumented"]
    assert not survey["unpickled"]


def test_old_and_new_path_give_one_object(survey: dict[str, Any]) -> None:
    assert not survey["others"]
    assert NAMES["top"].keys() <= {*normswap.__all__}


def test_members_and_parameters_of_public_names_are_kept(survey: dict[str, Any]) -> None:
    assert not survey["members"]
    assert not survey["parameters"]


def test_every_class_is_where_pickle_looks_for_it(survey: dict[str, Any]) -> None:
    assert survey["classes"] > 150
    assert not survey["unresolved"]


@pytest.mark.parametrize(("module", "name"), [pair for pair in NAMES["pickled"] if not pair[0].startswith("golden")])
def test_a_name_in_a_pickle_resolves(module: str, name: str) -> None:
    with old_names_allowed():
        found = getattr(__import__(module, fromlist=[name]), name)
    assert callable(found)


class Recorder(pickle.Unpickler):
    """Notes which names of normswap a pickle asks for."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.asked: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "normswap":
            self.asked.add((module, name))
        return super().find_class(module, name)


def test_pickles_ask_for_no_name_that_is_not_listed(tmp_path: Path) -> None:
    load_networks()
    folder = unpack(tmp_path)
    listed = json.loads((GOLDEN / "pickled_names.json").read_text())
    paths = sorted(folder.rglob("*.pickle"))
    assert len(paths) > 10
    for path in paths:
        with path.open("rb") as file, old_names_allowed():
            recorder = Recorder(file)
            recorder.load()
        names = {tuple(pair) for pair in listed[path.relative_to(folder).as_posix()]}
        assert recorder.asked
        assert recorder.asked <= names


# --- members that have a new name -------------------------------------------------------------------------------------


def converted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return normswap.convert(model, torch.randn(2, 3, 5, 5)).model


def test_hang_on_counts_the_steps_of_an_optimizer() -> None:
    model, written = converted(), []
    optimizers = [torch.optim.SGD(normswap.param_groups(model, lr=0.1)) for _ in range(2)]
    watch = normswap.watch_importance(
        model, optimizers[0], write=lambda values, step: written.append((step, values)), every=1
    )
    with old_names_allowed():
        assert watch.hang_on(optimizers[1]) is watch
    optimizers[1].step()
    assert watch.step == 1
    assert [step for step, _ in written] == [0, 1]


def test_reach_does_what_is_due() -> None:
    model, written = converted(), []
    model[1].bn_statistics = "batch"
    with old_names_allowed():
        from normswap.finetune.watching import ImportanceLog, StatisticsSwitch

        log = ImportanceLog(model, lambda _, step: written.append(step), every=2, per_site=False)
        switch = StatisticsSwitch(model, {1: "running"})
        for step in range(4):
            log.reach(step)
            assert model[1].bn_statistics == ("batch" if step <= 1 else "running")
            switch.reach(step)
    assert written == [0, 2]
    assert model[1].bn_statistics == "running"


def test_the_table_of_a_recipe_takes_and_gives_batch_price() -> None:
    with old_names_allowed():
        from normswap.finetune.recipe_tables import TrainTable

        table = TrainTable(steps=1, batch_price=0.5)
        assert table.batch_price == 0.5


def test_functions_that_docs_imported_from_their_modules_work() -> None:
    with old_names_allowed():
        from normswap.checkpoints.optimizer_state import with_gates
        from normswap.checkpoints.scheduler_state import scheduler_with_gates
        from normswap.surgery.gated import trainable_gates

        from normswap.finetune.data import open_data

    model = converted()
    gates = list(trainable_gates(model))
    assert gates == ["1.mean_weight", "1.var_weight"]
    old = torch.optim.SGD([p for name, p in model.named_parameters() if name not in gates], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(old, lambda _: 1.0)
    extended = with_gates(old.state_dict(), gates=gates)
    assert len(extended["param_groups"]) == 2
    assert len(scheduler_with_gates(scheduler.state_dict(), optimizer_state=extended)["base_lrs"]) == 2
    assert callable(open_data)


def test_star_import_of_an_old_module_gives_its_names() -> None:
    with old_names_allowed():
        for module, name in (
            ("layers.modules", "SwitchNorm2d"),
            ("verification", "verify"),
            ("statistics", "freeze_statistics"),
        ):
            names: dict[str, Any] = {}
            exec(f"from normswap.{module} import *", names)
            assert names[name] is getattr(normswap, name)
    assert "SwitchNorm2d" in dir(sys.modules["normswap.layers.modules"])


def test_the_functions_that_graphs_call_are_found_at_their_old_paths() -> None:
    # The code of a pickled GraphModule imports what torch.fx treats as a leaf.
    with old_names_allowed():
        from normswap.layers.modules import apply_layer, apply_site
        from normswap.surgery.calls import as_results
    from normswap.layers.gated_module import apply_site as current_apply_site
    from normswap.layers.switch_norm import apply_layer as current_apply_layer
    from normswap.surgery.norms.functions import as_results as current_as_results

    assert (apply_layer, apply_site, as_results) == (current_apply_layer, current_apply_site, current_as_results)


def test_a_submodule_is_no_old_name_of_the_module_that_its_package_was() -> None:
    # In a fresh process, where nothing has imported the submodule yet.
    code = "import normswap.checkpoints.architecture.identification as own; print(own.efficientnet_pytorch.__name__)"
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
        check=False,
    )
    assert done.stdout.strip() == "normswap.checkpoints.architecture.efficientnet_pytorch", done.stderr[-2000:]
