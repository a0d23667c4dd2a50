"""A digest of what a file holds: the same wherever its record lies and whatever it says, another for any other tensor.

So the record in a file can tell the digest of all the rest. It finds damage and mix-ups; whoever can write the file
can write its record too.
"""

import json
import struct
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import IO, BinaryIO, Protocol

from normswap.checkpoints.archives import read_local_header
from normswap.checkpoints.containers import METADATA_KEY, ZIP_ENTRY, Container

_CHUNK = 1 << 20  # bytes


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


def digest_of(path: Path, container: Container) -> str:
    """Return the SHA-256 over a file without its record, as hexadecimal digits.

    Of a torch zip archive every member counts by name (within the archive's folder), size and bytes, in the order of
    names; of safetensors the header as canonical JSON and the data; of a legacy pickle, which has no record, the file.
    The file is read in pieces of one megabyte, so that memory does not grow with it.

    Args:
        path: a file that has been recognised as `container`.

    Raises:
        OSError, zipfile.BadZipFile: the file cannot be read, or has changed since.
    """
    digest = sha256()
    with open(path, "rb", buffering=0) as file:
        if container == "torch zip":
            _add_members(digest, file)
        else:
            if container == "safetensors":
                digest.update(_header_without_record(file))
            _add(digest, file, path.stat().st_size)
    return digest.hexdigest()


def _add_members(digest: _Hash, file: BinaryIO) -> None:
    with zipfile.ZipFile(file) as archive:
        members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
        for name in sorted(members.keys() - {ZIP_ENTRY}):
            # Each name with its length in front, so that no two archives give the same stream.
            digest.update(struct.pack("<QQ", len(name.encode()), members[name].file_size) + name.encode())
            _add_member(digest, file, archive, members[name])


def _add_member(digest: _Hash, file: BinaryIO, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    local = read_local_header(file, member)
    if local is None or member.compress_type != zipfile.ZIP_STORED:
        with archive.open(member) as content:
            _add(digest, content, member.file_size)
        return
    # Past zipfile, whose own checksum costs as much again; the sizes have been checked against the file's.
    file.seek(local.begin)
    _add(digest, file, member.file_size)


def _header_without_record(file: IO[bytes]) -> bytes:
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    metadata.pop(METADATA_KEY, None)
    text = json.dumps([metadata, header], sort_keys=True, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text


def _add(digest: _Hash, content: IO[bytes], size: int) -> None:
    """Add `size` bytes, or what is there of them."""
    while size > 0 and (piece := content.read(min(_CHUNK, size))):
        digest.update(piece)
        size -= len(piece)
