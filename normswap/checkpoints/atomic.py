"""Files that appear whole or not at all: written under a temporary name in the same folder, then renamed.

Whatever goes wrong before the rename leaves the folder as it was, and an existing file untouched.
"""

import difflib
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from normswap.errors import CheckpointError


def check_readable(path: Path) -> None:
    """Refuse a path that is no file with something in it.

    Raises:
        CheckpointError: missing (with the nearest names beside it), a folder, or empty.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: expected a file, got a folder: give the file inside it")
    if not path.exists():
        raise CheckpointError(f"{path}: no such file{_nearest(path)}")
    if path.is_file() and path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty: copy or download it again")


def check_writable(path: Path, *, replace: bool) -> None:
    """Refuse an output path before any slow work is done for it.

    Args:
        replace: whether an existing file may be replaced.

    Raises:
        CheckpointError: its folder is missing or not writable, it is a folder, or it exists and may not be replaced.
    """
    folder = path.parent
    if not folder.is_dir():
        raise CheckpointError(f"{path}: expected an existing folder, got {folder}: create it first")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: expected a file name, got a folder or a device: add a name")
    if path.exists() and not replace:
        raise CheckpointError(f"{path}: exists already: choose another name, or replace it with --force")
    try:
        # Asking for permissions is not enough: root has them all, also on a file system that is read-only.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write in {folder} ({error.strerror}): choose another folder") from None


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`, and rename it to `path` once the block is through.

    A link is followed, so that the file it points at is replaced and the link stays.
    """
    final = path.resolve()
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole.

    Raises:
        CheckpointError: the file cannot be written; an existing one is as it was.
    """
    try:
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error


def _nearest(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f", nor is there a folder {path.parent}"
    near = difflib.get_close_matches(path.name, names, n=3)
    return f"; nearest: {', '.join(near)}" if near else f" in {path.parent.resolve()}"
