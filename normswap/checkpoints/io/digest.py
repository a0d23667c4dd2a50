"""The fingerprint of a content, equal in every file format, and bitwise comparison of two contents."""

import hashlib
import json
import struct
from argparse import Namespace
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from normswap.checkpoints.io.memory import release_mapped_pages
from normswap.errors import CheckpointError

_CHUNK = 1 << 24
_COMPARE_CHUNK = 1 << 18  # two such chunks fit into the cache; larger ones halve the speed
# More than any training checkpoint has.
_MAX_LEAVES = 1_000_000
_MAX_DEPTH = 50


def fingerprint(content: Any, *, release_pages: bool = False) -> str:
    """Return the SHA-256, as hexadecimal digits, of every name, tensor and plain value in `content`.

    The digest covers the dtype, shape and bytes of tensors, and the state dict of modules. Of other objects it covers
    the type only, and it ignores empty lists and mappings. The order matters in lists, not in mappings.

    Args:
        content: nested mappings and lists, tensors and modules.
        release_pages: whether to release the pages of tensors that are mapped from a file once they are read; these
            tensors must not have been changed.

    Raises:
        CheckpointError: the content is nested too deeply, contains itself, or has too many values.
    """
    digest = hashlib.sha256()
    for path, value in _release_after_use(_iter_leaves(content)) if release_pages else _iter_leaves(content):
        digest.update(f"{path}\0{_describe_value(value)}\0".encode())
        if isinstance(value, Tensor):
            for chunk in _chunks(value, _CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def contents_equal(content: Any, other: Any, *, release_pages: bool = False) -> bool:
    """Return whether two contents have the same fingerprint, by a direct comparison, which is faster.

    Args:
        content, other: as for `fingerprint`.
        release_pages: whether to release the pages of `other`, as in `fingerprint`.

    Raises:
        CheckpointError: as `fingerprint`.
    """
    leaves = _release_after_use(_iter_leaves(other)) if release_pages else _iter_leaves(other)
    return all(
        path == other_path
        and _describe_value(value) == _describe_value(other_value)
        and _bytes_equal(value, other_value)
        for (path, value), (other_path, other_value) in zip_longest(
            _iter_leaves(content), leaves, fillvalue=("\0", None)
        )
    )


def safetensors_equals(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a safetensors file has exactly these tensors; reads the file in chunks."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        if header.keys() != tensors.keys():
            return False
        for name, entry in header.items():
            file.seek(8 + length + entry["data_offsets"][0])
            for chunk in _chunks(tensors[name], _COMPARE_CHUNK):
                if not numpy.array_equal(numpy.frombuffer(file.read(len(chunk)), numpy.uint8), chunk):
                    return False
    return True


def _bytes_equal(value: Any, other_value: Any) -> bool:
    if not isinstance(value, Tensor):
        return True
    pairs = zip(_chunks(value, _COMPARE_CHUNK), _chunks(other_value, _COMPARE_CHUNK), strict=True)
    return all(numpy.array_equal(one, other) for one, other in pairs)


def _release_after_use(leaves: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The leaves; the pages of those that the caller has used are released from time to time."""
    read: list[Tensor] = []
    size = 0
    for path, value in leaves:
        yield path, value
        if isinstance(value, Tensor):
            read.append(value)
            size += value.nbytes
        if size > _CHUNK:
            release_mapped_pages(read)
            read, size = [], 0


def _iter_leaves(content: Any) -> Iterator[tuple[str, Any]]:
    """All values in a content by key path; refuses a content that contains itself or expands without end."""
    stack = [iter([("", content)])]
    count = 0
    while stack:
        path, value = next(stack[-1], (None, None))
        if path is None:
            stack.pop()
            continue
        children = _iter_children(value, path)
        if children is not None:
            stack.append(children)
        else:
            count += 1
            yield path, value
        if len(stack) > _MAX_DEPTH or count > _MAX_LEAVES:
            raise CheckpointError(
                f"is nested more than {_MAX_DEPTH} levels deep or has more than {_MAX_LEAVES:,} values: save only "
                "weights and optimizer"
            )


def _iter_children(value: Any, path: str) -> Iterator[tuple[str, Any]] | None:
    """The items of a value by key path, or None if it is a leaf."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        keys = sorted(value, key=lambda key: (type(key).__name__, str(key)))
        return ((f"{path}/{key}", value[key]) for key in keys)
    if isinstance(value, list | tuple):
        return ((f"{path}/{index}", item) for index, item in enumerate(value))
    return None


def _describe_value(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {value.dtype} {tuple(value.shape)}"
    if isinstance(value, numpy.ndarray | numpy.generic):
        return f"{type(value).__name__} {value.dtype} {value.shape} {value.tolist()!r}"
    if isinstance(value, str | int | float | bool | complex | bytes | None):
        return repr(value)
    return type(value).__name__


def _as_bytes(tensor: Tensor) -> Tensor:
    # As bytes, since NaN != NaN and -0 == 0.
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8)


def _chunks(tensor: Tensor, length: int) -> Iterator[Any]:
    data = _as_bytes(tensor).numpy() if tensor.numel() else numpy.empty(0, numpy.uint8)
    for start in range(0, len(data), length):
        yield data[start : start + length]
