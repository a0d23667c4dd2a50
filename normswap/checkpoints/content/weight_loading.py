"""Pouring tensors into a model, and saying in one line what does not fit: missing, unexpected, mis-shaped keys.

A file may hold heads that the model does not have, and lack the model's own head or its counters of batches: no norm
depends on them. Everything else has to be there and nothing more. Types and memory formats are the file's: a network
stored in half precision or channels_last comes back as that.
"""

import difflib
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from normswap.errors import ArchitectureError, UnknownNormsError
from normswap.text import first_line

# MERGED DOC: What safetensors cannot hold, taken apart before writing and put together after reading.


# What may be there beyond a network's own tensors: heads that were added, and what tools and older code leave behind.
_HEAD = re.compile(
    r"(?!pre_)(\w+_)?(head|heads|aux\w*|fc|classifier|projector|predictor)\d*(_dist|_head|_\d+)?(\.(?!.*norm)|$)",
    re.IGNORECASE,
)
_TOOL_LEFTOVERS = re.compile(
    r"(^|\.)(total_ops|total_params|num_batches_tracked|relative_position_index|attn_mask|position_ids)$"
)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class SeparatedTensors(NamedTuple):
    """Tensors by key as a container of plain tensors takes them, and the notes that bring the others back."""

    tensors: dict[str, Tensor]
    tied: dict[str, str]
    channels_last: tuple[str, ...]


def untie_tensors(state: Mapping[str, Tensor]) -> SeparatedTensors:
    """Return `state` with every value once and contiguous. Tensors that only overlap are stored one by one.

    Of the names of one tensor the first in alphabetical order is kept, as `safetensors.torch.save_model` does.
    """
    names: dict[tuple[object, ...], list[str]] = {}
    for key, tensor in state.items():
        # Tensors without elements share the null pointer and nothing else.
        storage_key = (
            (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else (key,)
        )
        names.setdefault(storage_key, []).append(key)
    tied = {key: min(same) for same in names.values() for key in same if key != min(same)}
    tensors = {key: _contiguous(tensor) for key, tensor in state.items() if key not in tied}
    return SeparatedTensors(tensors, tied, tuple(key for key, tensor in state.items() if _is_channels_last(tensor)))


def _contiguous(tensor: Tensor) -> Tensor:
    owns_storage = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.contiguous() if owns_storage else tensor.clone(memory_format=torch.contiguous_format)


def retie_tensors(
    tensors: Mapping[str, Tensor], tied: Mapping[str, str], channels_last: Iterable[str]
) -> dict[str, Tensor]:
    """Return what `separate` was given; notes on keys that are not there are left aside."""
    state = dict(tensors)
    for key in channels_last:
        if key in state and state[key].dim() in _CHANNELS_LAST:
            layout = _CHANNELS_LAST[state[key].dim()]
            state[key] = torch.empty_like(state[key], memory_format=layout).copy_(state[key])
    return state | {key: state[kept] for key, kept in tied.items() if kept in state}


def _is_channels_last(tensor: Tensor) -> bool:
    layout = _CHANNELS_LAST.get(tensor.dim())
    # Told by the strides: with one channel or one position both layouts call themselves contiguous.
    return layout is not None and tensor.stride() == torch.empty_like(tensor, memory_format=layout).stride() != (
        torch.empty_like(tensor, memory_format=torch.contiguous_format).stride()
    )


_MAX_LISTED = 3
# What a lazy module learns from its first input, and in which dimension of its weight that stands.
_LAZY_SIZES = {"in_features": 1, "in_channels": 1, "num_features": 0}
_RUNNING_STATS = ("running_mean", "running_var")
# difflib compares every pair: of more names than these the first ones are searched.
_MAX_SEARCHED = 2000


@dataclass(frozen=True)
class LoadReport:
    """How tensors fit a model: by name those `beyond` it, and of the model's own the `heads` and `counters` of batches
    that are not among the tensors and stay as the model was built. What is `tied` is not among them either, and has
    the memory of a tensor that is.
    """

    unexpected: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()

    def notes(self, name: str) -> tuple[str, ...]:
        """Return in words what becomes of them in a file that is made of the tensors, `name` being the model."""
        descriptions = {
            f"carried, no part of {name}": self.unexpected,
            f"not in the file: {name} has its own at random, for the proof only, and none is written": self.heads,
            "not in the file: counted from 0, and not written": self.counters,
        }
        return tuple(f"{_format_names(keys)}: {what}" for what, keys in descriptions.items() if keys)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], name: str) -> LoadReport:
    """Load `state` into `model`, strictly but for heads and counters of batches, and return how it fits.

    Args:
        name: what the model is called in the error.

    Raises:
        ArchitectureError: keys or shapes differ, or a layer refuses its tensors; the model may be partly filled.
    """
    for key, tensor in model.state_dict(keep_vars=True).items():
        stored = state.get(key)
        if stored is not None and is_lazy(tensor):
            tensor.materialize(tuple(stored.shape), dtype=stored.dtype)
        elif stored is not None and isinstance(tensor, Tensor) and _needs_reallocation(tensor, stored):
            # The Parameter object stays, and with it ties between modules.
            tensor.data = torch.empty_like(stored, device=tensor.device)
    fit = _compare_keys(model.state_dict(), state)
    try:
        # What is tolerated has been told apart above; a layer may still refuse what it is given.
        model.load_state_dict(state, strict=fit is None or fit == LoadReport())
    except RuntimeError as error:
        message = f"the tensors do not fit {name}: {_describe_mismatch(model, state) or _layer_message(error)}"
        unknown = any(_is_running_stat(key) for key in state if key not in model.state_dict())
        raise (UnknownNormsError if unknown else ArchitectureError)(message) from error
    for module in model.modules():
        if isinstance(module, LazyModuleMixin):
            _initialize_lazy(module)
    return fit or LoadReport()


