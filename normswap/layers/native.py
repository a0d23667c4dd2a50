"""Switchable Normalization out of ATen kernels: two passes over the activation forward, two backward.

x and tables of (N, C) are all that is kept between them. Gate parameters are read, which is free on CPU and waits for
the device elsewhere.
"""

import torch
from torch import Tensor

from normswap.layers import compiled, tables
from normswap.layers.fused import Backend, Gradients, Inputs, Normalised
from normswap.layers.mixing import Mixing, Shares, gate_gradient, read_shares
from normswap.layers.moments import Moments, accumulation_dtype
from normswap.layers.passes import combine, gradient_sums, instance_moments, laid_out, laid_out_like, scale_and_shift
from normswap.layers.tables import Site, pool_samples


def forward(inputs: Inputs) -> Normalised:
    """Normalise; see `fused.Forward`."""
    x, mean_point, var_point, weight, bias, constants, mixing, renew = inputs
    x = laid_out(x)
    rest = (_parameter(weight, x), _parameter(bias, x), read_shares(mean_point, mixing), read_shares(var_point, mixing))
    if renew is None and compiled.serves_whole(x):
        room = (torch.empty(x.shape[:2], dtype=x.dtype) for _ in Moments._fields)
        site = Site(Moments(*room), constants, *rest, mixing)
        return Normalised(*compiled.normalise(x, site), site.moments)
    moments, buffer = instance_moments(x)
    if renew is not None:
        constants = renew(pool_samples(moments))
    algebra = compiled if compiled.serves(x) else tables
    scale, shift, batch = algebra.scale_and_shift(Site(moments, constants, *rest, mixing))
    return Normalised(scale_and_shift(x, scale, shift, buffer=buffer), batch, moments, renew and constants)


def backward(dy: Tensor, inputs: Inputs, saved: Moments, wanted: tuple[bool, ...]) -> Gradients:
    """Return the gradients; see `fused.Backward`."""
    x, mean_point, var_point, weight, _, constants, mixing, renew = inputs
    x = laid_out(x)
    dy = laid_out_like(dy, x)
    shares = read_shares(mean_point, mixing), read_shares(var_point, mixing)
    saved = Moments(*(moment.contiguous() for moment in saved))  # hooks on saved tensors may have laid them out anew
    renewed = renew is not None
    site = Site(saved, constants, _parameter(weight, x), None, *shares, mixing, renewed)
    if compiled.serves_whole(x) and not renewed:
        dx, means, variances, *affine = compiled.differentiate(dy, x, site, wanted=wanted[0])
    else:
        algebra = compiled if compiled.serves(x) and not renewed else tables
        plain, scaled = gradient_sums(dy, x, *algebra.mean_and_rstd(site))
        scale, slope, shift, means, variances, *affine = algebra.pull(site, plain, scaled, x.numel() // plain.numel())
        dx = combine(dy, x, scale, slope, shift, saved.mean) if wanted[0] else None
    return Gradients(
        dx,
        _gate(site.means, means, mixing, mean_point) if wanted[1] else None,
        _gate(site.variances, variances, mixing, var_point) if wanted[2] else None,
        affine[0] if wanted[3] else None,
        affine[1] if wanted[4] else None,
    )


def _parameter(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """Return an affine parameter as the algebra reads it."""
    return None if parameter is None else parameter.detach().to(accumulation_dtype(x)).contiguous()


def _gate(shares: Shares, gradient: Shares, mixing: Mixing, point: Tensor) -> Tensor:
    return torch.tensor(gate_gradient(shares, gradient, mixing), dtype=point.dtype, device=point.device)


NATIVE = Backend("native", forward, backward, renews=True)
