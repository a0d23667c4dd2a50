"""What a file's content is made of: the weights to convert, copies of them (EMA), optimizer states, the rest.

Told by structure, since every trainer has its own layout: a state dict is a mapping of names to tensors, an optimizer
state has `state` and `param_groups`. Names only choose among several and give the layout its name. Reads no file,
changes nothing: `replaced` returns a new content that shares all other values.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from normswap.checkpoints.content.optimizer_state import is_optimizer_state, is_scheduler_state
from normswap.errors import CheckpointError

# MERGED DOC: What else a file holds of a training run: averages kept as lists of tensors, and states of no known form.


Place = tuple[str | int, ...]

# Entries that hold the weights, the likeliest first.
_WEIGHTS = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "weights",
    "module",
    "params",
    "current_model_state",
)
_TRAINING = re.compile(r"optim|(^|_)opt(_|$)|sched|momentum|exp_avg")
_COPIES = ("ema", "averag", "swa", "teacher", "best")
_DEPTH = 3
_SAVE_WEIGHTS = "save the model's own weights with torch.save(model.state_dict(), path)"
_HINTS = ("arch", "model", "model_name", "architecture")


@dataclass(frozen=True)
class Contents:
    """Where things lie in a file's content, each place a path of keys; () is the content itself.

    `kind` says what the whole is, `weights` where the tensors or the module to convert are, `others` where further
    ones are, `optimizers` and `schedulers` where those states are. `prefix` is what the user says that the names of the
    meant tensors begin with, `entry` how the user, or a record, calls the weights.
    """

    kind: str
    weights: Place
    others: tuple[Place, ...] = ()
    optimizers: tuple[Place, ...] = ()
    schedulers: tuple[Place, ...] = ()
    prefix: str = ""

    @property
    def entry(self) -> str:
        """What --entry has to be given for these weights: nothing where the content is theirs."""
        return ".".join(filter(None, (name_of(self.weights), self.prefix.rstrip("."))))


def read_contents(content: Any, *, entry: str | None = None) -> Contents:
    """Return where weights, their copies and optimizer states lie in `content`.

    Args:
        entry: the entry whose weights are meant, where there are several: its name, dots between nested ones; inside
            a state dict the first parts of the names of one model.

    Raises:
        CheckpointError: there are no weights, several and none is likelier, or `entry` holds none.
    """
    found = weights_in(content)
    if not found:
        raise CheckpointError(f"expected a state dict or a module, got {_described(content)}: {_SAVE_WEIGHTS}")
    weights, prefix = _chosen(found, entry)
    others = tuple(place for place in found if place != weights)
    optimizers = optimizers_in(content)
    schedulers = tuple(_places(content, (), is_scheduler_state))
    return Contents(_kind(content, weights), weights, others, optimizers, schedulers, prefix)


def weights_in(content: Any) -> dict[Place, Any]:
    """Return all state dicts and modules in a content, by place."""
    return dict(_holders(content, ()))


def optimizers_in(content: Any) -> tuple[Place, ...]:
    """Return where the states of optimizers lie in a content."""
    return tuple(_places(content, (), is_optimizer_state))


def at(content: Any, place: Place) -> Any:
    """Return what lies at `place`."""
    for key in place:
        content = content[key]
    return content


def replaced(content: Any, values: Mapping[Place, Any]) -> Any:
    """Return `content` with these values at their places; mappings and lists on the way are copied, nothing else."""
    if () in values:
        return values[()]
    below: dict[str | int, dict[Place, Any]] = {}
    for (key, *rest), value in values.items():
        below.setdefault(key, {})[tuple(rest)] = value
    if not below:
        return content
    if isinstance(content, Mapping):
        changed = dict(content) if type(content) is dict else content.copy()  # type: ignore[attr-defined]
    else:
        changed = list(content)
    for key, inner in below.items():
        changed[key] = replaced(content[key], inner)
    return changed if isinstance(content, Mapping) else type(content)(changed)


def without(content: Any, place: Place) -> dict[str, Any]:
    """Return the entries of `content` but for the one at `place`; nothing, if that is the content itself."""
    if not place:
        return {}
    key, *rest = place
    left = {name: value for name, value in content.items() if name != key}
    inner = without(content[key], tuple(rest)) if rest and isinstance(content[key], Mapping) else {}
    return left | ({str(key): inner} if inner else {})


def hinted_architectures(content: Any) -> tuple[str, ...]:
    """Return what a training checkpoint says of its architecture: names such as `resnet50`, unchecked."""
    if not isinstance(content, Mapping):
        return ()
    args = content.get("args")
    options = vars(args) if isinstance(args, Namespace) else args if isinstance(args, Mapping) else {}
    said = (source.get(key) for source in (content, options) for key in _HINTS)
    return tuple(dict.fromkeys(word for word in said if isinstance(word, str)))


def name_of(place: Place) -> str:
    """Return a place as the user writes it."""
    return ".".join(map(str, place))


def looks_like_training(place: Place) -> bool:
    """Say whether a place is called like the state of an optimizer or a scheduler, whatever lies there."""
    return any(_TRAINING.search(str(key).lower()) for key in place)


def is_state_dict(value: Any) -> bool:
    """Say whether `value` maps names to tensors, some of them floating and none without a name."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(key, str) for key in value):
        return False
    tensors = [item for item in value.values() if isinstance(item, Tensor)]
    stray = any(not isinstance(item, Tensor) and not key.endswith("_extra_state") for key, item in value.items())
    return not stray and any(tensor.is_floating_point() and tensor.dim() for tensor in tensors)


