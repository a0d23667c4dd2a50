"""Outputs of a model as named leaves, and distances between leaves.

Leaves are dense tensors, numbers, and other plain values, which must be equal. They are read from mappings, sequences,
sets, iterators, dataclasses, plain objects and closures, without a call of `__eq__` of any class. Values that may
contain numbers and cannot be read are listed with the reason, so that nothing is left out silently. Tensors and numbers
are compared by their relative L2.
"""

import functools
import io
import itertools
import types
import weakref
from array import array
from collections import UserList, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set, ValuesView
from dataclasses import dataclass, field
from datetime import date, time, timedelta, tzinfo
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from logging import Logger
from math import hypot, isfinite
from pathlib import PurePath
from threading import Lock
from typing import Any
from uuid import UUID

import torch
from torch import Tensor, nn

# --- leaves -----------------------------------------------------------------------------------------------------------

_MAX_ITEMS = 100_000  # of an iterator, which may have no end
_MAX_DEPTH = 50


@dataclass
class Leaves:
    """The leaves of a value by path, such as `output.loc`, and the reason for each that cannot be compared."""

    values: dict[str, Any] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    model: frozenset[int] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves, in the order of their paths."""
        return [leaf for _, leaf in sorted(self.values.items()) if isinstance(leaf, Tensor)]

    def detached(self) -> "Leaves":
        """Return the same leaves without their autograd graph."""
        values = {path: leaf.detach() if isinstance(leaf, Tensor) else leaf for path, leaf in self.values.items()}
        return Leaves(values, self.opaque)


def read_leaves(value: Any, name: str = "output", model: frozenset[int] | None = None) -> Leaves:
    """Return the leaves of `value`; iterators in it are consumed.

    Args:
        name: the start of each path.
        model: the ids of the modules of the model that returned `value`: they are not read, other modules are. Without
            it no module is read.
    """
    found = Leaves(model=model)
    _read(value, name, found, ())
    return found


def flatten_leaves(leaves: Leaves) -> list[Any]:
    """Return paths and leaves in turn; a value that cannot be read is an object that equals no other."""
    unknown: dict[str, Any] = {path: object() for path in leaves.opaque}
    return [part for item in (leaves.values | unknown).items() for part in item]


def count_numbers(leaves: Leaves) -> int:
    """Return the number of numbers in the leaves."""
    values = leaves.values.values()
    return sum(v.numel() if isinstance(v, Tensor) else int(isinstance(v, int | float | complex)) for v in values)


def _read(value: Any, path: str, found: Leaves, ancestors: tuple[int, ...]) -> None:
    if type(value) in _EXACT_TYPES or isinstance(value, _EXACT_BASE_TYPES):
        found.values[path] = value
        return
    is_model_module = isinstance(value, nn.Module) and (found.model is None or id(value) in found.model)
    if is_model_module or isinstance(value, _NO_DATA):
        return
    if id(value) in ancestors:  # it contains itself
        return
    if len(ancestors) >= _MAX_DEPTH:
        found.opaque[path] = f"is nested deeper than {_MAX_DEPTH} levels"
        return
    try:
        parts = _parts(value, path)
        if not isinstance(parts, dict):
            found.values[path] = parts
            return
        for part, item in parts.items():
            _read(item, part, found, (*ancestors, id(value)))
    except Exception as error:  # noqa: BLE001 - properties and iterators run the model's code
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        found.opaque[path] = reason[0]


# Types with an exact `==`; floats among them are compared by their distance.
_EXACT_TYPES = {type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented)}
_EXACT_BASE_TYPES = (
    Enum, date, time, timedelta, tzinfo, PurePath, UUID, range, slice, bytearray,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
# Types that are no result of a computation.
_NO_DATA = (
    type, types.ModuleType, torch.Generator, Logger, type(Lock()),
)  # fmt: skip


def _parts(value: Any, path: str) -> Any:
    """The parts of a value by path, or a leaf."""
    for kind, parts in _READERS:
        if isinstance(value, kind):
            read = parts(value, path)
            return _with_attributes(read, value, path) if kind in _CONTAINERS else read
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):  # an image, a data frame
        return _array(_import_numpy().asarray(value), path)
    return _attributes(value, path)


def _with_attributes(read: Any, value: Any, path: str) -> Any:
    """The parts of a container, and the attributes that its class adds."""
    attributes = {name: item for name, item in getattr(value, "__dict__", {}).items() if name != "data"}
    if not attributes:
        return read
    parts = read if isinstance(read, dict) else {f"{path}[:]": read}
    known = {id(item) for item in parts.values()}
    return parts | {f"{path}.{name}": item for name, item in attributes.items() if id(item) not in known}


def _tensor(value: Tensor, path: str) -> Any:
    """A dense tensor of torch's own class, or the parts of a nested one."""
    if value.is_meta:
        raise ValueError("is on the meta device, where tensors have no values")
    if value.is_nested:
        return {f"{path}[{index}]": part for index, part in enumerate(value.unbind())}
    if value.is_quantized:
        return value.dequantize()
    if value.layout is not torch.strided:
        return value.to_dense()
    return value if type(value) in (Tensor, nn.Parameter) else value.as_subclass(Tensor)


