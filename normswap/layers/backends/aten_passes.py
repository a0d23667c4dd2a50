"""The passes over an activation, out of ATen kernels: moments, normalisation, the sums and the sum of backward.

Each pass reads or writes the activation once where a kernel for it exists, in the layout that it comes in:
contiguous (every (n, c) is a row) or channels_last, of any rank. Tables are (N, C), in float32 or wider. What is
not laid out either way is copied once, as `F.batch_norm` copies it.

`torch.var_mean` is not used: on CPU it costs ten times what the kernel of group normalization takes for the same.
"""

from typing import Any

import torch
from torch import Tensor

from normswap.layers.backends.reference import Moments, accumulation_dtype

# Not in torch's own annotations: the form that writes into given memory.
_BATCH_NORM_INTO: Any = torch.native_batch_norm
_BATCH_NORM_BACKWARD = torch.ops.aten.native_batch_norm_backward.default
_SUMS_OUTPUT_MASK = [False, True, True]


def to_supported_layout(x: Tensor) -> Tensor:
    """Return x, or a copy of it, contiguous or channels_last."""
    if x.is_contiguous() or is_channels_last(x):
        return x
    return x.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x (4-D or 5-D) lie next to each other in memory, and x is not contiguous as well."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()


def match_layout(gradient: Tensor, x: Tensor) -> Tensor:
    """Return `gradient` in the layout of x, which is laid out."""
    if not is_channels_last(x):
        return gradient.contiguous()
    return gradient.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def instance_moments(x: Tensor) -> tuple[Moments, Tensor | None]:
    """Return the moments of x over its spatial positions, (N, C), and a buffer like x where one was made on the way."""
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    dtype = accumulation_dtype(x)
    if positions == 1:
        mean = x.detach().reshape(samples, channels).to(dtype, copy=True)
        return Moments(mean, torch.zeros_like(mean)), None
    if is_channels_last(x):
        return _moments_by_sample(x, channels, dtype), None
    # Parameters in float32 make the kernel return its moments so.
    ones = None if x.dtype == dtype else torch.ones(channels, dtype=dtype, device=x.device)
    buffer, mean, rstd = torch.native_group_norm(x, ones, ones, samples, channels, positions, channels, 0.0)
    var = rstd.mul_(rstd).reciprocal_()
    if x.dtype != dtype:  # in half precision the kernel subtracts squares, and two that overflow leave no number
        var = torch.where(var.isnan() & mean.isfinite(), torch.inf, var)
    return Moments(mean, var), buffer


def _moments_by_sample(x: Tensor, channels: int, dtype: torch.dtype) -> Moments:
    # Running statistics in float32 make the kernel return its moments so.
    float32_stats = None if x.dtype == dtype else torch.ones(channels, dtype=dtype, device=x.device)
    moments = [torch.batch_norm_update_stats(sample, float32_stats, float32_stats, 0.0) for sample in _split_samples(x)]
    return Moments(*(torch.stack(values) for values in zip(*moments, strict=True)))


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, *, buffer: Tensor | None = None) -> Tensor:
    """Return scale x + shift, of the dtype and layout of x.

    Args:
        scale, shift: (N, C).
        buffer: is overwritten with the result.
    """
    y = torch.empty_like(x) if buffer is None else buffer
    by_channel = is_channels_last(x)
    if by_channel and x.dtype == scale.dtype:
        return torch.addcmul(broadcast_over_positions(shift, x), x, broadcast_over_positions(scale, x), out=y)
    if by_channel:
        for sample in zip(_split_samples(x), scale, shift, _split_samples(y), strict=True):
            _scale_and_shift_rows(*sample)
    else:
        _scale_and_shift_rows(_as_rows(x), scale.view(-1), shift.view(-1), _as_rows(y))
    return y


def _scale_and_shift_rows(x: Tensor, scale: Tensor, shift: Tensor, y: Tensor) -> None:
    # In evaluation with mean 0 and variance 1, the kernel of batch normalization is just this, and the fastest.
    mean, unused = torch.zeros_like(scale), scale.new_empty(0)
    var = torch.ones_like(scale)
    _BATCH_NORM_INTO(x, scale, shift, mean, var, False, 0.0, 0.0, out=(y, unused, torch.empty_like(unused)))


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over positions of dy and of dy (x - mean) rstd, each (N, C).

    Args:
        dy, x: laid out alike.
        mean, rstd: (N, C).
    """
    if x.numel() == mean.numel():
        dy_sum, values = (tensor.detach().reshape(mean.shape).to(mean.dtype) for tensor in (dy, x))
        return dy_sum, (values - mean).mul_(rstd).mul_(dy_sum)
    if is_channels_last(x):
        pairs = [_sums(*sample) for sample in zip(_split_samples(dy), _split_samples(x), mean, rstd, strict=True)]
        dy_sum, dy_xhat_sum = (torch.stack(sums) for sums in zip(*pairs, strict=True))
        return dy_sum, dy_xhat_sum
    dy_sum, dy_xhat_sum = _sums(_as_rows(dy), _as_rows(x), mean.view(-1), rstd.view(-1))
    return dy_sum.view(mean.shape), dy_xhat_sum.view(mean.shape)


def _sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    weight = None if x.dtype == mean.dtype else mean  # only its dtype is read: that of the sums
    _, dy_xhat_sum, dy_sum = _BATCH_NORM_BACKWARD(dy, x, weight, None, None, mean, rstd, True, 0.0, _SUMS_OUTPUT_MASK)
    return dy_sum, dy_xhat_sum


def input_gradient(dy: Tensor, x: Tensor, scale: Tensor, slope: Tensor, shift: Tensor, centre: Tensor) -> Tensor:
    """Return scale dy + slope (x - centre) + shift, of the dtype and layout of x; the tables are (N, C)."""
    tables = [broadcast_over_positions(table, x) for table in (scale, slope, shift, centre)]
    dx = torch.empty_like(x)
    if x.dtype == scale.dtype:
        return _input_gradient(dy, x, *tables, out=dx)
    # Sample by sample in float32, so that no whole activation exists in it.
    for out, *sample in zip(dx, dy, x, *tables, strict=True):
        out.copy_(_input_gradient(*sample, out=torch.empty(out.shape, device=x.device)))
    return dx


def _input_gradient(
    dy: Tensor, x: Tensor, scale: Tensor, slope: Tensor, shift: Tensor, centre: Tensor, *, out: Tensor
) -> Tensor:
    # The difference first: multiplied out, a mean that is large beside the deviation would cost its digits.
    torch.sub(x, centre, out=out)
    return torch.addcmul(shift, out, slope, out=out).addcmul_(dy, scale)


def broadcast_over_positions(table: Tensor, x: Tensor) -> Tensor:
    """Return a table (N, C) so that it broadcasts over the positions of x."""
    return table.view(*table.shape, *(1,) * (x.dim() - 2))


def _as_rows(x: Tensor) -> Tensor:
    """View a contiguous x as one sample of N C channels."""
    return x.view(1, x.shape[0] * x.shape[1], -1)


def _split_samples(x: Tensor) -> tuple[Tensor, ...]:
    """View x as batches of one sample."""
    return x.split(1)  # type: ignore[no-untyped-call, no-any-return]
