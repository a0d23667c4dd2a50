"""convert_file, and what a conversion does with the other entries of a file: EMA, optimizer, trust, fingerprints."""

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm.optim
import torch
from click.testing import CliRunner, Result
from torch import nn

import normswap
from normswap.checkpoints.io.digest import contents_equal
from normswap.checkpoints.loading import random_tensor
from normswap.checkpoints.reading import read_checkpoint, read_record
from normswap.cli import main
from normswap.errors import ArchitectureError, CheckpointError, NothingToDo
from normswap.layers.matching import MATCHING_BUFFERS
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


# convert_file.

X = random_tensor((2, 3, 64, 64), torch.float32)  # as the command makes it for --input 2x3x64x64
ARGUMENTS = {"architecture": files.ARCH, "example_inputs": X}
DATE = re.compile(rb'"date": "[^"]*"')


def members(path: Path) -> dict[str, bytes]:
    """The files in an archive or a folder by name, without the name of the archive, dates and what covers dates."""
    if path.is_dir():
        found = {file.name: file.read_bytes() for file in path.iterdir()}
    else:
        with zipfile.ZipFile(path) as archive:
            found = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
    return {name: mask(data) for name, data in found.items()}


def mask(data: bytes) -> bytes:
    text = DATE.sub(b'"date": ""', data.replace(rb"\"", b'"'))
    return re.sub(rb'("fingerprint": ")[^"]*', rb"\1", text)


def test_convert_file_does_what_the_command_does(source: Path) -> None:
    result = normswap.convert_file("last.pt", "python.pt", **ARGUMENTS)
    document = json.loads(ok("convert", "last.pt", *OPTIONS, "-o", "command.pt", "--json"))
    assert result.to_dict().keys() == document.keys()
    assert json.loads(json.dumps(result.to_dict()["plan"])) == document["plan"]
    for name in ("architecture", "carried", "written", "bytes", "file"):
        assert result.to_dict()[name] == document[name]
    python, command = (torch.load(name, weights_only=True) for name in ("python.pt", "command.pt"))
    assert contents_equal(python, command)
    first, second = members(Path("python.pt")), members(Path("command.pt"))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_convert_file_carries_average_optimizer_and_scheduler(source: Path) -> None:
    result = normswap.convert_file(Path("last.pt"), **ARGUMENTS)
    assert (result.output, result.written, result.architecture) == (Path("last.normswap.pt"), True, files.ARCH)
    assert result.bytes == Path("last.normswap.pt").stat().st_size
    assert result.verification is not None
    assert result.verification.passed
    assert "state_dict_ema: converted too" in result.notes
    found = torch.load("last.normswap.pt", weights_only=True)
    gates = 2 * files.SITES
    assert len(found["optimizer"]["param_groups"][-1]["params"]) == gates
    assert len(found["scheduler"]["base_lrs"]) == len(found["optimizer"]["param_groups"])
    assert found["state_dict_ema"].keys() == found["state_dict"].keys()
    added = found["state_dict"].keys() - torch.load("last.pt", weights_only=True)["state_dict"].keys()
    assert sum(key.endswith(("mean_weight", "var_weight")) for key in added) == gates
    assert sum(key.endswith(tuple(MATCHING_BUFFERS)) for key in added) == len(added) - gates > 0
    assert found["epoch"] == 3
    loaded = normswap.load(result.output)
    assert loaded.plan == result.plan


