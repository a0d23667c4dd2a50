"""Channels removed from SN layers, for pruning libraries that call a registered object for each class of layer.

The branches `in` and `bn` compute each channel alone, so a kept channel keeps its tensors. The branch `ln` pools over
channels, so the moments that it pools change with the channels that it pools over. Its constants d and r are running
statistics in units of the pooled ones (`matching.py`): rm = gm + d sqrt(gv + eps) and rv + eps = r (gv + eps). The
pooled moments of the kept channels are therefore, in the same units, mean(d) and mean(r) + mean((d - mean(d))^2), and
the constants that match them follow without the running statistics, which a layer may no longer have.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from normswap.errors import LayerError
from normswap.layers.matching import MATCHING_BUFFERS, match_statistics, matching_for
from normswap.layers.switch_norm import SwitchNorm

_CHANNEL_TENSORS = ("weight", "bias", "running_mean", "running_var", *MATCHING_BUFFERS)
_CHANNEL_COUNTS = ("num_features", "num_channels")  # the second is a GroupNorm's, for `revert`


def channel_pruners() -> "dict[type[nn.Module], ChannelPruner]":
    """Return an object for each SwitchNorm class that removes channels, for Torch-Pruning's `customized_pruners`.

    Kept channels keep their weight, bias, running statistics and `in_var_scale`, and gates do not change. The constants
    of a matched `ln` branch are computed again for the channels that it still pools over: a sample with the running
    statistics keeps its output at any mix of `ln` and `bn`. `num_groups` stays, so each group must lose the same number
    of channels; Torch-Pruning's pruners do so.

    Returns:
        For each class an object with the methods of `torch_pruning.BasePruningFunc`. Its `prune_out_channels(layer,
        idxs)` removes channels from a layer in place, and raises a LayerError, before it changes the layer, if a
        channel does not exist, if none would be left, or if the groups would have different sizes.

    Examples:
        >>> import normswap
        >>> layer = normswap.SwitchNorm2d(6)
        >>> normswap.channel_pruners()[type(layer)].prune_out_channels(layer, [0, 4]).weight.shape
        torch.Size([4])
    """
    return dict.fromkeys(_with_subclasses(SwitchNorm), ChannelPruner())


def _with_subclasses(cls: type[SwitchNorm]) -> list[type[SwitchNorm]]:
    """Return a class and all that derive from it, also those of users: Torch-Pruning looks up the exact class."""
    return [cls, *(found for each in cls.__subclasses__() for found in _with_subclasses(each))]


class ChannelPruner:
    """Removes channels from SN layers; has the methods that Torch-Pruning calls, without importing it."""

    # Torch-Pruning sets the dimension of the channels here. A layer has one-dimensional tensors.
    pruning_dim: int = 1

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Remove the channels `idxs` from a layer in place, and return the layer."""
        layer = cast(SwitchNorm, layer)
        keep = _kept_channels(layer, idxs)
        with torch.no_grad():
            for name in _CHANNEL_TENSORS:
                _keep_channels(layer, name, keep)
            _match_kept_channels(layer)
        for name in _CHANNEL_COUNTS:
            if name in layer.__dict__:
                layer.__dict__[name] = len(keep)
        return layer

    # The same function: a channel of the output is a channel of the input.
    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int:
        """Return the number of channels of a layer."""
        return cast(SwitchNorm, layer).num_features

    get_in_channels = get_out_channels

    def get_out_channel_groups(self, layer: nn.Module) -> int:
        """Return the number of groups of channels, each of which must lose the same number."""
        return cast(SwitchNorm, layer).num_groups

    get_in_channel_groups = get_out_channel_groups


def _kept_channels(layer: SwitchNorm, removed: Sequence[int]) -> list[int]:
    channels, groups = layer.num_features, layer.num_groups
    unknown = sorted(set(removed) - set(range(channels)))
    if unknown:
        raise LayerError(f"expected channels from 0 to {channels - 1} to remove, got {unknown}")
    keep = sorted(set(range(channels)) - set(removed))
    if not keep:
        raise LayerError(f"expected fewer than {channels} channels to remove, got all: a layer needs one channel")
    sizes = [sum(channel * groups // channels == group for channel in keep) for group in range(groups)]
    if len(set(sizes)) > 1:
        raise LayerError(
            f"num_groups={groups}: expected the same number of channels to remove from each group, but the groups "
            f"would have {sizes} channels; remove as many from each, as Torch-Pruning's pruners do"
        )
    return keep


def _keep_channels(layer: SwitchNorm, name: str, keep: list[int]) -> None:
    for registry in (layer._parameters, layer._buffers):
        tensor = registry.get(name)
        if tensor is None:
            continue
        kept = tensor.detach()[keep]
        if isinstance(tensor, nn.Parameter):
            kept = nn.Parameter(kept, requires_grad=tensor.requires_grad)
            kept.grad = None if tensor.grad is None else tensor.grad[keep]
        registry[name] = kept  # type: ignore[assignment]


def _match_kept_channels(layer: SwitchNorm) -> None:
    """Match the `ln` branch to the kept channels. Constants that are the identity stay so."""
    constants = matching_for(layer.matching, layer.branches, torch.float64)
    if constants is None or constants.ln_mean_shift is None or constants.ln_var_scale is None:
        return
    shift, scale, _ = match_statistics(constants.ln_mean_shift, constants.ln_var_scale, 0.0, layer.num_groups)
    for name, value in (("ln_mean_shift", shift), ("ln_var_scale", scale)):
        cast(Tensor, layer._buffers[name]).copy_(cast(Tensor, value))
