"""Algebra on (N, C) tables of moments, between the passes of a fused backend; shares are Python numbers.

Tables are numpy arrays in float64 on CPU, where an operator of numpy costs a quarter of one of torch and a small layer
is made of little else, and tensors as they are on every other device. What is written here holds for both.

Backward: with p = dmu / M and q = 2 dvar / M per (n, c), M being the number of positions (Luo et al., ICLR 2019,
appendix),

    dx = scale dy + slope (x - mu_in) + shift,    slope = sum_k w'_k q_k,
    shift = sum_k w_k p_k + sum_k w'_k q_k (mu_in - mu_k),

where p_k and q_k are the means of p and q over what branch k pools. Everything is written around mu_in, so that a mean
that is large beside the deviation cancels before it is multiplied.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from normswap.layers.importance import Branch
from normswap.layers.mixing import Shares

# A numpy array, or a tensor where the device is not the CPU.
Array = Any


def as_array(tensor: Tensor) -> Array:
    """Return a tensor in float32 or wider as a table."""
    return tensor.numpy().astype(np.float64, copy=False) if tensor.device.type == "cpu" else tensor


def as_tensor(array: Array, like: Tensor) -> Tensor:
    """Return a table as a tensor, in the dtype in which moments of `like` are accumulated."""
    if isinstance(array, Tensor):
        return array
    return torch.from_numpy(array.astype(np.float64 if like.dtype == torch.float64 else np.float32, copy=False))


def filled(array: Array, shape: tuple[int, int]) -> Array:
    """Return a table broadcast to (N, C), in memory of its own where it was smaller."""
    if array.shape == shape:
        return array
    if isinstance(array, Tensor):
        return array.expand(shape).contiguous()
    whole = np.empty(shape, array.dtype)
    whole[:] = array
    return whole


def rsqrt(array: Array) -> Array:
    """Return 1 / sqrt of a table."""
    return array.rsqrt() if isinstance(array, Tensor) else 1 / np.sqrt(array)


class Pair(NamedTuple):
    """Two tables that belong together: mean and biased variance."""

    mean: Array
    var: Array


class Tables(NamedTuple):
    """Moments of the branches that are needed, (N, C), (N, 1) and (1, C), and the mixed ones: broadcast to (N, C)."""

    in_: Pair
    ln: Pair | None
    bn: Pair | None
    mixed: Pair


class Pulls(NamedTuple):
    """p or q of the branches in use: (N, C), (N, 1) and (1, C)."""

    in_: Array
    ln: Array | None
    bn: Array | None


def mix_moments(
    in_: Pair, constants: Pair | None, means: Shares, variances: Shares, needed: Sequence[Branch]
) -> Tables:
    """Return the moments of the branches, pooled from those of `in` (N, C), and their mix.

    Args:
        constants: moments (1, C) that the `bn` branch takes instead of the pooled ones.
        needed: branches to give moments of even where they have no share.
    """
    ln = _pool(in_, 1) if means.ln or variances.ln or "ln" in needed else None
    bn = constants
    if bn is None and (means.bn or variances.bn or "bn" in needed):
        bn = _pool(in_, 0)
    mean = _mix(means, in_.mean, ln and ln.mean, bn and bn.mean)
    var = _mix(variances, in_.var, ln and ln.var, bn and bn.var)
    return Tables(in_, ln, bn, Pair(mean, var))


def _pool(in_: Pair, axis: int) -> Pair:
    """Mean of variances + variance of means, summed around the first entry: a common mean costs no digits."""
    means, variances = in_
    count = means.shape[axis]
    if count == 1:
        return in_
    first = means[:1] if axis == 0 else means[:, :1]
    away = means - first
    centre = away.sum(axis, keepdims=True)
    centre *= 1 / count
    away -= centre
    away *= away
    away += variances
    var = away.sum(axis, keepdims=True)
    var *= 1 / count
    return Pair(first + centre, var)


def pulls(pull: Array, branches: Sequence[Branch]) -> Pulls:
    """Return p or q (N, C), and its means over what the other branches pool."""
    samples, channels = pull.shape
    return Pulls(
        pull,
        pull.sum(1, keepdims=True) * (1 / channels) if "ln" in branches else None,
        pull.sum(0, keepdims=True) * (1 / samples) if "bn" in branches else None,
    )


def slope_and_shift(
    p: Pulls, q: Pulls, tables: Tables, means: Shares, variances: Shares, *, constant: bool
) -> tuple[Array, Array] | None:
    """Return the coefficients of dx around mu_in, which broadcast to (N, C); None where both are zero.

    Args:
        constant: the `bn` branch had constants, which x does not move.
    """
    if constant:
        p, q = p._replace(bn=None), q._replace(bn=None)
    slope, shift = _mix(variances, *q), _mix(means, *p)
    for share, pull, branch in ((variances.ln, q.ln, tables.ln), (variances.bn, q.bn, tables.bn)):
        if share != 0 and pull is not None and branch is not None:
            term = (tables.in_.mean - branch.mean) * (share * pull)
            shift = term if shift is None else shift + term
    if slope is None:
        return None if shift is None else (0.0 * shift, shift)
    return slope, 0.0 * slope if shift is None else shift


def mean_share_gradient(p: Pulls, tables: Tables, positions: int) -> Shares:
    """Return the gradient of the weights of means, up to a common shift: around that of `in`."""
    ln, bn = (
        0.0 if branch is None else -positions * _dot(p.in_, tables.in_.mean - branch.mean)
        for branch in (tables.ln, tables.bn)
    )
    return Shares(0.0, ln, bn)


def var_share_gradient(q: Pulls, tables: Tables, positions: int) -> Shares:
    """Return the gradient of the weights of variances."""
    size = q.in_.shape[0] * q.in_.shape[1] * positions / 2
    branches = ((q.in_, tables.in_), (q.ln, tables.ln), (q.bn, tables.bn))
    return Shares(
        *(
            0.0 if pull is None or pair is None else size / len(pull.reshape(-1)) * _dot(pull, pair.var)
            for pull, pair in branches
        )
    )


def _dot(a: Array, b: Array) -> float:
    return float(a.reshape(-1) @ b.reshape(-1))


def _mix(shares: Shares, in_: Array | None, ln: Array | None, bn: Array | None) -> Array | None:
    """Sum shares times tables; what has no share is not touched, so that zero times infinity is zero."""
    total = None
    for share, table in ((shares.in_, in_), (shares.ln, ln), (shares.bn, bn)):
        if share != 0 and table is not None:
            term = table if share == 1 else table * share
            total = term if total is None else total + term
    return total
