"""Switchable Normalization of a batch that several processes share: `bn` moments are joint, `in` and `ln` local.

One exchange in the forward pass pools the moments, one in the backward pass sums their gradients. With dmu and dvar of
`bn` summed over all processes and M values per channel in the joint batch, the joint moments add to the local dx

    dmu / M + 2 dvar (x - mu_bn) / M.

The fused version saves x and tables, as a fused layer of one process does. The plain version takes the joint
moments as a differentiable function of the local ones. Gradients of weight, bias and gates are those of the local part;
the trainer sums or averages them, as DDP does.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, distributed

from normswap.errors import LayerError
from normswap.layers.backends import moment_algebra, reference
from normswap.layers.backends.aten_passes import input_gradient, match_layout, passes_for, to_supported_layout
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


# --- the exchange


class LocalBatch(NamedTuple):
    """The part of the batch in one process.

    Attributes:
        moments: moments (1, C) of its values.
        values: number of values per channel, which can be 0.
        builds_graph: whether the process records a backward pass.
        needs_input_grad: whether that pass computes the gradient of the input.
    """

    moments: Moments
    values: int
    builds_graph: bool
    needs_input_grad: bool


class JointBatch(NamedTuple):
    """The batch of all processes.

    Attributes:
        moments: its moments (1, C), in float64.
        values: number of values per channel.
        needs_input_grad: whether any process computes the gradient of its input; then all exchange in the backward
            pass.
    """

    moments: Moments
    values: int
    needs_input_grad: bool


def process_count(group: "ProcessGroup | None") -> int:
    """Return the number of processes in `group` (None: all); 1 without `torch.distributed`."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return max(distributed.get_world_size(group), 1)


