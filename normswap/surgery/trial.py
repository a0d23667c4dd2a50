"""Runs that leave nothing behind, to hold a traced forward against the real one before it is believed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normswap.layers.gates import GatedModule
from normswap.modes import preserved_state, seeded, training_flags
from normswap.output_leaves import leaf_list
from normswap.surgery.tree import walk_modules


def outcome(module: nn.Module, run: Callable[[], Any], *, training: bool) -> list[Any]:
    """Return paths and leaves of what `run`, which calls `module`, returns, or the class of the error it raises."""
    modules = [place.module for place in walk_modules(module)]
    with preserved_state(modules), training_flags(modules, training=training), seeded(0), torch.no_grad():
        for gated in modules:
            if isinstance(gated, GatedModule):  # other processes may not be on trial
                gated.synchronize = False
        try:
            return leaf_list(run())
        except Exception as error:  # noqa: BLE001 - the user's code: where both sides fail alike, they agree
            return [type(error).__name__]


def agree(first: list[Any], second: list[Any]) -> bool:
    """Say whether two outcomes are the same, up to rounding."""
    return len(first) == len(second) and all(map(_same, first, second))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return alike and (a.is_meta or torch.allclose(a, b, equal_nan=True))
    if isinstance(a, float | complex) and type(a) is type(b):
        return bool(torch.isclose(torch.tensor(a), torch.tensor(b), equal_nan=True))
    return type(a) is type(b) and bool(a == b)
