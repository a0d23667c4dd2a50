"""Private copies of source files: everything reads the copy, and the source is compared with it before a result counts.

A trainer may overwrite its last.pt at any moment. A process that maps this file reads values of both versions, or ends
with SIGBUS if the file shrank. So the bytes are copied once, into unnamed files (which disappear with the process, even
if it is killed), and are checked, read and digested from there. The copy is on a disk and needs no memory; on file
systems with shared blocks (btrfs, xfs) it costs nothing. If the disk is full, the copy is in memory.
Systems other than Linux have no unnamed files: there the copy is a temporary file until the process ends.
"""

import atexit
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from normswap.checkpoints.content.hf_trainer import trainer_files
from normswap.checkpoints.formats.hf_folder import INDEX, check_links, find_shards, list_text_files
from normswap.checkpoints.io.atomic_files import check_readable, resolve_checkpoint_path
from normswap.errors import CheckpointError

_logger = logging.getLogger(__name__)

_CHUNK = 1 << 18  # two such chunks fit into the cache
_DESCRIPTORS = Path("/proc/self/fd")
_MAX_DESCRIPTORS = 256  # of the usual limit of 1024 per process


class FileStamp(NamedTuple):
    """What identifies one version of a file without reading it."""

    device: int
    inode: int
    size: int
    mtime_ns: int


class TempFiles:
    """Open unnamed files, and folders; removed with this object, at the latest when Python ends."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []
        self.folders: list[Path] = []
        weakref.finalize(self, _remove_all, self.descriptors, self.folders)

    def close(self) -> None:
        """Remove the files and folders; the mapping of an unnamed file stays valid."""
        _remove_all(self.descriptors, self.folders)


def _remove_all(descriptors: list[int], folders: list[Path]) -> None:
    while descriptors:
        os.close(descriptors.pop())
    while folders:
        folder = folders.pop()
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():  # Windows cannot remove a mapped file
            atexit.register(shutil.rmtree, folder, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class SourceFiles:
    """A file or folder to read, and its private copy, which exists as long as this object.

    Attributes:
        path: the path from the user.
        copy: the path of the copy.
        stamps: the stamp of each file, by its name in the folder; a single file has the name `""`.
        files: the files and folders of the copy.
    """

    path: Path
    copy: Path
    stamps: Mapping[str, FileStamp]
    files: TempFiles

    def check_unchanged(self) -> None:
        """Compare the source with its copy, byte by byte.

        Raises:
            CheckpointError: a file was removed, replaced, written to, or added to the folder.
        """
        for name, stamp in self.stamps.items():
            _check_same(self.path / name, self.copy / name, stamp)
        if self.path.is_dir() and _list_files(self.path) != [*self.stamps]:
            raise _changed_error(self.path, "files were added or removed")

    def replace_copy_path(self, text: str) -> str:
        """Return a message with the path of the source instead of that of the copy."""
        return text.replace(str(self.copy), str(self.path))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Close the copy if an error occurs in the block, and name the source in the message of the error."""
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, CheckpointError) and str(self.copy) in str(error):
                raise type(error)(self.replace_copy_path(str(error))) from error
            raise

    @property
    def is_closed(self) -> bool:
        """Whether the copy has been removed."""
        return not (self.files.descriptors or self.files.folders)

    def close(self) -> None:
        """Remove the copy. Tensors that are mapped from it stay valid."""
        self.files.close()


def open_source(path: Path, *, folder: Path | None = None) -> SourceFiles:
    """Copy the file at `path`, or the files that normswap reads in a folder, and return the source.

    Args:
        path: a file, a folder, or the index of shards in a folder.
        folder: the folder for the copy; None for memory, if the caller reads everything into memory anyway.

    Raises:
        CheckpointError: missing or empty, has a link to a file outside the folder, or changed during the copy.
    """
    path = resolve_checkpoint_path(path)
    check_readable(path)
    files = TempFiles()
    if path.is_dir():
        check_links(path)
        copy, names = _new_folder(files, None), _list_files(path)
    elif _opens_unnamed():
        stamp = _copy_file(path, folder, files)
        return SourceFiles(path, _DESCRIPTORS / str(files.descriptors[-1]), {"": stamp}, files)
    else:
        copy, names = _new_folder(files, _folder_for_named(folder, path.stat().st_size)) / path.name, [""]
    without_name = _opens_unnamed() and len(names) <= _MAX_DESCRIPTORS
    copy_file = _copy_to_unnamed if without_name else _copy_to_named
    stamps = {name: copy_file(path / name, copy / name, folder, files) for name in names}
    return SourceFiles(path, copy, stamps, files)


def _list_files(folder: Path) -> list[str]:
    """The names of the files in a folder that any command reads or copies."""
    if (folder / INDEX).is_file():
        return sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    shards = find_shards(folder)
    weights = {*shards.files, *filter(None, [shards.index])} if shards else set()
    return sorted({*weights, *list_text_files(folder), *trainer_files(folder)})


