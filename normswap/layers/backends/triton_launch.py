"""Switchable Normalization out of Triton kernels, for CUDA: three launches forward, three backward.

Forward: moments of every (n, c); those of LN and BN pooled from them, which merges split rows too (left out where
neither is needed); mix and affine pass. Backward: sums over positions, beside which the moments are pooled again; what
the branches pull; dx, beside which one program ends the gradients of the gates. Nothing is read by the host, so nothing
waits for the device. x and the (N, C) moments are all that is kept in between.

How rows are cut is a pure function of shape and layout: no search, the same sums in the same order at every call.
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
from normswap.layers.backends.reference import Moments
from normswap.layers.backends.triton_kernels import (
    affine_kernel,
    gradient_kernel,
    moments_kernel,
    pool_kernel,
    project_kernel,
    sums_kernel,
    terms_kernel,
)
from normswap.layers.gating import BRANCHES, Branch, Mixing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Values of an activation, and entries of a table, that one program holds at a time.
_TILE = 4096
_TABLE_TILE = 1024
# Programs that fill a device: rows are split until there are as many, but into no more parts than one load can merge.
_PROGRAMS = 1024
_MAX_SPLITS = 128


class Tiling(NamedTuple):
    """How an activation and its (N, C) table are cut; `tile` and `tables` are the constants of kernels that say so."""

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
    channels_last: bool,
    tile: int,
    table_tile: int,
    programs: int,
    max_splits: int,
) -> Tiling:
    # Small activations are cut finer, so that they fill the device as well.
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
    # Of a table whose entries come in parts, a tile holds fewer entries. Sizes are few: each is a kernel to compile.
    entries = max(table_tile // _next_power(splits), 1)
    ln_lanes = min(_next_power(channels, 8), entries)
    bn_lanes = min(_next_power(samples, 8), max(entries // 8, 1))
    ln_rows, bn_rows = entries // ln_lanes, entries // bn_lanes
    return Tiling(
        positions,
        splits,
        span,
        rows * splits,
        math.ceil(samples / ln_rows),
        math.ceil(channels / bn_rows),
        {"UNIT": math.gcd(positions, 16), "LAST": channels_last, "BLOCK_C": block_c, "BLOCK_P": block_p},
        {"LN_ROWS": ln_rows, "LN_LANES": ln_lanes, "BN_ROWS": bn_rows, "BN_LANES": bn_lanes},
        min(max(block_c * block_p // 512, 1), 8),
    )


def _next_power(count: int, base: int = 2) -> int:
    """Return the smallest power of two, or of a power of two, that is not below `count`."""
    step = base.bit_length() - 1
    return 1 << math.ceil((count - 1).bit_length() / step) * step


def _tiling_of(x: Tensor) -> Tiling:
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    return _compute_tiling(
        samples, channels, positions, is_channels_last(x), _TILE, _TABLE_TILE, _PROGRAMS, _MAX_SPLITS
    )


def _device_context(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device: make it that of x."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _as_contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Parameters and constants as kernels read them: entry after entry."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _options(mixing: Mixing, constants: Moments | None) -> dict[str, Any]:
    return {"SIMPLEX": mixing.gate == "simplex", "CONSTANT": constants is not None, **_branch_flags(mixing.branches)}


def _branch_flags(branches: Sequence[Branch]) -> dict[str, bool]:
    return {branch.upper(): branch in branches for branch in BRANCHES}


def forward(inputs: Inputs) -> Normalised:
    """Normalise; see `fused.Forward`."""
    x, mean_gate, var_gate, weight, bias, constants, mixing, _ = inputs
    x = to_supported_layout(x)
    samples, channels = x.shape[:2]
    table = samples * channels
    tiling = _tiling_of(x)
    options = _options(mixing, constants)
    pooled, split = 2 * (samples + channels), tiling.splits > 1
    y = torch.empty_like(x)
    mean, var = torch.empty((2, samples, channels), dtype=torch.float32, device=x.device).unbind()
    workspace = mean.new_empty(pooled)
    parts = mean.new_empty((2, tiling.splits, table)).unbind() if split else (mean, var)
    by_sample = tiling.sample_programs if options["LN"] or split else 0
    by_channel = tiling.channel_programs if options["BN"] and constants is None else 0
    units = tiling.positions // tiling.tile["UNIT"]
    with _device_context(x):
        moments_kernel[(tiling.row_programs,)](
            x, *parts, channels, units, tiling.span, tiling.splits, table, **tiling.tile, num_warps=tiling.warps
        )
        if by_sample + by_channel:
            pool_kernel[(by_sample + by_channel,)](
                *parts,
                mean,
                var,
                workspace,
                samples,
                channels,
                table,
                tiling.span,
                tiling.positions,
                by_sample,
                STORE=split,
                SPLITS=_next_power(tiling.splits),
                **tiling.tables,
            )
        affine_kernel[(tiling.row_programs,)](
            x,
            y,
            mean,
            var,
            workspace,
            *_as_contiguous(*(constants or (None, None)), mean_gate, var_gate, weight, bias),
            samples,
            channels,
            units,
            tiling.span,
            tiling.splits,
            mixing.eps,
            **options,
            **tiling.tile,
            num_warps=tiling.warps,
        )
    batch = None
    if by_channel:
        batch = Moments(*workspace[2 * samples : pooled].view(2, 1, channels).unbind())
    return Normalised(y, batch, Moments(mean, var))


def backward(dy: Tensor, inputs: Inputs, saved: Moments, needs_input_grad: tuple[bool, ...]) -> Gradients:
    """Return the gradients; see `fused.Backward`."""
    x, mean_gate, var_gate, weight, _, constants, mixing, _ = inputs
    x = to_supported_layout(x)
    dy = match_layout(dy, x)
    samples, channels = x.shape[:2]
    table = samples * channels
    tiling = _tiling_of(x)
    options = _options(mixing, constants)
    by_sample = tiling.sample_programs if options["LN"] else 0
    pool_programs = by_sample + (tiling.channel_programs if options["BN"] and constants is None else 0)
    gates = needs_input_grad[1] or needs_input_grad[2]
    dx = torch.empty_like(x) if needs_input_grad[0] else None
    mean_gradient, var_gradient, weight_gradient = (
        tensor.new_empty(tensor.shape) if want and tensor is not None else None
        for tensor, want in zip((mean_gate, var_gate, weight), needs_input_grad[1:4], strict=True)
    )
    bias_gradient = saved.mean.new_empty(channels) if needs_input_grad[4] else None
    workspace = saved.mean.new_empty(
        4 * (samples + channels)
        + 2 * table * (1 + tiling.splits)
        + 3 * tiling.sample_programs
        + 2 * tiling.channel_programs
    )
    units = tiling.positions // tiling.tile["UNIT"]
    # Constants, gate parameters and weight.
    parameters = _as_contiguous(*(constants or (None, None)), mean_gate, var_gate, weight)
    with _device_context(x):
        sums_kernel[(pool_programs + tiling.row_programs,)](
            dy,
            x,
            *saved,
            workspace,
            samples,
            channels,
            units,
            tiling.span,
            tiling.splits,
            table,
            by_sample,
            pool_programs,
            **tiling.tile,
            **tiling.tables,
            num_warps=tiling.warps,
        )
        terms_kernel[(tiling.sample_programs + tiling.channel_programs,)](
            *saved,
            workspace,
            *parameters,
            weight_gradient,
            bias_gradient,
            samples,
            channels,
            tiling.positions,
            tiling.splits,
            table,
            tiling.sample_programs,
            mixing.eps,
            **options,
            SPLITS=_next_power(tiling.splits),
            **tiling.tables,
        )
        if gates or dx is not None:
            gradient_kernel[(gates + (tiling.row_programs if dx is not None else 0),)](
                dy,
                x,
                dx,
                *saved,
                workspace,
                *parameters,
                mean_gradient,
                var_gradient,
                samples,
                channels,
                units,
                tiling.span,
                tiling.splits,
                table,
                tiling.sample_programs,
                tiling.channel_programs,
                mixing.eps,
                **options,
                GATES=gates,
                **tiling.tile,
                num_warps=tiling.warps,
            )
    return Gradients(dx, mean_gradient, var_gradient, weight_gradient, bias_gradient)


def project_points(points: Sequence[Tensor], branches: Sequence[Branch]) -> None:
    """Put one or two simplex points (K,) of one dtype back on the simplex, in place and in one launch.

    Autograd is not told: where a point lies on the simplex nothing is written, so that a second forward pass before a
    backward pass does not count as a change, and where it does not, its projection has the weights that it had.
    """
    first, second = (*points, None)[:2]
    with _device_context(points[0]):
        project_kernel[(1,)](
            first, second, EPS=torch.finfo(points[0].dtype).eps, **_branch_flags(branches), num_warps=1
        )


TRITON = Backend("triton", forward, backward)
