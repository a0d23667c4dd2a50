"""The backend for CPU compiled: a forward pass is one call of C, and so is a backward pass.

On small maps a layer spends more time between its passes than in them, and torch has no kernels that take moments and
sums of half-precision numbers at the price of reading them. The extension is built when the package is installed and a
compiler is there; without it `AVAILABLE` is false, and `tables.py` and `passes.py` do the same.

It runs on the threads that torch has: those of the OpenMP runtime that torch was built with. Where there is another
one, large activations are left to torch's kernels.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normswap.errors import LayerError
from normswap.layers.backends import moment_algebra
from normswap.layers.backends.aten_passes import (
    gradient_sums,
    input_gradient,
    instance_moments,
    is_channels_last,
    match_layout,
    scale_and_shift,
    to_supported_layout,
)
from normswap.layers.backends.interface import Backend, Gradients, Inputs, Normalised
from normswap.layers.backends.moment_algebra import pool_samples, read_site
from normswap.layers.backends.reference import Moments, accumulation_dtype
from normswap.layers.gating import BRANCHES, Branch, ImportanceWeights, Mixing, gate_gradient

# MERGED DOC: Switchable Normalization out of ATen kernels: two passes over the activation forward, two backward.


_C: Any
try:
    from normswap.layers import _compiled as _C  # type: ignore[attr-defined, no-redef]
except ImportError:
    _C = None
# What `_compiled.c` says of itself; one that was built from an older file is not called.
_INTERFACE = 2
if getattr(_C, "INTERFACE", None) != _INTERFACE:
    _C = None

AVAILABLE = _C is not None

# The numbers that the extension reads and writes, by its own names for them.
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Up to so many values over the number of threads, one thread here beats them all in torch's kernels.
_MAX_SINGLE_THREAD_NUMEL = 1 << 21


def _use_torch_threads() -> bool:
    """Hand the extension the entry points of torch's own OpenMP runtime; say whether there are any."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    openmp = AVAILABLE and torch.backends.openmp.is_available()  # type: ignore[no-untyped-call]
    if not (openmp and library.exists()):
        return False
    try:
        torch_cpu = ctypes.CDLL(str(library))  # loaded already; its names include those of what it is linked to
        names = (torch_cpu.GOMP_parallel, torch_cpu.omp_get_thread_num, torch_cpu.omp_get_num_threads)
    except (OSError, AttributeError):
        return False
    _C.use_threads(*(ctypes.cast(name, ctypes.c_void_p).value for name in names))
    return True


_USES_TORCH_THREADS = _use_torch_threads()


def can_run(inputs: Inputs) -> bool:
    """Say whether `normalise` and `differentiate` can take these inputs, and are the fastest to do so."""
    x, mean_point, var_point, weight, bias, *_ = inputs
    if inputs.running_stats_update is not None or not AVAILABLE:
        return False
    if not all(_is_readable(t) for t in (x, mean_point, var_point, weight, bias) if t is not None):
        return False
    return (
        _USES_TORCH_THREADS
        or (threads := torch.get_num_threads()) == 1
        or x.numel() * threads <= _MAX_SINGLE_THREAD_NUMEL
    )


