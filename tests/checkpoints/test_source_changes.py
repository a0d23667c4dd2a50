"""Sources that change while they are read: refused with one line, without output, mixed values or a signal."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from torch import Tensor

import normswap
import normswap.checkpoints.architecture.identification
import normswap.checkpoints.file_conversion
import normswap.checkpoints.loading
import normswap.checkpoints.reading
import normswap.checkpoints.saving
import normswap.surgery.planning
import normswap.verification.equivalence
from benchmarks.paths import ROOT
from normswap.checkpoints.formats.formats import encode
from normswap.cli import main
from normswap.errors import CheckpointError
from tests.helpers import files

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be replaced there"),
]

RUNS = 5  # of the program that changes files at random moments


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def state() -> dict[str, Tensor]:
    return files.small_model().state_dict()


# The ways in which a file can change, by the words that the error has for each.


def _append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0" * 64)


def _shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _replace(path: Path) -> None:
    twin = path.with_name("twin")
    shutil.copy2(path, twin)
    os.replace(twin, path)


def _flip(path: Path) -> None:
    """One byte in the middle, as a trainer would write numbers."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _flip_unnoticed(path: Path) -> None:
    before = path.stat()
    _flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _remove(path: Path) -> None:
    path.unlink()


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "grown": (_append, "bytes and has"),
    "shrunk": (_shrink, "bytes and has"),
    "emptied": (_empty, "bytes and has"),
    "replaced": (_replace, "another file replaced it"),
    "written to": (_flip, "it was written to"),
    "written to, with its time put back": (_flip_unnoticed, "it was written to"),
    "removed": (_remove, "it was removed"),
}


# Every container, and the file in it that changes.


def _zip(folder: Path) -> tuple[Path, Path]:
    torch.save(state(), folder / "bn.pt")
    return folder / "bn.pt", folder / "bn.pt"


def _legacy(folder: Path) -> tuple[Path, Path]:
    torch.save(state(), folder / "bn.pth", _use_new_zipfile_serialization=False)
    return folder / "bn.pth", folder / "bn.pth"


def _safetensors(folder: Path) -> tuple[Path, Path]:
    safetensors.torch.save_file(state(), folder / "bn.safetensors")
    return folder / "bn.safetensors", folder / "bn.safetensors"


def _program(folder: Path) -> tuple[Path, Path]:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))

    torch.export.save(torch.export.export(Net().eval(), (torch.randn(2, 3, 8, 8),)), folder / "bn.pt2")
    return folder / "bn.pt2", folder / "bn.pt2"


