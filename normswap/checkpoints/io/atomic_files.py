"""Files and folders that appear whole or not at all: written under a temporary name beside the target, then renamed.

Whatever goes wrong before the rename, a kill included, leaves an existing file untouched; what a killed run leaves is
removed by the next one that writes the same target. What the disk refuses is one line.
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

# MERGED DOC: Signals that end the process, answered by unwinding what is under way first.

# MERGED DOC: Temporary files and folders beside a target: held by their process as long as it lives, removed once nobody does.


# Windows has the first only.
_TERMINATION_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class _Terminated(BaseException):
    """A signal that ends the process has come; not for anybody to catch on the way."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def unwind_on_signal() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the block before they end the process; handlers of the program itself stay."""
    default_signals: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
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


def temporary_name(target: Path) -> Path:
    """Return a new name beside `final`, hidden, that tells what it is a temporary of."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")


@contextmanager
def locked_temp_file(target: Path, *, mode: int) -> Iterator[Path]:
    """Give an empty temporary file beside `final`, held until the block is left, and removed then if it is still there.

    Args:
        mode: its permissions; the umask takes some away, and its owner may always read and write it.
    """
    while True:
        temporary = temporary_name(target)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode | stat.S_IRUSR | stat.S_IWUSR)
        if sys.platform == "win32":  # which renames no file that is open
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
    """Give an empty temporary folder beside `final`, held and removed as `held_file` does."""
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
    """Remove the temporaries of `final` that no living process holds; what cannot be removed stays without a word."""
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
    # Anybody may have put a link or a pipe there: neither is followed or waited for.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(temporary, access | flags)
    except PermissionError:  # another user's; locks on network disks alone need the right to write
        return os.open(temporary, os.O_RDONLY | flags)


def _acquire_lock(descriptor: int, temporary: Path) -> bool:
    """Hold a new temporary; False if another run took it for stale in the instant before."""
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


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


_HINTS = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def resolve_checkpoint_path(path: Path) -> Path:
    """Return the checkpoint that `path` means: the folder, if it is the index of the shards in it."""
    return path.parent if path.name.endswith(".index.json") else path


def check_readable(path: Path) -> None:
    """Refuse a path that is neither a folder nor a file with something in it.

    Raises:
        CheckpointError: missing (with the nearest names beside it), or empty.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file{_suggest_path(path)}")
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
    target = _resolve_target(path)
    if path.exists() and not replace:
        raise CheckpointError(f"{path}: exists already: choose another name, or replace it with overwrite=True")
    probe = temporary_name(target)
    try:
        # Asking for permissions is not enough: root has them all, also on a file system that is read-only.
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        probe.unlink(missing_ok=True)
    except OSError as error:
        folder = target.parent if path.is_symlink() else path.parent
        raise CheckpointError(f"{path}: cannot write in {folder} ({error.strerror}): {_hint(error)}") from None


def _skip_check() -> None:
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
def atomic_write(path: Path, *, before_commit: Callable[[], None] = _skip_check) -> Iterator[Path]:
    """Give a temporary file in the folder of `path`, empty, and rename it to `path` once the block is through.

    Write into that file, do not put another one in its place: the lock that keeps other runs away is on it. A link is
    followed, so that the file it points at is replaced and the link stays. The mode is that of a replaced file, or
    what the umask leaves. SIGTERM and SIGHUP end the process as ever, but not before the temporary is gone.

    Args:
        last_check: called when all bytes are on the disk, directly before the file appears; an error prevents that.

    Raises:
        CheckpointError: `path` is no place for a file, or the disk refuses; an existing file is as it was.
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
    """Give a temporary folder beside `path`, empty, and rename it to `path` once the block is through.

    As `atomic_write`, but nothing is replaced: no system swaps two folders that hold files in one step.

    Raises:
        CheckpointError: `path` exists, before or after the block, or the disk refuses.
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
    """Write a text file whole.

    Raises:
        CheckpointError: the file cannot be written; an existing one is as it was.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _resolve_target(path: Path) -> Path:
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
def _report_os_errors(path: Path, target: Path) -> Iterator[None]:
    """Turn what the system says of the file being written into one line; what it says of others passes."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and target.name not in str(error.filename):
            raise
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}): {_hint(error)}") from error


def _hint(error: OSError) -> str:
    return _HINTS.get(error.errno or 0, "choose another folder")


def _fsync(path: Path) -> None:
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


def _suggest_path(path: Path) -> str:
    """What was most likely meant by a path that leads nowhere."""
    if re.match(r"\w{2,}:/", str(path)):  # a Path makes one slash of two
        return ": an address is not opened, download the file first"
    if path.parts[:1] and path.parts[0].startswith("~"):
        return f": ~ is expanded by the shell alone, and not in quotes: pass {path.expanduser()}"
    return _suggest_names(path)


def _suggest_names(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f", nor is there a folder {path.parent}"
    matches = difflib.get_close_matches(path.name, names, n=3)
    return f"; nearest: {', '.join(matches)}" if matches else f" in {path.parent.resolve()}"
