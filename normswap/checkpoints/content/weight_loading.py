"""Loading tensors into a model, with one line about what does not fit: missing, unexpected or misshaped keys.

A file may have heads that the model lacks, and may lack the model's own head or its `num_batches_tracked`, since no
norm depends on them; all other keys must agree. The model takes the dtypes and memory formats of the file: a network
stored in half precision or channels_last is loaded as such. `untie_tensors` and `retie_tensors` store what safetensors
cannot represent: tied tensors and memory formats.
"""

import difflib
import logging
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from normswap.errors import ArchitectureError, UnknownNormsError
from normswap.layers.matching import MATCHING_BUFFERS
from normswap.text import first_line

_logger = logging.getLogger(__name__)

# Tensors that a file may have in addition to those of a network: further heads, and leftovers of tools and older code.
_HEAD = re.compile(
    r"(?!pre_)(\w+_)?(head|heads|aux\w*|fc|classifier|projector|predictor)\d*(_dist|_head|_\d+)?(\.(?!.*norm)|$)",
    re.IGNORECASE,
)
_TOOL_LEFTOVERS = re.compile(
    r"(^|\.)(total_ops|total_params|num_batches_tracked|relative_position_index|attn_mask|position_ids)$"
)


# --- tied tensors and memory formats

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class SeparatedTensors(NamedTuple):
    """Contiguous tensors by key for safetensors, and what `retie_tensors` needs to restore the others.

    Attributes:
        tensors: the tensors to store.
        tied: key of a tied tensor -> key of the stored tensor.
        channels_last: the keys of tensors in this memory format.
    """

    tensors: dict[str, Tensor]
    tied: dict[str, str]
    channels_last: tuple[str, ...]


def untie_tensors(state: Mapping[str, Tensor]) -> SeparatedTensors:
    """Return `state` with each tied tensor only once, and contiguous; tensors that merely overlap are copied.

    The first key of a tied tensor in alphabetical order is kept, as in `safetensors.torch.save_model`.
    """
    names: dict[tuple[object, ...], list[str]] = {}
    for key, tensor in state.items():
        # Tensors without elements all have the null pointer, but share no memory.
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
    """Return the state dict that `untie_tensors` has separated; keys without a tensor are ignored."""
    state = dict(tensors)
    for key in channels_last:
        if key in state and state[key].dim() in _CHANNELS_LAST:
            layout = _CHANNELS_LAST[state[key].dim()]
            state[key] = torch.empty_like(state[key], memory_format=layout).copy_(state[key])
    return state | {key: state[kept] for key, kept in tied.items() if kept in state}


def _is_channels_last(tensor: Tensor) -> bool:
    layout = _CHANNELS_LAST.get(tensor.dim())
    # Decided by the strides: with one channel or one position, torch calls both layouts contiguous.
    return layout is not None and tensor.stride() == torch.empty_like(tensor, memory_format=layout).stride() != (
        torch.empty_like(tensor, memory_format=torch.contiguous_format).stride()
    )


# --- loading

_MAX_LISTED = 3
# The attribute that a lazy module sets at its first input -> the dimension of its weight with this size.
_LAZY_SIZES = {"in_features": 1, "in_channels": 1, "num_features": 0}
_RUNNING_STATS = ("running_mean", "running_var")
_MAX_SEARCHED = 2000  # the number of names in which difflib, which compares every pair, searches


