"""Files with several networks, copies, optimizers and schedulers: each is converted or copied unchanged."""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.utils
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn, optim

import normswap
from normswap.checkpoints.reading import read_record
from normswap.cli import main
from normswap.errors import CheckpointError
from normswap.layers.matching import MATCHING_BUFFERS

CODE = """
import torch.nn as nn
def g(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3))
def d(): return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.LazyLinear(1))
def two(): return Two()
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = g()
    def forward(self, x, y):
        return self.net(x + y)
"""
G, D = ("--arch", "nets.py:g"), ("--arch", "nets.py:d")
INPUT = ("--input", "2x3x12x12")
X = torch.linspace(-2, 2, 2 * 3 * 12 * 12).view(2, 3, 12, 12)

# What a conversion adds to a network whose norm is its module 1.
ADDED = ("1.mean_weight", "1.var_weight", *(f"1.{name}" for name in MATCHING_BUFFERS))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def ok(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def read(path: str) -> Any:
    return torch.load(path, weights_only=True)


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, nn.Module]:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(CODE)
    names: dict[str, Any] = {}
    exec(CODE, names)
    torch.manual_seed(0)
    models = {"g": names["g"](), "d": names["d"]()}
    for model in models.values():
        model(X)
    return models


def trained(*models: nn.Module) -> optim.Optimizer:
    optimizer = optim.Adam([p for model in models for p in model.parameters()], lr=0.01)
    for model in models:
        model(X).square().mean().backward()
    optimizer.step()
    return optimizer


@pytest.fixture
def gan(nets: dict[str, nn.Module]) -> dict[str, Any]:
    g, d = nets["g"], nets["d"]
    optimizers = {"d_optim": trained(d), "g_optim": trained(g), "both": trained(g, d)}
    schedulers = {"g_sched": optim.lr_scheduler.StepLR(optimizers["g_optim"], 3)}
    content = {name: each.state_dict() for name, each in (nets | optimizers | schedulers).items()}
    torch.save(content, "gan.pt")
    return optimizers


def built_again(path: str, entry: str, content: Any) -> tuple[nn.Module, Any]:
    model = normswap.load(path, entry=entry, trust=True).model
    groups = normswap.param_groups(
        model, like=optim.Adam([p for n, p in model.named_parameters() if "_weight" not in n])
    )
    optimizer = optim.Adam(groups)
    optimizer.load_state_dict(content[f"{entry}_optim"])
    return model, optimizer


def test_an_optimizer_of_the_other_network_is_left(gan: dict[str, Any]) -> None:
    output = ok("convert", "gan.pt", *G, "--entry", "g", *INPUT, "-o", "g.pt")
    assert "g_optim: 2 gates appended as a last group" in output
    assert "d_optim: left as it is, it belongs to d" in output
    assert "g_sched: gates follow the last group's schedule" in output
    content, before = read("g.pt"), read("gan.pt")
    assert content["d_optim"]["param_groups"] == before["d_optim"]["param_groups"]
    gan["d_optim"].load_state_dict(content["d_optim"])
    built_again("g.pt", "g", content)
    assert len(content["g_sched"]["base_lrs"]) == 2


@pytest.mark.parametrize("order", [("g", "d"), ("d", "g")])
def test_networks_are_converted_one_after_the_other_or_at_once(gan: dict[str, Any], order: tuple[str, str]) -> None:
    first, second = order
    ok("convert", "gan.pt", "--arch", f"nets.py:{first}", "--entry", first, *INPUT, "-o", "one.pt")
    ok("convert", "one.pt", "--arch", f"nets.py:{second}", "--entry", second, *INPUT, "-o", "two.pt")
    options = [option for name in order for option in ("--entry", name, "--arch", f"nets.py:{name}")]
    output = ok("convert", "gan.pt", *options, *INPUT, "-o", "once.pt")
    assert output.count("2 gates appended as a last group") == 2
    assert "both: 2 gates added to its group of gates" in output
    assert "left as it is" not in output
    two, once = read("two.pt"), read("once.pt")
    assert two.keys() == once.keys()
    for name in ("g", "d"):
        assert two[name].keys() == once[name].keys() == read("gan.pt")[name].keys() | {*ADDED}
        assert len(two[f"{name}_optim"]["param_groups"]) == len(once[f"{name}_optim"]["param_groups"]) == 2
        model, optimizer = built_again("two.pt", name, two)
        model.train()(X).square().mean().backward()
        optimizer.step()
    # Of the one over both the gates stand in the order of the networks, whichever was converted first.
    for content in (two, once):
        old, gates = content["both"]["param_groups"]
        assert len(old["params"]) == 12
        assert gates["params"] == ([12, 13, 14, 15] if first == "g" else [14, 15, 12, 13])


