"""What a conversion does with the rest of a file, and whose word is believed: entries, EMA, trust, seals."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm.optim
import torch
from click.testing import CliRunner, Result
from torch import nn

import normswap
from normswap.checkpoints.reading import read_checkpoint, read_record
from normswap.cli import main
from normswap.errors import ArchitectureError, CheckpointError
from tests.helpers import checkpoint_makers, files

OPTIONS = ("--arch", files.ARCH, "--input", "2x3x64x64")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def ok(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a training checkpoint in it, from within."""
    monkeypatch.chdir(tmp_path)
    t = checkpoint_makers.trained()
    content = {
        "state_dict": t.model.state_dict(),
        "state_dict_ema": t.average.module.state_dict(),
        "teacher": files.TiedNet().state_dict(),
        "optimizer": t.optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(t.optimizer, 5).state_dict(),
        "epoch": 3,
    }
    torch.save(content, "last.pt")
    return tmp_path


def test_the_output_says_what_became_of_the_rest(source: Path) -> None:
    output = ok("convert", "last.pt", *OPTIONS)
    for line in (
        "state_dict_ema: converted too",
        "teacher: left as it is, not the same model",
        f"optimizer: {2 * files.SITES} gates appended as a last group",
        "scheduler: gates follow the last group's schedule",
    ):
        assert line in output
    record = read_record(Path("last.normswap.pt"))
    assert record is not None
    assert record.entry == "state_dict"
    assert record.originals["bn1"].class_name == "torch.nn.modules.batchnorm.BatchNorm2d"
    assert (record.originals["bn1"].eps, record.originals["bn1"].momentum) == (1e-5, 0.1)


def test_training_goes_on_with_the_old_momentum(source: Path) -> None:
    ok("convert", "last.pt", *OPTIONS)
    model, _, _, rest = normswap.load("last.normswap.pt")
    groups = normswap.param_groups(model, like=timm.optim.param_groups_weight_decay(model, 1e-4))
    optimizer = torch.optim.SGD(groups, lr=1e-4, momentum=0.9, nesterov=True)
    optimizer.load_state_dict(rest["optimizer"])
    old = torch.load("last.pt", weights_only=True)["optimizer"]["state"]
    held = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
    assert len(held) == len(old)
    assert all(torch.equal(a, old[i]["momentum_buffer"]) for i, a in enumerate(held))
    model.train()(torch.randn(files.SHAPE)).square().mean().backward()
    optimizer.step()


def test_another_entry_is_converted_on_request(source: Path) -> None:
    ok("convert", "last.pt", *OPTIONS, "--entry", "state_dict_ema", "--weights-only", "-o", "ema.safetensors")
    average = torch.load("last.pt", weights_only=True)["state_dict_ema"]
    found = safetensors.torch.load_file("ema.safetensors")
    assert all(torch.equal(found[key], average[key]) for key in average)
    assert normswap.load("ema.safetensors").rest == {}


def test_weights_only_names_what_is_left_out(source: Path) -> None:
    result = run("convert", "last.pt", *OPTIONS, "-o", "out.safetensors")
    assert result.exit_code == 2
    assert (
        "this file also contains epoch, optimizer, scheduler, state_dict_ema, teacher: choose -o NAME.pt"
        in result.stderr
    )
    output = ok("convert", "last.pt", *OPTIONS, "--weights-only", "-o", "out.pt")
    assert "optimizer: left out (--weights-only)" in output
    normswap.convert(files.small_model()).model.load_state_dict(torch.load("out.pt", weights_only=True), strict=True)


def test_json_says_it_too(source: Path) -> None:
    document = json.loads(ok("convert", "last.pt", *OPTIONS, "--json"))
    assert "state_dict_ema: converted too" in document["carried"]


# Architectures in Python files.

CODE = """
from pathlib import Path
import timm
Path("it-ran").touch()

def build(num_classes=3):
    return timm.create_model("test_resnet", num_classes=num_classes)

def number():
    return 3
"""


@pytest.fixture
def coded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(CODE)
    torch.save(files.small_model().state_dict(), "model.pt")
    return "mine.py:build,num_classes=7"


def test_the_users_own_file_is_run(coded: str) -> None:
    ok("convert", "model.pt", "--arch", coded, "--input", "2x3x64x64")
    assert normswap.load("model.normswap.pt", trust=True).plan is not None
    assert normswap.load("model.normswap.pt", architecture=coded).plan is not None


