"""Model folders of Hugging Face libraries: weights in one file, or in shards with an index, next to a configuration.

This module finds the weight files, assigns each key to a shard for writing (new keys follow their module) and copies
the other files of the folder. It knows file names only; `formats` reads and writes the shards.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from torch import Tensor

from normswap.errors import CheckpointError

# In the order of transformers.
_SAFETENSORS = ("model.safetensors.index.json", "model.safetensors", "diffusion_pytorch_model.safetensors")
_TORCH = ("pytorch_model.bin.index.json", "pytorch_model.bin")
_COPIED = {".json", ".txt", ".md", ".model"}
_USED = {*_COPIED, ".safetensors", ".bin", ".pt", ".pth", ".distcp"}
RECORD = "normswap.json"
INDEX = ".metadata"  # the index of torch.distributed.checkpoint

ShardKind = Literal["safetensors", "torch"]


@dataclass(frozen=True)
class Shards:
    """The weight files of a folder.

    Attributes:
        folder: the folder.
        kind: the format of the files.
        index: the name of the index, None if there is a single file.
        files: the names of the weight files.
        weight_map: key -> file, from the index.
        metadata: the metadata in the index, such as the total size.
    """

    folder: Path
    kind: ShardKind
    index: str | None
    files: tuple[str, ...]
    weight_map: Mapping[str, str]
    metadata: Mapping[str, Any]


def find_shards(folder: Path) -> Shards | None:
    """Return the weight files in a folder, or None if there are none.

    Raises:
        CheckpointError: the index is invalid, or lists files that are not in the folder.
    """
    for names, kind in ((_SAFETENSORS, "safetensors"), (_TORCH, "torch")):
        for name in names:
            if (folder / name).is_file():
                return _find_indexed(folder, name, kind) if name.endswith(".json") else _find_single(folder, name, kind)  # type: ignore[arg-type]
    return None


def check_links(folder: Path) -> None:
    """Refuse a folder if a file that would be read or copied is a link to a file outside the folder.

    Links to `blobs` in the cache of huggingface_hub are accepted: its snapshots consist of them.

    Raises:
        CheckpointError: the folder has such a link.
    """
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    for entry in sorted(folder.iterdir()):
        # Readers skip a broken or circular link.
        if entry.is_symlink() and entry.exists() and (entry.suffix in _USED or entry.name == INDEX):
            target = entry.resolve()
            if not target.is_relative_to(root) and target.parent != blobs:
                raise CheckpointError(
                    f"{entry}: a link to {target}, outside the folder: replace the link by a copy (cp -L)"
                )


def assign_shard(key: str, shards: Shards) -> str:
    """Return the file for `key`: its own, or else the file of its module or of the nearest module around it."""
    owner = key
    while owner:
        if owner in shards.weight_map:
            return shards.weight_map[owner]
        owner = owner.rpartition(".")[0]
        file = next((name for known, name in shards.weight_map.items() if known.startswith(f"{owner}.")), None)
        if file is not None:
            return file
    return shards.files[0]


def check_shard(path: Path, part: Mapping[str, Any], merged_tensors: Mapping[str, Any], shards: Shards) -> None:
    """Refuse a shard whose tensors differ from those that the index lists.

    Args:
        path: the shard.
        part: its tensors.
        merged_tensors: the tensors of the shards before it.
        shards: the weight files of the folder.

    Raises:
        CheckpointError: a tensor is missing, unexpected or in two shards.
    """
    duplicate = next((key for key in part if key in merged_tensors), None)
    if duplicate is not None:
        raise CheckpointError(f"{path}: {duplicate!r} is in another shard too: remove the stale shards")
    if shards.index is None:
        return
    missing = [key for key, file in shards.weight_map.items() if file == path.name and key not in part]
    if missing:
        raise CheckpointError(
            f"{path}: {shards.index} lists {len(missing)} tensors that are missing here ({missing[0]}): copy it again"
        )
    unexpected = [key for key in part if shards.weight_map.get(key) != path.name]
    if unexpected:
        raise CheckpointError(
            f"{path}: {len(unexpected)} tensors that {shards.index} does not list here ({unexpected[0]}): copy both "
            "files again"
        )


def write_index(folder: Path, shards: Shards, weight_map: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write the index of the shards in `folder`, with the total sizes of these tensors."""
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
    """Return the names of configuration and text files in a folder, including the record and the index of shards."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_file() and entry.suffix in _COPIED)


def copy_other_files(source: Path, folder: Path, shards: Shards | None) -> None:
    """Copy the configuration and text files of `source`, without its record and its index of shards."""
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
            raise CheckpointError(f"{path}: lists the shard {file!r:.80}, which is not in {folder}: copy it there")
    return Shards(folder, kind, name, tuple(sorted({*weight_map.values()})), weight_map, metadata)


def _is_inside(folder: Path, file: str) -> bool:
    try:
        return PurePath(file).name == file and (folder / file).is_file()
    except OSError:  # the name is too long
        return False
