"""Switchable Normalization out of ATen kernels: two passes over the activation forward, two backward.

x and tables of (N, C) are all that is kept between them. Gate parameters are read, which is free on CPU and waits for
the device elsewhere.
"""

import torch
from torch import Tensor

from normswap.layers import compiled, tables
from normswap.layers.fused import Backend, Gradients, Inputs, Normalised
from normswap.layers.mixing import Mixing, Shares, gate_gradient
from normswap.layers.moments import Moments
from normswap.layers.passes import combine, gradient_sums, instance_moments, laid_out, laid_out_like, scale_and_shift
from normswap.layers.tables import pool_samples, site_of


def forward(inputs: Inputs) -> Normalised:
    """Normalise; see `fused.Forward`."""
    inputs = inputs._replace(x=laid_out(inputs.x))
    if compiled.serves(inputs):
        return compiled.normalise(inputs)
    moments, buffer = instance_moments(inputs.x)
    constants = None
    if inputs.renew is not None:
        constants = inputs.renew(pool_samples(moments))
        inputs = inputs._replace(constants=constants)
    scale, shift, batch = tables.scale_and_shift(site_of(inputs, moments))
    y = scale_and_shift(inputs.x, scale, shift, buffer=buffer)
    return Normalised(y, batch, moments, constants)


def backward(dy: Tensor, inputs: Inputs, saved: Moments, wanted: tuple[bool, ...]) -> Gradients:
    """Return the gradients; see `fused.Backward`."""
    inputs = inputs._replace(x=laid_out(inputs.x))
    dy = laid_out_like(dy, inputs.x)
    saved = Moments(*(moment.contiguous() for moment in saved))  # hooks on saved tensors may have laid them out anew
    if compiled.serves(inputs):
        return compiled.differentiate(dy, inputs, saved, wanted)
    x, mixing, site = inputs.x, inputs.mixing, site_of(inputs, saved)
    plain, scaled = gradient_sums(dy, x, *tables.mean_and_rstd(site))
    scale, slope, shift, means, variances, *affine = tables.pull(site, plain, scaled, x.numel() // plain.numel())
    return Gradients(
        combine(dy, x, scale, slope, shift, saved.mean) if wanted[0] else None,
        _gate(site.means, means, mixing, inputs.mean_point) if wanted[1] else None,
        _gate(site.variances, variances, mixing, inputs.var_point) if wanted[2] else None,
        affine[0] if wanted[3] else None,
        affine[1] if wanted[4] else None,
    )


def _gate(shares: Shares, gradient: Shares, mixing: Mixing, point: Tensor) -> Tensor:
    return torch.tensor(gate_gradient(shares, gradient, mixing), dtype=point.dtype, device=point.device)


NATIVE = Backend("native", forward, backward, renews=True)
