"""Switchable Normalization out of ATen kernels: two passes over the activation forward, two backward.

x and tables of (N, C) are all that is kept between them. Gate parameters are read, which is free on CPU and waits for
the device elsewhere.
"""

import torch
from torch import Tensor

from normswap.layers import compiled_tables, tables
from normswap.layers.fused import Backend, Gradients, Normalised
from normswap.layers.mixing import Mixing, Shares, gate_gradient, read_shares
from normswap.layers.moments import Moments, accumulation_dtype
from normswap.layers.passes import combine, gradient_sums, instance_moments, laid_out, laid_out_like, scale_and_shift
from normswap.layers.tables import Site


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
    moments, buffer = instance_moments(x)
    shares = read_shares(mean_point, mixing), read_shares(var_point, mixing)
    site = Site(moments, constants, _parameter(weight, x), _parameter(bias, x), *shares, mixing)
    algebra = compiled_tables if compiled_tables.AVAILABLE and x.device.type == "cpu" else tables
    scale, shift, batch = algebra.scale_and_shift(site)
    return Normalised(scale_and_shift(x, scale, shift, buffer=buffer), batch, moments)


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
    shares = read_shares(mean_point, mixing), read_shares(var_point, mixing)
    site = Site(saved, constants, _parameter(weight, x), None, *shares, mixing)
    algebra = compiled_tables if compiled_tables.AVAILABLE and x.device.type == "cpu" else tables
    plain, scaled = gradient_sums(dy, x, *algebra.mean_and_rstd(site))
    pulled = algebra.pull(site, plain, scaled, x.numel() // plain.numel())
    return Gradients(
        combine(dy, x, pulled.scale, pulled.slope, pulled.shift, saved.mean) if wanted[0] else None,
        _gate(site.means, pulled.means, mixing, mean_point) if wanted[1] else None,
        _gate(site.variances, pulled.variances, mixing, var_point) if wanted[2] else None,
        pulled.weight if wanted[3] else None,
        pulled.bias if wanted[4] else None,
    )


def _parameter(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """Return an affine parameter as the algebra reads it."""
    return None if parameter is None else parameter.detach().to(accumulation_dtype(x)).contiguous()


def _gate(shares: Shares, gradient: Shares, mixing: Mixing, point: Tensor) -> Tensor:
    return torch.tensor(gate_gradient(shares, gradient, mixing), dtype=point.dtype, device=point.device)


NATIVE = Backend("native", forward, backward)
