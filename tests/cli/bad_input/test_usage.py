"""Bad options, architectures, tensors, outputs and plans: one clear line, exit code 2 or 1, nothing written."""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap.checkpoints import file_conversion
from normswap.checkpoints.architecture.registry import build_architecture
from normswap.checkpoints.io import atomic_files
from normswap.errors import ArchitectureError
from normswap.verification import equivalence
from tests.helpers import files
from tests.helpers.command_line import SIZES, run
from tests.helpers.refusals import assert_refused

# Architectures.
SCHEMES = "timm:NAME, torchvision:NAME, hf:FOLDER, or path/file.py:function"
ARCHITECTURES = {
    "no scheme": ("resnet50", f"expected one of {SCHEMES} for your own model, such as timm:resnet50"),
    "unknown scheme": ("tim:resnet50", f"expected one of {SCHEMES} for your own model, such as timm:resnet50"),
    "a folder without a model": ("hf:nowhere", "expected the file nowhere/config.json, which does not exist"),
    "a file that is not there": ("mine.py:build", "expected the file mine.py, which does not exist"),
    "no name": ("timm:", "expected timm:NAME[,key=value...], got the name ''"),
    "from the hub": ("timm:hf-hub:some/model", "got the name 'hf-hub:some/model'"),
    "a path": ("timm:local-dir:/tmp", "got the name 'local-dir:/tmp'"),
    "unknown in timm": ("timm:test_resnt", "timm has no model 'test_resnt'; nearest: test_resnet"),
    "unknown in torchvision": ("torchvision:resnet19", "torchvision has no model 'resnet19'; nearest: resnet1"),
    "like nothing": ("timm:qqqqqqqqqqqq", "nearest: none, see its list_models()"),
    "unknown keyword": (f"{files.ARCH},color=3", "its builder failed: ResNet.__init__() got an unexpected keyword"),
    "unknown tag": ("timm:test_resnet.my_tag", "its builder failed: Invalid pretrained tag (my_tag)"),
    "fetching weights": (f"{files.ARCH},pretrained=True", "remove 'pretrained', the weights come from the checkpoint"),
    "reading weights": (f"{files.ARCH},checkpoint_path=x.pt", "remove 'checkpoint_path'"),
    "another language": (f"{files.ARCH},features_only=true", "expected a Python value, write features_only=True"),
}