def test_the_record_knows_every_network(gan: dict[str, Any]) -> None:
    options = [option for name in "gd" for option in ("--entry", name, "--arch", f"nets.py:{name}")]
    ok("convert", "gan.pt", *options, *INPUT, "-o", "two.pt")
    for name, width in (("g", 8), ("d", 6)):
        loaded = normswap.load("two.pt", entry=name, trust=True)
        assert loaded.plan.swaps[0].num_features == width
        assert [step.detail for step in loaded.history] == ["g", "d"]
        original = normswap.load("gan.pt", entry=name, architecture=f"nets.py:{name}", trust=True).model
        with torch.no_grad():
            assert torch.equal(loaded.model(X), original(X))
        reverted = normswap.revert(loaded.model)
        assert all(torch.equal(v, original.state_dict()[k]) for k, v in reverted.state_dict().items())
        ok("verify", "gan.pt", "two.pt", "--entry", name, "--trust", *INPUT)
        assert "Importance weights" in ok("inspect", "two.pt", "--entry", name)
    with pytest.raises(
        CheckpointError, match=r"contains several converted models \('d', 'g'\): choose one, such as entry='d'"
    ):
        normswap.load("two.pt", trust=True)
    shown = json.loads(run("inspect", "two.pt", "--json").output)
    assert {name: part["converted"] for name, part in shown["networks"].items()} == {"g": True, "d": True}
    assert "entry d" in ok("inspect", "two.pt")
    result = run("convert", "two.pt", "--entry", "d", *D, *INPUT)
    assert (result.exit_code, "1 sites are converted already" in result.stderr) == (1, True)
    record = read_record(Path("two.pt"))
    assert record is not None
    assert sorted(record.entries) == ["d", "g"]
    assert record.from_json(record.to_json()) == record


def test_a_network_that_is_not_converted_yet_loads_as_it_is(gan: dict[str, Any]) -> None:
    ok("convert", "gan.pt", *G, "--entry", "g", *INPUT, "-o", "g.pt")
    loaded = normswap.load("g.pt", entry="d", architecture="nets.py:d", trust=True)
    assert loaded.plan is None
    assert normswap.importance_weights(loaded.model) == {}
    assert '"version": 1' in json.dumps(json.loads(read_record(Path("g.pt")).to_json()))


PAIRING: dict[str, tuple[list[str], str]] = {
    "three architectures for two": (["--entry", "g", "--entry", "d", *G, *D, *D], "expected one, or one for each of 2"),
    "two architectures for one": ([*G, *D], "--arch: expected one, got 2: name the networks with --entry"),
    "one entry twice": (["--entry", "g", "--entry", "g", *G], "--entry g is given twice"),
    "an input for none": (["--entry", "g", *G, "--input", "e=2x3"], "--input e=...: there is no --entry e"),
    "three inputs for two": (
        ["--entry", "g", "--entry", "d", *G, *D, *INPUT, *INPUT, *INPUT],
        "--input: expected one, or one for each of 2 --entry, got 3: name the network, such as --input g=",
    ),
    "a plan for two": (["--entry", "g", "--entry", "d", "--save-plan", "p.json"], "--save-plan applies to one network"),
    "weights of two": (["--entry", "g", "--entry", "d", "--weights-only"], "--weights-only applies to one network"),
}


