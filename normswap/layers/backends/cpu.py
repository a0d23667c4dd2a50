"""The backend `native`: fused passes on CPU, by the C extension if possible, else by ATen kernels.

The extension runs a forward or a backward pass in one call. This saves most of the time of a small layer, and torch has
no fast kernels for moments and sums of half-precision activations. It is optional: `AVAILABLE` is False if no compiler
was found at installation.

It has engines for processors with vectors of several widths, and uses the widest that the processor can run. The
environment variable NORMSWAP_CPU_VARIANT selects another one: `baseline`, `avx2` or `avx512`.

The extension runs on torch's own threads, through the OpenMP runtime that torch was built with. If that runtime is
another one, the extension has one thread, and large activations go to the ATen kernels.
"""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

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
from normswap.layers.gating import BRANCHES, ImportanceWeights, Mixing, gate_gradient

_C: Any
try:
    from normswap.layers import _compiled as _C  # type: ignore[attr-defined, no-redef]
except ImportError:
    _C = None
# INTERFACE of csrc/module.c. An extension that was built from other sources is ignored.
_INTERFACE = 5
if getattr(_C, "INTERFACE", None) != _INTERFACE:
    _C = None

AVAILABLE = _C is not None

_VARIANT_VARIABLE = "NORMSWAP_CPU_VARIANT"


def _use_variant() -> str | None:
    """Choose the engine of the extension and return its name; None without the extension."""
    if not AVAILABLE:
        return None
    engines = _C.list_engines()
    name: str = os.environ.get(_VARIANT_VARIABLE) or engines[-1]
    if name not in engines:
        raise LayerError(f"{_VARIANT_VARIABLE}: expected one of {engines}, which this processor can run, got {name!r}")
    _C.use_engine(name)
    return name


# The engine in use; None without the extension.
VARIANT = _use_variant()

# The enum of csrc/dtypes.h. int64 is for the number of batches only.
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int64: 4}
FLOAT_CODES = {dtype: code for dtype, code in _DTYPE_CODES.items() if dtype != torch.int64}

# Up to this number of values divided by the number of torch's threads, one thread here is faster than all of torch's.
_MAX_SINGLE_THREAD_NUMEL = 1 << 21

# A tensor for the extension: address, dtype code and number of elements; or None.
_Buffer = tuple[int, int, int] | None


