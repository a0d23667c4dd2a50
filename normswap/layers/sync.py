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
from normswap.layers.backends.aten_passes import input_gradient, match_layout, to_supported_layout
from normswap.layers.backends.interface import Gradients, Inputs, cast_gradients
from normswap.layers.backends.moment_algebra import InputGradientTerms, Site, read_site
from normswap.layers.backends.reference import (
    Moments,
    accumulation_dtype,
    pool_moments,
    replace_value,
    switch_norm_reference,
)
from normswap.layers.gating import gate_gradient, importance_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# MERGED DOC: Moments of a batch that lies in several processes: one exchange in the forward pass, one in the backward pass.


class LocalBatch(NamedTuple):
    """What one process brings: the moments (1, C) of its values and their number per channel, which may be 0; whether
    it records a backward pass, and whether that is to find the gradient of its input.
    """

    moments: Moments
    values: int
    builds_graph: bool
    needs_input_grad: bool


class JointBatch(NamedTuple):
    """What all processes know after the exchange: moments (1, C) of the joint batch, in float64, and the number of its
    values per channel; whether some process wants the gradient of its input, so that all meet again in the backward
    pass.
    """

    moments: Moments
    values: int
    needs_input_grad: bool


def process_count(group: "ProcessGroup | None") -> int:
    """Return how many processes share `group` (None: all there are); 1 where there is nothing to exchange."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return max(distributed.get_world_size(group), 1)


def exchange_moments(local_batch: LocalBatch, group: "ProcessGroup | None") -> JointBatch:
    """Exchange parts with the processes of `group`; the moments are differentiable by those of `part`.

    Raises:
        LayerError: some process wants the gradient of its input, and another records no backward pass.
    """
    moments = [moment.to(torch.float64).flatten() for moment in local_batch.moments]
    channels = moments[0].numel()
    row = torch.cat(
        [*moments, moments[0].new_tensor([local_batch.values, local_batch.builds_graph, local_batch.needs_input_grad])]
    )
    table = _gather(row.detach(), group)
    reported = [[int(entry) for entry in entries] for entries in table[:, 2 * channels :].tolist()]
    needs_input_grad = any(needs_grad for *_, needs_grad in reported)
    if needs_input_grad:
        _require_same_grad_mode([bool(builds_graph) for _, builds_graph, _ in reported])
        # All meet again, whether or not this process has a use for it.
        row = row if row.requires_grad or not torch.is_grad_enabled() else row.requires_grad_()
        table = cast(Tensor, _GatheredTable.apply(row, table, group))
    counts = [values for values, *_ in reported]
    return JointBatch(_pool(table, counts, channels), sum(counts), needs_input_grad)


def all_reduce_sum(tensor: Tensor, group: "ProcessGroup | None") -> Tensor:
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
    fractions = table.new_tensor(counts).unsqueeze(1) / max(sum(counts), 1)
    means, variances = table[:, :channels], table[:, channels : 2 * channels]
    mean = (fractions * means).sum(0, keepdim=True)
    return Moments(mean, (fractions * (variances + (means - mean).square())).sum(0, keepdim=True))


def _require_same_grad_mode(builds_graph: list[bool]) -> None:
    ranks_without_graph = [rank for rank, has_graph in enumerate(builds_graph) if not has_graph]
    if ranks_without_graph:
        raise LayerError(
            "synchronized statistics: some process wants the gradient of its input, while that of rank "
            f"{', '.join(map(str, ranks_without_graph))} in the group records no backward pass and would leave it waiting: give "
            "all of them the same grad mode and the same requires_grad of parameters, or call eval() where none trains"
        )


# Gathering rows and summing tables down to the own row are each other's transpose: so both are differentiable to any
# order, with an exchange each time.


class _GatheredTable(torch.autograd.Function):
    """A table that was gathered, as a function of the own row."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, table: Tensor, group: "ProcessGroup | None") -> Tensor:
        ctx.group = group
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return cast(Tensor, _LocalRow.apply(gradient, ctx.group)), None, None