def _is_readable(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype in _DTYPE_CODES


def normalise(inputs: Inputs) -> Normalised:
    """Normalise; see `fused.Forward`. x is contiguous or channels_last."""
    x, constants, mixing = inputs.x, inputs.constants, inputs.mixing
    dtype = accumulation_dtype(x)
    y, table = torch.empty_like(x), x.shape[:2]
    saved = Moments(x.new_empty(table, dtype=dtype), x.new_empty(table, dtype=dtype))
    batch = None
    if constants is None and "bn" in mixing.branches:
        row = (1, table[1])
        batch = Moments(x.new_empty(row, dtype=dtype), x.new_empty(row, dtype=dtype))
    # Copies, where there are any, have to outlive the call.
    arguments, _copies = _layer_arguments(inputs, saved)
    _C.normalise(*arguments, *_buffer(x), *_buffer(y), *_buffers(batch))
    return Normalised(y, batch, saved)


def differentiate(dy: Tensor, inputs: Inputs, saved: Moments, needs_input_grad: tuple[bool, ...]) -> Gradients:
    """Return the gradients; see `fused.Backward`. dy is laid out as x is."""
    x, mean_point, var_point, *_ = inputs
    table = saved.mean
    gradients = Gradients(
        torch.empty_like(x) if needs_input_grad[0] else None,
        torch.empty_like(mean_point) if needs_input_grad[1] else None,
        torch.empty_like(var_point) if needs_input_grad[2] else None,
        table.new_empty(table.shape[1]) if needs_input_grad[3] else None,
        table.new_empty(table.shape[1]) if needs_input_grad[4] else None,
    )
    arguments, _copies = _layer_arguments(inputs, saved)
    _C.differentiate(*arguments, *_buffer(dy), *_buffer(x), *(number for each in gradients for number in _buffer(each)))
    return gradients


def record(
    batch: Moments,
    running_mean: Tensor,
    running_var: Tensor,
    count: Tensor | None,
    *,
    momentum: float,
    factor: float,
) -> bool:
    """Move running statistics (C,) towards the mean, and `factor` times the variance, of a batch (1, C).

    Args:
        count: is made one higher.
        momentum: share of the new ones.

    Returns:
        Whether it was done: nothing is where the extension cannot do it.
    """
    changed = (running_mean, running_var) if count is None else (running_mean, running_var, count)
    if not AVAILABLE or not all(t.is_cpu and t.is_contiguous() for t in (*batch, *changed)):
        return False
    if not all(t.dtype in _DTYPE_CODES for t in (*batch, running_mean, running_var)):
        return False
    if count is not None and count.dtype != torch.int64:
        return False
    counter_arguments = (0, 0) if count is None else (count.data_ptr(), count.numel())
    running = *_buffer(running_mean), *_buffer(running_var)
    _C.record(batch.mean.numel(), momentum, factor, *_buffers(batch), *running, *counter_arguments)
    if not running_mean.is_inference():
        torch.autograd.graph.increment_version(changed)
    return True


def _layer_arguments(inputs: Inputs, moments: Moments) -> tuple[tuple[Any, ...], list[Tensor]]:
    """What both functions of the extension are given first, and the copies that were made for it."""
    x, mean_point, var_point, weight, bias, constants, mixing, _ = inputs
    samples, channels = x.shape[:2]
    copies: list[Tensor] = []
    arguments = (
        _DTYPE_CODES[x.dtype],
        samples,
        channels,
        x.numel() // (samples * channels),
        _is_channels_last(x),
        torch.get_num_threads() if _USES_TORCH_THREADS else 1,
        *_buffers(moments),
        *_buffers(constants),
        *_buffer(_as_contiguous(weight, copies)),
        *_buffer(_as_contiguous(bias, copies)),
        *_buffer(_as_contiguous(mean_point, copies)),
        *_buffer(_as_contiguous(var_point, copies)),
        mixing.gate == "softmax",
        _encode_branch_order(mixing.branches),
        mixing.eps,
    )
    return arguments, copies


@cache
def _encode_branch_order(branches: tuple[Branch, ...]) -> int:
    """Where each branch of `BRANCHES` stands among those in use, from 1 on and in two bits; 0 for one that is not."""
    return sum((branches.index(branch) + 1) << 2 * at for at, branch in enumerate(BRANCHES) if branch in branches)


def _is_channels_last(x: Tensor) -> bool:
    if x.is_contiguous():
        return False
    if not is_channels_last(x):
        raise LayerError(f"expected a contiguous or channels_last input, got strides {x.stride()}")
    return True


def _as_contiguous(tensor: Tensor | None, copies: list[Tensor]) -> Tensor | None:
    """A parameter with its entries one after the other."""
    if tensor is None or tensor.is_contiguous():
        return tensor
    copies.append(tensor.detach().contiguous())
    return copies[-1]


def _buffer(tensor: Tensor | None) -> tuple[int, int, int]:
    """The address, the kind and the length of a tensor, as the extension takes them."""
    return _NULL_BUFFER if tensor is None else (tensor.data_ptr(), _DTYPE_CODES[tensor.dtype], tensor.numel())


_NULL_BUFFER = (0, 0, -1)


def _buffers(moments: Moments | None) -> tuple[int, ...]:
    return _NULL_BUFFER * 2 if moments is None else (*_buffer(moments.mean), *_buffer(moments.var))


def forward(inputs: Inputs) -> Normalised:
    """Normalise; see `fused.Forward`."""
    inputs = inputs._replace(x=to_supported_layout(inputs.x))
    if can_run(inputs):
        return normalise(inputs)
    moments, buffer = instance_moments(inputs.x)
    constants = None
    if inputs.running_stats_update is not None:
        constants = inputs.running_stats_update(pool_samples(moments))
        inputs = inputs._replace(constants=constants)
    scale, shift, batch = moment_algebra.scale_and_shift(read_site(inputs, moments))
    y = scale_and_shift(inputs.x, scale, shift, buffer=buffer)
    return Normalised(y, batch, moments, constants)


def backward(dy: Tensor, inputs: Inputs, saved: Moments, needs_input_grad: tuple[bool, ...]) -> Gradients:
    """Return the gradients; see `fused.Backward`."""
    inputs = inputs._replace(x=to_supported_layout(inputs.x))
    dy = match_layout(dy, inputs.x)
    saved = Moments(*(moment.contiguous() for moment in saved))  # hooks on saved tensors may have laid them out anew
    if can_run(inputs):
        return differentiate(dy, inputs, saved, needs_input_grad)
    x, mixing, site = inputs.x, inputs.mixing, read_site(inputs, saved)
    dy_sum, dy_xhat_sum = gradient_sums(dy, x, *moment_algebra.mean_and_rstd(site))
    scale, slope, shift, means, variances, *affine = moment_algebra.backward_terms(
        site, dy_sum, dy_xhat_sum, x.numel() // dy_sum.numel()
    )
    return Gradients(
        input_gradient(dy, x, scale, slope, shift, saved.mean) if needs_input_grad[0] else None,
        _gate_gradient(site.means, means, mixing, inputs.mean_point) if needs_input_grad[1] else None,
        _gate_gradient(site.variances, variances, mixing, inputs.var_point) if needs_input_grad[2] else None,
        affine[0] if needs_input_grad[3] else None,
        affine[1] if needs_input_grad[4] else None,
    )


def _gate_gradient(
    branch_weights: ImportanceWeights, gradient: ImportanceWeights, mixing: Mixing, point: Tensor
) -> Tensor:
    return torch.tensor(gate_gradient(branch_weights, gradient, mixing), dtype=point.dtype, device=point.device)


NATIVE = Backend("native", forward, backward, renorm=True)
