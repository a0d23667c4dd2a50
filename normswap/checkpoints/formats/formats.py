"""Containers: which kind of file or folder it is, told by its bytes; decoding without running its code; encoding.

Hands on whatever object lies in it, and the text of the record beside it. Nothing named in a pickle is ever imported
or called unless the caller says `trust`; TorchScript, plain pickles and text are refused with the way out.
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

Container = Literal[
    "torch zip",
    "legacy pickle",
    "safetensors",
    "exported program",
    "safetensors folder",
    "torch folder",
    "distributed folder",
]
# Those that hold tensors by name only, each of them once and row by row.
TENSORS_ONLY: frozenset[Container] = frozenset({"safetensors", "safetensors folder"})
FOLDERS: frozenset[Container] = frozenset({"safetensors folder", "torch folder", "distributed folder"})

# Where the record lies: beside the pickle in a zip, among the extra files of an exported program, in `__metadata__` of
# safetensors, a file in a folder.
_METADATA_KEY = "normswap"
_ZIP_RECORD_ENTRIES: dict[Container, str] = {"torch zip": RECORD, "exported program": RECORD_ENTRY}

# torch.serialization.MAGIC_NUMBER as it stands, pickled, in the first bytes of a file from before torch 1.6.
_LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
_LEGACY_MAGIC_RANGE = 32  # further in, it belongs to a storage inside a plain pickle
_NUM_LEGACY_HEADERS = 3  # magic number, protocol version, byte order: pickles of their own before the object
_MAX_SAFETENSORS_HEADER = 100_000_000  # the format's own limit


def detect_format(path: Path) -> Container:
    """Return the kind of container that the bytes of the file or the files of the folder at `path` are.

    Raises:
        CheckpointError: missing, empty, truncated, or of none of these kinds.
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
                f"{path}: a plain pickle, not written by torch.save, is never loaded: load it where you trust it and "
                "torch.save the model's state_dict()"
            )
    if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= _MAX_SAFETENSORS_HEADER:
        with _report_damage(path), safetensors.safe_open(path, framework="pt"):
            pass
        check_safetensors(path)
        return "safetensors"
    raise CheckpointError(f"{path}: expected a file of torch.save or safetensors, got {_describe_bytes(head)}")


def read_record_text(path: Path, container: Container) -> str | None:
    """Return the text of the record in the file or folder, or None. No pickle is read for it."""
    if container in FOLDERS:
        beside = path / RECORD
        with _report_damage(path):
            return beside.read_text(encoding="utf-8") if beside.is_file() else None
    if container == "safetensors":
        return read_metadata(path).get(_METADATA_KEY)
    if container in _ZIP_RECORD_ENTRIES:
        with _report_damage(path), zipfile.ZipFile(path) as archive:
            entry = f"{_archive_root(archive)}/{_ZIP_RECORD_ENTRIES[container]}"
            return archive.read(entry).decode() if entry in archive.namelist() else None
    return None


def read_metadata(path: Path) -> dict[str, str]:
    """Return the notes in a safetensors file."""
    with _report_damage(path), safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_tied_names(path: Path, container: Container) -> dict[str, str]:
    """Return the names that `safetensors.torch.save_model` left out, each with the name of the tensor that it shares.

    It notes them beside whatever else was noted, so that only notes on names of tensors count.
    """
    if container not in TENSORS_ONLY:
        return {}
    files = [path] if container == "safetensors" else [path / name for name in _require_shards(path).files]
    notes: dict[str, str] = {}
    names: set[str] = set()
    for file in files:
        with _report_damage(file), safetensors.safe_open(file, framework="pt") as opened:
            notes |= opened.metadata() or {}
            names |= {*opened.keys()}
    return {name: kept for name, kept in notes.items() if kept in names and name not in names}


