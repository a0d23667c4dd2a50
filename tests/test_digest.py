"""The digest of a file: the same whatever its record says, another for any other tensor, name or shape."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import files
import pytest
import safetensors.torch
import torch

from normswap.checkpoints.checkpoint import sha256_of
from normswap.checkpoints.containers import Container, encode, sniff
from normswap.checkpoints.digest import digest_of

KINDS = pytest.mark.parametrize("container", ["torch zip", "safetensors"])


def written(path: Path, container: Container, record: str, **changes: torch.Tensor) -> str:
    torch.manual_seed(0)
    encode(path, container, dict(files.TiedNet().norm.state_dict()) | changes, record)
    assert sniff(path) == container
    return digest_of(path, container)


@KINDS
def test_the_record_does_not_count(tmp_path: Path, container: Container) -> None:
    first = written(tmp_path / "a", container, "{}")
    assert first == written(tmp_path / "b", container, "a longer record " * 1000)
    assert len(first) == 64
    assert sha256_of(tmp_path / "a") != sha256_of(tmp_path / "b")


@KINDS
def test_every_other_thing_counts(tmp_path: Path, container: Container) -> None:
    changes = [
        {},
        {"weight": torch.full((8,), 2.0)},
        {"weight": torch.ones(2, 4)},
        {"weight": torch.ones(8).int()},
        {"weights": torch.ones(8)},
    ]
    assert len({written(tmp_path / "a", container, "{}", **change) for change in changes}) == len(changes)


@KINDS
def test_every_bit_of_the_data_counts(tmp_path: Path, container: Container) -> None:
    first = written(tmp_path / "a", container, "{}")
    data = bytearray((tmp_path / "a").read_bytes())
    data[data.index(torch.ones(8).numpy().tobytes()) + 2] ^= 1
    (tmp_path / "a").write_bytes(data)
    assert digest_of(tmp_path / "a", container) != first


def _without_record(path: Path) -> None:
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def _packed_anew(path: Path) -> None:
    """Other order, other folder, other place, compressed: what a zip program may do."""
    with zipfile.ZipFile(path) as source:
        members = {name.partition("/")[2]: source.read(name) for name in reversed(source.namelist())}
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as target:
        for name, data in members.items():
            target.writestr(f"other/{name}", data)


@pytest.mark.parametrize(("container", "change"), [("safetensors", _without_record), ("torch zip", _packed_anew)])
def test_the_way_of_packing_does_not_count(
    tmp_path: Path, container: Container, change: Callable[[Path], None]
) -> None:
    first = written(tmp_path / "a", container, "{}")
    change(tmp_path / "a")
    assert digest_of(tmp_path / "a", container) == first


def test_of_a_legacy_pickle_all_of_the_file_counts(tmp_path: Path) -> None:
    torch.save(files.small_model().state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert digest_of(tmp_path / "a.pt", "legacy pickle") == sha256_of(tmp_path / "a.pt")
