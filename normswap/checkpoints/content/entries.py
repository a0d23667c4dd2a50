"""The entries of a checkpoint's content: weights, copies of them (EMA), optimizer and scheduler states, the rest.

Every trainer has its own layout, so entries are recognized by structure: a state dict maps names to tensors, an
optimizer state has `state` and `param_groups`. Names only decide between several candidates. States of a training run
in an unknown form (averages as lists of tensors, wrapped optimizers) get a note. Nothing here reads a file or changes
its argument: `replace_entries` returns a new content that shares all other values.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from normswap.checkpoints.content.optimizer_state import is_optimizer_state, is_scheduler_state
from normswap.errors import ArgumentError, CheckpointError
from normswap.schema import suggest
from normswap.surgery.arguments import require_type

KeyPath = tuple[str | int, ...]

# Keys of the weights to convert, the most likely first.
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
    """The key paths of the entries in a content; `()` is the content itself.

    Attributes:
        kind: the kind of the whole content, such as `"Lightning checkpoint"`.
        weights: the state dict or module to convert.
        others: further state dicts and modules.
        optimizers, schedulers: their states.
        prefix: what the names of the selected tensors start with, if the user selected one of several models in a
            single state dict.
    """

    kind: str
    weights: KeyPath
    others: tuple[KeyPath, ...] = ()
    optimizers: tuple[KeyPath, ...] = ()
    schedulers: tuple[KeyPath, ...] = ()
    prefix: str = ""

    @property
    def entry(self) -> str:
        """The value of `entry=` that selects these weights; `""` if they are the whole content."""
        return ".".join(filter(None, (format_key_path(self.weights), self.prefix.rstrip("."))))


def read_contents(content: Any, *, entry: str | None = None) -> Contents:
    """Return the key paths of weights, their copies, and optimizer and scheduler states in `content`.

    Args:
        entry: the weights to select if there are several: the keys joined by dots, or the first parts of the names of
            one of several models in a single state dict.

    Raises:
        CheckpointError: there are no weights, several equally likely ones, or none at `entry`.
    """
    found = find_weights(content)
    if not found:
        raise CheckpointError(f"expected a state dict or a module, got {_describe_content(content)}: {_SAVE_HINT}")
    weights, prefix = _select_weights(found, entry)
    others = tuple(key_path for key_path in found if key_path != weights)
    optimizers = find_optimizers(content)
    schedulers = tuple(_iter_key_paths(content, (), is_scheduler_state))
    return Contents(_describe_kind(content, weights), weights, others, optimizers, schedulers, prefix)


def read_named_entries(entry: Any, architecture: Any, example_inputs: Any) -> tuple[tuple[str | None, Any, Any], ...]:
    """Return the entries that an argument `entry` names, each with its architecture and its inputs.

    Raises:
        ArgumentError: `entry` is neither a name nor a list of names, or `architecture` has a key that is none of them.
    """
    if entry is None or isinstance(entry, str):
        return ((entry, architecture, example_inputs),)
    expected = "the name of an entry such as 'state_dict_ema', or a list of names"
    require_type(entry, Iterable, "entry", expected)
    entries = tuple(entry)
    if not all(isinstance(name, str) for name in entries):
        raise ArgumentError(f"entry: expected {expected}, got {entry!r:.80}")
    for key in architecture if isinstance(architecture, Mapping) else ():
        if key not in entries:
            near = suggest(key, entries)
            raise ArgumentError(f"architecture: expected entries of entry={list(entries)} as keys, got {key!r}{near}")
    return tuple(
        (name, _select(architecture, name, entries), _select(example_inputs, name, entries)) for name in entries
    )


def _select(value: Any, entry: str, entries: Sequence[str]) -> Any:
    """The value for one of the named entries in a mapping from entries to values; else the value for all."""
    return value.get(entry) if isinstance(value, Mapping) and value and {*value} <= {*entries} else value


def find_weights(content: Any) -> dict[KeyPath, Any]:
    """Return all state dicts and modules in a content by key path."""
    return dict(_iter_weights(content, ()))


def find_optimizers(content: Any) -> tuple[KeyPath, ...]:
    """Return the key paths of the optimizer states in a content."""
    return tuple(_iter_key_paths(content, (), is_optimizer_state))


def get_entry(content: Any, key_path: KeyPath) -> Any:
    """Return the entry at a key path."""
    for key in key_path:
        content = content[key]
    return content


def replace_entries(content: Any, values: Mapping[KeyPath, Any]) -> Any:
    """Return `content` with these values at their key paths; only the mappings and lists on the paths are copied."""
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
    """Return the entries of `content` without the one at a key path; none if that is the content itself."""
    if not key_path:
        return {}
    key, *rest = key_path
    remaining = {name: value for name, value in content.items() if name != key}
    inner = drop_entry(content[key], tuple(rest)) if rest and isinstance(content[key], Mapping) else {}
    return remaining | ({str(key): inner} if inner else {})


def read_architecture_hints(content: Any) -> tuple[str, ...]:
    """Return the names of architectures in a training checkpoint, such as `resnet50`, unchecked."""
    if not isinstance(content, Mapping):
        return ()
    args = content.get("args")
    options = vars(args) if isinstance(args, Namespace) else args if isinstance(args, Mapping) else {}
    hints = (source.get(key) for source in (content, options) for key in _ARCHITECTURE_KEYS)
    return tuple(dict.fromkeys(word for word in hints if isinstance(word, str)))


def format_key_path(key_path: KeyPath) -> str:
    """Return a key path as the user writes it, with dots between the keys."""
    return ".".join(map(str, key_path))


def is_training_key_path(key_path: KeyPath) -> bool:
    """Return whether a key in the path has a name of an optimizer or scheduler state."""
    return any(_TRAINING_KEY.search(str(key).lower()) for key in key_path)


def is_state_dict(value: Any) -> bool:
    """Return whether `value` is a mapping of strings to tensors, of which at least one is floating-point."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(key, str) for key in value):
        return False
    tensors = [item for item in value.values() if isinstance(item, Tensor)]
    stray = any(not isinstance(item, Tensor) and not key.endswith("_extra_state") for key, item in value.items())
    return not stray and any(tensor.is_floating_point() and tensor.dim() for tensor in tensors)