def exchange_moments(local_batch: LocalBatch, group: "ProcessGroup | None") -> JointBatch:
    """Exchange moments with the processes of `group`; the result is differentiable with respect to the local moments.

    Raises:
        LayerError: a process computes the gradient of its input, and another one runs without gradients.
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
        # Every process takes part in the exchange of the backward pass, even if it needs no gradient itself.
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
    """Pool the moments of the processes, one row of `table` each, to (1, C)."""
    fractions = table.new_tensor(counts).unsqueeze(1) / max(sum(counts), 1)
    means, variances = table[:, :channels], table[:, channels : 2 * channels]
    mean = (fractions * means).sum(0, keepdim=True)
    return Moments(mean, (fractions * (variances + (means - mean).square())).sum(0, keepdim=True))


def _require_same_grad_mode(builds_graph: list[bool]) -> None:
    ranks_without_graph = [rank for rank, has_graph in enumerate(builds_graph) if not has_graph]
    if ranks_without_graph:
        is_one = len(ranks_without_graph) == 1
        raise LayerError(
            f"{'Rank' if is_one else 'Ranks'} {', '.join(map(str, ranks_without_graph))} {'runs' if is_one else 'run'} "
            "without gradients while other ranks need them; the all-reduce would deadlock. Use the same grad mode and "
            "the same requires_grad of parameters on every rank, or call eval()."
        )


# Each of the two functions is the transpose of the other, so both are differentiable to any order.


class _GatheredTable(torch.autograd.Function):
    """The gathered table as a function of the local row."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, table: Tensor, group: "ProcessGroup | None") -> Tensor:
        """Return the table."""
        ctx.group = group
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the local row."""
        return cast(Tensor, _LocalRow.apply(gradient, ctx.group)), None, None


class _LocalRow(torch.autograd.Function):
    """The local row of the sum of tables over all processes."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, group: "ProcessGroup | None") -> Tensor:
        """Return the row."""
        ctx.group = group
        return all_reduce_sum(table, group)[distributed.get_rank(group)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the local table."""
        table = _gather(gradient.detach(), ctx.group)
        return cast(Tensor, _GatheredTable.apply(gradient, table, ctx.group)), None


# --- the layer


class BnMoments(NamedTuple):
    """The moments (1, C) of the `bn` branch, and whether they have the gradient of the joint moments."""

    moments: Moments
    is_differentiable: bool


# Takes the moments (1, C) of the joint batch and its number of values per channel, updates the running statistics, and
# returns the moments of the `bn` branch. Called before tensors are saved for the backward pass.
BnMomentsFunction = Callable[[Moments, int], BnMoments]


def switch_norm_synchronized(
    inputs: Inputs, group: "ProcessGroup | None", bn_moments: BnMomentsFunction, *, fused: bool
) -> Tensor:
    """Normalize the local part x of a batch; every process of `group` calls this.

    Args:
        inputs: without constants; x may be empty.
        fused: use fused passes instead of the plain formula.

    Raises:
        LayerError: as `exchange_moments`.
    """
    builds_graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs.tensors)
    if not fused:
        return _plain_formula(inputs, group, bn_moments, builds_graph=builds_graph)
    if builds_graph:
        return cast(Tensor, _SynchronizedFunction.apply(*inputs, group, bn_moments))
    return _normalise(inputs, group, bn_moments, builds_graph=False, needs_input_grad=False).y


class _SavedMoments(NamedTuple):
    """Moments for the backward pass.

    Attributes:
        table: moments (N, C) of x over its positions.
        used: moments (1, C) of the `bn` branch.
        mean: mean (1, C) of the joint batch.
    """

    table: Moments
    used: Moments
    mean: Tensor


class _Normalised(NamedTuple):
    """Results of the forward pass; `values` per channel of the joint batch, 0 if its moments give x no gradient."""

    y: Tensor
    saved: _SavedMoments
    values: int


def _normalise(
    inputs: Inputs,
    group: "ProcessGroup | None",
    bn_moments: BnMomentsFunction,
    *,
    builds_graph: bool,
    needs_input_grad: bool,
) -> _Normalised:
    x = to_supported_layout(inputs.x)
    passes = passes_for(x)
    table, buffer = passes.instance_moments(x) if x.numel() else (_empty_moments(x), None)
    joint = exchange_moments(
        LocalBatch(_pool_in_float64(table), _values_per_channel(x), builds_graph, needs_input_grad), group
    )
    batch = _in_dtype(joint.moments, accumulation_dtype(x))
    used, is_differentiable = bn_moments(batch, joint.values)
    saved = _SavedMoments(table, used, batch.mean)
    if x.numel():
        scale, shift, _ = moment_algebra.scale_and_shift(_site(inputs, saved))
        y = passes.scale_and_shift(x, scale, shift, buffer=buffer)
    else:
        y = x.clone()
    return _Normalised(y, saved, joint.values if is_differentiable and joint.needs_input_grad else 0)


class _SynchronizedFunction(torch.autograd.Function):
    """The fused passes. The backward pass is differentiable by way of the plain formula."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Run the forward pass; `args` are those of `Inputs`, the group and the callback."""
        *values, group, bn_moments = args
        inputs = Inputs(*values)
        done = _normalise(inputs, group, bn_moments, builds_graph=True, needs_input_grad=ctx.needs_input_grad[0])
        # An empty part saves as many tensors as the others. Activation checkpointing runs a segment again until it has
        # this number of tensors, and every process must reach the same exchanges.
        ctx.save_for_backward(*inputs.tensors, *done.saved.table, *done.saved.used, done.saved.mean)
        ctx.rest = inputs[len(inputs.tensors) :]
        ctx.values, ctx.group = done.values, group
        return done.y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `Inputs`."""
        tensors = ctx.saved_tensors
        inputs = Inputs(*tensors[:5], *ctx.rest)
        # Hooks on saved tensors may change the layout.
        mean, var, *used, joint_mean = (tensor.contiguous() for tensor in tensors[5:])
        saved = _SavedMoments(Moments(mean, var), Moments(*used), joint_mean)
        needs_input_grad = ctx.needs_input_grad[:5]
        rest = (None,) * (len(ctx.rest) + 2)
        if torch.is_grad_enabled():
            return *_differentiable_gradients(dy, inputs, saved.used, ctx.values, ctx.group, needs_input_grad), *rest
        found = _gradients(dy, inputs, saved, ctx.values, ctx.group, needs_input_grad)
        return *cast_gradients(found, inputs.tensors), *rest


def _gradients(
    dy: Tensor,
    inputs: Inputs,
    saved: _SavedMoments,
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
    site = _site(inputs, saved)
    mean, rstd = moment_algebra.mean_and_rstd(site)
    dy_sum, dy_xhat_sum = passes_for(x).gradient_sums(dy, x, mean, rstd)
    terms = moment_algebra.backward_terms(site, dy_sum, dy_xhat_sum, x.numel() // dy_sum.numel())
    if values:
        terms = _add_synchronized_terms(
            terms, dy_sum, dy_xhat_sum * rstd, site, joint_mean=saved.mean, values=values, group=group
        )
    dx = input_gradient(dy, x, terms.scale, terms.slope, terms.shift, saved.table.mean) if needs_input_grad[0] else None
    gates = (
        point.new_tensor(gate_gradient(branch_weights, gradient, inputs.mixing))
        for point, branch_weights, gradient in (
            (inputs.mean_gate, site.means, terms.means),
            (inputs.var_gate, site.variances, terms.variances),
        )
    )
    affine = (g if needed else None for g, needed in zip((terms.weight, terms.bias), needs_input_grad[3:], strict=True))
    return Gradients(dx, *gates, *affine)


def _add_synchronized_terms(
    terms: InputGradientTerms,
    dy_sum: Tensor,
    dy_xhat_sum: Tensor,
    site: Site,
    *,
    joint_mean: Tensor,
    values: int,
    group: "ProcessGroup | None",
) -> InputGradientTerms:
    """Add the gradient of the joint moments to the terms of dx.

    Args:
        dy_sum: sums of dy over positions, (N, C).
        dy_xhat_sum: sums of dy (x - mean) rstd^2 over positions, (N, C).
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
    inputs: Inputs, group: "ProcessGroup | None", bn_moments: BnMomentsFunction, *, builds_graph: bool
) -> Tensor:
    """Normalize by the plain formula, with `bn` moments that are differentiable through all processes."""
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
    used, is_differentiable = bn_moments(Moments(*(moment.detach() for moment in batch)), joint.values)
    if is_differentiable:  # the value of `used`, the gradient of `batch`
        used = Moments(*(replace_value(b, u) for u, b in zip(used, batch, strict=True)))
    if not x.numel():
        for tensor in (*inputs.tensors[1:], *used):
            x = x if tensor is None else x + 0 * tensor.sum().to(x.dtype)
        return x
    means, variances = (importance_weights(point, mixing.gate) for point in (inputs.mean_gate, inputs.var_gate))
    return switch_norm_reference(
        x, means, variances, inputs.weight, inputs.bias, used, mixing=mixing, matching=inputs.matching
    )


