"""Whether an archive is one to be read at all: its members or its header, before any reader acts on them.

Zip readers differ in what they make of an archive that contradicts itself, and unpack what they are told to. What
torch.save never writes and a reader could stumble over is refused here: bombs, overlapping or ambiguous members, names
that lead elsewhere. Of safetensors its own reader refuses nearly all; the rest is here.
"""

import json
import struct
import zipfile
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from normswap.errors import CheckpointError
from normswap.surgery.tracing import first_line

# A file has one member per tensor and a few more; of the largest networks, with their optimizer, some 100,000.
_MOST_MEMBERS = 250_000
# What small members (code, JSON) may gain by compression, in all; torch writes tensors as they are.
_MOST_INFLATED = 64_000_000
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # classic, strong, masked names
_UTF8, _SIZES_FOLLOW = 0x800, 0x8
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_END_RECORD = struct.Struct("<4s4H2IH")
_MOST_COMMENT = 0xFFFF
_UNKNOWN_16, _UNKNOWN_32 = 0xFFFF, 0xFFFFFFFF
# Beside the first folder of these there is no other: what torch's archives are known by.
_OF_TORCH = ("data.pkl", "version", "archive_format")
_MOST_ELEMENTS = 2**63 - 1


class LocalHeader(NamedTuple):
    """What stands in front of a member's data, and where the data begins and ends."""

    name: str
    flags: int
    method: int
    sizes: tuple[int, int]
    begin: int
    end: int


def check_archive(path: Path, part: IO[bytes] | None = None) -> set[str]:
    """Refuse a zip archive that torch.save cannot have written and that is not safe to read.

    Args:
        part: the archive, where it is a part of the file at `path`.

    Returns:
        The names of its members in their folder.

    Raises:
        CheckpointError: too many members; names that are double, absolute, lead elsewhere or into a second folder;
            members that are encrypted, packed by an unknown method, unpack to more than the file holds, overlap, or
            are described in two ways.
    """
    with nullcontext(part) if part is not None else open(path, "rb", buffering=0) as file:
        count = _member_count(path, file)
        if count > _MOST_MEMBERS:
            _refuse(path, f"{count:,} members, at most {_MOST_MEMBERS:,} are one for every tensor")
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:
            raise CheckpointError(f"{path}: truncated or damaged ({first_line(error)}): copy it again") from error
        members = archive.infolist()
        if len(members) not in (count, count + _UNKNOWN_16 + 1):
            _refuse(path, f"{len(members)} members where its end speaks of {count}")
        _check_names(path, [member.orig_filename for member in members])
        _check_sizes(path, members, file.seek(0, 2))
        _check_places(path, file, members, archive.start_dir)
    return {member.filename.partition("/")[2] for member in members}


def check_safetensors(path: Path) -> None:
    """Refuse what the reader of safetensors (0.8) lets pass: names that are double, shapes beyond 64 bits.

    Raises:
        CheckpointError: the header is of such a kind.
    """
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length), object_pairs_hook=lambda pairs: _unambiguous(path, pairs))
    for name, entry in header.items():
        if name != "__metadata__" and _elements(entry["shape"]) > _MOST_ELEMENTS:
            raise CheckpointError(f"{path}: the shape of {name!r} overflows 64 bits: damaged or hostile, get it again")


def _refuse(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path}: {what}: torch.save writes no such archive, get the file again from its source")


