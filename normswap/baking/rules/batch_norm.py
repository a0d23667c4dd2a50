"""All weight on `bn`: the Batch Normalization that the layer computes, with its own running statistics.

A BN in training would go back to the statistics of the batch. A layer with `bn_statistics="running"` or `"renorm"`
therefore becomes a BN whose `train()` leaves it in evaluation.
"""

from functools import partial
from typing import Any

from torch import nn

from normswap.baking.rules.replacement import can_be_reverted, turn_into
from normswap.layers.in_place import STATISTICS, revert_module
from normswap.layers.switch_norm import SwitchNorm, SwitchNorm1d, SwitchNorm2d, SwitchNorm3d
from normswap.surgery.importance import SiteWeights

_PLAIN: dict[type, Any] = {
    SwitchNorm1d: nn.BatchNorm1d,
    SwitchNorm2d: nn.BatchNorm2d,
    SwitchNorm3d: nn.BatchNorm3d,
}


def matches_batch_norm(layer: SwitchNorm, weights: SiteWeights) -> bool:
    """Return whether a layer with these importance weights computes a BN with running statistics."""
    is_decided = weights.mean.get("bn") == weights.var.get("bn") == 1
    return is_decided and layer.running_mean is not None and (can_be_reverted(layer, "bn") or type(layer) in _PLAIN)


def become_batch_norm(layer: SwitchNorm, weights: SiteWeights) -> None:
    """Turn a layer into its old BN, or into a plain one, in place."""
    statistics = layer.bn_statistics
    if can_be_reverted(layer, "bn"):
        revert_module(layer)
    else:
        norm = _PLAIN[type(layer)](layer.num_features, layer.normalising_eps, layer.momentum, device="meta")
        for name in ("weight", "bias"):
            norm.register_parameter(name, getattr(layer, name))
        for name in STATISTICS:
            norm.register_buffer(name, getattr(layer, name))
        norm.affine = layer.weight is not None
        turn_into(layer, norm)
    if statistics != "batch":
        keep_in_evaluation(layer)


def keep_in_evaluation(norm: nn.Module) -> None:
    """Let `train()` leave a norm in evaluation; its class stays the plain one."""
    norm.training = False
    vars(norm)["train"] = partial(_stay_in_evaluation, norm)


def _stay_in_evaluation(norm: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces `train` of a norm."""
    return nn.Module.train(norm, mode=False)
