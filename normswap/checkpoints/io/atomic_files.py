"""Atomic writes of files and folders: a temporary file in the folder of the target, then a rename.

Until the rename an existing file stays unchanged, even if the process is killed. A process locks its temporary files;
the next write to the same target removes those without a lock, which a killed process has left. SIGTERM and SIGHUP
unwind the block first, so that it removes its temporary files. An error of the disk becomes a `CheckpointError`.
"""

import difflib
import errno
import os
import re
import shutil
import signal
import stat
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from normswap.errors import CheckpointError

# --- signals

# Windows has only the first.
_TERMINATION_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class _Terminated(BaseException):
    """A signal that ends the process; a BaseException, so that no `except Exception` catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def unwind_on_signal() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the block before they end the process; handlers of the program stay in place."""
    default_signals: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():  # only this thread may set handlers
        default_signals = [number for number in _TERMINATION_SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    if not default_signals:
        yield
        return
    for number in default_signals:
        signal.signal(number, _raise_terminated)
    try:
        yield
    except _Terminated as ended:
        signal.signal(ended.number, signal.SIG_DFL)
        signal.raise_signal(ended.number)
    finally:
        for number in default_signals:
            signal.signal(number, signal.SIG_DFL)


def _raise_terminated(number: int, _frame: FrameType | None) -> NoReturn:
    raise _Terminated(number)


# --- temporary files


def temporary_name(target: Path) -> Path:
    """Return a new hidden path in the folder of `target`, with the name of `target` in it."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")


@contextmanager
def locked_temp_file(target: Path, *, mode: int) -> Iterator[Path]:
    """Yield an empty temporary file in the folder of `target`, locked inside the block and removed after it.

    Args:
        target: the file that is to be written.
        mode: the permissions of the temporary file, less the umask; its owner may always read and write it.
    """
    while True:
        temporary = temporary_name(target)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode | stat.S_IRUSR | stat.S_IWUSR)
        if sys.platform == "win32":  # cannot rename an open file
            os.close(descriptor)
            descriptor = -1
        if _acquire_lock(descriptor, temporary):
            break
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        _release_lock(descriptor)


@contextmanager
def locked_temp_folder(target: Path) -> Iterator[Path]:
    """Yield an empty temporary folder in the folder of `target`, locked and removed as by `locked_temp_file`."""
    while True:
        temporary = temporary_name(target)
        temporary.mkdir()
        descriptor = -1 if sys.platform == "win32" else os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
        if _acquire_lock(descriptor, temporary):
            break
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _release_lock(descriptor)


def remove_stale_temp_files(target: Path) -> None:
    """Remove the temporary files of `target` that no process has locked; errors are ignored."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.partial")
    with suppress(OSError):
        for entry in list(target.parent.iterdir()):
            if pattern.fullmatch(entry.name):
                with suppress(OSError):
                    _remove_if_stale(entry)


def _remove_if_stale(temporary: Path) -> None:
    if sys.platform == "win32":
        return
    is_folder = stat.S_ISDIR(os.lstat(temporary).st_mode)
    descriptor = _open_no_follow(temporary, os.O_RDONLY | os.O_DIRECTORY if is_folder else os.O_RDWR)
    try:
        if _lock(descriptor, wait=False) and _is_same_file(descriptor, temporary):
            if is_folder:
                shutil.rmtree(temporary)
            else:
                temporary.unlink()
    finally:
        os.close(descriptor)


def _open_no_follow(temporary: Path, access: int) -> int:
    # Another user may have put a link or a pipe there: do not follow the link, do not wait for the pipe.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(temporary, access | flags)
    except PermissionError:  # another user's file; only locks on network disks need the right to write
        return os.open(temporary, os.O_RDONLY | flags)


def _acquire_lock(descriptor: int, temporary: Path) -> bool:
    """Lock a new temporary file; False if another process removed it as stale before the lock."""
    if descriptor < 0:
        return True
    _lock(descriptor, wait=True)
    if _is_same_file(descriptor, temporary):
        return True
    os.close(descriptor)
    return False


