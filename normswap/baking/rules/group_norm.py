"""All weight on `ln`: a GroupNorm. Matching constants are folded into its weight and bias, which is exact.

With the shift d and the scale r of a matched layer

    (x - mean - d sqrt(var + eps)) / sqrt((var + eps) r) w + b  =  (x - mean) / sqrt(var + eps) w' + b',
    w' = w / sqrt(r),  b' = b - w d / sqrt(r).
"""

import torch
from torch import Tensor, nn

from normswap.baking.rules.replacement import can_be_reverted, turn_into
from normswap.layers.in_place import revert_module
from normswap.layers.switch_norm import SwitchNorm, SwitchNormAct
from normswap.surgery.importance import SiteWeights


def matches_group_norm(layer: SwitchNorm, weights: SiteWeights) -> bool:
    """Return whether a layer with these importance weights computes a GroupNorm."""
    is_decided = weights.mean.get("ln") == weights.var.get("ln") == 1
    return is_decided and (can_be_reverted(layer, "ln") or not isinstance(layer, SwitchNormAct))


def become_group_norm(layer: SwitchNorm, weights: SiteWeights) -> None:
    """Turn a layer into its old GroupNorm, or into a plain one, in place."""
    if can_be_reverted(layer, "ln"):
        revert_module(layer)
        return
    norm = nn.GroupNorm(layer.num_groups, layer.num_features, layer.normalising_eps, affine=False)
    matching = layer.matching
    shift, scale = (None, None) if matching is None else (matching.ln_mean_shift, matching.ln_var_scale)
    register_affine(norm, layer, shift, scale)
    turn_into(layer, norm)


def register_affine(norm: nn.Module, layer: SwitchNorm, shift: Tensor | None, scale: Tensor | None) -> None:
    """Give a norm the weight and bias of a layer, with a shift d (C,) and a scale r (C,) of its moments folded in."""
    weight, bias = layer.weight, layer.bias
    if shift is not None or scale is not None:
        like = next(each for each in (weight, shift, scale) if each is not None)
        trains = any(each is not None and each.requires_grad for each in (weight, bias))
        ones = torch.ones(layer.num_features, dtype=torch.float64, device=like.device)
        factor = (ones if weight is None else weight.detach().double()) * (
            ones if scale is None else scale.double().rsqrt()
        )
        offset = ones * 0 if bias is None else bias.detach().double()
        offset = offset if shift is None else offset - factor * shift.double()
        weight, bias = (nn.Parameter(each.to(like.dtype), requires_grad=trains) for each in (factor, offset))
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and not isinstance(value, nn.Parameter):  # a buffer of a frozen layer
            value = nn.Parameter(value, requires_grad=False)
        norm.register_parameter(name, value)
    vars(norm)["affine"] = weight is not None
