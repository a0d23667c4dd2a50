"""Algebra on tables of moments (N, C), between the passes over an activation; importance weights are Python numbers.

Callers pass and receive tables as tensors in float32 or wider. On CPU they are converted to NumPy arrays in float64,
since an operator of NumPy takes a quarter of the time of one of torch; on other devices they stay tensors. The code is
valid for both. The C extension computes the same in one call.

Backward: with p = dmu / M and q = 2 dvar / M per (n, c), where M is the number of positions (Luo et al., ICLR 2019,
appendix),

    dx = scale dy + slope (x - mu_in) + shift,    slope = sum_k w'_k q_k,
    shift = sum_k w_k p_k + sum_k w'_k q_k (mu_in - mu_k),

where p_k and q_k are the means of p and q over the values that branch k pools, and w and w' are the importance weights
of means and variances. All terms are relative to mu_in: a mean much larger than the deviation cancels before it is
multiplied.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from normswap.layers.backends.interface import Inputs
from normswap.layers.backends.reference import Moments, accumulation_dtype
from normswap.layers.gating import Branch, ImportanceWeights, Mixing, read_branch_weights

# A NumPy array on CPU, a tensor on other devices.
Array = Any


class Site(NamedTuple):
    """Inputs of the algebra for one call of a layer.

    Attributes:
        moments: moments of x over its positions, (N, C).
        constants: moments (1, C) that the `bn` branch uses instead of those of the batch.
        weight, bias: (C,), or None.
        means, variances: importance weights.
        mixing: how the branches are mixed.
        uses_updated_stats: `constants` give the values only; the moments of the batch get the gradients.
    """

    moments: Moments
    constants: Moments | None
    weight: Tensor | None
    bias: Tensor | None
    means: ImportanceWeights
    variances: ImportanceWeights
    mixing: Mixing
    uses_updated_stats: bool = False

    @property
    def uses_batch_moments(self) -> bool:
        """Whether the `bn` branch uses the moments of the batch."""
        return self.constants is None and "bn" in self.mixing.branches


def read_site(inputs: Inputs, moments: Moments) -> Site:
    """Return the inputs of the algebra; `moments` are those of x over its positions, (N, C)."""
    dtype = accumulation_dtype(inputs.x)
    weight, bias = (
        # Copies: `fully_shard` resizes parameters, which is impossible while NumPy refers to their memory.
        None if parameter is None else parameter.detach().to(dtype, copy=True).contiguous()
        for parameter in (inputs.weight, inputs.bias)
    )
    branch_weights = (
        read_branch_weights(inputs.mean_gate, inputs.mixing),
        read_branch_weights(inputs.var_gate, inputs.mixing),
    )
    return Site(
        moments, inputs.constants, weight, bias, *branch_weights, inputs.mixing, inputs.running_stats_update is not None
    )


class InputGradientTerms(NamedTuple):
    """Scale, slope and shift of dx, (N, C) each; gradients of the importance weights, of weight and of bias (C,)."""

    scale: Tensor
    slope: Tensor
    shift: Tensor
    means: ImportanceWeights
    variances: ImportanceWeights
    weight: Tensor
    bias: Tensor


def scale_and_shift(site: Site) -> tuple[Tensor, Tensor, Moments | None]:
    """Return scale and shift (N, C) of y = scale x + shift, and the moments (1, C) of the batch if `bn` uses them."""
    like, shape = site.moments.mean, site.moments.mean.shape
    with _ignore_float_errors():
        # The running statistics need the moments of the batch even if their weight is 0.
        tables = _mix_moments(site, ("bn",) if site.uses_batch_moments else ())
        scale = _rsqrt(tables.mixed.var + site.mixing.eps)
        if site.weight is not None:
            scale = scale * _as_array(site.weight)
        shift = -scale * tables.mixed.mean
        if site.bias is not None:
            shift = shift + _as_array(site.bias)
        batch = Moments(*(_as_tensor(a, like) for a in tables.bn)) if site.uses_batch_moments and tables.bn else None
        return _broadcast_tensor(scale, shape, like), _broadcast_tensor(shift, shape, like), batch


def pool_samples(moments: Moments) -> Moments:
    """Return the moments (1, C) of a batch, pooled from those of its samples (N, C)."""
    with _ignore_float_errors():
        return Moments(*(_as_tensor(a, moments.mean) for a in _pool(_ArrayMoments(*map(_as_array, moments)), 0)))


def mean_and_rstd(site: Site) -> tuple[Tensor, Tensor]:
    """Return the mixed mean and 1 / sqrt(mixed variance + eps), each (N, C)."""
    like, shape = site.moments.mean, site.moments.mean.shape
    with _ignore_float_errors():
        mixed = _mix_moments(site, ()).mixed
        return _broadcast_tensor(mixed.mean, shape, like), _broadcast_tensor(
            _rsqrt(mixed.var + site.mixing.eps), shape, like
        )


def backward_terms(site: Site, dy_sum: Tensor, dy_xhat_sum: Tensor, positions: int) -> InputGradientTerms:
    """Return the terms of the gradients from the sums over positions of dy and of dy xhat, (N, C) each."""
    like, shape = site.moments.mean, site.moments.mean.shape
    branches = site.mixing.branches
    with _ignore_float_errors():
        tables = _mix_moments(site, branches)
        rstd = _rsqrt(tables.mixed.var + site.mixing.eps)
        scale = rstd if site.weight is None else rstd * _as_array(site.weight)
        sums = _as_array(dy_sum), _as_array(dy_xhat_sum)
        p = _branch_averages(scale * sums[0] * (-1 / positions), branches)
        q = _branch_averages(scale * rstd * sums[1] * (-1 / positions), branches)
        slope, shift = _slope_and_shift(p, q, tables, site)
        return InputGradientTerms(
            _broadcast_tensor(scale, shape, like),
            _broadcast_tensor(slope, shape, like),
            _broadcast_tensor(shift, shape, like),
            _mean_weights_gradient(p, tables, positions),
            _var_weights_gradient(q, tables, positions),
            weight=_as_tensor(sums[1].sum(0), like),
            bias=_as_tensor(sums[0].sum(0), like),
        )


def _ignore_float_errors() -> np.errstate:
    """Return a context without NumPy's warnings about infinities and NaN; torch has none either."""
    return np.errstate(all="ignore")