def _use_torch_threads() -> bool:
    """Give the extension the entry points of torch's OpenMP runtime; return False if there are none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    openmp = AVAILABLE and torch.backends.openmp.is_available()  # type: ignore[no-untyped-call]
    if not (openmp and library.exists()):
        return False
    try:
        torch_cpu = ctypes.CDLL(str(library))  # already loaded; also finds symbols of the libraries it is linked to
        names = (torch_cpu.GOMP_parallel, torch_cpu.omp_get_thread_num, torch_cpu.omp_get_num_threads)
    except (OSError, AttributeError):
        return False
    _C.use_threads(*(ctypes.cast(name, ctypes.c_void_p).value for name in names))
    return True


_USES_TORCH_THREADS = _use_torch_threads()


# --- the passes of the backend


def forward(inputs: Inputs) -> Normalised:
    """Run the forward pass; see `interface.Forward`."""
    inputs = _in_supported_layout(inputs)
    if can_run_extension(inputs):
        return extension_forward(inputs)
    moments, buffer = instance_moments(inputs.x)
    constants = None
    if inputs.running_stats_update is not None:
        constants = inputs.running_stats_update(pool_samples(moments))
        inputs = inputs._replace(constants=constants)
    scale, shift, batch = moment_algebra.scale_and_shift(read_site(inputs, moments))
    y = scale_and_shift(inputs.x, scale, shift, buffer=buffer)
    return Normalised(y, batch, moments, constants)


def backward(dy: Tensor, inputs: Inputs, saved: Moments | None, needs_input_grad: tuple[bool, ...]) -> Gradients:
    """Run the backward pass; see `interface.Backward`."""
    inputs = _in_supported_layout(inputs)
    dy = match_layout(dy, inputs.x)
    if saved is not None:  # hooks on saved tensors may change the layout
        saved = Moments(*(moment.contiguous() for moment in saved))
    if can_run_extension(inputs):
        return extension_backward(dy, inputs, saved, needs_input_grad)
    if saved is None:
        saved = instance_moments(inputs.x)[0]
    x, mixing, site = inputs.x, inputs.mixing, read_site(inputs, saved)
    dy_sum, dy_xhat_sum = gradient_sums(dy, x, *moment_algebra.mean_and_rstd(site))
    terms = moment_algebra.backward_terms(site, dy_sum, dy_xhat_sum, x.numel() // dy_sum.numel())
    needs_x, needs_mean_gate, needs_var_gate, needs_weight, needs_bias = needs_input_grad
    return Gradients(
        input_gradient(dy, x, terms.scale, terms.slope, terms.shift, saved.mean) if needs_x else None,
        _gate_gradient(site.means, terms.means, mixing, inputs.mean_gate) if needs_mean_gate else None,
        _gate_gradient(site.variances, terms.variances, mixing, inputs.var_gate) if needs_var_gate else None,
        terms.weight if needs_weight else None,
        terms.bias if needs_bias else None,
    )


def _in_supported_layout(inputs: Inputs) -> Inputs:
    x = to_supported_layout(inputs.x)
    return inputs if x is inputs.x else inputs._replace(x=x)


def _gate_gradient(
    branch_weights: ImportanceWeights, gradient: ImportanceWeights, mixing: Mixing, point: Tensor
) -> Tensor:
    return torch.tensor(gate_gradient(branch_weights, gradient, mixing), dtype=point.dtype, device=point.device)


NATIVE = Backend("native", forward, backward, supports_running_stats_update=True)


# --- the C extension


def can_run_extension(inputs: Inputs) -> bool:
    """Return whether the extension accepts these inputs and is the fastest choice for them."""
    if inputs.running_stats_update is not None or not AVAILABLE:
        return False
    for tensor in inputs.tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.dtype in FLOAT_CODES):
            return False
    return (
        _USES_TORCH_THREADS
        or (threads := torch.get_num_threads()) == 1
        or inputs.x.numel() * threads <= _MAX_SINGLE_THREAD_NUMEL
    )


def extension_forward(inputs: Inputs) -> Normalised:
    """Run the forward pass by the extension. x is contiguous or channels_last."""
    x, mixing = inputs.x, inputs.mixing
    dtype = accumulation_dtype(x)
    y, table = torch.empty_like(x), x.shape[:2]
    saved = _empty_moments(x, table, dtype)
    batch = None
    if inputs.constants is None and "bn" in mixing.branches:
        batch = _empty_moments(x, (1, table[1]), dtype)
    inputs = _with_contiguous_parameters(inputs)  # keeps copies alive during the call
    batch_mean, batch_var = batch or (None, None)
    own = {"y": y, "batch_mean": batch_mean, "batch_var": batch_var, "kept_constants": None}
    has_moments = call_forward(_layer_arguments(inputs, saved, own))
    return Normalised(y, batch, saved if has_moments else None)


def extension_backward(
    dy: Tensor, inputs: Inputs, saved: Moments | None, needs_input_grad: tuple[bool, ...]
) -> Gradients:
    """Run the backward pass by the extension. dy has the layout of x."""
    gradients = empty_gradients(*inputs[:5], needs_input_grad)
    inputs = _with_contiguous_parameters(inputs)  # keeps copies alive during the call
    dx, mean_gate, var_gate, weight, bias = gradients
    own = {
        "dy": dy,
        "dx": dx,
        "mean_weight_gradient": mean_gate,
        "var_weight_gradient": var_gate,
        "weight_gradient": weight,
        "bias_gradient": bias,
    }
    call_backward(_layer_arguments(inputs, saved, own))
    return gradients


# `empty_like` takes half the time of `new_empty`, which matters for small layers.


def empty_gradients(
    x: Tensor,
    mean_gate: Tensor,
    var_gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    needs_input_grad: tuple[bool, ...],
) -> Gradients:
    """Return memory for the gradients that are needed; those of weight and bias in the dtype of the moments."""
    needs_x, needs_mean_gate, needs_var_gate, needs_weight, needs_bias = needs_input_grad
    return Gradients(
        torch.empty_like(x) if needs_x else None,
        torch.empty_like(mean_gate) if needs_mean_gate else None,
        torch.empty_like(var_gate) if needs_var_gate else None,
        _empty_row(weight, x) if needs_weight else None,
        _empty_row(bias, x) if needs_bias else None,
    )


def _empty_moments(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Moments:
    mean = x.new_empty(shape, dtype=dtype)
    return Moments(mean, torch.empty_like(mean))


def _empty_row(parameter: Tensor | None, x: Tensor) -> Tensor:
    """Return an empty tensor (C,) in the dtype of the moments of x."""
    dtype = accumulation_dtype(x)
    if parameter is not None and parameter.dtype == dtype and parameter.is_contiguous():
        return torch.empty_like(parameter)
    return x.new_empty(x.shape[1], dtype=dtype)


def call_forward(arguments: dict[str, Any]) -> bool:
    """Run the forward pass of the extension; return whether it wrote the moments.

    Raises:
        ValueError: the arguments do not fit together.
    """
    has_moments: bool = _C.forward(arguments)
    return has_moments


def call_backward(arguments: dict[str, Any]) -> None:
    """Run the backward pass of the extension.

    Raises:
        ValueError: the arguments do not fit together.
    """
    _C.backward(arguments)


class GateState(NamedTuple):
    """What the values of the gates of a layer say."""

    is_batch_norm: bool
    is_mean_on_simplex: bool
    is_var_on_simplex: bool


def read_gates(mean_gate: Tensor, var_gate: Tensor, mixing: Mixing) -> GateState:
    """Read gate parameters that are contiguous, floating and on CPU. The rounding of points is tolerated.

    Raises:
        ValueError: a gate has a wrong number of entries.
    """
    options = _options(mixing, torch.float32)
    flags: int = _C.read_gates(describe(mean_gate), describe(var_gate), options["softmax"], options["branch_order"])
    return _GATE_STATES[flags]


_GATE_STATES: tuple[GateState, ...] = tuple(
    GateState(bool(flags & 1), bool(flags & 2), bool(flags & 4)) for flags in range(8)
)


def update_running(
    batch: Moments,
    running_mean: Tensor,
    running_var: Tensor,
    count: Tensor | None,
    *,
    momentum: float,
    var_factor: float,
) -> bool:
    """Update running statistics (C,) in place by the moments (1, C) of a batch.

    Args:
        count: number of batches, increased by 1.
        momentum: weight of the batch in the running statistics.
        var_factor: factor of the variance of the batch.

    Returns:
        False if the extension cannot do it; then nothing has changed.
    """
    changed = (running_mean, running_var) if count is None else (running_mean, running_var, count)
    if not AVAILABLE or not all(t.is_cpu and t.is_contiguous() for t in (*batch, *changed)):
        return False
    if not all(t.dtype in FLOAT_CODES for t in (*batch, running_mean, running_var)):
        return False
    if count is not None and count.dtype != torch.int64:
        return False
    arguments = {
        "channels": batch.mean.numel(),
        "momentum": momentum,
        "var_factor": var_factor,
        "mean": describe(batch.mean),
        "var": describe(batch.var),
        "running_mean": describe(running_mean),
        "running_var": describe(running_var),
        "num_batches_tracked": describe(count),
    }
    _C.update_running(arguments)
    if not running_mean.is_inference():
        torch.autograd.graph.increment_version(changed)
    return True


def _layer_arguments(inputs: Inputs, moments: Moments | None, own: dict[str, Tensor | None]) -> dict[str, Any]:
    """Return the arguments of a pass, with the names of `LayerArguments` in csrc/module.c.

    Args:
        own: the tensors that the other pass has not.
    """
    x, mean_gate, var_gate, weight, bias, constants, mixing, _, matching = inputs
    mean, var = moments or (None, None)
    constant_mean, constant_var = constants or (None, None)
    ln_mean_shift, ln_var_scale, in_var_scale = matching or (None, None, None)
    tensors = {
        "x": x,
        "mean": mean,
        "var": var,
        "constant_mean": constant_mean,
        "constant_var": constant_var,
        "weight": weight,
        "bias": bias,
        "mean_weight": mean_gate,
        "var_weight": var_gate,
        "ln_mean_shift": ln_mean_shift,
        "ln_var_scale": ln_var_scale,
        "in_var_scale": in_var_scale,
        **own,
    }
    # As `describe`, without a call for each of about 20 tensors.
    arguments: dict[str, Any] = {
        name: None if tensor is None else (tensor.data_ptr(), _DTYPE_CODES[tensor.dtype], tensor.numel())
        for name, tensor in tensors.items()
    }
    shared = shared_arguments(x, mixing)
    if shared is None:
        raise LayerError(f"expected a contiguous or channels_last input, got strides {x.stride()}")
    return arguments | shared


def shared_arguments(x: Tensor, mixing: Mixing) -> dict[str, Any] | None:
    """Return the arguments of both passes that are no tensors; None if the extension cannot read x as it is."""
    channels_last = not x.is_contiguous()
    if not AVAILABLE or x.dtype not in FLOAT_CODES or (channels_last and not is_channels_last(x)):
        return None
    samples, channels = x.shape[:2]
    return {
        **_options(mixing, x.dtype),
        "samples": samples,
        "channels": channels,
        "positions": x.numel() // (samples * channels),
        "channels_last": channels_last,
        "threads": torch.get_num_threads() if _USES_TORCH_THREADS else 1,
    }


@cache
def _options(mixing: Mixing, dtype: torch.dtype) -> dict[str, int | float]:
    """Return the arguments that only depend on the options of a layer; do not change the result."""
    return {
        "dtype": _DTYPE_CODES[dtype],
        "softmax": mixing.gate == "softmax",
        "branch_order": sum(  # two bits for each branch: its index plus 1, or 0 if it is not mixed
            (mixing.branches.index(branch) + 1) << 2 * at
            for at, branch in enumerate(BRANCHES)
            if branch in mixing.branches
        ),
        "num_groups": mixing.num_groups,
        "eps": mixing.eps,
    }


def _with_contiguous_parameters(inputs: Inputs) -> Inputs:
    """Return inputs whose gate parameters, weight and bias are contiguous."""
    _, mean_gate, var_gate, weight, bias, *_ = inputs
    if (
        mean_gate.is_contiguous()
        and var_gate.is_contiguous()
        and (weight is None or weight.is_contiguous())
        and (bias is None or bias.is_contiguous())
    ):
        return inputs
    mean_gate, var_gate = (gate.detach().contiguous() for gate in (mean_gate, var_gate))
    weight, bias = (None if p is None else p.detach().contiguous() for p in (weight, bias))
    return inputs._replace(mean_gate=mean_gate, var_gate=var_gate, weight=weight, bias=bias)


def describe(tensor: Tensor | None) -> _Buffer:
    """Return a tensor as the extension takes it; the caller keeps it alive."""
    return None if tensor is None else (tensor.data_ptr(), _DTYPE_CODES[tensor.dtype], tensor.numel())
