"""What the pickle in a torch file claims, held against the bytes that are there.

torch (2.14) believes the pickle where it maps a file into memory or reads a legacy one: a storage that claims more than
its record reads its neighbours, one that claims terabytes is allocated, a view beyond its storage makes that grow, and
one that repeats one number may claim any size. A tuple of tuples, each used twice, takes years to be hashed.
"""

import io
import math
import re
import zipfile
from collections.abc import Container, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, cast

from normswap.checkpoints.opcodes import UNCLEAR, Rebuilt, Said, Storage, read_opcodes
from normswap.errors import CheckpointError

_LEGACY_HEADERS = 3  # magic number, protocol version, byte order: pickles of their own before object and keys
# A view may repeat what is stored (`expand`), but no network is that much larger than its file.
_LEAST_CLAIM = 64_000_000
_MOST_UNFOLDED = 1_000_000

# What a pickle of tensors may call of torch; all else that torch itself allows to be named may only be named.
_OF_STATE_DICTS = re.compile(
    r"torch\._utils\._rebuild_(tensor(_v[23])?|qtensor|sparse_tensor|parameter(_with_state)?|meta_tensor_no_storage"
    r"|device_tensor_from_cpu_tensor)|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
    r"|torch\.(Size|device|serialization\._get_layout)"
)

_BYTES = {
    **dict.fromkeys(("Byte", "Char", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4", "Untyped"), 1),
    **dict.fromkeys(("Short", "Half", "BFloat16"), 2),
    **dict.fromkeys(("Int", "Float", "QInt32"), 4),
    **dict.fromkeys(("Long", "Double", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}


def check_zip_claims(path: Path, file: IO[bytes] | None = None) -> Said:
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
        said = read_opcodes(io.BytesIO(archive.read(f"{root}/data.pkl")))
    _check(path, said)
    for storage in said.storages:
        there = sizes.get(f"data/{storage.key}")
        claimed = _bytes_of(storage)
        if there is not None and claimed is not None and claimed != there:
            raise CheckpointError(
                f"{path}: the storage {storage.key[:40]!r} claims {claimed:,} bytes and has {there:,}: damaged or "
                "hostile, get the file again"
            )
    return said


def check_legacy_claims(path: Path) -> Said:
    """Hold the pickle of a file from before torch 1.6 against the size of the file.

    Returns:
        What the pickle says.

    Raises:
        CheckpointError: as `check_zip_claims`; the storages together claim more than the file has.
    """
    # Mapped, since a text that claims four gigabytes would be given them before it is read.
    with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as mapped:
        *_, said, keys = [read_opcodes(cast(IO[bytes], mapped)) for _ in range(_LEGACY_HEADERS + 2)]
    _check(path, said)
    if not (said.whole and keys.whole):
        raise CheckpointError(
            f"{path}: truncated or damaged, or pickled in an unusual way (its pickle does not come to an end): save it "
            "again"
        )
    claimed = sum({storage.key: max(_bytes_of(storage) or 0, 0) for storage in said.storages}.values())
    if claimed > path.stat().st_size:
        raise CheckpointError(
            f"{path}: its tensors claim {claimed:,} bytes, the file has {path.stat().st_size:,}: truncated or damaged, "
            "copy it again"
        )
    return said


def check_calls(path: Path, said: Said, allowed: Container[str]) -> None:
    """Refuse a pickle that calls functions of torch which no state dict needs, or in a way that hides what they get.

    torch's own list of what a pickle may name has constructors that leave memory as it is (`torch.FloatTensor`), and
    functions that believe the numbers in the file (`_rebuild_nested_tensor`).

    Args:
        allowed: further names, of which the user has said that they are safe.

    Raises:
        CheckpointError: there is one.
    """
    if UNCLEAR in said.called:
        raise CheckpointError(
            f"{path}: pickled in an unusual way: the storage, shape or strides of a tensor, or some bytes, are not "
            "written out: save it again"
        )
    others = (name for name in said.called if name.startswith("torch.") and not _OF_STATE_DICTS.fullmatch(name))
    found = next((name for name in sorted(others) if name not in allowed), None)
    if found is not None:
        raise CheckpointError(
            f"{path}: calls {found[:80]}, which no state dict needs and which can read memory that is not the file's: "
            "save plain tensors"
        )


def check_size(path: Path, shape: Sequence[int], size: int) -> None:
    """Refuse a tensor of `size` bytes that is larger than any network in such a file.

    Raises:
        CheckpointError: it is.
    """
    there = path.stat().st_size
    if size > max(_LEAST_CLAIM, there):
        raise CheckpointError(
            f"{path}: a tensor claims the shape {_told(shape)}, the file has {there:,} bytes: damaged or hostile, get "
            "the file again"
        )


def check_unfolds(path: Path, said: Said) -> None:
    """Refuse a pickle with a tuple that would take years to be hashed.

    Raises:
        CheckpointError: there is one.
    """
    if said.largest_tuple > _MOST_UNFOLDED:
        raise CheckpointError(
            f"{path}: a tuple that unfolds to {said.largest_tuple:,} entries: hostile, do not open it"
        )


def _check(path: Path, said: Said) -> None:
    check_unfolds(path, said)
    negative = next((storage for storage in said.storages if storage.elements < 0), None)
    if negative is not None:
        raise CheckpointError(
            f"{path}: the storage {negative.key[:40]!r} claims {negative.elements:,} elements: damaged"
        )
    beyond = next((tensor for tensor in said.tensors if _reach(tensor) > tensor.storage.elements), None)
    if beyond is not None:
        raise CheckpointError(
            f"{path}: a tensor of the shape {_told(beyond.shape)} reaches beyond its storage of "
            f"{beyond.storage.elements:,} elements: damaged or hostile, get the file again"
        )
    largest = max(said.tensors, key=_size_of, default=None)
    if largest is not None:
        check_size(path, largest.shape, _size_of(largest))


def _bytes_of(storage: Storage) -> int | None:
    """The bytes that a storage claims, or None for a class that is not known here."""
    kind = re.fullmatch(r"torch\.(?:storage\.)?(\w+)Storage", storage.kind)
    each = _BYTES.get(kind.group(1)) if kind else None
    return None if each is None else each * storage.elements


def _reach(tensor: Rebuilt) -> int:
    """How many elements of its storage a tensor needs, from the first on."""
    if 0 in tensor.shape:
        return 0
    steps = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride, strict=False))
    return tensor.offset + steps + 1


def _told(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))[:80] or "a single number"


def _size_of(tensor: Rebuilt) -> int:
    return math.prod(tensor.shape) * (_bytes_of(tensor.storage._replace(elements=1)) or 1)