def _array(value: Any, path: str) -> Any:
    """A numpy array or scalar as a tensor; one of objects, texts or records as its items."""
    if value.dtype.names:
        return {f"{path}[{name!r}]": value[name] for name in value.dtype.names}
    if value.dtype.kind in "biufc":
        try:
            return torch.from_numpy(_import_numpy().array(value))
        except TypeError:  # a dtype that torch does not have, such as longdouble
            wide = _import_numpy().complex128 if value.dtype.kind == "c" else _import_numpy().float64
            return torch.from_numpy(_import_numpy().array(value, dtype=wide))
    if value.dtype.kind in "Mm":
        return torch.from_numpy(_import_numpy().array(value.astype("int64")))
    items = value.tolist()
    return _sequence(items, path) if isinstance(items, list) else {f"{path}[()]": items}


def _import_numpy() -> Any:
    import numpy

    return numpy


def _mapping(value: Mapping[Any, Any], path: str) -> dict[str, Any]:
    return {f"{path}[{key!r}]": item for key, item in value.items()} | {f"len({path})": f"{len(value)} items"}


def _sequence(value: Iterable[Any], path: str) -> Any:
    items = list(value)
    numbers = _as_one_tensor(items)
    if numbers is not None:
        return numbers
    return {f"{path}[{index}]": item for index, item in enumerate(items)} | {f"len({path})": f"{len(items)} items"}


def _tuple(value: tuple[Any, ...], path: str) -> Any:
    if hasattr(value, "_fields"):
        return {f"{path}.{name}": getattr(value, name) for name in value._fields}
    return _sequence(value, path)


def _as_one_tensor(items: list[Any]) -> Tensor | None:
    """A list of numbers as one tensor: one path per number would be slow."""
    kinds = {type(item) for item in items}
    if len(items) < 2 or not kinds <= {int, float}:
        return None
    try:
        return torch.tensor(items, dtype=torch.float64)
    except (OverflowError, RuntimeError):  # an integer beyond float64
        return None


def _set(value: Set[Any], path: str) -> dict[str, Any]:
    """The items of a set in a fixed order: plain values by their `repr`, others by their leaves."""
    if all(type(item) in _EXACT_TYPES for item in value):
        return {f"{path}{{{index}}}": item for index, item in enumerate(sorted(value, key=repr))}
    read = sorted((read_leaves(item, "").values for item in value), key=_sort_key)
    return {f"{path}{{{index}}}{end}": leaf for index, leaves in enumerate(read) for end, leaf in leaves.items()}


def _sort_key(leaves: dict[str, Any]) -> tuple[str, float]:
    size = sum(float(leaf.double().sum()) for leaf in leaves.values() if isinstance(leaf, Tensor))
    return ",".join(f"{path}:{getattr(leaf, 'shape', leaf)}" for path, leaf in leaves.items()), size


def _iterator(value: Iterator[Any], path: str) -> Any:
    items = list(itertools.islice(value, _MAX_ITEMS + 1))
    if len(items) > _MAX_ITEMS:
        raise ValueError(f"is an iterator of more than {_MAX_ITEMS:,} items")
    return _sequence(items, path)


def _file(value: io.IOBase, path: str) -> Any:
    if isinstance(value, io.BytesIO | io.StringIO):
        return {f"{path}.getvalue()": value.getvalue()}
    raise ValueError("is an open file")


