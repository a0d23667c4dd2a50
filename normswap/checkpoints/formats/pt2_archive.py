"""Archives of `torch.export.save` (.pt2): weights read without running anything, whole programs only where trusted.

Since torch 2.9 an archive holds every weight as raw bytes and says in JSON which tensor lies where; these are read here
and held against each other. The graph, the pickled example inputs and pickled weights of other kinds are torch's to
load, which may run code: only `load_program` does, and its caller has asked for trust.
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
# Where the record lies: among what torch.export.load hands out as `extra_files`.
RECORD_ENTRY = f"extra/{RECORD}"
_LEGACY_WEIGHT_FILES = ("data/weights/{}.pt", "serialized_state_dict.pt")

# Of torch._export.serde.schema, whose numbers are the format's: ScalarType and Layout.
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
    """An exported program, and the texts that travel beside it in its archive."""

    program: ExportedProgram
    extra_files: Mapping[str, Any]


class _View(NamedTuple):
    """Which tensor of which type is seen in the bytes of a record."""

    record: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def is_program(names: set[str]) -> bool:
    """Say whether an archive of these members, told without its folder, is one of `torch.export.save`."""
    return bool(names & {"archive_format", "serialized_exported_program.json"})


def read_weights(path: Path) -> "OrderedDict[str, Any]":
    """Return the state dict of the program in an archive that has been checked; of several programs, each by its name.

    Raises:
        CheckpointError: there is no program, its weights are pickled, or what is said of them does not fit their bytes.
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
    """Return the program in an archive. What it pickles is unpickled: that runs whatever the file says.

    Raises:
        CheckpointError: torch cannot load it, or there are several.
    """
    extra: dict[str, Any] = {RECORD: ""}  # an empty one is not filled
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        names = [name.removeprefix(f"{root}/") for name in archive.namelist()]
    models = [name for name in names if name.startswith(_MODELS_FOLDER)]
    if len(models) > 1:
        raise CheckpointError(
            f"{path}: {len(models)} programs in one archive: save each by torch.export.save, or convert the weights of "
            "one with architecture='timm:NAME' and entry='NAME'"
        )
    try:
        with suppress_output(), open(path, "rb") as file:
            program = torch.export.load(file, extra_files=extra)
    except Exception as error:  # what a damaged or hostile file raises is anybody's guess
        raise CheckpointError(
            f"{path}: truncated or damaged, or of another version of torch ({first_line(error)}): export it again"
        ) from error
    return Program(program, {name: text for name, text in extra.items() if name != RECORD})


def save_program(path: Path, program: Program) -> None:
    """Write a program with its extra files to `path`."""
    with suppress_output(), open(path, "wb") as file:
        torch.export.save(program.program, file, extra_files=dict(program.extra_files))


def digest_members(path: Path) -> str:
    """Return the SHA-256, as hexadecimal digits, of everything in an archive but the record: the graph, too."""
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
    """The names of the programs in an archive whose weights lie there as raw bytes."""
    names = [n.removeprefix(_MODELS_FOLDER).removesuffix(".json") for n in sizes if n.startswith(_MODELS_FOLDER)]
    if any(older.format(name) in sizes for older in _LEGACY_WEIGHT_FILES for name in names or [""]):
        _refuse(path, "an exported program of an older torch, which pickled its weights", "convert the program")
    if not names:
        what = "compiled code of AOTInductor" if any(n.startswith(_COMPILED_FOLDER) for n in sizes) else "an archive"
        raise CheckpointError(
            f"{path}: {what} without an exported program, and so without norms: convert the Python model's "
            "state_dict(), then export or compile it again"
        )
    return names


def _refuse(path: Path, what: str, do: str) -> NoReturn:
    raise CheckpointError(
        f"{path}: {what}; reading them may run code: pass trust=True to {do} if you trust where it comes "
        "from, or convert the Python model's state_dict() and export it again"
    )


def _read_views(
    path: Path, archive: zipfile.ZipFile, root: str, model: str, sizes: Mapping[str, int]
) -> dict[str, _View]:
    """What the JSON of a program says of its weights, each held against the bytes that are there."""
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
            f"{path}: the weight {name[:80]!r} has the type {meta['dtype']} and the layout {meta['layout']} of "
            "torch.export, which are not known here: convert the Python model's state_dict()"
        )
    shape, stride = (tuple(_parse_int(size) for size in meta[key]) for key in ("sizes", "strides"))
    return _View(_WEIGHTS + entry["path_name"], dtype, shape, stride, _parse_int(meta["storage_offset"]))


def _parse_int(value_text: Mapping[str, Any]) -> int:
    number = value_text["as_int"]
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"expected a number, got {value_text!r:.80}")
    return number


def _check_bounds(path: Path, name: str, view: _View, size: int | None) -> None:
    """Refuse a tensor that reaches beyond its record, or is larger than any network in such a file."""
    if size is None or len(view.shape) != len(view.stride):
        raise ValueError(f"{name[:80]!r} has no record, or a shape and strides that do not fit")
    steps = sum((length - 1) * step for length, step in zip(view.shape, view.stride, strict=True))
    needed = 0 if 0 in view.shape else (view.offset + steps + 1) * view.dtype.itemsize
    if needed > size or size % view.dtype.itemsize:
        raise CheckpointError(
            f"{path}: the weight {name[:80]!r} claims {needed:,} bytes, its record has {size:,}: damaged or hostile, "
            "get the file again"
        )
    check_tensor_size(path, view.shape, math.prod(view.shape) * view.dtype.itemsize)


def _make_tensor(view: _View, storage: Tensor) -> Tensor:
    tensor = torch.empty(0, dtype=view.dtype)
    return tensor.set_(storage.untyped_storage(), view.offset, view.shape, view.stride)
