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

from normswap.layers.backends.aten_passes import is_channels_last, laid_out, laid_out_like
from normswap.layers.backends.interface import Backend, Gradients, Inputs, Normalised
from normswap.layers.backends.reference import Moments
from normswap.layers.backends.triton_kernels import (
    affine_kernel,
    gradient_kernel,
    moments_kernel,
    pool_kernel,
    project_kernel,
    pulls_kernel,
    sums_kernel,
)
from normswap.layers.gating import BRANCHES, Branch, Mixing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Values of an activation, and entries of a table, that one program holds at a time.
_TILE = 4096
_TABLE_TILE = 1024
# Programs that fill a device: rows are split until there are as many, but into no more parts than one load can merge.
_PROGRAMS = 1024
_MOST_SPLITS = 128


class Cut(NamedTuple):
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
def _cut(
    samples: int, channels: int, positions: int, last: bool, tile: int, table_tile: int, programs: int, most: int
) -> Cut:
    # Small activations are cut finer, so that they fill the device as well.
    tile = min(tile, max(_power(samples * channels * positions // programs), tile // 8))
    if last:
        block_c = min(_power(channels), 64, tile)
        block_p = min(_power(positions), tile // block_c)
    else:
        block_p = min(_power(positions), tile)
        block_c = min(_power(channels), tile // block_p)
    rows = samples * math.ceil(channels / block_c)
    tiles = math.ceil(positions / block_p)
    span = math.ceil(tiles / min(tiles, most, math.ceil(programs / rows))) * block_p
    splits = math.ceil(positions / span)
    # Of a table whose entries come in parts, a tile holds fewer entries. Sizes are few: each is a kernel to compile.
    entries = max(table_tile // _power(splits), 1)
    ln_lanes = min(_power(channels, 8), entries)
    bn_lanes = min(_power(samples, 8), max(entries // 8, 1))
    ln_rows, bn_rows = entries // ln_lanes, entries // bn_lanes
    return Cut(
        positions,
        splits,
        span,
        rows * splits,
        math.ceil(samples / ln_rows),
        math.ceil(channels / bn_rows),
        {"UNIT": math.gcd(positions, 16), "LAST": last, "BLOCK_C": block_c, "BLOCK_P": block_p},
        {"LN_ROWS": ln_rows, "LN_LANES": ln_lanes, "BN_ROWS": bn_rows, "BN_LANES": bn_lanes},
        min(max(block_c * block_p // 512, 1), 8),
    )


def _power(count: int, of: int = 2) -> int:
    """Return the smallest power of two, or of a power of two, that is not below `count`."""
    step = of.bit_length() - 1
    return 1 << math.ceil((count - 1).bit_length() / step) * step


def _cut_of(x: Tensor) -> Cut:
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    return _cut(samples, channels, positions, is_channels_last(x), _TILE, _TABLE_TILE, _PROGRAMS, _MOST_SPLITS)


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device: make it that of x."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Parameters and constants as kernels read them: entry after entry."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _options(mixing: Mixing, constants: Moments | None) -> dict[str, Any]:
    return {"SIMPLEX": mixing.gate == "simplex", "CONSTANT": constants is not None, **_used(mixing.branches)}


def _used(branches: Sequence[Branch]) -> dict[str, bool]:
    return {branch.upper(): branch in branches for branch in BRANCHES}


def forward(inputs: Inputs) -> Normalised:
    """Normalise; see `fused.Forward`."""
    x, mean_point, var_point, weight, bias, constants, mixing, _ = inputs
    x = laid_out(x)
    samples, channels = x.shape[:2]
    table = samples * channels
    cut = _cut_of(x)
    options = _options(mixing, constants)
    pooled, split = 2 * (samples + channels), cut.splits > 1
    y = torch.empty_like(x)
    mean, var = torch.empty((2, samples, channels), dtype=torch.float32, device=x.device).unbind()
    workspace = mean.new_empty(pooled)
    parts = mean.new_empty((2, cut.splits, table)).unbind() if split else (mean, var)
    by_sample = cut.sample_programs if options["LN"] or split else 0
    by_channel = cut.channel_programs if options["BN"] and constants is None else 0
    units = cut.positions // cut.tile["UNIT"]
    with _device_of(x):
        moments_kernel[(cut.row_programs,)](
            x, *parts, channels, units, cut.span, cut.splits, table, **cut.tile, num_warps=cut.warps
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
                cut.span,
                cut.positions,
                by_sample,
                STORE=split,
                SPLITS=_power(cut.splits),
                **cut.tables,
            )
        affine_kernel[(cut.row_programs,)](
            x,
            y,
            mean,
            var,
            workspace,
            *_dense(*(constants or (None, None)), mean_point, var_point, weight, bias),
            samples,
            channels,
            units,
            cut.span,
            cut.splits,
            mixing.eps,
            **options,
            **cut.tile,
            num_warps=cut.warps,
        )
    batch = None
    if by_channel:
        batch = Moments(*workspace[2 * samples : pooled].view(2, 1, channels).unbind())
    return Normalised(y, batch, Moments(mean, var))


def backward(dy: Tensor, inputs: Inputs, saved: Moments, wanted: tuple[bool, ...]) -> Gradients:
    """Return the gradients; see `fused.Backward`."""
    x, mean_point, var_point, weight, _, constants, mixing, _ = inputs
    x = laid_out(x)
    dy = laid_out_like(dy, x)
    samples, channels = x.shape[:2]
    table = samples * channels
    cut = _cut_of(x)
    options = _options(mixing, constants)
    by_sample = cut.sample_programs if options["LN"] else 0
    pools = by_sample + (cut.channel_programs if options["BN"] and constants is None else 0)
    gates = wanted[1] or wanted[2]
    dx = torch.empty_like(x) if wanted[0] else None
    mean_gradient, var_gradient, weight_gradient = (
        tensor.new_empty(tensor.shape) if want and tensor is not None else None
        for tensor, want in zip((mean_point, var_point, weight), wanted[1:4], strict=True)
    )
    bias_gradient = saved.mean.new_empty(channels) if wanted[4] else None
    workspace = saved.mean.new_empty(
        4 * (samples + channels) + 2 * table * (1 + cut.splits) + 3 * cut.sample_programs + 2 * cut.channel_programs
    )
    units = cut.positions // cut.tile["UNIT"]
    # Constants, gate parameters and weight.
    given = _dense(*(constants or (None, None)), mean_point, var_point, weight)
    with _device_of(x):
        sums_kernel[(pools + cut.row_programs,)](
            dy,
            x,
            *saved,
            workspace,
            samples,
            channels,
            units,
            cut.span,
            cut.splits,
            table,
            by_sample,
            pools,
            **cut.tile,
            **cut.tables,
            num_warps=cut.warps,
        )
        pulls_kernel[(cut.sample_programs + cut.channel_programs,)](
            *saved,
            workspace,
            *given,
            weight_gradient,
            bias_gradient,
            samples,
            channels,
            cut.positions,
            cut.splits,
            table,
            cut.sample_programs,
            mixing.eps,
            **options,
            SPLITS=_power(cut.splits),
            **cut.tables,
        )
        if gates or dx is not None:
            gradient_kernel[(gates + (cut.row_programs if dx is not None else 0),)](
                dy,
                x,
                dx,
                *saved,
                workspace,
                *given,
                mean_gradient,
                var_gradient,
                samples,
                channels,
                units,
                cut.span,
                cut.splits,
                table,
                cut.sample_programs,
                cut.channel_programs,
                mixing.eps,
                **options,
                GATES=gates,
                **cut.tile,
                num_warps=cut.warps,
            )
    return Gradients(dx, mean_gradient, var_gradient, weight_gradient, bias_gradient)


def project_points(points: Sequence[Tensor], branches: Sequence[Branch]) -> None:
    """Put one or two simplex points (K,) of one dtype back on the simplex, in place and in one launch.

    Autograd is not told: where a point lies on the simplex nothing is written, so that a second forward pass before a
    backward pass does not count as a change, and where it does not, its projection has the weights that it had.
    """
    first, second = (*points, None)[:2]
    with _device_of(points[0]):
        project_kernel[(1,)](first, second, EPS=torch.finfo(points[0].dtype).eps, **_used(branches), num_warps=1)


TRITON = Backend("triton", forward, backward)
