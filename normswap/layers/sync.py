"""Switchable Normalization of a batch that lies in several processes: `bn` moments of all of it, `in` and `ln` local.

The plain formula takes the joint moments as a differentiable function of the local ones. The node keeps what a fused
layer keeps without processes, x and tables, and adds what the joint moments pull to dx: with dmu and dvar of `bn`
summed over all processes and M values a channel in the joint batch,

    dx += dmu / M + 2 dvar (x - mu_bn) / M.

Gradients of weight, bias and gates are those of the local part, to be summed (or averaged) by whoever trains: DDP does.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, distributed

from normswap.errors import LayerError
from normswap.layers.backends import aten_passes, moment_algebra, plain_passes, reference
from normswap.layers.backends.aten_passes import combine, laid_out, laid_out_like
from normswap.layers.backends.interface import Gradients, Inputs, in_dtype_of
from normswap.layers.backends.moment_algebra import Pulled, Site, site_of
from normswap.layers.backends.reference import (
    Moments,
    accumulation_dtype,
    pool_moments,
    switch_norm_reference,
    with_gradient_of,
)
from normswap.layers.gating import gate_gradient, importance_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# MERGED DOC: Moments of a batch that lies in several processes: one exchange in the forward pass, one in the backward pass.


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


class Settled(NamedTuple):
    """The moments (1, C) that the `bn` branch uses, and whether their gradient is that of the joint moments."""

    moments: Moments
    pulls: bool


# From the moments (1, C) of the joint batch and the number of its values per channel: what `bn` uses. It records them,
# and is called before anything is saved for the backward pass.
Settle = Callable[[Moments, int], Settled]


def switch_norm_joint(inputs: Inputs, group: "ProcessGroup | None", settle: Settle, *, fused: bool) -> Tensor:
    """Normalise the part x of the batch that lies in this process; called in every process of `group`.

    Args:
        inputs: without constants. x may be empty.
        fused: by the node of this room; else by the plain formula.

    Raises:
        LayerError: as `synchronization.join`.
    """
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs.tensors)
    if not fused:
        return _formula(inputs, group, settle, recorded=recorded)
    if recorded:
        return cast(Tensor, _Joint.apply(*inputs, group, settle))
    return _normalise(inputs, group, settle, recorded=False, wanted=False).y


# By device; elsewhere plain operators.
_PASSES: Mapping[str, Any] = {"cpu": aten_passes}


def _passes(x: Tensor) -> Any:
    return _PASSES.get(x.device.type, plain_passes)


class _Kept(NamedTuple):
    """What the backward pass reads: moments of x over its positions (N, C), those that `bn` used and the mean of the
    joint batch, both (1, C).
    """

    table: Moments
    used: Moments
    mean: Tensor


class _Normalised(NamedTuple):
    """y; what is kept; the number of values per channel whose moments pull at x, 0 where none do."""

    y: Tensor
    kept: _Kept
    values: int


def _normalise(
    inputs: Inputs, group: "ProcessGroup | None", settle: Settle, *, recorded: bool, wanted: bool
) -> _Normalised:
    x = laid_out(inputs.x)
    by = _passes(x)
    table, buffer = by.instance_moments(x) if x.numel() else (_no_moments(x), None)
    joint = join(Part(_pooled(table), _values(x), recorded, wanted), group)
    batch = _in_dtype(joint.moments, accumulation_dtype(x))
    used, pulls = settle(batch, joint.values)
    kept = _Kept(table, used, batch.mean)
    if x.numel():
        scale, shift, _ = moment_algebra.scale_and_shift(_site(inputs, kept))
        y = by.scale_and_shift(x, scale, shift, buffer=buffer)
    else:
        y = x.clone()
    return _Normalised(y, kept, joint.values if pulls and joint.wanted else 0)


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *values, group, settle = args
        inputs = Inputs(*values)
        done = _normalise(inputs, group, settle, recorded=True, wanted=ctx.needs_input_grad[0])
        # An empty part keeps as many tensors as any: checkpointing runs a segment again until it has as many as it
        # had, and has to get as far in every process.
        ctx.save_for_backward(*inputs.tensors, *done.kept.table, *done.kept.used, done.kept.mean)
        ctx.rest = inputs[len(inputs.tensors) :]
        ctx.values, ctx.group = done.values, group
        return done.y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs = Inputs(*saved[:5], *ctx.rest)
        # Hooks on saved tensors may have laid them out anew.
        mean, var, *used, joint_mean = (tensor.contiguous() for tensor in saved[5:])
        kept = _Kept(Moments(mean, var), Moments(*used), joint_mean)
        wanted = ctx.needs_input_grad[:5]
        rest = (None,) * (len(ctx.rest) + 2)
        if torch.is_grad_enabled():
            return *_differentiable_gradients(dy, inputs, kept.used, ctx.values, ctx.group, wanted), *rest
        found = _gradients(dy, inputs, kept, ctx.values, ctx.group, wanted)
        return *in_dtype_of(found, inputs), *rest


def _gradients(
    dy: Tensor, inputs: Inputs, kept: _Kept, values: int, group: "ProcessGroup | None", wanted: tuple[bool, ...]
) -> Gradients:
    x = laid_out(inputs.x)
    if not x.numel():
        if values:
            add_up(x.new_zeros((2, x.shape[1]), dtype=torch.float64), group)
        return Gradients(*(None if t is None else torch.zeros_like(t) for t in inputs.tensors))
    dy = laid_out_like(dy, x)
    site = _site(inputs, kept)
    mean, rstd = moment_algebra.mean_and_rstd(site)
    plain, scaled = _passes(x).gradient_sums(dy, x, mean, rstd)
    pulled = moment_algebra.pull(site, plain, scaled, x.numel() // plain.numel())
    if values:
        pulled = _with_joint_pull(pulled, plain, scaled * rstd, site, kept.mean, values, group)
    dx = combine(dy, x, pulled.scale, pulled.slope, pulled.shift, kept.table.mean) if wanted[0] else None
    gates = (
        point.new_tensor(gate_gradient(shares, gradient, inputs.mixing))
        for point, shares, gradient in (
            (inputs.mean_point, site.means, pulled.means),
            (inputs.var_point, site.variances, pulled.variances),
        )
    )
    affine = (g if want else None for g, want in zip((pulled.weight, pulled.bias), wanted[3:], strict=True))
    return Gradients(dx, *gates, *affine)


def _with_joint_pull(
    pulled: Pulled,
    plain: Tensor,
    scaled: Tensor,
    site: Site,
    joint_mean: Tensor,
    values: int,
    group: "ProcessGroup | None",
) -> Pulled:
    """Add to dx what the joint moments pull.

    Args:
        plain, scaled: sums over positions of dy and of dy (x - mean) rstd^2, each (N, C).
    """
    local = [
        (pulled.scale * sums).sum(0, dtype=torch.float64) * share if share != 0 else torch.zeros_like(joint_mean[0])
        for sums, share in ((plain, site.means.bn), (scaled, site.variances.bn))
    ]
    p, q = (add_up(torch.stack([t.double() for t in local]), group) / -values).to(plain.dtype)
    away = site.moments.mean - joint_mean
    return pulled._replace(slope=pulled.slope + q, shift=pulled.shift + torch.addcmul(p, away, q))


def _formula(inputs: Inputs, group: "ProcessGroup | None", settle: Settle, *, recorded: bool) -> Tensor:
    """The plain formula, with moments for `bn` that are differentiable through all processes."""
    x, mixing = inputs.x, inputs.mixing
    table = reference.instance_moments(x) if x.numel() else _no_moments(x)
    joint = join(Part(_pooled(table), _values(x), recorded, wanted=recorded and x.requires_grad), group)
    batch = _in_dtype(joint.moments, accumulation_dtype(x))
    used, pulls = settle(Moments(*(moment.detach() for moment in batch)), joint.values)
    if pulls:  # the value of the one, the gradient of the other
        used = Moments(*(with_gradient_of(b, u) for u, b in zip(used, batch, strict=True)))
    if not x.numel():
        for tensor in (*inputs.tensors[1:], *used):
            x = x if tensor is None else x + 0 * tensor.sum().to(x.dtype)
        return x
    means, variances = (importance_weights(point, mixing.gate) for point in (inputs.mean_point, inputs.var_point))
    return switch_norm_reference(
        x, means, variances, inputs.weight, inputs.bias, used, branches=mixing.branches, eps=mixing.eps
    )


def _differentiable_gradients(
    dy: Tensor, inputs: Inputs, used: Moments, values: int, group: "ProcessGroup | None", wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients `wanted`, in the order of `Gradients`, with a graph of their own."""
    with torch.enable_grad():
        # Views: the graph built here ends at them, and not where the caller's graph goes on.
        x, *rest = (None if tensor is None else tensor.view_as(tensor) for tensor in inputs.tensors)
        if values and not wanted[0]:  # nobody asks here, but others do: met at an x of our own
            x = inputs.x.detach().requires_grad_()
        leaves = Inputs._make((x, *rest, *inputs[len(inputs.tensors) :]))
        y = _formula(leaves, group, lambda *_: Settled(used, bool(values)), recorded=True)
        here = (bool(values) or wanted[0], *wanted[1:])
        asked = [leaf for leaf, ask in zip(leaves.tensors, here, strict=True) if ask and leaf is not None]
        found = iter(torch.autograd.grad(y, asked, dy, create_graph=True, allow_unused=True))
        gradients = [next(found) if ask else None for ask in here]
        return tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))


def _site(inputs: Inputs, kept: _Kept) -> Site:
    return site_of(inputs._replace(constants=kept.used), kept.table)


def _values(x: Tensor) -> int:
    """The number of values per channel."""
    return x.numel() // x.shape[1] if x.shape[1] else 0


def _no_moments(x: Tensor) -> Moments:
    """The table of an empty part, as if of one sample, so that it pools as any other; it has no weight."""
    zeros = x.new_zeros((1, x.shape[1]), dtype=accumulation_dtype(x))
    return Moments(zeros, zeros.clone())


def _pooled(table: Moments) -> Moments:
    # In float64, as what is exchanged: tables are small.
    return pool_moments(_in_dtype(table, torch.float64), 0)


def _in_dtype(moments: Moments, dtype: torch.dtype) -> Moments:
    return Moments(*(moment.to(dtype) for moment in moments))
