"""Distributed checkpoints and indexes of shards: every element of a tensor comes from one place in the files."""

import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.distributed import checkpoint as distributed
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, ChunkStorageMetadata, MetadataIndex

import normswap
from normswap.checkpoints.formats import dcp_folder
from normswap.checkpoints.formats.formats import decode, detect_format
from normswap.errors import CheckpointError

SIZE = (4, 6)


@pytest.fixture
def content() -> dict[str, Any]:
    return {"w": torch.arange(24.0).reshape(SIZE), "b": torch.arange(3), "n": torch.tensor(2.0), "e": torch.zeros(0, 3)}


@pytest.fixture
def step(tmp_path: Path, content: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed.save({**content, "epoch": 3}, checkpoint_id=tmp_path / "step", no_dist=True)
    return tmp_path / "step"


def _edit(step: Path, change: Callable[[Any], Any]) -> None:
    index = pickle.loads((step / ".metadata").read_bytes())
    change(index)
    (step / ".metadata").write_bytes(pickle.dumps(index))


def _cut(step: Path, pieces: dict[tuple[int, ...], torch.Tensor], name: str = "w") -> None:
    """Store `name` in separate chunks, each at the offsets that its key gives."""
    whole = pickle.loads((step / ".metadata").read_bytes())
    info = next(iter(whole.storage_data.values()))
    data, places = b"", {}
    for place, piece in pieces.items():
        buffer = io.BytesIO()
        torch.save(piece, buffer)
        places[place] = type(info)("__1_0.distcp", len(data), len(buffer.getvalue()))
        data += buffer.getvalue()
    (step / "__1_0.distcp").write_bytes(data)

    def change(index: Any) -> None:
        index.storage_data = {key: value for key, value in index.storage_data.items() if key.fqn != name}
        index.storage_data |= {MetadataIndex(name, torch.Size(place)): value for place, value in places.items()}
        index.state_dict_metadata[name].chunks = [
            ChunkStorageMetadata(torch.Size(place), piece.shape) for place, piece in pieces.items()
        ]

    _edit(step, change)


def _pieces(whole: torch.Tensor, *places: tuple[slice, slice]) -> dict[tuple[int, ...], torch.Tensor]:
    return {(rows.start, columns.start): whole[rows, columns].clone() for rows, columns in places}


HALVES = ((slice(0, 2), slice(0, 6)), (slice(2, 4), slice(0, 6)))
PINWHEEL = (
    (slice(0, 1), slice(0, 4)),
    (slice(0, 3), slice(4, 6)),
    (slice(3, 4), slice(2, 6)),
    (slice(1, 4), slice(0, 2)),
    (slice(1, 3), slice(2, 4)),
)


@pytest.mark.parametrize("places", [HALVES, PINWHEEL], ids=["rows", "a pinwheel"])
def test_chunks_that_cover_a_tensor_are_read(step: Path, content: dict[str, Any], places: Any) -> None:
    _cut(step, _pieces(content["w"], *places))
    found = decode(step, detect_format(step), trust=False)
    assert all(torch.equal(found[key], content[key]) for key in content)
    assert found["epoch"] == 3


def _without(name: str, count: int | None = None) -> Callable[[Path], None]:
    def change(index: Any) -> None:
        entry = index.state_dict_metadata[name]
        entry.chunks = entry.chunks[:count] if count else []

    return lambda step: _edit(step, change)


def _chunk(step: Path, **changed: Any) -> None:
    def change(index: Any) -> None:
        chunk = index.state_dict_metadata["w"].chunks[0]
        for key, value in changed.items():
            setattr(chunk, key, value)

    _edit(step, change)


def _info(step: Path, change: Callable[[Any], None], name: str = "w") -> None:
    _edit(step, lambda index: [change(info) for key, info in index.storage_data.items() if key.fqn == name])


def _same_bytes(index: Any) -> None:
    places = {key.fqn: info for key, info in index.storage_data.items()}
    for key in list(index.storage_data):
        if key.fqn == "w":
            index.storage_data[key] = places["b"]


def _halves(step: Path, *places: tuple[slice, slice]) -> None:
    _cut(step, _pieces(torch.arange(24.0).reshape(SIZE), *places))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no chunks": (_without("w"), "'w' of its index has 24 elements, its chunks cover 0"),
    "no chunks of a number": (_without("n"), "'n' of its index has 1 elements, its chunks cover 0"),
    "a hole": (lambda step: _halves(step, HALVES[0]), "has 24 elements, its chunks cover 12"),
    "a hole inside": (lambda step: _halves(step, *PINWHEEL[:4]), "has 24 elements, its chunks cover 20"),
    "an overlap": (
        lambda step: _halves(step, HALVES[0], (slice(1, 4), slice(0, 6))),
        "has overlapping chunks, at (0, 0) and at (1, 0)",
    ),
    "an overlap that fills a hole": (
        lambda step: _halves(step, HALVES[0], (slice(1, 3), slice(0, 6))),
        "has overlapping chunks, at (0, 0) and at (1, 0)",
    ),
    "a chunk outside": (lambda step: _chunk(step, offsets=torch.Size([1, 0])), "outside its own shape (4, 6)"),
    "a chunk of other dimensions": (
        lambda step: _chunk(step, sizes=torch.Size([24])),
        "another number of dimensions than 2",
    ),
    "a negative chunk": (lambda step: _chunk(step, offsets=(-1, 0)), "another number of dimensions than 2"),
    "a chunk of no numbers": (lambda step: _chunk(step, sizes=("4", "6")), "another number of dimensions than 2"),
    "a size of no numbers": (
        lambda step: _edit(step, lambda index: setattr(index.state_dict_metadata["b"], "size", (3.0,))),
        "has no valid size, or no dtype",
    ),
    "many chunks": (
        lambda step: _edit(step, lambda i: setattr(i.state_dict_metadata["w"], "chunks", [None] * 20_000)),
        "has 20,000 chunks, expected at most 16,384",
    ),
    "a chunk in no file": (
        lambda step: _edit(step, lambda index: index.storage_data.pop(MetadataIndex("w", torch.Size([0, 0])))),
        "has a chunk without a file",
    ),
    "a value in no file": (
        lambda step: _edit(step, lambda index: index.storage_data.pop(MetadataIndex("epoch"))),
        "'epoch' of its index has a chunk without a file",
    ),
    "a place beyond the file": (lambda s: _info(s, lambda i: setattr(i, "offset", 10**6)), "has bytes beyond the end"),
    "a negative place": (lambda s: _info(s, lambda i: setattr(i, "offset", -1)), "has bytes beyond the end"),
    "a missing file": (lambda s: _info(s, lambda i: setattr(i, "relative_path", "x")), "or the file is missing"),
    "the place of another": (lambda step: _edit(step, _same_bytes), "shares bytes of __0_0.distcp with "),
    "another type": (
        lambda step: _cut(step, {(0, 0): torch.arange(24).reshape(SIZE)}),
        "'w' is (4, 6) torch.int64, expected (4, 6) torch.float32 by the index",
    ),
    "another shape": (
        lambda step: (_cut(step, {(0, 0): torch.zeros(5, 7)}), _chunk(step, sizes=torch.Size(SIZE))),
        "'w' is (5, 7) torch.float32, expected (4, 6) torch.float32 by the index",
    ),
    "one number for all": (
        lambda step: (_cut(step, {(0, 0): torch.zeros(1, 1)}), _chunk(step, sizes=torch.Size(SIZE))),
        "'w' is (1, 1) torch.float32",
    ),
    "a value for a tensor": (
        lambda step: _edit(
            step,
            lambda i: i.storage_data.update(
                {MetadataIndex("w", torch.Size([0, 0])): i.storage_data.pop(MetadataIndex("epoch"))}
            )
            or i.state_dict_metadata.pop("epoch"),
        ),
        "'w' is int, expected",
    ),
    "two entries at one place": (
        lambda step: _edit(step, lambda index: index.planner_data.update(b=("w",), w=("w",))),
        "has two entries at ('w',)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_no_tensor_is_read_from_memory_that_no_file_filled(
    step: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(step)
    with pytest.raises(CheckpointError) as caught:
        normswap.load(step, architecture="timm:test_resnet")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_chunk_is_an_archive_that_is_checked(step: Path) -> None:
    """A view beyond its storage: torch would extend the storage by uninitialized memory."""
    good = io.BytesIO()
    torch.save(torch.zeros(SIZE), good)
    info = pickle.loads((step / ".metadata").read_bytes()).storage_data[MetadataIndex("w", torch.Size([0, 0]))]
    data = bytearray((step / info.relative_path).read_bytes())
    part = bytes(data[info.offset : info.offset + info.length])
    forged = part.replace(b"K\x04K\x06\x86", b"K\x04K\x07\x86")
    assert forged != part
    data[info.offset : info.offset + info.length] = forged
    (step / info.relative_path).write_bytes(data)
    with pytest.raises(CheckpointError):
        decode(step, detect_format(step), trust=False)


def _sharded(folder: Path, content: dict[str, Any], placed: dict[str, str], kind: str) -> None:
    folder.mkdir()
    stem, ending = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    for number in (1, 2):
        part = {key: value for key, value in content.items() if placed[key] == str(number)}
        path = folder / f"{stem}-{number}{ending}"
        safetensors.torch.save_file(part, path) if kind == "safetensors" else torch.save(part, path)
    weight_map = {key: f"{stem}-{number}{ending}" for key, number in placed.items()}
    (folder / f"{stem}{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))


PLACED = {"w": "1", "b": "2", "n": "2", "e": "2"}
MAPS: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
    "a tensor that is nowhere": (lambda m: m.update(x=m["w"]), "index.json lists 1 tensors that are missing here (x)"),
    "a tensor in another file": (lambda m: m.update(w=m["b"]), "tensors that"),
    "a tensor that is not named": (lambda m: m.pop("b"), ": 1 tensors that "),
    "a missing file": (lambda m: m.update(w="gone"), "lists the shard 'gone', which is not in"),
    "a file elsewhere": (lambda m: m.update(w="../step/.metadata"), "which is not in"),
}


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize(("change", "message"), MAPS.values(), ids=MAPS)
def test_an_index_of_shards_lists_their_tensors(
    step: Path, content: dict[str, Any], change: Callable[[dict[str, str]], Any], message: str, kind: str
) -> None:
    folder = step.parent / "shards"
    _sharded(folder, content, PLACED, kind)
    assert decode(folder, detect_format(folder), trust=False).keys() == content.keys()
    path = next(folder.glob("*.index.json"))
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        decode(folder, detect_format(folder), trust=False)
    assert message in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(step: Path, content: dict[str, Any]) -> None:
    folder = step.parent / "shards"
    _sharded(folder, content, PLACED, "safetensors")
    safetensors.torch.save_file(content, folder / "model-2.safetensors")
    with pytest.raises(CheckpointError, match="is in another shard too: remove the stale shards"):
        decode(folder, detect_format(folder), trust=False)


def _call_of_getattr(owner: str, name: str) -> bytes:
    """Return a pickle that calls `getattr`, as Python before 3.11.4 writes a member of an enumeration."""
    return f"cbuiltins\ngetattr\n(c{owner}\nV{name}\ntR.".encode()


def test_members_of_enumerations_as_early_versions_of_python_write_them() -> None:
    enumeration = "torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING"
    found = dcp_folder._IndexUnpickler(io.BytesIO(_call_of_getattr(enumeration, "TORCH_CHANNELS_LAST"))).load()
    assert found is _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    for owner, name in (
        (enumeration, "__class__"),
        (enumeration, "mro"),
        ("torch.distributed.checkpoint.metadata\nTensorProperties", "create_from_tensor"),
    ):
        with pytest.raises(CheckpointError, match="reads an attribute that is no member of an enumeration"):
            dcp_folder._IndexUnpickler(io.BytesIO(_call_of_getattr(owner, name))).load()
