"""Memory of large tensors given back to the system when they are freed, not kept for the next ones.

glibc takes large blocks from the system one by one and gives them back one by one, but only above a size that it raises
to that of the largest block freed so far, up to 32 MB. What lies below comes from one heap, which has holes after a
model in two precisions came and went.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# M_MMAP_THRESHOLD of malloc.h, and the largest size that glibc would come to by itself.
_THRESHOLD = -3
_LARGEST = 32 << 20
_AT_ONCE = 128 << 10


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Give back every block from 128 kB up as soon as it is freed; elsewhere than on glibc do nothing.

    A program that goes on afterwards keeps freed blocks up to 32 MB again, as it would have come to do.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if set_option is None:
        yield
        return
    set_option(_THRESHOLD, _AT_ONCE)
    try:
        yield
    finally:
        set_option(_THRESHOLD, _LARGEST)
