"""Functional Switchable Normalization: `switch_norm`, in the manner of `torch.nn.functional.batch_norm`.

Checks the tensors, turns gate parameters into importance weights, settles which moments the `bn` branch uses, calls
the backend and records the moments of the batch. Empty batches, single values and single positions are met here,
and so is what a synchronized batch needs.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from normswap.errors import LayerError
from normswap.layers.backends import cpu
from normswap.layers.backends.custom_ops import switch_norm_operator
from normswap.layers.backends.interface import (
    Inputs,
    RunningStatsUpdate,
    check_tensors,
    check_update,
    switch_norm_fused,
)
from normswap.layers.backends.reference import (
    Moments,
    accumulation_dtype,
    batch_norm,
    is_batch_norm,
    switch_norm_reference,
)
from normswap.layers.backends.selection import can_read_values, fused_backend, is_eager, is_jit_tracing, needs_custom_op
from normswap.layers.gating import (
    BRANCHES,
    BnStatistics,
    Branch,
    Gate,
    Mixing,
    check_bn_statistics,
    check_branches,
    check_gate,
    importance_weights,
    read_weights,
)
from normswap.layers.sync import BnMoments, BnMomentsCallback, process_count, switch_norm_synchronized

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# MERGED DOC: Calls with one spatial position per channel, where `in` has no variance: another branch takes its weight.

# MERGED DOC: Running statistics: a batch recorded in them, and what the `bn` branch reads of them, once per batch.


_site_counter = itertools.count()


class SiteName(NamedTuple):
    """What a warning calls a layer, and a number that tells layers of the same name apart."""

    name: str
    number: int


def new_site_name(name: str) -> SiteName:
    """Return a name that no other layer of this process has; copies of the layer share it."""
    return SiteName(name, next(_site_counter))


def redistribute_instance_weight(
    x: Tensor, mean_weight: Tensor, var_weight: Tensor, gate: Gate, branches: Sequence[Branch], site: SiteName | None
) -> tuple[Tensor, Tensor, tuple[Branch, ...]]:
    """Return simplex points (K - 1,) for the branches beside `in`, which are returned third.

    The weight of `in` goes to `ln` if that is among them, else to `bn`.

    Args:
        x: fed to a layer with the gate parameters (K,) `mean_weight` and `var_weight`.
        site: warned of once if `in` has weight, or if reading the weights would wait for a device or break a graph.

    Raises:
        LayerError: `in` is the only branch.
    """
    remaining_branches = tuple(branch for branch in branches if branch != "in")
    if not remaining_branches:
        raise LayerError(
            f"one spatial position per channel (input of shape {tuple(x.shape)}) leaves the `in` branch no variance, "
            "and there is no other one: build the layer with branches=('ln', 'bn'), or plan with an input of the real "
            "size"
        )
    recipient: Branch = "ln" if "ln" in remaining_branches else "bn"
    if site is not None:
        _warn(x, (mean_weight, var_weight), gate, branches.index("in"), recipient, site)
    weights = importance_weights(torch.stack((mean_weight, var_weight)), gate)
    others = [weights[:, branches.index(branch)] for branch in remaining_branches if branch != recipient]
    # What the others leave: so a weight of exactly 0 or 1 stays one.
    rest = 1 - torch.stack(others).sum(0) if others else 1 + 0 * weights.sum(1)
    remaining_weights = iter(others)
    points = torch.stack(
        [rest if branch == recipient else next(remaining_weights) for branch in remaining_branches], dim=1
    )
    return points[0], points[1], remaining_branches


def _warn(
    x: Tensor, gates: tuple[Tensor, Tensor], gate: Gate, instance_index: int, recipient: Branch, site: SiteName
) -> None:
    if torch.compiler.is_compiling():
        if not torch.compiler.is_exporting():
            _warn_once(*site, recipient)
        return
    if not is_eager(x) or site in _warned:
        return
    if not all(can_read_values(point) for point in gates) or any(
        read_weights(point, gate)[instance_index] != 0 for point in gates
    ):
        _warn_once(*site, recipient)


_warned: set[SiteName] = set()


def _warn_once(name: str, number: int, recipient: Branch) -> bool:
    """Warn of a site, once; a compiler calls this while it traces, with what is constant."""
    site = SiteName(name, number)
    if site not in _warned:
        _warned.add(site)
        warnings.warn(
            f"{name} is fed one spatial position per channel, where `in` has no variance: in such calls the weight of "
            f"`in` goes to `{recipient}`, and parameters stay as they are. To leave `in` out, convert with an example input "
            "of the real size",
            stacklevel=2,
        )
    return True


# The mark that `torch.compiler.assume_constant_result` sets, which would import the compiler for everyone.
_marked: Any = _warn_once
_marked._dynamo_marked_constant = True


def update_running(
    running_mean: Tensor, running_var: Tensor, count: Tensor | None, momentum: float, values: int, batch: Moments
) -> None:
    """Record the moments (1, C) of a batch of `values` values per channel in place; the variance is stored unbiased."""
    unbiased = values / (values - 1)
    if is_eager(batch.mean) and cpu.record(batch, running_mean, running_var, count, momentum=momentum, factor=unbiased):
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


def update_and_read_running(
    running_mean: Tensor, running_var: Tensor, count: Tensor | None, momentum: float, values: int, batch: Moments
) -> Moments:
    """Record a batch as `update_running`, unless this is a recomputation; return the statistics, (1, C) each.

    A channel whose running statistics normalise nothing (NaN, an infinite mean, a negative variance) keeps those of the
    batch, as BN does in training: an output that is not finite would spread to every gate.

    In a graph that is compiled this is one opaque node, which asks anew at each run whether it is a recomputation.
    """
    arguments = running_mean, running_var, count, momentum, values
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return Moments(*_update_and_read(*arguments, *(moment.detach() for moment in batch)))
    if not is_recomputation():
        update_running(*arguments, batch)
    updated = read_running(running_mean, running_var, batch.mean.dtype, copy=True)
    is_valid = updated.mean.isfinite() & (updated.var >= 0)
    return Moments(*(torch.where(is_valid, new, own.detach()) for new, own in zip(updated, batch, strict=True)))


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
def _update_and_read(
    running_mean: Tensor,
    running_var: Tensor,
    count: Tensor | None,
    momentum: float,
    values: int,
    mean: Tensor,
    var: Tensor,
) -> tuple[Tensor, Tensor]:
    return tuple(update_and_read_running(running_mean, running_var, count, momentum, values, Moments(mean, var)))  # type: ignore[return-value]


@_update_and_read.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    *_, mean, var = arguments
    return torch.empty_like(mean), torch.empty_like(var)


def switch_norm(
    x: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    gate: Gate = "softmax",
    branches: Sequence[Branch] = BRANCHES,
    bn_statistics: BnStatistics = "batch",
    num_batches_tracked: Tensor | None = None,
    synchronize: bool = False,
    process_group: "ProcessGroup | None" = None,
    site: SiteName | None = None,
) -> Tensor:
    """Apply Switchable Normalization (Luo et al., ICLR 2019, eq. 3), in the manner of `F.batch_norm`.

    Args:
        x: (N, C, *spatial), of any floating dtype; moments are accumulated in float32 or wider.
        mean_weight, var_weight: gate parameters (K,), one entry per branch.
        running_mean, running_var: (C,), updated in place in training unless `bn_statistics="running"`; the
            variance is stored unbiased. None: the `bn` branch always takes the moments of the batch. A forward pass
            that a backward pass runs is a recomputation (activation checkpointing) and updates nothing.
        weight, bias: (C,) or None.
        training: take (and record) the moments of the batch in the `bn` branch.
        momentum: share of the new moments in the running ones.
        eps: added to the variance.
        gate: `"softmax"` (logits) or `"simplex"` (points; see `normswap.layers.gating`).
        branches: which statistics are mixed, in the order of the gate parameters' entries.
        bn_statistics: `"batch"`; or `"running"` to use running statistics as constants in training too; or `"renorm"`
            to use the values of the running statistics just updated, with the gradients of `"batch"`.
        num_batches_tracked: a count, one higher after each update of the running statistics and each empty batch.
        synchronize: in training, take as the batch of the `bn` branch that of all processes, forward and backward,
            also where the part of one is empty. Every one has to call this then. Statistics of `in` and `ln` are local,
            and gradients of parameters those of the local part.
        process_group: the processes that share their batch; default all there are.
        site: what layers say of themselves for warnings. Without it nothing warns.

    Returns:
        A tensor of the shape, dtype and memory format of x. With one spatial position `in` has no variance: for that
        call its weight goes to `ln`, or to `bn` if there is no `ln`, and gates get the gradients of that mixture.
        With one value per channel in training, where `F.batch_norm` raises, the `bn` branch uses the running
        statistics and updates nothing.

    Raises:
        LayerError: an unknown option; x is not floating or has no channels; a tensor has another length than the
            channels of x or the branches, is not floating, or is on another device; running statistics that training
            updates share memory, or a transform of `torch.func` forbids the update; `in` is the only branch and there
            is one spatial position; the `bn` branch has neither running statistics nor more than one value per channel;
            `synchronize` meets several processes and a transformed, traced or fake x, or processes of which only some
            record a backward pass.
    """
    check_gate(gate)
    check_bn_statistics(bn_statistics)
    if branches != BRANCHES:
        check_branches(branches)
    check_tensors(x, (mean_weight, var_weight), len(branches), (running_mean, running_var, weight, bias))
    uses_batch_moments = training and "bn" in branches and bn_statistics != "running"
    if uses_batch_moments and running_mean is not None and running_var is not None:
        check_update(x, running_mean, running_var, num_batches_tracked)
    is_synchronized = synchronize and uses_batch_moments and not x.is_meta and process_count(process_group) > 1
    if x.numel() == 0 and not is_synchronized:
        if training and num_batches_tracked is not None and not is_recomputation():
            num_batches_tracked.add_(1)
        return _empty_output(x, [mean_weight, var_weight, weight, bias])
    values = x.numel() // x.shape[1]
    if x.numel() and values == x.shape[0] and "in" in branches:
        mean_weight, var_weight, branches = redistribute_instance_weight(
            x, mean_weight, var_weight, gate, branches, site
        )
        gate = "simplex"
    mixing = Mixing(gate, tuple(branches), eps)
    if is_synchronized:
        inputs = Inputs(x, mean_weight, var_weight, weight, bias, None, mixing)
        renorm = bn_statistics == "renorm"
        bn_moments_callback = partial(
            _synchronized_bn_moments, x, running_mean, running_var, num_batches_tracked, momentum, renorm
        )
        return _synchronized_implementation()(inputs, process_group, bn_moments_callback)
    constants = record = None
    running_stats_update: RunningStatsUpdate | None = None
    if "bn" in branches:
        constants = _running_moments(x, running_mean, running_var, training and bn_statistics != "running", values)
        if training and constants is None and running_mean is not None and running_var is not None:
            update = running_mean, running_var, num_batches_tracked, momentum, values
            if bn_statistics == "renorm":
                running_stats_update = partial(update_and_read_running, *update)
            elif not is_recomputation():
                record = partial(update_running, *update)
    inputs = Inputs(x, mean_weight, var_weight, weight, bias, constants, mixing, running_stats_update)
    if is_eager(x) and (backend := fused_backend(x)) and (running_stats_update is None or backend.renorm):
        if constants is not None and _is_fixed_batch_norm(mean_weight, var_weight, mixing):
            return batch_norm(x, weight, bias, constants, eps)
        return switch_norm_fused(backend, inputs, record)
    if running_stats_update is None and needs_custom_op(x):
        return switch_norm_operator(inputs, record)
    means, variances = importance_weights(torch.stack((mean_weight, var_weight)), gate).unbind()
    return switch_norm_reference(
        x,
        means,
        variances,
        weight,
        bias,
        constants,
        branches=branches,
        eps=eps,
        record=record if running_stats_update is None else running_stats_update,
    )


def _empty_output(x: Tensor, parameters: list[Tensor | None]) -> Tensor:
    """An empty y that still reaches every parameter, so that each has a zero gradient as in `F.batch_norm`."""
    y = x.clone()
    for parameter in parameters:
        if parameter is not None:
            y = y + 0 * parameter.sum().to(x.dtype)
    return y


def _is_fixed_batch_norm(mean_weight: Tensor, var_weight: Tensor, mixing: Mixing) -> bool:
    """Whether the site is exactly BN and no gradient asks what another mix would do; only where that costs nothing."""
    gates = (mean_weight, var_weight)
    if torch.is_grad_enabled() and any(gate.requires_grad for gate in gates):
        return False
    return is_batch_norm(gates, mixing)


def _running_moments(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, use_batch_moments: bool, values: int
) -> Moments | None:
    """The constants for the `bn` branch, or None where it takes the moments of the batch."""
    has_running_stats = running_mean is not None and running_var is not None
    if values == 1 and not has_running_stats:
        raise LayerError(
            f"expected more than 1 value per channel for the moments of a batch, got an input of shape "
            f"{tuple(x.shape)} and no running statistics: give the layer track_running_stats=True or drop `bn`"
        )
    if not has_running_stats or (use_batch_moments and values > 1):
        return None
    # Copies where a backward pass may follow: an update in between must not change what was used. A trace is the same
    # graph with gradients and without, which torch.jit.trace checks.
    copy = torch.is_grad_enabled() or is_jit_tracing()
    return read_running(running_mean, running_var, accumulation_dtype(x), copy=copy)  # type: ignore[arg-type]


_graph_break_functions: list[Callable[..., Tensor]] = []


def _synchronized_implementation() -> Callable[..., Tensor]:
    """What normalises where the batch is synchronized; for compilers a function that they leave as it is."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return _normalise_synchronized
    if not _graph_break_functions:  # made at first use, since it imports the compiler
        disable: Any = torch.compiler.disable
        _graph_break_functions.append(disable(_normalise_synchronized, reason="statistics are synchronized"))
    return _graph_break_functions[0]