# Buffers of observers and of fake quantization, as torch.ao names them.
_PREPARED = re.compile(r"(^|\.)(fake_quant_enabled|activation_post_process(_\d+)?\.min_val)$")


def check_has_values(weights: Any) -> None:
    """Refuse a state dict of which some tensor has no floating values of its own; what is none passes.

    Raises:
        CheckpointError: a tensor is on the meta device, quantised, or of a model prepared for quantization.
    """
    if not is_state_dict(weights):
        return
    converted = any(key.endswith("mean_weight") for key in weights)  # a model may be prepared after its conversion
    for key, value in weights.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise CheckpointError(f"the tensor {key!r} is on the meta device and has no values: load it first")
        if _PREPARED.search(key) and not converted:
            raise CheckpointError(
                f"the tensor {key!r} is of a model prepared for quantization: convert the model before it is prepared, "
                "then prepare the converted one"
            )
        if isinstance(value, Tensor) and value.is_quantized:
            raise CheckpointError(
                f"the tensor {key!r} is quantised, its norms are folded away: convert the model as it was before"
            )


def _holders(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, nn.Module) or is_state_dict(value):
        yield place, value
    elif isinstance(value, Mapping) and len(place) < _DEPTH and not is_optimizer_state(value):
        for key, inner in value.items():
            if isinstance(key, str):
                yield from _holders(inner, (*place, key))


def _places(value: Any, place: Place, is_one: Callable[[Any], bool]) -> Iterator[Place]:
    """Where values of a kind lie, in lists too, not inside one another or inside weights."""
    if is_one(value):
        yield place
    elif len(place) < _DEPTH and not is_state_dict(value) and not is_optimizer_state(value):
        inside = (
            value.items() if isinstance(value, Mapping) else enumerate(value) if type(value) in (list, tuple) else ()
        )
        for key, inner in inside:
            if isinstance(key, str | int):
                yield from _places(inner, (*place, key), is_one)


def _chosen(found: Mapping[Place, Any], entry: str | None) -> tuple[Place, str]:
    """Where the weights lie, and what their names begin with."""
    if entry is not None:
        return _named(found, entry)
    named = {place: value for place, value in found.items() if not looks_like_training(place)} or found
    for name in _WEIGHTS:
        for place in sorted(named, key=len):
            if place and place[-1] == name:
                return place, ""
    plain = [place for place in named if not any(word in name_of(place).lower() for word in _COPIES)]
    candidates = plain or list(named)
    if len(candidates) > 1:
        raise CheckpointError(
            f"holds several models ({_listed(named)}): say which, such as entry={name_of(candidates[0])!r}; "
            "normswap convert takes several at once"
        )
    return candidates[0], ""


def _named(found: Mapping[Place, Any], entry: str) -> tuple[Place, str]:
    match = next((place for place in found if name_of(place) == entry), None)
    if match is not None:
        return match, ""
    for place, value in found.items():
        outside = f"{name_of(place)}." if place else ""
        prefix = f"{entry.removeprefix(outside)}."
        if entry.startswith(outside) and is_state_dict(value) and any(key.startswith(prefix) for key in value):
            return place, prefix
    raise CheckpointError(f"no weights at {entry!r}: expected one of {_listed(found)}")


def _kind(content: Any, weights: Place) -> str:
    if not weights:
        return "module" if isinstance(content, nn.Module) else "state dict"
    keys = content.keys() if isinstance(content, Mapping) else set()
    marks = (
        ("pytorch-lightning_version", "Lightning checkpoint"),
        ("state_dict_ema", "timm training checkpoint"),
        ("meta", "mmengine checkpoint"),
        ("lr_scheduler", "torchvision training checkpoint"),
    )
    if {"arch", "epoch", "version"} <= keys:
        return "timm training checkpoint"
    return next((name for key, name in marks if key in keys), "training checkpoint")


def _listed(found: Sequence[Place] | Mapping[Place, Any]) -> str:
    return ", ".join(repr(name_of(place)) for place in found)


def _described(content: Any) -> str:
    if isinstance(content, Mapping):
        return _described_mapping(content)
    if isinstance(content, list | tuple):
        kinds = ", ".join(sorted({type(item).__name__ for item in content}))
        return f"a {type(content).__name__} of {len(content)} items without names ({kinds or 'empty'})"
    return type(content).__name__


def _described_mapping(content: Mapping[Any, Any]) -> str:
    if not content:
        return "an empty one"
    number = next((key for key, value in content.items() if not isinstance(key, str) and _is_array(value)), None)
    if number is not None:
        return f"a mapping with the key {number!r} ({type(number).__name__}), where names of tensors are texts"
    array = next((key for key, value in content.items() if _is_array(value) and not isinstance(value, Tensor)), None)
    if array is not None:
        return f"a mapping of arrays, such as {array!r} ({type(content[array]).__name__}), not of tensors"
    bad = next((key for key, value in content.items() if not isinstance(value, Tensor)), None)
    if bad is not None:
        return f"a mapping with the entry {bad!r} of type {type(content[bad]).__name__} and no state dict in it"
    return "a mapping of tensors, none of which is a floating-point weight"


def _is_array(value: object) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


Shape = tuple[int, ...]

_STATE_DEPTH = 4


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
    if len(place) < _STATE_DEPTH and not isinstance(value, nn.Module):
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
