"""Folders of `torch.distributed.checkpoint` (DCP), read and written in one process without running code from a file.

The reader of torch unpickles the index of the folder, and every value that is not a tensor, without a check. Here an
unpickler that knows only the classes of an index reads the index, and `weights_only` reads the values. `check_chunks`
requires that the chunks in the index cover every tensor exactly once and share no bytes.
"""

import collections
import io
import math
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.futures import Future

from normswap.checkpoints.formats.archive_checks import check_archive, check_calls, check_tuple_size, check_zip_pickle
from normswap.checkpoints.formats.hf_folder import INDEX
from normswap.checkpoints.formats.pickle_opcodes import summarize_pickle
from normswap.checkpoints.formats.plain_values import (
    path_globals,
    plain_globals,
    torch_error_message,
    user_safe_globals,
)
from normswap.errors import CheckpointError

# --- checks of the index

_MAX_CHUNKS = 16_384  # per tensor, which has at most one chunk per process


class _ByteRange(NamedTuple):
    """The bytes of a file that store the entry `name` of the index."""

    file: str
    begin: int
    end: int
    name: str


def check_chunks(folder: Path, index: Metadata) -> None:
    """Refuse an index whose chunks do not cover every tensor exactly once, or whose entries share or lack bytes.

    Raises:
        CheckpointError: a tensor has a gap, two of its chunks overlap or one is outside its shape; the bytes of a
            chunk are in no file, beyond its end, or those of another chunk.
    """
    byte_ranges = []
    for name, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(folder, name, entry)
            keys = [MetadataIndex(name, chunk.offsets) for chunk in entry.chunks]
        else:
            keys = [MetadataIndex(name)]
        byte_ranges += [_locate_chunk(folder, name, (index.storage_data or {}).get(key)) for key in keys]
    _check_byte_ranges(folder, byte_ranges)


def _check_tensor(folder: Path, name: str, entry: TensorStorageMetadata) -> None:
    size, dtype = _parse_sizes(entry.size), entry.properties.dtype
    if size is None or not isinstance(dtype, torch.dtype):
        _refuse(folder, name, "has no valid size, or no dtype")
    if len(entry.chunks) > _MAX_CHUNKS:
        _refuse(folder, name, f"has {len(entry.chunks):,} chunks, expected at most {_MAX_CHUNKS:,}")
    chunks = []
    for chunk in entry.chunks:
        begin, lengths = _parse_sizes(chunk.offsets), _parse_sizes(chunk.sizes)
        if begin is None or lengths is None or not len(begin) == len(lengths) == len(size):
            _refuse(folder, name, f"has a chunk with another number of dimensions than {len(size)}")
        if any(first + length > total for first, length, total in zip(begin, lengths, size, strict=True)):
            _refuse(folder, name, f"has a chunk with the shape {lengths} at {begin}, outside its own shape {size}")
        if math.prod(lengths):
            chunks.append((begin, lengths))
    covered = sum(math.prod(lengths) for _, lengths in chunks)
    overlap = _find_overlap(chunks)
    if overlap is not None:
        _refuse(folder, name, f"has overlapping chunks, at {overlap[0]} and at {overlap[1]}")
    if covered != math.prod(size):
        _refuse(folder, name, f"has {math.prod(size):,} elements, its chunks cover {covered:,}")


def _find_overlap(chunks: Sequence[tuple[Any, Any]]) -> tuple[Any, Any] | None:
    """The offsets of two chunks that share an element, or None."""
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


def _locate_chunk(folder: Path, name: str, info: Any) -> _ByteRange:
    if info is None:
        _refuse(folder, name, "has a chunk without a file")
    numbers = _parse_sizes((info.offset, info.length))
    path = folder / info.relative_path
    if numbers is None or not path.is_file() or sum(numbers) > path.stat().st_size:
        _refuse(
            folder, name, f"has bytes beyond the end of the file {info.relative_path!r:.80}, or the file is missing"
        )
    return _ByteRange(info.relative_path, numbers[0], sum(numbers), name)


def _check_byte_ranges(folder: Path, byte_ranges: Sequence[_ByteRange]) -> None:
    ordered = sorted(byte_ranges)
    for before, after in pairwise(ordered):
        if before.file == after.file and after.begin < before.end:
            _refuse(folder, after.name, f"shares bytes of {after.file} with {before.name!r:.80}")