def _partial(value: "functools.partial[Any]", path: str) -> dict[str, Any]:
    return {f"{path}.func": value.func, f"{path}.args": value.args, f"{path}.keywords": value.keywords}


def _function(value: types.FunctionType, path: str) -> dict[str, Any]:
    """The parts of a function that a computation can change: closure variables and defaults."""
    cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    captured = {f"{path}.{name}": cell.cell_contents for name, cell in cells}
    return captured | {f"{path}.__defaults__": value.__defaults__, f"{path}.__kwdefaults__": value.__kwdefaults__}


def _module(value: nn.Module, path: str) -> dict[str, Any]:
    """The parts of a module that the forward pass created."""
    plain = {name: item for name, item in vars(value).items() if not name.startswith("_")}
    attributes = plain | value._parameters | value._buffers | value._modules
    return {f"{path}.{name}": item for name, item in attributes.items()}


def _storage(value: Any, path: str) -> Tensor:
    plain = value.untyped() if isinstance(value, torch.TypedStorage) else value  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8, device=plain.device).set_(plain).clone()


def _exception(value: BaseException, path: str) -> dict[str, Any]:
    return {f"{path}.args": value.args} | {f"{path}.{name}": item for name, item in vars(value).items()}


def _attributes(value: Any, path: str) -> dict[str, Any]:
    """The attributes of any other object, in its `__dict__` and in slots."""
    declared = [cls.__dict__.get("__slots__", ()) for cls in type(value).__mro__]
    names = [name for slots in declared for name in ((slots,) if isinstance(slots, str) else slots)]
    slots = [name for name in names if name not in ("__dict__", "__weakref__") and hasattr(value, name)]
    if not hasattr(value, "__dict__") and not slots and type(value) is not object:
        raise ValueError(f"is a {type(value).__module__}.{type(value).__qualname__}, whose attributes cannot be read")
    attributes = {**vars(value)} if hasattr(value, "__dict__") else {}
    return {
        f"{path}.{name}": item for name, item in (attributes | {name: getattr(value, name) for name in slots}).items()
    }


class _NumpyValue(type):
    """Metaclass whose instance check recognizes numpy's values without importing numpy."""

    def __instancecheck__(cls, value: Any) -> bool:
        return type(value).__module__ == "numpy" and hasattr(value, "dtype") and hasattr(value, "tolist")


class _Numpy(metaclass=_NumpyValue):
    pass


# The first kind that matches counts.
_READERS: tuple[tuple[Any, Callable[[Any, str], Any]], ...] = (
    (Tensor, _tensor),
    (nn.Module, _module),
    (weakref.ReferenceType, lambda value, path: {f"{path}()": value()}),
    (torch.futures.Future, lambda value, path: {f"{path}.value()": value.value()}),
    ((torch.UntypedStorage, torch.TypedStorage), _storage),
    (BaseException, _exception),
    (array, lambda value, path: _array(_import_numpy().asarray(value), path)),
    (_Numpy, _array),
    (int, lambda value, _: int(value)),
    ((float, Decimal, Fraction), lambda value, _: float(value)),
    (complex, lambda value, _: complex(value)),
    (str, lambda value, _: str(value)),
    (bytes, lambda value, _: bytes(value)),
    (tuple, _tuple),
    (Mapping, _mapping),
    ((list, deque, UserList, ValuesView), _sequence),
    (Set, _set),
    (io.IOBase, _file),
    (Iterator, _iterator),
    (functools.partial, _partial),
    ((types.MethodType, types.BuiltinFunctionType), lambda value, path: {f"{path}.__self__": value.__self__}),
    (types.FunctionType, _function),
)
# Containers whose subclasses may add attributes.
_CONTAINERS = (tuple, Mapping, (list, deque, UserList, ValuesView), Set, functools.partial)


# --- distances --------------------------------------------------------------------------------------------------------

TensorNames = tuple[str, ...]

# The number of elements that are compared at once, so that intermediate tensors stay small.
_CHUNK = 1 << 18

# Equal values of at least this size may be a constant mask, such as -1e9. They do not count in the norm of the
# reference, in which they would hide differences of the other values.
_MASK = 1e4
_WIDE_DTYPES = {float: torch.float64, complex: torch.complex128}


