"""Functional Switchable Normalization: `switch_norm`, with the conventions of `torch.nn.functional.batch_norm`.

It checks the tensors, chooses the moments of the `bn` branch, calls a backend and updates the running statistics. Empty
batches, inputs with one spatial position, and batches that several processes share are special cases here.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from normswap.errors import LayerError
from normswap.layers.backends.custom_ops import (
    is_recomputation,
    read_running,
    switch_norm_operator,
    update_and_read_running,
    update_running,
)
from normswap.layers.backends.interface import (
    Inputs,
    RunningStats,
    RunningStatsUpdate,
    check_matching,
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
from normswap.layers.backends.sample_moments import FixedMoments, SampleMoments, fix_moments
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
    check_num_groups,
    importance_weights,
    read_weights,
)
from normswap.layers.matching import Matching, matching_for
from normswap.layers.sync import BnMoments, BnMomentsFunction, process_count, switch_norm_synchronized

# --- the function


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
    process_group: "torch.distributed.ProcessGroup | None" = None,
    matching: Matching | None = None,
    num_groups: int = 1,
    sample_moments: SampleMoments | None = None,
    site: "SiteName | None" = None,
) -> Tensor:
    """Normalize by a weighted mix of instance, layer and batch statistics.

    This is equation 3 of Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", ICLR 2019.
    The arguments that `torch.nn.functional.batch_norm` has too mean the same.

    Args:
        x: input (N, C, *spatial) of any floating dtype. Moments are accumulated in float32 or wider.
        mean_weight: gate parameter (K,) of the means, one entry per branch.
        var_weight: gate parameter (K,) of the variances, one entry per branch.
        running_mean: running mean (C,), updated in place in training if `bn` is in `branches`, unless
            `bn_statistics="running"`. Without running statistics the `bn` branch always uses the moments of the batch.
            A forward pass that a backward pass runs again (activation checkpointing) updates nothing.
        running_var: running variance (C,), unbiased, updated with `running_mean`.
        weight: scale (C,) of the result.
        bias: shift (C,) of the result.
        training: the `bn` branch uses the moments of the batch and updates the running statistics.
        momentum: weight of the new moments in the running statistics.
        eps: added to the variance.
        gate: `"softmax"`: the importance weights are the softmax of the gate parameters (eq. 5 of the paper).
            `"simplex"`: they are the projection of the gate parameters to the probability simplex.
        branches: the mixed statistics, `"in"`, `"ln"` and `"bn"` or some of them, in the order of the entries of the
            gate parameters.
        bn_statistics: statistics of the `bn` branch in training. `"batch"`: the moments of the batch. `"running"`: the
            running statistics, as constants. `"renorm"`: the values of the updated running statistics, with the
            gradients of `"batch"`.
        num_batches_tracked: number of batches, one element; increased by 1 with each update of the running statistics
            and each empty batch.
        synchronize: in training, the `bn` branch uses the batch of all processes, forward and backward. Every process
            must then call this function, also with an empty x. `in` and `ln` statistics and the gradients of parameters
            are those of the local x.
        process_group: processes that share the batch; default all.
        matching: constants (C,) of matched branches, which bring the statistics of `ln` and `in` to those that the
            network was trained with: `ln_mean_shift` d, `ln_var_scale` r and `in_var_scale` s, each a tensor or None.
            The mean of `ln` becomes mean + d sqrt(var + eps); its variance plus eps is multiplied by r, that of `in`
            by s.
        num_groups: `ln` pools over groups of C / num_groups channels, as GroupNorm.
        sample_moments: moments that `in` and `ln` use as constants instead of those of x, which is a part of a larger
            sample. Without running statistics, `bn` pools them too.
        site: the name that a warning uses for the layer; None: no warnings.

    Returns:
        The normalized x, with its shape, dtype and memory format. With one spatial position, `in` has no variance: its
        weight is added to that of `ln`, or of `bn` without `ln`. With one value per channel in training, where
        `F.batch_norm` raises, the `bn` branch uses the running statistics and does not update them.

    Raises:
        ArgumentError: an argument that should be a tensor is something else.
        LayerError: an option is unknown; x is not floating or has no channels; a tensor has a wrong length, dtype or
            device; `num_groups` does not divide C; running statistics that training updates share memory, or a
            transform of `torch.func` forbids the update; `in` is the only branch and there is one spatial position; the
            `bn` branch has one value per channel and no running statistics; several processes synchronize and x is
            transformed, traced or fake, or only some of them run with gradients; `sample_moments` do not fit x.

    Examples:
        >>> import torch, normswap
        >>> x, gate = torch.randn(8, 3, 16, 16), torch.ones(3)
        >>> y = normswap.switch_norm(x, gate, gate, training=True)
        >>> y.shape
        torch.Size([8, 3, 16, 16])

        With all weight on `bn` the function is batch normalization:

        >>> bn = torch.tensor([0.0, 0.0, 1.0])
        >>> y = normswap.switch_norm(x, bn, bn, training=True, gate="simplex")
        >>> torch.allclose(y, torch.nn.functional.batch_norm(x, None, None, training=True), atol=1e-5)
        True
    """
    check_gate(gate)
    check_bn_statistics(bn_statistics)
    if branches != BRANCHES:
        check_branches(branches)
    check_tensors(x, (mean_weight, var_weight), len(branches), (running_mean, running_var, weight, bias))
    if num_groups != 1:
        check_num_groups(num_groups, x.shape[1])
    if matching is not None:
        check_matching(x, matching)
    running = None
    if running_mean is not None and running_var is not None:
        running = RunningStats(running_mean, running_var, num_batches_tracked, momentum)
    uses_batch_moments = training and "bn" in branches and bn_statistics != "running"
    if uses_batch_moments and running is not None:
        check_update(x, running)
    is_synchronized = synchronize and uses_batch_moments and not x.is_meta and process_count(process_group) > 1
    if x.numel() == 0 and not is_synchronized:
        if training:
            _count_empty_batch(num_batches_tracked)
        return _empty_output(x, [mean_weight, var_weight, weight, bias])
    values = x.numel() // x.shape[1]
    fixed = None if sample_moments is None else fix_moments(x, sample_moments, is_synchronized=is_synchronized)
    has_one_position = values == x.shape[0] if fixed is None else fixed.has_one_position
    if x.numel() and has_one_position and "in" in branches:
        mean_weight, var_weight, branches = redistribute_instance_weight(
            x, mean_weight, var_weight, gate, branches, site
        )
        gate = "simplex"
    mixing = Mixing(gate, tuple(branches), eps, num_groups)
    if matching is not None:
        matching = matching_for(matching, mixing.branches, accumulation_dtype(x))
    if is_synchronized:
        inputs = Inputs(x, mean_weight, var_weight, weight, bias, None, mixing, None, matching)
        bn_moments = partial(_synchronized_bn_moments, x, running, num_batches_tracked, bn_statistics == "renorm")
        return _synchronized_implementation()(inputs, process_group, bn_moments)
    constants, running_stats_update, on_batch_moments = (
        _choose_bn_source(x, running, values, bn_statistics, training, fixed) if "bn" in branches else _NO_BN_SOURCE
    )
    inputs = Inputs(x, mean_weight, var_weight, weight, bias, constants, mixing, running_stats_update, matching)
    return _normalise(inputs, on_batch_moments, fixed)


switch_norm.__module__ = "normswap"  # pickles and graphs refer to it by the public path


def _normalise(
    inputs: Inputs, on_batch_moments: Callable[[Moments], None] | None, fixed: FixedMoments | None
) -> Tensor:
    """Normalize by the fused backend, by its operator in compiled graphs, or by the plain formula.

    Fused backends always use the moments of x for `in` and `ln`, so fixed ones are mixed by the plain formula.
    """
    x, mixing, update = inputs.x, inputs.mixing, inputs.running_stats_update
    if is_eager(x) and (backend := fused_backend(x)) and (update is None or backend.supports_running_stats_update):
        if inputs.constants is not None and _is_fixed_batch_norm(inputs):
            return batch_norm(x, inputs.weight, inputs.bias, inputs.constants, mixing.eps)
        if fixed is None:
            return switch_norm_fused(backend, inputs, on_batch_moments)
    if fixed is None and update is None and needs_custom_op(x):
        return switch_norm_operator(inputs, on_batch_moments)
    means, variances = importance_weights(torch.stack((inputs.mean_gate, inputs.var_gate)), mixing.gate).unbind()
    return switch_norm_reference(
        x,
        means,
        variances,
        inputs.weight,
        inputs.bias,
        inputs.constants,
        mixing=mixing,
        matching=inputs.matching,
        on_batch_moments=on_batch_moments if update is None else update,
        fixed=None if fixed is None else fixed.parts,
    )


def _is_fixed_batch_norm(inputs: Inputs) -> bool:
    """Return whether the layer is exactly BN and no gate needs a gradient; False if reading the gates is not free."""
    gates = (inputs.mean_gate, inputs.var_gate)
    if torch.is_grad_enabled() and any(gate.requires_grad for gate in gates):
        return False
    return is_batch_norm(gates, inputs.mixing)


def _empty_output(x: Tensor, parameters: list[Tensor | None]) -> Tensor:
    """Return an empty y that depends on every parameter: each gets a gradient of zeros, as from `F.batch_norm`."""
    y = x.clone()
    for parameter in parameters:
        if parameter is not None:
            y = y + 0 * parameter.sum().to(x.dtype)
    return y


def _count_empty_batch(count: Tensor | None) -> None:
    if count is not None and not is_recomputation():
        count.add_(1)


# --- the moments of the `bn` branch


# Constants and update of the running statistics, as in `Inputs`, and a function that gets the moments (1, C) of the
# batch to update the running statistics. A plain tuple: a named one is noticeably slower for small layers.
_BnSource = tuple[Moments | None, RunningStatsUpdate | None, Callable[[Moments], None] | None]
_NO_BN_SOURCE: _BnSource = (None, None, None)


def _choose_bn_source(
    x: Tensor,
    running: RunningStats | None,
    values: int,
    bn_statistics: BnStatistics,
    training: bool,
    fixed: FixedMoments | None,
) -> _BnSource:
    if fixed is not None and running is None:
        return fixed.batch, None, None
    constants = _constant_moments(x, running, training and bn_statistics != "running", values)
    if constants is not None or running is None or not training:
        return constants, None, None
    if bn_statistics == "renorm":
        return None, partial(update_and_read_running, running, values), None
    if is_recomputation():
        return _NO_BN_SOURCE
    return None, None, partial(update_running, running, values)


def _constant_moments(x: Tensor, running: RunningStats | None, use_batch_moments: bool, values: int) -> Moments | None:
    """Return the running statistics if the `bn` branch uses them as constants, None if it uses those of the batch."""
    if values == 1 and running is None:
        raise LayerError(
            f"the `bn` branch needs more than one value per channel, got an input of shape {tuple(x.shape)} and no "
            "running statistics: build the layer with track_running_stats=True, or without `bn` in branches"
        )
    if running is None or (use_batch_moments and values > 1):
        return None
    # Copy if a backward pass can follow: it must see the values of now. torch.jit.trace compares a trace with gradients
    # and one without, so both have the copy.
    copy = torch.is_grad_enabled() or is_jit_tracing()
    return read_running(running.mean, running.var, accumulation_dtype(x), copy=copy)


# --- batches that several processes share


_graph_break_functions: list[Callable[..., Tensor]] = []


def _synchronized_implementation() -> Callable[..., Tensor]:
    """Return the function that normalizes a synchronized batch; while compiling, one that breaks the graph."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return _normalise_synchronized
    if not _graph_break_functions:  # created at first use, because `disable` imports the compiler
        disable: Any = torch.compiler.disable
        _graph_break_functions.append(disable(_normalise_synchronized, reason="statistics are synchronized"))
    return _graph_break_functions[0]


