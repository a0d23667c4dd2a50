"""Networks whose SN layers are compact layers."""

import copy

from torch import nn

from normswap.baking.compact_norm import CompactNorm
from normswap.layers.switch_norm import SwitchNorm


def compacted(model: nn.Module) -> nn.Module:
    """Return a copy of a network with a compact layer for each SN layer, whatever its importance weights."""
    model = copy.deepcopy(model)
    for fqn, layer in [*model.named_modules()]:
        if isinstance(layer, SwitchNorm):
            parent, _, name = fqn.rpartition(".")
            setattr(model.get_submodule(parent), name, CompactNorm(layer))
    return model
