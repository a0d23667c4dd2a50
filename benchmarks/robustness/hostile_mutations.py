"""Mutations that an attacker would make: forged numpy objects, folder indexes and names of models."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

from benchmarks.robustness.files import Material

HOLES = "hole in an index"
_EXTREMES = (-1, 0, 1, 3, 2**31, 2**62, 2**63 - 1)


def numpy_object(data: bytes, use: Material) -> bytes:
    """Insert a numpy array or dtype with forged fields as a value that is dropped or kept."""
    random = use.random
    dtype = random.choice(("f4", "f8", "i8", "?", "c16", "V8", "O", "U2", "S4", "M8[s]", [("a", "O"), ("b", "f4")]))
    array = np.empty(random.choice(((), (1,), (2, 3))), dtype)
    if not array.dtype.hasobject:
        array = np.zeros_like(array)
    value = array if random.random() < 0.7 else array.dtype
    body = bytearray(pickle.dumps(value, 2)[2:-1])
    for _ in range(random.choice((0, 1, 1, 3))):
        _forge(body, use)
    place = data.find(b"\x80") + 2
    # If kept, it stays on the stack below the value of the pickle, which overwrites its memo entries.
    return data[:place] + bytes(body) + random.choice((b"0", b"")) + data[place:]


def _forge(body: bytearray, use: Material) -> None:
    """Change one small number, one letter of a dtype, or the length of a string."""
    random = use.random
    changes: tuple[Callable[[], None], ...] = (
        lambda: _replace(body, b"K", bytes([random.choice((0, 1, 2, 16, 63, 255))]), use),
        lambda: _replace(body, b"J", struct.pack("<i", random.choice((-1, 0, 63, 2**31 - 1))), use),
        lambda: _replace(body, b"X\x02\0\0\0", random.choice((b"O8", b"V8", b"f8", b"g8", b"U2")), use),
        lambda: _replace(body, b"X\x01\0\0\0", random.choice((b"<", b">", b"|", b"x")), use),
        lambda: _replace(body, b"X", struct.pack("<I", random.choice((0, 1, 7, 9))), use),
    )
    random.choice(changes)()


def _replace(body: bytearray, before: bytes, new: bytes, use: Material) -> None:
    places = [place for place in range(len(body)) if body.startswith(before, place)]
    if places:
        start = use.random.choice(places) + len(before)
        body[start : start + len(new)] = new


def holes(folder: Path, use: Material) -> None:
    """Change chunks or file names in the index of a folder; the tensor data stay."""
    index = folder / ".metadata"
    if index.is_file():
        found = pickle.loads(index.read_bytes())
        _change_chunks(found, use)
        index.write_bytes(pickle.dumps(found))
        return
    path = next(folder.glob("*.index.json"))
    document = json.loads(path.read_text())
    _change_map(document["weight_map"], use)
    path.write_text(json.dumps(document))


def _change_chunks(index: Any, use: Material) -> None:
    random = use.random
    tensors = {name: e for name, e in index.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)}
    name = random.choice(sorted(tensors))
    entry = tensors[name]
    chunk = entry.chunks[0]
    info = next(info for key, info in sorted(index.storage_data.items(), key=str) if key.fqn == name)
    extreme = random.choice(_EXTREMES)
    changes: tuple[Callable[[], Any], ...] = (
        lambda: setattr(entry, "chunks", []),
        lambda: setattr(entry, "chunks", [chunk, chunk]),
        lambda: setattr(entry, "chunks", [ChunkStorageMetadata(chunk.offsets, torch.Size([1] * len(chunk.sizes)))]),
        lambda: setattr(entry, "chunks", [ChunkStorageMetadata(torch.Size([7] * len(chunk.sizes)), chunk.sizes)]),
        lambda: setattr(chunk, "sizes", tuple(extreme for _ in chunk.sizes)),
        lambda: setattr(chunk, "offsets", tuple(extreme for _ in chunk.offsets)),
        lambda: setattr(entry, "size", torch.Size([2 * length for length in entry.size])),
        lambda: setattr(entry.properties, "dtype", random.choice((torch.float64, torch.int8, torch.float16))),
        lambda: setattr(info, "offset", extreme),
        lambda: setattr(info, "length", extreme),
        lambda: setattr(info, "relative_path", random.choice(("../x", "/etc/hostname", "x", "", "."))),
        lambda: index.storage_data.clear(),
    )
    random.choice(changes)()


def _change_map(weight_map: dict[str, Any], use: Material) -> None:
    random = use.random
    key = random.choice(sorted(weight_map))
    files = sorted({*weight_map.values()})
    changes: tuple[Callable[[], Any], ...] = (
        lambda: weight_map.pop(key),
        lambda: weight_map.update({"missing": weight_map[key]}),
        lambda: weight_map.update({key: next(file for file in files if file != weight_map[key])}),
        lambda: weight_map.update({key: random.choice(("../" + files[0], "/etc/hostname", "", ".", "gone", 3, None))}),
    )
    random.choice(changes)()


def added_record(folder: Path, use: Material) -> None:
    """Add a record that names an architecture of a payload."""
    record = {"version": 1, "payload": "state dict", "architecture": use.random.choice(use.payloads.architectures)}
    (folder / "normswap.json").write_text(json.dumps(record))


def added_configuration(folder: Path, use: Material) -> None:
    """Add a config.json, as libraries that build models from a folder expect."""
    random = use.random
    planted = random.choice(use.payloads.architectures)
    config = random.choice(
        (
            {
                "model_type": random.choice(("resnet", "x", "../x")),
                "auto_map": {"AutoModel": planted},
                "architectures": [random.choice(("ResNetModel", "os.system"))],
            },
            {"architecture": planted.partition(":")[2]},
            {
                "architecture": "fuzzing_net",
                "model_args": {random.choice(("checkpoint_path", "pretrained", "x")): planted},
            },
            {"architecture": "fuzzing_net", "num_classes": random.choice((10**12, -1, "x", [[1]], {}))},
            {"model_type": "resnet", "_attn_implementation": planted},
            {"model_type": "detr", "backbone": planted, "use_pretrained_backbone": True},
        )
    )
    (folder / "config.json").write_text(json.dumps(config))
