"""Bad input: one clear line, exit status 2 (1 where the answer is "no"), nothing written, no traceback, no code run."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import files
import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner, Result
from torch import nn

import normswap
from normswap import verification
from normswap.checkpoints import atomic
from normswap.checkpoints.architecture import build_architecture
from normswap.cli import main
from normswap.errors import ArchitectureError, CheckpointError

SIZES = "x".join(map(str, files.SHAPE))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good files of every kind."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    model = files.small_model()
    torch.save(model.state_dict(), folder / "bn.pt")
    torch.save(model.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(model.state_dict(), folder / "bn.safetensors")
    torch.save(model, folder / "module.pt")
    conversion = normswap.convert(model, torch.randn(files.SHAPE))
    normswap.save(conversion.model, folder / "sn.pt", plan=conversion.plan, architecture=files.ARCH)
    (folder / "plan.json").write_text(conversion.plan.to_json())
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the good files, as the working directory."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.rglob("*") if entry.is_file()}


def assert_refused(folder: Path, arguments: list[str], status: int, message: str) -> None:
    """One line on stderr with `message` in it, nothing on stdout but tables, nothing written."""
    before = contents(folder)
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit)
    assert message in result.stderr
    assert "Traceback" not in result.output
    if result.stderr.startswith("error: "):
        assert result.stderr.count("\n") == 1
    else:  # click's own, with the usage above it
        assert result.stderr.startswith("Usage: ")
    assert contents(folder) == before


# Files that are none.


def _truncated(name: str, share: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        whole = (path.parent / name).read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])

    return make


def _flipped(path: Path) -> None:
    """A zip whose pickle is damaged in the middle."""
    with zipfile.ZipFile(path.parent / "bn.pt") as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[:200] + b"\xff\xff" if name.endswith("data.pkl") else data)


def _zip_of(**entries: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in entries.items():
                archive.writestr(f"archive/{name}", text)

    return make


def _torchscript(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"archive/{name}", "")


def _protocol_4(path: Path) -> None:
    torch.save(files.TiedNet().state_dict(), path, pickle_protocol=4)


def _quantised(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its own quantised tensors
        weight = torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)
        torch.save({"a": weight, "b": torch.ones(1)}, path)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "bad.pt: no such file"),
    "a folder": (Path.mkdir, "bad.pt: expected a checkpoint, got a folder without model.safetensors, pytorch_model"),
    "empty": (Path.touch, "bad.pt: the file is empty: copy or download it again"),
    "text": (lambda path: path.write_text("lr: 0.1\n" * 90), 'got text ("lr: 0.1'),
    "short text": (lambda path: path.write_text("hello"), 'got text ("hello"...)'),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><html>"), "got a web page: the download went wrong"),
    "a Git LFS pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"),
        "got a Git LFS pointer: fetch the real file with git lfs pull",
    ),
    "noise": (lambda path: path.write_bytes(bytes(range(128, 256))), "got bytes of an unknown kind (80 81"),
    "an image": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0"), "got an image (PNG)"),
    "a huge header": (
        lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "expected a file of torch.save or safetensors, got bytes of an unknown kind",
    ),
    "truncated zip": (
        _truncated("bn.pt", 0.6),
        "begins like a torch file and ends too early: truncated, copy it again",
    ),
    "truncated legacy": (_truncated("legacy.pt", 0.6), "its tensors claim 1,501,908 bytes, the file has "),
    "truncated legacy header": (_truncated("legacy.pt", 0.0001), "truncated or damaged, or pickled in an unusual"),
    "truncated safetensors": (_truncated("bn.safetensors", 0.6), "truncated or damaged ("),
    "truncated safetensors header": (_truncated("bn.safetensors", 0.001), "truncated or damaged ("),
    "damaged pickle": (_flipped, "truncated or damaged, or pickled in an unusual way ("),
    "newer pickle protocol": (_protocol_4, "pickled in an unusual way (Unsupported operand"),
    "a zip of something else": (_zip_of(readme="hi"), "expected a file of torch.save, got a zip archive without"),
    "TorchScript": (_torchscript, "TorchScript, whose code is fixed: convert the Python model's state_dict()"),
    "several models": (
        lambda path: torch.save({"left": files.TiedNet().state_dict(), "right": files.TiedNet().state_dict()}, path),
        "bad.pt: holds several models ('left', 'right'): say which, such as ",
    ),
    "weights on meta": (
        lambda path: torch.save(files.TiedNet().to("meta").state_dict(), path),
        "bad.pt: the tensor 'stem.weight' is on the meta device and has no values: load it first",
    ),
    "quantised weights": (
        _quantised,
        "bad.pt: the tensor 'a' is quantised, its norms are folded away: convert the model as it was before",
    ),
    "numbers among tensors": (
        lambda path: torch.save({"a": torch.ones(1), "step": 3}, path),
        "expected a state dict or a module, got a mapping with the entry 'step' of type int and no state dict in it",
    ),
    "numbers as names": (
        lambda path: torch.save({3: torch.ones(1)}, path),
        "expected a state dict or a module, got a mapping with the key 3 (int), where names of tensors are texts",
    ),
    "a tensor": (
        lambda path: torch.save(torch.ones(1), path),
        "expected a state dict or a module, got Tensor",
    ),
    "no tensors": (lambda path: torch.save({}, path), "expected a state dict or a module, got an empty one"),
}
FILE_CASES = pytest.mark.parametrize(("make", "message"), FILES.values(), ids=FILES)


@FILE_CASES
def test_a_bad_file_is_refused_by_convert(folder: Path, make: Callable[[Path], Any], message: str) -> None:
    make(folder / "bad.pt")
    assert_refused(folder, ["convert", "bad.pt", "--arch", files.ARCH], 2, message)


@FILE_CASES
def test_a_bad_file_is_refused_by_inspect(folder: Path, make: Callable[[Path], Any], message: str) -> None:
    make(folder / "bad.pt")
    assert_refused(folder, ["inspect", "bad.pt", "--arch", files.ARCH], 2, message)


@FILE_CASES
@pytest.mark.parametrize("pair", [("bn.pt", "bad.pt"), ("bad.pt", "bn.pt")], ids=["second", "first"])
def test_a_bad_file_is_refused_by_verify(
    folder: Path, make: Callable[[Path], Any], message: str, pair: tuple[str, str]
) -> None:
    make(folder / "bad.pt")
    assert_refused(folder, ["verify", *pair, "--arch", files.ARCH], 2, message)


@FILE_CASES
def test_a_bad_file_is_refused_by_load(folder: Path, make: Callable[[Path], Any], message: str) -> None:
    make(folder / "bad.pt")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        normswap.load("bad.pt", architecture=files.ARCH)


def test_the_nearest_name_is_told(folder: Path) -> None:
    assert_refused(folder, ["inspect", "legcy.pt"], 2, "legcy.pt: no such file; nearest: legacy.pt")
    assert_refused(folder, ["inspect", "nowhere/a.pt"], 2, "nowhere/a.pt: no such file, nor is there a folder nowhere")


@pytest.mark.parametrize("damage", range(12))
@pytest.mark.parametrize("name", ["bn.pt", "bn.safetensors", "legacy.pt", "sn.pt"])
def test_random_damage_never_ends_in_a_traceback(folder: Path, name: str, damage: int) -> None:
    """Flipped bytes give a refusal, or numbers; whatever it is, it is no unknown exception."""
    data = bytearray((folder / name).read_bytes())
    numbers = torch.Generator().manual_seed(damage)
    # Half of the cases hit the first thousand bytes, where the structure is.
    span = 1000 if damage % 2 else len(data)
    for position in torch.randint(0, span, (20,), generator=numbers).tolist():
        data[position] ^= 0xFF
    (folder / "bad.pt").write_bytes(data)
    with contextlib.suppress(normswap.NormswapError):
        loaded = normswap.load("bad.pt", architecture=None if name == "sn.pt" else files.ARCH)
        assert isinstance(loaded.model, nn.Module)


# Code in files.


@pytest.mark.parametrize("place", ["the payload itself", "among tensors", "as a key"])
@pytest.mark.parametrize(("wrap"), files.PICKLED.values(), ids=files.PICKLED)
@pytest.mark.parametrize("command", ["inspect", "convert", "verify", "load"])
def test_planted_code_never_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, wrap: Callable[[Any, Path], None], place: str
) -> None:
    # torch's own back door must not open ours.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = folder / "it-ran"
    content = files.hostile_contents(marker)[place]
    wrap(content, folder / "bad.pt")
    plain = wrap is files.PICKLED["plain pickle"]
    for message in ("never loaded",) if plain else ("holds pickled objects", "loading them would run ", "pathlib.Path"):
        if command == "load":
            with pytest.raises(CheckpointError, match=message):
                normswap.load("bad.pt", architecture=files.ARCH)
        else:
            others = ["bn.pt"] if command == "verify" else []
            assert_refused(folder, [command, *others, "bad.pt", "--arch", files.ARCH], 2, message)
    assert not marker.exists()


def test_the_planted_code_would_run_if_trusted(folder: Path) -> None:
    """Else the test above proves nothing."""
    marker = folder / "it-ran"
    torch.save(files.Payload(marker), folder / "bad.pt")
    with pytest.raises(CheckpointError, match="expected a state dict or a module, got NoneType"):
        normswap.load("bad.pt", trust=True)
    assert marker.exists()


def test_a_pickled_module_needs_trust(folder: Path) -> None:
    for arguments in (["convert", "module.pt"], ["inspect", "module.pt"], ["verify", "module.pt", "bn.pt"]):
        message = "loading them would run timm.layers"
        assert_refused(folder, arguments, 2, message)
        assert_refused(folder, arguments, 2, "more): pass --trust if you trust where it comes from")


def test_a_pickled_module_whose_class_is_not_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(files.TiedNet(), folder / "bad.pt")
    monkeypatch.delattr(files, "TiedNet")
    assert_refused(folder, ["inspect", "bad.pt", "--trust"], 2, "needs the code of its classes, which cannot be")


def test_a_pickled_module_whose_code_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: object, _state: object) -> None:
        raise ValueError("of another version\nwith details")

    torch.save(files.TiedNet(), folder / "bad.pt")
    monkeypatch.setattr(files.TiedNet, "__setstate__", fail)
    message = "truncated or damaged, or its own code fails (of another version)"
    assert_refused(folder, ["inspect", "bad.pt", "--trust"], 2, message)


# Architectures.

SCHEMES = "timm:NAME, torchvision:NAME, hf:FOLDER, or path/file.py:function"
ARCHITECTURES = {
    "no scheme": ("resnet50", f"expected one of {SCHEMES} for a model of your own, such as timm:resnet50"),
    "unknown scheme": ("tim:resnet50", f"expected one of {SCHEMES} for a model of your own, such as timm:resnet50"),
    "a folder without a model": ("hf:nowhere", "expected the file nowhere/config.json, which is not there"),
    "a file that is not there": ("mine.py:build", "expected the file mine.py, which is not there"),
    "no name": ("timm:", "expected timm:NAME[,key=value...], got the name ''"),
    "from the hub": ("timm:hf-hub:some/model", "got the name 'hf-hub:some/model'"),
    "a path": ("timm:local-dir:/tmp", "got the name 'local-dir:/tmp'"),
    "unknown in timm": ("timm:test_resnt", "timm has no model 'test_resnt'; nearest: test_resnet"),
    "unknown in torchvision": ("torchvision:resnet19", "torchvision has no model 'resnet19'; nearest: resnet1"),
    "like nothing": ("timm:qqqqqqqqqqqq", "nearest: none, see its list_models()"),
    "unknown keyword": (f"{files.ARCH},color=3", "cannot be built: ResNet.__init__() got an unexpected keyword"),
    "unknown tag": ("timm:test_resnet.my_tag", "cannot be built: Invalid pretrained tag (my_tag)"),
    "fetching weights": (f"{files.ARCH},pretrained=True", "leave 'pretrained' out, the weights come from the file"),
    "reading weights": (f"{files.ARCH},checkpoint_path=x.pt", "leave 'checkpoint_path' out"),
    "another language": (f"{files.ARCH},features_only=true", "expected a Python value, write features_only=True"),
}


@pytest.mark.parametrize(("arch", "message"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_wrong_architecture_is_refused(folder: Path, arch: str, message: str) -> None:
    assert_refused(folder, ["convert", "bn.pt", "--arch", arch], 2, message)
    with pytest.raises(ArchitectureError, match=re.escape(message)):
        normswap.load("bn.pt", architecture=arch)


def test_an_architecture_is_needed_where_the_tensors_tell_none(folder: Path) -> None:
    torch.save(files.TiedNet().state_dict(), folder / "bad.pt")
    for command in ("convert", "identify"):
        assert_refused(folder, [command, "bad.pt"], 1, "the tensors resemble no model of timm ")


def test_several_functions_are_never_guessed_among(folder: Path) -> None:
    torch.save(timm.create_model("efficientnet_b0", num_classes=10).state_dict(), folder / "bad.pt")
    message = " architectures that compute different functions, and do not say which: pass --arch timm:efficientnet_b0"
    for command in ("convert", "identify"):
        assert_refused(folder, [command, "bad.pt"], 1, message)
        assert_refused(folder, [command, "bad.pt"], 1, "--arch timm:tf_efficientnet_b0,num_classes=10")


def test_a_pickled_module_takes_no_architecture(folder: Path) -> None:
    message = "module.pt: a pickled module brings its own architecture: leave --arch"
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
        ("1 of another shape: fc.weight (is 7x3, expected 7x",),
    ),
    "a scalar": (
        lambda state: {**state, "fc.bias": torch.tensor(1.0)},
        ("1 of another shape: fc.bias (is a single number, expected 7)",),
    ),
    "another head": (
        lambda state: {**state, "fc.weight": state["fc.weight"][:5], "fc.bias": state["fc.bias"][:5]},
        ("2 of another shape", "perhaps the architecture lacks num_classes=5"),
    ),
}


@pytest.mark.parametrize(("change", "messages"), MISFITS.values(), ids=MISFITS)
def test_a_state_dict_that_does_not_fit_is_told(
    folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]], messages: tuple[str, ...]
) -> None:
    torch.save(change(dict(torch.load("bn.pt"))), "bad.pt")
    for message in (f"the tensors do not fit {files.ARCH}: ", *messages):
        assert_refused(folder, ["convert", "bad.pt", "--arch", files.ARCH], 2, message)


def test_importance_weights_without_a_plan_are_told(folder: Path) -> None:
    torch.save(torch.load("sn.pt"), "bad.pt")
    message = "the file holds importance weights without a plan: write converted models with normswap.save(plan=...)"
    assert_refused(folder, ["convert", "bad.pt", "--arch", files.ARCH], 2, message)


def test_a_gate_of_another_kind_is_told_in_the_words_of_the_layer(folder: Path) -> None:
    twin = normswap.convert(files.small_model(), gate="softmax").model
    with pytest.raises(
        ArchitectureError, match=r"do not fit ResNet: .*expected a softmax gate, the state dict holds a"
    ):
        normswap.load("sn.pt", architecture=twin)


def test_a_plan_in_a_file_that_does_not_fit_its_architecture(folder: Path) -> None:
    assert_refused(folder, ["inspect", "bn.pt", "--arch", "timm:test_efficientnet"], 2, "the tensors do not fit")
    with pytest.raises(normswap.NormswapError, match="the plan was made for another model"):
        normswap.load("sn.pt", architecture="timm:test_efficientnet")


# Outputs.

CONVERT = ["convert", "bn.pt", "--arch", files.ARCH, "--input", SIZES]


def test_an_existing_output_is_kept(folder: Path) -> None:
    (folder / "bn.normswap.pt").write_text("mine")
    message = "bn.normswap.pt: exists already: choose another name, or replace it with --force"
    assert_refused(folder, CONVERT, 2, message)
    assert_refused(folder, [*CONVERT, "-o", "sn.pt"], 2, "sn.pt: exists already")
    assert_refused(folder, [*CONVERT, "-o", "new.pt", "--save-plan", "plan.json"], 2, "plan.json: exists already")


def test_an_output_must_be_a_file_in_a_folder(folder: Path) -> None:
    (folder / "out").mkdir()
    assert_refused(
        folder, [*CONVERT, "-o", "out"], 2, "out: expected a file name, got a folder or a device: add a name"
    )
    message = "nowhere/new.pt: expected an existing folder, got nowhere: create it first"
    assert_refused(folder, [*CONVERT, "-o", "nowhere/new.pt"], 2, message)
    assert_refused(folder, [*CONVERT, "-o", "plan.json/new.pt"], 2, "expected an existing folder, got plan.json")


def test_an_unwritable_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic.os, "open", refuse)
    message = "bn.normswap.pt: cannot write in . (Permission denied): choose another folder"
    assert_refused(folder, CONVERT, 2, message)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which even root cannot write")
def test_a_really_unwritable_folder_is_refused(folder: Path) -> None:
    assert_refused(folder, [*CONVERT, "-o", "/proc/new.pt"], 2, "/proc/new.pt: cannot write in /proc (")


@pytest.mark.skipif(getattr(os, "getuid", int)() == 0, reason="root reads and writes everything")
def test_permissions_are_told(folder: Path) -> None:
    (folder / "bn.pt").chmod(0)
    assert_refused(folder, CONVERT, 2, "bn.pt: Permission denied")


def test_a_pickled_module_does_not_become_safetensors(folder: Path) -> None:
    message = "new.safetensors: safetensors holds no pickled module: choose -o NAME.pt"
    assert_refused(folder, ["convert", "module.pt", "--trust", "-o", "new.safetensors"], 2, message)


def test_outputs_of_one_name_are_refused(folder: Path) -> None:
    message = "--save-plan and the output have the same name"
    assert_refused(folder, [*CONVERT, "-o", "new.pt", "--save-plan", "new.pt"], 2, message)


# Plans, patterns, inputs, options.


def test_a_pattern_that_matches_nothing_is_told(folder: Path) -> None:
    message = f"the pattern 'layer9.*' matches none of the {files.SITES} norm sites; nearest: ['layer"
    assert_refused(folder, [*CONVERT, "--include", "layer9.*"], 2, message)
    assert_refused(folder, [*CONVERT, "--exclude", "layer9.*"], 2, message)


def test_a_bad_regular_expression_is_told(folder: Path) -> None:
    assert_refused(folder, [*CONVERT, "--include", "re:("], 2, "expected a regular expression after `re:`")


def test_a_plan_for_another_model_is_told(folder: Path) -> None:
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
    "another document": (b'{"a": 1}', "bad.json: the plan lacks ["),
    "of the future": (None, "bad.json: the plan is of a newer version than 1: update normswap"),
}


@pytest.mark.parametrize(("data", "message"), PLANS.values(), ids=PLANS)
def test_a_bad_plan_is_told(folder: Path, data: bytes | None, message: str) -> None:
    if "newer" in message:
        data = json.dumps(json.loads((folder / "plan.json").read_text()) | {"version": 2}).encode()
    if data is not None:
        (folder / "bad.json").write_bytes(data)
    assert_refused(folder, [*CONVERT, "--plan", "bad.json"], 2, message)


USAGE = {
    "plan and include": (["--plan", "plan.json", "--include", "*"], "--plan decides everything: leave --include"),
    "plan and exclude": (["--plan", "plan.json", "--exclude", "*"], "--plan decides everything: leave --include"),
    "plan and gate": (["--plan", "plan.json", "--gate", "simplex"], "--plan decides everything: leave --include"),
    "plan and kinds": (["--plan", "plan.json", "--kinds", "bn,in"], "--plan decides everything: leave --include"),
    "plan and synchronize": (["--plan", "plan.json", "--synchronize"], "--plan decides everything: leave --include"),
    "unknown kind": (["--kinds", "bn,gn"], "expected some of bn, in, gn1 with commas between, got 'bn,gn'"),
    "no kind": (["--kinds", ""], "expected some of bn, in, gn1 with commas between, got ''"),
    "tolerance unused": (["--no-verify", "--tolerance", "1e-3"], "--tolerance has no meaning with --no-verify"),
    "tolerance of zero": (["--tolerance", "0"], "0.0 is not in the range x>0"),
    "unknown gate": (["--gate", "sparsemax"], "'sparsemax' is not one of 'simplex', 'softmax'"),
    "input of words": (["--input", "big"], "expected sizes such as 2x3x224x224[:dtype], got 'big'"),
    "input with a hole": (["--input", "2x3x0x8"], "expected sizes such as 2x3x224x224[:dtype], got '2x3x0x8'"),
    "input of an unknown type": (["--input", "2x3:float7"], "expected a dtype among float16, bfloat16"),
    "unknown option": (["--inputs", "2x3"], "No such option"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_told(folder: Path, arguments: list[str], message: str) -> None:
    assert_refused(folder, ["convert", "bn.pt", "--arch", files.ARCH, *arguments], 2, message)


def test_an_input_that_the_model_cannot_take_is_told(folder: Path) -> None:
    message = "the model fails on an input of 2x5x64x64, in conv1"
    assert_refused(folder, [*CONVERT[:-1], "2x5x64x64"], 2, message)
    arguments = ["verify", "bn.pt", "bn.safetensors", "--arch", files.ARCH, "--input", "2x5x64x64"]
    assert_refused(folder, arguments, 2, "the original model fails on an input of 2x5x64x64")


def test_verify_needs_the_size_of_an_input(folder: Path) -> None:
    torch.save(files.TiedNet(), "tied.pt")
    message = "nothing tells the size of an input: give one with --input 2x3x224x224"
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
    message = "no norm sites in this model (test_bad_input.Plain): nothing to convert"
    assert_refused(folder, ["convert", "plain.pt", "--trust"], 1, message)


def test_a_model_whose_norms_stay(folder: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "ln.pt")
    message = "none of the 1 norm sites is to be swapped: 1 x has no batch statistics to lose at small batches"
    assert_refused(folder, ["convert", "ln.pt", "--trust"], 1, message)
    assert_refused(folder, [*CONVERT, "--exclude", "*"], 1, f"{files.SITES} x excluded by the pattern '*'")


def test_a_file_that_is_converted_already(folder: Path) -> None:
    message = f"sn.pt: nothing to do, {files.SITES} sites are converted already: convert the original file again"
    assert_refused(folder, ["convert", "sn.pt"], 1, message)
    torch.save(normswap.convert(files.small_model()).model, "module-sn.pt")
    assert_refused(folder, ["convert", "module-sn.pt", "--trust"], 1, "is Switchable Normalization already: nothing")


def test_a_proof_that_fails(folder: Path) -> None:
    message = "nothing written: softmax gates start at the uniform mix, which is another function: use --gate simplex"
    assert_refused(folder, [*CONVERT, "--gate", "softmax", "--save-plan", "new.json"], 1, message)


def test_a_proof_that_fails_without_a_known_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = verification.verify_in_place

    def fail(*arguments: Any, **options: Any) -> verification.Verification:
        found = measure(*arguments, **options)
        checks = (dataclasses.replace(found.checks[0], error=0.5, passed=False), *found.checks[1:])
        return dataclasses.replace(found, passed=False, checks=checks)

    monkeypatch.setattr(verification, "verify_in_place", fail)
    message = "nothing written: the converted model is not the same function (outputs in evaluation): --exclude the"
    assert_refused(folder, CONVERT, 1, message)