@dataclass(frozen=True)
class LoadReport:
    """The differences between tensors and a model that were tolerated.

    Attributes:
        unexpected: tensors that the model does not have.
        heads: tensors of the model's head that are missing; they keep their random initial values.
        counters: missing `num_batches_tracked`, which stay 0.
        tied: tensors of the model that are missing and share the memory of one that is not.
    """

    unexpected: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()

    def notes(self, name: str) -> tuple[str, ...]:
        """Return notes on the effects in a file that is written from the tensors; `name` is that of the model."""
        descriptions = {
            f"not part of {name}, copied unchanged": self.unexpected,
            "missing from the file; verified with randomly initialized values, not written to the output": self.heads,
            "missing from the file; counts from 0, not written to the output": self.counters,
        }
        return tuple(f"{_format_names(keys)}: {what}" for what, keys in descriptions.items() if keys)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], name: str) -> LoadReport:
    """Load `state` into `model`, strictly except for heads and `num_batches_tracked`.

    Args:
        model: the model, which is changed.
        state: tensors by key.
        name: the name of the model for the error message.

    Returns:
        The differences that were tolerated.

    Raises:
        ArchitectureError: keys or shapes differ, or a layer refuses its tensors; some tensors of the model may have
            been loaded.
    """
    for key, tensor in model.state_dict(keep_vars=True).items():
        stored = state.get(key)
        if stored is not None and is_lazy(tensor):
            tensor.materialize(tuple(stored.shape), dtype=stored.dtype)
        elif stored is not None and isinstance(tensor, Tensor) and _needs_reallocation(tensor, stored):
            # The Parameter object stays the same, so that tied modules stay tied.
            tensor.data = torch.empty_like(stored, device=tensor.device)
    report = _compare_keys(model.state_dict(), state)
    try:
        # All differences in `report` are tolerated; a layer may still refuse its tensors.
        model.load_state_dict(state, strict=report is None or report == LoadReport())
    except RuntimeError as error:
        message = f"the tensors do not fit {name}: {_describe_mismatch(model, state) or _layer_message(error)}"
        unknown = any(_is_running_stat(key) for key in state if key not in model.state_dict())
        raise (UnknownNormsError if unknown else ArchitectureError)(message) from error
    for module in model.modules():
        if isinstance(module, LazyModuleMixin):
            _initialize_lazy(module)
    if report not in (None, LoadReport()):
        _logger.info("loaded the tensors into %s with tolerated differences: %s", name, report)
    return report or LoadReport()


def _initialize_lazy(module: Any) -> None:
    """Turn a lazy module with loaded tensors into the class that its first forward pass would give it."""
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
    """The tolerated differences between a model's own tensors and `state`, or None if others exist."""
    tied = _find_tied(own, state)
    # The layers compute missing constants of matched branches themselves.
    missing = [key for key in own if key not in state and key not in tied and not _is_matching_constant(key)]
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
    """The names of a model's tensors that are missing in a file and share the memory of a tensor that is not.

    transformers and safetensors store a tied tensor under one of its names.
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


def _is_matching_constant(key: str) -> bool:
    return key.rpartition(".")[2] in MATCHING_BUFFERS


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
            "with another shape",
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
    """The most likely cause of the differences, with advice, or `""`."""
    if any(key.endswith(".mean_weight") for key in unexpected):
        return "the file has importance weights without a plan: write converted models with normswap.save(plan=...)"
    norms = sorted({key.rpartition(".")[0] for key in unexpected if _is_running_stat(key)})
    if norms:
        return (
            f"the file has norms that the model lacks ({_format_names(norms)}): pass the architecture with these norms"
        )
    pairs = shapes.values()
    classes = {actual[0] for actual, expected in pairs if actual[1:] == expected[1:] and len(actual) in (1, 2)}
    if (
        len(classes) == 1
        and all(map(is_head, shapes))
        and all(actual[1:] == expected[1:] for actual, expected in pairs)
    ):
        return f"add num_classes={classes.pop()} to the architecture"
    return ""


def _layer_message(error: RuntimeError) -> str:
    """The message of a layer, without the heading of torch."""
    heading, _, rest = str(error).partition("\n\t")
    return first_line(RuntimeError(rest or heading))


def top_level_modules(names: Iterable[str]) -> set[str]:
    """Return the outermost modules of tensors with these names."""
    return {name.partition(".")[0] for name in names}


def is_head(name: str) -> bool:
    """Return whether a tensor with this name belongs to a head, and not to a norm in it."""
    return _HEAD.match(name) is not None


def is_ignorable(name: str, parts: Container[str]) -> bool:
    """Return whether an additional tensor cannot affect a network: a further head, or a leftover of tools.

    Args:
        name: the name of the tensor.
        parts: the top-level modules of the network, which are never further heads.
    """
    return bool(_TOOL_LEFTOVERS.search(name)) or (is_head(name) and name.partition(".")[0] not in parts)


def is_batch_counter(name: str) -> bool:
    """Return whether a tensor with this name is the `num_batches_tracked` of a norm."""
    return name.endswith("num_batches_tracked")
