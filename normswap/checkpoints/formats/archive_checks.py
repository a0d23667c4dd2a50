"""Checks of archives, safetensors headers and pickles that run before any reader opens the file.

Zip readers disagree about an archive that contradicts itself, and they extract whatever it lists. So the checks refuse
what torch.save never writes and what could harm a reader: zip bombs, overlapping or ambiguous members, names that point
outside the archive. The reader of safetensors refuses nearly all such files itself; the remaining cases are here. The
sizes that a pickle declares for storages and tensors are compared with the bytes that the file has.
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

# --- zip archives and safetensors headers

# A file has one member per tensor and a few more: about 100,000 for the largest networks with their optimizer.
_MAX_MEMBERS = 250_000
# The largest total size of compressed members (code, JSON); torch writes tensors uncompressed.
_MAX_INFLATED_BYTES = 64_000_000
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # classic, strong, masked names
_UTF8, _SIZES_FOLLOW = 0x800, 0x8
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_END_RECORD = struct.Struct("<4s4H2IH")
_MAX_COMMENT = 0xFFFF
_UNKNOWN_16, _UNKNOWN_32 = 0xFFFF, 0xFFFFFFFF
# An archive of torch has these members in its first folder, and no second folder.
_TORCH_MEMBERS = ("data.pkl", "version", "archive_format")
_MAX_ELEMENTS = 2**63 - 1


class LocalHeader(NamedTuple):
    """The header in front of a member's data, with the offsets at which the data starts and ends."""

    name: str
    flags: int
    method: int
    sizes: tuple[int, int]
    begin: int
    end: int


def check_archive(path: Path, part: IO[bytes] | None = None) -> set[str]:
    """Refuse a zip archive that torch.save cannot have written and that is unsafe to read.

    Args:
        part: the archive, if it is only a part of the file at `path`.

    Returns:
        The names of its members inside their folder.

    Raises:
        CheckpointError: too many members; duplicate or absolute names, names that point outside the archive or into a
            second folder; members that are encrypted, use an unknown compression, inflate to more than the size of the
            file, overlap, or have two contradicting headers.
    """
    with nullcontext(part) if part is not None else open(path, "rb", buffering=0) as file:
        count = _read_member_count(path, file)
        if count > _MAX_MEMBERS:
            _refuse(path, f"{count:,} archive members, expected at most {_MAX_MEMBERS:,}")
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:
            raise CheckpointError(f"{path}: truncated or damaged ({first_line(error)}): copy it again") from error
        members = archive.infolist()
        if len(members) not in (count, count + _UNKNOWN_16 + 1):
            _refuse(path, f"{len(members)} archive members, its end record lists {count}")
        _check_names(path, [member.orig_filename for member in members])
        _check_sizes(path, members, file.seek(0, 2))
        _check_offsets(path, file, members, archive.start_dir)
    return {member.filename.partition("/")[2] for member in members}


def check_safetensors(path: Path) -> None:
    """Refuse what the reader of safetensors (0.8) accepts: duplicate names, and shapes that overflow 64 bits.

    Raises:
        CheckpointError: the header has one of the two.
    """
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length), object_pairs_hook=lambda pairs: _reject_duplicate_keys(path, pairs))
    for name, entry in header.items():
        if name != "__metadata__" and _count_elements(entry["shape"]) > _MAX_ELEMENTS:
            raise CheckpointError(
                f"{path}: the shape of {name!r} overflows 64 bits: the file is damaged or malicious, download it again"
            )


def _refuse(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path}: {what}: torch.save never writes such an archive, download it again")


