"""Every other layer whose output for a sample depends on that sample alone: a compact layer."""

from normswap.baking.compact_norm import CompactNorm
from normswap.baking.rules.replacement import turn_into
from normswap.layers.switch_norm import SwitchNorm
from normswap.surgery.importance import SiteWeights


def matches_compact(layer: SwitchNorm, weights: SiteWeights) -> bool:
    """Return whether `bn` has no weight, or has running statistics."""
    return layer.running_mean is not None or not (weights.mean.get("bn") or weights.var.get("bn"))


def become_compact(layer: SwitchNorm, weights: SiteWeights) -> None:
    """Turn a layer into a compact one with the same tensors, in place."""
    turn_into(layer, CompactNorm(layer, weights))
