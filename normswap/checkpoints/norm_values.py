"""Whether the batch norms in a state dict hold numbers that normalize: finite statistics, no negative variance.

Reads the keys alone, so that it needs no architecture, and touches no other tensor than those of the norms.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from normswap.errors import CheckpointError
from normswap.surgery.tree import join

_MEAN, _VAR, _AFFINE = "running_mean", "running_var", ("weight", "bias")
_MOST = 3


class NormGroup(NamedTuple):
    """What one batch norm has in a state dict, tensors by key: the mean first among the statistics."""

    fqn: str
    statistics: dict[str, Tensor]
    affine: dict[str, Tensor]


def check_statistics(state: Mapping[str, Tensor], *, name: str) -> None:
    """Refuse a state dict whose batch norms cannot compute anything.

    A batch norm is a `running_mean` and a `running_var` under one prefix, with `weight` and `bias` of one dimension or
    without. What has a weight of another form (a convolution that keeps statistics) is none. NaN among the weights of
    other layers is not looked for.

    Args:
        state: tensors by key, such as `model.state_dict()`; may be mapped from a file.
        name: what the state dict is called in the error.

    Raises:
        CheckpointError: shapes that differ within one norm, NaN or Inf in running statistics, a negative running
            variance; with the keys, how many they are, and what to do.
    """
    groups = list(norm_groups(state))
    shapes = [told for group in groups for told in _differing(group)]
    if shapes:
        raise CheckpointError(
            f"{name}: {_listed(shapes)} of another shape than the running_mean beside them: the file is damaged or its "
            "keys are mixed up, save the state dict again"
        )
    bad = [told for group in groups for key, tensor in group.statistics.items() if (told := _fault(key, tensor))]
    if bad:
        raise CheckpointError(
            f"{name}: {_listed(bad)} no statistics: take an earlier checkpoint, or average them anew in the original "
            "model (normswap.update_statistics) and save it again"
        )


def norm_groups(state: Mapping[str, Tensor]) -> Iterator[NormGroup]:
    """Yield the batch norms in a state dict, as `check_statistics` knows them, in the order of the state dict."""
    for key, mean in state.items():
        fqn, _, last = key.rpartition(".")
        var_key = join(fqn, _VAR)
        if last != _MEAN or var_key not in state or not (_has_values(mean) and _has_values(state[var_key])):
            continue
        affine = {full: state[full] for part in _AFFINE if (full := join(fqn, part)) in state}
        if all(tensor.dim() == 1 for tensor in affine.values()):
            yield NormGroup(fqn, {key: mean, var_key: state[var_key]}, affine)


def _has_values(tensor: Tensor) -> bool:
    return not tensor.is_meta and not tensor.is_quantized and tensor.layout is torch.strided


def _differing(group: NormGroup) -> list[str]:
    (_, mean), *others = (group.statistics | group.affine).items()
    return [f"{key} ({_size(tensor)})" for key, tensor in others if tensor.shape != mean.shape]


def _fault(key: str, tensor: Tensor) -> str:
    """What is wrong with running statistics, or nothing."""
    values = tensor if tensor.dtype.is_floating_point and tensor.element_size() > 1 else tensor.float()
    bad = ~torch.isfinite(values)
    if key.endswith(_VAR):
        bad |= values < 0
    if not bool(bad.any()):
        return ""
    worst = values[bad].flatten()[0].item()
    return f"{key} ({int(bad.sum())} of {tensor.numel()} values, such as {worst:g})"


def _listed(told: list[str]) -> str:
    more = f", +{len(told) - _MOST} more" if len(told) > _MOST else ""
    return f"{', '.join(told[:_MOST])}{more} {'is' if len(told) == 1 else 'are'}"


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"