def _initialize_lazy(module: Any) -> None:
    """Make a lazy module, whose tensors are there now, what its first forward pass would make it."""
    if module.has_uninitialized_params() or not hasattr(module, "_initialize_hook"):
        return
    size = module.weight if getattr(module, "weight", None) is not None else module.running_mean
    for name, weight_dim in _LAZY_SIZES.items():
        if getattr(module, name, None) == 0:
            dim = 0 if getattr(module, "transposed", False) else weight_dim
            setattr(module, name, size.shape[dim] * (1 if dim == 0 else getattr(module, "groups", 1)))
    for hook in ("_initialize_hook", "_load_hook"):
        getattr(module, hook).remove()
        delattr(module, hook)
    if module.cls_to_become is not None:
        module.__class__ = module.cls_to_become


def _compare_keys(own: Mapping[str, Any], state: Mapping[str, Tensor]) -> LoadReport | None:
    """How tensors fit a model of these own ones, or None where something is missing or unexpected that must not be."""
    tied = _find_tied(own, state)
    missing = [key for key in own if key not in state and key not in tied]
    unexpected = tuple(key for key in state if key not in own)
    present = [key for key in own if key in state]
    counters = tuple(filter(is_batch_counter, missing))
    heads = tuple(key for key in missing if not is_batch_counter(key))
    parts = top_level_modules(present)
    if len(present) <= len(heads) + len(unexpected) or any(map(_is_running_stat, (*heads, *unexpected))):
        return None
    whole = all(is_head(key) and key.partition(".")[0] not in parts for key in heads)
    return (
        LoadReport(unexpected, heads, counters, tied)
        if whole and all(is_ignorable(key, parts) for key in unexpected)
        else None
    )