def test_a_file_named_in_a_record_is_not_run_unasked(coded: str) -> None:
    ok("convert", "model.pt", "--arch", coded, "--input", "2x3x64x64")
    Path("it-ran").unlink()
    with pytest.raises(ArchitectureError, match=r"mine\.py:build,num_classes=7, which is not run unasked: pass"):
        normswap.load("model.normswap.pt")
    for arguments in (["inspect", "model.normswap.pt"], ["verify", "model.pt", "model.normswap.pt"]):
        run(*arguments)
    assert not Path("it-ran").exists()


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("mine.py:bild", "mine.py: has no function 'bild'; nearest: build"),
        ("mine.py:number", "mine.py:number: expected a function that returns a module, got int"),
        ("mine.py:build,color=3", "cannot be built: build() got an unexpected keyword argument 'color'"),
    ],
)
def test_what_a_file_does_not_build(coded: str, arch: str, message: str) -> None:
    result = run("convert", "model.pt", "--arch", arch)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


# Seals.


def _flip_a_tensor(path: Path) -> None:
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(data)


def _edit_the_record(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(b'"gate": "simplex"', b'"gate": "softmax"'))


def _flip_safetensors(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


SEALS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a bit of a tensor": ("model.pt", _flip_a_tensor),
    "the record": ("model.pt", _edit_the_record),
    "a bit of safetensors": ("model.safetensors", _flip_safetensors),
}


@pytest.mark.parametrize(("name", "change"), SEALS.values(), ids=SEALS)
def test_what_was_changed_since_is_refused(tmp_path: Path, name: str, change: Callable[[Path], Any]) -> None:
    conversion = normswap.convert(files.small_model())
    normswap.save(conversion.model, tmp_path / name, plan=conversion.plan, architecture=files.ARCH)
    assert normswap.load(tmp_path / name).plan == conversion.plan
    change(tmp_path / name)
    with pytest.raises(CheckpointError, match="not what normswap wrote: its tensors or its record were"):
        normswap.load(tmp_path / name)


def test_a_file_without_a_fingerprint_passes(tmp_path: Path) -> None:
    conversion = normswap.convert(files.small_model())
    normswap.save(conversion.model, tmp_path / "new.pt", plan=conversion.plan, architecture=files.ARCH)
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for info in new.infolist():
            data = new.read(info)
            if info.filename.endswith("normswap.json"):
                record = json.loads(data)
                data = json.dumps({key: value for key, value in record.items() if key != "fingerprint"}).encode()
            old.writestr(info.filename, data)
    assert normswap.load(tmp_path / "old.pt").plan == conversion.plan


# Contents without an end.


def _itself() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


def _doubled() -> list[Any]:
    values: list[Any] = [1]
    for _ in range(40):
        values = [values, values]
    return values


@pytest.mark.parametrize("make", [_itself, _doubled])
def test_a_content_without_an_end_is_refused(
    tmp_path: Path, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normswap.checkpoints.io.digest._MAX_LEAVES", 10_000)
    torch.save({"state_dict": files.small_model().state_dict(), "odd": make()}, tmp_path / "model.pt")
    result = run("convert", str(tmp_path / "model.pt"), *OPTIONS, "--no-verify")
    assert result.exit_code == 2
    assert "is nested more than 50 deep or holds more than 10,000 values: save weights and" in result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


# Statistics that are none.


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "such as nan"), (-1.0, "such as -1")])
def test_statistics_without_sense_are_refused(tmp_path: Path, value: float, message: str) -> None:
    model = files.small_model()
    model.bn1.running_var[0] = value
    torch.save(model.state_dict(), tmp_path / "model.pt")
    result = run("convert", str(tmp_path / "model.pt"), *OPTIONS)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def test_modules_in_a_dict_are_converted_alike(tmp_path: Path) -> None:
    model, other = files.small_model(), nn.Linear(2, 2)
    torch.save({"model": model, "critic": other}, tmp_path / "pair.pt")
    output = ok("convert", str(tmp_path / "pair.pt"), "--trust", "--input", "2x3x64x64")
    assert "critic: left as it is, not the same model" in output
    back = read_checkpoint(tmp_path / "pair.normswap.pt", trust=True).content
    assert len(normswap.importance_weights(back["model"])) == files.SITES
    assert normswap.importance_weights(back["critic"]) == {}
