"""Switchable Normalization out of ATen kernels: two passes over the activation forward, two backward.

x and tables of (N, C) are all that is kept between them. Gate parameters are read, which is free on CPU and waits for
the device elsewhere.
"""

import numpy as np
import torch
from torch import Tensor

from normswap.layers.fused import Backend, Gradients, Normalised
from normswap.layers.importance import Branch
from normswap.layers.mixing import Mixing, Shares, gate_gradient, read_shares
from normswap.layers.moments import Moments, accumulation_dtype
from normswap.layers.passes import combine, gradient_sums, instance_moments, laid_out, laid_out_like, normalise
from normswap.layers.tables import (
    Array,
    Pair,
    as_array,
    as_tensor,
    mean_share_gradient,
    mix_moments,
    pulls,
    rsqrt,
    slope_and_shift,
    var_share_gradient,
)


def forward(
    x: Tensor,
    mean_point: Tensor,
    var_point: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    constants: Moments | None,
    mixing: Mixing,
) -> Normalised:
    """Normalise x; see `fused.Forward`."""
    x = laid_out(x)
    with _as_torch():
        moments, buffer = instance_moments(x)
        shares = read_shares(mean_point, mixing), read_shares(var_point, mixing)
        # The moments of the batch are recorded whatever share they have.
        needed: tuple[Branch, ...] = ("bn",) if "bn" in mixing.branches else ()
        tables = mix_moments(moments, _pair(constants), *shares, needed)
        y = normalise(x, tables.mixed, _parameter(weight, x), _parameter(bias, x), eps=mixing.eps, buffer=buffer)
    batch = (
        None
        if constants is not None or tables.bn is None
        else Moments(as_tensor(tables.bn.mean, x), as_tensor(tables.bn.var, x))
    )
    return Normalised(y, batch, Moments(as_tensor(moments.mean, x), as_tensor(moments.var, x)))


def backward(
    dy: Tensor,
    x: Tensor,
    mean_point: Tensor,
    var_point: Tensor,
    weight: Tensor | None,
    constants: Moments | None,
    saved: Moments,
    mixing: Mixing,
    wanted: tuple[bool, ...],
) -> Gradients:
    """Return the gradients; see `fused.Backward`."""
    x = laid_out(x)
    dy = laid_out_like(dy, x)
    means, variances = read_shares(mean_point, mixing), read_shares(var_point, mixing)
    needed = mixing.branches if wanted[1] or wanted[2] else ()
    positions = x.numel() // (x.shape[0] * x.shape[1])
    dx = gate_means = gate_variances = None
    with _as_torch():
        fixed = _pair(constants)
        tables = mix_moments(Pair(as_array(saved.mean), as_array(saved.var)), fixed, means, variances, needed)
        rstd = rsqrt(tables.mixed.var + mixing.eps)
        plain, scaled = gradient_sums(dy, x, tables.mixed.mean, rstd)
        scale = rstd if weight is None else rstd * _parameter(weight, x)
        pull = scale * (-1 / positions)
        p, q = pulls(pull * plain, mixing.branches), pulls(pull * rstd * scaled, mixing.branches)
        if wanted[0]:
            coefficients = slope_and_shift(p, q, tables, means, variances, constant=fixed is not None)
            dx = combine(dy, x, scale, coefficients, tables.in_.mean)
        if wanted[1]:
            gate_means = _gate(means, mean_share_gradient(p, tables, positions), mixing, mean_point)
        if wanted[2]:
            gate_variances = _gate(variances, var_share_gradient(q, tables, positions), mixing, var_point)
        sums = scaled.sum(0) if wanted[3] else None, plain.sum(0) if wanted[4] else None
    return Gradients(dx, gate_means, gate_variances, *(None if s is None else as_tensor(s, x) for s in sums))


def _as_torch() -> np.errstate:
    """Infinities and NaN pass without a word, as they do in torch."""
    return np.errstate(all="ignore")


def _parameter(parameter: Tensor | None, x: Tensor) -> Array | None:
    if parameter is None:
        return None
    parameter, dtype = parameter.detach(), accumulation_dtype(x)
    return as_array(parameter if parameter.dtype == dtype else parameter.to(dtype))


def _pair(moments: Moments | None) -> Pair | None:
    return None if moments is None else Pair(as_array(moments.mean), as_array(moments.var))


def _moments(pair: Pair, x: Tensor) -> Moments:
    return Moments(as_tensor(pair.mean, x), as_tensor(pair.var, x))


def _gate(shares: Shares, gradient: Shares, mixing: Mixing, point: Tensor) -> Tensor:
    return torch.tensor(gate_gradient(shares, gradient, mixing), dtype=point.dtype, device=point.device)


NATIVE = Backend("native", forward, backward)
