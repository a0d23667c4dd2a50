"""Plain data, as JSON and TOML know it, read into typed records: dataclasses, typed dicts, literals, ranges.

The annotations of a record are its schema. A value of another type, an unknown name and a missing name are errors; the
message gives the place, what was expected and the value. Recipes, plans, options and records are all read here.
"""

import difflib
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

T = TypeVar("T")


class SchemaError(ValueError):
    """A value that does not fit its annotation; the message names the place, the expectation and the value."""


@dataclass(frozen=True)
class Range:
    """The finite numbers from `minimum` to `maximum`, both included: `Annotated[float, Range(0, 1)]`."""

    minimum: float = -math.inf
    maximum: float = math.inf

    def __str__(self) -> str:
        if math.isinf(self.maximum):
            return "a finite number" if math.isinf(self.minimum) else f"at least {self.minimum:g}"
        return f"at most {self.maximum:g}" if math.isinf(self.minimum) else f"{self.minimum:g} to {self.maximum:g}"

    def accepts(self, number: float) -> bool:
        """Return whether a number is finite and in the range; a whole number may be larger than any float."""
        return (isinstance(number, int) or math.isfinite(number)) and self.minimum <= number <= self.maximum


def read_value(kind: Any, value: Any, name: str) -> Any:
    """Return `value` as the annotation `kind` describes it.

    Args:
        kind: `bool`, `int`, `float`, `str`, `None`, `Any`, a `Literal`, a union, `tuple[X, ...]`, `tuple[X, Y]`,
            `Sequence[X]` (read as a tuple), `Mapping[str, X]`, a dataclass, a `TypedDict`, or one of these in
            `Annotated[..., Range(...)]`. Functions in a union are left out: plain data has none.
        value: what a parser of JSON or TOML returned. An int is accepted for a float, a list for a tuple; a bool is no
            number.
        name: the place of the value, such as `train.lr`; errors start with it.

    Raises:
        SchemaError: the value does not fit.

    Examples:
        >>> read_value(tuple[int, ...], [1, 2], "sizes")
        (1, 2)
        >>> read_value(Literal["simplex", "softmax"], "simplx", "gate")
        Traceback (most recent call last):
        ...
        normswap.schema.SchemaError: gate: expected 'simplex' or 'softmax', got 'simplx'; did you mean 'simplex'?
    """
    origin = get_origin(kind)
    if origin is Annotated:
        base, *constraints = get_args(kind)
        result = read_value(base, value, name)
        _check_ranges(result, constraints, value, name)
        return result
    if origin in (Required, NotRequired):
        return read_value(get_args(kind)[0], value, name)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _read_union(get_args(kind), value, name)
    if is_dataclass(kind) or is_typeddict(kind):
        return read_record(cast(type, kind), value, name)
    if origin is tuple and isinstance(value, list | tuple):
        return _read_tuple(kind, value, name)
    if origin is Sequence and isinstance(value, list | tuple):
        return _read_tuple(types.GenericAlias(tuple, (*get_args(kind), ...)), value, name)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        key_kind, value_kind = get_args(kind)
        return {
            read_value(key_kind, key, f"key of {name}"): read_value(value_kind, item, f"{name}[{key!r}]")
            for key, item in value.items()
        }
    if origin is Literal and _is_choice(value, get_args(kind)):
        return value
    if kind in (None, type(None)) and value is None:
        return None
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _to_float(value, name)
    if isinstance(kind, type) and type(value) is kind:
        return value
    near = suggest(value, get_args(kind)) if origin is Literal and isinstance(value, str) else ""
    raise SchemaError(f"{name}: expected {describe(kind)}, got {show(value)}{near}")


def read_record(kind: type[T], data: Any, name: str) -> T:
    """Return the dataclass or typed dict `kind` in a mapping; fields that have a default may be missing.

    Args:
        name: the place of the mapping; "" for a whole document, whose fields are named without a prefix.

    Raises:
        SchemaError: no mapping, an unknown or a missing name, or a value that does not fit.
    """
    place = f"{name}: " if name else ""
    if not isinstance(data, Mapping):
        raise SchemaError(f"{place}expected {describe(kind)}, got {show(data)}")
    hints = get_type_hints(kind, include_extras=True)
    names = {f.name for f in fields(kind) if f.init} if is_dataclass(kind) else {*hints}
    for key in data:
        if key not in names:
            raise SchemaError(f"{place}unknown name {key!r}{suggest(key, sorted(names)) or _list_names(names)}")
    missing = sorted(_required(kind) - data.keys())
    if missing:
        raise SchemaError(f"{place}{', '.join(missing)} missing; expected {', '.join(sorted(names))}")
    values = {key: read_value(hints[key], value, f"{name}.{key}" if name else key) for key, value in data.items()}
    return kind(**values)


