"""Memory of large tensors and many objects: release the pages of mapped files, and return freed memory to the system.

The pages of a mapped file can be read again at any time. Only pages that the system lists as mapped from a file are
released, so no value is lost.
"""

import ctypes
import gc
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PROC_MAPS = Path("/proc/self/maps")


def release_mapped_pages(values: Iterable[Any]) -> None:
    """Release the whole pages of those tensors that are mapped from a file; other values are ignored.

    The tensors must be unchanged: values that were written into them would be lost.
    """
    if not (sys.platform.startswith("linux") and _PROC_MAPS.exists()):
        return
    import torch
    from torch import Tensor

    files = _file_ranges()
    tensors = (value for value in values if isinstance(value, Tensor) and value.layout is torch.strided)
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    for first, size in {(storage.data_ptr(), storage.nbytes()) for storage in storages}:
        start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (first + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0 and _is_inside(start, start + length, files):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _file_ranges() -> list[tuple[int, int]]:
    """The address ranges (start, end) of mapped files, in ascending order."""
    lines = (line.split() for line in _PROC_MAPS.read_text().splitlines())
    # address, permissions, offset, device, inode (0 without a file)
    ranges = (fields[0].split("-") for fields in lines if fields[4] != "0")
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


def _is_inside(start: int, end: int, ranges: list[tuple[int, int]]) -> bool:
    index = bisect_right(ranges, (start, sys.maxsize)) - 1
    return index >= 0 and start < ranges[index][1] and end <= ranges[index][1]


@contextmanager
def only_new_objects_scanned() -> Iterator[None]:
    """Keep the garbage collector from scanning the objects that exist already, such as imported modules.

    A full collection scans several hundred thousand of them, which takes as long as a pass of a network.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# M_MMAP_THRESHOLD in malloc.h, and the largest value that glibc itself sets.
_M_MMAP_THRESHOLD = -3
_MAX_THRESHOLD = 32 << 20
_RETURN_THRESHOLD = 128 << 10
_returns_freed = False  # whether a block of `return_freed_memory` runs


@contextmanager
def return_freed_memory() -> Iterator[None]:
    """Return every freed block of at least 128 kB to the system at once; only glibc supports this.

    After the block, malloc keeps freed blocks of up to 32 MB, as it does by itself in a program with large blocks.
    """
    global _returns_freed
    _set_threshold(_RETURN_THRESHOLD)
    before, _returns_freed = _returns_freed, True
    try:
        yield
    finally:
        _returns_freed = before
        _set_threshold(_RETURN_THRESHOLD if before else _MAX_THRESHOLD)


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep freed blocks inside `return_freed_memory`: passes of a network free and allocate thousands of them.

    Every block that the system gives anew is filled with zeros page by page, which takes a third of a pass.
    """
    if not _returns_freed:
        yield
        return
    _set_threshold(_MAX_THRESHOLD)
    try:
        yield
    finally:
        _set_threshold(_RETURN_THRESHOLD)


def _set_threshold(size: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, size)