def _new_folder(files: TempFiles, parent: Path | None) -> Path:
    files.folders.append(Path(tempfile.mkdtemp(prefix="normswap-", dir=parent)))
    return files.folders[-1]


def _copy_to_unnamed(path: Path, copy: Path, folder: Path | None, files: TempFiles) -> FileStamp:
    """Copy into an unnamed file, and create a link to it at `copy`."""
    stamp = _copy_file(path, folder, files)
    copy.symlink_to(_DESCRIPTORS / str(files.descriptors[-1]))
    return stamp


def _copy_to_named(path: Path, copy: Path, _folder: Path | None, _files: TempFiles) -> FileStamp:
    """Copy into a named file, on systems without unnamed files."""
    before = _read_stamp(path)
    shutil.copyfile(path, copy)
    _check_stamp(path, before)
    return before


def _copy_file(path: Path, folder: Path | None, files: TempFiles) -> FileStamp:
    """Copy into a new unnamed file, whose descriptor is then the last one in `files`."""
    with open(path, "rb", buffering=0) as file:
        opened = os.fstat(file.fileno())
        stamp = FileStamp(opened.st_dev, opened.st_ino, opened.st_size, opened.st_mtime_ns)
        if folder is not None and _is_full(folder, stamp.size):
            _logger.info("%s: copied into memory, since %s is full", path, folder)
            folder = None
        for target in (folder, None) if folder is not None else (None,):
            files.descriptors.append(_open_unnamed(target))
            try:
                _copy_bytes(file.fileno(), files.descriptors[-1])
                break
            except OSError as error:  # the disk is full, or file sizes are limited
                os.close(files.descriptors.pop())
                if target is None:
                    raise
                _logger.info("%s: copied into memory instead of %s (%s)", path, target, error.strerror)
    _check_stamp(path, stamp)
    return stamp


def _folder_for_named(folder: Path | None, size: int) -> Path | None:
    """The folder for a named copy: `folder` if only it has enough space, else None for the default of the system."""
    if folder is None or not _is_full(Path(tempfile.gettempdir()), size) or _is_full(folder, size):
        return None
    return folder


def _is_full(folder: Path, size: int) -> bool:
    try:
        return shutil.disk_usage(folder).free < size
    except OSError:
        return True


def _opens_unnamed() -> bool:
    """Whether this system and this build of Python can open an unnamed file and read it by a path (Linux)."""
    return _DESCRIPTORS.is_dir() and hasattr(os, "O_TMPFILE") and hasattr(os, "memfd_create")


def _open_unnamed(folder: Path | None) -> int:
    """Open a new unnamed file, in memory if `folder` is None or cannot have one."""
    if folder is not None:
        with suppress(OSError):
            return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        with suppress(OSError):  # a file system without O_TMPFILE
            descriptor, name = tempfile.mkstemp(prefix=".normswap-", dir=folder)
            os.unlink(name)
            return descriptor
    return os.memfd_create("normswap", os.MFD_CLOEXEC)


def _copy_bytes(source: int, target: int) -> None:
    with suppress(OSError, AttributeError):  # between two file systems, or on a system without this call
        while os.copy_file_range(source, target, 1 << 30):
            pass
        if os.fstat(target).st_size == os.fstat(source).st_size:
            return
    os.lseek(source, 0, os.SEEK_SET)
    os.ftruncate(target, 0)
    os.lseek(target, 0, os.SEEK_SET)
    with open(source, "rb", closefd=False) as reader, open(target, "wb", closefd=False) as writer:
        shutil.copyfileobj(reader, writer, _CHUNK)


def _check_same(path: Path, copy: Path, stamp: FileStamp) -> None:
    """Refuse a file that has another stamp, or other bytes than the copy."""
    _check_stamp(path, stamp)
    one, other = bytearray(_CHUNK), bytearray(_CHUNK)
    with open(path, "rb", buffering=0) as file, open(copy, "rb", buffering=0) as copy_file:
        while length := copy_file.readinto(other):
            if file.readinto(one) != length or one[:length] != other[:length]:
                raise _changed_error(path, "it was written to")
    _check_stamp(path, stamp)


def _check_stamp(path: Path, stamp: FileStamp) -> None:
    """Refuse a file that has another stamp."""
    try:
        current = _read_stamp(path)
    except FileNotFoundError:
        raise _changed_error(path, "it was removed") from None
    if current[:2] != stamp[:2]:
        raise _changed_error(path, "another file replaced it")
    if current.size != stamp.size:
        raise _changed_error(path, f"it had {stamp.size:,} bytes and has {current.size:,}")
    if current != stamp:
        raise _changed_error(path, "it was written to")


def _read_stamp(path: Path) -> FileStamp:
    found = os.stat(path)
    return FileStamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _changed_error(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: changed while normswap read it ({what}): wait until the program that writes it has finished, or copy "
        "the file first, and try again"
    )
