"""A copy of a network for the trace: plain or compact layers for SN layers, in the precision of the file."""

import torch
from torch import nn

from normswap.baking.compact_norm import read_site_weights
from normswap.baking.rules.compact import become_compact, matches_compact
from normswap.baking.rules.replacement import can_be_reverted
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
    """Make a layer plain or compact, in place."""
    weights = read_site_weights(layer)
    if can_be_reverted(layer, layer.vertex) and layer.is_at(layer.vertex):
        revert_module(layer)
    elif matches_compact(layer, weights):
        become_compact(layer, weights)