def _unambiguous(path: Path, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = _first_double([key for key, _ in pairs])
        raise CheckpointError(f"{path}: its header has {twice!r} twice: damaged or hostile, get the file again")
    return found


def _elements(shape: Sequence[int]) -> int:
    """The elements of a shape, dimensions of zero left out: readers multiply from either side."""
    count = 1
    for length in shape:
        count *= max(length, 1)
        if count > _MOST_ELEMENTS:
            break
    return count


def _first_double(names: Sequence[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _member_count(path: Path, file: IO[bytes]) -> int:
    """How many members the end of the archive speaks of: the directory itself may be too large to look at."""
    size = file.seek(0, 2)
    start = max(0, size - _END_RECORD.size - _MOST_COMMENT)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END_RECORD.size:
        raise CheckpointError(f"{path}: begins like a torch file and ends too early: truncated, copy it again")
    count: int = _END_RECORD.unpack_from(tail, at)[4]
    locator = at - 20
    if locator < 0 or tail[locator : locator + 4] != b"PK\x06\x07":
        return count
    file.seek(min(size, struct.unpack_from("<Q", tail, locator + 8)[0]))
    record = file.read(56)
    if record[:4] != b"PK\x06\x06" or len(record) < 56:
        _refuse(path, "its 64-bit end record is not where it should be")
    large: int = struct.unpack_from("<Q", record, 32)[0]
    if count not in (large, _UNKNOWN_16):
        _refuse(path, f"its two end records speak of {count} and of {large} members")
    return large


def _check_names(path: Path, names: Sequence[str]) -> None:
    for name in names:
        parts = name.split("/")
        if not name or name.startswith("/") or ":" in parts[0] or "\\" in name or "\0" in name or ".." in parts:
            _refuse(path, f"the member {name[:80]!r}, whose name leads elsewhere")
    twice = _first_double(names)
    if twice is not None:
        _refuse(path, f"two members of the name {twice[:80]!r}")
    root = names[0].partition("/")[0] if names else ""
    other = next((name for name in names if name.partition("/")[0] != root), None)
    if other is not None and not {f"{root}/{name}" for name in _OF_TORCH}.isdisjoint(names):
        _refuse(path, f"the member {other[:80]!r} beside the folder {root[:80]!r}")


def _check_sizes(path: Path, members: Sequence[zipfile.ZipInfo], size: int) -> None:
    for member in members:
        if member.flag_bits & _ENCRYPTED:
            _refuse(path, f"the member {member.filename[:80]!r} is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            _refuse(path, f"the member {member.filename[:80]!r} is packed by the method {member.compress_type}")
        if member.compress_type == zipfile.ZIP_STORED and member.file_size != member.compress_size:
            _refuse(path, f"the member {member.filename[:80]!r} has two sizes and is not compressed")
    inflated = sum(member.file_size for member in members if member.compress_type == zipfile.ZIP_DEFLATED)
    if inflated > max(_MOST_INFLATED, size):
        _refuse(path, f"unpacks to {inflated / 1e6:,.0f} MB and has {size / 1e6:,.1f} MB, a zip bomb")


def _check_places(path: Path, file: IO[bytes], members: Sequence[zipfile.ZipInfo], directory: int) -> None:
    """Every member lies in the file, before the directory, alone, and is what the directory says of it."""
    free = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        name = member.filename[:80]
        if member.header_offset < free:
            _refuse(path, f"the member {name!r} overlaps the one before it")
        local = read_local_header(file, member) if member.header_offset < directory else None
        if local is None or local.end > directory:
            _refuse(path, f"the member {name!r} does not lie within the file")
        if local.name != member.orig_filename or local.method != member.compress_type:
            _refuse(path, f"the member {name!r} calls itself {local.name[:80]!r} or packs itself otherwise")
        told = (member.compress_size, member.file_size)
        if not local.flags & _SIZES_FOLLOW and local.sizes != told and _UNKNOWN_32 not in local.sizes:
            _refuse(path, f"the member {name!r} has the sizes {told} and {local.sizes}")
        free = local.end


def read_local_header(file: IO[bytes], member: zipfile.ZipInfo) -> LocalHeader | None:
    """Return what stands in front of a member's data in the file, or None where no such header is."""
    file.seek(member.header_offset)
    raw = file.read(_LOCAL_HEADER.size)
    if len(raw) < _LOCAL_HEADER.size:
        return None
    magic, _, flags, method, _, _, _, packed, whole, name_length, extra_length = _LOCAL_HEADER.unpack(raw)
    if magic != b"PK\x03\x04":
        return None
    name = file.read(name_length).decode("utf-8" if flags & _UTF8 else "cp437", errors="replace")
    begin = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    return LocalHeader(name, flags, method, (packed, whole), begin, begin + member.compress_size)