def _as_array(tensor: Tensor) -> Array:
    """Return a tensor in float32 or wider as an `Array`."""
    return tensor.numpy().astype(np.float64, copy=False) if tensor.device.type == "cpu" else tensor


def _as_tensor(array: Array, like: Tensor) -> Tensor:
    """Return an `Array` as a tensor, in float64 if `like` is, else in float32."""
    if isinstance(array, Tensor):
        return array
    return torch.from_numpy(array.astype(np.float64 if like.dtype == torch.float64 else np.float32, copy=False))


def _broadcast_tensor(array: Array, shape: torch.Size, like: Tensor) -> Tensor:
    """Return a table broadcast to (N, C) as a contiguous tensor."""
    if array.shape == shape:
        return _as_tensor(array, like)
    return _as_tensor(array, like).expand(shape).contiguous()


def _rsqrt(array: Array) -> Array:
    """Return 1 / sqrt of a table."""
    return array.rsqrt() if isinstance(array, Tensor) else 1 / np.sqrt(array)


class _ArrayMoments(NamedTuple):
    """Mean and biased variance."""

    mean: Array
    var: Array


class _BranchMoments(NamedTuple):
    """Moments of the branches, (N, C), (N, 1) and (1, C), and the mixed moments, which broadcast to (N, C)."""

    in_: _ArrayMoments
    ln: _ArrayMoments | None
    bn: _ArrayMoments | None
    mixed: _ArrayMoments


class _BranchTerms(NamedTuple):
    """p or q of the mixed branches: (N, C), (N, 1) and (1, C)."""

    in_: Array
    ln: Array | None
    bn: Array | None


def _mix_moments(site: Site, needed: Sequence[Branch]) -> _BranchMoments:
    """Pool the moments of the branches that have a weight above 0 or are `needed`, and mix them."""
    means, variances = site.means, site.variances
    in_ = _ArrayMoments(*map(_as_array, site.moments))
    ln = _pool(in_, 1) if means.ln or variances.ln or "ln" in needed else None
    bn = None if site.constants is None else _ArrayMoments(*map(_as_array, site.constants))
    if bn is None and (means.bn or variances.bn or "bn" in needed):
        bn = _pool(in_, 0)
    mean = _mix(means, in_.mean, ln and ln.mean, bn and bn.mean)
    var = _mix(variances, in_.var, ln and ln.var, bn and bn.var)
    return _BranchMoments(in_, ln, bn, _ArrayMoments(mean, var))


