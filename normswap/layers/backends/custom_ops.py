"""Operators of torch for compiled graphs, and the update of running statistics.

On CPU, and if a fused backend is forced around the compiled call, a compiler gets one node `normswap::switch_norm` and
its backward `normswap::switch_norm_backward` instead of about 150 nodes of the plain formula, each of which it would
trace, differentiate and compile. The operators run the backend of eager mode. They return the moments of the batch;
only `normswap::update_running_stats` and `normswap::project_points` write to their arguments.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from normswap.layers.backends import cpu
from normswap.layers.backends.aten_passes import instance_moments, to_supported_layout
from normswap.layers.backends.cpu import NATIVE
from normswap.layers.backends.interface import (
    Backend,
    Gradients,
    Inputs,
    RunningStats,
    cast_gradients,
    check_gradient,
    check_matching,
    check_tensors,
    differentiable_gradients,
    needs_backward,
)
from normswap.layers.backends.reference import Moments, accumulation_dtype, batch_norm, is_batch_norm
from normswap.layers.backends.selection import fused_backend, is_eager
from normswap.layers.gating import Branch, Gate, Mixing, check_num_groups, project_
from normswap.layers.matching import Matching, matching_for

# The operators accept both layouts, and their fake versions return the layout of the result.
_TAGS = (torch.Tag.flexible_layout,)


# --- the layer


class _Options(NamedTuple):
    """The last arguments of the operators. Defaults: operators accept the calls of early versions."""

    gate: str
    branches: str
    eps: float
    num_groups: int = 1
    ln_mean_shift: Tensor | None = None
    ln_var_scale: Tensor | None = None
    in_var_scale: Tensor | None = None


def switch_norm_operator(inputs: Inputs, on_batch_moments: Callable[[Moments], None] | None = None) -> Tensor:
    """Normalize as one node of a graph; arguments as in `interface.switch_norm_fused`."""
    mixing, constants = inputs.mixing, inputs.constants
    matching = inputs.matching or Matching()
    options = _Options(mixing.gate, " ".join(mixing.branches), mixing.eps, mixing.num_groups, *matching)
    if constants is not None and not needs_backward(inputs):
        return cast(Tensor, _evaluate(*inputs.tensors, *constants, *options))
    y, batch_mean, batch_var, *_ = _forward(*inputs.tensors, *(constants or (None, None)), *options)
    if on_batch_moments is not None:
        on_batch_moments(Moments(batch_mean, batch_var))
    return cast(Tensor, y)


@torch.library.custom_op("normswap::switch_norm_constant", mutates_args=(), tags=_TAGS)
def _evaluate(
    x: Tensor,
    mean_gate: Tensor,
    var_gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bn_mean: Tensor,
    bn_var: Tensor,
    gate: str,
    branches: str,
    eps: float,
    num_groups: int = 1,
    ln_mean_shift: Tensor | None = None,
    ln_var_scale: Tensor | None = None,
    in_var_scale: Tensor | None = None,
) -> Tensor:
    inputs = _inputs(
        (x, mean_gate, var_gate, weight, bias),
        (bn_mean, bn_var),
        _Options(gate, branches, eps, num_groups, ln_mean_shift, ln_var_scale, in_var_scale),
    )
    if is_batch_norm((mean_gate, var_gate), inputs.mixing):
        return batch_norm(x, weight, bias, Moments(bn_mean, bn_var), eps)
    return _backend_for(x).forward(inputs).y


@_evaluate.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(to_supported_layout(x))


@torch.library.custom_op("normswap::switch_norm", mutates_args=(), tags=_TAGS)
def _forward(
    x: Tensor,
    mean_gate: Tensor,
    var_gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bn_mean: Tensor | None,
    bn_var: Tensor | None,
    gate: str,
    branches: str,
    eps: float,
    num_groups: int = 1,
    ln_mean_shift: Tensor | None = None,
    ln_var_scale: Tensor | None = None,
    in_var_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _inputs(
        (x, mean_gate, var_gate, weight, bias),
        (bn_mean, bn_var),
        _Options(gate, branches, eps, num_groups, ln_mean_shift, ln_var_scale, in_var_scale),
    )
    y, batch, saved, _ = _backend_for(x).forward(inputs)
    empty = x.new_empty((1, 0), dtype=accumulation_dtype(x))
    # An operator must not return memory of its arguments; with one position the mean can be x itself.
    mean, var = saved or instance_moments(x)[0]
    return y, *(batch or (empty, empty.clone())), mean.clone(), var


@_forward.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    bn_mean, branches = rest[4], rest[7]
    bn_channels = x.shape[1] if "bn" in branches.split() and bn_mean is None else 0
    batch, table = (x.new_empty(shape, dtype=accumulation_dtype(x)) for shape in ((1, bn_channels), x.shape[:2]))
    return torch.empty_like(to_supported_layout(x)), batch, torch.empty_like(batch), table, torch.empty_like(table)


@torch.library.custom_op("normswap::switch_norm_backward", mutates_args=(), tags=_TAGS)
def _backward(
    dy: Tensor,
    x: Tensor,
    mean_gate: Tensor,
    var_gate: Tensor,
    weight: Tensor | None,
    bn_mean: Tensor | None,
    bn_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gate: str,
    branches: str,
    eps: float,
    num_groups: int = 1,
    ln_mean_shift: Tensor | None = None,
    ln_var_scale: Tensor | None = None,
    in_var_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _inputs(
        (x, mean_gate, var_gate, weight, None),
        (bn_mean, bn_var),
        _Options(gate, branches, eps, num_groups, ln_mean_shift, ln_var_scale, in_var_scale),
    )
    check_gradient(dy, x, mean, var)
    found = _backend_for(x).backward(dy, inputs, Moments(mean, var), (True,) * len(Gradients._fields))
    assert None not in found
    return cast(tuple[Tensor, Tensor, Tensor, Tensor, Tensor], tuple(found))


@_backward.register_fake
def _(dy: Tensor, x: Tensor, mean_gate: Tensor, var_gate: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    mean = rest[3]
    sums = mean.new_empty(mean.shape[1])
    gates = torch.empty_like(mean_gate), torch.empty_like(var_gate)
    return torch.empty_like(to_supported_layout(x)), *gates, sums, torch.empty_like(sums)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, options = inputs[:7], _Options(*inputs[7:])
    ctx.mark_non_differentiable(*output[1:])
    # The constants too: a compiler keeps only tensors that are saved.
    ctx.save_for_backward(*tensors, *output[3:], *options[4:])
    ctx.options = options[:4]


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, mean_gate, var_gate, weight, bias, bn_mean, bn_var, mean, var, *constants = ctx.saved_tensors
    options = _Options(*ctx.options, *constants)
    inputs = _inputs((x, mean_gate, var_gate, weight, bias), (bn_mean, bn_var), options)
    if torch.is_grad_enabled():
        return *differentiable_gradients(dy, inputs, ctx.needs_input_grad[:5]), *_NO_GRADIENTS
    found = _backward(dy, x, mean_gate, var_gate, weight, bn_mean, bn_var, mean, var, *options)
    present = (None if owner is None else gradient for gradient, owner in zip(found, inputs.tensors, strict=True))
    return *cast_gradients(present, inputs.tensors), *_NO_GRADIENTS


_NO_GRADIENTS = (None,) * (2 + len(_Options._fields))  # for constants and options
_forward.register_autograd(_differentiate, setup_context=_save)


def _backend_for(x: Tensor) -> Backend:
    """Return the current backend for x; a backward pass may use another backend than its forward pass."""
    return fused_backend(x) or NATIVE


def _inputs(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    bn_moments: tuple[Tensor | None, Tensor | None],
    options: _Options,
) -> Inputs:
    """Check the arguments of an operator and return them as the backends take them.

    Args:
        tensors: those of `Inputs.tensors`.
        bn_moments: constant moments (1, C) of the `bn` branch, or None.
        options: with branches separated by spaces.
    """
    x, mean_gate, var_gate, weight, bias = tensors
    gate, branches, eps, num_groups, *constants_of_matching = options
    names, matching = cast(tuple[Branch, ...], tuple(branches.split())), Matching(*constants_of_matching)
    mean, var = bn_moments
    flat_mean, flat_var = (None if moment is None else moment.reshape(-1) for moment in bn_moments)
    check_tensors(x, (mean_gate, var_gate), len(names), (flat_mean, flat_var, weight, bias))
    check_num_groups(num_groups, x.shape[1])
    check_matching(x, matching)
    constants = None if mean is None or var is None else Moments(mean, var)
    mixing = Mixing(cast(Gate, gate), names, eps, num_groups)
    return Inputs(*tensors, constants, mixing, None, matching_for(matching, names, accumulation_dtype(x)))


# --- gates


@torch.library.custom_op("normswap::project_points", mutates_args=("points",), device_types="cpu")
def project_points(points: list[Tensor]) -> None:
    """Project simplex points (K,) in place; a point on the simplex is not written."""
    for point in points:
        project_(point)


# --- running statistics


def is_recomputation() -> bool:
    """Return whether a backward pass runs this forward pass, as activation checkpointing does.

    False while a graph is compiled, where it is not known yet.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def update_running(running: RunningStats, values: int, batch: Moments) -> None:
    """Update running statistics in place by the moments (1, C) of a batch with `values` values per channel.

    The running variance is unbiased, as in BatchNorm.
    """
    unbiased = values / (values - 1)
    if is_eager(batch.mean) and cpu.update_running(batch, *running[:3], momentum=running.momentum, var_factor=unbiased):
        return
    mean, var = (moment.detach().squeeze(0) for moment in batch)
    for old, new in ((running.mean, mean), (running.var, var * unbiased)):
        # Not old + momentum (new - old), as BatchNorm: the difference of two infinities is NaN.
        if old.dtype == new.dtype:
            old.mul_(1 - running.momentum).add_(new, alpha=running.momentum)
        else:  # half precision: round once
            old.copy_((old.to(new.dtype) * (1 - running.momentum)).add_(new, alpha=running.momentum))
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(1)


