"""Algebra on (N, C) tables of moments, between the passes of a fused backend; shares are Python numbers.

Tables go in and out as tensors in float32 or wider. Between, they are numpy arrays in float64 on CPU, where an operator
of numpy costs a quarter of one of torch and a small layer is made of little else, and tensors on every other device:
what is written here holds for both. `compiled.py` does the same in one call.

Backward: with p = dmu / M and q = 2 dvar / M per (n, c), M being the number of positions (Luo et al., ICLR 2019,
appendix),

    dx = scale dy + slope (x - mu_in) + shift,    slope = sum_k w'_k q_k,
    shift = sum_k w_k p_k + sum_k w'_k q_k (mu_in - mu_k),

where p_k and q_k are the means of p and q over what branch k pools. Everything is written around mu_in, so that a mean
that is large beside the deviation cancels before it is multiplied.
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

# A numpy array, or a tensor where the device is not the CPU.
Array = Any


class Site(NamedTuple):
    """What the algebra of one call of a site reads.

    Attributes:
        moments: of x over its positions, (N, C).
        constants: moments (1, C) that the `bn` branch takes instead of those of the batch.
        weight, bias: (C,), or None.
        means, variances: the shares of the branches in each.
        renewed: whether the constants are values only, and what is pulled goes to the moments of the batch.
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
        """Whether the `bn` branch takes the moments of the batch."""
        return self.constants is None and "bn" in self.mixing.branches


def read_site(inputs: Inputs, moments: Moments) -> Site:
    """Return what the algebra reads of a call, whose x has these moments over its positions, (N, C)."""
    dtype = accumulation_dtype(inputs.x)
    weight, bias = (
        # Copies: numpy keeps what it reads from being resized, which `fully_shard` does to parameters.
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
    """What backward finds: scale, slope and shift of dx (N, C), and gradients of shares, weight (C,) and bias (C,)."""

    scale: Tensor
    slope: Tensor
    shift: Tensor
    means: ImportanceWeights
    variances: ImportanceWeights
    weight: Tensor
    bias: Tensor


def scale_and_shift(site: Site) -> tuple[Tensor, Tensor, Moments | None]:
    """Return y = scale x + shift per (n, c), each (N, C), and the moments (1, C) that `bn` took from the batch."""
    like, shape = site.moments.mean, site.moments.mean.shape
    with _ignore_float_errors():
        # The moments of the batch are recorded whatever share they have.
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
    """Return the moments (1, C) of a batch from those of its samples (N, C)."""
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
    """Return what follows from the sums over positions of dy and of dy xhat, each (N, C)."""
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
    """Infinities and NaN pass without a word, as they do in torch."""
    return np.errstate(all="ignore")


def _as_array(tensor: Tensor) -> Array:
    """Return a tensor in float32 or wider as a table."""
    return tensor.numpy().astype(np.float64, copy=False) if tensor.device.type == "cpu" else tensor


def _as_tensor(array: Array, like: Tensor) -> Tensor:
    """Return a table as a tensor, in the dtype in which moments of `like` are accumulated."""
    if isinstance(array, Tensor):
        return array
    return torch.from_numpy(array.astype(np.float64 if like.dtype == torch.float64 else np.float32, copy=False))


def _broadcast_tensor(array: Array, shape: torch.Size, like: Tensor) -> Tensor:
    """Return a table broadcast to (N, C) as a tensor with memory of its own where it was smaller."""
    if array.shape == shape:
        return _as_tensor(array, like)
    return _as_tensor(array, like).expand(shape).contiguous()


def _rsqrt(array: Array) -> Array:
    """Return 1 / sqrt of a table."""
    return array.rsqrt() if isinstance(array, Tensor) else 1 / np.sqrt(array)


class _ArrayMoments(NamedTuple):
    """Two tables that belong together: mean and biased variance."""

    mean: Array
    var: Array


class _BranchMoments(NamedTuple):
    """Moments of the branches that are needed, (N, C), (N, 1) and (1, C), and the mixed ones: broadcast to (N, C)."""

    in_: _ArrayMoments
    ln: _ArrayMoments | None
    bn: _ArrayMoments | None
    mixed: _ArrayMoments


class _BranchTerms(NamedTuple):
    """p or q of the branches in use: (N, C), (N, 1) and (1, C)."""

    in_: Array
    ln: Array | None
    bn: Array | None


def _mix_moments(site: Site, needed: Sequence[Branch]) -> _BranchMoments:
    """Pool the moments of the branches that have a share or are `needed`, and mix them."""
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
    """Mean of variances + variance of means, summed around the first entry: a common mean costs no digits."""
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
    """Return p or q (N, C), and its means over what the other branches pool."""
    samples, channels = terms.shape
    return _BranchTerms(
        terms,
        terms.sum(1, keepdims=True) * (1 / channels) if "ln" in branches else None,
        terms.sum(0, keepdims=True) * (1 / samples) if "bn" in branches else None,
    )


def _slope_and_shift(p: _BranchTerms, q: _BranchTerms, tables: _BranchMoments, site: Site) -> tuple[Array, Array]:
    """Return the coefficients of dx around mu_in, which broadcast to (N, C)."""
    bn = tables.bn
    if site.uses_updated_stats:
        bn = _pool(tables.in_, 0)
    elif site.constants is not None:  # x does not move them
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
    """Return the gradient of the shares in the mean, up to a common shift: around that of `in`."""
    ln, bn = (
        0.0 if branch is None else -positions * _dot(p.in_, tables.in_.mean - branch.mean)
        for branch in (tables.ln, tables.bn)
    )
    return ImportanceWeights(0.0, ln, bn)


def _var_weights_gradient(q: _BranchTerms, tables: _BranchMoments, positions: int) -> ImportanceWeights:
    """Return the gradient of the shares in the variance."""
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
    """Sum products. An infinite variance lets nothing through: where nothing pulls, a statistic has no say."""
    a, b = gradient_term.reshape(-1), statistic.reshape(-1)
    total = float(a @ b)
    return total if math.isfinite(total) else float(a[a != 0] @ b[a != 0])


def _mix(branch_weights: ImportanceWeights, in_: Array | None, ln: Array | None, bn: Array | None) -> Array | None:
    """Sum shares times tables; what has no share is not touched, so that zero times infinity is zero."""
    total = None
    for branch_weight, table in ((branch_weights.in_, in_), (branch_weights.ln, ln), (branch_weights.bn, bn)):
        if branch_weight != 0 and table is not None:
            term = table if branch_weight == 1 else table * branch_weight
            total = term if total is None else total + term
    return total