@pytest.mark.parametrize(("arch", "message"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_wrong_architecture_is_refused(folder: Path, arch: str, message: str) -> None:
    assert_refused(folder, ["convert", "bn.pt", "--arch", arch], 2, message)
    with pytest.raises(ArchitectureError, match=re.escape(message)):
        normswap.load("bn.pt", architecture=arch)


def test_an_architecture_is_needed_where_the_tensors_determine_none(folder: Path) -> None:
    torch.save(files.TiedNet().state_dict(), folder / "bad.pt")
    for command in ("convert", "identify"):
        assert_refused(folder, [command, "bad.pt"], 1, "the tensors resemble no model of timm ")


def test_several_functions_are_never_guessed_among(folder: Path) -> None:
    torch.save(timm.create_model("efficientnet_b0", num_classes=10).state_dict(), folder / "bad.pt")
    message = " architectures that compute different functions: pass --arch timm:efficientnet_b0"
    for command in ("convert", "identify"):
        assert_refused(folder, [command, "bad.pt"], 1, message)
        assert_refused(folder, [command, "bad.pt"], 1, "--arch timm:tf_efficientnet_b0,num_classes=10")


def test_a_pickled_module_takes_no_architecture(folder: Path) -> None:
    message = "module.pt: a pickled module includes its architecture: leave --arch"
    assert_refused(folder, ["convert", "module.pt", "--trust", "--arch", files.ARCH], 2, message)


def test_a_function_that_builds_no_model(folder: Path) -> None:
    with pytest.raises(ArchitectureError, match="expected a function that returns a module, got int"):
        normswap.load("bn.pt", architecture=lambda: 3)  # type: ignore[arg-type, return-value]


def test_names_from_files_build_with_keywords() -> None:
    model = build_architecture("timm:test_resnet,layers=(1,1,1,2),act_layer=silu,in_chans=1")
    assert len(model.layer4) == 2
    assert isinstance(model.layer1[0].act1, nn.SiLU)
    assert model.conv1.in_channels == 1 if hasattr(model.conv1, "in_channels") else model.conv1[0].in_channels == 1
    assert build_architecture("torchvision:resnet18,num_classes=3").fc.out_features == 3
    assert isinstance(build_architecture("torchvision:ssdlite320_mobilenet_v3_large"), nn.Module)


# State dicts that do not fit.
def _without(state: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in keys}


def _renamed(state: dict[str, Any]) -> dict[str, Any]:
    return {f"mine.{key}": value for key, value in state.items()}


def _foreign(state: dict[str, Any]) -> dict[str, Any]:
    return {**_without(state, "layer1.0.conv1.weight"), "layer1.0.conv.weight": torch.ones(1)}


MISFITS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], tuple[str, ...]]] = {
    "one missing": (lambda state: _without(state, "fc.weight"), ("1 missing: fc.weight",)),
    "many missing": (lambda state: {"fc.weight": state["fc.weight"]}, (" missing: ", " more")),
    "renamed": (
        _foreign,
        (
            "1 missing: layer1.0.conv1.weight (nearest in the file: layer1.0.conv.weight)",
            "1 unexpected: layer1.0.conv.weight (nearest in the model: layer1.0.conv1.weight)",
        ),
    ),
    "prefixed by nobody": (_renamed, ("unexpected: mine.", "(nearest in the model: ")),
    "another shape": (
        lambda state: {**state, "fc.weight": torch.ones(7, 3)},
        ("1 with another shape: fc.weight (is 7x3, expected 7x",),
    ),
    "a scalar": (
        lambda state: {**state, "fc.bias": torch.tensor(1.0)},
        ("1 with another shape: fc.bias (is a single number, expected 7)",),
    ),
    "another head": (
        lambda state: {**state, "fc.weight": state["fc.weight"][:5], "fc.bias": state["fc.bias"][:5]},
        ("2 with another shape", "add num_classes=5 to the architecture"),
    ),
}


@pytest.mark.parametrize(("change", "messages"), MISFITS.values(), ids=MISFITS)
def test_a_state_dict_that_does_not_fit_is_reported(
    folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]], messages: tuple[str, ...]
) -> None:
    torch.save(change(dict(torch.load("bn.pt"))), "bad.pt")
    for message in (f"the tensors do not fit {files.ARCH}: ", *messages):
        assert_refused(folder, ["convert", "bad.pt", "--arch", files.ARCH], 2, message)


def test_importance_weights_without_a_plan_are_reported(folder: Path) -> None:
    torch.save(torch.load("sn.pt"), "bad.pt")
    message = "the file has importance weights without a plan: write converted models with normswap.save(plan=...)"
    assert_refused(folder, ["convert", "bad.pt", "--arch", files.ARCH], 2, message)


def test_a_gate_of_another_kind_is_reported_in_the_words_of_the_layer(folder: Path) -> None:
    twin = normswap.convert(files.small_model(), gate="softmax").model
    raw = normswap.convert(files.small_model(), torch.randn(files.SHAPE), match=False)
    normswap.save(raw.model, "sn.pt", plan=raw.plan)
    with pytest.raises(ArchitectureError, match=r"do not fit ResNet: .*expected a softmax gate, got a"):
        normswap.load("sn.pt", architecture=twin)