@pytest.mark.parametrize(("options", "message"), PAIRING.values(), ids=PAIRING)
def test_options_that_do_not_pair_are_refused(gan: dict[str, Any], options: list[str], message: str) -> None:
    before = set(Path().iterdir())
    result = run("convert", "gan.pt", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert set(Path().iterdir()) == before


def test_inputs_go_to_the_network_that_they_name(nets: dict[str, nn.Module]) -> None:
    torch.save({"a": {f"net.{k}": v for k, v in nets["g"].state_dict().items()}, "d": nets["d"].state_dict()}, "two.pt")
    entries = ["--entry", "a", "--arch", "nets.py:two", "--entry", "d", *D]
    ok("convert", "two.pt", *entries, "--input", "a=2x3x9x9", "--input", "a=2x3x9x9", "--input", "d=2x3x12x12")
    ok("convert", "two.pt", *entries[:2], *entries[2:4], *INPUT, *INPUT, "-o", "one.pt")
    result = run("convert", "two.pt", *entries, "--input", "d=2x3x9x9", "--no-verify", "-o", "x.pt")
    assert (result.exit_code, Path("x.pt").exists()) == (2, False)


# Copies under other prefixes.

PREFIXES = [
    ("model.", "ema_model."),
    ("online_model.", "ema_model."),
    ("model.", "net."),
    ("student.", "teacher."),
    ("module.", "module_ema."),
    ("module.encoder_q.", "module.encoder_k."),
    ("", "ema."),
    ("a.", "b.", "c."),
]


@pytest.mark.slow
@pytest.mark.parametrize("container", ["pt", "safetensors"])
@pytest.mark.parametrize("prefixes", PREFIXES, ids=" ".join)
def test_copies_of_the_same_tensors_are_converted_alike(
    nets: dict[str, nn.Module], prefixes: tuple[str, ...], container: str
) -> None:
    import safetensors.torch

    twins = [copy.deepcopy(nets["g"]) for _ in prefixes]
    for index, twin in enumerate(twins):
        twin[0].weight.data.add_(index)
    state = {p + key: v for p, twin in zip(prefixes, twins, strict=True) for key, v in twin.state_dict().items()}
    if container == "pt":
        torch.save(state, "copies.pt")
    else:
        safetensors.torch.save_file(state, "copies.safetensors")
    output = ok("convert", f"copies.{container}", *G, *INPUT, "-o", f"out.{container}")
    assert output.count("*: converted too") == len(prefixes) - 1
    found = read("out.pt") if container == "pt" else safetensors.torch.load_file("out.safetensors")
    assert {p + key for p in prefixes for key in ADDED} == found.keys() - state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    # Each loads where the converted model is wrapped so.
    for prefix, twin in zip(prefixes, twins, strict=True):
        model = normswap.convert(twin).model
        own = {key.removeprefix(prefix): v for key, v in found.items() if key.startswith(prefix)}
        model.load_state_dict({key: own[key] for key in model.state_dict()}, strict=True)
    assert normswap.load(f"out.{container}", trust=True).plan is not None


def test_copies_that_share_memory_are_converted_alike(nets: dict[str, nn.Module]) -> None:
    state = nets["g"].state_dict()
    torch.save({p + key: v for p in ("model.", "ema_model.") for key, v in state.items()}, "tied.pt")
    ok("convert", "tied.pt", *G, *INPUT, "-o", "out.pt")
    found = read("out.pt")
    assert found["model.1.mean_weight"].data_ptr() == found["ema_model.1.mean_weight"].data_ptr()


def _wider(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "2.weight": torch.zeros(5, 8, 3, 3), "2.bias": torch.zeros(5)}


def _longer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "3.weight": torch.zeros(5, 8)}


def _shorter(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("2.")}


@pytest.mark.parametrize("change", [_wider, _longer, _shorter])
@pytest.mark.parametrize("prefixes", [("model.", "net."), ("student.", "teacher.")], ids=" ".join)
def test_copies_that_differ_are_a_question(
    nets: dict[str, nn.Module], prefixes: tuple[str, str], change: Callable[[Any], Any]
) -> None:
    state = nets["g"].state_dict()
    first, second = prefixes
    both = {first + k: v for k, v in state.items()} | {second + k: v for k, v in change(state).items()}
    torch.save(both, "two.pt")
    result = run("convert", "two.pt", *G, *INPUT)
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2
    assert all(f"'{prefix}'" in message for prefix in prefixes)
    assert "select one, such as --entry" in message
    assert not Path("two.normswap.pt").exists()
    name = first.rstrip(".")
    ok("convert", "two.pt", *G, *INPUT, "--entry", name)
    found = read("two.normswap.pt")
    assert found.keys() - both.keys() == {first + key for key in ADDED}
    assert normswap.load("two.normswap.pt", trust=True).plan is not None
    assert normswap.load("two.normswap.pt", entry=name, trust=True).plan is not None


