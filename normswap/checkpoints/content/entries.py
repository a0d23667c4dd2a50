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


KeyPath = tuple[str | int, ...]

# Entries that hold the weights, the likeliest first.
_WEIGHT_KEYS = (
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
_TRAINING_KEY = re.compile(r"optim|(^|_)opt(_|$)|sched|momentum|exp_avg")
_COPY_WORDS = ("ema", "averag", "swa", "teacher", "best")
_MAX_DEPTH = 3
_SAVE_HINT = "save the model's own weights with torch.save(model.state_dict(), path)"
_ARCHITECTURE_KEYS = ("arch", "model", "model_name", "architecture")


@dataclass(frozen=True)
class Contents:
    """Where things lie in a file's content, each place a path of keys; () is the content itself.

    `kind` says what the whole is, `weights` where the tensors or the module to convert are, `others` where further
    ones are, `optimizers` and `schedulers` where those states are. `prefix` is what the user says that the names of the
    meant tensors begin with, `entry` how the user, or a record, calls the weights.
    """

    kind: str
    weights: KeyPath
    others: tuple[KeyPath, ...] = ()
    optimizers: tuple[KeyPath, ...] = ()
    schedulers: tuple[KeyPath, ...] = ()
    prefix: str = ""

    @property
    def entry(self) -> str:
        """What --entry has to be given for these weights: nothing where the content is theirs."""
        return ".".join(filter(None, (format_key_path(self.weights), self.prefix.rstrip("."))))


def read_contents(content: Any, *, entry: str | None = None) -> Contents:
    """Return where weights, their copies and optimizer states lie in `content`.

    Args:
        entry: the entry whose weights are meant, where there are several: its name, dots between nested ones; inside
            a state dict the first parts of the names of one model.

    Raises:
        CheckpointError: there are no weights, several and none is likelier, or `entry` holds none.
    """
    found = find_weights(content)
    if not found:
        raise CheckpointError(f"expected a state dict or a module, got {_describe_content(content)}: {_SAVE_HINT}")
    weights, prefix = _select_weights(found, entry)
    others = tuple(key_path for key_path in found if key_path != weights)
    optimizers = find_optimizers(content)
    schedulers = tuple(_iter_key_paths(content, (), is_scheduler_state))
    return Contents(_describe_kind(content, weights), weights, others, optimizers, schedulers, prefix)


def find_weights(content: Any) -> dict[KeyPath, Any]:
    """Return all state dicts and modules in a content, by place."""
    return dict(_iter_weights(content, ()))


def find_optimizers(content: Any) -> tuple[KeyPath, ...]:
    """Return where the states of optimizers lie in a content."""
    return tuple(_iter_key_paths(content, (), is_optimizer_state))


def get_entry(content: Any, key_path: KeyPath) -> Any:
    """Return what lies at `place`."""
    for key in key_path:
        content = content[key]
    return content


def replace_entries(content: Any, values: Mapping[KeyPath, Any]) -> Any:
    """Return `content` with these values at their places; mappings and lists on the way are copied, nothing else."""
    if () in values:
        return values[()]
    nested: dict[str | int, dict[KeyPath, Any]] = {}
    for (key, *rest), value in values.items():
        nested.setdefault(key, {})[tuple(rest)] = value
    if not nested:
        return content
    if isinstance(content, Mapping):
        changed = dict(content) if type(content) is dict else content.copy()  # type: ignore[attr-defined]
    else:
        changed = list(content)
    for key, inner in nested.items():
        changed[key] = replace_entries(content[key], inner)
    return changed if isinstance(content, Mapping) else type(content)(changed)


def drop_entry(content: Any, key_path: KeyPath) -> dict[str, Any]:
    """Return the entries of `content` but for the one at `place`; nothing, if that is the content itself."""
    if not key_path:
        return {}
    key, *rest = key_path
    remaining = {name: value for name, value in content.items() if name != key}
    inner = drop_entry(content[key], tuple(rest)) if rest and isinstance(content[key], Mapping) else {}
    return remaining | ({str(key): inner} if inner else {})


def read_architecture_hints(content: Any) -> tuple[str, ...]:
    """Return what a training checkpoint says of its architecture: names such as `resnet50`, unchecked."""
    if not isinstance(content, Mapping):
        return ()
    args = content.get("args")
    options = vars(args) if isinstance(args, Namespace) else args if isinstance(args, Mapping) else {}
    hints = (source.get(key) for source in (content, options) for key in _ARCHITECTURE_KEYS)
    return tuple(dict.fromkeys(word for word in hints if isinstance(word, str)))


def format_key_path(key_path: KeyPath) -> str:
    """Return a place as the user writes it."""
    return ".".join(map(str, key_path))


def is_training_key_path(key_path: KeyPath) -> bool:
    """Say whether a place is called like the state of an optimizer or a scheduler, whatever lies there."""
    return any(_TRAINING_KEY.search(str(key).lower()) for key in key_path)


def is_state_dict(value: Any) -> bool:
    """Say whether `value` maps names to tensors, some of them floating and none without a name."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(key, str) for key in value):
        return False
    tensors = [item for item in value.values() if isinstance(item, Tensor)]
    stray = any(not isinstance(item, Tensor) and not key.endswith("_extra_state") for key, item in value.items())
    return not stray and any(tensor.is_floating_point() and tensor.dim() for tensor in tensors)


# Buffers of observers and of fake quantization, as torch.ao names them.
_QUANTIZATION_KEY = re.compile(r"(^|\.)(fake_quant_enabled|activation_post_process(_\d+)?\.min_val)$")


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
        if _QUANTIZATION_KEY.search(key) and not converted:
            raise CheckpointError(
                f"the tensor {key!r} is of a model prepared for quantization: convert the model before it is prepared, "
                "then prepare the converted one"
            )
        if isinstance(value, Tensor) and value.is_quantized:
            raise CheckpointError(
                f"the tensor {key!r} is quantised, its norms are folded away: convert the model as it was before"
            )


def _iter_weights(value: Any, key_path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, nn.Module) or is_state_dict(value):
        yield key_path, value
    elif isinstance(value, Mapping) and len(key_path) < _MAX_DEPTH and not is_optimizer_state(value):
        for key, inner in value.items():
            if isinstance(key, str):
                yield from _iter_weights(inner, (*key_path, key))


def _iter_key_paths(value: Any, key_path: KeyPath, predicate: Callable[[Any], bool]) -> Iterator[KeyPath]:
    """Where values of a kind lie, in lists too, not inside one another or inside weights."""
    if predicate(value):
        yield key_path
    elif len(key_path) < _MAX_DEPTH and not is_state_dict(value) and not is_optimizer_state(value):
        inside = (
            value.items() if isinstance(value, Mapping) else enumerate(value) if type(value) in (list, tuple) else ()
        )
        for key, inner in inside:
            if isinstance(key, str | int):
                yield from _iter_key_paths(inner, (*key_path, key), predicate)


def _select_weights(found: Mapping[KeyPath, Any], entry: str | None) -> tuple[KeyPath, str]:
    """Where the weights lie, and what their names begin with."""
    if entry is not None:
        return _find_entry(found, entry)
    named = {key_path: value for key_path, value in found.items() if not is_training_key_path(key_path)} or found
    for name in _WEIGHT_KEYS:
        for key_path in sorted(named, key=len):
            if key_path and key_path[-1] == name:
                return key_path, ""
    plain = [
        key_path for key_path in named if not any(word in format_key_path(key_path).lower() for word in _COPY_WORDS)
    ]
    candidates = plain or list(named)
    if len(candidates) > 1:
        raise CheckpointError(
            f"holds several models ({_format_key_paths(named)}): say which, such as entry={format_key_path(candidates[0])!r}; "
            "normswap convert takes several at once"
        )
    return candidates[0], ""


def _find_entry(found: Mapping[KeyPath, Any], entry: str) -> tuple[KeyPath, str]:
    match = next((key_path for key_path in found if format_key_path(key_path) == entry), None)
    if match is not None:
        return match, ""
    for key_path, value in found.items():
        outside = f"{format_key_path(key_path)}." if key_path else ""
        prefix = f"{entry.removeprefix(outside)}."
        if entry.startswith(outside) and is_state_dict(value) and any(key.startswith(prefix) for key in value):
            return key_path, prefix
    raise CheckpointError(f"no weights at {entry!r}: expected one of {_format_key_paths(found)}")


def _describe_kind(content: Any, weights: KeyPath) -> str:
    if not weights:
        return "module" if isinstance(content, nn.Module) else "state dict"
    keys = content.keys() if isinstance(content, Mapping) else set()
    kind_markers = (
        ("pytorch-lightning_version", "Lightning checkpoint"),
        ("state_dict_ema", "timm training checkpoint"),
        ("meta", "mmengine checkpoint"),
        ("lr_scheduler", "torchvision training checkpoint"),
    )
    if {"arch", "epoch", "version"} <= keys:
        return "timm training checkpoint"
    return next((name for key, name in kind_markers if key in keys), "training checkpoint")


def _format_key_paths(found: Sequence[KeyPath] | Mapping[KeyPath, Any]) -> str:
    return ", ".join(repr(format_key_path(key_path)) for key_path in found)


def _describe_content(content: Any) -> str:
    if isinstance(content, Mapping):
        return _describe_mapping(content)
    if isinstance(content, list | tuple):
        kinds = ", ".join(sorted({type(item).__name__ for item in content}))
        return f"a {type(content).__name__} of {len(content)} items without names ({kinds or 'empty'})"
    return type(content).__name__


def _describe_mapping(content: Mapping[Any, Any]) -> str:
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


class _StateKind(NamedTuple):
    """What is called so, how a note calls it, and what its owner has to do."""

    called: re.Pattern[str]
    what: str
    advice: str


_STATE_KINDS = (
    _StateKind(
        re.compile(r"(^|[^a-z]|model)ema|averag|(^|_)swa(_|$)|shadow|collected_params"),
        "an average",
        "make it again from the converted model",
    ),
    _StateKind(
        re.compile(r"sched"),
        "a scheduler's state",
        "build the scheduler for the optimizer of the converted model and set its step",
    ),
    _StateKind(
        re.compile(r"optim|(^|_)opt(_|$)|moment|exp_avg|master|fp32|fp16|(^|_)zero|(^|_)amp(_|$)"),
        "an optimizer's state",
        "build the optimizer from normswap.param_groups(model) and begin its state again, or put the gates in yourself",
    ),
)
# What keeps a tensor for every parameter, whatever it is called.
_PER_PARAMETER_STATE = _StateKind(
    re.compile(""), "a state per parameter", "put the gates in yourself, or begin it again"
)


def find_average_lists(content: Any, known: Collection[KeyPath]) -> Iterator[KeyPath]:
    """Yield where lists of tensors lie that are called an average, outside the places that are `known`."""
    for key_path, value in _iter_unknown(content, (), known):
        called = any(_STATE_KINDS[0].called.search(str(key).lower()) for key in key_path)
        if called and isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(t, Tensor) for t in value):
            yield key_path


def insert_gates(
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
    all_tensors = [gates[name].clone() if name in gates else next(rest) for name in parameters]
    frozen = {name for name in gates if name not in trainable}
    return (
        all_tensors
        if not frozen
        else [t for name, t in zip(parameters, all_tensors, strict=True) if name not in frozen]
    )


def describe_unknown_states(content: Any, known: Collection[KeyPath], parameters: Collection[Shape]) -> Iterator[str]:
    """Yield a note for everything in a content that is state of a training run in a form that nobody knows.

    Args:
        known: places that are understood, weights among them.
        parameters: shapes of the model's parameters, by which a state per parameter is known whatever it is called.
    """
    reported: list[KeyPath] = []
    for key_path, value in _iter_unknown(content, (), known):
        if any(key_path[: len(outer)] == outer for outer in reported) or any(
            key_path == p[: len(key_path)] for p in known
        ):
            continue
        kind = _classify_state(key_path, value, parameters)
        if kind is not None:
            reported.append(key_path)
            yield f"{format_key_path(key_path)}: left as it is, {kind.what} in a form that normswap does not know: {kind.advice}"


def find_master_weights(content: Any, key_path: KeyPath, known: Collection[KeyPath]) -> list[str]:
    """Return what lies beside an optimizer's state and holds tensors: the master weights of a wrapper around it.

    The whole content is no such wrapper.
    """
    if len(key_path) < 2:
        return []
    siblings = get_entry(content, key_path[:-1])
    items = siblings.items() if isinstance(siblings, Mapping) else ()
    own = {(*key_path[:-1], key): value for key, value in items}
    return [
        str(other_path[-1])
        for other_path, value in own.items()
        if other_path not in known and other_path != key_path and _tensor_shapes(value)
    ]


def _classify_state(key_path: KeyPath, value: Any, parameters: Collection[Shape]) -> _StateKind | None:
    sizes = _tensor_shapes(value)
    name = str(key_path[-1]).lower()
    kind_by_name = next((kind for kind in _STATE_KINDS if kind.called.search(name)), None)
    if kind_by_name is not None and (sizes or _is_stateful_object(value)):
        return kind_by_name
    matching = sum(size in parameters for size in sizes)
    return _PER_PARAMETER_STATE if matching > 1 and 2 * matching >= len(parameters) else None


def _iter_unknown(value: Any, key_path: KeyPath, known: Collection[KeyPath]) -> Iterator[tuple[KeyPath, Any]]:
    """Everything inside a value with its place, but for what is known, the outer before the inner."""
    if key_path in known:
        return
    if key_path:
        yield key_path, value
    if len(key_path) < _STATE_DEPTH and not isinstance(value, nn.Module):
        items = value.items() if isinstance(value, Mapping) else ()
        for key, inner in items if not is_state_dict(value) or not key_path else ():
            if isinstance(key, str | int):
                yield from _iter_unknown(inner, (*key_path, key), known)


def _tensor_shapes(value: Any, depth: int = 6) -> list[Shape]:
    """The shapes of all tensors of numbers inside a value that have a dimension."""
    if isinstance(value, Tensor):
        return [tuple(value.shape)] if value.dim() and value.is_floating_point() else []
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [size for item in inside for size in _tensor_shapes(item, depth - 1)] if depth else []


def _is_stateful_object(value: Any) -> bool:
    """Whether it is an object with a state of its own, as pickled optimizers are; options that were parsed are none."""
    return hasattr(value, "state_dict") and not isinstance(value, nn.Module | type)
