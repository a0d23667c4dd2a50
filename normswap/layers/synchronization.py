"""Moments of a batch that lies in several processes: one exchange in the forward pass, one in the backward pass.

Every process brings the moments of its part and how many values they are of, also where its part is empty, and pools
all parts in the same order: what comes out is the same in every bit in every process. Parts weigh by their counts, and
pool as the moments of samples do, never as E[x^2] - E[x]^2.

A process that misses an exchange would leave the others waiting. So all of them tell beforehand whether they will come
to a backward pass, and where only some would, every one refuses.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, distributed

from normswap.errors import LayerError
from normswap.layers.moments import Moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Part(NamedTuple):
    """What one process brings: the moments (1, C) of its values and their number per channel, which may be 0; whether
    it records a backward pass, and whether that is to find the gradient of its input.
    """

    moments: Moments
    values: int
    recorded: bool
    wanted: bool


class JointBatch(NamedTuple):
    """What all processes know after the exchange: moments (1, C) of the joint batch, in float64, and the number of its
    values per channel; whether some process wants the gradient of its input, so that all meet again in the backward
    pass.
    """

    moments: Moments
    values: int
    wanted: bool


def processes(group: "ProcessGroup | None") -> int:
    """Return how many processes share `group` (None: all there are); 1 where there is nothing to exchange."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return max(distributed.get_world_size(group), 1)


def join(part: Part, group: "ProcessGroup | None") -> JointBatch:
    """Exchange parts with the processes of `group`; the moments are differentiable by those of `part`.

    Raises:
        LayerError: some process wants the gradient of its input, and another records no backward pass.
    """
    moments = [moment.to(torch.float64).flatten() for moment in part.moments]
    channels = moments[0].numel()
    row = torch.cat([*moments, moments[0].new_tensor([part.values, part.recorded, part.wanted])])
    table = _gather(row.detach(), group)
    told = [[int(entry) for entry in entries] for entries in table[:, 2 * channels :].tolist()]
    wanted = any(wants for *_, wants in told)
    if wanted:
        _refuse_different([bool(recorded) for _, recorded, _ in told])
        # All meet again, whether or not this process has a use for it.
        row = row if row.requires_grad or not torch.is_grad_enabled() else row.requires_grad_()
        table = cast(Tensor, _Tied.apply(row, table, group))
    counts = [values for values, *_ in told]
    return JointBatch(_pool(table, counts, channels), sum(counts), wanted)


def add_up(tensor: Tensor, group: "ProcessGroup | None") -> Tensor:
    """Return the sum of `tensor` over the processes of `group`."""
    total = tensor.contiguous().clone()
    distributed.all_reduce(total, group=group)
    return total


def _gather(row: Tensor, group: "ProcessGroup | None") -> Tensor:
    """Return the rows (K,) of all processes as a table (processes, K)."""
    table = row.new_empty((distributed.get_world_size(group), row.numel()))
    distributed.all_gather([*table.unbind()], row.contiguous(), group=group)
    return table


def _pool(table: Tensor, counts: list[int], channels: int) -> Moments:
    """Return the moments (1, C) of the union of the parts in the rows of `table`."""
    shares = table.new_tensor(counts).unsqueeze(1) / max(sum(counts), 1)
    means, variances = table[:, :channels], table[:, channels : 2 * channels]
    mean = (shares * means).sum(0, keepdim=True)
    return Moments(mean, (shares * (variances + (means - mean).square())).sum(0, keepdim=True))


def _refuse_different(recorded: list[bool]) -> None:
    without = [rank for rank, whether in enumerate(recorded) if not whether]
    if without:
        raise LayerError(
            "synchronized statistics: some process wants the gradient of its input, while that of rank "
            f"{', '.join(map(str, without))} in the group records no backward pass and would leave it waiting: give "
            "all of them the same grad mode and the same requires_grad of parameters, or call eval() where none trains"
        )


# Gathering rows and summing tables down to the own row are each other's transpose: so both are differentiable to any
# order, with an exchange each time.


class _Tied(torch.autograd.Function):
    """A table that was gathered, as a function of the own row."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, table: Tensor, group: "ProcessGroup | None") -> Tensor:
        ctx.group = group
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return cast(Tensor, _OwnRow.apply(gradient, ctx.group)), None, None


class _OwnRow(torch.autograd.Function):
    """The own row of the sum of tables over all processes."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, group: "ProcessGroup | None") -> Tensor:
        ctx.group = group
        return add_up(table, group)[distributed.get_rank(group)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        table = _gather(gradient.detach(), ctx.group)
        return cast(Tensor, _Tied.apply(gradient, table, ctx.group)), None
