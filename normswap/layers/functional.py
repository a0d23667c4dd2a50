"""Functional Switchable Normalization: `switch_norm`, in the manner of `torch.nn.functional.batch_norm`.

Checks the input, turns gate parameters into importance weights, settles which moments the `bn` branch uses, calls
the backend and records the moments of the batch. Empty batches, single values and single positions are met here.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from normswap.errors import LayerError
from normswap.layers import compiled
from normswap.layers.dispatch import compiles_operator, fused_backend, runs_now
from normswap.layers.fused import Inputs, switch_norm_fused
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
from normswap.layers.mixing import Mixing, read_shares
from normswap.layers.moments import Moments, accumulation_dtype
from normswap.layers.operators import switch_norm_operator
from normswap.layers.reference import switch_norm_reference


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
) -> Tensor:
    """Apply Switchable Normalization (Luo et al., ICLR 2019, eq. 3), in the manner of `F.batch_norm`.

    Args:
        x: (N, C, *spatial), of any floating dtype; moments are accumulated in float32 or wider.
        mean_weight, var_weight: gate parameters (K,), one entry per branch.
        running_mean, running_var: (C,), updated in place in training unless `bn_statistics="running"`; the
            variance is stored unbiased. None: the `bn` branch always takes the moments of the batch.
        weight, bias: (C,) or None.
        training: take (and record) the moments of the batch in the `bn` branch.
        momentum: share of the new moments in the running ones.
        gate: `"softmax"` (logits) or `"simplex"` (points; see `normswap.layers.importance`).
        branches: which statistics are mixed, in the order of the gate parameters' entries.
        bn_statistics: `"batch"`, or `"running"` to use running statistics as constants in training too.
        num_batches_tracked: a count, one higher after each update of the running statistics and each empty batch.

    Returns:
        A tensor of the shape, dtype and memory format of x. With one value per channel in training, where
        `F.batch_norm` raises, the `bn` branch uses the running statistics and updates nothing.

    Raises:
        LayerError: an unknown option, or gate parameters of another shape than (K,); x is not floating or has
            another rank or number of channels; one spatial position meets weight on `in` (told on CPU only, since
            it means reading the weights: elsewhere the variance of `in` is 0 there, and y finite); the `bn` branch
            has neither running statistics nor more than one value per channel.
    """
    check_gate(gate)
    check_bn_statistics(bn_statistics)
    if branches != BRANCHES:
        check_branches(branches)
    for parameter in (mean_weight, var_weight):
        if parameter.shape != (len(branches),):
            raise LayerError(f"expected gate parameters of shape {(len(branches),)}, got {tuple(parameter.shape)}")
    _check_input(x, running_mean if running_mean is not None else weight)
    if x.numel() == 0:
        if training and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return _empty_output(x, [mean_weight, var_weight, weight, bias])
    values = x.numel() // x.shape[1]
    mixing = Mixing(gate, tuple(branches), eps)
    if values == x.shape[0] and "in" in branches:
        _refuse_single_position(x, (mean_weight, var_weight), mixing)
    constants = record = None
    if "bn" in branches:
        constants = _running_moments(x, running_mean, running_var, training and bn_statistics == "batch", values)
        if training and constants is None and running_mean is not None and running_var is not None:
            record = partial(_update_running, running_mean, running_var, num_batches_tracked, momentum, values)
    inputs = Inputs(x, mean_weight, var_weight, weight, bias, constants, mixing)
    if runs_now(x) and (backend := fused_backend(x)):
        if constants is not None and _is_fixed_batch_norm(mean_weight, var_weight, mixing):
            return _batch_norm(x, weight, bias, constants, eps)
        return switch_norm_fused(backend, inputs, record)
    if compiles_operator():
        return switch_norm_operator(inputs, record)
    means, variances = (importance_weights(parameter, gate) for parameter in (mean_weight, var_weight))
    return switch_norm_reference(
        x, means, variances, weight, bias, constants, branches=branches, eps=eps, record=record
    )


def _check_input(x: Tensor, per_channel: Tensor | None) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise LayerError(f"expected a floating tensor (N, C, *spatial), got {x.dtype} of shape {tuple(x.shape)}")
    if per_channel is not None and x.shape[1] != per_channel.shape[0]:
        channels = per_channel.shape[0]
        raise LayerError(f"expected {channels} channels in dimension 1, got an input of shape {tuple(x.shape)}")


def _empty_output(x: Tensor, parameters: list[Tensor | None]) -> Tensor:
    """An empty y that still reaches every parameter, so that each has a zero gradient as in `F.batch_norm`."""
    y = x.clone()
    for parameter in parameters:
        if parameter is not None:
            y = y + 0 * parameter.sum().to(x.dtype)
    return y


def _refuse_single_position(x: Tensor, gates: tuple[Tensor, Tensor], mixing: Mixing) -> None:
    # Reading the weights would break a compiled graph or wait for a device, and meta tensors have none.
    if torch.compiler.is_compiling() or x.is_meta or any(gate.device.type != "cpu" for gate in gates):
        return
    if any(read_shares(gate.detach(), mixing).in_ != 0 for gate in gates):
        raise LayerError(
            f"one spatial position per channel (input of shape {tuple(x.shape)}) leaves the `in` branch no variance, "
            "but it has weight: build the layer with branches=('ln', 'bn'), or plan with an input of the real size"
        )


def _is_fixed_batch_norm(mean_weight: Tensor, var_weight: Tensor, mixing: Mixing) -> bool:
    """Whether the site is exactly BN and no gradient asks what another mix would do; only where that costs nothing."""
    gates = (mean_weight, var_weight)
    if mean_weight.device.type != "cpu" or (torch.is_grad_enabled() and any(gate.requires_grad for gate in gates)):
        return False
    return all(read_shares(gate, mixing) == (0.0, 0.0, 1.0) for gate in gates)


def _batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, constants: Moments, eps: float) -> Tensor:
    """BN in evaluation, at its price: no moments of x are taken."""
    mean, var = (moment.squeeze(0) for moment in constants)
    weight, bias = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
    return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]


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
    # Copies where a backward pass may follow: an update in between must not change what was used.
    dtype, copy = accumulation_dtype(x), torch.is_grad_enabled()
    mean, var = (
        s.unsqueeze(0)  # type: ignore[union-attr]
        if not copy and s.dtype == dtype and s.is_contiguous()  # type: ignore[union-attr]
        else s.detach().to(dtype, copy=copy).contiguous().unsqueeze(0)  # type: ignore[union-attr]
        for s in (running_mean, running_var)
    )
    return Moments(mean, var)


def _update_running(
    running_mean: Tensor, running_var: Tensor, count: Tensor | None, momentum: float, values: int, batch: Moments
) -> None:
    unbiased = values / (values - 1)
    if runs_now(batch.mean) and compiled.record(
        batch, running_mean, running_var, count, momentum=momentum, factor=unbiased
    ):
        return
    mean, var = (moment.detach().squeeze(0) for moment in batch)
    for running, new in ((running_mean, mean), (running_var, var * unbiased)):
        if running.dtype == new.dtype:
            running.lerp_(new, momentum)
        else:  # in half precision: rounded once
            running.copy_(running.to(new.dtype).lerp_(new, momentum))
    if count is not None:
        count.add_(1)