def _find_tied(own: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of a model's tensors that are not in a file and have the memory of others, whose names are.

    safetensors stores what several names share under one of them, as transformers does.
    """
    missing = {key: value for key, value in own.items() if key not in state and _has_storage(value)}
    stored = (
        {_storage_identity(own[key]) for key in state if key in own and _has_storage(own[key])} if missing else set()
    )
    return tuple(key for key, value in missing.items() if _storage_identity(value) in stored)


def _has_storage(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta and value.layout is torch.strided and value.numel() > 0


def _storage_identity(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _is_running_stat(key: str) -> bool:
    return key.rpartition(".")[2] in _RUNNING_STATS


def _needs_reallocation(tensor: Tensor, stored: Tensor) -> bool:
    floating = tensor.is_floating_point() and stored.is_floating_point()
    differs = tensor.dtype != stored.dtype or tensor.stride() != stored.stride()
    return floating and differs and tensor.shape == stored.shape


def _describe_mismatch(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    actual = {key: tuple(value.shape) for key, value in state.items()}
    missing = [key for key in expected if key not in actual]
    unexpected = [key for key in actual if key not in expected]
    mismatched = [key for key in expected if key in actual and expected[key] != actual[key]]
    parts = [
        _format_keys(
            missing, "missing", {key: _suggest_key(key, unexpected, "in the file") for key in missing[:_MAX_LISTED]}
        ),
        _format_keys(
            unexpected,
            "unexpected",
            {key: _suggest_key(key, missing, "in the model") for key in unexpected[:_MAX_LISTED]},
        ),
        _format_keys(
            mismatched,
            "of another shape",
            {
                key: f" (is {_format_shape(actual[key])}, expected {_format_shape(expected[key])})"
                for key in mismatched[:_MAX_LISTED]
            },
        ),
        _suggest_cause(unexpected, {key: (actual[key], expected[key]) for key in mismatched}),
    ]
    return "; ".join(part for part in parts if part)


def _format_keys(keys: list[str], what: str, remarks: Mapping[str, str]) -> str:
    if not keys:
        return ""
    more = f", +{len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return f"{len(keys)} {what}: {', '.join(key + remark for key, remark in remarks.items())}{more}"


def _format_names(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_MAX_LISTED]) + (f", +{len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else "")


def _suggest_key(key: str, candidates: list[str], where: str) -> str:
    near = difflib.get_close_matches(key, candidates[:_MAX_SEARCHED], n=1, cutoff=0.7)
    return f" (nearest {where}: {near[0]})" if near else ""


def _format_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _suggest_cause(unexpected: list[str], shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    """What the pattern of misfits most likely means."""
    if any(key.endswith(".mean_weight") for key in unexpected):
        return "the file holds importance weights without a plan: write converted models with normswap.save(plan=...)"
    norms = sorted({key.rpartition(".")[0] for key in unexpected if _is_running_stat(key)})
    if norms:
        return (
            f"the file has norms that the model has not ({_format_names(norms)}): name the architecture that has them"
        )
    pairs = shapes.values()
    classes = {actual[0] for actual, expected in pairs if actual[1:] == expected[1:] and len(actual) in (1, 2)}
    if (
        len(classes) == 1
        and all(map(is_head, shapes))
        and all(actual[1:] == expected[1:] for actual, expected in pairs)
    ):
        return f"perhaps the architecture lacks num_classes={classes.pop()}"
    return ""


def _layer_message(error: RuntimeError) -> str:
    """What a layer said: torch puts a heading over it."""
    heading, _, rest = str(error).partition("\n\t")
    return first_line(RuntimeError(rest or heading))


def top_level_modules(names: Iterable[str]) -> set[str]:
    """Return the outermost modules that tensors of these names belong to."""
    return {name.partition(".")[0] for name in names}


def is_head(name: str) -> bool:
    """Say whether a tensor of this name is part of a head: it is called so, and is no norm's."""
    return _HEAD.match(name) is not None


def is_ignorable(name: str, parts: Container[str]) -> bool:
    """Say whether a tensor that a network does not have takes no part in its function: a head beside the network's own
    parts, or what tools and older code leave behind.
    """
    return bool(_TOOL_LEFTOVERS.search(name)) or (is_head(name) and name.partition(".")[0] not in parts)


def is_batch_counter(name: str) -> bool:
    """Say whether a tensor of this name counts the batches that a norm has seen."""
    return name.endswith("num_batches_tracked")