def _shards(folder: Path) -> Path:
    made = folder / "sharded"
    made.mkdir()
    parts = [dict(list(state().items())[::2]), dict(list(state().items())[1::2])]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, part in zip(names, parts, strict=True):
        safetensors.torch.save_file(part, made / name, {"format": "pt"})
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (made / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (made / "config.json").write_text('{"architecture": "test_resnet", "num_classes": 7}')
    torch.save({"state": {}, "param_groups": []}, made / "optimizer.pt")
    return made


def _inside(name: str) -> Callable[[Path], tuple[Path, Path]]:
    def make(folder: Path) -> tuple[Path, Path]:
        made = _shards(folder)
        return made, made / name

    return make


def _distributed(folder: Path) -> tuple[Path, Path]:
    (folder / "step").mkdir()
    encode(folder / "step", "distributed folder", state(), "{}")
    (folder / "step" / "normswap.json").unlink()
    return folder / "step", next((folder / "step").glob("*.distcp"))


CONTAINERS: dict[str, Callable[[Path], tuple[Path, Path]]] = {
    "torch zip": _zip,
    "legacy pickle": _legacy,
    "safetensors": _safetensors,
    "exported program": _program,
    "a shard": _inside("model-00002-of-00002.safetensors"),
    "an index of shards": _inside("model.safetensors.index.json"),
    "a configuration": _inside("config.json"),
    "an optimizer in a folder": _inside("optimizer.pt"),
    "distributed": _distributed,
}


@pytest.fixture
def change_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, Callable[[], None]], None]:
    """Let a change happen at the end of a function of the package, the first time that it is called."""

    def patch(room: Any, name: str, change: Callable[[], None]) -> None:
        original, done = getattr(room, name), []

        def changed(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if not done:
                done.append(True)
                change()
            return result

        monkeypatch.setattr(room, name, changed)

    return patch


def check_refused(result: Result, words: str, path: Path) -> None:
    assert result.exit_code == 2, result.output
    error = " ".join(result.stderr.split())
    assert f"{path}: changed while normswap read it (" in error
    assert words in error
    assert "wait until the program that writes it has finished" in error


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_source_that_changes_before_the_output_appears_gives_no_output(
    container: str, tmp_path: Path, change_at: Any
) -> None:
    source, part = CONTAINERS[container](tmp_path)
    change_at(normswap.checkpoints.saving, "encode", lambda: _flip_unnoticed(part))
    before = {entry.name for entry in tmp_path.iterdir()}
    check_refused(run("convert", source, "--arch", "none", "--no-verify"), "it was written to", part)
    assert {entry.name for entry in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_every_way_to_change_is_noticed(
    change: Callable[[Path], None], words: str, tmp_path: Path, change_at: Any
) -> None:
    source, _ = _zip(tmp_path)
    change_at(normswap.checkpoints.saving, "encode", lambda: change(source))
    check_refused(run("convert", source, "--arch", "none", "--no-verify", "-o", tmp_path / "out.pt"), words, source)
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("change", [_shrink, _flip], ids=["shrunk", "written to"])
@pytest.mark.parametrize("container", ["torch zip", "legacy pickle", "safetensors", "a shard", "distributed"])
def test_a_source_that_changes_under_the_reader_is_refused(
    container: str, change: Callable[[Path], None], tmp_path: Path, change_at: Any
) -> None:
    """After the checks of the file and before its tensors are read: a mapping would end the process here."""
    source, part = CONTAINERS[container](tmp_path)
    change_at(normswap.checkpoints.reading, "read_record_text", lambda: change(part))
    check_refused(run("convert", source, "--arch", "none", "--no-verify", "-o", tmp_path / "out.pt"), "", part)
    assert not (tmp_path / "out.pt").exists()
    _shrink(part)
    with pytest.raises(CheckpointError):  # refused as damaged
        normswap.load(source, architecture=files.ARCH)


def test_files_that_join_a_folder_are_noticed(tmp_path: Path, change_at: Any) -> None:
    source, part = _inside("config.json")(tmp_path)
    change_at(normswap.checkpoints.saving, "encode", lambda: shutil.copy(part, source / "generation.json"))
    check_refused(run("convert", source, "--arch", "none", "--no-verify"), "files were added or removed", source)


READERS: dict[str, tuple[Any, str, list[str]]] = {
    "convert --dry-run": (
        normswap.checkpoints.file_conversion,
        "convert_file_content",
        ["convert", "--dry-run", "--no-verify"],
    ),
    "convert --save-plan": (
        normswap.checkpoints.file_conversion,
        "convert_file_content",
        ["convert", "--no-verify", "--save-plan", "plan.json"],
    ),
    "inspect": (normswap.surgery.planning, "plan_swaps", ["inspect"]),
    "identify": (normswap.checkpoints.architecture.identification, "identify_state_dict", ["identify"]),
    "verify": (normswap.verification.equivalence, "verify", ["verify", "bn.pt", "--input", "2x3x64x64"]),
}


@pytest.mark.parametrize(("room", "name", "arguments"), READERS.values(), ids=READERS)
def test_no_command_answers_for_a_source_that_changed(
    room: Any, name: str, arguments: list[str], tmp_path: Path, change_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _zip(tmp_path)
    shutil.copy("bn.pt", "source.pt")
    change_at(room, name, lambda: _flip_unnoticed(Path("source.pt")))
    arch = [] if arguments[0] == "identify" else ["--arch", files.ARCH]
    check_refused(run(*arguments, "source.pt", *arch), "it was written to", Path("source.pt"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"bn.pt", "source.pt"}


def test_calibrate_writes_nothing_of_a_source_that_changed(tmp_path: Path, change_at: Any) -> None:
    source, _ = _zip(tmp_path)
    change_at(normswap.checkpoints.saving, "encode", lambda: _flip_unnoticed(source))
    data = ["--data", "digits", "--batches", "1", "--batch-size", "4"]
    check_refused(run("calibrate", source, "--arch", files.ARCH, *data), "it was written to", source)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bn.pt"]


def test_an_inspected_converted_file_that_changes_is_refused(tmp_path: Path, change_at: Any) -> None:
    conversion = normswap.convert(files.small_model())
    path = tmp_path / "sn.pt"
    normswap.save(conversion.model, path, plan=conversion.plan, architecture=files.ARCH)
    change_at(normswap.checkpoints.reading, "stored_importance_weights", lambda: _flip_unnoticed(path))
    check_refused(run("inspect", path), "it was written to", path)
    change_at(normswap.checkpoints.reading, "decode", lambda: _flip_unnoticed(path))
    _flip_unnoticed(path)
    check_refused(run("identify", path), "it was written to", path)


@pytest.mark.parametrize("container", ["torch zip", "legacy pickle", "safetensors", "a shard", "distributed"])
def test_load_refuses_a_source_that_changes_while_it_is_read(container: str, tmp_path: Path, change_at: Any) -> None:
    source, part = CONTAINERS[container](tmp_path)
    change_at(normswap.checkpoints.reading, "decode", lambda: _flip_unnoticed(part))
    with pytest.raises(CheckpointError, match=r"changed while normswap read it \(it was written to\)"):
        normswap.load(source, architecture=files.ARCH)


@pytest.mark.parametrize("container", ["torch zip", "legacy pickle", "safetensors", "a shard", "distributed"])
def test_a_loaded_model_does_not_change_with_its_file(container: str, tmp_path: Path) -> None:
    source, part = CONTAINERS[container](tmp_path)
    loaded = normswap.load(source, architecture=files.ARCH)
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    with open(part, "r+b") as file:  # in place, as np.memmap or a copy over it would write
        file.write(b"\xff" * part.stat().st_size)
    os.truncate(part, 0)
    assert all(torch.equal(before[key], value) for key, value in loaded.model.state_dict().items())


def test_other_entries_do_not_change_with_their_file(tmp_path: Path) -> None:
    path, ema = tmp_path / "train.pt", state()
    torch.save({"state_dict": state(), "state_dict_ema": ema, "epoch": 3}, path)
    loaded = normswap.load(path, architecture=files.ARCH)
    os.truncate(path, 0)
    assert all(torch.equal(ema[key], value) for key, value in loaded.rest["state_dict_ema"].items())


def test_a_model_can_be_saved_over_its_own_file(tmp_path: Path) -> None:
    conversion = normswap.convert(files.small_model())
    for name in ("sn.pt", "sn.safetensors"):
        path = tmp_path / name
        normswap.save(conversion.model, path, plan=conversion.plan, architecture=files.ARCH)
        loaded = normswap.load(path)
        normswap.save(loaded.model, path, plan=loaded.plan, architecture=files.ARCH)
        again = normswap.load(path).model.state_dict()
        assert all(torch.equal(again[key], value) for key, value in conversion.model.state_dict().items())


def test_a_conversion_may_replace_its_own_source(tmp_path: Path) -> None:
    source, _ = _zip(tmp_path)
    result = run("convert", source, "--arch", "none", "--no-verify", "-o", source, "--force")
    assert result.exit_code == 0, result.output
    assert any(key.endswith("mean_weight") for key in torch.load(source))


def test_no_copy_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    source = _shards(tmp_path)
    open_before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    assert run("convert", source, "--arch", "none", "--no-verify").exit_code == 0
    normswap.load(source)
    _shrink(source / "model-00001-of-00002.safetensors")
    assert run("convert", source, "--arch", "none", "--no-verify", "-o", tmp_path / "out").exit_code == 2
    assert [*temporary.iterdir()] == []
    if open_before:
        assert len(os.listdir("/proc/self/fd")) <= open_before


@pytest.mark.parametrize("kind", ["full", "no such folder", "no room while it is copied"])
def test_without_room_on_the_disk_the_copy_goes_to_memory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normswap.checkpoints import source_copy

    path, _ = _zip(tmp_path)
    folder = tmp_path / "missing" if kind == "no such folder" else tmp_path
    if kind == "full":
        monkeypatch.setattr(source_copy.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    if kind == "no room while it is copied":
        copy, calls = source_copy._copy_bytes, []

        def fail_once(source: int, target: int) -> None:
            calls.append(target)
            if len(calls) == 1:
                raise OSError(28, "No space left on device")
            copy(source, target)

        monkeypatch.setattr(source_copy, "_copy_bytes", fail_once)
    origin = source_copy.open_source(path, folder=folder)
    assert "memfd:" in os.readlink(origin.copy)
    assert origin.copy.read_bytes() == path.read_bytes()
    origin.check_unchanged()


@pytest.mark.parametrize("kind", ["no descriptors with a path", "more files than descriptors"])
def test_systems_without_files_without_names_copy_too(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normswap.checkpoints import source_copy

    if kind == "more files than descriptors":
        monkeypatch.setattr(source_copy, "_MAX_DESCRIPTORS", 1)
    else:
        monkeypatch.setattr(source_copy, "_DESCRIPTORS", tmp_path / "nowhere")
    for make in (_zip, _inside("config.json")):
        path, part = make(tmp_path)
        origin = source_copy.open_source(path, folder=tmp_path)
        if origin.copy.is_dir():
            assert not any(entry.is_symlink() for entry in origin.copy.iterdir())
        assert normswap.load(path, architecture=files.ARCH).model is not None
        _flip_unnoticed(part)
        with pytest.raises(CheckpointError, match="it was written to"):
            origin.check_unchanged()
        folders = [*origin.files.folders]
        origin.close()
        assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize(
    ("full", "is_next_to_output"), [("nothing", False), ("temporary files", True), ("both", False)]
)
def test_a_named_copy_is_in_the_folder_of_the_output_only_if_no_other_has_space(
    full: str, is_next_to_output: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normswap.checkpoints import source_copy

    def disk_usage(folder: Path) -> Any:
        is_full = full == "both" or (full == "temporary files" and folder != tmp_path)
        return shutil._ntuple_diskusage(1 << 40, 0, 0 if is_full else 1 << 40)  # type: ignore[attr-defined]

    path, _ = _zip(tmp_path)
    monkeypatch.delattr(source_copy.os, "memfd_create", raising=False)
    monkeypatch.setattr(source_copy.shutil, "disk_usage", disk_usage)
    origin = source_copy.open_source(path, folder=tmp_path)
    assert (origin.copy.parent.parent == tmp_path) == is_next_to_output
    assert origin.copy.read_bytes() == path.read_bytes()
    folders = [*origin.files.folders]
    origin.close()
    assert [folder.exists() for folder in folders] == [False]
    assert source_copy.open_source(path, folder=tmp_path / "missing").copy.read_bytes() == path.read_bytes()


def test_a_copy_that_is_still_mapped_is_removed_when_python_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normswap.checkpoints import source_copy

    later: list[Callable[[], None]] = []
    remove, path = shutil.rmtree, _zip(tmp_path)[0]
    monkeypatch.delattr(source_copy.os, "memfd_create", raising=False)
    monkeypatch.setattr(source_copy.shutil, "rmtree", lambda *_, **__: None)  # as Windows does with a mapped file
    monkeypatch.setattr(
        source_copy.atexit, "register", lambda _, *given, **how: later.append(lambda: remove(*given, **how))
    )
    origin = source_copy.open_source(path, folder=tmp_path)
    (folder,) = origin.files.folders
    origin.close()
    assert folder.exists()
    (at_the_end,) = later
    at_the_end()
    assert not folder.exists()


def test_a_copy_between_file_systems_is_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from normswap.checkpoints import source_copy

    def refuse(*_: Any) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(source_copy.os, "copy_file_range", refuse)
    path, _ = _zip(tmp_path)
    assert source_copy.open_source(path, folder=tmp_path).copy.read_bytes() == path.read_bytes()


@pytest.mark.multiprocess
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_change_at_any_moment_gives_no_output_or_the_tensors_of_one_version() -> None:
    """In a process of its own, which forks the conversions: this one may have threads."""
    command = [sys.executable, "-m", "benchmarks.robustness.source_changes", "--runs", str(RUNS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["broken"] == []
    assert sum(outcome["ended"].values()) == RUNS
    # How many are refused is up to chance; tests above change the source at chosen moments.
    assert {*outcome["ended"]} <= {"refused", "converted"}
