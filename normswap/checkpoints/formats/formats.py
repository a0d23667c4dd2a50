"""File formats: detection by the first bytes of a file, decoding without running code, encoding.

`decode` returns the object in a file or folder, `read_record_text` the text of the normswap record. No class or
function that a pickle names is imported or called unless the caller passes `trust=True`. TorchScript, plain pickles
and text are refused with a message that names another way.
"""

import codecs
import json
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch

from normswap.checkpoints.formats.archive_checks import (
    check_archive,
    check_calls,
    check_legacy_pickle,
    check_safetensors,
    check_zip_pickle,
)
from normswap.checkpoints.formats.hf_folder import (
    INDEX,
    RECORD,
    Shards,
    assign_shard,
    check_shard,
    copy_other_files,
    find_shards,
    write_index,
)
from normswap.checkpoints.formats.plain_values import (
    blocked_globals,
    plain_globals,
    torch_error_message,
    user_safe_globals,
)
from normswap.checkpoints.formats.pt2_archive import RECORD_ENTRY, is_program, load_program, read_weights
from normswap.checkpoints.io.atomic_files import check_readable
from normswap.errors import CheckpointError, NormswapError
from normswap.text import first_line

FileFormat = Literal[
    "torch zip",
    "legacy pickle",
    "safetensors",
    "exported program",
    "safetensors folder",
    "torch folder",
    "distributed folder",
]
# Formats that store contiguous tensors by name and nothing else, without tied tensors and memory formats.
TENSORS_ONLY: frozenset[FileFormat] = frozenset({"safetensors", "safetensors folder"})
FOLDERS: frozenset[FileFormat] = frozenset({"safetensors folder", "torch folder", "distributed folder"})

# The record is an archive member next to the pickle in a zip, an extra file in an exported program, a value in the
# `__metadata__` of safetensors, and a file in a folder.
_METADATA_KEY = "normswap"
_ZIP_RECORD_ENTRIES: dict[FileFormat, str] = {"torch zip": RECORD, "exported program": RECORD_ENTRY}

# torch.serialization.MAGIC_NUMBER, pickled; a file from before torch 1.6 has it among its first bytes.
_LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
_LEGACY_MAGIC_RANGE = 32  # after these bytes it belongs to a storage inside a plain pickle
_NUM_LEGACY_HEADERS = 3  # pickles before the object: magic number, protocol version, byte order
_MAX_SAFETENSORS_HEADER = 100_000_000  # the limit of the format


def detect_format(path: Path) -> FileFormat:
    """Return the format of the file or folder at `path`; its name does not matter.

    Raises:
        CheckpointError: missing, empty, truncated, or in an unknown format.
    """
    check_readable(path)
    if path.is_dir():
        return _detect_folder_format(path)
    with open(path, "rb") as file:
        head = file.read(128)
        if head.startswith(b"PK\x03\x04"):
            return _detect_zip_format(path)
        if head[:1] == b"\x80" and head[1:2] <= b"\x05":
            if _LEGACY_MAGIC in head[:_LEGACY_MAGIC_RANGE]:
                return "legacy pickle"
            raise CheckpointError(
                f"{path}: expected a file of torch.save, got a plain pickle, which is never loaded: load it yourself "
                "if you trust it, and torch.save the model's state_dict()"
            )
    if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= _MAX_SAFETENSORS_HEADER:
        with _report_damage(path), safetensors.safe_open(path, framework="pt"):
            pass
        check_safetensors(path)
        return "safetensors"
    raise CheckpointError(f"{path}: expected a file of torch.save or safetensors, got {_describe_bytes(head)}")


def read_record_text(path: Path, file_format: FileFormat) -> str | None:
    """Return the text of the normswap record in the file or folder, or None; this reads no pickle."""
    if file_format in FOLDERS:
        record_file = path / RECORD
        with _report_damage(path):
            return record_file.read_text(encoding="utf-8") if record_file.is_file() else None
    if file_format == "safetensors":
        return read_metadata(path).get(_METADATA_KEY)
    if file_format in _ZIP_RECORD_ENTRIES:
        with _report_damage(path), zipfile.ZipFile(path) as archive:
            entry = f"{_archive_root(archive)}/{_ZIP_RECORD_ENTRIES[file_format]}"
            return archive.read(entry).decode() if entry in archive.namelist() else None
    return None


