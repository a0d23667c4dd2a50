"""Plain data in pickles: which classes and functions a pickle may name, and checked constructors for some of them.

The constructors that numpy and `datetime` use for pickles trust the file: numpy uses addresses from it as objects,
`datetime` accepts any byte as a month. So a pickle that names one of these gets a function of this module instead,
which checks every field, accepts plain numbers only and calls the public constructor. `blocked_globals` lists the code
that a pickle names beyond plain data, for the user who decides whether to trust the file.
"""

import argparse
import collections
import datetime
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, SimpleNamespace
from typing import IO, Any, NoReturn

import numpy
import torch
from numpy.typing import NDArray

from normswap.checkpoints.formats.pickle_opcodes import summarize_pickle
from normswap.errors import CheckpointError
from normswap.text import first_line

# --- values of numpy and the standard library, rebuilt from checked fields

# The names of plain numeric types in a pickle; without extended precision, where some bytes are padding.
_NUMERIC = frozenset(
    ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
)  # fmt: skip
_NATIVE = "<" if sys.byteorder == "little" else ">"
_BYTE_ORDERS = ("<", ">", "|", "=")
_ARRAY_STATE, _DTYPE_STATE = 1, 3  # the versions of the states that numpy 1 and 2 write
_PLAIN_DTYPE_STATE = (None, None, None, -1, -1, 0)  # without subarray, fields and flags
_MAX_DIMENSIONS = 32
_DATE_BYTES, _DATETIME_BYTES = 4, 10
_FOLD = 0x80  # a bit of the month in the bytes of a datetime
_MAX_RANGE_LENGTH = 1_000_000


class Dtype:
    """A numeric type that a pickle names; the pickle sets its byte order as a state."""

    def __init__(self, name: Any = None, align: Any = False, copy: Any = True) -> None:
        if name not in _NUMERIC:
            _refuse(f"the numpy dtype {name!r:.40}, which is not a plain number")
        self._name: str = name
        self._order = "="

    __hash__ = None  # type: ignore[assignment]

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or state[:1] != (_DTYPE_STATE,) or state[2:] != _PLAIN_DTYPE_STATE:
            _refuse("a numpy dtype with fields, a subarray or flags, which is not a plain number")
        if state[1] not in _BYTE_ORDERS:
            _refuse(f"a numpy dtype with the unknown byte order {state[1]!r:.40}")
        self._order = state[1]

    def to_array(self, data: bytes) -> "NDArray[Any]":
        """Return the numbers in `data` as a new one-dimensional array."""
        if self._name == "b1" and data.translate(None, b"\0\1"):
            _refuse("a numpy array of booleans with bytes other than 0 and 1")
        return numpy.frombuffer(data, self.value).copy()

    @property
    def value(self) -> "numpy.dtype[Any]":
        """The dtype of numpy."""
        return numpy.dtype(f"{_NATIVE if self._order in '=|' else self._order}{self._name}")

    @property
    def itemsize(self) -> int:
        """The size of one number in bytes."""
        return int(self._name[1:])


class ArrayMark:
    """A stand-in for the class `numpy.ndarray` in a pickle; it is never instantiated."""

    def __new__(cls, *_: Any) -> "ArrayMark":
        """Refuse a call, which no pickle of an array has."""
        _refuse("a call of numpy.ndarray, which no pickle of an array has")


class Array:
    """A stand-in for a numpy array while the file is read; `PlainArrays.restored` replaces it by `value`."""

    value: "NDArray[Any] | None" = None

    __hash__ = None  # type: ignore[assignment]

    def __setstate__(self, state: Any) -> None:
        match state:
            case (int(version), tuple(shape), Dtype() as dtype, bool() | int() as fortran_order, bytes(data)) if (
                version == _ARRAY_STATE
            ):
                self.value = _build_array(shape, dtype, data, fortran_order=bool(fortran_order))
            case _:
                _refuse("a numpy array whose pickled state is not that of plain numbers")


class PlainArrays:
    """The constructor of numpy arrays for one file, and the arrays that it made."""

    def __init__(self) -> None:
        self._arrays: list[Array] = []

    def reconstruct(self, kind: Any, shape: Any, code: Any) -> Array:
        """Replace `numpy.core.multiarray._reconstruct`: return an empty array, whose state the pickle sets later."""
        if kind is not ArrayMark:
            _refuse("a subclass of numpy.ndarray")
        self._arrays.append(Array())
        return self._arrays[-1]

    def restored(self, content: Any) -> Any:
        """Return `content` with numpy arrays instead of their stand-ins; lists and mappings change in place.

        Raises:
            CheckpointError: an array is where it cannot be replaced, or the pickle never set its state.
        """
        restorer = _Restorer()
        result = restorer.restored(content)
        if any(array.value is None or id(array) not in restorer.placed for array in self._arrays):
            _refuse("a numpy array without values, or inside an object that cannot have one")
        return result


