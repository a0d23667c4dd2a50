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
    inputs = inputs._replace(x=laid_out(inputs.x))
    if compiled.serves(inputs):
        return compiled.normalise(inputs)
    moments, buffer = instance_moments(inputs.x)
    constants = None
    if inputs.renew is not None:
        constants = inputs.renew(pool_samples(moments))
        inputs = inputs._replace(constants=constants)
    scale, shift, batch = tables.scale_and_shift(_site(inputs, moments))
    y = scale_and_shift(inputs.x, scale, shift, buffer=buffer)
    return Normalised(y, batch, moments, constants)


def backward(dy: Tensor, inputs: Inputs, saved: Moments, wanted: tuple[bool, ...]) -> Gradients:
    """Return the gradients; see `fused.Backward`."""
    inputs = inputs._replace(x=laid_out(inputs.x))
    dy = laid_out_like(dy, inputs.x)
    saved = Moments(*(moment.contiguous() for moment in saved))  # hooks on saved tensors may have laid them out anew
    if compiled.serves(inputs):
        return compiled.differentiate(dy, inputs, saved, wanted)
    x, mixing, site = inputs.x, inputs.mixing, _site(inputs, saved)
    plain, scaled = gradient_sums(dy, x, *tables.mean_and_rstd(site))
    scale, slope, shift, means, variances, *affine = tables.pull(site, plain, scaled, x.numel() // plain.numel())
    return Gradients(
        combine(dy, x, scale, slope, shift, saved.mean) if wanted[0] else None,
        _gate(site.means, means, mixing, inputs.mean_point) if wanted[1] else None,
        _gate(site.variances, variances, mixing, inputs.var_point) if wanted[2] else None,
        affine[0] if wanted[3] else None,
        affine[1] if wanted[4] else None,
    )


def _site(inputs: Inputs, moments: Moments) -> Site:
    """What the algebra reads."""
    x, mean_point, var_point, weight, bias, constants, mixing, renew = inputs
    shares = read_shares(mean_point, mixing), read_shares(var_point, mixing)
    return Site(moments, constants, _parameter(weight, x), _parameter(bias, x), *shares, mixing, renew is not None)


def _parameter(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """Return an affine parameter as the algebra reads it: a copy, since numpy keeps what it reads from being resized,
    which `fully_shard` does to parameters.
    """
    return None if parameter is None else parameter.detach().to(accumulation_dtype(x), copy=True).contiguous()


def _gate(shares: Shares, gradient: Shares, mixing: Mixing, point: Tensor) -> Tensor:
    return torch.tensor(gate_gradient(shares, gradient, mixing), dtype=point.dtype, device=point.device)


NATIVE = Backend("native", forward, backward, renews=True)
