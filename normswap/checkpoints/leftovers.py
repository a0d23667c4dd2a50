"""What else a file holds of a training run: averages kept as lists of tensors, and states of no known form.

A conversion gives a model new parameters. Whatever a trainer keeps per parameter no longer fits it, unless the gates
join; what normswap does not know is left as it is, and named with what to do.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from normswap.checkpoints.contents import Place, at, is_state_dict, name_of

Shape = tuple[int, ...]

_DEPTH = 4


class _Kind(NamedTuple):
    """What is called so, how a note calls it, and what its owner has to do."""

    called: re.Pattern[str]
    what: str
    advice: str


_KINDS = (
    _Kind(
        re.compile(r"(^|[^a-z]|model)ema|averag|(^|_)swa(_|$)|shadow|collected_params"),
        "an average",
        "make it again from the converted model",
    ),
    _Kind(
        re.compile(r"sched"),
        "a scheduler's state",
        "build the scheduler for the optimizer of the converted model and set its step",
    ),
    _Kind(
        re.compile(r"optim|(^|_)opt(_|$)|moment|exp_avg|master|fp32|fp16|(^|_)zero|(^|_)amp(_|$)"),
        "an optimizer's state",
        "build the optimizer from normswap.param_groups(model) and begin its state again, or put the gates in yourself",
    ),
)
# What keeps a tensor for every parameter, whatever it is called.
_UNNAMED = _Kind(re.compile(""), "a state per parameter", "put the gates in yourself, or begin it again")


def average_lists(content: Any, known: Collection[Place]) -> Iterator[Place]:
    """Yield where lists of tensors lie that are called an average, outside the places that are `known`."""
    for place, value in _outside(content, (), known):
        called = any(_KINDS[0].called.search(str(key).lower()) for key in place)
        if called and isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(t, Tensor) for t in value):
            yield place


def with_gates_between(
    tensors: Sequence[Tensor], parameters: Mapping[str, Shape], gates: Mapping[str, Tensor], trainable: Collection[str]
) -> list[Tensor] | None:
    """Return a list of tensors in the order of a model's parameters with its gates at their places.

    Args:
        tensors: of the model before its conversion.
        parameters: shapes of those of the converted model by name, in their order.
        gates: the values with which the gates start.
        trainable: the names of those that train.

    Returns:
        The list, or None if `tensors` have other shapes or another order.
    """
    old = [shape for name, shape in parameters.items() if name not in gates]
    if [tuple(tensor.shape) for tensor in tensors] != old:
        return None
    rest = iter(tensors)
    every = [gates[name].clone() if name in gates else next(rest) for name in parameters]
    frozen = {name for name in gates if name not in trainable}
    return every if not frozen else [t for name, t in zip(parameters, every, strict=True) if name not in frozen]


def unknown_states(content: Any, known: Collection[Place], parameters: Collection[Shape]) -> Iterator[str]:
    """Yield a note for everything in a content that is state of a training run in a form that nobody knows.

    Args:
        known: places that are understood, weights among them.
        parameters: shapes of the model's parameters, by which a state per parameter is known whatever it is called.
    """
    told: list[Place] = []
    for place, value in _outside(content, (), known):
        if any(place[: len(outer)] == outer for outer in told) or any(place == p[: len(place)] for p in known):
            continue
        kind = _kind_of(place, value, parameters)
        if kind is not None:
            told.append(place)
            yield f"{name_of(place)}: left as it is, {kind.what} in a form that normswap does not know: {kind.advice}"


def master_copies(content: Any, place: Place, known: Collection[Place]) -> list[str]:
    """Return what lies beside an optimizer's state and holds tensors: the master weights of a wrapper around it.

    The whole content is no such wrapper.
    """
    if len(place) < 2:
        return []
    beside = at(content, place[:-1])
    items = beside.items() if isinstance(beside, Mapping) else ()
    own = {(*place[:-1], key): value for key, value in items}
    return [str(where[-1]) for where, value in own.items() if where not in known and where != place and _sizes(value)]


def _kind_of(place: Place, value: Any, parameters: Collection[Shape]) -> _Kind | None:
    sizes = _sizes(value)
    name = str(place[-1]).lower()
    found = next((kind for kind in _KINDS if kind.called.search(name)), None)
    if found is not None and (sizes or _is_object(value)):
        return found
    matching = sum(size in parameters for size in sizes)
    return _UNNAMED if matching > 1 and 2 * matching >= len(parameters) else None


def _outside(value: Any, place: Place, known: Collection[Place]) -> Iterator[tuple[Place, Any]]:
    """Everything inside a value with its place, but for what is known, the outer before the inner."""
    if place in known:
        return
    if place:
        yield place, value
    if len(place) < _DEPTH and not isinstance(value, nn.Module):
        items = value.items() if isinstance(value, Mapping) else ()
        for key, inner in items if not is_state_dict(value) or not place else ():
            if isinstance(key, str | int):
                yield from _outside(inner, (*place, key), known)


def _sizes(value: Any, depth: int = 6) -> list[Shape]:
    """The shapes of all tensors of numbers inside a value that have a dimension."""
    if isinstance(value, Tensor):
        return [tuple(value.shape)] if value.dim() and value.is_floating_point() else []
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [size for item in inside for size in _sizes(item, depth - 1)] if depth else []


def _is_object(value: Any) -> bool:
    """Whether it is an object with a state of its own, as pickled optimizers are; options that were parsed are none."""
    return hasattr(value, "state_dict") and not isinstance(value, nn.Module | type)