def scalar(dtype: Any, data: Any = b"") -> Any:
    """Replace `numpy.core.multiarray.scalar`: return a numpy scalar."""
    if not isinstance(dtype, Dtype) or type(data) is not bytes or len(data) != dtype.itemsize:
        _refuse("a numpy scalar whose bytes do not fit its dtype")
    return dtype.to_array(data)[0]


def date(*fields: Any) -> datetime.date:
    """Replace `datetime.date`, whose pickle has four bytes."""
    if len(fields) == 1 and type(fields[0]) is bytes and len(fields[0]) == _DATE_BYTES:
        high, low, *rest = fields[0]
        fields = (high << 8 | low, *rest)
    return datetime.date(*_check_integers(fields))


def date_and_time(*fields: Any) -> datetime.datetime:
    """Replace `datetime.datetime`, whose pickle has ten bytes and an optional time zone."""
    if not fields or type(fields[0]) is not bytes or len(fields[0]) != _DATETIME_BYTES or len(fields) > 2:
        _refuse("a datetime that is not pickled as ten bytes")
    zone = fields[1] if len(fields) == 2 else None
    if zone is not None and type(zone) is not datetime.timezone:
        _refuse("a datetime whose time zone is not a datetime.timezone")
    high, low, month, day, hour, minute, second, *micro = fields[0]
    return datetime.datetime(
        high << 8 | low,
        month & ~_FOLD,
        day,
        hour,
        minute,
        second,
        int.from_bytes(micro, "big"),
        tzinfo=zone,
        fold=int(month >= _FOLD),
    )


def bounded_range(*bounds: Any) -> range:
    """Replace `range`: refuse one whose list would fill the memory."""
    found = range(*_check_integers(bounds))
    if found and abs(found[-1] - found[0]) // abs(found.step) >= _MAX_RANGE_LENGTH:
        _refuse(f"a range of more than {_MAX_RANGE_LENGTH:,} numbers")
    return found


def empty_bytes(*arguments: Any) -> bytes:
    """Replace `bytes`, which pickles for Python 2 call for empty bytes; `bytes(10**12)` would allocate a terabyte."""
    if arguments:
        _refuse("a call of bytes with arguments")
    return b""


def _build_array(shape: tuple[Any, ...], dtype: Dtype, data: bytes, *, fortran_order: bool) -> "NDArray[Any]":
    if len(shape) > _MAX_DIMENSIONS or any(type(length) is not int or length < 0 for length in shape):
        _refuse(f"a numpy array with the invalid shape {shape!r:.60}")
    expected = dtype.itemsize
    for length in shape:
        expected *= length
    if expected != len(data):
        _refuse(f"a numpy array with the shape {shape!r:.60} and {len(data):,} bytes, expected {expected:,}")
    return dtype.to_array(data).reshape(shape, order="F" if fortran_order else "C")


def _check_integers(values: tuple[Any, ...]) -> tuple[int, ...]:
    if any(type(value) is not int for value in values):
        _refuse(f"{values!r:.60}, expected whole numbers")
    return values


def _refuse(what: str) -> NoReturn:
    raise CheckpointError(f"has {what}")


# What a file means if it stores one of these themselves, such as the type of an option.
_REPLACED_BY: dict[Any, Any] = {
    ArrayMark: numpy.ndarray,
    Dtype: numpy.dtype,
    date: datetime.date,
    date_and_time: datetime.datetime,
    bounded_range: range,
    empty_bytes: bytes,
}


class _Restorer:
    """Replaces the stand-ins in nested data; visits an object once, even if it occurs several times."""

    def __init__(self) -> None:
        self.placed: set[int] = set()
        self._done: dict[int, tuple[Any, Any]] = {}  # keeps the objects, so that no id is used twice

    def restored(self, value: Any) -> Any:
        """Return `value`, or its replacement."""
        if isinstance(value, Array):
            self.placed.add(id(value))
        if isinstance(value, Array | Dtype):
            return value.value
        if isinstance(value, type | FunctionType) and value in _REPLACED_BY:
            return _REPLACED_BY[value]
        if id(value) in self._done:
            return self._done[id(value)][1]
        if type(value) is tuple:
            items = [self.restored(item) for item in value]
            same = all(new is old for new, old in zip(items, value, strict=True))
            self._done[id(value)] = (value, value if same else tuple(items))
            return self._done[id(value)][1]
        self._done[id(value)] = (value, value)
        for holder, key, item in _iter_entries(value):
            changed = self.restored(item)
            if changed is not item:
                holder[key] = changed
        return value


def _iter_entries(value: Any) -> Iterator[tuple[Any, Any, Any]]:
    """The items of a list, a mapping or the attributes of a plain object, as (owner, key, item)."""
    if isinstance(value, list):
        yield from ((value, index, item) for index, item in enumerate(value))
    elif isinstance(value, dict):
        yield from ((value, key, item) for key, item in list(value.items()))
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict) and not isinstance(value, type):
        yield from ((attributes, key, item) for key, item in list(attributes.items()))


# --- the names that a pickle may have

