"""Model folders as Hugging Face libraries write them: weights in one file or in shards with an index, a config beside.

Tensors by key come out of all shards, and go back into the shard that held their neighbours. Other files of the folder
are copied. Which reader opens a shard is the caller's: this room knows names, not formats.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from torch import Tensor

from normswap.errors import CheckpointError

# In the order in which transformers looks for them.
_SAFETENSORS = ("model.safetensors.index.json", "model.safetensors", "diffusion_pytorch_model.safetensors")
_TORCH = ("pytorch_model.bin.index.json", "pytorch_model.bin")
_COPIED = {".json", ".txt", ".md", ".model"}
_USED = {*_COPIED, ".safetensors", ".bin", ".pt", ".pth", ".distcp"}
RECORD = "normswap.json"
INDEX = ".metadata"  # of torch.distributed.checkpoint

ShardKind = Literal["safetensors", "torch"]


@dataclass(frozen=True)
class Shards:
    """The weight files of a folder: `weight_map` names the file of each key where an index says so, else there is
    one file. `metadata` is the index's own note (total sizes), passed on.
    """

    folder: Path
    kind: ShardKind
    index: str | None
    files: tuple[str, ...]
    weight_map: Mapping[str, str]
    metadata: Mapping[str, Any]


def find_shards(folder: Path) -> Shards | None:
    """Return the weight files in a folder, or None where there are none.

    Raises:
        CheckpointError: the index is none, or names files that are not in the folder.
    """
    for names, kind in ((_SAFETENSORS, "safetensors"), (_TORCH, "torch")):
        for name in names:
            if (folder / name).is_file():
                return _find_indexed(folder, name, kind) if name.endswith(".json") else _find_single(folder, name, kind)  # type: ignore[arg-type]
    return None


def check_links(folder: Path) -> None:
    """Refuse a folder of which a file that is read or copied is a link to somewhere else.

    The snapshots in the cache of huggingface_hub are made of links to the `blobs` beside them, which are fine.

    Raises:
        CheckpointError: there is such a link.
    """
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    for entry in sorted(folder.iterdir()):
        # A link that leads nowhere or round in a circle is no file for any reader.
        if entry.is_symlink() and entry.exists() and (entry.suffix in _USED or entry.name == INDEX):
            target = entry.resolve()
            if not target.is_relative_to(root) and target.parent != blobs:
                raise CheckpointError(f"{entry}: a link out of the folder, to {target}: copy that file there, by cp -L")


def assign_shard(key: str, shards: Shards) -> str:
    """Return the file that `key` belongs into: its own, else the one that holds its module or the nearest around it."""
    owner = key
    while owner:
        if owner in shards.weight_map:
            return shards.weight_map[owner]
        owner = owner.rpartition(".")[0]
        known_keys = next((name for known, name in shards.weight_map.items() if known.startswith(f"{owner}.")), None)
        if known_keys is not None:
            return known_keys
    return shards.files[0]


def write_index(folder: Path, shards: Shards, weight_map: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write the index of the shards in `folder`, with the sizes of what they hold now."""
    if shards.index is None:
        return
    sizes = {
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
    }
    recorded = {**shards.metadata, **{key: value for key, value in sizes.items() if key in shards.metadata}}
    index = {"metadata": recorded, "weight_map": dict(weight_map)}
    (folder / shards.index).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def list_text_files(folder: Path) -> list[str]:
    """Return the names of configurations and texts in a folder, the record and the index of shards among them."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_file() and entry.suffix in _COPIED)


def copy_other_files(source: Path, folder: Path, shards: Shards | None) -> None:
    """Copy configurations and texts that lie beside the weights of `source`."""
    own = {RECORD, *(shards.files if shards else ()), shards.index if shards else None}
    for name in list_text_files(source):
        if name not in own:
            shutil.copyfile(source / name, folder / name)


def _find_single(folder: Path, name: str, kind: ShardKind) -> Shards:
    return Shards(folder, kind, None, (name,), {}, {})


def _find_indexed(folder: Path, name: str, kind: ShardKind) -> Shards:
    path = folder / name
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        weight_map, metadata = index["weight_map"], index.get("metadata") or {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected an index of shards with a weight_map ({error!r}): copy it again"
        ) from None
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: expected an index of shards with a weight_map: copy it again")
    for file in {value if isinstance(value, str) else None for value in weight_map.values()}:
        if file is None or not _is_inside(folder, file):
            raise CheckpointError(f"{path}: names the shard {file!r:.80}, which is not in {folder}: copy it there")
    return Shards(folder, kind, name, tuple(sorted({*weight_map.values()})), weight_map, metadata)


def _is_inside(folder: Path, file: str) -> bool:
    try:
        return PurePath(file).name == file and (folder / file).is_file()
    except OSError:  # no file has a name as long as that
        return False