def test_a_plan_in_a_file_that_does_not_fit_its_architecture(folder: Path) -> None:
    assert_refused(folder, ["inspect", "bn.pt", "--arch", "timm:test_efficientnet"], 2, "the tensors do not fit")
    with pytest.raises(normswap.NormswapError, match="the plan was made for another model"):
        normswap.load("sn.pt", architecture="timm:test_efficientnet")


# Analysis.
ANALYZE = ["analyze", "bn.pt", "--arch", files.ARCH, "--data", "digits"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "2", "--batch-size", "4"], "expected at least --batch-size 4 images, got 2"),
        (["--batch-size", "0"], "0 is not in the range x>=1"),
        (["--budget", "-0.1"], "-0.1 is not in the range x>=0"),
        (["--input-size", "3x32x32", "--images", "2", "--device", "nowhere"], "--device nowhere: the model cannot be"),
    ],
)
def test_an_analysis_with_impossible_numbers_is_refused(folder: Path, options: list[str], message: str) -> None:
    assert_refused(folder, [*ANALYZE, *options], 2, message)


# Outputs.
CONVERT = ["convert", "bn.pt", "--arch", files.ARCH, "--input", SIZES]


def test_an_existing_output_is_kept(folder: Path) -> None:
    (folder / "bn.normswap.pt").write_text("mine")
    message = "bn.normswap.pt: exists already: choose another name, or pass --force to replace it"
    assert_refused(folder, CONVERT, 2, message)
    assert_refused(folder, [*CONVERT, "-o", "sn.pt"], 2, "sn.pt: exists already")
    assert_refused(folder, [*CONVERT, "-o", "new.pt", "--save-plan", "plan.json"], 2, "plan.json: exists already")


def test_an_output_must_be_a_file_in_a_folder(folder: Path) -> None:
    (folder / "out").mkdir()
    assert_refused(
        folder, [*CONVERT, "-o", "out"], 2, "out: expected a file name, got a folder or a device: add a file name"
    )
    message = "nowhere/new.pt: expected an existing folder, got nowhere: create it first"
    assert_refused(folder, [*CONVERT, "-o", "nowhere/new.pt"], 2, message)
    assert_refused(folder, [*CONVERT, "-o", "plan.json/new.pt"], 2, "expected an existing folder, got plan.json")


def test_an_output_that_ends_in_a_slash_is_no_file(folder: Path) -> None:
    message = (
        "new/: expected the name of a file, got that of a folder: create the folder and pass -o new/bn.normswap.pt"
    )
    assert_refused(folder, [*CONVERT, "-o", "new/"], 2, message)
    (folder / "new").mkdir()
    message = "new/: expected the name of a file, got that of a folder: pass -o new/bn.calibrated.pt"
    assert_refused(folder, ["calibrate", "bn.pt", "--data", "digits", "-o", "new/"], 2, message)


def test_an_architecture_that_contradicts_the_record_is_refused(folder: Path) -> None:
    message = f"sn.pt: was converted as {files.ARCH}, and its plan does not fit timm:test_vit: leave --arch out ("
    for command in (["inspect", "sn.pt"], ["calibrate", "sn.pt", "--data", "digits"]):
        assert_refused(folder, [*command, "--arch", "timm:test_vit"], 2, message)
    assert run("inspect", "sn.pt", "--arch", files.ARCH).stdout == run("inspect", "sn.pt").stdout


def test_an_unwritable_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic_files.os, "open", refuse)
    message = "bn.normswap.pt: cannot write in . (Permission denied): choose another folder"
    assert_refused(folder, CONVERT, 2, message)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which even root cannot write")
def test_a_really_unwritable_folder_is_refused(folder: Path) -> None:
    assert_refused(folder, [*CONVERT, "-o", "/proc/new.pt"], 2, "/proc/new.pt: cannot write in /proc (")


@pytest.mark.skipif(getattr(os, "getuid", int)() == 0, reason="root reads and writes everything")
def test_permissions_are_reported(folder: Path) -> None:
    (folder / "bn.pt").chmod(0)
    assert_refused(folder, CONVERT, 2, "bn.pt: Permission denied")


