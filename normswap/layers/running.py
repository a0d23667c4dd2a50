"""Running statistics: a batch recorded in them, and what the `bn` branch reads of them, once per batch.

Activation checkpointing runs a forward pass again inside the backward pass. F.batch_norm then records the batch a
second time; here nothing is recorded, and the statistics are read as the first pass left them.
"""

from typing import Any

import torch
from torch import Tensor

from normswap.layers import compiled
from normswap.layers.dispatch import runs_now
from normswap.layers.moments import Moments


def update_running(
    running_mean: Tensor, running_var: Tensor, count: Tensor | None, momentum: float, values: int, batch: Moments
) -> None:
    """Record the moments (1, C) of a batch of `values` values per channel in place; the variance is stored unbiased."""
    unbiased = values / (values - 1)
    if runs_now(batch.mean) and compiled.record(
        batch, running_mean, running_var, count, momentum=momentum, factor=unbiased
    ):
        return
    mean, var = (moment.detach().squeeze(0) for moment in batch)
    for running, new in ((running_mean, mean), (running_var, var * unbiased)):
        # As BN moves them, and not by their difference: of two infinite ones there is none.
        if running.dtype == new.dtype:
            running.mul_(1 - momentum).add_(new, alpha=momentum)
        else:  # in half precision: rounded once
            running.copy_((running.to(new.dtype) * (1 - momentum)).add_(new, alpha=momentum))
    if count is not None:
        count.add_(1)


def renew_running(
    running_mean: Tensor, running_var: Tensor, count: Tensor | None, momentum: float, values: int, batch: Moments
) -> Moments:
    """Record a batch as `update_running`, unless this is a recomputation; return the statistics, (1, C) each.

    A channel whose running statistics normalise nothing (NaN, an infinite mean, a negative variance) keeps those of the
    batch, as BN does in training: an output that is not finite would spread to every gate.

    In a graph that is compiled this is one opaque node, which asks anew at each run whether it is a recomputation.
    """
    arguments = running_mean, running_var, count, momentum, values
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return Moments(*_renew(*arguments, *(moment.detach() for moment in batch)))
    if not is_recomputation():
        update_running(*arguments, batch)
    renewed = read_running(running_mean, running_var, batch.mean.dtype, copy=True)
    usable = renewed.mean.isfinite() & (renewed.var >= 0)
    return Moments(*(torch.where(usable, new, own.detach()) for new, own in zip(renewed, batch, strict=True)))


def read_running(running_mean: Tensor, running_var: Tensor, dtype: torch.dtype, *, copy: bool) -> Moments:
    """Return the running statistics as moments (1, C)."""
    mean, var = (
        s.unsqueeze(0)
        if not copy and s.dtype == dtype and s.is_contiguous()
        else s.detach().to(dtype, copy=copy).contiguous().unsqueeze(0)
        for s in (running_mean, running_var)
    )
    return Moments(mean, var)


def is_recomputation() -> bool:
    """Say whether a backward pass runs this forward pass; while a graph is compiled it cannot be told."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.library.custom_op("normswap::renew_running", mutates_args=("running_mean", "running_var", "count"))
def _renew(
    running_mean: Tensor,
    running_var: Tensor,
    count: Tensor | None,
    momentum: float,
    values: int,
    mean: Tensor,
    var: Tensor,
) -> tuple[Tensor, Tensor]:
    return tuple(renew_running(running_mean, running_var, count, momentum, values, Moments(mean, var)))  # type: ignore[return-value]


@_renew.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    *_, mean, var = arguments
    return torch.empty_like(mean), torch.empty_like(var)
