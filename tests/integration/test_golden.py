"""What normswap 0.1.0 wrote before its modules moved still loads, and computes what it computed.

The files are in `tests/golden/`, with how they were made. They are never written again.
"""

import copy
import json
import math
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import Tensor, fx, nn

import normswap
from normswap.cli import main
from tests.helpers.golden_files import GOLDEN, load_networks, old_names_allowed, unpack

networks = load_networks()

MODELS = sorted(path.name.removesuffix(".pt.xz") for path in (GOLDEN / "models").glob("*.pt.xz"))
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}
BY_NAME = {"architecture": "networks.py:classifier"}
LOADED: dict[str, dict[str, Any]] = {
    "last.normswap.pt": BY_NAME,
    "dcp.normswap": BY_NAME,
    "hf.normswap": {},
    "saved.pt": BY_NAME,
    "saved.safetensors": BY_NAME,
    "saved_module.pt": {"trust": True},
    "named.safetensors": {},
    "program.normswap.pt2": {"trust": True},
}
COMMANDS: dict[str, dict[str, Any]] = json.loads((GOLDEN / "json_keys.json").read_text())


# Graphs and programs that torch 2.14 wrote: an older torch need not read them.
WITH_GRAPHS = {"graph", "traced", "edited_graph", "program.normswap.pt2"}
IS_OLDER = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)


def skip_on_an_older_torch(name: str) -> None:
    if IS_OLDER and name in WITH_GRAPHS:
        pytest.skip("written by torch 2.14")


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked copy, which no test changes."""
    return unpack(tmp_path_factory.mktemp("golden"))


@pytest.fixture
def files(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files as the working directory."""
    shutil.copytree(golden / "files", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(golden: Path, name: str, way: str) -> Any:
    """A pickled model by `torch.load`, or by plain pickle."""
    skip_on_an_older_torch(name)
    path = golden / "models" / f"{name}.{way}"
    with old_names_allowed():
        return torch.load(path, weights_only=False) if way == "pt" else pickle.loads(path.read_bytes())


def call(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def results_on(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """As `make.py` took them: in evaluation, then in training, then the buffers."""
    found = {"evaluation": call(model.eval(), x)}
    inside = x.clone().requires_grad_()
    torch.manual_seed(1)  # of a dropout
    y = call(model.train(), inside)
    y.square().sum().backward()
    assert inside.grad is not None
    buffers = [buffer.double().flatten() for buffer in model.buffers()]
    return {**found, "training": y, "gradient": inside.grad, "buffers": torch.cat(buffers or [torch.zeros(0)])}


def expected_of(path: Path, name: str) -> dict[str, Tensor]:
    found = safetensors.torch.load_file(path)
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in found.items() if key.startswith(f"{name}/")}


def assert_close(found: Tensor, expected: Tensor, limit: float) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    found, expected = found.detach().double(), expected.detach().double()
    assert float((found - expected).norm()) <= limit * max(1.0, float(expected.norm()))


def assert_same_results(model: nn.Module, x: Tensor, expected: dict[str, Tensor]) -> None:
    found = results_on(model, x)
    assert {"evaluation", "training", "buffers"} <= expected.keys()
    for key, tensor in expected.items():
        assert_close(found[key], tensor, LIMITS[x.dtype])


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(math.prod((2, 3, 32, 32))).double().mul(0.7).sin().to(dtype).view(2, 3, 32, 32)


def input_of(golden: Path, name: str = "") -> Tensor:
    x = safetensors.torch.load_file(golden / "models" / "expected.safetensors")["input"]
    return x.float() if name == "float32" else x


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["pt", "pickle"])
@pytest.mark.parametrize("name", MODELS)
def test_a_pickled_model_computes_what_it_computed(golden: Path, name: str, way: str) -> None:
    expected = expected_of(golden / "models" / "expected.safetensors", name)
    assert expected.keys() == {"evaluation", "training", "gradient", "buffers"}
    assert_same_results(read(golden, name, way), input_of(golden, name), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_pickled_model_is_copied_and_pickled_again(golden: Path, name: str) -> None:
    model, x = read(golden, name, "pt").eval(), input_of(golden, name)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call(twin, x), call(model, x))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("stock", {"BatchNorm2d": 2}),
        ("functional", {}),
        ("in_place", {"BatchNorm2d": 1}),
        ("synchronized", {"SyncBatchNorm": 1, "BatchNorm2d": 1}),
        ("edited_graph", {}),
        ("fused", {"BatchNormAct2d": 1, "NormRelu": 1}),
    ],
)
def test_a_pickled_model_is_reverted(golden: Path, name: str, layers: dict[str, int]) -> None:
    model, x = read(golden, name, "pt").eval(), input_of(golden, name)
    y = call(model, x)
    moved = name in ("edited_graph", "fused")
    if moved:
        with pytest.raises(normswap.NormswapError, match=r"importance weights of .* differ"):
            normswap.revert(model)
    with old_names_allowed():
        normswap.revert(model, discard=moved)
    names = [type(module).__name__ for module in model.modules()]
    assert {kind: names.count(kind) for kind in layers} == layers
    assert not any(hasattr(module, "mean_weight") for module in model.modules())
    if not moved:
        assert_close(call(model, x), y, 1e-9)


