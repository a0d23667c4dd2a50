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

Matched branches (constants d, r and s of `matching`) mix mu_ln + d sqrt(var_ln + eps), (var_ln + eps) r and
(var_in + eps) s. In dx, w'_in q_in and w'_ln q_ln are then replaced by

    w'_in s q_in    and    w'_ln mean_c(r q) + w_ln mean_c(d p) / sqrt(var_ln + eps).
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
from normswap.layers.matching import Matching

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
        matching: constants (C,) of matched branches.
    """

    moments: Moments
    constants: Moments | None
    weight: Tensor | None
    bias: Tensor | None
    means: ImportanceWeights
    variances: ImportanceWeights
    mixing: Mixing
    uses_updated_stats: bool = False
    matching: Matching | None = None

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
        moments,
        inputs.constants,
        weight,
        bias,
        *branch_weights,
        inputs.mixing,
        inputs.running_stats_update is not None,
        inputs.matching,
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
        scale = _rsqrt(tables.mixed.var)
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
        return _broadcast_tensor(mixed.mean, shape, like), _broadcast_tensor(_rsqrt(mixed.var), shape, like)


def backward_terms(site: Site, dy_sum: Tensor, dy_xhat_sum: Tensor, positions: int) -> InputGradientTerms:
    """Return the terms of the gradients from the sums over positions of dy and of dy xhat, (N, C) each."""
    like, shape = site.moments.mean, site.moments.mean.shape
    branches = site.mixing.branches
    with _ignore_float_errors():
        tables = _mix_moments(site, branches)
        rstd = _rsqrt(tables.mixed.var)
        scale = rstd if site.weight is None else rstd * _as_array(site.weight)
        sums = _as_array(dy_sum), _as_array(dy_xhat_sum)
        p = _branch_averages(scale * sums[0] * (-1 / positions), site.mixing)
        q = _branch_averages(scale * rstd * sums[1] * (-1 / positions), site.mixing)
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


class _Constants(NamedTuple):
    """The constants (C,) of matched branches, or None."""

    ln_mean_shift: Array | None
    ln_var_scale: Array | None
    in_var_scale: Array | None


class _BranchMoments(NamedTuple):
    """Moments of the branches, (N, C), (N, 1) or for groups (N, C), and (1, C).

    Attributes:
        in_, ln, bn: pooled from x, or constants.
        used_in, used_ln, used_bn: of matched branches, with eps in every variance; else the same.
        mixed: the mixed mean, and the mixed variance plus eps; they broadcast to (N, C).
        matching: constants, if the branches are matched.
    """

    in_: _ArrayMoments
    ln: _ArrayMoments | None
    bn: _ArrayMoments | None
    used_in: _ArrayMoments
    used_ln: _ArrayMoments | None
    used_bn: _ArrayMoments | None
    mixed: _ArrayMoments
    matching: _Constants | None


class _BranchTerms(NamedTuple):
    """p or q of the mixed branches: (N, C), (N, 1) or for groups (N, C), and (1, C)."""

    in_: Array
    ln: Array | None
    bn: Array | None


def _mix_moments(site: Site, needed: Sequence[Branch]) -> _BranchMoments:
    """Pool the moments of the branches that have a weight above 0 or are `needed`, and mix them."""
    means, variances = site.means, site.variances
    in_ = _ArrayMoments(*map(_as_array, site.moments))
    ln = _pool_channels(in_, site.mixing.num_groups) if means.ln or variances.ln or "ln" in needed else None
    bn = None if site.constants is None else _ArrayMoments(*map(_as_array, site.constants))
    if bn is None and (means.bn or variances.bn or "bn" in needed):
        bn = _pool(in_, 0)
    used, matching = (in_, ln, bn), None
    if site.matching is not None:
        matching = _Constants(*(None if each is None else _as_array(each) for each in site.matching))
        used = _match(in_, ln, bn, matching, site.mixing.eps)
    mean = _mix(means, *(each and each.mean for each in used))
    var: Array = _mix(variances, *(each and each.var for each in used))
    var = var + site.mixing.eps if matching is None else var
    return _BranchMoments(in_, ln, bn, *used, _ArrayMoments(mean, var), matching)


def _match(
    in_: _ArrayMoments, ln: _ArrayMoments | None, bn: _ArrayMoments | None, matching: _Constants, eps: float
) -> tuple[_ArrayMoments, _ArrayMoments | None, _ArrayMoments | None]:
    """Return the moments of matched branches, with eps in every variance."""
    shift, ln_scale, in_scale = matching
    in_ = _ArrayMoments(in_.mean, in_.var + eps if in_scale is None else (in_.var + eps) * in_scale)
    if ln is not None:
        var = ln.var + eps
        # A shift of 0 ignores an infinite deviation.
        mean = ln.mean if shift is None else ln.mean + _keep_zeros(shift, shift * var**0.5)
        ln = _ArrayMoments(mean, var if ln_scale is None else var * ln_scale)
    return in_, ln, bn and _ArrayMoments(bn.mean, bn.var + eps)


def _keep_zeros(factor: Array, products: Array) -> Array:
    """Return products (or quotients), and 0 where their factor is 0, also if the other one is infinite."""
    if isinstance(products, Tensor):
        return torch.where(factor != 0, products, 0.0)
    return np.where(factor != 0, products, 0.0)


def _pool_channels(in_: _ArrayMoments, num_groups: int) -> _ArrayMoments:
    """Return the moments of samples over their channels (N, 1), or over groups of them (N, C)."""
    if num_groups == 1:
        return _pool(in_, 1)
    by_group = _ArrayMoments(*(moment.reshape(len(moment) * num_groups, -1) for moment in in_))
    pooled = _pool(by_group, 1)
    return _ArrayMoments(*(_repeat(moment, in_.mean.shape) for moment in pooled))


def _average_channels(terms: Array, num_groups: int) -> Array:
    """Return the means over channels (N, 1), or over groups of them (N, C)."""
    if num_groups == 1:
        return terms.sum(1, keepdims=True) * (1 / terms.shape[1])
    by_group = terms.reshape(len(terms) * num_groups, -1)
    return _repeat(by_group.sum(1, keepdims=True) * (1 / by_group.shape[1]), terms.shape)


def _repeat(by_group: Array, shape: tuple[int, int]) -> Array:
    """Return values of groups (N G, 1) as a table (N, C)."""
    size = shape[0] * shape[1] // len(by_group)
    expanded = by_group.expand(-1, size) if isinstance(by_group, Tensor) else np.repeat(by_group, size, axis=1)
    return expanded.reshape(shape)


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


def _branch_averages(terms: Array, mixing: Mixing) -> _BranchTerms:
    """Return p or q (N, C), and its means over the values that the other branches pool."""
    return _BranchTerms(
        terms,
        _average_channels(terms, mixing.num_groups) if "ln" in mixing.branches else None,
        terms.sum(0, keepdims=True) * (1 / len(terms)) if "bn" in mixing.branches else None,
    )


def _slope_and_shift(p: _BranchTerms, q: _BranchTerms, tables: _BranchMoments, site: Site) -> tuple[Array, Array]:
    """Return slope and shift of dx, which broadcast to (N, C)."""
    bn = tables.bn
    if site.uses_updated_stats:
        bn = _pool(tables.in_, 0)
    elif site.constants is not None:  # constants do not depend on x
        p, q = p._replace(bn=None), q._replace(bn=None)
    variances, shift = site.variances, _mix(site.means, *p)
    if tables.matching is not None:
        q, variances = _matched_slopes(p, q, tables, site)
    slope = _mix(variances, *q)
    for branch_weight, gradient_term, branch in ((variances.ln, q.ln, tables.ln), (variances.bn, q.bn, bn)):
        if branch_weight != 0 and gradient_term is not None and branch is not None:
            term = (tables.in_.mean - branch.mean) * (branch_weight * gradient_term)
            shift = term if shift is None else shift + term
    zero = 0.0 * p.in_[:1, :1]
    return zero if slope is None else slope, zero if shift is None else shift


def _matched_slopes(
    p: _BranchTerms, q: _BranchTerms, tables: _BranchMoments, site: Site
) -> tuple[_BranchTerms, ImportanceWeights]:
    """Return q and the weights of variances so that their products are the terms of matched branches in dx."""
    shift, ln_scale, in_scale = tables.matching or _Constants(None, None, None)
    means, variances, num_groups, q_in = site.means, site.variances, site.mixing.num_groups, q.in_
    if in_scale is not None:
        q = q._replace(in_=q_in * in_scale)
    if shift is None or ln_scale is None or tables.ln is None:
        return q, variances
    slope = None
    if variances.ln != 0:
        slope = variances.ln * _average_channels(q_in * ln_scale, num_groups)
    if means.ln != 0:
        by_mean = means.ln * _average_channels(p.in_ * shift, num_groups)
        by_mean = _keep_zeros(by_mean, by_mean / (tables.ln.var + site.mixing.eps) ** 0.5)
        slope = by_mean if slope is None else slope + by_mean
    return q._replace(ln=slope), variances._replace(ln=0.0 if slope is None else 1.0)


def _mean_weights_gradient(p: _BranchTerms, tables: _BranchMoments, positions: int) -> ImportanceWeights:
    """Return the gradient of the weights of the means, relative to that of `in`."""
    ln, bn = (
        0.0 if branch is None else -positions * _dot(p.in_, tables.in_.mean - branch.mean)
        for branch in (tables.used_ln, tables.used_bn)
    )
    return ImportanceWeights(0.0, ln, bn)


def _var_weights_gradient(q: _BranchTerms, tables: _BranchMoments, positions: int) -> ImportanceWeights:
    """Return the gradient of the weights of the variances."""
    if tables.matching is not None:
        used = (tables.used_in, tables.used_ln, tables.used_bn)
        return ImportanceWeights(
            *(0.0 if pair is None else positions / 2 * _dot(q.in_, _expand(pair.var, q.in_)) for pair in used)
        )
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


def _expand(statistic: Array, like: Array) -> Array:
    return statistic.expand_as(like) if isinstance(statistic, Tensor) else np.broadcast_to(statistic, like.shape)


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
