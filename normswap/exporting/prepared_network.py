"""A copy of a network for the trace: plain or compact layers for SN layers, in the precision of the file."""

import torch
from torch import nn

from normswap.baking.compact_norm import CompactNorm
from normswap.layers.in_place import revert_module
from normswap.layers.switch_norm import SwitchNorm
from normswap.surgery.arguments import require_module
from normswap.surgery.module_tree import copy_model, walk_modules
from normswap.surgery.wrappers import unwrap


def prepare_network(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy in which every SN layer is a plain norm, if it computes one, or else compact.

    Args:
        model: a converted network, or any other; it is not changed.
        dtype: the precision of the copy, None for that of the model. The constants of compact layers stay in float32.
    """
    network = copy_model(unwrap(require_module(model)))
    layers = [entry.module for entry in walk_modules(network) if isinstance(entry.module, SwitchNorm)]
    for layer in layers:
        _simplify(layer)
    if dtype is not None:
        network.to(dtype)
    return network


def _simplify(layer: SwitchNorm) -> None:
    """Make a layer plain or compact, in place: references to it in lists, and its hooks, stay valid."""
    replaced = vars(layer).get("replaced")
    if replaced is not None and not replaced.dropped and layer.is_at(layer.vertex):
        revert_module(layer)
    elif not _uses_batch(layer):
        compact = CompactNorm(layer)
        hooks = {name: value for name, value in vars(layer).items() if name.endswith("_hooks")}
        vars(layer).clear()
        vars(layer).update({**vars(compact), **hooks, "training": False})
        layer.__class__ = CompactNorm  # type: ignore[assignment]


def _uses_batch(layer: SwitchNorm) -> bool:
    """Whether the output of one sample depends on the others: the `bn` branch has weight and no running statistics."""
    if layer.running_mean is not None or "bn" not in layer.branches:
        return False
    index = layer.branches.index("bn")
    return any(bool(weights[index]) for weights in layer.importance_weights())
