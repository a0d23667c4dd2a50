"""The passes over an activation, out of ATen kernels: moments, normalisation, the sums and the sum of backward.

Each pass reads or writes the activation once where a kernel for it exists, in the layout that it comes in:
contiguous (every (n, c) is a row) or channels_last, of any rank. Tables are (N, C), in float32 or wider. What is
not laid out either way is copied once, as `F.batch_norm` copies it.

`torch.var_mean` is not used: on CPU it costs ten times what the kernel of group normalization takes for the same.
"""

from typing import Any

import torch
from torch import Tensor

from normswap.layers.moments import accumulation_dtype
from normswap.layers.tables import Array, Pair, as_array, as_tensor, filled, rsqrt

# Not in torch's own annotations: the form that writes into given memory.
_EVALUATE: Any = torch.native_batch_norm
_SUMS = torch.ops.aten.native_batch_norm_backward.default
_ONLY_SUMS = [False, True, True]


def laid_out(x: Tensor) -> Tensor:
    """Return x, or a copy of it, contiguous or channels_last."""
    if x.is_contiguous() or is_channels_last(x):
        return x
    return x.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x (4-D or 5-D) lie next to each other in memory, and x is not contiguous as well."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()


def laid_out_like(gradient: Tensor, x: Tensor) -> Tensor:
    """Return `gradient` in the layout of x, which is laid out."""
    if not is_channels_last(x):
        return gradient.contiguous()
    return gradient.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def instance_moments(x: Tensor) -> tuple[Pair, Tensor | None]:
    """Return the moments of x over its spatial positions, (N, C), and a buffer like x where one was made on the way."""
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    dtype = accumulation_dtype(x)
    if positions == 1:
        mean = x.detach().reshape(samples, channels).to(dtype)
        return Pair(as_array(mean), as_array(torch.zeros_like(mean))), None
    if is_channels_last(x):
        return _moments_by_sample(x, channels, dtype), None
    # Parameters in float32 make the kernel return its moments so.
    ones = None if x.dtype == dtype else torch.ones(channels, dtype=dtype, device=x.device)
    buffer, mean, rstd = torch.native_group_norm(x, ones, ones, samples, channels, positions, channels, 0.0)
    rstd = as_array(rstd)
    return Pair(as_array(mean), 1 / (rstd * rstd)), buffer


def _moments_by_sample(x: Tensor, channels: int, dtype: torch.dtype) -> Pair:
    # Running statistics in float32 make the kernel return its moments so.
    kept = None if x.dtype == dtype else torch.ones(channels, dtype=dtype, device=x.device)
    moments = [torch.batch_norm_update_stats(sample, kept, kept, 0.0) for sample in _samples(x)]
    if len(moments) == 1:
        mean, var = moments[0]
        return Pair(as_array(mean[None]), as_array(var[None]))
    return Pair(*(as_array(torch.stack(values)) for values in zip(*moments, strict=True)))


