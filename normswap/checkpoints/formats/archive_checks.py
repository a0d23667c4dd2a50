"""Whether an archive is one to be read at all: its members or its header, before any reader acts on them.

Zip readers differ in what they make of an archive that contradicts itself, and unpack what they are told to. What
torch.save never writes and a reader could stumble over is refused here: bombs, overlapping or ambiguous members, names
that lead elsewhere. Of safetensors its own reader refuses nearly all; the rest is here.
"""

import io
import json
import math
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Container, Sequence
from contextlib import nullcontext
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, cast

from normswap.checkpoints.formats.pickle_opcodes import (
    UNRESOLVED,
    PickleSummary,
    StorageClaim,
    TensorClaim,
    summarize_pickle,
)
from normswap.errors import CheckpointError
from normswap.text import first_line

# MERGED DOC: What the pickle in a torch file claims, held against the bytes that are there.


# A file has one member per tensor and a few more; of the largest networks, with their optimizer, some 100,000.
_MAX_MEMBERS = 250_000
# What small members (code, JSON) may gain by compression, in all; torch writes tensors as they are.
_MAX_INFLATED_BYTES = 64_000_000
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # classic, strong, masked names
_UTF8, _SIZES_FOLLOW = 0x800, 0x8
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_END_RECORD = struct.Struct("<4s4H2IH")
_MAX_COMMENT = 0xFFFF
_UNKNOWN_16, _UNKNOWN_32 = 0xFFFF, 0xFFFFFFFF
# Beside the first folder of these there is no other: what torch's archives are known by.
_TORCH_MEMBERS = ("data.pkl", "version", "archive_format")
_MAX_ELEMENTS = 2**63 - 1


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
        count = _read_member_count(path, file)
        if count > _MAX_MEMBERS:
            _refuse(path, f"{count:,} members, at most {_MAX_MEMBERS:,} are one for every tensor")
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:
            raise CheckpointError(f"{path}: truncated or damaged ({first_line(error)}): copy it again") from error
        members = archive.infolist()
        if len(members) not in (count, count + _UNKNOWN_16 + 1):
            _refuse(path, f"{len(members)} members where its end speaks of {count}")
        _check_names(path, [member.orig_filename for member in members])
        _check_sizes(path, members, file.seek(0, 2))
        _check_offsets(path, file, members, archive.start_dir)
    return {member.filename.partition("/")[2] for member in members}


def check_safetensors(path: Path) -> None:
    """Refuse what the reader of safetensors (0.8) lets pass: names that are double, shapes beyond 64 bits.

    Raises:
        CheckpointError: the header is of such a kind.
    """
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length), object_pairs_hook=lambda pairs: _reject_duplicate_keys(path, pairs))
    for name, entry in header.items():
        if name != "__metadata__" and _count_elements(entry["shape"]) > _MAX_ELEMENTS:
            raise CheckpointError(f"{path}: the shape of {name!r} overflows 64 bits: damaged or hostile, get it again")


def _refuse(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path}: {what}: torch.save writes no such archive, get the file again from its source")