def test_what_a_pickled_model_shares_stays_shared(golden: Path) -> None:
    model = read(golden, "in_place", "pickle")
    assert model.again is model.bn
    assert isinstance(model.bn, normswap.SwitchNorm2d)
    assert [*model.bn._forward_hooks.values()] == [networks.hook]


def test_a_pickled_functional_site_is_an_instance_of_its_class(golden: Path) -> None:
    model, x = read(golden, "functional", "pt").eval(), input_of(golden)
    assert isinstance(model, networks.Functional)
    assert type(model).__qualname__ == "Functional"
    assert_close(model(x, double=True), 2 * model(x), 1e-12)
    assert [*normswap.importance_weights(model)] == ["batch_norm", "batch_norm_1"]
    assert [*normswap.importance_weights(read(golden, "functional_partly", "pt"))] == ["batch_norm_1"]


def test_a_pickled_model_keeps_its_settings(golden: Path) -> None:
    frozen = read(golden, "kinds", "pt")
    assert len(normswap.unfreeze_statistics(frozen)) == 2
    assert frozen[1].bn_statistics == "renorm"  # as it was planned
    layers = [m for m in read(golden, "synchronized", "pt").modules() if isinstance(m, normswap.SwitchNorm2d)]
    assert layers
    assert all(layer.synchronize for layer in layers)
    assert read(golden, "scratch", "pt")[1].gate == "softmax"
    assert isinstance(read(golden, "graph", "pt"), fx.GraphModule)


def test_a_pickled_model_is_trained_further(golden: Path) -> None:
    model, x = read(golden, "stock", "pt").train(), input_of(golden)
    optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.1), momentum=0.9)
    before = normswap.importance_weights(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert normswap.importance_weights(model) != before


# --- what functions returned ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(golden: Path) -> dict[str, Any]:
    with old_names_allowed():
        found: dict[str, Any] = pickle.loads((golden / "results.pickle").read_bytes())
    return found


def test_pickled_results_have_their_classes_and_values(results: dict[str, Any]) -> None:
    conversion, training = results["conversion"], results["training"]
    assert isinstance(conversion, normswap.Conversion)
    assert [*conversion.replaced] == ["1", "4"] == [swap.fqn for swap in conversion.plan.swaps]
    assert isinstance(training, normswap.TrainingConversion)
    assert training.group["gates"] is True
    assert isinstance(results["plan"], normswap.SwapPlan)
    assert normswap.SwapPlan.from_json(results["plan"].to_json()) == results["plan"]
    assert [type(site) for site in results["sites"]] == [normswap.NormSite] * 2
    assert isinstance(results["verification"], normswap.Verification)
    assert results["verification"].passed
    assert isinstance(results["calibration"], normswap.Calibration)
    assert len(results["calibration"].layers) == 2
    assert results["importance"] == normswap.importance_weights(conversion.model)
    assert results["record"].plan == conversion.plan
    assert [step.action for step in results["record"].history] == ["saved"]
    assert isinstance(results["loaded"], normswap.Loaded)
    assert results["loaded"].plan == conversion.plan
    assert isinstance(results["recipe"], normswap.Recipe)


def test_pickled_results_print_themselves(results: dict[str, Any]) -> None:
    for name in ("conversion", "plan", "verification", "calibration", "importance", "loaded"):
        assert repr(results[name])
        assert len(str(results[name]).splitlines()) > 1, name


def test_pickled_errors_and_readers_are_those_of_today(results: dict[str, Any]) -> None:
    assert len(results["errors"]) > 10
    assert all(isinstance(error, normswap.NormswapError) for error in results["errors"])
    assert {str(error) for error in results["errors"]} == {"why"}
    names = ("read_batch_norm", "read_group_norm", "read_instance_norm", "read_norm_act")
    assert results["readers"] == [getattr(normswap, name) for name in names]


# --- plans ------------------------------------------------------------------------------------------------------------


def sites_model(golden: Path) -> nn.Module:
    state = expected_of(golden / "plans" / "expected.safetensors", "state")
    model: nn.Module = networks.Sites().double()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("name", ["sites", "with_settings_applied"])
def test_a_plan_is_read_and_written_as_it_was(golden: Path, name: str) -> None:
    text = (golden / "plans" / f"{name}.json").read_text()
    with old_names_allowed():
        plan = normswap.SwapPlan.from_json(text)
    assert json.loads(plan.to_json()) == json.loads(text)
    assert len(plan.swaps) + len(plan.skips) == 15
    assert {skip.kind for skip in plan.skips} == {"bn", "gn1", "gn", "ln", "sn"}


def test_settings_in_a_plan_decide_what_they_decided(golden: Path) -> None:
    with old_names_allowed():
        edited = normswap.SwapPlan.from_json((golden / "plans" / "with_settings.json").read_text())
        applied = normswap.SwapPlan.from_json((golden / "plans" / "with_settings_applied.json").read_text())
    assert edited.swaps == applied.swaps
    assert edited.skips == applied.skips


@pytest.mark.parametrize("name", ["sites", "with_settings"])
def test_a_plan_is_carried_out_as_it_was(golden: Path, name: str) -> None:
    path = golden / "plans" / "expected.safetensors"
    model = sites_model(golden)
    with old_names_allowed():
        plan = normswap.SwapPlan.from_json((golden / "plans" / f"{name}.json").read_text())
        replaced = normswap.apply_plan(model, plan)
    assert replaced.keys() == {swap.fqn for swap in plan.swaps}
    assert_same_results(model, safetensors.torch.load_file(path)["input"], expected_of(path, name))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADED)