def relative_l2(reference: Any, value: Any) -> float:
    """Return the relative L2 of floating tensors or numbers; for other values 0 if they are equal, else inf.

    It is inf if shapes or dtypes differ, or if the values differ at a position at which the reference is inf or NaN.
    """
    if not (isinstance(reference, Tensor) and isinstance(value, Tensor)):
        if type(reference) is not type(value):
            return float("inf")
        if isinstance(reference, float | complex):
            return relative_l2(
                *(torch.tensor(number, dtype=_WIDE_DTYPES[type(number)]) for number in (reference, value))
            )
        return 0.0 if reference == value else float("inf")
    if reference.shape != value.shape or reference.dtype != value.dtype:
        return float("inf")
    if not (reference.is_floating_point() or reference.is_complex()):
        return 0.0 if torch.equal(reference, value) else float("inf")
    return _relative(*_norms(reference, value))


def _norms(reference: Tensor, value: Tensor) -> tuple[float, float]:
    """The norms of the difference and of the reference, over the finite values of the reference."""
    sides = (torch.split(tensor.reshape(-1), _CHUNK) for tensor in (reference, value))
    norms = [_norms_of_chunk(a, b) for a, b in zip(*sides, strict=True)]
    return hypot(*(difference for difference, _ in norms)), hypot(*(size for _, size in norms))


def _norms_of_chunk(reference: Tensor, value: Tensor) -> tuple[float, float]:
    difference, size = (value - reference).norm().item(), reference.norm().item()
    if isfinite(difference) and isfinite(size) and (size < _MASK or reference.abs().max().item() < _MASK):
        return difference, size
    finite = reference.isfinite()
    reference_non_finite, value_non_finite = reference[~finite], value[~finite]
    if not torch.equal(reference_non_finite.isnan(), value_non_finite.isnan()) or not torch.equal(
        reference_non_finite.nan_to_num(), value_non_finite.nan_to_num()
    ):
        return float("inf"), size
    included = finite & ~((reference == value) & (reference.abs() >= _MASK))
    reference, value = reference[included], value[included]
    scale = max(reference.abs().max().item(), 1.0) if reference.numel() else 1.0  # or squares could overflow
    return ((value - reference) / scale).norm().item() * scale, (reference / scale).norm().item() * scale


def _relative(difference: float, size: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / size if size > 0 and isfinite(difference) and isfinite(size) else float("inf")


class VectorDistance:
    """The relative L2 between pairs of tensors as one vector; pairs are added one by one and not stored."""

    def __init__(self) -> None:
        self._difference = self._size = 0.0

    def add(self, reference: Tensor, value: Tensor) -> None:
        """Add one pair; tensors of different shapes or dtypes make the distance inf."""
        if reference.shape != value.shape or reference.dtype != value.dtype:
            self._difference = float("inf")
            return
        difference, size = _norms(reference, value)
        self._difference, self._size = hypot(self._difference, difference), hypot(self._size, size)

    def result(self) -> float:
        """Return the distance of all pairs, 0 without pairs."""
        return _relative(self._difference, self._size)


def max_abs_difference(reference: Any, value: Any) -> float:
    """Return the largest absolute difference of two floating tensors over the finite values of the reference."""
    tensors = isinstance(reference, Tensor) and isinstance(value, Tensor)
    if not tensors or not reference.is_floating_point() or reference.shape != value.shape:
        return 0.0
    difference = (value - reference).abs()
    largest = difference.max().item() if difference.numel() else 0.0
    if isfinite(largest):
        return largest
    difference = difference[reference.isfinite()]
    return difference.max().item() if difference.numel() else 0.0


def max_distance(references: list[Any], values: list[Any]) -> float:
    """Return the largest distance of paired values, inf if the lists have different lengths."""
    if len(references) != len(values):
        return float("inf")
    return max((relative_l2(a, b) for a, b in zip(references, values, strict=True)), default=0.0)


def match_names(
    references: dict[TensorNames, Tensor], values: dict[TensorNames, Tensor]
) -> list[tuple[TensorNames, TensorNames]]:
    """Return pairs of keys that share a name; on each side, a tensor may have several names."""
    by_name = {name: names for names in values for name in names}
    partners = ((names, next((by_name[name] for name in names if name in by_name), None)) for names in references)
    return [(names, partner) for names, partner in partners if partner is not None]