def _parse_sizes(values: Any) -> tuple[int, ...] | None:
    """The values as nonnegative integers of 64 bits, or None if one is not."""
    found = tuple(values) if isinstance(values, tuple | list) else None
    is_valid = found is not None and all(type(value) is int and 0 <= value < 2**62 for value in found)
    return found if is_valid else None


def _refuse(folder: Path, name: str, what: str) -> NoReturn:
    raise CheckpointError(f"{folder}: the entry {name!r:.80} of its index {what}: damaged or incomplete, copy it again")


# --- reading and writing

_NON_TENSOR = object()


def read_distributed(folder: Path) -> dict[str, Any]:
    """Return the content of the checkpoint in `folder`, nested as it was saved, on the CPU.

    Raises:
        CheckpointError: the index names code or files outside the folder, or a value is damaged or names code.
    """
    reader = _Reader(folder)
    index = reader.read_metadata()
    _check_sizes(folder, index)
    check_chunks(folder, index)
    flat = {name: _allocate_target(entry) for name, entry in index.state_dict_metadata.items()}
    try:
        with _suppress_single_process_warnings():
            load(flat, storage_reader=reader, planner=_Planner(), no_dist=True)
    except CheckpointException as error:  # a BaseException with one failure per process
        cause, _ = next(iter(error.failures.values()))
        if isinstance(cause, CheckpointError):
            raise cause from None
        raise CheckpointError(
            f"{folder}: truncated or damaged, or has pickled objects besides tensors and plain data "
            f"({torch_error_message(cause)}): copy it again, or save only tensors and plain data"
        ) from cause
    content: dict[str, Any] = {}
    for name, value in flat.items():
        path = (index.planner_data or {}).get(name, (name,))
        _insert(content, path if isinstance(path, tuple) else (path,), value)
    return cast("dict[str, Any]", _restore_structure(content))


