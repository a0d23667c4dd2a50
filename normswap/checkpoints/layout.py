"""What safetensors cannot hold, taken apart before writing and put together after reading.

It stores every tensor once and row by row: tensors that share memory and tensors in channels_last need a note
beside them. Tensors in, tensors out; the notes travel in the record.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Stored(NamedTuple):
    """Tensors by key as a container of plain tensors takes them, and the notes that bring the others back."""

    tensors: dict[str, Tensor]
    tied: dict[str, str]
    channels_last: tuple[str, ...]


def separate(state: Mapping[str, Tensor]) -> Stored:
    """Return `state` with every value once and contiguous. Tensors that only overlap are stored one by one.

    Of the names of one tensor the first in alphabetical order is kept, as `safetensors.torch.save_model` does.
    """
    names: dict[tuple[object, ...], list[str]] = {}
    for key, tensor in state.items():
        # Tensors without elements share the null pointer and nothing else.
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else (key,)
        names.setdefault(place, []).append(key)
    tied = {key: min(same) for same in names.values() for key in same if key != min(same)}
    tensors = {key: _contiguous(tensor) for key, tensor in state.items() if key not in tied}
    return Stored(tensors, tied, tuple(key for key, tensor in state.items() if _is_channels_last(tensor)))


def _contiguous(tensor: Tensor) -> Tensor:
    own = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.contiguous() if own else tensor.clone(memory_format=torch.contiguous_format)


def rejoin(tensors: Mapping[str, Tensor], tied: Mapping[str, str], channels_last: Iterable[str]) -> dict[str, Tensor]:
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
