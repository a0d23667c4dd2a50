"""Whether the chunks that the index of a distributed checkpoint lists cover every tensor once, in bytes of their own.

torch allocates a tensor as large as the index claims and fills it chunk by chunk: what no chunk covers stays whatever
lay in that memory. Nothing is read here but the index.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from normswap.errors import CheckpointError

_MOST_CHUNKS = 16_384  # of one tensor, which has at most one of every process


class _Bytes(NamedTuple):
    """Which bytes of which file an entry of the index lies in."""

    file: str
    begin: int
    end: int
    name: str


def check_chunks(folder: Path, index: Metadata) -> None:
    """Refuse an index whose tensors are not covered by their chunks exactly, or whose entries share or lack bytes.

    Raises:
        CheckpointError: a tensor has a hole, two chunks of it overlap or one lies outside it; a chunk has no place in a
            file, or one that reaches beyond the file or into the place of another.
    """
    places = []
    for name, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(folder, name, entry)
            keys = [MetadataIndex(name, chunk.offsets) for chunk in entry.chunks]
        else:
            keys = [MetadataIndex(name)]
        places += [_place(folder, name, (index.storage_data or {}).get(key)) for key in keys]
    _check_places(folder, places)


def _check_tensor(folder: Path, name: str, entry: TensorStorageMetadata) -> None:
    size, dtype = _lengths(entry.size), entry.properties.dtype
    if size is None or not isinstance(dtype, torch.dtype):
        _refuse(folder, name, "has no size of whole numbers, or no type")
    if len(entry.chunks) > _MOST_CHUNKS:
        _refuse(folder, name, f"has {len(entry.chunks):,} chunks, at most {_MOST_CHUNKS:,} are read")
    chunks = []
    for chunk in entry.chunks:
        begin, lengths = _lengths(chunk.offsets), _lengths(chunk.sizes)
        if begin is None or lengths is None or not len(begin) == len(lengths) == len(size):
            _refuse(folder, name, f"has a chunk that is not one of a tensor of {len(size)} dimensions")
        if any(first + length > whole for first, length, whole in zip(begin, lengths, size, strict=True)):
            _refuse(folder, name, f"has a chunk of the shape {lengths} at {begin}, outside its own shape {size}")
        if math.prod(lengths):
            chunks.append((begin, lengths))
    covered = sum(math.prod(lengths) for _, lengths in chunks)
    twice = _overlapping(chunks)
    if twice is not None:
        _refuse(folder, name, f"has chunks that overlap, at {twice[0]} and at {twice[1]}")
    if covered != math.prod(size):
        _refuse(folder, name, f"has {math.prod(size):,} numbers, of which its chunks cover {covered:,}")


def _overlapping(chunks: Sequence[tuple[Any, Any]]) -> tuple[Any, Any] | None:
    """The places of two chunks that share a number, or None."""
    if len(chunks) < 2 or not chunks[0][0]:
        return (chunks[0][0], chunks[1][0]) if len(chunks) > 1 else None
    begins = np.array([begin for begin, _ in chunks], dtype=np.int64)
    ends = begins + np.array([lengths for _, lengths in chunks], dtype=np.int64)
    for number in range(1, len(chunks)):
        shared = (begins[:number] < ends[number]) & (begins[number] < ends[:number])
        found = np.flatnonzero(shared.all(axis=1))
        if found.size:
            return chunks[int(found[0])][0], chunks[number][0]
    return None


def _place(folder: Path, name: str, info: Any) -> _Bytes:
    if info is None:
        _refuse(folder, name, "has a chunk that lies in no file")
    numbers = _lengths((info.offset, info.length))
    path = folder / info.relative_path
    if numbers is None or not path.is_file() or sum(numbers) > path.stat().st_size:
        _refuse(folder, name, f"lies beyond the bytes of the file {info.relative_path!r:.80}, or the file is missing")
    return _Bytes(info.relative_path, numbers[0], sum(numbers), name)


def _check_places(folder: Path, places: Sequence[_Bytes]) -> None:
    ordered = sorted(places)
    for before, after in pairwise(ordered):
        if before.file == after.file and after.begin < before.end:
            _refuse(folder, after.name, f"lies in bytes of {after.file} that {before.name!r:.80} lies in too")


def _lengths(values: Any) -> tuple[int, ...] | None:
    """Whole numbers that are not negative and of 64 bits, or None."""
    found = tuple(values) if isinstance(values, tuple | list) else None
    good = found is not None and all(type(value) is int and 0 <= value < 2**62 for value in found)
    return found if good else None


def _refuse(folder: Path, name: str, what: str) -> NoReturn:
    raise CheckpointError(f"{folder}: the entry {name!r:.80} of its index {what}: damaged or incomplete, copy it again")