def test_networks_inside_one_state_dict_are_converted_one_after_the_other(nets: dict[str, nn.Module]) -> None:
    state = {
        f"{outer}.{k}": v for outer, name in (("gen", "g"), ("dis", "d")) for k, v in nets[name].state_dict().items()
    }
    optimizers = [trained(nets["g"]).state_dict(), trained(nets["d"]).state_dict()]
    torch.save({"state_dict": state, "optimizer_states": optimizers}, "gan.ckpt")
    options = [*G, *D, "--entry", "state_dict.gen", "--entry", "state_dict.dis"]
    output = ok("convert", "gan.ckpt", *options, *INPUT, "-o", "out.ckpt")
    assert output.count("2 gates appended as a last group") == 2
    found = read("out.ckpt")
    assert {f"{outer}.{key}" for outer in ("gen", "dis") for key in ADDED} == found["state_dict"].keys() - state.keys()
    for name, part in (("gen", "g"), ("dis", "d")):
        loaded = normswap.load("out.ckpt", entry=f"state_dict.{name}", trust=True).model
        with torch.no_grad():
            assert torch.equal(loaded(X), nets[part].eval()(X))


def test_a_further_state_dict_of_other_shapes_is_no_copy(nets: dict[str, nn.Module]) -> None:
    torch.save({"model": nets["g"].state_dict(), "ema": _wider(nets["g"].state_dict())}, "two.pt")
    assert "ema: left as it is, not the same model" in ok("convert", "two.pt", *G, *INPUT)
    assert read("two.normswap.pt")["ema"].keys() == nets["g"].state_dict().keys()


# States in an unknown form.

UNKNOWN: dict[str, tuple[Callable[[list[Tensor], list[str]], dict[str, Any]], str]] = {
    "fastai": (
        lambda ps, _: {"opt": {"hypers": [{"lr": 1e-3}], "state": [{"mom": torch.zeros_like(p)} for p in ps]}},
        "opt: left as it is, an optimizer state in an unknown form: build a new optimizer from",
    ),
    "by names": (
        lambda ps, names: {"optimizer": {n: {"m": torch.zeros_like(p)} for n, p in zip(names, ps, strict=True)}},
        "optimizer: left as it is, an optimizer state in an unknown form",
    ),
    "moments by names": (
        lambda ps, names: {"optim": {"exp_avg": dict(zip(names, ps, strict=True)), "step": 3}},
        "optim: left as it is, an optimizer state in an unknown form",
    ),
    "momenta as a state dict": (
        lambda ps, names: {"optimizer": dict(zip(names, ps, strict=True))},
        "optimizer: left as it is, an optimizer state in an unknown form",
    ),
    "Keras": (
        lambda ps, _: {"optimizer_weights": [torch.tensor(3), *ps]},
        "optimizer_weights: left as it is, an optimizer state in an unknown form",
    ),
    "DeepSpeed": (
        lambda ps, _: {
            "optimizer_state_dict": {
                "base_optimizer_state": {
                    "state": {0: {"exp_avg": ps[0]}},
                    "param_groups": [{"params": [0], "lr": 1.0}],
                },
                "single_partition_of_fp32_groups": [torch.cat([p.flatten() for p in ps])],
            }
        },
        "base_optimizer_state: left as it is, single_partition_of_fp32_groups next to it contains copies of",
    ),
    "apex": (
        lambda ps, _: {
            "optimizer": {
                "loss_scaler": {"scale": 8.0},
                "optimizer_state_dict": {
                    "state": {i: {"exp_avg": torch.zeros_like(p)} for i, p in enumerate(ps)},
                    "param_groups": [{"params": list(range(len(ps))), "lr": 1.0}],
                },
                "fp32_from_fp16": [[p.clone() for p in ps]],
            }
        },
        "optimizer.optimizer_state_dict: left as it is, fp32_from_fp16 next to it contains copies of the parameters",
    ),
    "an average in another order": (
        lambda ps, _: {"ema": {"shadow_params": [p.clone() for p in ps[::-1]]}},
        "ema: left as it is, a weight average in an unknown form: make a new one from the converted model",
    ),
    "an average in a tuple of pairs": (
        lambda ps, _: {"averaged": [(i, p) for i, p in enumerate(ps)]},
        "averaged: left as it is, a weight average in an unknown form",
    ),
    "a scheduler": (
        lambda ps, _: {"lr_scheduler": {"trust": [torch.ones(3)]}},
        "lr_scheduler: left as it is, a scheduler state in an unknown form: build the scheduler",
    ),
    "whatever it is called": (
        lambda ps, _: {"extra": {"slots": [{"m": torch.zeros_like(p)} for p in ps]}},
        "extra: left as it is, a state per parameter in an unknown form",
    ),
}