def _differentiable_gradients(
    dy: Tensor,
    inputs: Inputs,
    used: Moments,
    values: int,
    group: "ProcessGroup | None",
    needs_input_grad: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return gradients that can be differentiated again, in the order of `Gradients`."""
    with torch.enable_grad():
        # Views: the graph that is built here ends at them and does not continue into the caller's graph.
        x, *rest = (None if tensor is None else tensor.view_as(tensor) for tensor in inputs.tensors)
        if values and not needs_input_grad[0]:  # other processes need this exchange: a local leaf makes it happen
            x = inputs.x.detach().requires_grad_()
        leaves = Inputs._make((x, *rest, *inputs[len(inputs.tensors) :]))
        y = _plain_formula(leaves, group, lambda *_: BnMoments(used, bool(values)), builds_graph=True)
        needed_here = (bool(values) or needs_input_grad[0], *needs_input_grad[1:])
        grad_inputs = [leaf for leaf, ask in zip(leaves.tensors, needed_here, strict=True) if ask and leaf is not None]
        found = iter(torch.autograd.grad(y, grad_inputs, dy, create_graph=True, allow_unused=True))
        gradients = [next(found) if ask else None for ask in needed_here]
        return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs_input_grad, strict=True))


def _site(inputs: Inputs, saved: _SavedMoments) -> Site:
    return read_site(inputs._replace(constants=saved.used), saved.table)


def _values_per_channel(x: Tensor) -> int:
    """Return the number of values per channel."""
    return x.numel() // x.shape[1] if x.shape[1] else 0


def _empty_moments(x: Tensor) -> Moments:
    """Return the moments of an empty part as one row of zeros, which pools with weight 0."""
    zeros = x.new_zeros((1, x.shape[1]), dtype=accumulation_dtype(x))
    return Moments(zeros, zeros.clone())


def _pool_in_float64(table: Moments) -> Moments:
    # The exchange is in float64 too; tables are small.
    return pool_moments(_in_dtype(table, torch.float64), 0)


def _in_dtype(moments: Moments, dtype: torch.dtype) -> Moments:
    return Moments(*(moment.to(dtype) for moment in moments))