def read_metadata(path: Path) -> dict[str, str]:
    """Return the `__metadata__` of a safetensors file."""
    with _report_damage(path), safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_tied_names(path: Path, file_format: FileFormat) -> dict[str, str]:
    """Return the tied tensors that `safetensors.torch.save_model` left out: name -> name of the stored tensor.

    `save_model` writes these pairs into the metadata, among others: only pairs with the name of a stored tensor count.
    """
    if file_format not in TENSORS_ONLY:
        return {}
    files = [path] if file_format == "safetensors" else [path / name for name in _require_shards(path).files]
    metadata: dict[str, str] = {}
    names: set[str] = set()
    for file in files:
        with _report_damage(file), safetensors.safe_open(file, framework="pt") as opened:
            metadata |= opened.metadata() or {}
            names |= {*opened.keys()}
    return {name: stored for name, stored in metadata.items() if stored in names and name not in names}


def decode(path: Path, file_format: FileFormat, *, trust: bool, mmap: bool = False) -> Any:
    """Return the object in the file or folder, with tensors on the CPU.

    Args:
        trust: whether to run the code that a pickled object names. Without it, only tensors and plain data are read,
            and only the weights of an exported program instead of the `Program`.
        mmap: map tensors from the file, if the format allows this; the file must not change while they are in use.

    Raises:
        CheckpointError: the file is damaged, or needs `trust=True`.
    """
    if file_format == "safetensors":
        with _report_damage(path):
            return safetensors.torch.load_file(path)
    if file_format == "exported program":
        with _report_damage(path):
            return load_program(path) if trust else read_weights(path)
    if file_format == "distributed folder":
        from normswap.checkpoints.formats.dcp_folder import read_distributed  # imports for seconds

        with _report_damage(path):
            return read_distributed(path)
    if file_format in FOLDERS:
        return _decode_shards(_require_shards(path), trust=trust, mmap=mmap)
    return _decode_pickle(path, trust=trust, legacy=file_format == "legacy pickle", mmap=mmap)


def check_suffix(path: Path) -> None:
    """Refuse a name for an output with the suffix of a format that is not written.

    Raises:
        CheckpointError: the name is such as `model.onnx`.
    """
    if _UNSUPPORTED_SUFFIX.fullmatch(path.suffix.lower()):
        raise CheckpointError(
            f"{path}: expected a name that ends in .pt, .pth, .bin, .ckpt, .safetensors or .pt2, got {path.suffix}, a "
            "format that normswap does not write: choose another name"
        )


def needs_trust(path: Path) -> bool:
    """Return whether a file has pickled objects that only `trust=True` loads."""
    file_format = detect_format(path)
    is_pickle = file_format in ("torch zip", "legacy pickle")
    return is_pickle and bool(_blocked_globals(path, legacy=file_format == "legacy pickle"))


