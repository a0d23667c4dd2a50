"""Atomic writes: what a killed, terminated or failed write leaves, and what the next one removes."""

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from normswap.checkpoints.io import atomic_files
from normswap.checkpoints.io.atomic_files import atomic_write, atomic_write_folder, check_writable, write_text
from normswap.errors import CheckpointError

# Writes `WRITER model.pt` up to the middle, prints that, and waits to be ended.
_WRITER = """
import signal, sys, time
from pathlib import Path
from normswap.checkpoints.io import atomic_files
# A shell that runs the tests in the background may let its children ignore these signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
with getattr(atomic_files, sys.argv[1])(Path("model.pt")) as temporary:
    (temporary / "part" if temporary.is_dir() else temporary).write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
KINDS = pytest.mark.parametrize("kind", ["atomic_write", "atomic_write_folder"])


@contextmanager
def writing(folder: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing `folder/model.pt`."""
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, kind], cwd=folder, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            yield process
        finally:
            process.kill()


def write(folder: Path, kind: str, name: str = "model.pt") -> None:
    with getattr(atomic_files, kind)(folder / name) as temporary:
        (temporary / "part" if temporary.is_dir() else temporary).write_text("new")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.multiprocess
@KINDS
def test_a_killed_run_leaves_a_temporary_that_the_next_one_removes(tmp_path: Path, kind: str) -> None:
    with writing(tmp_path, kind) as process:
        process.kill()
        process.wait()
    assert len(names(tmp_path)) == 1
    assert names(tmp_path)[0].endswith(".partial")
    write(tmp_path, kind, "model")  # another target's
    write(tmp_path, kind, "model.pt.x")
    assert len(names(tmp_path)) == 3
    write(tmp_path, kind)
    assert names(tmp_path) == ["model", "model.pt", "model.pt.x"]


@pytest.mark.multiprocess
@KINDS
def test_the_temporary_of_a_living_run_stays(tmp_path: Path, kind: str) -> None:
    with writing(tmp_path, kind):
        before = names(tmp_path)
        write(tmp_path, kind)
        assert names(tmp_path) == sorted([*before, "model.pt"])


@pytest.mark.multiprocess
@pytest.mark.skipif(getattr(os, "getuid", int)() != 0, reason="only root becomes another user")
def test_a_living_run_of_another_user_is_left_alone_and_a_dead_one_is_not(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)

    def as_another_user() -> None:
        pid = os.fork()
        if pid == 0:
            os.setuid(12345)
            atomic_files.remove_stale_temp_files(tmp_path / "model.pt")
            os._exit(0)
        os.waitpid(pid, 0)

    with writing(tmp_path, "atomic_write") as process:
        as_another_user()
        assert len(names(tmp_path)) == 1
        process.kill()
        process.wait()
        as_another_user()
    assert names(tmp_path) == []


@pytest.mark.multiprocess
@KINDS
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_run_that_is_ended_leaves_nothing(tmp_path: Path, kind: str, name: str) -> None:
    number = getattr(signal, name)
    with writing(tmp_path, kind) as process:
        process.send_signal(number)
        assert process.wait() == -number
    assert names(tmp_path) == []


def test_handlers_of_the_program_stay(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with atomic_write(tmp_path / "model.pt") as temporary:
            signal.raise_signal(signal.SIGTERM)
            temporary.write_text("new")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    assert names(tmp_path) == ["model.pt"]


def test_default_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    with atomic_write(tmp_path / "a"), atomic_write(tmp_path / "b"):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_a_thread_may_write_too(tmp_path: Path) -> None:
    thread = threading.Thread(target=write, args=(tmp_path, "atomic_write"))
    thread.start()
    thread.join()
    assert names(tmp_path) == ["model.pt"]


@KINDS
def test_an_exception_leaves_nothing(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ZeroDivisionError), getattr(atomic_files, kind)(tmp_path / "model.pt"):
        _ = 1 / 0
    assert names(tmp_path) == []


def test_a_run_whose_temporary_was_taken_for_stale_takes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = atomic_files._lock, []

    def late(descriptor: int, *, wait: bool) -> bool:
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        return lock(descriptor, wait=wait)

    monkeypatch.setattr(atomic_files, "_lock", late)
    with atomic_write(tmp_path / "model.pt") as temporary:
        assert temporary != taken[0]
        temporary.write_text("new")
    assert names(tmp_path) == ["model.pt"]


@pytest.mark.multiprocess
def test_without_locks_a_temporary_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def unknown(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    with writing(tmp_path, "atomic_write") as process:
        process.kill()
        process.wait()
    monkeypatch.setattr(fcntl, "flock", unknown)
    write(tmp_path, "atomic_write")
    assert len(names(tmp_path)) == 2


def test_what_only_looks_like_a_temporary_is_neither_followed_nor_waited_for(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".model.pt.0123abcd.partial").symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / ".model.pt.0123abce.partial")
    (tmp_path / ".model.pt.notours.partial").write_text("mine")
    write(tmp_path, "atomic_write")
    assert (tmp_path / "mine").read_text() == "mine"
    assert {".model.pt.notours.partial", "mine", "model.pt"} <= {*names(tmp_path)}


# Permissions.


@pytest.mark.parametrize("mode", [0o600, 0o444, 0o664])
def test_a_replaced_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    (tmp_path / "model.pt").touch()
    (tmp_path / "model.pt").chmod(mode)
    with atomic_write(tmp_path / "model.pt") as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) & ~(mode | 0o600) == 0
        temporary.write_text("new")
    assert stat.S_IMODE((tmp_path / "model.pt").stat().st_mode) == mode


