"""What a recipe starts from: a file that knows itself, a head that fits, a warm-up that ends, a file that is there."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from torch import nn

import normswap
from normswap.cli import main
from normswap.errors import ArchitectureError, CheckpointError, NormswapError, RecipeError
from normswap.finetune.data import datasets
from normswap.finetune.optimization import build_average, make_lr_lambda, run_length
from normswap.finetune.recipe import Recipe, parse_recipe, read_recipe
from normswap.finetune.run_files import differing_keys, read_journal, read_state
from normswap.finetune.setup import RunSetup, prepare, swap_options
from normswap.finetune.tasks.classification import count_outputs
from normswap.finetune.trainer import run_recipe
from tests.finetune.test_datasets import image_folder

# timm opens a file per image and leaves it to the garbage collector to close it.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")]

ROOT = Path(__file__).resolve().parents[2]
TEN = "timm:test_resnet,num_classes=10"
SETTINGS: dict[str, dict[str, Any]] = {
    "data": {"source": "digits", "image_size": 32, "batch_size": 2},
    "train": {"steps": 1},
    "run": {"log_every": 1},
}


def recipe(**tables: dict[str, Any]) -> Recipe:
    whole = {table: {**SETTINGS.get(table, {}), **tables.get(table, {})} for table in {*SETTINGS, *tables}}
    return parse_recipe("mine", whole)


def count_classes(setup: RunSetup) -> int:
    """The outputs of the classifier that a run trains."""
    return count_outputs(setup.model, next(iter(setup.training))[0][:2])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def converted_file(architecture: str, **options: Any) -> nn.Module:
    """Write `sn.pt`, whose record names `architecture`."""
    model = normswap.load(bare_file(architecture), architecture=architecture).model
    conversion = normswap.convert(model, torch.randn(2, 3, 32, 32), **options)
    normswap.save(conversion.model, "sn.pt", plan=conversion.plan, architecture=architecture)
    return conversion.model


def test_a_recipe_never_runs_code_without_trust(here: Path) -> None:
    Path("own.py").write_text(
        "import pathlib, timm\n\npathlib.Path('ran').touch()\n\n"
        "def build():\n    return timm.create_model('test_resnet', num_classes=10)\n"
    )
    bare_file(TEN)
    for model in ({"architecture": "own.py:build"}, {"architecture": "own.py:build", "checkpoint": "bn.pt"}):
        with pytest.raises(
            RecipeError, match=r'"own\.py:build" is Python code, which a recipe does not run by default'
        ):
            prepare(recipe(model=model))
        assert not Path("ran").exists()
        assert prepare(recipe(model=model), trust=True).source.plan is not None
        Path("ran").unlink()


def bare_file(architecture: str) -> str:
    """Write `bn.pt`, a state dict."""
    name, _, keywords = architecture.removeprefix("timm:").partition(",")
    options = dict(pair.split("=") for pair in keywords.split(",") if pair)
    model = timm.create_model(name, **{key: int(value) for key, value in options.items()})
    torch.save(model.state_dict(), "bn.pt")
    return "bn.pt"


# --- the file knows ---------------------------------------------------------------------------------------------------


def test_the_line_of_the_readme_finetunes_the_file_of_the_readme(here: Path) -> None:
    (line,) = re.findall(r"^normswap (finetune .*)$", (ROOT / "README.md").read_text().replace("\\\n", ""), re.M)
    assert "model.checkpoint=model.normswap.pt" in line
    conversion = normswap.convert(timm.create_model("resnet18"), torch.randn(2, 3, 64, 64))
    normswap.save(conversion.model, "model.normswap.pt", plan=conversion.plan, architecture="timm:resnet18")
    for split in ("train", "validation"):
        image_folder(here / "images" / split, size=32, each=4)
    short = {"data.image_size": 64, "data.workers": 0, "train.epochs": 1, "train.accumulation": 1}
    words = [word for key, value in short.items() for word in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(main, [*shlex.split(line.replace("PATH", str(here / "images"))), *words])
    assert done.exit_code == 0, done.output
    loaded = normswap.load("runs/imagenet_small_batch/model.pt")
    assert type(loaded.model).__name__ == "ResNet"
    assert len(loaded.model.layer1) == 2  # type: ignore[arg-type]  # resnet18, and not the resnet50 of the recipe
    assert "model.normswap.pt is converted already (20 sites)" in done.stderr
    assert re.search(r"classifier of 1000 classes replaced by one of \d", done.stderr)


def test_the_architecture_of_a_shipped_recipe_is_a_default_for_files_that_have_none(here: Path) -> None:
    overrides = ["model.pretrained=false", "data.workers=0", "data.source=digits", "data.image_size=32"]
    converted_file(TEN)
    found = prepare(read_recipe("imagenet_small_batch", [*overrides, "model.checkpoint=sn.pt"]))
    assert found.source.architecture == TEN
    # A file without a record is known by its tensors, if one architecture fits them.
    torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), "bn.pt")
    found = prepare(read_recipe("imagenet_small_batch", [*overrides, "model.checkpoint=bn.pt"]))
    assert found.source.architecture == "timm:resnet10t,num_classes=10"
    # If several fit, the one that the recipe names: torchvision's resnet50 has the same tensors.
    torch.save(timm.create_model("resnet50", num_classes=10).state_dict(), "bn.pt")
    found = prepare(
        read_recipe("imagenet_small_batch", [*overrides, "model.checkpoint=bn.pt", "convert.enabled=false"])
    )
    assert found.source.architecture == "timm:resnet50,num_classes=10"
    # And else what the recipe says.
    torch.save({"a.weight": torch.zeros(2, 2, 1, 1)}, "unknown.pt")
    with pytest.raises(ArchitectureError, match="the tensors do not fit timm:resnet50"):
        prepare(read_recipe("imagenet_small_batch", [*overrides, "model.checkpoint=unknown.pt"]))


def test_keywords_of_the_file_complete_an_architecture_that_agrees_with_it(here: Path) -> None:
    converted_file(TEN)
    found = prepare(recipe(model={"checkpoint": "sn.pt", "architecture": "timm:test_resnet,drop_rate=0.5"}))
    assert found.source.architecture == "timm:test_resnet,drop_rate=0.5,num_classes=10"
    assert found.model.drop_rate == 0.5


@pytest.mark.parametrize(
    ("tables", "text"),
    [
        (
            {"model": {"architecture": "timm:resnet10t"}},
            "model.architecture: 'timm:resnet10t' contradicts the checkpoint sn.pt, which contains "
            "'timm:test_resnet,num_classes=10': remove the key (--set model.architecture=none)",
        ),
        (
            {"model": {"architecture": "timm:test_resnet,num_classes=7"}},
            "model.architecture: num_classes=7 contradicts the checkpoint sn.pt, which contains num_classes=10",
        ),
        (
            {"convert": {"gate": "softmax"}},
            'convert.gate: "softmax" contradicts the checkpoint sn.pt, which contains a conversion with "simplex"',
        ),
        (
            {"convert": {"bn_statistics": "running"}},
            'convert.bn_statistics: "running" contradicts the checkpoint sn.pt, which contains a conversion with "ba',
        ),
        ({"convert": {"synchronize": True}}, "convert.synchronize: true contradicts the checkpoint sn.pt"),
        ({"convert": {"kinds": ["in"]}}, 'convert.kinds: ["in"] contradicts the checkpoint sn.pt, which contains a'),
        ({"convert": {"include": ["layer1.*"]}}, 'convert.include: ["layer1.*"] contradicts the checkpoint sn.pt'),
        ({"convert": {"exclude": ["layer1.*"]}}, 'convert.exclude: ["layer1.*"] contradicts the checkpoint sn.pt'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_recipe_that_contradicts_a_converted_file_is_refused_by_its_key(
    here: Path, tables: dict[str, Any], text: str
) -> None:
    converted_file(TEN, bn_statistics="batch")
    tables = {**tables, "model": {"checkpoint": "sn.pt", **tables.get("model", {})}}
    with pytest.raises(RecipeError, match=re.escape(text)):
        prepare(recipe(**tables))


def test_what_agrees_with_a_converted_file_may_be_written(here: Path) -> None:
    converted_file(TEN, bn_statistics="batch")
    wanted = {"gate": "simplex", "bn_statistics": "batch", "include": ["*"], "exclude": ["fc"], "kinds": ["bn", "in"]}
    found = prepare(recipe(model={"checkpoint": "sn.pt", "architecture": TEN}, convert=wanted))
    assert any("[convert] is not applied" in note for note in found.notes)


def test_a_pickled_module_brings_its_own_architecture(here: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=10), "module.pt")
    with pytest.raises(RecipeError, match=r"model\.architecture: .* contains a pickled module with its own"):
        prepare(recipe(model={"checkpoint": "module.pt", "architecture": TEN}), trust=True)
    shipped = ["model.pretrained=false", "data.workers=0", "data.source=digits", "data.image_size=32"]
    shipped.append("model.checkpoint=module.pt")
    assert count_classes(prepare(read_recipe("imagenet_small_batch", shipped), trust=True)) == 10


def test_a_recipe_knows_what_the_user_wrote(here: Path) -> None:
    shipped = read_recipe(
        "imagenet_small_batch", ["model.checkpoint=a.pt", "model.pretrained=false", "run.output=none"]
    )
    assert shipped.written == {"model.checkpoint", "model.pretrained"}
    assert not shipped.is_set_by_user("model.architecture")
    Path("own.toml").write_text('[model]\narchitecture = "timm:resnet18"\n[train]\nsteps = 3\n')
    assert read_recipe("own.toml").is_set_by_user("model.architecture")
    built = Recipe("built", model=shipped.model)
    assert (built.is_set_by_user("model.checkpoint"), built.is_set_by_user("model.entry")) == (True, False)


# --- the head ---------------------------------------------------------------------------------------------------------


def test_a_trained_head_that_fits_is_kept(here: Path) -> None:
    trained = converted_file(TEN)
    found = prepare(recipe(model={"checkpoint": "sn.pt", "new_head": True}))
    assert torch.equal(found.model.fc.weight, trained.fc.weight)  # type: ignore[union-attr, operator]
    assert any("the classifier of 10 classes fits the data and is kept" in note for note in found.notes)
    torch.manual_seed(5)
    found = prepare(recipe(model={"checkpoint": "sn.pt", "new_head": "always"}))
    assert not torch.equal(found.model.fc.weight, trained.fc.weight)  # type: ignore[union-attr, operator]
    again = prepare(recipe(model={"checkpoint": "sn.pt", "new_head": "always"}))
    assert torch.equal(found.model.fc.weight, again.model.fc.weight)  # type: ignore[union-attr, operator]


def test_a_head_that_is_replaced_is_reported_in_the_log_and_on_the_terminal(here: Path) -> None:
    converted_file("timm:test_resnet,num_classes=7")
    words = ["model.checkpoint=sn.pt", "model.pretrained=false", "data.source=digits", "data.image_size=32"]
    words += ["train.epochs=none", "train.steps=1", "train.accumulation=1", "data.workers=0", "run.output=run"]
    done = CliRunner().invoke(
        main, ["finetune", "imagenet_small_batch", *(w for word in words for w in ("--set", word))]
    )
    assert done.exit_code == 0, done.output
    wording = "model.new_head: classifier of 7 classes replaced"
    assert f"note: {wording}" in done.stderr
    first = read_journal(Path("run"))[0]
    assert any(note.startswith(wording) and "7 classes replaced by one of 10" in note for note in first["notes"])
    assert normswap.load("run/model.pt").model.num_classes == 10  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(
    "architecture", ["timm:deit_tiny_distilled_patch16_224,img_size=32,num_classes=7", "timm:test_resnet,num_classes=0"]
)
def test_models_with_two_heads_or_none_get_one_that_fits(architecture: str, here: Path) -> None:
    bare_file(architecture)
    model = {"checkpoint": "bn.pt", "architecture": architecture, "new_head": True}
    found = prepare(recipe(model=model, convert={"enabled": False}))
    assert count_classes(found) == 10
    assert "num_classes=10" in str(found.source.architecture)


def test_a_head_in_half_precision_stays_in_it(here: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=7)
    torch.save(model.bfloat16().state_dict(), "bn.pt")
    wanted = {"checkpoint": "bn.pt", "architecture": "timm:test_resnet,num_classes=7", "new_head": True}
    assert prepare(recipe(model=wanted, convert={"enabled": False})).model.fc.weight.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_a_part_that_the_file_lacks_is_reported(here: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=10).state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("fc.")}, "headless.pt")
    found = prepare(recipe(model={"checkpoint": "headless.pt", "architecture": TEN}))
    assert "headless.pt has no fc.weight, fc.bias: these weights are initialized at random" in found.notes


def test_classes_in_the_architecture_that_contradict_the_data_are_refused() -> None:
    model = {"architecture": "timm:test_resnet,num_classes=12", "new_head": True}
    with pytest.raises(RecipeError, match=r"num_classes=12 contradicts the 10 classes of digits: remove num_classes"):
        prepare(recipe(model=model))
    found = prepare(recipe(model={**model, "new_head": False}))
    assert count_classes(found) == 12
    assert any("the model has 12 outputs for 10 classes" in note for note in found.notes)
    with pytest.raises(RecipeError, match=r"model\.new_head: expected true or false or 'always', got 'maybe'"):
        recipe(model={"architecture": TEN, "new_head": "maybe"})


def test_a_wrong_choice_of_sites_is_refused_by_its_key_before_files_are_read() -> None:
    with pytest.raises(RecipeError, match=r"convert\.kinds\[0\]: expected 'bn' or 'in' or 'gn1' or 'gn', got 'bm'"):
        recipe(model={"checkpoint": "absent.pt"}, convert={"kinds": ["bm"]})


def test_settings_of_convert_become_those_of_swap_options() -> None:
    settings = {"layer1.*": {"branches": ["ln"], "start": "ln"}, "bn1": {"train_gates": False}}
    table = recipe(model={"architecture": TEN}, convert={"settings": settings}).convert
    assert swap_options(table) == normswap.SwapOptions(settings=settings)  # type: ignore[arg-type]
    wrong = recipe(model={"architecture": TEN}, convert={"settings": {"bn1": {"gates": 1}}}).convert
    with pytest.raises(RecipeError, match=r"convert\.settings.*gates"):
        swap_options(wrong)


def test_keys_of_convert_become_swap_options() -> None:
    table = recipe(model={"architecture": TEN}, convert={"include": ["layer1.*"], "bn_statistics": "running"}).convert
    assert swap_options(table) == normswap.SwapOptions(include=("layer1.*",), bn_statistics="running")


def test_new_keys_of_convert_become_swap_options() -> None:
    keys = {"start": "gn", "num_groups": 4, "match": False, "untrained": "uniform"}
    table = recipe(model={"architecture": TEN}, convert=keys).convert
    assert swap_options(table) == normswap.SwapOptions(start="gn", num_groups=4, match=False, untrained="uniform")
    assert swap_options(recipe(model={"architecture": TEN}).convert) == normswap.SwapOptions()


def mark_as_trained(model: nn.Module, *, but: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and name != but:
            module.num_batches_tracked += 1  # type: ignore[operator]


def partly_trained_file(untrained: str) -> None:
    """Write `bn.pt`, in which one norm was never trained."""
    model = timm.create_model("test_resnet", num_classes=10)
    mark_as_trained(model, but=untrained)
    torch.save(model.state_dict(), "bn.pt")


def test_sites_that_were_never_trained_are_calibrated_and_no_others(here: Path) -> None:
    partly_trained_file("layer2.0.bn1")
    found = prepare(recipe(model={"checkpoint": "bn.pt", "architecture": TEN}))
    (note,) = found.notes
    assert "convert.untrained: 1 site never trained (layer2.0.bn1); their running statistics" in note
    counts = {name: int(v) for name, v in found.model.state_dict().items() if name.endswith("num_batches_tracked")}
    assert {name: count for name, count in counts.items() if count != 1} == {"layer2.0.bn1.num_batches_tracked": 8}
    site: Any = found.model.get_submodule("layer2.0.bn1")
    assert not bool((site.running_var == 1).any() or (site.in_var_scale == 1).any())
    normswap.save(found.model, "sn.pt", plan=found.source.plan, architecture=TEN)
    again = prepare(recipe(model={"checkpoint": "sn.pt"}))
    assert "convert.untrained" not in "".join(again.notes)
    assert all(value.equal(found.model.state_dict()[name]) for name, value in again.model.state_dict().items())


def test_sites_that_were_never_trained_start_without_bn_or_stay_on_request(here: Path) -> None:
    partly_trained_file("layer2.0.bn1")
    start = {"checkpoint": "bn.pt", "architecture": TEN}
    uniform = prepare(recipe(model=start, convert={"untrained": "uniform"}))
    assert normswap.importance_weights(uniform.model)["layer2.0.bn1"].mean == {"in": 0.5, "ln": 0.5}
    assert uniform.notes[-1].endswith("they start at equal weights of in and ln, without bn")
    kept = prepare(recipe(model=start, convert={"untrained": "keep"}))
    assert bool((kept.model.get_submodule("layer2.0.bn1").running_var == 1).all())
    assert kept.notes[-1].endswith("they are kept as they are")


def test_a_network_can_start_without_batch_statistics(here: Path) -> None:
    partly_trained_file("")
    found = prepare(recipe(model={"checkpoint": "bn.pt", "architecture": TEN}, convert={"start": "ln"}))
    assert {swap.start for swap in found.source.plan.swaps} == {"ln"}  # type: ignore[union-attr]
    (note,) = found.notes
    assert note.startswith("sites that start without bn compute another function than the original; relative error of")
    normswap.save(found.model, "ln.pt", plan=found.source.plan, architecture=TEN)
    with pytest.raises(RecipeError, match=r'convert.start: "gn" contradicts .* a conversion that starts "ln"'):
        prepare(recipe(model={"checkpoint": "ln.pt"}, convert={"start": "gn"}))


def test_a_model_without_an_image_size_needs_the_key() -> None:
    data = {"source": "digits", "batch_size": 2}
    bare = parse_recipe(
        "mine", {"model": {"architecture": "torchvision:resnet18"}, "data": data, "train": {"steps": 1}}
    )
    with pytest.raises(
        RecipeError, match=r"data\.image_size: the model does not record its image size: set it, such as"
    ):
        prepare(bare)


# --- the length of a run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{"warmup_steps": 900}, {"warmup_steps": 2}])
def test_a_warmup_longer_than_the_run_is_refused_before_anything_is_written(here: Path, keys: dict[str, Any]) -> None:
    # Digits have 597 images to train on: two batches of 256 in each of two passes.
    wanted = recipe(
        model={"architecture": TEN},
        data={"batch_size": 256},
        train={"steps": None, "epochs": 1, **keys}
        if keys["warmup_steps"] == 2
        else {"steps": None, "epochs": 2, **keys},
        run={"output": "run"},
    )
    with pytest.raises(
        RecipeError, match=r"train\.warmup_steps: expected fewer than the \d+ steps .*epochs = \d of \d+"
    ):
        run_recipe(wanted)
    assert not Path("run").exists()


def test_a_warmup_is_given_as_a_share_of_the_run() -> None:
    train = recipe(model={"architecture": TEN}, train={"steps": 40, "warmup_share": 0.05}).train
    assert run_length(train, 7) == 40
    factor = make_lr_lambda(train, 40)
    assert [round(factor(step), 3) for step in range(3)] == [0.333, 0.667, 1.0]
    assert "warmup_share = 0.05" in (ROOT / "recipes" / "imagenet_small_batch.toml").read_text()
    for value, text in ((1, "expected 0 to 0.99, got 1"), (-0.1, "expected 0 to 0.99, got -0.1")):
        with pytest.raises(RecipeError, match=re.escape(f"train.warmup_share: {text}")):
            recipe(model={"architecture": TEN}, train={"warmup_share": value})
    both = {"steps": 40, "warmup_share": 0.1, "warmup_steps": 3}
    with pytest.raises(
        RecipeError, match=r"train\.warmup_steps, train\.warmup_share: expected one of the two, got 3 and"
    ):
        recipe(model={"architecture": TEN}, train=both)


def test_one_of_two_keys_that_is_put_over_a_recipe_takes_the_place_of_the_other(here: Path) -> None:
    found = read_recipe("imagenet_small_batch", ["train.steps=9", "train.warmup_steps=2"]).train
    assert (found.steps, found.epochs, found.warmup_steps, found.warmup_share) == (9, None, 2, 0.0)
    with pytest.raises(RecipeError, match="expected either steps or epochs"):
        read_recipe("imagenet_small_batch", ["train.steps=9", "train.epochs=2"])


def test_epochs_too_short_for_a_single_step_are_refused() -> None:
    train = recipe(model={"architecture": TEN}, train={"steps": None, "epochs": 2, "accumulation": 16}).train
    text = "a step takes 16 batches, and the run has 6 (train.epochs = 2 of 3 batches): choose a smaller accumulation"
    with pytest.raises(RecipeError, match=re.escape(text)):
        run_length(train, 3)
    assert run_length(train, 8) == 1


def test_what_comes_more_rarely_than_once_in_a_run_is_reported(here: Path) -> None:
    run = {"evaluate_every": 50, "save_every": 60, "log_every": 70}
    batch = {"bn_statistics": "batch"}
    (note,) = prepare(recipe(model={"architecture": TEN}, convert=batch, run=run)).notes
    assert "run.log_every = 70, run.evaluate_every = 50, run.save_every = 60: more than the 1 steps of the run" in note
    assert prepare(recipe(model={"architecture": TEN}, convert={"enabled": False})).notes == ()


def test_a_rate_that_would_rise_to_its_least_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"train\.min_lr: expected at most train\.lr \(0\.01\), got 0\.1"):
        recipe(model={"architecture": TEN}, train={"lr": 0.01, "min_lr": 0.1})


def test_a_moving_average_of_a_short_run_follows_the_weights() -> None:
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    average = build_average(model, 0.9998)
    nn.init.ones_(model.weight)
    before = nn.Linear(1, 1)
    nn.init.zeros_(before.weight)
    for step in range(100):
        average.update(before if step < 2 else model, step=step)
    assert float(average.module.weight.detach()) > 0.99
    assert build_average(model, 0.0) is None


def test_a_state_of_an_older_version_goes_on() -> None:
    mine = recipe(model={"architecture": TEN})
    older = mine.to_dict()
    del older["train"]["warmup_share"]
    assert differing_keys(mine, older) == []


def test_a_run_of_an_older_version_resumes_with_the_values_that_it_had(here: Path) -> None:
    chosen = recipe(model={"architecture": TEN}, train={"lr": 0.02, "steps": 4})
    saved = chosen.to_dict()
    saved["convert"] |= {"bn_statistics": "batch"}
    saved["train"] |= {"batch_penalty": 0.03, "clip": 5.0}
    for table, keys in {"convert": ["start", "match", "untrained"], "train": ["gate_max_step"]}.items():
        for key in keys:
            del saved[table][key]
    saved["run"]["output"] = "elsewhere"
    write_run_state(here, saved)
    resumed, _ = read_state(here, chosen)
    assert (resumed.convert.bn_statistics, resumed.convert.untrained) == ("batch", "keep")
    assert (resumed.train.batch_penalty, resumed.train.clip, resumed.train.gate_max_step) == (0.03, 5.0, 0.0)
    assert resumed.train.importance_lr == resumed.train.lr == 0.02  # not 100 times the rate
    assert resumed.output == chosen.output
    with pytest.raises(RecipeError, match=r"has other values of train\.lr:"):
        read_state(here, recipe(model={"architecture": TEN}, train={"lr": 0.03, "steps": 4}))


def test_a_run_of_this_version_resumes_with_the_values_of_its_recipe_only(here: Path) -> None:
    chosen = recipe(model={"architecture": TEN}, train={"steps": 4})
    saved = chosen.to_dict()
    write_run_state(here, saved)
    assert read_state(here, chosen)[0] == chosen
    saved["convert"]["bn_statistics"] = "batch"
    write_run_state(here, saved)
    with pytest.raises(RecipeError, match=r"has other values of convert\.bn_statistics:"):
        read_state(here, chosen)


def write_run_state(folder: Path, recipe_values: dict[str, Any]) -> None:
    progress = {"step": 2, "epoch": 0, "seconds": 1.0, "before": {}, "optimizer": {}, "lr_scheduler": {}}
    weights = timm.create_model("test_resnet", num_classes=10).state_dict()
    torch.save({**progress, "state_dict": weights, "recipe": recipe_values}, folder / "state.pt")


# --- files and networks that are not there ----------------------------------------------------------------------------


def test_a_checkpoint_that_another_recipe_writes_names_that_recipe(here: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        prepare(read_recipe("digits_small_batch"))
    assert str(error.value) == (
        "runs/digits_source/model.pt: no such file; the recipe digits_source writes it: run normswap finetune "
        "digits_source first, in this folder"
    )
    Path("runs/digits_source").mkdir(parents=True)
    Path("runs/digits_source/state.pt").write_bytes(b"x")
    with pytest.raises(
        CheckpointError,
        match=r"not written yet, since .* was interrupted: finish it with normswap finetune digits_source --resume",
    ):
        prepare(read_recipe("digits_small_batch"))
    with pytest.raises(CheckpointError, match=r"runs/mine/model\.pt: no such file"):
        prepare(recipe(model={"checkpoint": "runs/mine/model.pt"}))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, nothing cached, and no patience for attempts that are repeated."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "_can_connect", lambda *_: False)
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.mark.usefixtures("offline")
def test_published_weights_without_a_network_are_one_line() -> None:
    from huggingface_hub import constants

    with pytest.raises(ArchitectureError, match=r"not in the cache, and huggingface\.co cannot be reached: connect to"):
        prepare(recipe(model={"architecture": "timm:resnet18", "pretrained": True}))
    assert constants.HF_HUB_OFFLINE is False
    unpublished = next(name for name in timm.list_models("resnet*") if not timm.list_models(name, pretrained=True))
    with pytest.raises(ArchitectureError, match="its builder failed: No pretrained weights exist"):
        prepare(recipe(model={"architecture": f"timm:{unpublished}", "pretrained": True}))


@pytest.mark.usefixtures("offline")
def test_data_to_be_fetched_without_a_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_keys: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    data = {"source": "torch/cifar10", "root": str(tmp_path / "data"), "download": True}
    with pytest.raises(
        NormswapError, match=r"cannot be reached: connect to the network, or name the folder of the data"
    ):
        prepare(recipe(model={"architecture": TEN}, data=data))


def test_a_network_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "_can_connect", lambda *_: True)
    with datasets.limit_hub_wait() as found:
        assert (found.is_reachable, constants.HF_HUB_OFFLINE) == (True, False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with datasets.limit_hub_wait() as found:
        assert found == (False, "HF_HUB_OFFLINE forbids downloads: unset it")


def test_a_connection_is_tried_where_a_request_would_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert datasets._resolve_address("https://hub.example") == ("hub.example", 443)
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert datasets._resolve_address("https://hub.example") == ("proxy.example", 3128)
    monkeypatch.setenv("no_proxy", "hub.example")
    assert datasets._resolve_address("https://hub.example") == ("hub.example", 443)
    assert datasets._can_connect("127.0.0.1", 9) is False