def test_a_file_is_loaded_and_computes_what_it_computed(files: Path, name: str) -> None:
    skip_on_an_older_torch(name)
    with old_names_allowed():
        loaded = normswap.load(name, **LOADED[name])
    expected = expected_of(files / "expected.safetensors", name)
    if name.endswith(".pt2"):
        assert_close(loaded.model(images()), expected["evaluation"], LIMITS[torch.float32])
    else:
        assert_same_results(loaded.model, images(next(loaded.model.parameters()).dtype), expected)
    assert loaded.plan is not None
    assert loaded.plan.swaps
    assert [step.normswap for step in loaded.history] == ["0.1.0"]
    assert [step.action for step in loaded.history] == ["saved" if "normswap" not in name else "converted"]


def test_a_converted_checkpoint_keeps_its_optimizer_and_average(files: Path) -> None:
    with old_names_allowed():
        loaded = normswap.load("last.normswap.pt", **BY_NAME)
        average = normswap.load("last.normswap.pt", entry="state_dict_ema", **BY_NAME)
        source = normswap.load("last.pt", **BY_NAME)
        plan = normswap.SwapPlan.from_json(Path("saved_plan.json").read_text())
    assert loaded.plan == plan
    weights = [found.model.conv1.weight for found in (loaded, average)]
    assert not torch.equal(*weights)
    assert all(isinstance(found.model.bn1, normswap.SwitchNorm2d) for found in (loaded, average))
    assert loaded.rest["epoch"] == 3
    optimizer = torch.optim.SGD(normswap.param_groups(loaded.model, like=loaded.rest["optimizer"]), momentum=0.9)
    optimizer.load_state_dict(loaded.rest["optimizer"])
    old = source.rest["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(optimizer.state[loaded.model.conv1.weight]["momentum_buffer"], old)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    scheduler.load_state_dict(loaded.rest["scheduler"])
    loaded.model.train()(images()).square().mean().backward()
    optimizer.step()
    scheduler.step()
    assert len(scheduler.get_last_lr()) == len(optimizer.param_groups) == 2


def test_the_tensors_of_a_file_stand_alone(files: Path) -> None:
    model = normswap.convert(networks.classifier(), images()).model
    model.load_state_dict(torch.load("saved.pt", weights_only=True))
    assert_close(model.eval()(images()), expected_of(files / "expected.safetensors", "saved.pt")["evaluation"], 1e-5)
    with old_names_allowed():
        module = torch.load("saved_module.pt", weights_only=False)
    assert isinstance(module, networks.Classifier)


# --- a recipe and its run ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the recipe, with the folder of its run, as the working directory."""
    shutil.copytree(golden / "run", tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as the run did, whose numbers are compared
    monkeypatch.chdir(tmp_path)
    return tmp_path


def penalty(recipe: normswap.Recipe) -> float:
    """What a recipe sets on the BN share, under its new name or the old one."""
    train: Any = recipe.train
    return float(train.batch_penalty if hasattr(train, "batch_penalty") else train.batch_price)


def test_a_recipe_with_batch_price_is_read(run: Path) -> None:
    with old_names_allowed():
        recipe = normswap.read_recipe("recipe.toml")
        changed = normswap.read_recipe("recipe.toml", ["train.batch_price=0.5"])
    assert penalty(recipe) == 0.05
    assert penalty(changed) == 0.5
    assert recipe.is_written("train.batch_price")
    assert (recipe.train.steps, recipe.train.ema_decay, str(recipe.output)) == (6, 0.9, "run")


def test_an_interrupted_run_goes_on_and_ends_as_it_did(run: Path) -> None:
    records: list[Any] = []
    with old_names_allowed():
        recipe = normswap.read_recipe("recipe.toml")
        outcome = normswap.run_recipe(recipe, resume=True, trust=True, on_record=records.append)
    document = json.loads((run / "outcome.json").read_text())
    assert outcome.steps == document["steps"] == 6
    for found, expected in ((outcome.before, document["before"]), (outcome.after, document["after"])):
        assert [found.loss, found.accuracy, found.images] == pytest.approx(expected, rel=1e-4)
    assert outcome.importance.keys() == document["importance"].keys()
    for site, (mean, var) in document["importance"].items():
        assert outcome.importance[site].mean == pytest.approx(mean, abs=1e-4)
        assert outcome.importance[site].var == pytest.approx(var, abs=1e-4)
    weights = torch.load(outcome.model, weights_only=True)
    expected_weights = safetensors.torch.load_file(run / "model.safetensors")
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        assert_close(weights[name], tensor, 1e-4)
    assert min(record["step"] for record in records) > 3  # the first half was not run again
    assert [record["step"] for record in map(json.loads, (run / "run/log.jsonl").read_text().splitlines())][:4] == [
        *(0, 0, 2, 3)
    ]


def test_a_run_of_another_penalty_is_not_resumed(run: Path) -> None:
    with old_names_allowed():
        recipe = normswap.read_recipe("recipe.toml", ["train.batch_price=0.5"])
        with pytest.raises(normswap.NormswapError, match=r"train\.batch_p"):
            normswap.run_recipe(recipe, resume=True, trust=True)


def test_the_state_of_a_run_is_a_checkpoint(run: Path) -> None:
    with old_names_allowed():
        loaded = normswap.load("run/state.pt", trust=True, **BY_NAME)
    assert isinstance(loaded.model.bn1, normswap.SwitchNorm2d)
    assert loaded.rest["step"] == 3


# --- what commands print ----------------------------------------------------------------------------------------------


def key_paths(document: Any, place: str = "") -> Iterator[str]:
    """The places of all values in a JSON document; items of lists share theirs."""
    if isinstance(document, dict) and document:
        for key, value in document.items():
            yield from key_paths(value, f"{place}.{key}" if place else key)
    elif isinstance(document, list) and document:
        for item in document:
            yield from key_paths(item, f"{place}[]")
    else:
        yield place


def missing_keys(document: Any, keys: list[str]) -> list[str]:
    """Which of `keys` a document lacks; a value of today that is no longer empty has keys of its own."""
    found = {*key_paths(document)}
    return [key for key in keys if not any(f == key or f.startswith((f"{key}.", f"{key}[]")) for f in found)]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_the_keys_that_it_printed(golden: Path, files: Path, name: str) -> None:
    shutil.copy(golden / "run" / "recipe.toml", files)
    known = COMMANDS[name]
    with old_names_allowed():
        done = CliRunner().invoke(main, [*known["arguments"], "--json"])
    assert done.exit_code == known["exit_code"], done.output
    document = json.loads(done.stdout) if done.stdout else None
    assert (document is None) == (not known["keys"])
    assert not missing_keys(document, known["keys"])


def test_a_missing_key_is_noticed() -> None:
    assert missing_keys({"a": {"b": 1}, "c": [{"d": 1}]}, ["a.b", "c[].d", "a"]) == []
    assert missing_keys({"a": {"b": 1}, "c": [{"d": 1}]}, ["a.c", "c[].e", "ab"]) == ["a.c", "c[].e", "ab"]
