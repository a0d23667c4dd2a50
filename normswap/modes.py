"""Context managers that change a model's state for a while and always put it back, also on failure.

What they touch: training flags, buffers, hooks, the random state. Nothing else is changed, nothing is decided.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def training_flags(modules: Iterable[nn.Module], *, training: bool) -> Iterator[None]:
    """Set every module's own training flag, without calling `train()`, which models override."""
    flags = [(module, module.training) for module in modules]
    try:
        for module, _ in flags:
            module.training = training
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def preserved_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put the value of every buffer back at the end; the tensors stay the same objects."""
    saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in modules:
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in saved:
                saved[id(buffer)] = (buffer, buffer.detach().clone())
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved.values():
                buffer.copy_(value)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with a fixed random state on every device in use, and restore the caller's."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def hooked(register: Iterable[Callable[[], RemovableHandle]]) -> Iterator[None]:
    """Register hooks, one per callable, and remove them all at the end."""
    with ExitStack() as stack:
        for call in register:
            stack.callback(call().remove)
        yield


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call `model` with a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)