def _reject_duplicate_keys(path: Path, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        duplicate = _find_duplicate([key for key, _ in pairs])
        raise CheckpointError(
            f"{path}: its header has {duplicate!r} twice: the file is damaged or malicious, download it again"
        )
    return found


def _count_elements(shape: Sequence[int]) -> int:
    """The product of the nonzero dimensions, since readers multiply from either end."""
    count = 1
    for length in shape:
        count *= max(length, 1)
        if count > _MAX_ELEMENTS:
            break
    return count


def _find_duplicate(names: Sequence[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _read_member_count(path: Path, file: IO[bytes]) -> int:
    """The number of members by the end record; the directory itself may be too large to read."""
    size = file.seek(0, 2)
    start = max(0, size - _END_RECORD.size - _MAX_COMMENT)
    file.seek(start)
    tail = file.read()
    position = tail.rfind(b"PK\x05\x06")
    if position < 0 or len(tail) - position < _END_RECORD.size:
        raise CheckpointError(f"{path}: starts like a torch file and has no end record: truncated, copy it again")
    count: int = _END_RECORD.unpack_from(tail, position)[4]
    locator = position - 20
    if locator < 0 or tail[locator : locator + 4] != b"PK\x06\x07":
        return count
    file.seek(min(size, struct.unpack_from("<Q", tail, locator + 8)[0]))
    record = file.read(56)
    if record[:4] != b"PK\x06\x06" or len(record) < 56:
        _refuse(path, "no 64-bit end record at its declared offset")
    count_64bit: int = struct.unpack_from("<Q", record, 32)[0]
    if count not in (count_64bit, _UNKNOWN_16):
        _refuse(path, f"its two end records list {count} and {count_64bit} members")
    return count_64bit


def _check_names(path: Path, names: Sequence[str]) -> None:
    for name in names:
        parts = name.split("/")
        if not name or name.startswith("/") or ":" in parts[0] or "\\" in name or "\0" in name or ".." in parts:
            _refuse(path, f"the name of the member {name[:80]!r} points outside the archive")
    duplicate = _find_duplicate(names)
    if duplicate is not None:
        _refuse(path, f"two members have the name {duplicate[:80]!r}")
    root = names[0].partition("/")[0] if names else ""
    other = next((name for name in names if name.partition("/")[0] != root), None)
    if other is not None and not {f"{root}/{name}" for name in _TORCH_MEMBERS}.isdisjoint(names):
        _refuse(path, f"the member {other[:80]!r} is outside its folder {root[:80]!r}")


def _check_sizes(path: Path, members: Sequence[zipfile.ZipInfo], size: int) -> None:
    for member in members:
        if member.flag_bits & _ENCRYPTED:
            _refuse(path, f"the member {member.filename[:80]!r} is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            _refuse(path, f"the member {member.filename[:80]!r} has the unknown compression {member.compress_type}")
        if member.compress_type == zipfile.ZIP_STORED and member.file_size != member.compress_size:
            _refuse(path, f"the member {member.filename[:80]!r} is uncompressed and has two different sizes")
    inflated_bytes = sum(member.file_size for member in members if member.compress_type == zipfile.ZIP_DEFLATED)
    if inflated_bytes > max(_MAX_INFLATED_BYTES, size):
        _refuse(path, f"a zip bomb, its {size / 1e6:,.1f} MB inflate to {inflated_bytes / 1e6:,.0f} MB")


def _check_offsets(path: Path, file: IO[bytes], members: Sequence[zipfile.ZipInfo], directory: int) -> None:
    """Refuse members that overlap, reach into the directory, or have a header that contradicts the directory."""
    next_offset = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        name = member.filename[:80]
        if member.header_offset < next_offset:
            _refuse(path, f"the member {name!r} overlaps the previous one")
        local = read_local_header(file, member) if member.header_offset < directory else None
        if local is None or local.end > directory:
            _refuse(path, f"the member {name!r} has no data inside the file")
        if local.name != member.orig_filename or local.method != member.compress_type:
            _refuse(
                path,
                f"the header of the member {name!r} has another name ({local.name[:80]!r}) or another compression than "
                "the directory",
            )
        declared_sizes = (member.compress_size, member.file_size)
        if not local.flags & _SIZES_FOLLOW and local.sizes != declared_sizes and _UNKNOWN_32 not in local.sizes:
            _refuse(path, f"the member {name!r} has contradicting sizes, {declared_sizes} and {local.sizes}")
        next_offset = local.end


def read_local_header(file: IO[bytes], member: zipfile.ZipInfo) -> LocalHeader | None:
    """Return the header in front of a member's data, or None if there is none."""
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


# --- pickles compared with the file

_NUM_LEGACY_HEADERS = 3  # pickles before the object and the keys: magic number, protocol version, byte order
# A view may repeat stored elements (`expand`), but no network becomes larger than its file and this size.
_MIN_CHECKED_BYTES = 64_000_000
_MAX_TUPLE_ENTRIES = 1_000_000

# The functions of torch that a pickle of tensors may call; it may name, but not call, what else torch allows.
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
    """Compare the pickle of a zip archive with the sizes of its records; after `check_archive`.

    Args:
        file: the archive, if it is only a part of the file at `path`.

    Returns:
        The summary of the pickle.

    Raises:
        CheckpointError: a storage declares another size than its record has, a tensor is larger than any network in a
            file of this size, or a tuple is a bomb. The reader of torch refuses a pickle that cannot be parsed.
    """
    with zipfile.ZipFile(file or path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        sizes = {member.filename.removeprefix(f"{root}/"): member.file_size for member in archive.infolist()}
        summary = summarize_pickle(io.BytesIO(archive.read(f"{root}/data.pkl")))
    _check_summary(path, summary)
    for storage in summary.storages:
        actual = sizes.get(f"data/{storage.key}")
        declared = _declared_bytes(storage)
        if actual is not None and declared is not None and declared != actual:
            raise CheckpointError(
                f"{path}: the storage {storage.key[:40]!r} declares {declared:,} bytes, its record has {actual:,}: the "
                "file is damaged or malicious, download it again"
            )
    return summary


def check_legacy_pickle(path: Path) -> PickleSummary:
    """Compare the pickle of a file from before torch 1.6 with the size of the file.

    Returns:
        The summary of the pickle.

    Raises:
        CheckpointError: as `check_zip_pickle`, or the storages together declare more bytes than the file has.
    """
    # Mapped, since reading a string that declares four gigabytes would allocate them first.
    with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as mapped:
        *_, summary, keys = [summarize_pickle(cast(IO[bytes], mapped)) for _ in range(_NUM_LEGACY_HEADERS + 2)]
    _check_summary(path, summary)
    if not (summary.is_complete and keys.is_complete):
        raise CheckpointError(
            f"{path}: truncated or damaged, or pickled in an unusual way (its pickle has no end): save it again"
        )
    declared = sum({storage.key: max(_declared_bytes(storage) or 0, 0) for storage in summary.storages}.values())
    if declared > path.stat().st_size:
        raise CheckpointError(
            f"{path}: its tensors declare {declared:,} bytes, the file has {path.stat().st_size:,}: truncated or "
            "damaged, copy it again"
        )
    return summary


def check_calls(path: Path, summary: PickleSummary, allowed: Container[str]) -> None:
    """Refuse a pickle that calls functions of torch which no state dict needs, or hides the arguments of its calls.

    The names that torch allows in a pickle include constructors that leave memory uninitialized (`torch.FloatTensor`)
    and functions that do not check the numbers in the file (`_rebuild_nested_tensor`).

    Args:
        allowed: further names, which the user has declared safe.

    Raises:
        CheckpointError: the pickle has such a call.
    """
    if UNRESOLVED in summary.called_names:
        raise CheckpointError(
            f"{path}: pickled in an unusual way: it computes the storage, shape or strides of a tensor, or some bytes: "
            "save it again"
        )
    others = (
        name for name in summary.called_names if name.startswith("torch.") and not _STATE_DICT_CALLS.fullmatch(name)
    )
    found = next((name for name in sorted(others) if name not in allowed), None)
    if found is not None:
        raise CheckpointError(
            f"{path}: calls {found[:80]}, which no state dict needs and which can read memory outside the file: save "
            "plain tensors"
        )


def check_tensor_size(path: Path, shape: Sequence[int], size: int) -> None:
    """Refuse a tensor of `size` bytes that is larger than any network in a file of this size.

    Raises:
        CheckpointError: the tensor is too large.
    """
    actual = path.stat().st_size
    if size > max(_MIN_CHECKED_BYTES, actual):
        raise CheckpointError(
            f"{path}: a tensor declares the shape {_format_shape(shape)}, the file has {actual:,} bytes: it is damaged "
            "or malicious, download it again"
        )


def check_tuple_size(path: Path, summary: PickleSummary) -> None:
    """Refuse a pickle with a nested tuple that would take years to hash.

    Raises:
        CheckpointError: the pickle has such a tuple.
    """
    if summary.max_tuple_entries > _MAX_TUPLE_ENTRIES:
        raise CheckpointError(
            f"{path}: a nested tuple expands to {summary.max_tuple_entries:,} entries: the file is malicious, do not "
            "open it"
        )


def _check_summary(path: Path, summary: PickleSummary) -> None:
    check_tuple_size(path, summary)
    negative = next((storage for storage in summary.storages if storage.elements < 0), None)
    if negative is not None:
        raise CheckpointError(
            f"{path}: the storage {negative.key[:40]!r} declares {negative.elements:,} elements: damaged, copy it again"
        )
    out_of_bounds = next(
        (tensor for tensor in summary.tensors if _required_elements(tensor) > tensor.storage.elements), None
    )
    if out_of_bounds is not None:
        raise CheckpointError(
            f"{path}: a tensor of the shape {_format_shape(out_of_bounds.shape)} reaches beyond its storage of "
            f"{out_of_bounds.storage.elements:,} elements: the file is damaged or malicious, download it again"
        )
    largest = max(summary.tensors, key=_tensor_bytes, default=None)
    if largest is not None:
        check_tensor_size(path, largest.shape, _tensor_bytes(largest))


def _declared_bytes(storage: StorageClaim) -> int | None:
    """The bytes that a storage declares, or None for an unknown class of storage."""
    kind = re.fullmatch(r"torch\.(?:storage\.)?(\w+)Storage", storage.kind)
    each = _ITEM_SIZES.get(kind.group(1)) if kind else None
    return None if each is None else each * storage.elements


def _required_elements(tensor: TensorClaim) -> int:
    """The number of elements that the storage of a tensor must have."""
    if 0 in tensor.shape:
        return 0
    steps = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride, strict=False))
    return tensor.offset + steps + 1


def _format_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))[:80] or "a single number"


def _tensor_bytes(tensor: TensorClaim) -> int:
    return math.prod(tensor.shape) * (_declared_bytes(tensor.storage._replace(elements=1)) or 1)
