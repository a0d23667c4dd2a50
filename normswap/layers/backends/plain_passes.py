"""The passes of `passes.py` out of plain operators, for devices whose kernels those were not chosen for.

Arguments and results are the same; sums are taken in float32 or wider. A half precision activation exists in float32
while a pass runs.
"""

import torch
from torch import Tensor

from normswap.layers.backends import reference
from normswap.layers.backends.aten_passes import broadcast_over_positions
from normswap.layers.backends.reference import Moments, accumulation_dtype


def instance_moments(x: Tensor) -> tuple[Moments, Tensor | None]:
    """Return the moments of x over its spatial positions, (N, C); no buffer is made on the way."""
    return reference.instance_moments(x.detach()), None


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, *, buffer: Tensor | None = None) -> Tensor:
    """Return scale x + shift, of the dtype and layout of x, in the memory of `buffer` where one is given."""
    y = torch.addcmul(broadcast_over_positions(shift, x), x.to(scale.dtype), broadcast_over_positions(scale, x)).to(
        x.dtype
    )
    return y if buffer is None else buffer.copy_(y)


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over positions of dy and of dy (x - mean) rstd, each (N, C)."""
    wide, dtype = dy.to(accumulation_dtype(x)), accumulation_dtype(x)
    dy_xhat_sum = (x.to(dtype) - broadcast_over_positions(mean, x)).mul_(wide)
    dy_sum, dy_xhat_sum = (tensor.reshape(*mean.shape, -1).sum(2) for tensor in (wide, dy_xhat_sum))
    return dy_sum, dy_xhat_sum * rstd