def normalise(
    x: Tensor, moments: Pair, weight: Array | None, bias: Array | None, *, eps: float, buffer: Tensor | None = None
) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias, of the dtype and layout of x.

    Args:
        moments: broadcast to (N, C).
        weight, bias: (C,), or None.
        buffer: is overwritten with the result.
    """
    y = torch.empty_like(x) if buffer is None else buffer
    by_channel = is_channels_last(x)
    if by_channel and x.dtype == accumulation_dtype(x):
        scale = rsqrt(moments.var + eps)
        scale = scale if weight is None else scale * weight
        shift = -scale * moments.mean
        shift = shift if bias is None else shift + bias
        return torch.addcmul(per_position(shift, x), x, per_position(scale, x), out=y)
    table = (x.shape[0], x.shape[1])
    affine = [None if array is None else filled(array, table) for array in (weight, bias, *moments)]
    if by_channel:
        for n, (sample, out) in enumerate(zip(_samples(x), _samples(y), strict=True)):
            _evaluate(sample, [None if array is None else as_tensor(array[n], x) for array in affine], eps, out)
    else:
        flat = [None if array is None else as_tensor(array.reshape(-1), x) for array in affine]
        _evaluate(_rows(x), flat, eps, _rows(y))
    return y


def _evaluate(x: Tensor, affine: list[Tensor | None], eps: float, y: Tensor) -> None:
    """Write what batch normalization with this weight, bias, mean and variance makes of x in evaluation into y."""
    weight, bias, mean, var = affine
    unused = torch.empty(0, dtype=accumulation_dtype(x), device=x.device)
    _EVALUATE(x, weight, bias, mean, var, False, 0.0, eps, out=(y, unused, torch.empty_like(unused)))


def gradient_sums(dy: Tensor, x: Tensor, mean: Array, rstd: Array) -> tuple[Array, Array]:
    """Return the sums over positions of dy and of dy (x - mean) rstd, each (N, C).

    Args:
        dy, x: laid out alike.
        mean, rstd: broadcast to (N, C).
    """
    table = (x.shape[0], x.shape[1])
    if x.numel() == table[0] * table[1]:
        dtype = accumulation_dtype(x)
        plain, values = (as_array(tensor.detach().reshape(table).to(dtype)) for tensor in (dy, x))
        return plain, (values - mean) * rstd * plain
    mean, rstd = filled(mean, table), filled(rstd, table)
    if is_channels_last(x):
        statistics = as_tensor(mean, x), as_tensor(rstd, x)
        pairs = [_sums(*sample) for sample in zip(_samples(dy), _samples(x), *statistics, strict=True)]
        plain, scaled = (torch.stack(sums) for sums in zip(*pairs, strict=True))
    else:
        plain, scaled = _sums(_rows(dy), _rows(x), as_tensor(mean.reshape(-1), x), as_tensor(rstd.reshape(-1), x))
    return as_array(plain).reshape(table), as_array(scaled).reshape(table)


def _sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    weight = None if x.dtype == mean.dtype else mean  # only its dtype is read: that of the sums
    _, scaled, plain = _SUMS(dy, x, weight, None, None, mean, rstd, True, 0.0, _ONLY_SUMS)
    return plain, scaled


def combine(dy: Tensor, x: Tensor, scale: Array, coefficients: tuple[Array, Array] | None, centre: Array) -> Tensor:
    """Return scale dy + slope (x - centre) + shift, of the dtype and layout of x.

    Args:
        scale, centre: broadcast to (N, C).
        coefficients: slope and shift, which broadcast to (N, C); None where both are zero.
    """
    if coefficients is None:
        return torch.mul(dy, per_position(scale, x), out=torch.empty_like(x))
    tables = [per_position(array, x) for array in (scale, *coefficients, centre)]
    if x.dtype == accumulation_dtype(x):
        return _combine(dy, x, *tables, out=torch.empty_like(x))
    # Sample by sample in float32, so that no whole activation exists in it.
    dx = torch.empty_like(x)
    rows = (table.expand(x.shape[0], *table.shape[1:]) for table in tables)
    for out, *sample in zip(dx, dy, x, *rows, strict=True):
        out.copy_(_combine(*sample, out=torch.empty(out.shape, device=x.device)))
    return dx


def _combine(
    dy: Tensor, x: Tensor, scale: Tensor, slope: Tensor, shift: Tensor, centre: Tensor, *, out: Tensor
) -> Tensor:
    # The difference first: multiplied out, a mean that is large beside the deviation would cost its digits.
    torch.sub(x, centre, out=out)
    return torch.addcmul(shift, out, slope, out=out).addcmul_(dy, scale)


def per_position(array: Array, x: Tensor) -> Tensor:
    """Return a table (N, C) so that it broadcasts over the positions of x."""
    return as_tensor(array.reshape(array.shape + (1,) * (x.dim() - 2)), x)


def _rows(x: Tensor) -> Tensor:
    """View a contiguous x as one sample of N C channels."""
    return x.view(1, x.shape[0] * x.shape[1], -1)


def _samples(x: Tensor) -> tuple[Tensor, ...]:
    """View x as batches of one sample."""
    return x.split(1)  # type: ignore[no-untyped-call, no-any-return]