def test_a_pickled_module_does_not_become_safetensors(folder: Path) -> None:
    message = "new.safetensors: safetensors cannot store a pickled module: choose -o NAME.pt"
    assert_refused(folder, ["convert", "module.pt", "--trust", "-o", "new.safetensors"], 2, message)


def test_outputs_of_one_name_are_refused(folder: Path) -> None:
    message = "--save-plan and the output have the same name"
    assert_refused(folder, [*CONVERT, "-o", "new.pt", "--save-plan", "new.pt"], 2, message)


# Plans, patterns, inputs, options.
def test_a_pattern_that_matches_nothing_is_reported(folder: Path) -> None:
    message = f"the pattern 'layer9.*' matches none of the {files.SITES} norm sites; nearest: ['layer"
    assert_refused(folder, [*CONVERT, "--include", "layer9.*"], 2, message)
    assert_refused(folder, [*CONVERT, "--exclude", "layer9.*"], 2, message)


def test_a_bad_regular_expression_is_reported(folder: Path) -> None:
    assert_refused(folder, [*CONVERT, "--include", "re:("], 2, "expected a regular expression after `re:`")


def test_a_plan_for_another_model_is_reported(folder: Path) -> None:
    plan = normswap.plan_swaps(build_architecture("timm:test_efficientnet"))
    (folder / "other.json").write_text(plan.to_json())
    assert_refused(folder, [*CONVERT, "--plan", "other.json"], 2, "the plan was made for another model (")


PLANS = {
    "missing": (None, "bad.json: no such file"),
    "empty": (b"", "bad.json: the file is empty"),
    "no JSON": (
        b"swap everything",
        "bad.json: expected a plan as JSON, as SwapPlan.to_json() writes it (normswap convert --save-plan); ",
    ),
    "nested too deeply": (
        b"[" * 100_000,
        "expected a plan as JSON, as SwapPlan.to_json() writes it (normswap convert --save-plan); maximum",
    ),
    "not text": (b"\xff\xfe\x00", "bad.json: 'utf-8' codec can't decode"),
    "another document": (b'{"a": 1}', "bad.json: the plan: unknown name 'a'; expected one of inputs, model_class"),
    "of the future": (None, "bad.json: the plan has version 3, and this normswap reads 2: update normswap"),
}


@pytest.mark.parametrize(("data", "message"), PLANS.values(), ids=PLANS)
def test_a_bad_plan_is_reported(folder: Path, data: bytes | None, message: str) -> None:
    if "version 3" in message:
        data = json.dumps(json.loads((folder / "plan.json").read_text()) | {"version": 3}).encode()
    if data is not None:
        (folder / "bad.json").write_bytes(data)
    assert_refused(folder, [*CONVERT, "--plan", "bad.json"], 2, message)


