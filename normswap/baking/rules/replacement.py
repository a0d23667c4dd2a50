"""A layer becomes another module in place, so that aliases, lists and hooks that refer to it stay valid."""

from torch import nn

from normswap.layers.gating import Branch
from normswap.layers.switch_norm import SwitchNorm


def can_be_reverted(layer: SwitchNorm, branch: Branch) -> bool:
    """Return whether `revert_module` gives the norm that `branch` computes.

    It drops matching constants, which matter for other branches than `bn`.
    """
    replaced = vars(layer).get("replaced")
    if replaced is None or replaced.dropped or layer.vertex != branch:
        return False
    return branch == "bn" or not layer.matched


def turn_into(layer: nn.Module, other: nn.Module) -> None:
    """Give a layer the class and the attributes of another module; its hooks and its mode stay."""
    own = vars(layer)
    kept = {name: value for name, value in own.items() if name.endswith(("_hooks", "_hooks_with_kwargs"))}
    kept["training"] = layer.training
    own.clear()
    own.update({**vars(other), **kept})
    layer.__class__ = type(other)