def encode(
    path: Path,
    file_format: FileFormat,
    content: Any,
    record: str,
    *,
    template: Path | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write `content` and the text of the record to a new file, or into an empty folder, at `path`.

    Args:
        content: tensors by key for safetensors and folders of weights; any object that can be pickled for a torch
            zip; a mapping for a distributed folder.
        template: the folder whose shards, index and configuration files the new folder copies.
        notes: further metadata of a safetensors file.
    """
    if file_format == "safetensors":
        _write_safetensors(path, content, {"format": "pt", **(notes or {}), _METADATA_KEY: record})
    elif file_format in FOLDERS:
        if file_format == "distributed folder":
            from normswap.checkpoints.formats.dcp_folder import write_distributed

            write_distributed(path, content)
        else:
            _encode_shards(path, content, _require_shards(template or path))
        if template is not None:
            copy_other_files(template, path, find_shards(template))
        (path / RECORD).write_text(record + "\n", encoding="utf-8")
    else:
        with open(path, "wb") as file:
            torch.save(content, file)
        add_record(path, file_format, record)


def add_record(path: Path, file_format: FileFormat, record: str) -> None:
    """Append the text of the record to a new archive, as a member that torch ignores or returns as an extra file.

    torch.load (weights_only, mmap) reads the archive as before, and the state dict has no further key.
    """
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{_archive_root(archive)}/{_ZIP_RECORD_ENTRIES[file_format]}", record)


def write_plain_state_dict(path: Path, state: Mapping[str, torch.Tensor], *, as_safetensors: bool) -> None:
    """Write tensors by key without a record, in a file that `torch.load` or `safetensors.torch.load_file` reads.

    Every key is in the file: in safetensors, tensors that share memory are stored once for each.
    """
    if not as_safetensors:
        with open(path, "wb") as file:
            torch.save(dict(state), file)
        return
    _write_safetensors(path, {key: value.clone().contiguous() for key, value in state.items()}, {"format": "pt"})


def _write_safetensors(path: Path, tensors: Any, metadata: dict[str, str]) -> None:
    mode = path.stat().st_mode if path.exists() else None
    safetensors.torch.save_file(tensors, path, metadata)
    if mode is not None:
        path.chmod(mode & 0o777)  # save_file (0.8) restricts the file to its owner


def _detect_folder_format(path: Path) -> FileFormat:
    if (path / INDEX).is_file():
        return "distributed folder"
    shards = find_shards(path)
    if shards is None:
        raise CheckpointError(
            f"{path}: expected a checkpoint, got a folder without model.safetensors, pytorch_model.bin, an index of "
            f"shards or {INDEX}: pass the path of a file inside it"
        )
    for name in shards.files:
        found = detect_format(path / name)
        if (found == "safetensors") != (shards.kind == "safetensors"):
            raise CheckpointError(f"{path / name}: expected {shards.kind} by its name, got {found}: rename it")
    return "safetensors folder" if shards.kind == "safetensors" else "torch folder"


def _require_shards(folder: Path) -> Shards:
    found = find_shards(folder)
    if found is None:
        raise CheckpointError(f"{folder}: expected a folder with weight files, found none")
    return found


def _decode_shards(shards: Shards, *, trust: bool, mmap: bool) -> "OrderedDict[str, Any]":
    merged_tensors: OrderedDict[str, Any] = OrderedDict()
    for name in shards.files:
        path = shards.folder / name
        part = decode(path, detect_format(path), trust=trust, mmap=mmap)
        if not isinstance(part, dict):
            raise CheckpointError(f"{path}: expected a state dict, got {type(part).__name__}")
        check_shard(path, part, merged_tensors, shards)
        merged_tensors.update(part)
    order = {key: place for place, key in enumerate(shards.weight_map)}
    return OrderedDict(sorted(merged_tensors.items(), key=lambda item: order.get(item[0], len(order))))


def _encode_shards(folder: Path, tensors: Any, template: Shards) -> None:
    weight_map = {key: assign_shard(key, template) for key in tensors}
    for name in template.files:
        part = {key: tensors[key] for key, file in weight_map.items() if file == name}
        if template.kind == "safetensors":
            _write_safetensors(folder / name, part, read_metadata(template.folder / name) or {"format": "pt"})
        else:
            torch.save(part, folder / name)
    write_index(folder, template, weight_map, tensors)


def _decode_pickle(path: Path, *, trust: bool, legacy: bool, mmap: bool) -> Any:
    check_pickle = check_legacy_pickle if legacy else check_zip_pickle
    with _report_damage(path):
        summary = check_pickle(path)
    try:
        with warnings.catch_warnings(), plain_globals() as restored:
            # torch first warns about what it then refuses, such as pickle protocols; the error is enough.
            warnings.simplefilter("ignore")
            check_calls(path, summary, user_safe_globals())
            return restored(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and not legacy))
    except Exception as error:  # a damaged or malicious file may raise any error
        if not trust:
            raise CheckpointError(_refusal_message(path, error, legacy=legacy)) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: the classes in it cannot be imported ({first_line(error)}): run normswap in the environment that "
            "wrote the file, or save model.state_dict() instead"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{path}: truncated or damaged, or its own code fails ({torch_error_message(error)})"
        ) from error


def _archive_root(archive: zipfile.ZipFile) -> str:
    return archive.namelist()[0].partition("/")[0]


def _detect_zip_format(path: Path) -> FileFormat:
    names = check_archive(path)
    if is_program(names):
        return "exported program"
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path}: expected weights, got TorchScript, whose code cannot be changed: convert the Python model's "
            "state_dict(), then trace or export the converted model (torch.jit.script cannot compile it)"
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: expected a file of torch.save, got a zip archive without data.pkl")
    return "torch zip"


@contextmanager
def _report_damage(path: Path) -> Iterator[None]:
    """Turn the errors that readers raise for damaged archives into a `CheckpointError`."""
    try:
        yield
    except NormswapError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # a missing permission or file; the error for an invalid offset has no file name
        raise CheckpointError(f"{path}: truncated or damaged ({first_line(error)}): copy it again") from error


def _refusal_message(path: Path, error: Exception, *, legacy: bool) -> str:
    blocked = _blocked_globals(path, legacy=legacy)
    if isinstance(error, CheckpointError) and all(name.startswith("torch.") for name in blocked):
        message = str(error).removeprefix(f"{path}: ")
        return f"{path}: {message}; pass trust=True if you trust the source of the file"
    if not blocked:
        return (
            f"{path}: truncated or damaged, or pickled in an unusual way ({torch_error_message(error)}): save it again"
        )
    return (
        f"{path}: has pickled objects besides tensors and plain data; loading them would run {_format_names(blocked)}: "
        "pass trust=True if you trust the source of the file, or save model.state_dict() instead"
    )


def _blocked_globals(path: Path, *, legacy: bool) -> list[str]:
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        if legacy:
            return blocked_globals([file] * (_NUM_LEGACY_HEADERS + 1))
        stack.enter_context(_report_damage(path))
        archive = stack.enter_context(zipfile.ZipFile(file))
        return blocked_globals([stack.enter_context(archive.open(f"{_archive_root(archive)}/data.pkl"))])


# --- other formats

_UNSUPPORTED_SUFFIX = re.compile(r"\.(onnx|h5|hdf5|keras|tflite|pb|gguf|npz|npy|json|mlmodel|engine)")
# The first bytes of other formats.
_OTHER_MAGIC_BYTES = {
    b"\x89PNG": "an image (PNG)",
    b"\xff\xd8\xff": "an image (JPEG)",
    b"GIF8": "an image (GIF)",
    b"\x89HDF": "an HDF5 file, as Keras writes: load it with its own library and torch.save the weights",
    b"\x93NUMPY": "a numpy array: torch.save a state dict of tensors",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"GGUF": "a GGUF file, which contains quantized tensors: convert the model before its quantization",
    b"\x7fELF": "a program",
    b"%PDF": "a PDF document",
}
_ONNX = re.compile(rb"\x08.[\x12:]", re.DOTALL)  # the version of the format, then the producer


def _describe_bytes(head: bytes) -> str:
    """What a file probably is by its first bytes, and what to do with it, for error messages."""
    other = next((name for start, name in _OTHER_MAGIC_BYTES.items() if head.startswith(start)), None)
    if other is not None:
        return other
    if _ONNX.match(head):
        return "probably ONNX: convert the Python model, then export it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: fetch the real file with git lfs pull"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page: the download failed, try it again"
    # An incremental decoder, since the first bytes may end inside a character.
    with suppress(UnicodeDecodeError):
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
        if "".join(text.split()).isprintable():
            return f"text ({json.dumps(text[:20])}...)"
    return f"an unknown format ({head[:8].hex(' ')} ...)"


def _format_names(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" (+{len(names) - most} more)" if len(names) > most else "")