# Buffers of observers and of fake quantization in torch.ao.
_QUANTIZATION_KEY = re.compile(r"(^|\.)(fake_quant_enabled|activation_post_process(_\d+)?\.min_val)$")


def check_has_values(weights: Any) -> None:
    """Refuse a state dict with tensors that have no floating-point values; other objects pass.

    Raises:
        CheckpointError: a tensor is on the meta device, quantized, or from a model prepared for quantization.
    """
    if not is_state_dict(weights):
        return
    converted = any(key.endswith("mean_weight") for key in weights)  # a converted model may be prepared afterwards
    for key, value in weights.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise CheckpointError(
                f"the tensor {key!r} is on the meta device and has no values: load the weights into the model first"
            )
        if _QUANTIZATION_KEY.search(key) and not converted:
            raise CheckpointError(
                f"the tensor {key!r} is from a model prepared for quantization: convert the original model, then "
                "prepare the converted one"
            )
        if isinstance(value, Tensor) and value.is_quantized:
            raise CheckpointError(
                f"the tensor {key!r} is quantized and its norms are fused into other layers: convert the model before "
                "its quantization"
            )


def _iter_weights(value: Any, key_path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, nn.Module) or is_state_dict(value):
        yield key_path, value
    elif isinstance(value, Mapping) and len(key_path) < _MAX_DEPTH and not is_optimizer_state(value):
        for key, inner in value.items():
            if isinstance(key, str):
                yield from _iter_weights(inner, (*key_path, key))


def _iter_key_paths(value: Any, key_path: KeyPath, predicate: Callable[[Any], bool]) -> Iterator[KeyPath]:
    """The key paths of matching values, also in lists, but not inside one another or inside weights."""
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
    """The key path of the weights, and the prefix of their names."""
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
            f"has several models ({_format_key_paths(named)}): select one, such as "
            f"entry={format_key_path(candidates[0])!r}; normswap convert accepts several at once"
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
        return f"a {type(content).__name__} of {len(content)} unnamed items ({kinds or 'empty'})"
    return type(content).__name__