def write_distributed(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as a checkpoint into the existing, empty `folder`."""
    with _suppress_single_process_warnings():
        save(dict(content), storage_writer=FileSystemWriter(folder), no_dist=True)


class _Reader(FileSystemReader):
    """A reader of torch that runs no code from the folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Return the index, which may name only the classes of an index and files in the folder."""
        path = Path(self.path) / INDEX
        data = path.read_bytes()
        summary = summarize_pickle(io.BytesIO(data))
        check_tuple_size(path, summary)
        if not summary.is_complete or summary.max_memo_index > len(data):  # the unpickler would allocate its memo
            raise CheckpointError(f"{path}: truncated or damaged: copy it again")
        found = _IndexUnpickler(io.BytesIO(data)).load()
        if not isinstance(found, metadata.Metadata) or not isinstance(found.state_dict_metadata, dict):
            raise CheckpointError(f"{path}: expected the index of a distributed checkpoint, got something else")
        for info in (found.storage_data or {}).values():
            if PurePath(info.relative_path).name != info.relative_path:
                raise CheckpointError(f"{path}: names a file outside its folder ({info.relative_path!r})")
        meta = getattr(found, "storage_meta", None) or metadata.StorageMeta()
        meta.load_id = self.load_id
        found.storage_meta = meta
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the entries in the plan; each is an archive, and is checked like a separate file."""
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            path = Path(self.path) / info.relative_path
            with open(path, "rb") as file:
                file.seek(info.offset)
                stored = io.BytesIO(file.read(info.length))
            unpacked = self.transforms.transform_load_stream(item, info.transform_descriptors or (), stored)
            value = _load_entry(path, io.BytesIO(unpacked.read(-1)))
            if item.type == LoadItemType.BYTE_IO:
                cast(_Planner, planner).put(item, value)
            else:
                _copy_chunk(path, item, value, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class _Planner(DefaultLoadPlanner):
    """A planner of torch that loads by flat names."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def put(self, item: ReadItem, value: Any) -> None:
        """Store a value that is not a tensor in the index."""
        self.state_dict[item.dest_index.fqn] = value


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler that knows only dtypes and the classes of an index, all of them plain records."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a known class or dtype.

        Raises:
            CheckpointError: the index names something else.
        """
        known = _INDEX_CLASSES.get(f"{module}.{name}")
        if known is not None:
            return known
        if (module, name) == ("builtins", "getattr"):
            return _member
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise CheckpointError(
            f"the index of the distributed checkpoint names {module}.{name}, expected only the classes of an index: "
            "damaged or malicious, download it again"
        )


def _member(owner: Any, name: Any) -> Any:
    """Return a member of a known enumeration: early versions of Python 3.11 write one as a call of `getattr`.

    Raises:
        CheckpointError: the index asks for anything else.
    """
    if isinstance(owner, type) and issubclass(owner, Enum) and isinstance(name, str) and name in owner.__members__:
        return owner.__members__[name]
    raise CheckpointError(
        "the index of the distributed checkpoint reads an attribute that is no member of an enumeration: damaged or "
        "malicious, download it again"
    )


def _load_entry(path: Path, part: io.BytesIO) -> Any:
    """The value of one entry: a tensor or plain data."""
    check_archive(path, part)
    summary = check_zip_pickle(path, part)
    part.seek(0)
    with plain_globals() as restored, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch first warns about what it then refuses
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(part)
        if unsafe:
            raise CheckpointError(
                f"{path}: has pickled objects besides tensors and plain data ({sorted(unsafe)[0]:.80}), which are "
                "never loaded from a distributed checkpoint: save only tensors and plain data"
            )
        part.seek(0)
        check_calls(path, summary, user_safe_globals())
        return restored(torch.load(part, map_location="cpu", weights_only=True))


def _copy_chunk(path: Path, item: ReadItem, stored: Any, planner: LoadPlanner) -> None:
    """Copy a chunk into its tensor; refuse another shape or dtype, which `copy_` would broadcast or convert."""
    target = planner.resolve_tensor(item).detach()
    if not isinstance(stored, torch.Tensor) or (stored.shape, stored.dtype) != (target.shape, target.dtype):
        found = f"{tuple(stored.shape)} {stored.dtype}" if isinstance(stored, torch.Tensor) else type(stored).__name__
        raise CheckpointError(
            f"{path}: {item.dest_index.fqn!r:.80} is {found}, expected {tuple(target.shape)} {target.dtype} by the "
            "index: damaged, copy it again"
        )
    target.copy_(stored)
    planner.commit_tensor(item, target)


def _collect_classes(module: Any, names: tuple[str, ...]) -> dict[str, Any]:
    found = {name: getattr(module, name, None) for name in names}
    return {f"{module.__name__}.{name}": value for name, value in found.items() if value is not None}


_INDEX_CLASSES: Mapping[str, Any] = {
    **_collect_classes(
        metadata,
        (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
    ),
    **_collect_classes(filesystem, ("_StorageInfo", "_StoragePrefix")),
    **_collect_classes(torch.serialization, ("_get_layout",)),
    **_collect_classes(torch, ("Size",)),
    **_collect_classes(collections, ("OrderedDict",)),
    **path_globals(),
}


def _check_sizes(folder: Path, index: metadata.Metadata) -> None:
    """Refuse an index whose tensors are larger than the files, since torch would allocate them first."""
    tensors = [e for e in index.state_dict_metadata.values() if isinstance(e, metadata.TensorStorageMetadata)]
    declared = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in tensors)
    actual = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if declared > actual:
        raise CheckpointError(
            f"{folder}: its index declares tensors of {declared:,} bytes, the files have {actual:,}: truncated or "
            "damaged, copy it again"
        )


def _allocate_target(entry: Any) -> Any:
    if isinstance(entry, metadata.TensorStorageMetadata):
        return torch.empty(entry.size, dtype=entry.properties.dtype)
    return _NON_TENSOR


def _insert(content: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    *parents, last = path
    for key in parents:
        content = content.setdefault(key, {})
    if last in content:
        raise CheckpointError(
            f"the index of the distributed checkpoint has two entries at {path!r:.80}: damaged, copy it again"
        )
    content[last] = value


def _restore_structure(value: Any) -> Any:
    """Restore lists, saved as mappings with the keys 0, 1, 2, ..., and the numbers in the state of an optimizer.

    The format stores names only.
    """
    if not isinstance(value, dict):
        return value
    inner = {key: _restore_structure(item) for key, item in value.items()}
    if inner and [*inner] == [*range(len(inner))]:
        return list(inner.values())
    if isinstance(inner.get("state"), dict) and "param_groups" in inner:
        numbered = {int(key) if str(key).isdecimal() else key: item for key, item in inner["state"].items()}
        inner["state"] = numbered
    return inner


@contextmanager
def _suppress_single_process_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        yield
