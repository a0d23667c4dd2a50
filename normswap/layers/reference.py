"""Switchable Normalization in plain torch: the definition, and the path that everything else is held against.

Any rank, any device, differentiable to any order. One pass over x gives the (N, C) table of moments; the rest
is algebra on that table, and y is affine in x per (n, c) (Luo et al., ICLR 2019, eq. 3 and 4).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normswap.layers.importance import Branch
from normswap.layers.moments import Moments, accumulation_dtype, instance_moments, pool_moments


def switch_norm_reference(
    x: Tensor,
    mean_weights: Tensor,
    var_weights: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    constants: Moments | None,
    *,
    branches: Sequence[Branch],
    eps: float,
    record: Callable[[Moments], Moments | None] | None = None,
) -> Tensor:
    """Normalise x (N, C, *spatial) with the given importance weights (K,), one per branch.

    Args:
        constants: moments (1, C) for the `bn` branch; None takes those of the batch.
        record: is given the moments (1, C) of the batch that the `bn` branch uses. If it returns others, their values
            are used instead, while gradients go to those of the batch.

    Returns:
        y of the shape, dtype and memory format of x.
    """
    table = instance_moments(x)
    bn = pool_moments(table, 0) if constants is None else constants
    taken = None if record is None else record(bn)
    if taken is not None:
        bn = Moments(*(with_gradient_of(moment, value) for value, moment in zip(taken, bn, strict=True)))
    moments = {"in": table, "ln": pool_moments(table, 1), "bn": bn}
    mixed_mean = _mix(mean_weights, [moments[branch].mean for branch in branches])
    mixed_var = _mix(var_weights, [moments[branch].var for branch in branches])
    finite = mixed_mean.value.isfinite() & mixed_var.value.isfinite()
    mean, var = (torch.where(finite, mixed.differentiable, mixed.value) for mixed in (mixed_mean, mixed_var))

    dtype = accumulation_dtype(x)
    spatial = (1,) * (x.dim() - 2)
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(dtype)
    y = (x.to(dtype) - mean.reshape(mean.shape + spatial)) * scale.reshape(scale.shape + spatial)
    if bias is not None:
        y = y + bias.to(dtype).reshape((1, -1) + spatial)
    return y.to(x.dtype)


def with_gradient_of(moment: Tensor, value: Tensor) -> Tensor:
    """Return `value` with the gradient of `moment`; none is passed on where that is not finite."""
    # The difference is exactly zero; that of two infinities would be NaN.
    return value + torch.where(moment.isfinite(), moment - moment.detach(), 0.0)


class _Mixed(NamedTuple):
    """A mixed statistic: its value, whose gradient reaches statistics of weight above zero only; and the same with all
    gradients, but without what is not finite.

    The first stands where a mixed statistic is inf or NaN: gradients there are so too, and times zero would be NaN. An
    infinite variance stays infinite however much of it is taken, so that its weight has no gradient there.
    """

    value: Tensor
    differentiable: Tensor


def _mix(weights: Tensor, statistics: list[Tensor]) -> _Mixed:
    """Sum weights (K,) times statistics; a weight of exactly zero silences inf and NaN instead of spreading them."""
    weights = weights.to(statistics[0].dtype)
    pairs = list(zip(weights.unbind(), statistics, strict=True))
    values = [torch.where(share != 0, share.detach() * table, 0.0) for share, table in pairs]
    finite = [share * torch.where(table.isfinite(), table, 0.0) for share, table in pairs]
    return _Mixed(sum(values[1:], start=values[0]), sum(finite[1:], start=finite[0]))