def update_and_read_running(running: RunningStats, values: int, batch: Moments) -> Moments:
    """Update as `update_running`, unless this is a recomputation, and return the running statistics, (1, C) each.

    A channel whose running statistics cannot normalize (NaN, an infinite mean, a negative variance) gets the moments of
    the batch, as BatchNorm does in training: an output that is not finite would spread to every gate.

    In a compiled graph this is one opaque node, which checks at each run whether it is a recomputation.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return Moments(*_update_and_read(*running, values, *(moment.detach() for moment in batch)))
    if not is_recomputation():
        update_running(running, values, batch)
    updated = read_running(running.mean, running.var, batch.mean.dtype, copy=True)
    is_valid = updated.mean.isfinite() & (updated.var >= 0)
    return Moments(*(torch.where(is_valid, new, own.detach()) for new, own in zip(updated, batch, strict=True)))


def read_running(running_mean: Tensor, running_var: Tensor, dtype: torch.dtype, *, copy: bool) -> Moments:
    """Return running statistics (C,) as moments (1, C) of a dtype; with `copy` in memory of their own."""
    return Moments(_as_moment(running_mean, dtype, copy), _as_moment(running_var, dtype, copy))


def _as_moment(statistic: Tensor, dtype: torch.dtype, copy: bool) -> Tensor:
    # An operator takes longer than all checks of a small layer: call only those that change something.
    if copy and statistic.requires_grad:
        statistic = statistic.detach()
    if statistic.dtype == dtype and statistic.is_contiguous():
        moment = statistic.unsqueeze(0)
        return moment.clone() if copy else moment
    return statistic.detach().to(dtype, copy=copy).contiguous().unsqueeze(0)


@torch.library.custom_op("normswap::update_running_stats", mutates_args=("running_mean", "running_var", "count"))
def _update_and_read(
    running_mean: Tensor,
    running_var: Tensor,
    count: Tensor | None,
    momentum: float,
    values: int,
    mean: Tensor,
    var: Tensor,
) -> tuple[Tensor, Tensor]:
    running = RunningStats(running_mean, running_var, count, momentum)
    updated = update_and_read_running(running, values, Moments(mean, var))
    return updated.mean, updated.var


@_update_and_read.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    *_, mean, var = arguments
    return torch.empty_like(mean), torch.empty_like(var)
