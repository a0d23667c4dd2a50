"""`normswap calibrate`: statistics of a data set into a new file, and everything else in it as it was."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner, Result
from torch import nn

import normswap
from normswap.checkpoints.reading import read_record
from normswap.checkpoints.saving import compute_sha256
from normswap.cli import main
from normswap.finetune.data.datasets import open_data
from normswap.finetune.data.loaders import DataSettings
from tests.finetune.test_datasets import image_folder
from tests.helpers import files

# timm opens a file per image and leaves it to the garbage collector to close it.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
DIGITS = ["--data", "digits", "--input-size", "32", "--batch-size", "20", "--batches", "3"]
ARCH = ["--arch", files.ARCH]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One network as a state dict and converted, as the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    model, x = files.small_model(), torch.randn(files.SHAPE)
    torch.save(model.state_dict(), "bn.pt")
    conversion = normswap.convert(model, x)
    proof = normswap.verify(model, conversion.model, [x])
    normswap.save(conversion.model, "sn.pt", plan=conversion.plan, architecture=files.ARCH, verification=proof)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["calibrate", *arguments])


def ok(*arguments: str) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def differing(first: Any, second: Any) -> set[str]:
    assert first.keys() == second.keys()
    return {name.rpartition(".")[2] for name in first if not first[name].equal(second[name])}


def state(path: str, **options: Any) -> Any:
    return normswap.load(path, **options).model.state_dict()


def test_a_converted_file_gets_the_statistics_of_the_data(folder: Path) -> None:
    result = ok("sn.pt", *DIGITS)
    expected = normswap.load("sn.pt").model
    settings = DataSettings("digits", image_size=(32, 32), batch_size=20)
    batches = [images for images, _ in open_data(settings, use="calibration", model=expected)][:3]
    calibration = normswap.calibrate(expected, batches)
    assert differing(expected.state_dict(), state("sn.calibrated.pt")) == set()
    assert differing(state("sn.pt"), state("sn.calibrated.pt")) == {*STATISTICS, "ln_mean_shift", "ln_var_scale"}
    most = max(calibration.layers, key=lambda layer: layer.shift)
    assert result.output.index(most.fqn) < result.output.index(f"{most.shift:.3g}") < result.output.index("5 more, at ")
    assert "15 layers calibrated on 3 batches of 20 of digits\nwrote sn.calibrated.pt (" in result.output


def test_single_layers_are_matched(folder: Path) -> None:
    document = json.loads(ok("sn.pt", *DIGITS, "--only", "re:conv1.*", "--match", "--json").output)
    assert [layer["fqn"] for layer in document["layers"]] == ["conv1.1", "conv1.4"]
    assert {layer["reason"] for layer in document["skipped"]} == {"not selected"}
    old, new = state("sn.pt"), state("sn.calibrated.pt")
    constants = {"ln_mean_shift", "ln_var_scale", "in_var_scale"}
    assert differing(old, new) == {*STATISTICS, *constants}
    assert {name.rpartition(".")[0] for name in old if not old[name].equal(new[name])} == {"conv1.1", "conv1.4"}


def test_the_history_names_the_layers_and_the_matching(folder: Path) -> None:
    ok("sn.pt", *DIGITS, "--only", "conv1.1", "--only", "layer1.*", "--match")
    record = read_record(folder / "sn.calibrated.pt")
    assert record is not None
    assert record.history[-1].detail == "digits, train, 3 batches of 20, only conv1.1, layer1.*, matched"


def test_history_goes_on_and_the_verification_does_not(folder: Path) -> None:
    result = ok("sn.pt", *DIGITS, "--layer-by-layer")
    assert "verification of the conversion: left out" in " ".join(result.output.split())
    old, new = read_record(Path("sn.pt")), read_record(Path("sn.calibrated.pt"))
    assert old is not None
    assert new is not None
    assert (new.plan, new.architecture, new.verification) == (old.plan, old.architecture, None)
    step = new.history[-1]
    assert new.history[:-1] == old.history
    assert (step.action, step.source, step.sha256) == ("calibrated", "sn.pt", compute_sha256(Path("sn.pt")))
    assert step.detail == "digits, train, 3 batches of 20"
    shown = CliRunner().invoke(main, ["inspect", "sn.calibrated.pt"]).output
    assert "none is recorded in this file" in shown
    assert "calibrated" in shown
    assert "digits, train, 3 batches of 20" in " ".join(shown.split())


def test_a_file_of_bn_keeps_its_names_and_is_reported_by_inspect(folder: Path) -> None:
    image_folder(folder / "images" / "train", size=40, each=4)
    ok("bn.pt", *ARCH, "--data", "folder:images", "--input-size", "3x32x40", "--batch-size", "3", "-o", "new.pt")
    old, new = (torch.load(name, weights_only=True) for name in ("bn.pt", "new.pt"))
    assert differing(old, new) == {*STATISTICS}
    assert list(old) == list(new)
    assert new._metadata == old._metadata
    assert new["bn1.num_batches_tracked" if "bn1.num_batches_tracked" in new else "conv1.1.num_batches_tracked"] == 3
    files.small_model().load_state_dict(new)
    shown = CliRunner().invoke(main, ["inspect", "new.pt"]).output
    assert "folder:images, train, 3 batches of 3" in " ".join(shown.split())
    document = json.loads(CliRunner().invoke(main, ["inspect", "new.pt", "--json"]).output)
    assert [step["action"] for step in document["history"]] == ["calibrated"]
    converted = CliRunner().invoke(main, ["convert", "new.pt", "--input", "2x3x32x32"])
    assert converted.exit_code == 0, converted.output
    record = read_record(Path("new.normswap.pt"))
    assert record is not None
    assert [step.action for step in record.history] == ["calibrated", "converted"]


def test_other_entries_of_a_file_are_copied(folder: Path) -> None:
    model = files.small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    content = {
        "state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()},
        "state_dict_ema": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
    }
    torch.save(content, "last.pth.tar")
    result = ok("last.pth.tar", *ARCH, *DIGITS, "--entry", "state_dict")
    new = torch.load("last.calibrated.pth.tar", weights_only=True)
    assert differing(content["state_dict"], new["state_dict"]) == {*STATISTICS}
    assert differing(content["state_dict_ema"], new["state_dict_ema"]) == set()
    assert (new["epoch"], new["optimizer"].keys()) == (3, content["optimizer"].keys())  # type: ignore[attr-defined]
    assert "state_dict_ema: left as it is, calibrate it with --entry" in " ".join(result.output.split())
    refused = run("last.pth.tar", *ARCH, *DIGITS, "-o", "last.safetensors")
    assert refused.exit_code == 2
    assert refused.output.rstrip().endswith("epoch, optimizer, state_dict_ema: choose -o NAME.pt")


def test_files_of_other_kinds(folder: Path) -> None:
    model = files.small_model()
    torch.save(model, "module.pth")
    ok("module.pth", *DIGITS, "--trust")
    after = torch.load("module.calibrated.pth", weights_only=False)
    assert differing(model.state_dict(), after.state_dict()) == {*STATISTICS}
    assert not after.training
    safetensors.torch.save_file(model.half().state_dict(), "half.safetensors")
    ok("half.safetensors", *ARCH, *DIGITS)
    half = safetensors.torch.load_file("half.calibrated.safetensors")
    assert differing(model.state_dict(), half) == {*STATISTICS}
    assert half["fc.weight"].dtype == torch.float16


def test_a_folder_is_calibrated_with_all_its_images(folder: Path) -> None:
    (folder / "hub").mkdir()
    config = {"architecture": "test_resnet", "num_classes": 7, "model_args": {}}
    (folder / "hub" / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(files.small_model().state_dict(), folder / "hub" / "model.safetensors")
    torch.save({"anything": torch.ones(2)}, folder / "hub" / "optimizer.pt")
    ok("hub", *DIGITS)
    assert sorted(os.listdir("hub.calibrated")) == sorted(
        ["config.json", "model.safetensors", "normswap.json", "optimizer.pt"]
    )
    assert (folder / "hub" / "optimizer.pt").read_bytes() == (folder / "hub.calibrated" / "optimizer.pt").read_bytes()
    assert differing(state("hub"), state("hub.calibrated")) == {*STATISTICS}


def test_one_document_for_machines(folder: Path) -> None:
    document = json.loads(ok("sn.pt", *DIGITS, "--json").output)
    assert (document["file"], document["output"], document["architecture"]) == ("sn.pt", "sn.calibrated.pt", files.ARCH)
    assert (document["batches"], document["passes"], len(document["layers"]), document["skipped"]) == (
        3,
        1,
        files.SITES,
        [],
    )
    assert document["largest_shift"] == max(layer["shift"] for layer in document["layers"])
    assert document["bytes"] == os.path.getsize("sn.calibrated.pt")


def test_grey_models_get_grey_images(folder: Path) -> None:
    model = files.scrambled(timm.create_model("test_resnet", num_classes=7, in_chans=1)).eval()
    torch.save(model.state_dict(), "grey.pt")
    ok("grey.pt", "--arch", f"{files.ARCH},in_chans=1", *DIGITS)
    torch.save(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), "plain.pt")
    ok("plain.pt", "--trust", *DIGITS[:2], "--input-size", "1x8x8")
    refused = run("plain.pt", "--trust", *DIGITS, "--force")
    assert refused.exit_code == 2
    assert "batch 0 (counted from 0): the model fails on an input of 20x3x32x32: " in refused.output


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["sn.pt", *DIGITS, "-o", "bn.pt"], 2, "bn.pt: exists already"),
        (["sn.pt", *DIGITS[2:]], 2, "Missing option '--data'"),
        (["sn.pt", "--data", "folder:none"], 2, "none: no such folder: expected one with a folder of images per class"),
        (["sn.pt", "--data", "digits", "--split", "all"], 2, "no split 'all'"),
        (
            ["sn.pt", "--data", "digits", "--input-size", "3x4x5x6"],
            2,
            "a size in pixels such as 224, 224x320 or 1x28x28",
        ),
        (["plain.pt", "--trust", "--data", "digits"], 2, "image size unknown: pass --input-size 224x224"),
        (["bare.pt", "--trust", *DIGITS], 1, "nothing to calibrate: no layer with running statistics ran"),
        (["missing.pt", *DIGITS], 2, "missing.pt"),
        (["sn.pt", *DIGITS, "--device", "nowhere"], 2, "--device nowhere: the model cannot be moved there: "),
    ],
)
def test_what_is_refused(folder: Path, arguments: list[str], status: int, message: str) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "plain.pt")
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3)), "bare.pt")
    before = sorted(os.listdir())
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert message in " ".join(result.output.split())
    assert sorted(os.listdir()) == before
