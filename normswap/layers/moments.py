"""First and second moments of activations, and how they pool.

One pass over the input gives the per-sample, per-channel moments; those of LN and BN are pooled from that
(N, C) table as mean of variances + variance of means: a sum of non-negative terms, never E[x^2] - E[x]^2,
which turns to NaN where the mean is large beside the deviation. All variances are biased (paper, sec. 3).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean and biased variance, of one shape, in float32 or wider."""

    mean: Tensor
    var: Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which moments of `x` are accumulated: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def instance_moments(x: Tensor) -> Moments:
    """Return the moments of x (N, C, *spatial) over its spatial positions, each of shape (N, C)."""
    x = x.to(accumulation_dtype(x))
    if x.dim() == 2:
        return Moments(x, torch.zeros_like(x))
    var, mean = torch.var_mean(x, dim=list(range(2, x.dim())), correction=0)
    return Moments(mean, var)


def pool_moments(moments: Moments, dim: int) -> Moments:
    """Return the moments of the union along `dim` of an (N, C) table, with that axis kept at size 1."""
    mean = moments.mean.mean(dim, keepdim=True)
    var = moments.var.mean(dim, keepdim=True) + moments.mean.var(dim, correction=0, keepdim=True)
    return Moments(mean, var)