def test_convert_file_prints_the_tables_of_the_command(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    result = normswap.convert_file("last.pt", "out.pt", **ARGUMENTS)
    assert repr(result) == f"FileConversion('out.pt', {files.SITES} swaps, written)"
    printed = [
        " ".join(line.split()) for line in ok("convert", "last.pt", *OPTIONS, "-o", "out.pt", "--force").split("\n")
    ]
    shown = [" ".join(line.split()) for line in str(result).split("\n")]
    tables = [line for line in shown if not line.startswith("gradients") and "outputs" not in line]
    assert [line for line in tables if line not in printed and "e-" not in line] == []
    for line in ("wrote out.pt", 'next: model = normswap.load("out.pt").model', "Verification", "state_dict_ema"):
        assert line in str(result)
    assert "<pre>" in result._repr_html_()


def test_a_dry_run_of_convert_file_writes_nothing(source: Path) -> None:
    before = sorted(source.iterdir())
    result = normswap.convert_file("last.pt", dry_run=True, **ARGUMENTS)
    assert sorted(source.iterdir()) == before
    assert (result.written, result.bytes, result.to_dict()["output"]) == (False, None, None)
    assert "dry run: without dry_run=True this writes last.normswap.pt" in str(result)
    Path("last.normswap.pt").write_text("mine")
    with pytest.raises(
        CheckpointError, match="exists already: choose another name, or pass overwrite=True to replace it"
    ):
        normswap.convert_file("last.pt", dry_run=True, **ARGUMENTS)
    assert normswap.convert_file("last.pt", overwrite=True, **ARGUMENTS).written


def test_convert_file_writes_nothing_unverified_unless_asked(source: Path) -> None:
    torch.save(files.TiedNet().state_dict(), "own.pt")
    before = sorted(source.iterdir())
    with pytest.raises(ArchitectureError, match=r"the input size is unknown.*pass example_inputs=.*, or verify=False"):
        normswap.convert_file("own.pt", architecture=files.TiedNet)
    with pytest.raises(ArchitectureError, match=r"architecture='none' there is no model to run.*or verify=False"):
        normswap.convert_file("own.pt", architecture="none")
    with pytest.raises(
        NothingToDo, match=r"another function: use gate='simplex', or pass verify=False to write it anyway"
    ):
        normswap.convert_file("last.pt", gate="softmax", **ARGUMENTS)
    with pytest.raises(NothingToDo, match="excluded by"):
        normswap.convert_file("last.pt", exclude="*", **ARGUMENTS)
    assert sorted(source.iterdir()) == before
    result = normswap.convert_file("own.pt", architecture=files.TiedNet, verify=False)
    assert (result.written, result.verification) == (True, None)
    assert "Verification  not measured: verify=False" in str(result)
    assert 'normswap.load("own.normswap.pt", architecture=your_model)' in str(result)
    with pytest.raises(NothingToDo, match="1 sites are converted already"):
        normswap.convert_file(result.output, architecture=files.TiedNet)


def test_the_progress_of_convert_file_is_reported(source: Path) -> None:
    open_stages: list[str] = []
    seen: list[str] = []

    @contextmanager
    def progress(stage: str) -> Iterator[None]:
        open_stages.append(stage)
        seen.append(stage)
        yield
        open_stages.remove(stage)

    normswap.convert_file("last.pt", progress=progress, **ARGUMENTS)
    assert seen == [
        "starting",
        "reading last.pt",
        "building the model",
        "finding norm sites",
        "converting",
        "comparing: outputs in float32",
        "comparing: outputs in evaluation",
        "comparing: outputs in training",
        "comparing: gradients",
        "comparing: running statistics",
        "writing last.normswap.pt",
    ]
    assert open_stages == []


def test_convert_file_takes_the_options_of_convert(source: Path) -> None:
    options = normswap.SwapOptions(include="layer1.*", bn_statistics="renorm")
    result = normswap.convert_file("last.pt", options=options, dry_run=True, **ARGUMENTS)
    assert {(swap.fqn.partition(".")[0], swap.bn_statistics) for swap in result.plan.swaps} == {("layer1", "renorm")}
    again = normswap.convert_file("last.pt", plan=result.plan, dry_run=True, **ARGUMENTS)
    assert again.plan == result.plan
    made = normswap.convert_file(
        "last.pt", architecture=files.ARCH, example_inputs=lambda model: X, kinds=["bn"], dry_run=True
    )
    assert made.verification is not None
    assert made.verification.inputs == "2x3x64x64"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "plan and options": (
        {"plan": normswap.SwapPlan((), (), "", None, ()), "include": "a", "gate": "softmax"},
        "plan= already decides which sites are swapped and how: leave include=, gate= out",
    ),
    "names and inputs": (
        {"architecture": "none", "example_inputs": X, "kinds": ["bn", "in"]},
        "architecture='none' converts tensors by their names only: leave example_inputs=, kinds= out",
    ),
    "tolerance": ({"verify": False, "tolerance": 1.0}, "tolerance= has no effect with verify=False"),
    "no entry": ({"entry": []}, "entry: expected at least one, got an empty list"),
    "an entry twice": ({"entry": ["a", "a"]}, "entry='a' is given twice"),
    "several and weights_only": ({"entry": ["a", "b"], "weights_only": True}, "weights_only= applies to one network"),
    "a folder": (
        {"output": "big/"},
        r"big/: expected the name of a file, .*pass output='big/last\.normswap\.pt'",
    ),
    "no path": ({"output": 3}, "output: expected the name of a file, got an int"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_arguments_that_exclude_each_other_are_refused(source: Path, arguments: dict[str, Any], message: str) -> None:
    before = sorted(source.iterdir())
    with pytest.raises(normswap.NormswapError, match=message):
        normswap.convert_file("last.pt", **arguments)
    assert sorted(source.iterdir()) == before


def test_convert_file_converts_several_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = {"g": files.small_model(), "d": nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))}
    torch.save({name: model.state_dict() for name, model in models.items()} | {"epoch": 1}, "gan.pt")
    inputs = {"g": X, "d": torch.randn(2, 3, 12, 12)}
    result = normswap.convert_file("gan.pt", entry=["g", "d"], architecture=models, example_inputs=inputs)
    assert [(network.entry, len(network.plan.swaps)) for network in result.networks] == [("g", files.SITES), ("d", 1)]
    assert [network.verification.inputs for network in result.networks if network.verification] == [
        "2x3x64x64",
        "2x3x12x12",
    ]
    assert result.to_dict()["networks"].keys() == {"g", "d"}
    assert str(result).count("Sites by kind") == 2
    for name, model in models.items():
        loaded = normswap.load("gan.normswap.pt", entry=name, architecture=model)
        assert normswap.verify(model, loaded.model, [inputs[name]]).passed


