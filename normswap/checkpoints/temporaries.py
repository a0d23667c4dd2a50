"""Temporary files and folders beside a target: held by their process as long as it lives, removed once nobody does.

What is being written is under a lock (`flock`) of its process, which ends with the process however that ends. So a
temporary that can be locked is stale, and whoever writes the same target next removes it. Where there are no such
locks (Windows, some network disks) nothing tells, and it is left.
"""

import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def temporary_name(final: Path) -> Path:
    """Return a new name beside `final`, hidden, that tells what it is a temporary of."""
    return final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")


@contextmanager
def held_file(final: Path, *, mode: int) -> Iterator[Path]:
    """Give an empty temporary file beside `final`, held until the block is left, and removed then if it is still there.

    Args:
        mode: its permissions; the umask takes some away, and its owner may always read and write it.
    """
    while True:
        temporary = temporary_name(final)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode | stat.S_IRUSR | stat.S_IWUSR)
        if sys.platform == "win32":  # which renames no file that is open
            os.close(descriptor)
            descriptor = -1
        if _is_held(descriptor, temporary):
            break
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        _release(descriptor)


@contextmanager
def held_folder(final: Path) -> Iterator[Path]:
    """Give an empty temporary folder beside `final`, held and removed as `held_file` does."""
    while True:
        temporary = temporary_name(final)
        temporary.mkdir()
        descriptor = -1 if sys.platform == "win32" else os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
        if _is_held(descriptor, temporary):
            break
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _release(descriptor)


def remove_stale(final: Path) -> None:
    """Remove the temporaries of `final` that no living process holds; what cannot be removed stays without a word."""
    pattern = re.compile(re.escape(f".{final.name}.") + r"[0-9a-f]{8}\.partial")
    with suppress(OSError):
        for entry in list(final.parent.iterdir()):
            if pattern.fullmatch(entry.name):
                with suppress(OSError):
                    _remove_if_stale(entry)


def _remove_if_stale(temporary: Path) -> None:
    if sys.platform == "win32":
        return
    is_folder = stat.S_ISDIR(os.lstat(temporary).st_mode)
    descriptor = _opened(temporary, os.O_RDONLY | os.O_DIRECTORY if is_folder else os.O_RDWR)
    try:
        if _lock(descriptor, wait=False) and _is_at(descriptor, temporary):
            if is_folder:
                shutil.rmtree(temporary)
            else:
                temporary.unlink()
    finally:
        os.close(descriptor)


def _opened(temporary: Path, access: int) -> int:
    # Anybody may have put a link or a pipe there: neither is followed or waited for.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(temporary, access | flags)
    except PermissionError:  # another user's; locks on network disks alone need the right to write
        return os.open(temporary, os.O_RDONLY | flags)


def _is_held(descriptor: int, temporary: Path) -> bool:
    """Hold a new temporary; False if another run took it for stale in the instant before."""
    if descriptor < 0:
        return True
    _lock(descriptor, wait=True)
    if _is_at(descriptor, temporary):
        return True
    os.close(descriptor)
    return False


def _release(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock for this process; False where another one holds it, or the system knows no such locks."""
    if sys.platform == "win32":
        return False
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