def _pool(in_: _ArrayMoments, axis: int) -> _ArrayMoments:
    """Return mean of variances + variance of means, relative to the first entry: a common mean costs no digits."""
    means, variances = in_
    count = means.shape[axis]
    if count == 1:
        return in_
    first = means[:1] if axis == 0 else means[:, :1]
    deviation = means - first
    centre = deviation.sum(axis, keepdims=True)
    centre *= 1 / count
    deviation -= centre
    deviation *= deviation
    deviation += variances
    var = deviation.sum(axis, keepdims=True)
    var *= 1 / count
    return _ArrayMoments(first + centre, var)


def _branch_averages(terms: Array, branches: Sequence[Branch]) -> _BranchTerms:
    """Return p or q (N, C), and its means over the values that the other branches pool."""
    samples, channels = terms.shape
    return _BranchTerms(
        terms,
        terms.sum(1, keepdims=True) * (1 / channels) if "ln" in branches else None,
        terms.sum(0, keepdims=True) * (1 / samples) if "bn" in branches else None,
    )


def _slope_and_shift(p: _BranchTerms, q: _BranchTerms, tables: _BranchMoments, site: Site) -> tuple[Array, Array]:
    """Return slope and shift of dx, which broadcast to (N, C)."""
    bn = tables.bn
    if site.uses_updated_stats:
        bn = _pool(tables.in_, 0)
    elif site.constants is not None:  # constants do not depend on x
        p, q = p._replace(bn=None), q._replace(bn=None)
    variances = site.variances
    slope, shift = _mix(variances, *q), _mix(site.means, *p)
    for branch_weight, gradient_term, branch in ((variances.ln, q.ln, tables.ln), (variances.bn, q.bn, bn)):
        if branch_weight != 0 and gradient_term is not None and branch is not None:
            term = (tables.in_.mean - branch.mean) * (branch_weight * gradient_term)
            shift = term if shift is None else shift + term
    zero = 0.0 * p.in_[:1, :1]
    return zero if slope is None else slope, zero if shift is None else shift


def _mean_weights_gradient(p: _BranchTerms, tables: _BranchMoments, positions: int) -> ImportanceWeights:
    """Return the gradient of the weights of the means, relative to that of `in`."""
    ln, bn = (
        0.0 if branch is None else -positions * _dot(p.in_, tables.in_.mean - branch.mean)
        for branch in (tables.ln, tables.bn)
    )
    return ImportanceWeights(0.0, ln, bn)


def _var_weights_gradient(q: _BranchTerms, tables: _BranchMoments, positions: int) -> ImportanceWeights:
    """Return the gradient of the weights of the variances."""
    size = q.in_.shape[0] * q.in_.shape[1] * positions / 2
    branches = ((q.in_, tables.in_), (q.ln, tables.ln), (q.bn, tables.bn))
    return ImportanceWeights(
        *(
            0.0
            if gradient_term is None or pair is None
            else size / len(gradient_term.reshape(-1)) * _dot(gradient_term, pair.var)
            for gradient_term, pair in branches
        )
    )


def _dot(gradient_term: Array, statistic: Array) -> float:
    """Return the sum of products; a gradient of 0 times an infinite statistic is 0."""
    a, b = gradient_term.reshape(-1), statistic.reshape(-1)
    total = float(a @ b)
    return total if math.isfinite(total) else float(a[a != 0] @ b[a != 0])


def _mix(branch_weights: ImportanceWeights, in_: Array | None, ln: Array | None, bn: Array | None) -> Array | None:
    """Return the sum of weights times tables; tables of weight 0 are left out, so that 0 times infinity is 0."""
    total = None
    for branch_weight, table in ((branch_weights.in_, in_), (branch_weights.ln, ln), (branch_weights.bn, bn)):
        if branch_weight != 0 and table is not None:
            term = table if branch_weight == 1 else table * branch_weight
            total = term if total is None else total + term
    return total
