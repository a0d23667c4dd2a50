"""The algebra of `tables.py` compiled, each function one call of C; on small maps the passes around it too.

On small maps a layer spends more time between its passes than in them. The extension is built when the package is
installed and a compiler is there; without it `AVAILABLE` is false, and `tables.py` and `passes.py` do the same.
"""

from typing import Any

import torch
from torch import Tensor

from normswap.layers.mixing import Shares
from normswap.layers.moments import Moments
from normswap.layers.passes import is_channels_last
from normswap.layers.tables import Pulled, Site

_C: Any
try:
    from normswap.layers import _compiled as _C  # type: ignore[attr-defined, no-redef]
except ImportError:
    _C = None

AVAILABLE = _C is not None

# Up to so many values over the number of threads, one thread here beats them all in torch's kernels.
_SMALL = 1 << 21


def serves(x: Tensor) -> bool:
    """Say whether the algebra for x can be done here."""
    return AVAILABLE and x.device.type == "cpu"


def serves_whole(x: Tensor) -> bool:
    """Say whether `normalise` and `differentiate` do all there is to do for x."""
    if not serves(x) or x.dtype not in (torch.float32, torch.float64):
        return False
    threads = torch.get_num_threads()
    return threads == 1 or x.numel() * threads <= _SMALL


def normalise(x: Tensor, site: Site) -> tuple[Tensor, Moments | None]:
    """Return y and the moments (1, C) that `bn` took from the batch; the moments of `site` (N, C) are written."""
    y, batch = torch.empty_like(x), _room_for_batch(site)
    layout = x.numel() // site.moments.mean.numel(), is_channels_last(x)
    _C.normalise(*_arguments(site), *layout, x.data_ptr(), y.data_ptr(), *_addresses(batch))
    return y, batch


def differentiate(
    dy: Tensor, x: Tensor, site: Site, *, wanted: bool
) -> tuple[Tensor | None, Shares, Shares, Tensor, Tensor]:
    """Return the gradients of x (if `wanted`), the shares of means and variances, weight (C,) and bias (C,)."""
    table = site.moments.mean
    weight, bias = table.new_empty(table.shape[1]), table.new_empty(table.shape[1])
    dx = torch.empty_like(x) if wanted else None
    tensors = (dy.data_ptr(), x.data_ptr(), 0 if dx is None else dx.data_ptr(), weight.data_ptr(), bias.data_ptr())
    layout = x.numel() // table.numel(), is_channels_last(x)
    means, variances = _C.differentiate(*_arguments(site), *layout, *tensors)
    return dx, Shares(*means), Shares(*variances), weight, bias


def scale_and_shift(site: Site) -> tuple[Tensor, Tensor, Moments | None]:
    """As `tables.scale_and_shift`."""
    table = site.moments.mean
    scale, shift = torch.empty_like(table), torch.empty_like(table)
    batch = _room_for_batch(site)
    _C.scale_and_shift(*_arguments(site), scale.data_ptr(), shift.data_ptr(), *_addresses(batch))
    return scale, shift, batch


def mean_and_rstd(site: Site) -> tuple[Tensor, Tensor]:
    """As `tables.mean_and_rstd`."""
    mean, rstd = torch.empty_like(site.moments.mean), torch.empty_like(site.moments.mean)
    _C.mean_and_rstd(*_arguments(site), mean.data_ptr(), rstd.data_ptr())
    return mean, rstd


def pull(site: Site, plain: Tensor, scaled: Tensor, positions: int) -> Pulled:
    """As `tables.pull`."""
    table = site.moments.mean
    plain, scaled = plain.contiguous(), scaled.contiguous()
    scale, slope, shift = torch.empty_like(table), torch.empty_like(table), torch.empty_like(table)
    weight, bias = table.new_empty(table.shape[1]), table.new_empty(table.shape[1])
    tensors = (plain, scaled, scale, slope, shift, weight, bias)
    addresses = (tensor.data_ptr() for tensor in tensors)
    means, variances = _C.pull(*_arguments(site), float(positions), *addresses)
    return Pulled(scale, slope, shift, Shares(*means), Shares(*variances), weight, bias)


def _room_for_batch(site: Site) -> Moments | None:
    table = site.moments.mean
    return Moments(torch.empty_like(table[:1]), torch.empty_like(table[:1])) if site.takes_batch else None


def _arguments(site: Site) -> tuple[Any, ...]:
    """What every function of the extension is given first."""
    mean, var = site.moments
    return (
        mean.dtype == torch.float64,
        *mean.shape,
        mean.data_ptr(),
        var.data_ptr(),
        *_addresses(site.constants),
        0 if site.weight is None else site.weight.data_ptr(),
        0 if site.bias is None else site.bias.data_ptr(),
        *site.means,
        *site.variances,
        site.mixing.eps,
    )


def _addresses(moments: Moments | None) -> tuple[int, int]:
    return (0, 0) if moments is None else (moments.mean.data_ptr(), moments.var.data_ptr())
