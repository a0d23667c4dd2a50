"""Archives of `torch.export.save` (.pt2): `read_weights` runs no code, `load_program` may.

Since torch 2.9 an archive stores every weight as raw bytes, and a JSON file lists the tensors; `read_weights` checks
that the two agree. Only torch can load the graph, the pickled example inputs and pickled weights, and doing so may run
code: callers use `load_program` only after the user has passed `trust=True`.
"""

import json
import math
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.export import ExportedProgram

from normswap.checkpoints.formats.archive_checks import check_tensor_size
from normswap.checkpoints.formats.hf_folder import RECORD
from normswap.errors import CheckpointError
from normswap.surgery.graphs.exported_program import suppress_output
from normswap.text import first_line

_MODELS_FOLDER, _CONFIG_FILE, _COMPILED_FOLDER = "models/", "data/weights/{}_weights_config.json", "data/aotinductor/"
_WEIGHTS = "data/weights/"
# The record is one of the `extra_files` that torch.export.load returns.
RECORD_ENTRY = f"extra/{RECORD}"
_LEGACY_WEIGHT_FILES = ("data/weights/{}.pt", "serialized_state_dict.pt")

# ScalarType and Layout of torch._export.serde.schema; their numbers are part of the format.
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    9: torch.complex32,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
    28: torch.uint16,
    29: torch.float8_e4m3fn,
    30: torch.float8_e5m2,
    31: torch.float8_e4m3fnuz,
    32: torch.float8_e5m2fnuz,
    33: torch.float8_e8m0fnu,
    34: torch.uint32,
    35: torch.uint64,
}
_STRIDED_LAYOUT = 7


class Program(NamedTuple):
    """An exported program and the extra files in its archive, by name."""

    program: ExportedProgram
    extra_files: Mapping[str, Any]


class _View(NamedTuple):
    """A tensor as a view of the bytes of an archive member (`record`); offset and strides in elements."""

    record: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def is_program(names: set[str]) -> bool:
    """Return whether an archive with these members (their names inside its folder) is one of `torch.export.save`."""
    return bool(names & {"archive_format", "serialized_exported_program.json"})


def read_weights(path: Path) -> "OrderedDict[str, Any]":
    """Return the state dict of the program in an archive; of several programs, their state dicts by name.

    `check_archive` must have accepted the archive.

    Raises:
        CheckpointError: there is no program, its weights are pickled, or their declared shapes do not fit their bytes.
    """
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        sizes = {member.filename.removeprefix(f"{root}/"): member.file_size for member in archive.infolist()}
        views = {name: _read_views(path, archive, root, name, sizes) for name in _model_names(path, sizes)}
        storages: dict[str, Tensor] = {}
        for view in (view for found in views.values() for view in found.values()):
            if view.record not in storages:
                data = bytearray(archive.read(f"{root}/{view.record}"))
                storages[view.record] = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0)
    states = OrderedDict(
        (model, OrderedDict((name, _make_tensor(view, storages[view.record])) for name, view in found.items()))
        for model, found in views.items()
    )
    return states if len(states) > 1 else next(iter(states.values()))


def load_program(path: Path) -> Program:
    """Return the program in an archive. This unpickles objects in the file, which can run any code.

    Raises:
        CheckpointError: torch cannot load it, or there are several programs.
    """
    extra: dict[str, Any] = {RECORD: ""}  # torch fills only a mapping that is not empty
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        names = [name.removeprefix(f"{root}/") for name in archive.namelist()]
    models = [name for name in names if name.startswith(_MODELS_FOLDER)]
    if len(models) > 1:
        raise CheckpointError(
            f"{path}: expected one program, got {len(models)} in one archive: save each with torch.export.save, or "
            "convert the weights of one with architecture='timm:NAME' and entry='NAME'"
        )
    try:
        with suppress_output(), open(path, "rb") as file:
            program = torch.export.load(file, extra_files=extra)
    except Exception as error:  # a damaged or malicious file may raise any error
        raise CheckpointError(
            f"{path}: truncated or damaged, or from another version of torch ({first_line(error)}): export it again"
        ) from error
    return Program(program, {name: text for name, text in extra.items() if name != RECORD})