def _reject_duplicate_keys(path: Path, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        duplicate = _find_duplicate([key for key, _ in pairs])
        raise CheckpointError(f"{path}: its header has {duplicate!r} twice: damaged or hostile, get the file again")
    return found


def _count_elements(shape: Sequence[int]) -> int:
    """The elements of a shape, dimensions of zero left out: readers multiply from either side."""
    count = 1
    for length in shape:
        count *= max(length, 1)
        if count > _MAX_ELEMENTS:
            break
    return count


def _find_duplicate(names: Sequence[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _read_member_count(path: Path, file: IO[bytes]) -> int:
    """How many members the end of the archive speaks of: the directory itself may be too large to look at."""
    size = file.seek(0, 2)
    start = max(0, size - _END_RECORD.size - _MAX_COMMENT)
    file.seek(start)
    tail = file.read()
    position = tail.rfind(b"PK\x05\x06")
    if position < 0 or len(tail) - position < _END_RECORD.size:
        raise CheckpointError(f"{path}: begins like a torch file and ends too early: truncated, copy it again")
    count: int = _END_RECORD.unpack_from(tail, position)[4]
    locator = position - 20
    if locator < 0 or tail[locator : locator + 4] != b"PK\x06\x07":
        return count
    file.seek(min(size, struct.unpack_from("<Q", tail, locator + 8)[0]))
    record = file.read(56)
    if record[:4] != b"PK\x06\x06" or len(record) < 56:
        _refuse(path, "its 64-bit end record is not where it should be")
    count_64bit: int = struct.unpack_from("<Q", record, 32)[0]
    if count not in (count_64bit, _UNKNOWN_16):
        _refuse(path, f"its two end records speak of {count} and of {count_64bit} members")
    return count_64bit


def _check_names(path: Path, names: Sequence[str]) -> None:
    for name in names:
        parts = name.split("/")
        if not name or name.startswith("/") or ":" in parts[0] or "\\" in name or "\0" in name or ".." in parts:
            _refuse(path, f"the member {name[:80]!r}, whose name leads elsewhere")
    duplicate = _find_duplicate(names)
    if duplicate is not None:
        _refuse(path, f"two members of the name {duplicate[:80]!r}")
    root = names[0].partition("/")[0] if names else ""
    other = next((name for name in names if name.partition("/")[0] != root), None)
    if other is not None and not {f"{root}/{name}" for name in _TORCH_MEMBERS}.isdisjoint(names):
        _refuse(path, f"the member {other[:80]!r} beside the folder {root[:80]!r}")


def _check_sizes(path: Path, members: Sequence[zipfile.ZipInfo], size: int) -> None:
    for member in members:
        if member.flag_bits & _ENCRYPTED:
            _refuse(path, f"the member {member.filename[:80]!r} is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            _refuse(path, f"the member {member.filename[:80]!r} is packed by the method {member.compress_type}")
        if member.compress_type == zipfile.ZIP_STORED and member.file_size != member.compress_size:
            _refuse(path, f"the member {member.filename[:80]!r} has two sizes and is not compressed")
    inflated_bytes = sum(member.file_size for member in members if member.compress_type == zipfile.ZIP_DEFLATED)
    if inflated_bytes > max(_MAX_INFLATED_BYTES, size):
        _refuse(path, f"unpacks to {inflated_bytes / 1e6:,.0f} MB and has {size / 1e6:,.1f} MB, a zip bomb")


def _check_offsets(path: Path, file: IO[bytes], members: Sequence[zipfile.ZipInfo], directory: int) -> None:
    """Every member lies in the file, before the directory, alone, and is what the directory says of it."""
    next_offset = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        name = member.filename[:80]
        if member.header_offset < next_offset:
            _refuse(path, f"the member {name!r} overlaps the one before it")
        local = read_local_header(file, member) if member.header_offset < directory else None
        if local is None or local.end > directory:
            _refuse(path, f"the member {name!r} does not lie within the file")
        if local.name != member.orig_filename or local.method != member.compress_type:
            _refuse(path, f"the member {name!r} calls itself {local.name[:80]!r} or packs itself otherwise")
        declared_sizes = (member.compress_size, member.file_size)
        if not local.flags & _SIZES_FOLLOW and local.sizes != declared_sizes and _UNKNOWN_32 not in local.sizes:
            _refuse(path, f"the member {name!r} has the sizes {declared_sizes} and {local.sizes}")
        next_offset = local.end


def read_local_header(file: IO[bytes], member: zipfile.ZipInfo) -> LocalHeader | None:
    """Return what stands in front of a member's data in the file, or None where no such header is."""
    file.seek(member.header_offset)
    raw = file.read(_LOCAL_HEADER.size)
    if len(raw) < _LOCAL_HEADER.size:
        return None
    magic, _, flags, method, _, _, _, compressed_size, uncompressed_size, name_length, extra_length = (
        _LOCAL_HEADER.unpack(raw)
    )
    if magic != b"PK\x03\x04":
        return None
    name = file.read(name_length).decode("utf-8" if flags & _UTF8 else "cp437", errors="replace")
    begin = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    return LocalHeader(name, flags, method, (compressed_size, uncompressed_size), begin, begin + member.compress_size)


_NUM_LEGACY_HEADERS = 3  # magic number, protocol version, byte order: pickles of their own before object and keys
# A view may repeat what is stored (`expand`), but no network is that much larger than its file.
_MIN_CHECKED_BYTES = 64_000_000
_MAX_TUPLE_ENTRIES = 1_000_000

# What a pickle of tensors may call of torch; all else that torch itself allows to be named may only be named.
_STATE_DICT_CALLS = re.compile(
    r"torch\._utils\._rebuild_(tensor(_v[23])?|qtensor|sparse_tensor|parameter(_with_state)?|meta_tensor_no_storage"
    r"|device_tensor_from_cpu_tensor)|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
    r"|torch\.(Size|device|serialization\._get_layout)"
)

_ITEM_SIZES = {
    **dict.fromkeys(("Byte", "Char", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4", "Untyped"), 1),
    **dict.fromkeys(("Short", "Half", "BFloat16"), 2),
    **dict.fromkeys(("Int", "Float", "QInt32"), 4),
    **dict.fromkeys(("Long", "Double", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}


def check_zip_pickle(path: Path, file: IO[bytes] | None = None) -> PickleSummary:
    """Hold the pickle of a zip archive that has been checked against its records.

    Args:
        file: the archive, where it is a part of the file at `path`.

    Returns:
        What the pickle says.

    Raises:
        CheckpointError: a storage claims another size than its record has, a tensor is larger than any network in
            such a file, or a tuple is a bomb. A pickle that cannot be followed is left to torch.
    """
    with zipfile.ZipFile(file or path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        sizes = {member.filename.removeprefix(f"{root}/"): member.file_size for member in archive.infolist()}
        summary = summarize_pickle(io.BytesIO(archive.read(f"{root}/data.pkl")))
    _check_summary(path, summary)
    for storage in summary.storages:
        actual = sizes.get(f"data/{storage.key}")
        claimed = _claimed_bytes(storage)
        if actual is not None and claimed is not None and claimed != actual:
            raise CheckpointError(
                f"{path}: the storage {storage.key[:40]!r} claims {claimed:,} bytes and has {actual:,}: damaged or "
                "hostile, get the file again"
            )
    return summary


def check_legacy_pickle(path: Path) -> PickleSummary:
    """Hold the pickle of a file from before torch 1.6 against the size of the file.

    Returns:
        What the pickle says.

    Raises:
        CheckpointError: as `check_zip_pickle`; the storages together claim more than the file has.
    """
    # Mapped, since a text that claims four gigabytes would be given them before it is read.
    with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as mapped:
        *_, summary, keys = [summarize_pickle(cast(IO[bytes], mapped)) for _ in range(_NUM_LEGACY_HEADERS + 2)]
    _check_summary(path, summary)
    if not (summary.is_complete and keys.is_complete):
        raise CheckpointError(
            f"{path}: truncated or damaged, or pickled in an unusual way (its pickle does not come to an end): save it "
            "again"
        )
    claimed = sum({storage.key: max(_claimed_bytes(storage) or 0, 0) for storage in summary.storages}.values())
    if claimed > path.stat().st_size:
        raise CheckpointError(
            f"{path}: its tensors claim {claimed:,} bytes, the file has {path.stat().st_size:,}: truncated or damaged, "
            "copy it again"
        )
    return summary


def check_calls(path: Path, summary: PickleSummary, allowed: Container[str]) -> None:
    """Refuse a pickle that calls functions of torch which no state dict needs, or in a way that hides what they get.

    torch's own list of what a pickle may name has constructors that leave memory as it is (`torch.FloatTensor`), and
    functions that believe the numbers in the file (`_rebuild_nested_tensor`).

    Args:
        allowed: further names, of which the user has said that they are safe.

    Raises:
        CheckpointError: there is one.
    """
    if UNRESOLVED in summary.called_names:
        raise CheckpointError(
            f"{path}: pickled in an unusual way: the storage, shape or strides of a tensor, or some bytes, are not "
            "written out: save it again"
        )
    others = (
        name for name in summary.called_names if name.startswith("torch.") and not _STATE_DICT_CALLS.fullmatch(name)
    )
    found = next((name for name in sorted(others) if name not in allowed), None)
    if found is not None:
        raise CheckpointError(
            f"{path}: calls {found[:80]}, which no state dict needs and which can read memory that is not the file's: "
            "save plain tensors"
        )


def check_tensor_size(path: Path, shape: Sequence[int], size: int) -> None:
    """Refuse a tensor of `size` bytes that is larger than any network in such a file.

    Raises:
        CheckpointError: it is.
    """
    actual = path.stat().st_size
    if size > max(_MIN_CHECKED_BYTES, actual):
        raise CheckpointError(
            f"{path}: a tensor claims the shape {_format_shape(shape)}, the file has {actual:,} bytes: damaged or hostile, get "
            "the file again"
        )


def check_tuple_size(path: Path, summary: PickleSummary) -> None:
    """Refuse a pickle with a tuple that would take years to be hashed.

    Raises:
        CheckpointError: there is one.
    """
    if summary.max_tuple_entries > _MAX_TUPLE_ENTRIES:
        raise CheckpointError(
            f"{path}: a tuple that unfolds to {summary.max_tuple_entries:,} entries: hostile, do not open it"
        )


def _check_summary(path: Path, summary: PickleSummary) -> None:
    check_tuple_size(path, summary)
    negative = next((storage for storage in summary.storages if storage.elements < 0), None)
    if negative is not None:
        raise CheckpointError(
            f"{path}: the storage {negative.key[:40]!r} claims {negative.elements:,} elements: damaged"
        )
    out_of_bounds = next(
        (tensor for tensor in summary.tensors if _required_elements(tensor) > tensor.storage.elements), None
    )
    if out_of_bounds is not None:
        raise CheckpointError(
            f"{path}: a tensor of the shape {_format_shape(out_of_bounds.shape)} reaches beyond its storage of "
            f"{out_of_bounds.storage.elements:,} elements: damaged or hostile, get the file again"
        )
    largest = max(summary.tensors, key=_tensor_bytes, default=None)
    if largest is not None:
        check_tensor_size(path, largest.shape, _tensor_bytes(largest))


def _claimed_bytes(storage: StorageClaim) -> int | None:
    """The bytes that a storage claims, or None for a class that is not known here."""
    kind = re.fullmatch(r"torch\.(?:storage\.)?(\w+)Storage", storage.kind)
    each = _ITEM_SIZES.get(kind.group(1)) if kind else None
    return None if each is None else each * storage.elements


def _required_elements(tensor: TensorClaim) -> int:
    """How many elements of its storage a tensor needs, from the first on."""
    if 0 in tensor.shape:
        return 0
    steps = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride, strict=False))
    return tensor.offset + steps + 1


def _format_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))[:80] or "a single number"


def _tensor_bytes(tensor: TensorClaim) -> int:
    return math.prod(tensor.shape) * (_claimed_bytes(tensor.storage._replace(elements=1)) or 1)
