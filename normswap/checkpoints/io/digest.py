"""A fingerprint of a content, the same in every container, and the comparison of two contents, bit for bit."""

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
_COMPARE_CHUNK = 1 << 18  # what two caches hold at once: larger pieces are compared at half the speed
# More than any training checkpoint holds.
_MAX_LEAVES = 1_000_000
_MAX_DEPTH = 50


def fingerprint(content: Any, *, release_pages: bool = False) -> str:
    """Return the SHA-256, as hexadecimal digits, of every name, tensor and plain value in `content`.

    Tensors count with dtype, shape and bytes; of a module its state dict counts. Values of other kinds count with
    their type only, empty lists and mappings not at all. Order matters in lists and not among the keys of a mapping.

    Args:
        forget: give the memory of tensors back once they are read: of those that are mapped from a file and unchanged.

    Raises:
        CheckpointError: the content has no end, or as good as none.
    """
    digest = hashlib.sha256()
    for path, value in _release_after_use(_iter_leaves(content)) if release_pages else _iter_leaves(content):
        digest.update(f"{path}\0{_describe_value(value)}\0".encode())
        if isinstance(value, Tensor):
            for chunk in _chunks(value, _CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def contents_equal(content: Any, other: Any, *, release_pages: bool = False) -> bool:
    """Say whether two contents have the same fingerprint, at the speed of memory and without taking it.

    Args:
        forget: give the memory of `other` back as `fingerprint` does.

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
    """Say whether a safetensors file holds the bytes of these tensors and no others, streaming over the file."""
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
    """The leaves, whose memory is given back in between, once they have been looked at."""
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
    """All values in a content by their place; one that holds itself, or the same ones over and over, has no end."""
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
                f"is nested more than {_MAX_DEPTH} deep or holds more than {_MAX_LEAVES:,} values: save weights and "
                "optimizer alone"
            )


def _iter_children(value: Any, path: str) -> Iterator[tuple[str, Any]] | None:
    """What a value holds, by place, or None where it is a leaf."""
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
    # As bytes, since NaN differs from itself and -0 does not differ from 0.
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8)


def _chunks(tensor: Tensor, length: int) -> Iterator[Any]:
    data = _as_bytes(tensor).numpy() if tensor.numel() else numpy.empty(0, numpy.uint8)
    for start in range(0, len(data), length):
        yield data[start : start + length]
