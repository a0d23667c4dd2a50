"""The plain formula of Switchable Normalization, which defines the result of every backend, and its moments.

The moments (N, C) of every sample and channel take one pass over the input. Those of LN and BN are pooled from them, as
mean of variances + variance of means: all terms are non-negative. E[x^2] - E[x]^2 would cancel, and can give NaN, if
the mean is much larger than the deviation. All variances are biased, as in the paper.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from normswap.layers.gating import BRANCHES, Branch, Mixing, read_branch_weights
from normswap.layers.matching import Matching

# --- moments


class Moments(NamedTuple):
    """Mean and biased variance, of one shape, in float32 or wider."""

    mean: Tensor
    var: Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which moments of `x` are accumulated: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def instance_moments(x: Tensor) -> Moments:
    """Return the moments of x (N, C, *spatial) over its spatial positions, each of shape (N, C)."""
    x = x.to(accumulation_dtype(x))
    if x.dim() == 2:
        return Moments(x, torch.zeros_like(x))
    dims = list(range(2, x.dim()))
    if torch.compiler.is_exporting():
        return Moments(x.mean(dims), x.var(dims, correction=0))  # `var_mean` is not in Core ATen: ExecuTorch refuses it
    var, mean = torch.var_mean(x, dim=dims, correction=0)
    return Moments(mean, var)


def pool_moments(moments: Moments, dim: int) -> Moments:
    """Return the moments of the union along `dim` of an (N, C) table, with that axis kept at size 1."""
    mean = moments.mean.mean(dim, keepdim=True)
    var = moments.var.mean(dim, keepdim=True) + moments.mean.var(dim, correction=0, keepdim=True)
    return Moments(mean, var)


def pool_channels(moments: Moments, num_groups: int) -> Moments:
    """Return the moments of each sample over its channels, (N, 1), or over groups of them, (N, C)."""
    if num_groups == 1:
        return pool_moments(moments, 1)
    mean, var = (moment.reshape(moment.shape[0], num_groups, -1) for moment in moments)
    pooled = pool_moments(Moments(mean, var), 2)
    return Moments(*(moment.expand_as(mean).reshape_as(moments.mean) for moment in pooled))


# Number of values converted to float64 at a time: on CPU few enough for its caches, elsewhere enough for a device.
_CHUNK_ON_CPU, _CHUNK = 1 << 18, 1 << 24


class MomentAccumulator:
    """Mean and biased variance per channel of all values seen so far, in float64.

    Takes two passes over each chunk and merges the results as Chan, Golub and LeVeque (1983). Compared with one pass in
    float32 this gives six more digits, in a third of the time of `torch.var_mean`.

    Attributes:
        count: values per channel.
        mean: (C,).
        squared_deviations: (C,), sum of squared deviations from the mean.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.squared_deviations = torch.zeros_like(self.mean)

    @property
    def var(self) -> Tensor:
        """The biased variance (C,); NaN without values."""
        return (
            self.squared_deviations / self.count
            if self.count
            else torch.full_like(self.squared_deviations, float("nan"))
        )

    def add(self, x: Tensor) -> None:
        """Add the values of x (N, C, *spatial)."""
        x = x.detach().cpu() if x.device.type == "mps" else x.detach()  # MPS has no float64
        dims = [0, *range(2, x.dim())]
        size = _CHUNK_ON_CPU if x.device.type == "cpu" else _CHUNK
        for chunk in torch.split(x, max(1, size // x[0].numel())) if x.numel() else ():
            wide = chunk.to(torch.float64)
            mean = wide.mean(dims, keepdim=True)
            squared_deviations = (wide - mean).square_().sum(dims)
            self.merge(chunk.numel() // chunk.shape[1], mean.flatten(), squared_deviations)

    def merge(self, count: int, mean: Tensor, squared_deviations: Tensor) -> None:
        """Add `count` values per channel, given their mean (C,) and their sum of squared deviations (C,)."""
        if not count:
            return
        total = self.count + count
        own, own_squared_deviations = self.mean.to(mean.device), self.squared_deviations.to(mean.device)
        shift = mean - own
        self.mean = own + shift * (count / total)
        self.squared_deviations = (
            own_squared_deviations + squared_deviations + shift.square() * (self.count * count / total)
        )
        self.count = total


# --- layers whose weights are exactly those of BN


def is_batch_norm(gates: tuple[Tensor, Tensor], mixing: Mixing) -> bool:
    """Return whether both gate parameters (K,) put all weight on `bn`; False on devices, where reading them waits."""
    if gates[0].device.type != "cpu":
        return False
    return all(read_branch_weights(gate, mixing) == (0.0, 0.0, 1.0) for gate in gates)


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, constants: Moments, eps: float) -> Tensor:
    """Normalize x (N, C, *spatial) by constant moments (1, C), as BatchNorm in evaluation."""
    mean, var = (moment.squeeze(0) for moment in constants)
    weight, bias = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
    return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]


# --- the plain formula


def switch_norm_reference(
    x: Tensor,
    mean_weights: Tensor,
    var_weights: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    constants: Moments | None,
    *,
    mixing: Mixing,
    matching: Matching | None = None,
    on_batch_moments: Callable[[Moments], Moments | None] | None = None,
    fixed: Moments | None = None,
) -> Tensor:
    """Normalize x (N, C, *spatial) with the given importance weights (K,), one per branch.

    Args:
        mixing: the branches, eps and the number of groups of `ln`.
        matching: constants of matched branches, as in `interface.Inputs`.
        constants: moments (1, C) for the `bn` branch; None: those of the batch.
        on_batch_moments: gets the moments (1, C) of the batch. If it returns moments, the `bn` branch uses their
            values, with the gradients of those of the batch.
        fixed: moments (N, C) or (1, C) that `in` and `ln` use as constants instead of those of x.

    Returns:
        y of the shape, dtype and memory format of x.
    """
    table = instance_moments(x) if fixed is None else fixed
    if constants is not None:
        bn = constants
    else:
        bn = pool_moments(instance_moments(x) if fixed is not None and "bn" in mixing.branches else table, 0)
    replacement = None if on_batch_moments is None else on_batch_moments(bn)
    if replacement is not None:
        bn = Moments(*(replace_value(moment, value) for value, moment in zip(replacement, bn, strict=True)))
    moments: dict[Branch, Moments] = {"in": table, "ln": pool_channels(table, mixing.num_groups), "bn": bn}
    eps = mixing.eps
    if matching is not None:
        moments, eps = _match(moments, matching, eps), 0.0
    mixed_mean = _mix(mean_weights, [moments[branch].mean for branch in mixing.branches])
    mixed_var = _mix(var_weights, [moments[branch].var for branch in mixing.branches])
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


def _match(moments: dict[Branch, Moments], matching: Matching, eps: float) -> dict[Branch, Moments]:
    """Return the moments of matched branches, with eps in every variance: the scaled sums lose no digits."""
    in_, ln, bn = (Moments(moments[branch].mean, moments[branch].var + eps) for branch in BRANCHES)
    shift, ln_scale, in_scale = matching
    if in_scale is not None:
        in_ = in_._replace(var=in_.var * in_scale)
    if shift is not None and ln_scale is not None:
        # A shift of 0 ignores an infinite deviation, as an unmatched branch does.
        shifted = ln.mean + torch.where(shift != 0, shift * ln.var.sqrt(), 0.0)
        ln = Moments(shifted, ln.var * ln_scale)
    return {"in": in_, "ln": ln, "bn": bn}


def replace_value(moment: Tensor, value: Tensor) -> Tensor:
    """Return `value` with the gradient of `moment`, or without gradient if `moment` is not finite."""
    # The difference is 0 and has the gradient; the difference of two infinities would be NaN.
    return value + torch.where(moment.isfinite(), moment - moment.detach(), 0.0)


class _Mixed(NamedTuple):
    """A mixed statistic in two versions.

    Attributes:
        value: its gradient reaches only statistics with a weight above 0. Used if the mixed statistic is inf or NaN:
            other gradients would be inf or NaN too, and 0 times them would be NaN.
        differentiable: has all gradients, and leaves out terms that are not finite.
    """

    value: Tensor
    differentiable: Tensor


def _mix(weights: Tensor, statistics: list[Tensor]) -> _Mixed:
    """Return the sum of weights (K,) times statistics. A weight of exactly 0 ignores inf and NaN."""
    weights = weights.to(statistics[0].dtype)
    pairs = list(zip(weights.unbind(), statistics, strict=True))
    values = [torch.where(branch_weight != 0, branch_weight.detach() * table, 0.0) for branch_weight, table in pairs]
    finite = [branch_weight * torch.where(table.isfinite(), table, 0.0) for branch_weight, table in pairs]
    return _Mixed(sum(values[1:], start=values[0]), sum(finite[1:], start=finite[0]))
