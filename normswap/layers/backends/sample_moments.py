"""Moments of whole samples, with which the branches `in` and `ln` normalize parts of them."""

from typing import NamedTuple

from torch import Tensor

from normswap.errors import LayerError
from normswap.layers.backends.reference import Moments, accumulation_dtype, pool_moments


class SampleMoments(NamedTuple):
    """Moments of whole samples, which the branches `in` and `ln` use as constants for parts of these samples.

    `normswap.fixed_sample_statistics` measures them, `normswap.switch_norm(sample_moments=)` uses them.

    Attributes:
        mean: (N, C), of every sample and channel over its positions.
        var: (N, C), biased.
        positions: number of spatial positions per sample; with one, `in` has no variance.
        rows: (B,), the sample of each of B parts; None: all parts are of one sample, N = 1.

    Examples:
        >>> import torch, normswap
        >>> image, gate = torch.randn(1, 3, 16, 16), torch.ones(3)
        >>> var, mean = torch.var_mean(image, dim=(2, 3), correction=0)
        >>> moments = normswap.SampleMoments(mean, var, positions=256)
        >>> part = normswap.switch_norm(image[..., :8], gate, gate, sample_moments=moments)
        >>> torch.allclose(part, normswap.switch_norm(image, gate, gate)[..., :8], atol=1e-5)
        True
    """

    mean: Tensor
    var: Tensor
    positions: int
    rows: Tensor | None = None


SampleMoments.__module__ = "normswap"  # not in the body, which a NamedTuple keeps for its fields


class FixedMoments(NamedTuple):
    """Constants for one call of a layer.

    Attributes:
        parts: moments (B, C), or (1, C) for all parts, of `in` and `ln`.
        batch: moments (1, C) of all samples together, of `bn` without running statistics.
        has_one_position: whether the samples have one position, where `in` has no variance.
    """

    parts: Moments
    batch: Moments
    has_one_position: bool


def fix_moments(x: Tensor, moments: SampleMoments, *, is_synchronized: bool) -> FixedMoments:
    """Return the constants for x (B, C, *spatial), on its device and in the dtype of its moments.

    Raises:
        LayerError: the moments do not fit the channels or the batch of x, or several processes share this batch.
    """
    if is_synchronized:
        raise LayerError(
            "fixed sample statistics and a batch that several processes share cannot be combined: set "
            "synchronize=False, or let `bn` use its running statistics with bn_statistics='running'"
        )
    mean, var, positions, rows = moments
    if mean.dim() != 2 or mean.shape != var.shape or mean.shape[1] != x.shape[1]:
        raise LayerError(
            f"sample_moments: expected mean and var of one shape (N, {x.shape[1]}), got {tuple(mean.shape)} and "
            f"{tuple(var.shape)}"
        )
    if mean.shape[0] != 1 if rows is None else len(rows) != x.shape[0]:
        given = "no rows" if rows is None else f"{len(rows)} rows"
        raise LayerError(
            f"sample_moments: got moments of {mean.shape[0]} samples and {given} for a batch of {x.shape[0]}: pass "
            "rows= with the sample of each item of the batch"
        )
    whole = Moments(*(each.to(x.device, accumulation_dtype(x)) for each in (mean, var)))
    parts = whole if rows is None else Moments(*(each[rows.to(each.device)] for each in whole))
    return FixedMoments(parts, pool_moments(whole, 0), positions == 1)