def _normalise_synchronized(
    inputs: Inputs, group: "torch.distributed.ProcessGroup | None", bn_moments: BnMomentsFunction
) -> Tensor:
    """Normalize x, the local part of a batch, if its values are real."""
    x = inputs.x
    if (
        isinstance(x, FakeTensor)
        or torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    ):
        raise LayerError(
            "synchronized statistics in training need real values in every process; torch.export, torch.func, "
            "torch.jit.trace, forward-mode derivatives and fake tensors have none: call eval() first, or set "
            "synchronize=False"
        )
    return switch_norm_synchronized(inputs, group, bn_moments, fused=is_eager(x) and fused_backend(x) is not None)


def _synchronized_bn_moments(
    x: Tensor, running: RunningStats | None, count: Tensor | None, renorm: bool, batch: Moments, values: int
) -> BnMoments:
    """Return the moments of the `bn` branch in a synchronized batch, and update the running statistics.

    Args:
        count: number of batches; also updated without running statistics, by an empty batch.
        renorm: return the updated running statistics.
        batch: moments (1, C) of the batch of all processes, with `values` values per channel.
    """
    if values == 0:
        _count_empty_batch(count)
        return BnMoments(batch, is_differentiable=False)
    constants = _constant_moments(x, running, True, values)
    if constants is not None:
        # Copy: the backward pass must see the values of now.
        return BnMoments(Moments(*(moment.clone() for moment in constants)), is_differentiable=False)
    if running is None:
        return BnMoments(batch, is_differentiable=True)
    if renorm:
        return BnMoments(update_and_read_running(running, values, batch), is_differentiable=True)
    if not is_recomputation():
        update_running(running, values, batch)
    return BnMoments(batch, is_differentiable=True)