def describe(kind: Any) -> str:
    """Return in words what an annotation accepts: `a number`, `true or false`, `a list of strings`."""
    origin = get_origin(kind)
    if origin is Annotated:
        base, *constraints = get_args(kind)
        return " ".join([describe(base), *(f"({constraint})" for constraint in constraints)])
    if origin in (Union, types.UnionType):
        parts = [part for part in get_args(kind) if part is not type(None) and not _is_function(part)]
        return " or ".join(map(describe, parts))
    if origin is Literal:
        return " or ".join(_spell(choice) for choice in get_args(kind) if choice is not None)
    if origin is Sequence:
        return describe(types.GenericAlias(tuple, (*get_args(kind), ...)))
    if origin is tuple:
        items = get_args(kind)
        if items[-1] is Ellipsis:
            return _PLURALS.get(items[0]) or f"a list, each item {describe(items[0])}"
        return f"a list of {len(items)} values"
    return _WORDS.get(kind, "a table of named values")


def show(value: object) -> str:
    """Return a value for a message, in at most 80 characters; Python writes neither huge numbers nor deep nesting."""
    try:
        return f"{value!r:.80}"
    except ValueError:
        return "a whole number that is too large"
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply"


def suggest(name: object, known: Iterable[object]) -> str:
    """Return `; did you mean 'x'?` with the nearest known name, or nothing if none is near."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


def nearest(name: object, known: Iterable[object]) -> str | None:
    """Return the known name that is most similar to a name, or None if none is similar."""
    near = difflib.get_close_matches(str(name), [str(each) for each in known], n=1, cutoff=0.5)
    return near[0] if near else None


_WORDS: Mapping[Any, str] = {
    Any: "any value",
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    type(None): "nothing",
    None: "nothing",
}
_PLURALS: Mapping[Any, str] = {
    int: "a list of whole numbers",
    float: "a list of numbers",
    str: "a list of strings",
}


def _read_union(kinds: tuple[Any, ...], value: Any, name: str) -> Any:
    """The value by the first annotation that fits; if none does, the error of the only one that could."""
    errors = []
    for kind in kinds:
        if _is_function(kind) or (kind is type(None) and value is not None):
            continue
        try:
            return read_value(kind, value, name)
        except SchemaError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise SchemaError(f"{name}: expected {describe(Union[kinds])}, got {show(value)}")  # noqa: UP007


def _read_tuple(kind: Any, value: list[Any] | tuple[Any, ...], name: str) -> tuple[Any, ...]:
    items = get_args(kind)
    if items[-1] is Ellipsis:
        return tuple(read_value(items[0], item, f"{name}[{index}]") for index, item in enumerate(value))
    if len(items) != len(value):
        raise SchemaError(f"{name}: expected {describe(kind)}, got {show(value)}")
    return tuple(
        read_value(each, item, f"{name}[{i}]") for i, (each, item) in enumerate(zip(items, value, strict=True))
    )


def _check_ranges(result: Any, constraints: list[Any], value: Any, name: str) -> None:
    for constraint in constraints:
        numbers = result if isinstance(result, tuple) else (result,)
        if isinstance(constraint, Range) and not all(
            number is None or constraint.accepts(number) for number in numbers
        ):
            is_open = math.isinf(constraint.maximum) and any(number in (math.inf, -math.inf) for number in numbers)
            raise SchemaError(f"{name}: expected {'a finite number' if is_open else constraint}, got {show(value)}")


def _to_float(value: float, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise SchemaError(f"{name}: expected a number, got a whole number that is too large") from None


def _is_choice(value: Any, choices: tuple[Any, ...]) -> bool:
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _is_function(kind: Any) -> bool:
    return kind is Callable or get_origin(kind) is Callable


def _spell(choice: object) -> str:
    return str(choice).lower() if isinstance(choice, bool) else repr(choice)


def _list_names(names: Iterable[str]) -> str:
    return f"; expected one of {', '.join(sorted(names))}"


def _required(kind: Any) -> set[str]:
    if is_typeddict(kind):
        return set(kind.__required_keys__)
    return {f.name for f in fields(kind) if f.init and f.default is MISSING and f.default_factory is MISSING}