@pytest.mark.parametrize(("umask", "modes"), [(0o022, (0o644, 0o755)), (0o077, (0o600, 0o700))])
def test_new_files_and_folders_follow_the_umask(tmp_path: Path, umask: int, modes: tuple[int, int]) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path, "atomic_write", "file")
        write(tmp_path, "atomic_write_folder", "folder")
    finally:
        os.umask(before)
    assert tuple(stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder")) == modes


# What is refused, in one line.


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere/model.pt")


def _loop(path: Path) -> None:
    path.symlink_to(path)


TARGETS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a folder": (Path.mkdir, "model.pt: expected a file name, got a folder or a device: add a file name"),
    "a pipe": (
        lambda path: os.mkfifo(path),
        "model.pt: expected a file name, got a folder or a device: add a file name",
    ),
    "a device": (lambda path: path.symlink_to("/dev/null"), "model.pt: expected a file name, got a folder or a device"),
    "a link that leads nowhere": (_dangling, "model.pt: a broken link (to nowhere/model.pt): remove it, or"),
    "a link to itself": (_loop, "model.pt): remove it, or create its target"),
}


@pytest.mark.parametrize(("make", "message"), TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("refuse", [lambda path: check_writable(path, replace=True), lambda path: write_text(path, "")])
def test_what_is_no_place_for_a_file_is_refused(
    tmp_path: Path, make: Callable[[Path], Any], message: str, refuse: Callable[[Path], None]
) -> None:
    make(tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as caught:
        refuse(tmp_path / "model.pt")
    assert message in str(caught.value)
    assert names(tmp_path) == ["model.pt"]


def test_an_existing_folder_is_not_replaced(tmp_path: Path) -> None:
    message = "model: exists already, and normswap replaces no folder: choose another name"
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path, "atomic_write_folder", "model")
    with pytest.raises(CheckpointError, match="later: exists already"), atomic_write_folder(tmp_path / "later"):
        (tmp_path / "later").mkdir()
    assert names(tmp_path) == ["later", "model"]


def test_a_name_that_is_too_long_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write in .* \(File name too long\): choose a shorter name"):
        check_writable(tmp_path / ("m" * 250), replace=True)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which even root cannot write")
@KINDS
def test_a_read_only_folder_is_reported(kind: str) -> None:
    with pytest.raises(CheckpointError, match=r"/proc/new: cannot be written \(.*\): choose another folder"):
        write(Path("/proc"), kind, "new")


_TOO_LARGE = """
import resource, sys
from pathlib import Path
from normswap.checkpoints.io.atomic_files import atomic_write
from normswap.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with atomic_write(Path("model.pt")) as temporary:
        temporary.write_bytes(bytes(2000))
except CheckpointError as error:
    print(error)
"""


@pytest.mark.multiprocess
def test_a_disk_that_takes_no_more_is_reported(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("old")
    done = subprocess.run([sys.executable, "-c", _TOO_LARGE], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "model.pt: cannot be written (File too large): raise the limit of file sizes (ulimit -f)\n"
    assert names(tmp_path) == ["model.pt"]
    assert (tmp_path / "model.pt").read_text() == "old"


def test_what_the_system_says_of_other_files_passes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="another"), atomic_write(tmp_path / "model.pt"):
        (tmp_path / "another").read_bytes()
    assert names(tmp_path) == []
