"""Containers: which kind of file it is, told by its bytes; decoding without running its code; encoding.

Hands on whatever object lies in the file, and the text of the record beside it. Nothing named in a pickle is ever
imported or called unless the caller says `trust`; TorchScript, plain pickles and text are refused with the way out.
"""

import codecs
import json
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

import safetensors
import safetensors.torch
import torch

from normswap.checkpoints.archives import check_archive, check_safetensors
from normswap.checkpoints.atomic import check_readable
from normswap.checkpoints.claims import check_legacy_claims, check_zip_claims
from normswap.errors import CheckpointError
from normswap.surgery.tracing import first_line

Container = Literal["torch zip", "legacy pickle", "safetensors"]

# Where the record lies: beside the pickle in a zip, in `__metadata__` of safetensors.
ZIP_ENTRY = "normswap.json"
METADATA_KEY = "normswap"

# torch.serialization.MAGIC_NUMBER as it stands, pickled, in the first bytes of a file from before torch 1.6.
_LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
_LEGACY_MAGIC_WITHIN = 32  # further in, it belongs to a storage inside a plain pickle
_LEGACY_HEADERS = 3  # magic number, protocol version, byte order: pickles of their own before the object
_MAX_SAFETENSORS_HEADER = 100_000_000  # the format's own limit

# Whose globals are listed last, since every pickled network names hundreds of them.
_EXPECTED_MODULES = {"torch", "timm", "torchvision", "normswap", "collections"}
_HARMLESS = (
    r"torch\._utils\._rebuild_|torch\.(storage\.)?\w*Storage$|collections\.OrderedDict$|torch\.Size$|__builtin__\.set$"
)


def sniff(path: Path) -> Container:
    """Return the kind of container that the bytes of the file at `path` are.

    Raises:
        CheckpointError: the file is missing, empty, a folder, truncated, or of none of these kinds.
    """
    check_readable(path)
    with open(path, "rb") as file:
        head = file.read(128)
        if head.startswith(b"PK\x03\x04"):
            _check_zip(path)
            return "torch zip"
        if head[:1] == b"\x80" and head[1:2] <= b"\x05":
            if _LEGACY_MAGIC in head[:_LEGACY_MAGIC_WITHIN]:
                return "legacy pickle"
            raise CheckpointError(
                f"{path}: a plain pickle, not written by torch.save, is never loaded: load it where you trust it and "
                "torch.save the model's state_dict()"
            )
    if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= _MAX_SAFETENSORS_HEADER:
        with _damage_told(path), safetensors.safe_open(path, framework="pt"):
            pass
        check_safetensors(path)
        return "safetensors"
    raise CheckpointError(f"{path}: expected a file of torch.save or safetensors, got {_describe(head)}")


def read_record_text(path: Path, container: Container) -> str | None:
    """Return the text of the record in the file, or None. No pickle is read for it."""
    if container == "safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(METADATA_KEY)
    if container == "torch zip":
        with _damage_told(path), zipfile.ZipFile(path) as archive:
            entry = f"{_root(archive)}/{ZIP_ENTRY}"
            return archive.read(entry).decode() if entry in archive.namelist() else None
    return None


def decode(path: Path, container: Container, *, trust: bool) -> Any:
    """Return the object in the file, with tensors on the CPU.

    Args:
        trust: run the code that a pickled object names. Without it only tensors and plain containers are read.

    Raises:
        CheckpointError: the file is damaged, or names code and is not trusted.
    """
    if container == "safetensors":
        with _damage_told(path):
            return safetensors.torch.load_file(path)
    check_claims = check_zip_claims if container == "torch zip" else check_legacy_claims
    with _damage_told(path):
        check_claims(path)
    try:
        with warnings.catch_warnings():
            # torch warns of what it then refuses, such as pickle protocols: one of the two is enough.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile file raises is anybody's guess
        if not trust:
            raise CheckpointError(_refusal(path, container, error)) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: needs the code of its classes, which cannot be imported here ({first_line(error)}): run where "
            "they can be, or save model.state_dict() instead"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path}: truncated or damaged, or its own code fails ({_cause(error)})") from error


def encode(path: Path, container: Container, content: Any, record: str) -> None:
    """Write `content` and the text of the record to a new file at `path`.

    Args:
        content: tensors by key, or (torch zip only) any object that can be pickled.
    """
    if container == "safetensors":
        # Not save_file, which (0.8) creates files that only their owner can read.
        path.write_bytes(safetensors.torch.save(content, {"format": "pt", METADATA_KEY: record}))
        return
    with open(path, "wb") as file:
        torch.save(content, file)
    # An entry of its own: torch.load (weights_only, mmap) reads the archive as before, and no key joins the tensors.
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{_root(archive)}/{ZIP_ENTRY}", record)


def _root(archive: zipfile.ZipFile) -> str:
    return archive.namelist()[0].partition("/")[0]


def _check_zip(path: Path) -> None:
    check_archive(path)
    with _damage_told(path), zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path}: TorchScript, whose code is fixed: convert the Python model's state_dict(), then script it again"
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: expected a file of torch.save, got a zip archive without data.pkl")


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Turn what the readers of damaged archives raise into one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CheckpointError) or (isinstance(error, OSError) and error.filename is not None):
            raise  # a missing permission or file; a damaged offset that leads nowhere names no file
        raise CheckpointError(f"{path}: truncated or damaged ({first_line(error)}): copy it again") from error


def _refusal(path: Path, container: Container, error: Exception) -> str:
    blocked = _blocked_globals(path, container)
    if not blocked:
        return f"{path}: truncated or damaged, or pickled in an unusual way ({_cause(error)}): save it again"
    return (
        f"{path}: holds a pickled object, not a state dict; loading it would run {_listed(blocked)}: pass --trust "
        "(trust=True) if you trust where it comes from, or save model.state_dict() instead"
    )


def _describe(head: bytes) -> str:
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


def _blocked_globals(path: Path, container: Container) -> list[str]:
    """The globals that a pickle names and that are not known to be harmless; nothing is imported for it."""
    found: set[str] = set()
    with open(path, "rb") as file:
        if container == "legacy pickle":
            for _ in range(_LEGACY_HEADERS + 1):
                found |= _named_globals(file)
        else:
            with (
                _damage_told(path),
                zipfile.ZipFile(file) as archive,
                archive.open(f"{_root(archive)}/data.pkl") as pickle,
            ):
                found |= _named_globals(pickle)
    blocked = (name for name in found if not re.match(_HARMLESS, name))
    return sorted(blocked, key=lambda name: (name.partition(".")[0] in _EXPECTED_MODULES, name))


def _named_globals(file: IO[bytes]) -> set[str]:
    """Read one pickle's opcodes without acting on them; a damaged rest is not read."""
    found: set[str] = set()
    strings: list[str] = []
    memo: dict[int, str] = {}
    try:
        argument: Any
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                found.add(".".join(argument.split(" ", 1)))
            elif opcode.name == "STACK_GLOBAL":
                found.add(".".join(strings[-2:]))
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = strings[-1] if strings else ""
            elif opcode.name in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[int(argument)] = strings[-1] if strings else ""
            elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
                strings.append(memo.get(int(argument), ""))
            elif isinstance(argument, str):
                strings.append(argument)
    except Exception:  # noqa: BLE001 - as in decode
        return found
    return found


def _listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" (+{len(names) - most} more)" if len(names) > most else "")


def _cause(error: Exception) -> str:
    """The heart of torch's long advice, in one line."""
    return first_line(Exception(str(error).partition("WeightsUnpickler error:")[2] or first_line(error)))