def test_convert_file_keeps_the_files_of_a_trainer(tmp_path: Path) -> None:
    model, folder = files.small_model(), tmp_path / "checkpoint-5"
    folder.mkdir()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).square().mean().backward()
    optimizer.step()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    parts = [dict(list(state.items())[i::2]) for i in range(2)]
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for name, part in zip(names, parts, strict=True):
        safetensors.torch.save_file(part, folder / name)
    index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"rng": 1}, folder / "rng_state.pth")
    result = normswap.convert_file(folder, **ARGUMENTS)
    assert result.output == tmp_path / "checkpoint-5.normswap"
    assert result.output.is_dir()
    assert result.bytes == sum(file.stat().st_size for file in result.output.iterdir())
    assert (result.output / "rng_state.pth").read_bytes() == (folder / "rng_state.pth").read_bytes()
    extended = torch.load(result.output / "optimizer.pt", weights_only=True)
    assert len(extended["param_groups"][-1]["params"]) == 2 * files.SITES
    assert len(normswap.load(result.output).plan.swaps) == files.SITES  # type: ignore[union-attr]


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
    with pytest.raises(ArchitectureError, match=r"has its architecture in a Python file, which would be run: pass"):
        normswap.load("model.normswap.pt")
    for arguments in (["inspect", "model.normswap.pt"], ["verify", "model.pt", "model.normswap.pt"]):
        run(*arguments)
    assert not Path("it-ran").exists()


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("mine.py:bild", "mine.py: has no function 'bild'; nearest: build"),
        ("mine.py:number", "mine.py:number: expected a function that returns a module, got int"),
        ("mine.py:build,color=3", "its builder failed: build() got an unexpected keyword argument 'color'"),
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
    with pytest.raises(CheckpointError, match="its tensors or its record changed after normswap"):
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
    assert "is nested more than 50 levels deep or has more than 10,000 values: save only weights and" in result.stderr
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


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"path": b"last.pt"}, "path: expected the name of a file or a folder, got a bytes"),
        ({"path": ""}, "path: expected the name of a file or a folder, got ''"),
        ({"output": "a\0b"}, r"output: expected the name of a file, got 'a\\x00b'"),
        ({"verify": "no"}, "verify: expected True or False, got a str"),
        ({"overwrite": "no"}, "overwrite: expected True or False, got a str"),
        ({"dry_run": None}, "dry_run: expected True or False, got None"),
        ({"tolerance": 0}, "tolerance: expected a number above 0 such as 1e-9, got 0"),
        ({"tolerance": float("nan")}, "tolerance: expected a number above 0 such as 1e-9, got nan"),
        ({"tolerance": True}, "tolerance: expected a number above 0 such as 1e-9, got True"),
        ({"entry": 3}, "entry: expected the name of an entry such as 'state_dict_ema', or a list of names, got an int"),
        ({"entry": ["state_dict", None]}, "entry: expected the name of an entry such as 'state_dict_ema', or a list"),
        (
            {"entry": ["state_dict", "teacher"], "architecture": {"techer": files.ARCH}},
            "architecture: expected entries of entry=.* as keys, got 'techer'; did you mean 'teacher'",
        ),
        ({"progress": 3}, "progress: expected a function of the name of a stage, got 3"),
    ],
)
def test_convert_file_refuses_a_wrong_argument_by_name(source: Path, arguments: dict[str, Any], text: str) -> None:
    before = sorted(source.iterdir())
    with pytest.raises(normswap.ArgumentError, match=text):
        normswap.convert_file(**{"path": "last.pt", "dry_run": True, **ARGUMENTS, **arguments})
    assert sorted(source.iterdir()) == before


def test_convert_file_takes_values_by_entry_for_a_list_of_one(source: Path) -> None:
    by_entry: Any = {name: {"state_dict": value} for name, value in ARGUMENTS.items()}
    assert normswap.convert_file("last.pt", entry=["state_dict"], dry_run=True, **by_entry).plan.swaps


def test_convert_file_reports_stages_to_a_function_that_returns_nothing(source: Path) -> None:
    stages: list[str] = []
    normswap.convert_file("last.pt", dry_run=True, progress=stages.append, **ARGUMENTS)
    assert stages[:2] == ["starting", "reading last.pt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_convert_file_leaves_no_file_if_any_stage_is_interrupted(source: Path, error: type[BaseException]) -> None:
    before = sorted(source.iterdir())
    stages: list[str] = []
    normswap.convert_file("last.pt", "new.pt", progress=stages.append, **ARGUMENTS)
    Path("new.pt").unlink()
    for stage in stages:

        @contextmanager
        def interrupt(name: str, stage: str = stage) -> Iterator[None]:
            if name == stage:
                raise error
            yield

        with pytest.raises(error):
            normswap.convert_file("last.pt", "new.pt", progress=interrupt, **ARGUMENTS)
        assert sorted(source.iterdir()) == before
