"""Bad files: one clear line, exit code 2 (1 where the answer is "no"), nothing written, no traceback, no code run."""

import contextlib
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import CheckpointError
from tests.helpers import files
from tests.helpers.refusals import assert_refused


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
        warnings.simplefilter("ignore")  # torch deprecates its own quantized tensors
        weight = torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)
        torch.save({"a": weight, "b": torch.ones(1)}, path)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "bad.pt: no such file"),
    "a folder": (Path.mkdir, "bad.pt: expected a checkpoint, got a folder without model.safetensors, pytorch_model"),
    "empty": (Path.touch, "bad.pt: the file is empty: copy or download it again"),
    "text": (lambda path: path.write_text("lr: 0.1\n" * 90), 'got text ("lr: 0.1'),
    "short text": (lambda path: path.write_text("hello"), 'got text ("hello"...)'),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><html>"), "got a web page: the download failed"),
    "a Git LFS pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"),
        "got a Git LFS pointer: fetch the real file with git lfs pull",
    ),
    "noise": (lambda path: path.write_bytes(bytes(range(128, 256))), "got an unknown format (80 81"),
    "an image": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0"), "got an image (PNG)"),
    "a huge header": (
        lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "expected a file of torch.save or safetensors, got an unknown format",
    ),
    "truncated zip": (
        _truncated("bn.pt", 0.6),
        "starts like a torch file and has no end record: truncated, copy it again",
    ),
    "truncated legacy": (_truncated("legacy.pt", 0.6), "its tensors declare 1,501,908 bytes, the file has "),
    "truncated legacy header": (_truncated("legacy.pt", 0.0001), "truncated or damaged, or pickled in an unusual"),
    "truncated safetensors": (_truncated("bn.safetensors", 0.6), "truncated or damaged ("),
    "truncated safetensors header": (_truncated("bn.safetensors", 0.001), "truncated or damaged ("),
    "damaged pickle": (_flipped, "truncated or damaged, or pickled in an unusual way ("),
    "newer pickle protocol": (_protocol_4, "pickled in an unusual way (Unsupported operand"),
    "a zip of something else": (_zip_of(readme="hi"), "expected a file of torch.save, got a zip archive without"),
    "TorchScript": (_torchscript, "got TorchScript, whose code cannot be changed: convert"),
    "several models": (
        lambda path: torch.save({"left": files.TiedNet().state_dict(), "right": files.TiedNet().state_dict()}, path),
        "bad.pt: has several models ('left', 'right'): select one, such as ",
    ),
    "weights on meta": (
        lambda path: torch.save(files.TiedNet().to("meta").state_dict(), path),
        "bad.pt: the tensor 'stem.weight' is on the meta device and has no values: load the weights",
    ),
    "quantized weights": (
        _quantised,
        "bad.pt: the tensor 'a' is quantized and its norms are fused into other layers: convert the",
    ),
    "numbers among tensors": (
        lambda path: torch.save({"a": torch.ones(1), "step": 3}, path),
        "expected a state dict or a module, got a mapping with the entry 'step' of type int and without a state dict",
    ),
    "numbers as names": (
        lambda path: torch.save({3: torch.ones(1)}, path),
        "expected a state dict or a module, got a mapping with the key 3 (int), whose tensors have no names",
    ),
    "a tensor": (
        lambda path: torch.save(torch.ones(1), path),
        "expected a state dict or a module, got Tensor",
    ),
    "no tensors": (lambda path: torch.save({}, path), "expected a state dict or a module, got an empty mapping"),
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


@pytest.mark.slow
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


def test_the_nearest_name_is_reported(folder: Path) -> None:
    assert_refused(folder, ["inspect", "legcy.pt"], 2, "legcy.pt: no such file; nearest: legacy.pt")
    assert_refused(folder, ["inspect", "nowhere/a.pt"], 2, "nowhere/a.pt: no such file, nor is there a folder nowhere")


@pytest.mark.slow
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
@pytest.mark.slow
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
    for message in ("never loaded",) if plain else ("has pickled objects", "loading them would run ", "pathlib.Path"):
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
        assert_refused(folder, arguments, 2, "more): pass --trust if you trust the source of the file")


def test_a_pickled_module_whose_class_is_not_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(files.TiedNet(), folder / "bad.pt")
    monkeypatch.delattr(files, "TiedNet")
    assert_refused(folder, ["inspect", "bad.pt", "--trust"], 2, "the classes in it cannot be imported")


def test_a_pickled_module_whose_code_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: object, _state: object) -> None:
        raise ValueError("of another version\nwith details")

    torch.save(files.TiedNet(), folder / "bad.pt")
    monkeypatch.setattr(files.TiedNet, "__setstate__", fail)
    message = "truncated or damaged, or its own code fails (of another version)"
    assert_refused(folder, ["inspect", "bad.pt", "--trust"], 2, message)