def save_program(path: Path, program: Program) -> None:
    """Write a program with its extra files to `path`."""
    with suppress_output(), open(path, "wb") as file:
        torch.export.save(program.program, file, extra_files=dict(program.extra_files))


def digest_members(path: Path) -> str:
    """Return the SHA-256, as hexadecimal digits, of all members of an archive except the record."""
    digest = sha256()
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.partition("/")[2] != RECORD_ENTRY:
                digest.update(f"{member.filename}\0{member.file_size}\0".encode())
                with archive.open(member) as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
    return digest.hexdigest()


def _model_names(path: Path, sizes: Mapping[str, int]) -> list[str]:
    """The names of the programs in an archive that stores their weights as raw bytes."""
    names = [n.removeprefix(_MODELS_FOLDER).removesuffix(".json") for n in sizes if n.startswith(_MODELS_FOLDER)]
    if any(older.format(name) in sizes for older in _LEGACY_WEIGHT_FILES for name in names or [""]):
        _refuse(path, "an exported program of an older torch, with pickled weights", "convert the program")
    if not names:
        what = "compiled code of AOTInductor" if any(n.startswith(_COMPILED_FOLDER) for n in sizes) else "an archive"
        raise CheckpointError(
            f"{path}: expected an exported program, got {what} without one: convert the Python model's state_dict(), "
            "then export or compile it again"
        )
    return names


def _refuse(path: Path, what: str, do: str) -> NoReturn:
    raise CheckpointError(
        f"{path}: {what}; loading them may run code: pass trust=True to {do} if you trust the source of the file, or "
        "convert the Python model's state_dict() and export it again"
    )


def _read_views(
    path: Path, archive: zipfile.ZipFile, root: str, model: str, sizes: Mapping[str, int]
) -> dict[str, _View]:
    """The weights that the JSON of a program lists, after a check that their bytes are in the archive."""
    config = json.loads(archive.read(f"{root}/{_CONFIG_FILE.format(model)}"))["config"]
    pickled = [name for name, entry in config.items() if entry["use_pickle"]]
    if pickled:
        _refuse(path, f"{len(pickled)} weights are pickled objects ({pickled[0][:80]!r})", "load the program")
    views = {name: _parse_view(path, name, entry) for name, entry in config.items()}
    for name, view in views.items():
        _check_bounds(path, name, view, sizes.get(view.record))
    return views


def _parse_view(path: Path, name: str, entry: Mapping[str, Any]) -> _View:
    meta = entry["tensor_meta"]
    dtype = _DTYPES.get(meta["dtype"])
    if dtype is None or meta["layout"] != _STRIDED_LAYOUT:
        raise CheckpointError(
            f"{path}: the weight {name[:80]!r} has the dtype {meta['dtype']} and the layout {meta['layout']} of "
            "torch.export, which normswap does not know: convert the Python model's state_dict()"
        )
    shape, stride = (tuple(_parse_int(size) for size in meta[key]) for key in ("sizes", "strides"))
    return _View(_WEIGHTS + entry["path_name"], dtype, shape, stride, _parse_int(meta["storage_offset"]))


def _parse_int(value: Mapping[str, Any]) -> int:
    number = value["as_int"]
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"expected a number, got {value!r:.80}")
    return number


def _check_bounds(path: Path, name: str, view: _View, size: int | None) -> None:
    """Refuse a tensor that reaches beyond its record, or is larger than any network in a file of this size."""
    if size is None or len(view.shape) != len(view.stride):
        raise ValueError(f"{name[:80]!r} has no record, or a shape and strides of different lengths")
    steps = sum((length - 1) * step for length, step in zip(view.shape, view.stride, strict=True))
    needed = 0 if 0 in view.shape else (view.offset + steps + 1) * view.dtype.itemsize
    if needed > size or size % view.dtype.itemsize:
        raise CheckpointError(
            f"{path}: the weight {name[:80]!r} declares {needed:,} bytes, its record has {size:,}: the file is damaged "
            "or malicious, download it again"
        )
    check_tensor_size(path, view.shape, math.prod(view.shape) * view.dtype.itemsize)


def _make_tensor(view: _View, storage: Tensor) -> Tensor:
    tensor = torch.empty(0, dtype=view.dtype)
    return tensor.set_(storage.untyped_storage(), view.offset, view.shape, view.stride)