def decode(path: Path, container: Container, *, trust: bool, mmap: bool = False) -> Any:
    """Return the object in the file or folder, with tensors on the CPU.

    Args:
        trust: run the code that a pickled object names. Without it only tensors and plain data are read. Of an exported
            program it decides what is read: the `Program`, or without it the weights alone.
        mapped: leave tensors in the file and read them as they are used, where the container allows that; the file
            must not change as long as they live.

    Raises:
        CheckpointError: it is damaged, or names code and is not trusted.
    """
    if container == "safetensors":
        with _report_damage(path):
            return safetensors.torch.load_file(path)
    if container == "exported program":
        with _report_damage(path):
            return load_program(path) if trust else read_weights(path)
    if container == "distributed folder":
        from normswap.checkpoints.formats.dcp_folder import read_distributed  # with all that torch has for it: seconds

        with _report_damage(path):
            return read_distributed(path)
    if container in FOLDERS:
        return _decode_shards(_require_shards(path), trust=trust, mmap=mmap)
    return _decode_pickle(path, trust=trust, legacy=container == "legacy pickle", mmap=mmap)


def check_suffix(path: Path) -> None:
    """Refuse a name for an output whose ending promises a format that is not written.

    Raises:
        CheckpointError: such as `model.onnx`.
    """
    if path.suffix.lower() in _UNSUPPORTED_SUFFIXES:
        raise CheckpointError(
            f"{path}: expected a name in .pt, .pth, .bin, .ckpt, .safetensors or .pt2, got one in {path.suffix}, a "
            "format that is not written: choose another name"
        )


def needs_trust(path: Path) -> bool:
    """Say whether a file holds pickled objects that only `trust=True` reads."""
    container = detect_format(path)
    is_pickle = container in ("torch zip", "legacy pickle")
    return is_pickle and bool(_blocked_globals(path, legacy=container == "legacy pickle"))