USAGE = {
    "plan and include": (
        ["--plan", "plan.json", "--include", "*"],
        "--plan already decides which sites are swapped and how: leave --include out",
    ),
    "plan and exclude": (
        ["--plan", "plan.json", "--exclude", "*"],
        "--plan already decides which sites are swapped and how: leave --exclude out",
    ),
    "plan and gate": (
        ["--plan", "plan.json", "--gate", "softmax"],
        "--plan already decides which sites are swapped and how: leave --gate out",
    ),
    "plan and kinds": (
        ["--plan", "plan.json", "--kinds", "bn,in"],
        "--plan already decides which sites are swapped and how: leave --kinds out",
    ),
    "plan and synchronize": (
        ["--plan", "plan.json", "--synchronize"],
        "--plan already decides which sites are swapped and how: leave --synchronize out",
    ),
    "unknown kind": (["--kinds", "bn,ln"], "expected some of bn, in, gn1, gn with commas between, got 'bn,ln'"),
    "no kind": (["--kinds", ""], "expected some of bn, in, gn1, gn with commas between, got ''"),
    "tolerance unused": (
        ["--no-verify", "--tolerance", "1e-3"],
        "--tolerance has no effect with --no-verify: leave one of them out",
    ),
    "tolerance of zero": (["--tolerance", "0"], "0.0 is not in the range x>0"),
    "unknown gate": (["--gate", "sparsemax"], "'sparsemax' is not one of 'simplex', 'softmax'"),
    "input of words": (["--input", "big"], "expected sizes such as 2x3x224x224[:dtype], got 'big'"),
    "input with a hole": (["--input", "2x3x0x8"], "expected sizes such as 2x3x224x224[:dtype], got '2x3x0x8'"),
    "input of an unknown type": (["--input", "2x3:float7"], "expected a dtype among float16, bfloat16"),
    "unknown option": (["--inputs", "2x3"], "No such option"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_reported(folder: Path, arguments: list[str], message: str) -> None:
    assert_refused(folder, ["convert", "bn.pt", "--arch", files.ARCH, *arguments], 2, message)


def test_an_input_that_the_model_cannot_take_is_reported(folder: Path) -> None:
    message = "the model fails on an input of 2x5x64x64, in conv1"
    assert_refused(folder, [*CONVERT[:-1], "2x5x64x64"], 2, message)
    arguments = ["verify", "bn.pt", "bn.safetensors", "--arch", files.ARCH, "--input", "2x5x64x64"]
    assert_refused(folder, arguments, 2, "the original model fails on an input of 2x5x64x64")


def test_verify_needs_the_size_of_an_input(folder: Path) -> None:
    torch.save(files.TiedNet(), "tied.pt")
    message = "the input size is unknown: pass --input 2x3x224x224"
    assert_refused(folder, ["verify", "tied.pt", "tied.pt", "--trust"], 2, message)


# Where the answer is "no".
class Plain(nn.Module):
    """A model without any norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def test_a_model_without_norms(folder: Path) -> None:
    torch.save(Plain(), "plain.pt")
    message = f"no norm sites in this model ({Plain.__module__}.Plain): nothing to convert"
    assert_refused(folder, ["convert", "plain.pt", "--trust"], 1, message)


def test_a_model_whose_norms_stay(folder: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "ln.pt")
    message = "none of the 1 norm sites can be converted: 1 x has no batch statistics"
    assert_refused(folder, ["convert", "ln.pt", "--trust"], 1, message)
    assert_refused(folder, [*CONVERT, "--exclude", "*"], 1, f"{files.SITES} x excluded by the pattern '*'")


def test_a_file_that_is_converted_already(folder: Path) -> None:
    message = f"sn.pt: nothing to do, {files.SITES} sites are converted already: to convert it differently, convert the"
    assert_refused(folder, ["convert", "sn.pt"], 1, message)
    torch.save(normswap.convert(files.small_model()).model, "module-sn.pt")
    assert_refused(folder, ["convert", "module-sn.pt", "--trust"], 1, "is Switchable Normalization already: nothing")


@pytest.mark.slow
def test_a_verification_that_fails(folder: Path) -> None:
    message = "nothing written: softmax gates start at the uniform mix, which is another function: use --gate simplex"
    assert_refused(folder, [*CONVERT, "--gate", "softmax", "--save-plan", "new.json"], 1, message)


def test_a_verification_that_fails_without_a_known_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = equivalence.verify_in_place

    def fail(*arguments: Any, **options: Any) -> equivalence.Verification:
        found = measure(*arguments, **options)
        checks = (dataclasses.replace(found.checks[0], error=0.5, passed=False), *found.checks[1:])
        return dataclasses.replace(found, passed=False, checks=checks)

    monkeypatch.setattr(file_conversion, "verify_in_place", fail)
    message = "the converted model does not compute the same function (outputs in evaluation): --exclude the sites"
    assert_refused(folder, CONVERT, 1, message)
