"""All weight on `in`: an InstanceNorm. The scale s of a matched layer is folded into its weight, which is exact.

(x - mean) / sqrt((var + eps) s) w + b  =  (x - mean) / sqrt(var + eps) w / sqrt(s) + b
"""

from typing import Any

from torch import nn

from normswap.baking.rules.group_norm import register_affine
from normswap.baking.rules.replacement import can_be_reverted, turn_into
from normswap.layers.in_place import revert_module
from normswap.layers.switch_norm import SwitchNorm, SwitchNorm2d, SwitchNorm3d
from normswap.surgery.importance import SiteWeights

# Not InstanceNorm1d, which reads an input (N, C) as one of (C, L).
_PLAIN: dict[type, Any] = {SwitchNorm2d: nn.InstanceNorm2d, SwitchNorm3d: nn.InstanceNorm3d}


def matches_instance_norm(layer: SwitchNorm, weights: SiteWeights) -> bool:
    """Return whether a layer with these importance weights computes an InstanceNorm."""
    is_decided = weights.mean.get("in") == weights.var.get("in") == 1
    return is_decided and (can_be_reverted(layer, "in") or type(layer) in _PLAIN)


def become_instance_norm(layer: SwitchNorm, weights: SiteWeights) -> None:
    """Turn a layer into its old InstanceNorm, or into a plain one, in place."""
    if can_be_reverted(layer, "in"):
        revert_module(layer)
        return
    norm: nn.Module = _PLAIN[type(layer)](layer.num_features, layer.normalising_eps)
    register_affine(norm, layer, None, None if layer.matching is None else layer.matching.in_var_scale)
    turn_into(layer, norm)
