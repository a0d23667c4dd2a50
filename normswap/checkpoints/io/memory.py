"""Memory of tensors that lie in files: given back while nobody looks at them, since it can be read again at any time.

Only pages that the system itself calls a file's are given back, so that no value is ever lost.
"""

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# MERGED DOC: Memory of large tensors given back to the system when they are freed, not kept for the next ones.


_PROC_MAPS = Path("/proc/self/maps")


def release_mapped_pages(values: Iterable[Any]) -> None:
    """Give back the whole pages of those tensors that are mapped from a file; what else there is stays as it is.

    What was written into such a tensor since it was mapped would be lost: it must be as it came.
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
    """Where in memory files are mapped, in ascending order."""
    lines = (line.split() for line in _PROC_MAPS.read_text().splitlines())
    # address, permissions, offset, device, inode: zero where there is no file.
    ranges = (fields[0].split("-") for fields in lines if fields[4] != "0")
    return [(int(start, 16), int(end, 16)) for start, end in ranges]


def _is_inside(start: int, end: int, ranges: list[tuple[int, int]]) -> bool:
    index = bisect_right(ranges, (start, sys.maxsize)) - 1
    return index >= 0 and start < ranges[index][1] and end <= ranges[index][1]


# M_MMAP_THRESHOLD of malloc.h, and the largest size that glibc would come to by itself.
_M_MMAP_THRESHOLD = -3
_MAX_THRESHOLD = 32 << 20
_RETURN_THRESHOLD = 128 << 10


@contextmanager
def return_freed_memory() -> Iterator[None]:
    """Give back every block from 128 kB up as soon as it is freed; elsewhere than on glibc do nothing.

    A program that goes on afterwards keeps freed blocks up to 32 MB again, as it would have come to do.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _RETURN_THRESHOLD)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _MAX_THRESHOLD)
