"""Which classes and functions a pickle may name beside tensors and plain containers: data only, nothing that acts.

Training checkpoints carry an `argparse.Namespace` of options, numpy numbers, a path, a date. What is listed here can
only build such a value; constructors that would trust the pickle are replaced by those of `plain_values`. Everything
that neither this list nor torch's own names needs the user's trust.
"""

import argparse
import collections
import datetime
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from normswap.checkpoints.plain_values import (
    Array,
    ArrayMark,
    Dtype,
    PlainArrays,
    bounded_range,
    date,
    date_and_time,
    empty_bytes,
    scalar,
)

# numpy renamed its core in version 2: a file names whichever it was written with. So did pathlib, in Python 3.13.
_NUMPY_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")
_PATH_MODULES = ("pathlib", "pathlib._local")
# By the name in a file: what checks its arguments itself, or does nothing with them.
_VALUES: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": SimpleNamespace,
    "collections.defaultdict": collections.defaultdict,
    "datetime.timedelta": datetime.timedelta,
    "datetime.timezone": datetime.timezone,
    **{f"builtins.{kind.__name__}": kind for kind in (frozenset, slice, list, dict, int, float, str, bool, tuple)},
}
# And what stands for a constructor that trusts its arguments.
_CHECKED: dict[str, Any] = {
    "datetime.datetime": date_and_time,
    "datetime.date": date,
    "builtins.range": bounded_range,
    "builtins.bytes": empty_bytes,
    "numpy.ndarray": ArrayMark,
    "numpy.dtype": Dtype,
    **{f"{core}.scalar": scalar for core in _NUMPY_CORES},
}

_NOT_KEPT = re.compile(r"(builtins|traceback|numpy|torch\.nested|torch\.distributed|torch\._dynamo)\b")


@contextmanager
def plain_globals() -> Iterator[Callable[[Any], Any]]:
    """Let `torch.load(..., weights_only=True)` read plain data of the standard library and numpy in this block.

    Yields:
        What puts numpy arrays into a content that was loaded in the block; call it on each.
    """
    arrays = PlainArrays()
    allowed = _allowed(arrays)
    own = torch.serialization.get_safe_globals()
    kept = [entry for entry in own if _name_of(entry) in names_allowed_by_user()]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*kept, *((value, name) for name, value in allowed.items())])
    try:
        yield arrays.restored
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(own)


def names_allowed_by_user() -> set[str]:
    """Return the names that `torch.serialization.add_safe_globals` was given, without those that are not harmless.

    Packages add names too: torch its exceptions, nested and distributed tensors, others the constructors of numpy.
    """
    names = {_name_of(entry) for entry in torch.serialization.get_safe_globals()}
    return {name for name in names if not _NOT_KEPT.match(name)} - plain_names()


def plain_names() -> set[str]:
    """Return the full names that `plain_globals` allows."""
    return {*_allowed(PlainArrays())}


def _allowed(arrays: PlainArrays) -> dict[str, Any]:
    reconstruct = {f"{core}._reconstruct": arrays.reconstruct for core in _NUMPY_CORES}
    # An array is given its state only if its class is listed; no file can name it, since names in files have a dot.
    return {**_VALUES, **_CHECKED, **reconstruct, **path_globals(), "Array": Array}


def _name_of(entry: Any) -> str:
    return str(entry[1]) if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def path_globals() -> dict[str, type]:
    """Return the classes of paths by their full names in a file."""
    return {f"{module}.{name}": value for module in _PATH_MODULES for name, value in _path_classes().items()}


def _path_classes() -> dict[str, type]:
    """By the name in a file, what a path becomes here: one of the other system stays text with no way to a disk."""
    own = os.name == "posix"
    return {
        "PosixPath": pathlib.PosixPath if own else pathlib.PurePosixPath,
        "WindowsPath": pathlib.PureWindowsPath if own else pathlib.WindowsPath,
        "PurePosixPath": pathlib.PurePosixPath,
        "PureWindowsPath": pathlib.PureWindowsPath,
    }