@pytest.mark.parametrize(("make", "note"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_state_in_an_unknown_form_is_named(
    nets: dict[str, nn.Module], make: Callable[[list[Tensor], list[str]], dict[str, Any]], note: str
) -> None:
    named = {name: p.detach() for name, p in nets["g"].named_parameters()}
    extra = make(list(named.values()), list(named))
    torch.save({"model": nets["g"].state_dict(), **extra}, "last.pt")
    notes = json.loads(run("convert", "last.pt", *G, *INPUT, "--json").output)["carried"]
    assert sum(note in each for each in notes) == 1, notes
    assert str(read("last.normswap.pt").keys()) == str(read("last.pt").keys())
    old, new = read("last.pt"), read("last.normswap.pt")
    assert all(str(old[key]) == str(new[key]) for key in extra)


SILENT: dict[str, Any] = {
    "options": {"opt": argparse.Namespace(lr=0.1), "hyper_parameters": {"size": (3, 4)}},
    "a scaler": {"scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3}},
    "amp": {"amp": {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 3}}},
    "numbers": {"epoch": 3, "args": {"opt": "sgd", "sched": "cosine", "model_ema": True}, "best": 0.7},
    "random states": {"rng": {"torch": torch.get_rng_state()}},
    "a plateau": {"scheduler": {"best": 1.0, "num_bad_epochs": 2}},
}


@pytest.mark.parametrize("extra", SILENT.values(), ids=SILENT)
def test_entries_without_a_value_per_parameter_are_not_named(nets: dict[str, nn.Module], extra: dict[str, Any]) -> None:
    torch.save({"model": nets["g"].state_dict(), **extra}, "last.pt")
    assert json.loads(run("convert", "last.pt", *G, *INPUT, "--json").output)["carried"] == []


@pytest.mark.parametrize("lists", [["shadow_params"], ["shadow_params", "collected_params"]])
def test_an_average_kept_as_a_list_gets_the_gates_at_their_places(nets: dict[str, nn.Module], lists: list[str]) -> None:
    shadows = [p.detach() + 1 for p in nets["g"].parameters()]
    torch.save({"model": nets["g"].state_dict(), "ema": {"decay": 0.9, **dict.fromkeys(lists, shadows)}}, "last.pt")
    assert "ema.shadow_params: gates inserted at their positions" in ok("convert", "last.pt", *G, *INPUT)
    model = normswap.load("last.normswap.pt", trust=True).model
    for name in lists:
        found = read("last.normswap.pt")["ema"][name]
        assert [t.shape for t in found] == [p.shape for p in model.parameters()]
        kept = [t for t, (key, _) in zip(found, model.named_parameters(), strict=True) if "_weight" not in key]
        assert all(torch.equal(a, b) for a, b in zip(kept, shadows, strict=True))


def test_an_average_of_the_parameters_alone_is_converted_by_name(nets: dict[str, nn.Module]) -> None:
    shadow = {name: p.detach() + 1 for name, p in nets["g"].named_parameters()}
    torch.save({"model": nets["g"].state_dict(), "ema": shadow}, "last.pt")
    assert "ema: converted too" in ok("convert", "last.pt", *G, *INPUT)
    model = normswap.load("last.normswap.pt", trust=True).model
    assert read("last.normswap.pt")["ema"].keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("make", [optim.swa_utils.AveragedModel, timm.utils.ModelEmaV2], ids=["torch", "timm"])
def test_a_pickled_average_is_converted_and_a_pickled_optimizer_named(
    nets: dict[str, nn.Module], make: Callable[[nn.Module], nn.Module]
) -> None:
    torch.save({"model": nets["g"], "ema": make(nets["g"]), "optimizer": trained(nets["g"])}, "last.pt")
    output = ok("convert", "last.pt", "--trust", *INPUT)
    assert "ema: converted too" in output
    assert "optimizer: left as it is, an optimizer state in an unknown form" in output
    found = torch.load("last.normswap.pt", weights_only=False)
    assert set(normswap.importance_weights(found["ema"].module)) == {"1"}


@pytest.mark.parametrize("entry", [(), ("--entry", "model")], ids=["both", "one"])
def test_copies_converted_by_names_alone_load(nets: dict[str, nn.Module], entry: tuple[str, ...]) -> None:
    state = nets["g"].state_dict()
    torch.save({p + key: v for p in ("model.", "ema_model.") for key, v in state.items()}, "two.pt")
    ok("convert", "two.pt", "--arch", "none", "--no-verify", *entry)
    assert len(read("two.normswap.pt")) - 2 * len(state) == (2 if entry else 4)
    loaded = normswap.load("two.normswap.pt", architecture="nets.py:g", trust=True)
    assert len(loaded.plan.swaps) == 1


def test_two_architectures_in_one_state_dict_are_a_question(tmp_path: Path) -> None:
    models = {"model": timm.create_model("resnet10t"), "net": timm.create_model("resnet18")}
    torch.save({f"{p}.{k}": v for p, m in models.items() for k, v in m.state_dict().items()}, tmp_path / "two.pt")
    result = run("convert", str(tmp_path / "two.pt"))
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2
    assert "has several models, under 'net.'" in message
    assert "'model.'" in message
    assert "select one, such as --entry" in message
    assert [path.name for path in tmp_path.iterdir()] == ["two.pt"]


DAMAGED: dict[str, tuple[Any, str]] = {
    "numbers that are none": (
        {"state": {}, "param_groups": [{"params": [[0], {}]}]},
        "is damaged, it mixes parameters",
    ),
    "no group": ({"state": {}, "param_groups": []}, "has no parameter group"),
    "a state without a parameter": ({"state": {9: {}}, "param_groups": [{"params": [0]}]}, "parameter 9 has a state"),
}


@pytest.mark.parametrize(("state", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_optimizer_is_refused_in_one_line(nets: dict[str, nn.Module], state: Any, message: str) -> None:
    torch.save({"model": nets["g"].state_dict(), "optimizer": state}, "last.pt")
    result = run("convert", "last.pt", *G, *INPUT)
    assert (result.exit_code, message in result.stderr) == (2, True), result.output
    assert not Path("last.normswap.pt").exists()


def test_a_scheduler_of_odd_rates_is_left(nets: dict[str, nn.Module]) -> None:
    optimizer = trained(nets["g"])
    optimizer.param_groups[0]["initial_lr"] = 0.1
    content = {"model": nets["g"].state_dict(), "optimizer": optimizer.state_dict(), "sched": {"base_lrs": ["x"]}}
    torch.save(content, "last.pt")
    assert "sched: left as it is, it fits no optimizer in this file" in ok("convert", "last.pt", *G, *INPUT)


NESTED = """
import torch.nn as nn
def a(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
def b(): return nn.Sequential(*a(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
"""


@pytest.fixture
def nested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A file with a network whose first tensors have the names and shapes of the other network."""
    monkeypatch.chdir(tmp_path)
    Path("nested.py").write_text(NESTED)
    names: dict[str, Any] = {}
    exec(NESTED, names)
    torch.save({name: names[name]().state_dict() for name in "ab"}, "ab.pt")
    return names


def test_a_larger_network_that_contains_the_names_of_another_is_no_copy_of_it(nested: dict[str, Any]) -> None:
    before = read("ab.pt")["b"]
    assert "b: left as it is, not the same model" in ok(
        "convert", "ab.pt", "--entry", "a", "--arch", "nested.py:a", *INPUT
    )
    after = read("ab.normswap.pt")["b"]
    assert after.keys() == before.keys()


def test_one_architecture_for_several_converted_networks_is_refused(nested: dict[str, Any]) -> None:
    entries = [option for name in "ab" for option in ("--entry", name, "--arch", f"nested.py:{name}")]
    ok("convert", "ab.pt", *entries, *INPUT, "-o", "two.pt")
    result = run("inspect", "two.pt", "--arch", "nested.py:b")
    assert result.exit_code == 2
    assert "--arch: two.pt contains several converted models (a, b): choose one, such as --entry a" in result.stderr
    assert "entry a" in ok("inspect", "two.pt", "--arch", "none")
    ok("inspect", "two.pt", "--arch", "nested.py:b", "--entry", "b")
    assert run("inspect", "two.pt", "--arch", "nested.py:a", "--entry", "b").exit_code == 2


def test_a_copy_is_converted_with_its_network_and_not_named_too(nested: dict[str, Any]) -> None:
    torch.save({name: nested["a"]().state_dict() for name in ("net", "ema")}, "copies.pt")
    with pytest.raises(
        normswap.NothingToDo, match=r"entry='ema' has the names and shapes of entry='net'.*leave it out"
    ):
        normswap.convert_file("copies.pt", entry=["net", "ema"], architecture="nested.py:a", example_inputs=X)
    assert not Path("copies.normswap.pt").exists()