class _LocalRow(torch.autograd.Function):
    """The own row of the sum of tables over all processes."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, group: "ProcessGroup | None") -> Tensor:
        ctx.group = group
        return all_reduce_sum(table, group)[distributed.get_rank(group)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        table = _gather(gradient.detach(), ctx.group)
        return cast(Tensor, _GatheredTable.apply(gradient, table, ctx.group)), None


class BnMoments(NamedTuple):
    """The moments (1, C) that the `bn` branch uses, and whether their gradient is that of the joint moments."""

    moments: Moments
    is_differentiable: bool


# From the moments (1, C) of the joint batch and the number of its values per channel: what `bn` uses. It records them,
# and is called before anything is saved for the backward pass.
BnMomentsCallback = Callable[[Moments, int], BnMoments]


def switch_norm_synchronized(
    inputs: Inputs, group: "ProcessGroup | None", bn_moments_callback: BnMomentsCallback, *, fused: bool
) -> Tensor:
    """Normalise the part x of the batch that lies in this process; called in every process of `group`.

    Args:
        inputs: without constants. x may be empty.
        fused: by the node of this room; else by the plain formula.

    Raises:
        LayerError: as `synchronization.join`.
    """
    builds_graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs.tensors)
    if not fused:
        return _plain_formula(inputs, group, bn_moments_callback, builds_graph=builds_graph)
    if builds_graph:
        return cast(Tensor, _SynchronizedFunction.apply(*inputs, group, bn_moments_callback))
    return _normalise(inputs, group, bn_moments_callback, builds_graph=False, needs_input_grad=False).y


# By device; elsewhere plain operators.
_PASSES_BY_DEVICE: Mapping[str, Any] = {"cpu": aten_passes}


def _passes_for(x: Tensor) -> Any:
    return _PASSES_BY_DEVICE.get(x.device.type, plain_passes)


class _SavedMoments(NamedTuple):
    """What the backward pass reads: moments of x over its positions (N, C), those that `bn` used and the mean of the
    joint batch, both (1, C).
    """

    table: Moments
    used: Moments
    mean: Tensor


class _Normalised(NamedTuple):
    """y; what is kept; the number of values per channel whose moments pull at x, 0 where none do."""

    y: Tensor
    saved_moments: _SavedMoments
    values: int


def _normalise(
    inputs: Inputs,
    group: "ProcessGroup | None",
    bn_moments_callback: BnMomentsCallback,
    *,
    builds_graph: bool,
    needs_input_grad: bool,
) -> _Normalised:
    x = to_supported_layout(inputs.x)
    kernels = _passes_for(x)
    table, buffer = kernels.instance_moments(x) if x.numel() else (_empty_moments(x), None)
    joint = exchange_moments(
        LocalBatch(_pool_in_float64(table), _values_per_channel(x), builds_graph, needs_input_grad), group
    )
    batch = _in_dtype(joint.moments, accumulation_dtype(x))
    used, is_differentiable = bn_moments_callback(batch, joint.values)
    saved_moments = _SavedMoments(table, used, batch.mean)
    if x.numel():
        scale, shift, _ = moment_algebra.scale_and_shift(_site(inputs, saved_moments))
        y = kernels.scale_and_shift(x, scale, shift, buffer=buffer)
    else:
        y = x.clone()
    return _Normalised(y, saved_moments, joint.values if is_differentiable and joint.needs_input_grad else 0)


class _SynchronizedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *values, group, bn_moments_callback = args
        inputs = Inputs(*values)
        done = _normalise(
            inputs, group, bn_moments_callback, builds_graph=True, needs_input_grad=ctx.needs_input_grad[0]
        )
        # An empty part keeps as many tensors as any: checkpointing runs a segment again until it has as many as it
        # had, and has to get as far in every process.
        ctx.save_for_backward(
            *inputs.tensors, *done.saved_moments.table, *done.saved_moments.used, done.saved_moments.mean
        )
        ctx.rest = inputs[len(inputs.tensors) :]
        ctx.values, ctx.group = done.values, group
        return done.y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs = Inputs(*saved[:5], *ctx.rest)
        # Hooks on saved tensors may have laid them out anew.
        mean, var, *used, joint_mean = (tensor.contiguous() for tensor in saved[5:])
        saved_moments = _SavedMoments(Moments(mean, var), Moments(*used), joint_mean)
        needs_input_grad = ctx.needs_input_grad[:5]
        rest = (None,) * (len(ctx.rest) + 2)
        if torch.is_grad_enabled():
            return *_differentiable_gradients(
                dy, inputs, saved_moments.used, ctx.values, ctx.group, needs_input_grad
            ), *rest
        found = _gradients(dy, inputs, saved_moments, ctx.values, ctx.group, needs_input_grad)
        return *cast_gradients(found, inputs), *rest


def _gradients(
    dy: Tensor,
    inputs: Inputs,
    saved_moments: _SavedMoments,
    values: int,
    group: "ProcessGroup | None",
    needs_input_grad: tuple[bool, ...],
) -> Gradients:
    x = to_supported_layout(inputs.x)
    if not x.numel():
        if values:
            all_reduce_sum(x.new_zeros((2, x.shape[1]), dtype=torch.float64), group)
        return Gradients(*(None if t is None else torch.zeros_like(t) for t in inputs.tensors))
    dy = match_layout(dy, x)
    site = _site(inputs, saved_moments)
    mean, rstd = moment_algebra.mean_and_rstd(site)
    dy_sum, dy_xhat_sum = _passes_for(x).gradient_sums(dy, x, mean, rstd)
    terms = moment_algebra.backward_terms(site, dy_sum, dy_xhat_sum, x.numel() // dy_sum.numel())
    if values:
        terms = _add_synchronized_terms(terms, dy_sum, dy_xhat_sum * rstd, site, saved_moments.mean, values, group)
    dx = (
        input_gradient(dy, x, terms.scale, terms.slope, terms.shift, saved_moments.table.mean)
        if needs_input_grad[0]
        else None
    )
    gates = (
        point.new_tensor(gate_gradient(branch_weights, gradient, inputs.mixing))
        for point, branch_weights, gradient in (
            (inputs.mean_point, site.means, terms.means),
            (inputs.var_point, site.variances, terms.variances),
        )
    )
    affine = (g if want else None for g, want in zip((terms.weight, terms.bias), needs_input_grad[3:], strict=True))
    return Gradients(dx, *gates, *affine)


def _add_synchronized_terms(
    terms: InputGradientTerms,
    dy_sum: Tensor,
    dy_xhat_sum: Tensor,
    site: Site,
    joint_mean: Tensor,
    values: int,
    group: "ProcessGroup | None",
) -> InputGradientTerms:
    """Add to dx what the joint moments pull.

    Args:
        plain, scaled: sums over positions of dy and of dy (x - mean) rstd^2, each (N, C).
    """
    local = [
        (terms.scale * sums).sum(0, dtype=torch.float64) * branch_weight
        if branch_weight != 0
        else torch.zeros_like(joint_mean[0])
        for sums, branch_weight in ((dy_sum, site.means.bn), (dy_xhat_sum, site.variances.bn))
    ]
    p, q = (all_reduce_sum(torch.stack([t.double() for t in local]), group) / -values).to(dy_sum.dtype)
    deviation = site.moments.mean - joint_mean
    return terms._replace(slope=terms.slope + q, shift=terms.shift + torch.addcmul(p, deviation, q))


def _plain_formula(
    inputs: Inputs, group: "ProcessGroup | None", bn_moments_callback: BnMomentsCallback, *, builds_graph: bool
) -> Tensor:
    """The plain formula, with moments for `bn` that are differentiable through all processes."""
    x, mixing = inputs.x, inputs.mixing
    table = reference.instance_moments(x) if x.numel() else _empty_moments(x)
    joint = exchange_moments(
        LocalBatch(
            _pool_in_float64(table),
            _values_per_channel(x),
            builds_graph,
            needs_input_grad=builds_graph and x.requires_grad,
        ),
        group,
    )
    batch = _in_dtype(joint.moments, accumulation_dtype(x))
    used, is_differentiable = bn_moments_callback(Moments(*(moment.detach() for moment in batch)), joint.values)
    if is_differentiable:  # the value of the one, the gradient of the other
        used = Moments(*(replace_value(b, u) for u, b in zip(used, batch, strict=True)))
    if not x.numel():
        for tensor in (*inputs.tensors[1:], *used):
            x = x if tensor is None else x + 0 * tensor.sum().to(x.dtype)
        return x
    means, variances = (importance_weights(point, mixing.gate) for point in (inputs.mean_point, inputs.var_point))
    return switch_norm_reference(
        x, means, variances, inputs.weight, inputs.bias, used, branches=mixing.branches, eps=mixing.eps
    )


def _differentiable_gradients(
    dy: Tensor,
    inputs: Inputs,
    used: Moments,
    values: int,
    group: "ProcessGroup | None",
    needs_input_grad: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients `wanted`, in the order of `Gradients`, with a graph of their own."""
    with torch.enable_grad():
        # Views: the graph built here ends at them, and not where the caller's graph goes on.
        x, *rest = (None if tensor is None else tensor.view_as(tensor) for tensor in inputs.tensors)
        if values and not needs_input_grad[0]:  # nobody asks here, but others do: met at an x of our own
            x = inputs.x.detach().requires_grad_()
        leaves = Inputs._make((x, *rest, *inputs[len(inputs.tensors) :]))
        y = _plain_formula(leaves, group, lambda *_: BnMoments(used, bool(values)), builds_graph=True)
        needed_here = (bool(values) or needs_input_grad[0], *needs_input_grad[1:])
        grad_inputs = [leaf for leaf, ask in zip(leaves.tensors, needed_here, strict=True) if ask and leaf is not None]
        found = iter(torch.autograd.grad(y, grad_inputs, dy, create_graph=True, allow_unused=True))
        gradients = [next(found) if ask else None for ask in needed_here]
        return tuple(gradient if want else None for gradient, want in zip(gradients, needs_input_grad, strict=True))


def _site(inputs: Inputs, saved_moments: _SavedMoments) -> Site:
    return read_site(inputs._replace(constants=saved_moments.used), saved_moments.table)


def _values_per_channel(x: Tensor) -> int:
    """The number of values per channel."""
    return x.numel() // x.shape[1] if x.shape[1] else 0


def _empty_moments(x: Tensor) -> Moments:
    """The table of an empty part, as if of one sample, so that it pools as any other; it has no weight."""
    zeros = x.new_zeros((1, x.shape[1]), dtype=accumulation_dtype(x))
    return Moments(zeros, zeros.clone())


def _pool_in_float64(table: Moments) -> Moments:
    # In float64, as what is exchanged: tables are small.
    return pool_moments(_in_dtype(table, torch.float64), 0)


def _in_dtype(moments: Moments, dtype: torch.dtype) -> Moments:
    return Moments(*(moment.to(dtype) for moment in moments))
