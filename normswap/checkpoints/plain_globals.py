"""Which classes and functions a pickle may name beside tensors and plain containers: data only, nothing that acts.

Training checkpoints carry an `argparse.Namespace` of options, numpy numbers, a path, a date. Unpickling one of these
builds that value and can do nothing else; everything not listed here or by torch itself needs the user's trust.
"""

import argparse
import collections
import datetime
import os
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy
import torch

# numpy renamed its core in version 2: a file names whichever it was written with. So did pathlib, in Python 3.13.
_NUMPY_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")
_PATH_MODULES = ("pathlib", "pathlib._local")
_VALUES: list[Any] = [
    argparse.Namespace,
    SimpleNamespace,
    collections.defaultdict,
    datetime.datetime,
    datetime.date,
    datetime.timedelta,
    datetime.timezone,
    numpy.ndarray,
    numpy.dtype,
    *(value for value in vars(numpy.dtypes).values() if isinstance(value, type)),
]
_BUILTINS: tuple[type, ...] = (frozenset, range, slice, list, dict, int, float, str, bool, tuple)


@contextmanager
def plain_globals() -> Iterator[None]:
    """Let `torch.load(..., weights_only=True)` read plain data of the standard library and numpy in this block."""
    with torch.serialization.safe_globals(_allowed()):
        yield


def plain_names() -> set[str]:
    """Return the full names that `plain_globals` allows."""
    return {item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}" for item in _allowed()}


def _allowed() -> list[Any]:
    reconstruct: Any = numpy.empty(0).__reduce__()[0]
    scalar: Any = numpy.float64(0).__reduce__()[0]
    arrays = [(value, f"{core}.{value.__name__}") for core in _NUMPY_CORES for value in (reconstruct, scalar)]
    paths = [(value, f"{module}.{name}") for module in _PATH_MODULES for name, value in _path_classes().items()]
    return [*_VALUES, *((value, f"builtins.{value.__name__}") for value in _BUILTINS), *arrays, *paths]


def _path_classes() -> dict[str, type]:
    """By the name in a file, what a path becomes here: one of the other system stays text with no way to a disk."""
    own = os.name == "posix"
    return {
        "PosixPath": pathlib.PosixPath if own else pathlib.PurePosixPath,
        "WindowsPath": pathlib.PureWindowsPath if own else pathlib.WindowsPath,
        "PurePosixPath": pathlib.PurePosixPath,
        "PureWindowsPath": pathlib.PureWindowsPath,
    }
