"""Functional Switchable Normalization: `switch_norm`, in the manner of `torch.nn.functional.batch_norm`.

Checks the tensors, turns gate parameters into importance weights, settles which moments the `bn` branch uses, calls
the backend and records the moments of the batch. Empty batches, single values and single positions are met here,
and so is what a synchronized batch needs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from normswap.errors import LayerError
from normswap.layers.checks import check_tensors, check_update
from normswap.layers.dispatch import compiles_operator, fused_backend, is_jit_traced, runs_now
from normswap.layers.fused import Inputs, Renew, switch_norm_fused
from normswap.layers.importance import (
    BRANCHES,
    BnStatistics,
    Branch,
    Gate,
    check_bn_statistics,
    check_branches,
    check_gate,
    importance_weights,
)
from normswap.layers.joint_batch import Settle, Settled, switch_norm_joint
from normswap.layers.mixing import Mixing
from normswap.layers.moments import Moments, accumulation_dtype
from normswap.layers.operators import switch_norm_operator
from normswap.layers.reference import switch_norm_reference
from normswap.layers.running import is_recomputation, read_running, renew_running, update_running
from normswap.layers.single_position import SiteName, without_instance
from normswap.layers.synchronization import processes
from normswap.layers.vertex import batch_norm, is_batch_norm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
        gate: `"softmax"` (logits) or `"simplex"` (points; see `normswap.layers.importance`).
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
    takes_batch = training and "bn" in branches and bn_statistics != "running"
    if takes_batch and running_mean is not None and running_var is not None:
        check_update(x, running_mean, running_var, num_batches_tracked)
    joint = synchronize and takes_batch and not x.is_meta and processes(process_group) > 1
    if x.numel() == 0 and not joint:
        if training and num_batches_tracked is not None and not is_recomputation():
            num_batches_tracked.add_(1)
        return _empty_output(x, [mean_weight, var_weight, weight, bias])
    values = x.numel() // x.shape[1]
    if x.numel() and values == x.shape[0] and "in" in branches:
        mean_weight, var_weight, branches = without_instance(x, mean_weight, var_weight, gate, branches, site)
        gate = "simplex"
    mixing = Mixing(gate, tuple(branches), eps)
    if joint:
        inputs = Inputs(x, mean_weight, var_weight, weight, bias, None, mixing)
        renews = bn_statistics == "renorm"
        settle = partial(_settle, x, running_mean, running_var, num_batches_tracked, momentum, renews)
        return _switch_norm_joint()(inputs, process_group, settle)
    constants = record = None
    renew: Renew | None = None
    if "bn" in branches:
        constants = _running_moments(x, running_mean, running_var, training and bn_statistics != "running", values)
        if training and constants is None and running_mean is not None and running_var is not None:
            update = running_mean, running_var, num_batches_tracked, momentum, values
            if bn_statistics == "renorm":
                renew = partial(renew_running, *update)
            elif not is_recomputation():
                record = partial(update_running, *update)
    inputs = Inputs(x, mean_weight, var_weight, weight, bias, constants, mixing, renew)
    if runs_now(x) and (backend := fused_backend(x)) and (renew is None or backend.renews):
        if constants is not None and _is_fixed_batch_norm(mean_weight, var_weight, mixing):
            return batch_norm(x, weight, bias, constants, eps)
        return switch_norm_fused(backend, inputs, record)
    if renew is None and compiles_operator(x):
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
        record=record if renew is None else renew,
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
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, batch_wanted: bool, values: int
) -> Moments | None:
    """The constants for the `bn` branch, or None where it takes the moments of the batch."""
    tracked = running_mean is not None and running_var is not None
    if values == 1 and not tracked:
        raise LayerError(
            f"expected more than 1 value per channel for the moments of a batch, got an input of shape "
            f"{tuple(x.shape)} and no running statistics: give the layer track_running_stats=True or drop `bn`"
        )
    if not tracked or (batch_wanted and values > 1):
        return None
    # Copies where a backward pass may follow: an update in between must not change what was used. A trace is the same
    # graph with gradients and without, which torch.jit.trace checks.
    copy = torch.is_grad_enabled() or is_jit_traced()
    return read_running(running_mean, running_var, accumulation_dtype(x), copy=copy)  # type: ignore[arg-type]


_outside_graphs: list[Callable[..., Tensor]] = []


def _switch_norm_joint() -> Callable[..., Tensor]:
    """What normalises where the batch is synchronized; for compilers a function that they leave as it is."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return _normalise_joint
    if not _outside_graphs:  # made at first use, since it imports the compiler
        disable: Any = torch.compiler.disable
        _outside_graphs.append(disable(_normalise_joint, reason="statistics are synchronized"))
    return _outside_graphs[0]


def _normalise_joint(inputs: Inputs, group: "ProcessGroup | None", settle: Settle) -> Tensor:
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
    return switch_norm_joint(inputs, group, settle, fused=runs_now(x) and fused_backend(x) is not None)


def _settle(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    count: Tensor | None,
    momentum: float,
    renews: bool,
    batch: Moments,
    values: int,
) -> Settled:
    """What the `bn` branch uses of a joint batch with so many values per channel, which is recorded."""
    if values == 0:
        if count is not None and not is_recomputation():
            count.add_(1)
        return Settled(batch, pulls=False)
    constants = _running_moments(x, running_mean, running_var, True, values)
    if constants is not None:
        # Copies: an update before the backward pass must not change what was used.
        return Settled(Moments(*(moment.clone() for moment in constants)), pulls=False)
    if running_mean is None or running_var is None:
        return Settled(batch, pulls=True)
    if renews:
        return Settled(renew_running(running_mean, running_var, count, momentum, values, batch), pulls=True)
    if not is_recomputation():
        update_running(running_mean, running_var, count, momentum, values, batch)
    return Settled(batch, pulls=True)