# A file has the module names of the version that wrote it: numpy 2 renamed its core, Python 3.13 that of pathlib.
_NUMPY_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")
_PATH_MODULES = ("pathlib", "pathlib._local")
# Name in a file -> a class that checks its arguments itself, or only stores them.
_SAFE_TYPES: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": SimpleNamespace,
    "collections.defaultdict": collections.defaultdict,
    "datetime.timedelta": datetime.timedelta,
    "datetime.timezone": datetime.timezone,
    **{f"builtins.{kind.__name__}": kind for kind in (frozenset, slice, list, dict, int, float, str, bool, tuple)},
}
# Name in a file -> the replacement of a constructor that trusts its arguments.
_CHECKED_CONSTRUCTORS: dict[str, Any] = {
    "datetime.datetime": date_and_time,
    "datetime.date": date,
    "builtins.range": bounded_range,
    "builtins.bytes": empty_bytes,
    "numpy.ndarray": ArrayMark,
    "numpy.dtype": Dtype,
    **{f"{core}.scalar": scalar for core in _NUMPY_CORES},
}

_UNSAFE_MODULES = re.compile(r"(builtins|traceback|numpy|torch\.nested|torch\.distributed|torch\._dynamo)\b")


@contextmanager
def plain_globals() -> Iterator[Callable[[Any], Any]]:
    """Let `torch.load(..., weights_only=True)` read plain data of the standard library and numpy in this block.

    Yields:
        A function that replaces the stand-ins of numpy arrays; call it on every content that was loaded in the block.
    """
    array_registry = PlainArrays()
    allowed = _allowed_globals(array_registry)
    own = torch.serialization.get_safe_globals()
    kept = [entry for entry in own if _qualified_name(entry) in user_safe_globals()]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*kept, *((value, name) for name, value in allowed.items())])
    try:
        yield array_registry.restored
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(own)


def user_safe_globals() -> set[str]:
    """Return the names that the user passed to `torch.serialization.add_safe_globals`.

    Packages add names too, and these are not safe: torch adds exceptions, nested and distributed tensors, other
    packages the constructors of numpy.
    """
    names = {_qualified_name(entry) for entry in torch.serialization.get_safe_globals()}
    return {name for name in names if not _UNSAFE_MODULES.match(name)} - plain_global_names()


def plain_global_names() -> set[str]:
    """Return the full names that `plain_globals` allows."""
    return {*_allowed_globals(PlainArrays())}


def _allowed_globals(array_registry: PlainArrays) -> dict[str, Any]:
    reconstruct = {f"{core}._reconstruct": array_registry.reconstruct for core in _NUMPY_CORES}
    # torch sets the state of an object only if its class is listed; no file can name "Array", which has no dot.
    return {**_SAFE_TYPES, **_CHECKED_CONSTRUCTORS, **reconstruct, **path_globals(), "Array": Array}


def _qualified_name(entry: Any) -> str:
    return str(entry[1]) if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def path_globals() -> dict[str, type]:
    """Return the path classes by their full names in a file."""
    return {f"{module}.{name}": value for module in _PATH_MODULES for name, value in _path_classes().items()}


def _path_classes() -> dict[str, type]:
    """Class name in a file -> class here; a path of another operating system becomes a pure path."""
    own = os.name == "posix"
    return {
        "PosixPath": pathlib.PosixPath if own else pathlib.PurePosixPath,
        "WindowsPath": pathlib.PureWindowsPath if own else pathlib.WindowsPath,
        "PurePosixPath": pathlib.PurePosixPath,
        "PureWindowsPath": pathlib.PureWindowsPath,
    }


# Names of these packages are listed last, since every pickled network has hundreds of them.
_EXPECTED_MODULES = {"torch", "timm", "torchvision", "normswap", "collections"}
_ALLOWED_GLOBALS = (
    r"torch\._utils\._rebuild_|torch\.(storage\.)?\w*Storage$|collections\.OrderedDict$|torch\.Size$|"
    r"__builtin__\.set$|torch\.\w*\d+$|_codecs\.encode$"
)


def blocked_globals(pickles: Iterable[IO[bytes]]) -> list[str]:
    """Return the names of code in these pickles that are not known to be harmless, unexpected packages first."""
    found: set[str] = set()
    for pickle in pickles:
        found |= summarize_pickle(pickle).names
    harmless = plain_global_names()
    blocked = (name for name in found if not re.match(_ALLOWED_GLOBALS, name) and _modernize_name(name) not in harmless)
    return sorted(blocked, key=lambda name: (name.partition(".")[0] in _EXPECTED_MODULES, name))


def torch_error_message(error: BaseException) -> str:
    """Return the reason in an error of `torch.load`, without its long advice, as one line."""
    return first_line(Exception(str(error).partition("WeightsUnpickler error:")[2] or first_line(error)))


def _modernize_name(name: str) -> str:
    """Pickles of protocol 2 use the module names of Python 2."""
    return name.replace("__builtin__.", "builtins.")