def _normalise_synchronized(
    inputs: Inputs, group: "ProcessGroup | None", bn_moments_callback: BnMomentsCallback
) -> Tensor:
    """Normalise x, the part of a joint batch, if it has values to exchange."""
    x = inputs.x
    if (
        isinstance(x, FakeTensor)
        or torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    ):
        raise LayerError(
            "synchronized statistics: in training they need real values in every process, and there are none under "
            "torch.export, torch.func, torch.jit.trace, forward-mode derivatives or with fake tensors: call eval() "
            "first, or set synchronize=False"
        )
    return switch_norm_synchronized(
        inputs, group, bn_moments_callback, fused=is_eager(x) and fused_backend(x) is not None
    )


def _synchronized_bn_moments(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    count: Tensor | None,
    momentum: float,
    renorm: bool,
    batch: Moments,
    values: int,
) -> BnMoments:
    """What the `bn` branch uses of a joint batch with so many values per channel, which is recorded."""
    if values == 0:
        if count is not None and not is_recomputation():
            count.add_(1)
        return BnMoments(batch, is_differentiable=False)
    constants = _running_moments(x, running_mean, running_var, True, values)
    if constants is not None:
        # Copies: an update before the backward pass must not change what was used.
        return BnMoments(Moments(*(moment.clone() for moment in constants)), is_differentiable=False)
    if running_mean is None or running_var is None:
        return BnMoments(batch, is_differentiable=True)
    if renorm:
        return BnMoments(
            update_and_read_running(running_mean, running_var, count, momentum, values, batch), is_differentiable=True
        )
    if not is_recomputation():
        update_running(running_mean, running_var, count, momentum, values, batch)
    return BnMoments(batch, is_differentiable=True)