def encode(
    path: Path,
    container: Container,
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
        like: the folder whose shards, index and configurations a new one takes after.
        notes: what else a safetensors file notes.
    """
    if container == "safetensors":
        _write_safetensors(path, content, {"format": "pt", **(notes or {}), _METADATA_KEY: record})
    elif container in FOLDERS:
        if container == "distributed folder":
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
        add_record(path, container, record)


def add_record(path: Path, container: Container, record: str) -> None:
    """Put the text of the record into a new archive, as an entry of its own: readers of torch know it not, or as extra.

    torch.load (weights_only, mmap) reads the archive as before, and no key joins the tensors.
    """
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{_archive_root(archive)}/{_ZIP_RECORD_ENTRIES[container]}", record)


def _write_safetensors(path: Path, tensors: Any, metadata: dict[str, str]) -> None:
    mode = path.stat().st_mode if path.exists() else None
    safetensors.torch.save_file(tensors, path, metadata)
    if mode is not None:
        path.chmod(mode & 0o777)  # save_file (0.8) makes files that only their owner can read


def _detect_folder_format(path: Path) -> Container:
    if (path / INDEX).is_file():
        return "distributed folder"
    shards = find_shards(path)
    if shards is None:
        raise CheckpointError(
            f"{path}: expected a checkpoint, got a folder without model.safetensors, pytorch_model.bin, an index of "
            f"shards or {INDEX}: give the file inside it"
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
        _check_shard(path, part, merged_tensors, shards)
        merged_tensors.update(part)
    order = {key: place for place, key in enumerate(shards.weight_map)}
    return OrderedDict(sorted(merged_tensors.items(), key=lambda item: order.get(item[0], len(order))))


def _check_shard(path: Path, part: Mapping[str, Any], merged_tensors: Mapping[str, Any], shards: Shards) -> None:
    """Refuse a shard that holds other tensors than the index says."""
    duplicate = next((key for key in part if key in merged_tensors), None)
    if duplicate is not None:
        raise CheckpointError(f"{path}: holds {duplicate!r}, which another shard has too: remove the stale shards")
    if shards.index is None:
        return
    missing = [key for key, file in shards.weight_map.items() if file == path.name and key not in part]
    if missing:
        raise CheckpointError(
            f"{path}: the index names {len(missing)} tensors that it does not hold ({missing[0]}): copy it again"
        )
    unexpected = [key for key in part if shards.weight_map.get(key) != path.name]
    if unexpected:
        raise CheckpointError(
            f"{path}: holds {len(unexpected)} tensors that {shards.index} does not place there ({unexpected[0]}): copy both "
            "again"
        )


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
    check_claims = check_legacy_pickle if legacy else check_zip_pickle
    with _report_damage(path):
        summary = check_claims(path)
    try:
        with warnings.catch_warnings(), plain_globals() as restored:
            # torch warns of what it then refuses, such as pickle protocols: one of the two is enough.
            warnings.simplefilter("ignore")
            check_calls(path, summary, user_safe_globals())
            return restored(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and not legacy))
    except Exception as error:  # what a damaged or hostile file raises is anybody's guess
        if not trust:
            raise CheckpointError(_refusal_message(path, error, legacy=legacy)) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: needs the code of its classes, which cannot be imported here ({first_line(error)}): run where "
            "they can be, or save model.state_dict() instead"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{path}: truncated or damaged, or its own code fails ({torch_error_message(error)})"
        ) from error


def _archive_root(archive: zipfile.ZipFile) -> str:
    return archive.namelist()[0].partition("/")[0]


def _detect_zip_format(path: Path) -> Container:
    names = check_archive(path)
    if is_program(names):
        return "exported program"
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path}: TorchScript, whose code is fixed: convert the Python model's state_dict(), then trace or "
            "export the converted model (torch.jit.script cannot compile it)"
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: expected a file of torch.save, got a zip archive without data.pkl")
    return "torch zip"


@contextmanager
def _report_damage(path: Path) -> Iterator[None]:
    """Turn what the readers of damaged archives raise into one line."""
    try:
        yield
    except NormswapError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # a missing permission or file; a damaged offset that leads nowhere names no file
        raise CheckpointError(f"{path}: truncated or damaged ({first_line(error)}): copy it again") from error


def _refusal_message(path: Path, error: Exception, *, legacy: bool) -> str:
    blocked = _blocked_globals(path, legacy=legacy)
    if isinstance(error, CheckpointError) and all(name.startswith("torch.") for name in blocked):
        message = str(error).removeprefix(f"{path}: ")
        return f"{path}: {message}; pass trust=True if you trust where it comes from"
    if not blocked:
        return (
            f"{path}: truncated or damaged, or pickled in an unusual way ({torch_error_message(error)}): save it again"
        )
    return (
        f"{path}: holds pickled objects beside tensors and plain data; loading them would run {_format_names(blocked)}: pass "
        "trust=True if you trust where it comes from, or save model.state_dict() instead"
    )


def _blocked_globals(path: Path, *, legacy: bool) -> list[str]:
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        if legacy:
            return blocked_globals([file] * (_NUM_LEGACY_HEADERS + 1))
        stack.enter_context(_report_damage(path))
        archive = stack.enter_context(zipfile.ZipFile(file))
        return blocked_globals([stack.enter_context(archive.open(f"{_archive_root(archive)}/data.pkl"))])


# Endings of formats that hold models or arrays too.
_UNSUPPORTED_SUFFIXES = {
    ".onnx",
    ".h5",
    ".hdf5",
    ".keras",
    ".tflite",
    ".pb",
    ".gguf",
    ".npz",
    ".npy",
    ".json",
    ".mlmodel",
    ".engine",
}
# What files of other kinds begin with.
_OTHER_MAGIC_BYTES = {
    b"\x89PNG": "an image (PNG)",
    b"\xff\xd8\xff": "an image (JPEG)",
    b"GIF8": "an image (GIF)",
    b"\x89HDF": "an HDF5 file, as Keras writes: load it with its own library and torch.save the weights",
    b"\x93NUMPY": "a numpy array: torch.save a state dict of tensors",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"GGUF": "a GGUF file, which holds quantised tensors: convert the model as it was before",
    b"\x7fELF": "a program",
    b"%PDF": "a PDF document",
}
_ONNX = re.compile(rb"\x08.[\x12:]", re.DOTALL)  # the version of its format, then who made it


def _describe_bytes(head: bytes) -> str:
    other = next((name for start, name in _OTHER_MAGIC_BYTES.items() if head.startswith(start)), None)
    if other is not None:
        return other
    if _ONNX.match(head):
        return "what looks like ONNX: convert the Python model, then export it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: fetch the real file with git lfs pull"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page: the download went wrong"
    # Incremental, since the head may end inside a character.
    with suppress(UnicodeDecodeError):
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
        if "".join(text.split()).isprintable():
            return f"text ({json.dumps(text[:20])}...)"
    return f"bytes of an unknown kind ({head[:8].hex(' ')} ...)"


def _format_names(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" (+{len(names) - most} more)" if len(names) > most else "")