def _describe_mapping(content: Mapping[Any, Any]) -> str:
    if not content:
        return "an empty mapping"
    number = next((key for key, value in content.items() if not isinstance(key, str) and _is_array(value)), None)
    if number is not None:
        return f"a mapping with the key {number!r} ({type(number).__name__}), whose tensors have no names"
    array = next((key for key, value in content.items() if _is_array(value) and not isinstance(value, Tensor)), None)
    if array is not None:
        return f"a mapping of arrays, such as {array!r} ({type(content[array]).__name__}), not of tensors"
    bad = next((key for key, value in content.items() if not isinstance(value, Tensor)), None)
    if bad is not None:
        return f"a mapping with the entry {bad!r} of type {type(content[bad]).__name__} and without a state dict"
    return "a mapping of tensors without floating-point weights"


def _is_array(value: object) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


Shape = tuple[int, ...]

_STATE_DEPTH = 4


class _StateKind(NamedTuple):
    """A kind of training state: the pattern of its keys, its name in notes, and what the user should do with it."""

    key_pattern: re.Pattern[str]
    what: str
    advice: str


_STATE_KINDS = (
    _StateKind(
        re.compile(r"(^|[^a-z]|model)ema|averag|(^|_)swa(_|$)|shadow|collected_params"),
        "a weight average",
        "make a new one from the converted model",
    ),
    _StateKind(
        re.compile(r"sched"),
        "a scheduler state",
        "build the scheduler for the optimizer of the converted model and set its step",
    ),
    _StateKind(
        re.compile(r"optim|(^|_)opt(_|$)|moment|exp_avg|master|fp32|fp16|(^|_)zero|(^|_)amp(_|$)"),
        "an optimizer state",
        "build a new optimizer from normswap.param_groups(model), or add the gates to the state yourself",
    ),
)
# An entry with one tensor per parameter, under any key.
_PER_PARAMETER_STATE = _StateKind(
    re.compile(""), "a state per parameter", "add the gates to it yourself, or start with a new one"
)


def find_average_lists(content: Any, known: Collection[KeyPath]) -> Iterator[KeyPath]:
    """Yield the key paths of lists of tensors with the name of a weight average, except the `known` key paths."""
    for key_path, value in _iter_unknown(content, (), known):
        is_average = any(_STATE_KINDS[0].key_pattern.search(str(key).lower()) for key in key_path)
        is_list = isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(t, Tensor) for t in value)
        if is_average and is_list:
            yield key_path


def describe_unknown_states(content: Any, known: Collection[KeyPath], parameters: Collection[Shape]) -> Iterator[str]:
    """Yield a note for every training state in a content that has an unknown form.

    Args:
        known: the key paths of the entries in a known form, including the weights.
        parameters: the shapes of the model's parameters, which identify a state per parameter under any key.
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
            yield f"{format_key_path(key_path)}: left as it is, {kind.what} in an unknown form: {kind.advice}"


def find_master_weights(content: Any, key_path: KeyPath, known: Collection[KeyPath]) -> list[str]:
    """Return the keys with tensors next to an optimizer state: the master weights of a wrapper around the optimizer.

    An optimizer state at the top level of the content has no wrapper.
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
    kind_by_name = next((kind for kind in _STATE_KINDS if kind.key_pattern.search(name)), None)
    if kind_by_name is not None and (sizes or _is_stateful_object(value)):
        return kind_by_name
    matching = sum(size in parameters for size in sizes)
    return _PER_PARAMETER_STATE if matching > 1 and 2 * matching >= len(parameters) else None


def _iter_unknown(value: Any, key_path: KeyPath, known: Collection[KeyPath]) -> Iterator[tuple[KeyPath, Any]]:
    """All values inside a value with their key paths, outer before inner, except the known ones."""
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
    """The shapes of all floating-point tensors inside a value that have at least one dimension."""
    if isinstance(value, Tensor):
        return [tuple(value.shape)] if value.dim() and value.is_floating_point() else []
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [size for item in inside for size in _tensor_shapes(item, depth - 1)] if depth else []


def _is_stateful_object(value: Any) -> bool:
    """Whether a value is an object with a state, such as a pickled optimizer; parsed options are not."""
    return hasattr(value, "state_dict") and not isinstance(value, nn.Module | type)
