"""Passes over an activation by ATen kernels: moments, affine pass, gradient sums and input gradient.

The CPU passes read or write the activation once if torch has a kernel for it. They accept contiguous activations, where
every (n, c) is a row, and channels_last ones, of any rank; `to_supported_layout` copies others, as `F.batch_norm` does.
The plain passes consist of elementary operators, for devices with other kernels. Tables are (N, C), in float32 or
wider.

`torch.var_mean` is not used on CPU: it takes ten times as long as the kernel of group normalization.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normswap.layers.backends import reference
from normswap.layers.backends.reference import Moments, accumulation_dtype

# This form writes into given memory; torch's annotations lack it.
_BATCH_NORM_INTO: Any = torch.native_batch_norm
_BATCH_NORM_BACKWARD = torch.ops.aten.native_batch_norm_backward.default
_SUMS_OUTPUT_MASK = [False, True, True]


# --- layouts


def to_supported_layout(x: Tensor) -> Tensor:
    """Return x if it is contiguous or channels_last, else a copy that is."""
    if x.is_contiguous() or is_channels_last(x):
        return x
    return x.contiguous(memory_format=torch._prims_common.suggest_memory_format(x))


def is_channels_last(x: Tensor) -> bool:
    """Return whether x (4-D or 5-D) is channels_last and not also contiguous."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()


def match_layout(gradient: Tensor, x: Tensor) -> Tensor:
    """Return `gradient` in the layout of x, which is contiguous or channels_last."""
    if not is_channels_last(x):
        return gradient.contiguous()
    return gradient.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def broadcast_over_positions(table: Tensor, x: Tensor) -> Tensor:
    """Return a table (N, C) with dimensions of size 1 for the positions of x."""
    return table.view(*table.shape, *(1,) * (x.dim() - 2))


def _as_rows(x: Tensor) -> Tensor:
    """View a contiguous x as one sample of N C channels."""
    return x.view(1, x.shape[0] * x.shape[1], -1)


def _split_samples(x: Tensor) -> tuple[Tensor, ...]:
    """View x as batches of one sample."""
    return x.split(1)  # type: ignore[no-untyped-call, no-any-return]


# --- CPU


def instance_moments(x: Tensor) -> tuple[Moments, Tensor | None]:
    """Return the moments (N, C) of x over its positions, and a buffer like x that may be overwritten, if any."""
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    dtype = accumulation_dtype(x)
    if positions == 1:
        mean = x.detach().reshape(samples, channels).to(dtype, copy=True)
        return Moments(mean, torch.zeros_like(mean)), None
    if is_channels_last(x):
        return _moments_by_sample(x, channels, dtype), None
    # The kernel returns moments in the dtype of its parameters.
    ones = None if x.dtype == dtype else torch.ones(channels, dtype=dtype, device=x.device)
    buffer, mean, rstd = torch.native_group_norm(x, ones, ones, samples, channels, positions, channels, 0.0)
    var = rstd.mul_(rstd).reciprocal_()
    if x.dtype != dtype:  # in half precision the kernel subtracts squares: if both overflow, the result is NaN
        var = torch.where(var.isnan() & mean.isfinite(), torch.inf, var)
    return Moments(mean, var), buffer


def _moments_by_sample(x: Tensor, channels: int, dtype: torch.dtype) -> Moments:
    # The kernel returns moments in the dtype of the running statistics.
    float32_stats = None if x.dtype == dtype else torch.ones(channels, dtype=dtype, device=x.device)
    moments = [torch.batch_norm_update_stats(sample, float32_stats, float32_stats, 0.0) for sample in _split_samples(x)]
    return Moments(*(torch.stack(values) for values in zip(*moments, strict=True)))


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, *, buffer: Tensor | None = None) -> Tensor:
    """Return scale x + shift, of the dtype and layout of x.

    Args:
        scale, shift: (N, C).
        buffer: memory for the result; None allocates it.
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
    # With mean 0 and variance 1, batch normalization in evaluation computes exactly this, and its kernel is the
    # fastest.
    mean, unused = torch.zeros_like(scale), scale.new_empty(0)
    var = torch.ones_like(scale)
    _BATCH_NORM_INTO(x, scale, shift, mean, var, False, 0.0, 0.0, out=(y, unused, torch.empty_like(unused)))


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over positions of dy and of dy (x - mean) rstd, each (N, C).

    Args:
        dy, x: of one layout.
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
    weight = None if x.dtype == mean.dtype else mean  # the kernel reads only its dtype, for that of the sums
    _, dy_xhat_sum, dy_sum = _BATCH_NORM_BACKWARD(dy, x, weight, None, None, mean, rstd, True, 0.0, _SUMS_OUTPUT_MASK)
    return dy_sum, dy_xhat_sum


def input_gradient(dy: Tensor, x: Tensor, scale: Tensor, slope: Tensor, shift: Tensor, centre: Tensor) -> Tensor:
    """Return scale dy + slope (x - centre) + shift, of the dtype and layout of x; the tables are (N, C)."""
    tables = [broadcast_over_positions(table, x) for table in (scale, slope, shift, centre)]
    dx = torch.empty_like(x)
    if x.dtype == scale.dtype:
        return _input_gradient(dy, x, *tables, out=dx)
    # One sample at a time, so that no activation in float32 is allocated as a whole.
    for out, *sample in zip(dx, dy, x, *tables, strict=True):
        out.copy_(_input_gradient(*sample, out=torch.empty(out.shape, device=x.device)))
    return dx


def _input_gradient(
    dy: Tensor, x: Tensor, scale: Tensor, slope: Tensor, shift: Tensor, centre: Tensor, *, out: Tensor
) -> Tensor:
    # Subtract first: expanded, a mean much larger than the deviation would cancel digits.
    torch.sub(x, centre, out=out)
    return torch.addcmul(shift, out, slope, out=out).addcmul_(dy, scale)


# --- other devices


def plain_instance_moments(x: Tensor) -> tuple[Moments, Tensor | None]:
    """As `instance_moments`, without a buffer."""
    return reference.instance_moments(x.detach()), None


def plain_scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, *, buffer: Tensor | None = None) -> Tensor:
    """As `scale_and_shift`. A half-precision activation exists in float32 during the pass."""
    y = torch.addcmul(broadcast_over_positions(shift, x), x.to(scale.dtype), broadcast_over_positions(scale, x))
    y = y.to(x.dtype)
    return y if buffer is None else buffer.copy_(y)


def plain_gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """As `gradient_sums`. A half-precision activation exists in float32 during the pass."""
    wide, dtype = dy.to(accumulation_dtype(x)), accumulation_dtype(x)
    products = (x.to(dtype) - broadcast_over_positions(mean, x)).mul_(wide)
    dy_sum, dy_xhat_sum = (tensor.reshape(*mean.shape, -1).sum(2) for tensor in (wide, products))
    return dy_sum, dy_xhat_sum * rstd


# --- by device


@dataclass(frozen=True)
class Passes:
    """The passes for one kind of device."""

    instance_moments: Callable[[Tensor], tuple[Moments, Tensor | None]]
    scale_and_shift: Callable[..., Tensor]
    gradient_sums: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


CPU_PASSES = Passes(instance_moments, scale_and_shift, gradient_sums)
PLAIN_PASSES = Passes(plain_instance_moments, plain_scale_and_shift, plain_gradient_sums)


def passes_for(x: Tensor) -> Passes:
    """Return the passes for the device of x."""
    return CPU_PASSES if x.device.type == "cpu" else PLAIN_PASSES
