"""The algebra of `tables.py` compiled: each of its three functions is one call of C.

On small maps a layer spends more time between its passes than in them. The extension is built when the package is
installed and a compiler is there; without it `AVAILABLE` is false, and `tables.py` does the same.
"""

from typing import Any

import torch
from torch import Tensor

from normswap.layers.mixing import Shares
from normswap.layers.moments import Moments
from normswap.layers.tables import Pulled, Site

_C: Any
try:
    from normswap.layers import _tables as _C  # type: ignore[attr-defined, no-redef]
except ImportError:
    _C = None

AVAILABLE = _C is not None


def scale_and_shift(site: Site) -> tuple[Tensor, Tensor, Moments | None]:
    """As `tables.scale_and_shift`."""
    table = site.moments.mean
    scale, shift = torch.empty_like(table), torch.empty_like(table)
    batch = (
        Moments(table.new_empty(1, table.shape[1]), table.new_empty(1, table.shape[1])) if site.takes_batch else None
    )
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
    means, variances = _C.backward(*_arguments(site), float(positions), *addresses)
    return Pulled(scale, slope, shift, Shares(*means), Shares(*variances), weight, bias)


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