def _release_lock(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock a file; False if another process has locked it, or the system has no such locks."""
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


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


# --- checks of paths

_HINTS = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def resolve_checkpoint_path(path: Path) -> Path:
    """Return the path of the checkpoint: the folder if `path` is an index of shards, else `path`."""
    return path.parent if path.name.endswith(".index.json") else path


def check_readable(path: Path) -> None:
    """Refuse a path that does not exist, and an empty file.

    Raises:
        CheckpointError: missing (with the nearest names in its folder), or empty.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file{_suggest_path(path)}")
    _check_name(path)
    if path.is_file() and path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty: copy or download it again")


def check_writable(path: Path, *, replace: bool, as_folder: bool = False) -> None:
    """Refuse an output path that cannot be written; called before any slow work.

    Args:
        path: the output.
        replace: whether an existing file may be replaced.
        as_folder: whether a folder will be written, which never replaces anything.

    Raises:
        CheckpointError: its folder is missing or not writable, its name too long, it is a folder, a device or a broken
            link, or it exists and may not be replaced.
    """
    _check_name(path)
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: expected an existing folder, got {path.parent}: create it first")
    if as_folder:
        _refuse_existing(path)
    target = _resolve_target(path)
    if path.exists() and not replace:
        raise CheckpointError(f"{path}: exists already: choose another name, or pass overwrite=True to replace it")
    probe = temporary_name(target)
    try:
        # A check of permissions is not enough: root has all of them, even on a read-only file system.
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        probe.unlink(missing_ok=True)
    except OSError as error:
        folder = target.parent if path.is_symlink() else path.parent
        raise CheckpointError(f"{path}: cannot write in {folder} ({error.strerror}): {_hint(error)}") from None


def _skip_check() -> None:
    """The default of `before_commit`."""


def _check_name(path: Path) -> None:
    """Refuse a name that is not UTF-8, the only encoding that torch and safetensors accept."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{path}: the name has bytes outside the encoding of file names ({sys.getfilesystemencoding()}): set "
            "PYTHONUTF8=1, or rename the file"
        ) from None


# --- atomic writes


@contextmanager
def atomic_write(path: Path, *, before_commit: Callable[[], None] = _skip_check) -> Iterator[Path]:
    """Yield an empty temporary file in the folder of `path`, and rename it to `path` after the block.

    Write into the yielded file and do not replace it: it carries the lock. If `path` is a link, its target is replaced
    and the link stays. The permissions are those of the replaced file, or those by the umask. SIGTERM and SIGHUP still
    end the process, after the temporary file has been removed.

    Args:
        path: the file to write.
        before_commit: called directly before the rename, when all bytes are on the disk; an error prevents the rename.

    Raises:
        CheckpointError: `path` cannot be a file, or the disk reports an error; an existing file is unchanged.
    """
    target = _resolve_target(path)
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    with unwind_on_signal(), _report_os_errors(path, target):
        remove_stale_temp_files(target)
        with locked_temp_file(target, mode=0o666 if mode is None else mode) as temporary:
            yield temporary
            if mode is not None:
                temporary.chmod(mode)
            _fsync(temporary)
            before_commit()
            os.replace(temporary, target)
            _fsync(target.parent)


@contextmanager
def atomic_write_folder(path: Path, *, before_commit: Callable[[], None] = _skip_check) -> Iterator[Path]:
    """Yield an empty temporary folder in the folder of `path`, and rename it to `path` after the block.

    Unlike `atomic_write` it replaces nothing: no system can exchange two folders with files in one step.

    Args:
        path: the folder to write.
        before_commit: as for `atomic_write`.

    Raises:
        CheckpointError: `path` exists, before or after the block, or the disk reports an error.
    """
    _refuse_existing(path)
    target = path.resolve()
    with unwind_on_signal(), _report_os_errors(path, target):
        remove_stale_temp_files(target)
        with locked_temp_folder(target) as temporary:
            yield temporary
            for folder, _, names in os.walk(temporary, topdown=False):
                for name in (*names, "."):
                    _fsync(Path(folder, name))
            before_commit()
            _refuse_existing(path)
            os.rename(temporary, target)
            _fsync(target.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        CheckpointError: the file cannot be written; an existing file is unchanged.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _resolve_target(path: Path) -> Path:
    """The file to write, with links resolved."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path}: a broken link (to {os.readlink(path)}): remove it, or create its target")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: expected a file name, got a folder or a device: add a file name")
    return path.resolve()


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: exists already, and normswap replaces no folder: choose another name")


@contextmanager
def _report_os_errors(path: Path, target: Path) -> Iterator[None]:
    """Turn an OSError about the written file into a `CheckpointError`; errors about other files pass."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and target.name not in str(error.filename):
            raise
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}): {_hint(error)}") from error


def _hint(error: OSError) -> str:
    return _HINTS.get(error.errno or 0, "choose another folder")


def _fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; not every system can flush a folder."""
    is_folder = path.is_dir()
    if is_folder and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        with suppress(OSError) if is_folder else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _suggest_path(path: Path) -> str:
    """A hint at the path that the user probably meant, for a path that does not exist."""
    if re.match(r"\w{2,}:/", str(path)):  # Path replaces // by /
        return ": normswap does not open URLs, download the file first"
    if path.parts[:1] and path.parts[0].startswith("~"):
        return f": only a shell expands ~, and not in quotes: pass {path.expanduser()}"
    return _suggest_names(path)


def _suggest_names(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f", nor is there a folder {path.parent}"
    matches = difflib.get_close_matches(path.name, names, n=3)
    return f"; nearest: {', '.join(matches)}" if matches else f" in {path.parent.resolve()}"
