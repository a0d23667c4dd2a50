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
from normswap.layers.backends.interface import Inputs, Renew, check_tensors, check_update, switch_norm_fused
from normswap.layers.backends.reference import (
    Moments,
    accumulation_dtype,
    batch_norm,
    is_batch_norm,
    switch_norm_reference,
)
from normswap.layers.backends.selection import can_read, compiles_operator, fused_backend, is_jit_traced, runs_now
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
from normswap.layers.sync import Settle, Settled, processes, switch_norm_joint

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# MERGED DOC: Calls with one spatial position per channel, where `in` has no variance: another branch takes its weight.

# MERGED DOC: Running statistics: a batch recorded in them, and what the `bn` branch reads of them, once per batch.


_numbers = itertools.count()


class SiteName(NamedTuple):
    """What a warning calls a layer, and a number that tells layers of the same name apart."""

    name: str
    number: int


def new_site_name(name: str) -> SiteName:
    """Return a name that no other layer of this process has; copies of the layer share it."""
    return SiteName(name, next(_numbers))


def without_instance(
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
    left = tuple(branch for branch in branches if branch != "in")
    if not left:
        raise LayerError(
            f"one spatial position per channel (input of shape {tuple(x.shape)}) leaves the `in` branch no variance, "
            "and there is no other one: build the layer with branches=('ln', 'bn'), or plan with an input of the real "
            "size"
        )
    heir: Branch = "ln" if "ln" in left else "bn"
    if site is not None:
        _warn(x, (mean_weight, var_weight), gate, branches.index("in"), heir, site)
    weights = importance_weights(torch.stack((mean_weight, var_weight)), gate)
    others = [weights[:, branches.index(branch)] for branch in left if branch != heir]
    # What the others leave: so a weight of exactly 0 or 1 stays one.
    rest = 1 - torch.stack(others).sum(0) if others else 1 + 0 * weights.sum(1)
    taken = iter(others)
    points = torch.stack([rest if branch == heir else next(taken) for branch in left], dim=1)
    return points[0], points[1], left


def _warn(x: Tensor, gates: tuple[Tensor, Tensor], gate: Gate, place: int, heir: Branch, site: SiteName) -> None:
    if torch.compiler.is_compiling():
        if not torch.compiler.is_exporting():
            _warn_once(*site, heir)
        return
    if not runs_now(x) or site in _warned:
        return
    if not all(can_read(point) for point in gates) or any(read_weights(point, gate)[place] != 0 for point in gates):
        _warn_once(*site, heir)


_warned: set[SiteName] = set()


def _warn_once(name: str, number: int, heir: Branch) -> bool:
    """Warn of a site, once; a compiler calls this while it traces, with what is constant."""
    site = SiteName(name, number)
    if site not in _warned:
        _warned.add(site)
        warnings.warn(
            f"{name} is fed one spatial position per channel, where `in` has no variance: in such calls the weight of "
            f"`in` goes to `{heir}`, and parameters stay as they are. To leave `in` out, convert with an example input "
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
    if runs_now(batch.mean) and cpu.record(batch, running_mean, running_var, count, momentum=momentum, factor=unbiased):
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
