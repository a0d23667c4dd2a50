"""Files and folders that appear whole or not at all: written under a temporary name beside the target, then renamed.

Whatever goes wrong before the rename, a kill included, leaves an existing file untouched; what a killed run leaves is
removed by the next one that writes the same target. What the disk refuses is one line.
"""

import difflib
import errno
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from normswap.checkpoints.endings import unwound_first
from normswap.checkpoints.temporaries import held_file, held_folder, remove_stale, temporary_name
from normswap.errors import CheckpointError

_HINTS = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def located(path: Path) -> Path:
    """Return the checkpoint that `path` means: the folder, if it is the index of the shards in it."""
    return path.parent if path.name.endswith(".index.json") else path


def check_readable(path: Path) -> None:
    """Refuse a path that is neither a folder nor a file with something in it.

    Raises:
        CheckpointError: missing (with the nearest names beside it), or empty.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file{_instead_of(path)}")
    _check_name(path)
    if path.is_file() and path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty: copy or download it again")


def check_writable(path: Path, *, replace: bool, as_folder: bool = False) -> None:
    """Refuse an output path before any slow work is done for it.

    Args:
        replace: whether an existing file may be replaced.
        as_folder: whether a folder is to be written there, which never replaces one.

    Raises:
        CheckpointError: its folder is missing or not writable, its name too long, it is a folder, a device or a link
            that leads nowhere, or it exists and may not be replaced.
    """
    _check_name(path)
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: expected an existing folder, got {path.parent}: create it first")
    if as_folder:
        _refuse_existing(path)
    final = _final(path)
    if path.exists() and not replace:
        raise CheckpointError(f"{path}: exists already: choose another name, or replace it with overwrite=True")
    probe = temporary_name(final)
    try:
        # Asking for permissions is not enough: root has them all, also on a file system that is read-only.
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        probe.unlink(missing_ok=True)
    except OSError as error:
        folder = final.parent if path.is_symlink() else path.parent
        raise CheckpointError(f"{path}: cannot write in {folder} ({error.strerror}): {_hint(error)}") from None


def _no_check() -> None:
    """Nothing to be looked at before a file appears."""


def _check_name(path: Path) -> None:
    """Refuse a name that torch and safetensors cannot be given: they take UTF-8 only."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{path}: the name has bytes that the encoding of file names here ({sys.getfilesystemencoding()}) does not "
            "have: set PYTHONUTF8=1, or rename it"
        ) from None


@contextmanager
def written_whole(path: Path, *, last_check: Callable[[], None] = _no_check) -> Iterator[Path]:
    """Give a temporary file in the folder of `path`, empty, and rename it to `path` once the block is through.

    Write into that file, do not put another one in its place: the lock that keeps other runs away is on it. A link is
    followed, so that the file it points at is replaced and the link stays. The mode is that of a replaced file, or
    what the umask leaves. SIGTERM and SIGHUP end the process as ever, but not before the temporary is gone.

    Args:
        last_check: called when all bytes are on the disk, directly before the file appears; an error prevents that.

    Raises:
        CheckpointError: `path` is no place for a file, or the disk refuses; an existing file is as it was.
    """
    final = _final(path)
    mode = stat.S_IMODE(final.stat().st_mode) if final.exists() else None
    with unwound_first(), _refusals_told(path, final):
        remove_stale(final)
        with held_file(final, mode=0o666 if mode is None else mode) as temporary:
            yield temporary
            if mode is not None:
                temporary.chmod(mode)
            _sync(temporary)
            last_check()
            os.replace(temporary, final)
            _sync(final.parent)


@contextmanager
def written_whole_folder(path: Path, *, last_check: Callable[[], None] = _no_check) -> Iterator[Path]:
    """Give a temporary folder beside `path`, empty, and rename it to `path` once the block is through.

    As `written_whole`, but nothing is replaced: no system swaps two folders that hold files in one step.

    Raises:
        CheckpointError: `path` exists, before or after the block, or the disk refuses.
    """
    _refuse_existing(path)
    final = path.resolve()
    with unwound_first(), _refusals_told(path, final):
        remove_stale(final)
        with held_folder(final) as temporary:
            yield temporary
            for folder, _, names in os.walk(temporary, topdown=False):
                for name in (*names, "."):
                    _sync(Path(folder, name))
            last_check()
            _refuse_existing(path)
            os.rename(temporary, final)
            _sync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole.

    Raises:
        CheckpointError: the file cannot be written; an existing one is as it was.
    """
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _final(path: Path) -> Path:
    """Where a file at `path` really goes, links followed."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path}: a link that leads nowhere ({os.readlink(path)}): remove it or mend it")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: expected a file name, got a folder or a device: add a name")
    return path.resolve()


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: exists already, and a folder is never replaced: choose another name")


@contextmanager
def _refusals_told(path: Path, final: Path) -> Iterator[None]:
    """Turn what the system says of the file being written into one line; what it says of others passes."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and final.name not in str(error.filename):
            raise
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}): {_hint(error)}") from error


def _hint(error: OSError) -> str:
    return _HINTS.get(error.errno or 0, "choose another folder")


def _sync(path: Path) -> None:
    """Wait until the disk has the file, or the names in the folder; not every system does the latter."""
    is_folder = path.is_dir()
    if is_folder and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        with suppress(OSError) if is_folder else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _instead_of(path: Path) -> str:
    """What was most likely meant by a path that leads nowhere."""
    if re.match(r"\w{2,}:/", str(path)):  # a Path makes one slash of two
        return ": an address is not opened, download the file first"
    if path.parts[:1] and path.parts[0].startswith("~"):
        return f": ~ is expanded by the shell alone, and not in quotes: pass {path.expanduser()}"
    return _nearest(path)


def _nearest(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f", nor is there a folder {path.parent}"
    near = difflib.get_close_matches(path.name, names, n=3)
    return f"; nearest: {', '.join(near)}" if near else f" in {path.parent.resolve()}"