# --- inputs with one spatial position


class SiteName(NamedTuple):
    """The name of a layer in warnings, and a number that distinguishes layers of the same name."""

    name: str
    number: int


_site_counter = itertools.count()


def new_site_name(name: str) -> SiteName:
    """Return a name that no other layer of this process has. Copies of a layer share its name."""
    return SiteName(name, next(_site_counter))


def redistribute_instance_weight(
    x: Tensor, mean_weight: Tensor, var_weight: Tensor, gate: Gate, branches: Sequence[Branch], site: SiteName | None
) -> tuple[Tensor, Tensor, tuple[Branch, ...]]:
    """Add the weight of `in` to that of `ln`, or to that of `bn` if `ln` is not mixed.

    Args:
        x: input with one spatial position, where `in` has no variance.
        mean_weight, var_weight: gate parameters (K,).
        site: warns once if `in` has a weight, or if reading the weights would wait for a device or break a graph.

    Returns:
        Simplex points (K - 1,) of means and variances for the branches except `in`, and these branches.

    Raises:
        LayerError: `in` is the only branch.
    """
    remaining_branches = tuple(branch for branch in branches if branch != "in")
    if not remaining_branches:
        raise LayerError(
            f"the `in` branch has no variance with one spatial position (input of shape {tuple(x.shape)}), and there "
            "is no other branch: build the layer with branches=('ln', 'bn'), or plan with an input of the real size"
        )
    recipient: Branch = "ln" if "ln" in remaining_branches else "bn"
    if site is not None:
        _warn(x, (mean_weight, var_weight), gate, branches.index("in"), recipient, site)
    weights = importance_weights(torch.stack((mean_weight, var_weight)), gate)
    others = [weights[:, branches.index(branch)] for branch in remaining_branches if branch != recipient]
    # The recipient gets 1 minus the others: a weight of exactly 0 or 1 stays exact.
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
    """Warn once for each site; a compiler calls this while it traces, with constants."""
    site = SiteName(name, number)
    if site not in _warned:
        _warned.add(site)
        warnings.warn(
            f"{name} got an input with one spatial position per channel, where `in` has no variance: in such calls its "
            f"weight is added to that of `{recipient}`; the parameters do not change. To leave `in` out, convert with "
            "an example input of the real size",
            stacklevel=2,
        )
    return True


# The mark that `torch.compiler.assume_constant_result` sets; that function would import the compiler.
_marked: Any = _warn_once
_marked._dynamo_marked_constant = True
