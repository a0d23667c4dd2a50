"""The backend `triton` for CUDA: three kernel launches in the forward pass, three in the backward pass.

Forward: moments of every (n, c); moments of LN and BN, pooled from them (omitted if not needed); mixing and affine
pass. Backward: sums over positions; terms of the gradients; dx and the gradients of the gates. x and the moments (N, C)
are saved in between. The host reads nothing, so it never waits for the device.

The tiling is a pure function of shape and layout: no search, and every call adds in the same order.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.layers.backends.aten_passes import is_channels_last, match_layout, to_supported_layout
from normswap.layers.backends.interface import Backend, Gradients, Inputs, Normalised
from normswap.layers.backends.reference import Moments, instance_moments
from normswap.layers.backends.triton_kernels import (
    affine_kernel,
    gradient_kernel,
    moments_kernel,
    pool_kernel,
    project_kernel,
    sums_kernel,
    terms_kernel,
)
from normswap.layers.gating import BRANCHES, Branch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Number of activation values, and of table entries, in one program.
_TILE = 4096
_TABLE_TILE = 1024
# Number of programs that fills a device: rows are split to reach it, into as many parts as one load can merge.
_PROGRAMS = 1024
_MAX_SPLITS = 128


# --- arguments of the kernels


class Tiling(NamedTuple):
    """The tiling of an activation and its table (N, C); `tile` and `tables` are compile-time constants of kernels."""

    positions: int
    splits: int
    span: int
    row_programs: int
    sample_programs: int
    channel_programs: int
    tile: dict[str, Any]
    tables: dict[str, Any]
    warps: int


@lru_cache(maxsize=4096)
def _compute_tiling(
    samples: int,
    channels: int,
    positions: int,
    *,
    channels_last: bool,
    num_groups: int,
    tile: int,
    table_tile: int,
    programs: int,
    max_splits: int,
) -> Tiling:
    # Small activations get smaller tiles, so that they fill the device too.
    tile = min(tile, max(_next_power(samples * channels * positions // programs), tile // 8))
    if channels_last:
        block_c = min(_next_power(channels), 64, tile)
        block_p = min(_next_power(positions), tile // block_c)
    else:
        block_p = min(_next_power(positions), tile)
        block_c = min(_next_power(channels), tile // block_p)
    rows = samples * math.ceil(channels / block_c)
    tiles = math.ceil(positions / block_p)
    span = math.ceil(tiles / min(tiles, max_splits, math.ceil(programs / rows))) * block_p
    splits = math.ceil(positions / span)
    # If entries come in parts, a tile has fewer entries. Few different sizes, because each compiles a kernel.
    entries = max(table_tile // _next_power(splits), 1)
    ln_lanes = min(_next_power(channels // num_groups, 8), entries)
    bn_lanes = min(_next_power(samples, 8), max(entries // 8, 1))
    ln_rows, bn_rows = entries // ln_lanes, entries // bn_lanes
    return Tiling(
        positions,
        splits,
        span,
        rows * splits,
        math.ceil(samples * num_groups / ln_rows),
        math.ceil(channels / bn_rows),
        {"UNIT": math.gcd(positions, 16), "LAST": channels_last, "BLOCK_C": block_c, "BLOCK_P": block_p},
        {"LN_ROWS": ln_rows, "LN_LANES": ln_lanes, "BN_ROWS": bn_rows, "BN_LANES": bn_lanes},
        min(max(block_c * block_p // 512, 1), 8),
    )


def _next_power(count: int, base: int = 2) -> int:
    """Return the smallest power of `base`, itself a power of two, that is at least `count`."""
    step = base.bit_length() - 1
    return 1 << math.ceil((count - 1).bit_length() / step) * step


def _tiling_of(x: Tensor, num_groups: int = 1) -> Tiling:
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    return _compute_tiling(
        samples,
        channels,
        positions,
        channels_last=is_channels_last(x),
        num_groups=num_groups,
        tile=_TILE,
        table_tile=_TABLE_TILE,
        programs=_PROGRAMS,
        max_splits=_MAX_SPLITS,
    )


def _device_context(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which the device of x is the current one, on which kernels start."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _as_contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return contiguous tensors, which kernels need."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _branch_flags(branches: Sequence[Branch]) -> dict[str, bool]:
    return {branch.upper(): branch in branches for branch in BRANCHES}


class _Call(NamedTuple):
    """What the kernels of one pass share.

    Attributes:
        x: contiguous or channels_last.
        units: number of positions divided by the constant UNIT.
        rows: number of rows (n, group) that LN pools.
        parameters: constant mean and variance, gate parameters, weight and constants of matched branches, contiguous or
            None.
        options: compile-time constants.
    """

    x: Tensor
    samples: int
    channels: int
    rows: int
    units: int
    tiling: Tiling
    parameters: list[Tensor | None]
    options: dict[str, Any]
    eps: float

    @property
    def table(self) -> int:
        """Number of entries (n, c)."""
        return self.samples * self.channels


def _call_of(inputs: Inputs) -> _Call:
    x, mixing = to_supported_layout(inputs.x), inputs.mixing
    num_groups = mixing.num_groups if "ln" in mixing.branches else 1
    tiling, constants = _tiling_of(x, num_groups), inputs.constants
    matching = inputs.matching or (None, None, None)
    parameters = _as_contiguous(
        *(constants or (None, None)), inputs.mean_gate, inputs.var_gate, inputs.weight, *matching
    )
    options: dict[str, Any] = {
        "SIMPLEX": mixing.gate == "simplex",
        "CONSTANT": constants is not None,
        **_branch_flags(mixing.branches),
    }
    options["GROUPS"] = num_groups
    units = tiling.positions // tiling.tile["UNIT"]
    rows = x.shape[0] * num_groups
    return _Call(x, x.shape[0], x.shape[1], rows, units, tiling, parameters, options, mixing.eps)


# --- forward


def forward(inputs: Inputs) -> Normalised:
    """Run the forward pass; see `interface.Forward`."""
    call = _call_of(inputs)
    x, samples, channels, rows, _, tiling, *_ = call
    pooled, split = 2 * (rows + channels), tiling.splits > 1
    y = torch.empty_like(x)
    mean, var = torch.empty((2, samples, channels), dtype=torch.float32, device=x.device).unbind()
    workspace = mean.new_empty(pooled)
    parts = mean.new_empty((2, tiling.splits, call.table)).unbind() if split else (mean, var)
    by_sample = tiling.sample_programs if call.options["LN"] or split else 0
    by_channel = tiling.channel_programs if call.options["BN"] and inputs.constants is None else 0
    with _device_context(x):
        moments_kernel[(tiling.row_programs,)](
            x,
            *parts,
            channels,
            call.units,
            tiling.span,
            tiling.splits,
            call.table,
            **tiling.tile,
            num_warps=tiling.warps,
        )
        if by_sample + by_channel:
            _launch_pool(call, parts, Moments(mean, var), workspace, by_sample, by_channel)
        _launch_affine(call, y, Moments(mean, var), workspace, *_as_contiguous(inputs.bias))
    batch = None
    if by_channel:
        batch = Moments(*workspace[2 * rows : pooled].view(2, 1, channels).unbind())
    return Normalised(y, batch, Moments(mean, var))


def _launch_pool(
    call: _Call, parts: Sequence[Tensor], moments: Moments, workspace: Tensor, by_sample: int, by_channel: int
) -> None:
    tiling = call.tiling
    pool_kernel[(by_sample + by_channel,)](
        *parts,
        *moments,
        workspace,
        call.samples,
        call.channels,
        call.table,
        tiling.span,
        tiling.positions,
        by_sample,
        STORE=tiling.splits > 1,
        GROUPS=call.options["GROUPS"],
        SPLITS=_next_power(tiling.splits),
        **tiling.tables,
    )


def _launch_affine(call: _Call, y: Tensor, moments: Moments, workspace: Tensor, bias: Tensor | None) -> None:
    tiling = call.tiling
    affine_kernel[(tiling.row_programs,)](
        call.x,
        y,
        *moments,
        workspace,
        *call.parameters,
        bias,
        call.samples,
        call.channels,
        call.units,
        tiling.span,
        tiling.splits,
        call.eps,
        **call.options,
        **tiling.tile,
        num_warps=tiling.warps,
    )


# --- backward


def backward(dy: Tensor, inputs: Inputs, saved: Moments | None, needs_input_grad: tuple[bool, ...]) -> Gradients:
    """Run the backward pass; see `interface.Backward`."""
    saved = saved or instance_moments(inputs.x)
    call = _call_of(inputs)
    dy = match_layout(dy, call.x)
    gradients = _allocate_gradients(call, inputs, saved, needs_input_grad)
    tiling = call.tiling
    workspace = saved.mean.new_empty(
        4 * (call.rows + call.channels)
        + 2 * call.table * (1 + tiling.splits)
        + 3 * tiling.sample_programs
        + 2 * tiling.channel_programs
    )
    with _device_context(call.x):
        _launch_sums(call, dy, saved, workspace)
        _launch_terms(call, saved, workspace, gradients)
        _launch_gradient(call, dy, saved, workspace, gradients)
    return gradients


def _allocate_gradients(call: _Call, inputs: Inputs, saved: Moments, needs_input_grad: tuple[bool, ...]) -> Gradients:
    mean_gate, var_gate, weight = (
        tensor.new_empty(tensor.shape) if needed and tensor is not None else None
        for tensor, needed in zip(
            (inputs.mean_gate, inputs.var_gate, inputs.weight), needs_input_grad[1:4], strict=True
        )
    )
    dx = torch.empty_like(call.x) if needs_input_grad[0] else None
    bias = saved.mean.new_empty(call.channels) if needs_input_grad[4] else None
    return Gradients(dx, mean_gate, var_gate, weight, bias)


def _launch_sums(call: _Call, dy: Tensor, saved: Moments, workspace: Tensor) -> None:
    tiling, options = call.tiling, call.options
    by_sample = tiling.sample_programs if options["LN"] else 0
    by_channel = tiling.channel_programs if options["BN"] and not options["CONSTANT"] else 0
    pool_programs = by_sample + by_channel
    sums_kernel[(pool_programs + tiling.row_programs,)](
        dy,
        call.x,
        *saved,
        workspace,
        call.samples,
        call.channels,
        call.units,
        tiling.span,
        tiling.splits,
        call.table,
        by_sample,
        pool_programs,
        GROUPS=options["GROUPS"],
        **tiling.tile,
        **tiling.tables,
        num_warps=tiling.warps,
    )


def _launch_terms(call: _Call, saved: Moments, workspace: Tensor, gradients: Gradients) -> None:
    tiling = call.tiling
    terms_kernel[(tiling.sample_programs + tiling.channel_programs,)](
        *saved,
        workspace,
        *call.parameters,
        gradients.weight,
        gradients.bias,
        call.samples,
        call.channels,
        tiling.positions,
        tiling.splits,
        call.table,
        tiling.sample_programs,
        call.eps,
        **call.options,
        SPLITS=_next_power(tiling.splits),
        **tiling.tables,
    )


def _launch_gradient(call: _Call, dy: Tensor, saved: Moments, workspace: Tensor, gradients: Gradients) -> None:
    tiling, dx = call.tiling, gradients.x
    needs_gates = gradients.mean_gate is not None or gradients.var_gate is not None
    programs = needs_gates + (tiling.row_programs if dx is not None else 0)
    if not programs:
        return
    gradient_kernel[(programs,)](
        dy,
        call.x,
        dx,
        *saved,
        workspace,
        *call.parameters,
        gradients.mean_gate,
        gradients.var_gate,
        call.samples,
        call.channels,
        call.units,
        tiling.span,
        tiling.splits,
        call.table,
        tiling.sample_programs,
        tiling.channel_programs,
        call.eps,
        **call.options,
        GATES=needs_gates,
        **tiling.tile,
        num_warps=tiling.warps,
    )


# --- gates


def project_points(points: Sequence[Tensor], branches: Sequence[Branch]) -> None:
    """Project one or two simplex points (K,) of one dtype in place, in one launch.

    Autograd does not see this as a change, so that a second forward pass before the backward pass is possible. That is
    correct: a point and its projection have the same importance weights.
    """
    first, second = (*points, None)[:2]
    with _device_context(points[0]):
        project_kernel[(1,)](
            first, second, EPS=torch.finfo(points[0].dtype).eps, **_branch_flags(branches), num_warps=1
        )


TRITON = Backend("triton", forward, backward)
