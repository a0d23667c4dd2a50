"""The short way of a layer to the C extension, for eager calls on CPU whose `bn` branch has constant moments.

On a small map the checks of `switch_norm` and the operators of torch around the passes take longer than the passes.
Here the extension checks what it gets, and one tensor has all that the backward pass needs. Every other call, and each
one that the extension refuses, takes the way of `switch_norm`, which explains what is wrong.
"""

from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from normswap.layers.backends import cpu
from normswap.layers.backends.aten_passes import match_layout
from normswap.layers.backends.cpu import NATIVE
from normswap.layers.backends.interface import Inputs, cast_gradients, differentiable_gradients
from normswap.layers.backends.reference import Moments, accumulation_dtype
from normswap.layers.backends.selection import fused_backend, is_eager
from normswap.layers.gated_module import GatedModule
from normswap.layers.gating import BRANCHES, Mixing, check_bn_statistics, check_branches, check_gate
from normswap.layers.matching import Matching, matching_for


class _LayerTensors(NamedTuple):
    """The tensors of a call, with their names in the extension."""

    x: Tensor
    mean_weight: Tensor
    var_weight: Tensor
    weight: Tensor | None
    bias: Tensor | None
    constant_mean: Tensor | None
    constant_var: Tensor | None
    ln_mean_shift: Tensor | None
    ln_var_scale: Tensor | None
    in_var_scale: Tensor | None


def normalise_directly(layer: GatedModule, x: Tensor, eps: float) -> Tensor | None:
    """Return the normalized x, or None if the call has to take the way of `switch_norm`.

    The caller has checked the number of dimensions. Trained points are projected in place, as by
    `GatedModule.project_gates`.

    Raises:
        LayerError: an option of the layer is unknown.
    """
    if not (is_eager(x) and x.is_cpu and fused_backend(x) is NATIVE):
        return None
    parameters, buffers, training = layer._parameters, layer._buffers, layer.training
    mean_gate, var_gate = parameters.get("mean_weight"), parameters.get("var_weight")
    running_mean, running_var = buffers.get("running_mean"), buffers.get("running_var")
    if (
        mean_gate is None
        or var_gate is None
        or running_mean is None
        or running_var is None
        or "weight" not in parameters  # frozen or parametrized
        or "bias" not in parameters
        or layer.fixed_moments is not None
        or (training and layer.bn_statistics != "running")
        or x.dim() < 2
        or x.numel() <= x.shape[0] * x.shape[1]
    ):
        return None
    check_gate(layer.gate)
    check_bn_statistics(layer.bn_statistics)
    if layer.branches != BRANCHES:
        check_branches(layer.branches)
    if not (_is_readable(mean_gate) and _is_readable(var_gate)):
        return None
    mixing = _mixing(layer.gate, tuple(layer.branches), eps, layer.num_groups)
    weight, bias, dtype = parameters["weight"], parameters["bias"], accumulation_dtype(x)
    has_gradients = torch.is_grad_enabled()
    try:
        gates = cpu.read_gates(mean_gate, var_gate, mixing)
        if training and layer.gate == "simplex" and not (gates.is_mean_on_simplex and gates.is_var_on_simplex):
            layer.project_gates()
        if gates.is_batch_norm and not (has_gradients and (mean_gate.requires_grad or var_gate.requires_grad)):
            return _batch_norm(x, weight, bias, running_mean, running_var, eps)
        matching = matching_for(layer.matching, mixing.branches, dtype) or Matching()
        tensors = _LayerTensors(x, mean_gate, var_gate, weight, bias, running_mean, running_var, *matching)
        arguments = _arguments(tensors, mixing)
        if arguments is None:
            return None
        if not has_gradients:
            return _run_forward(x, arguments)[0]
        return cast(Tensor, _Direct.apply(*tensors, mixing, arguments))
    except ValueError:
        return None


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float
) -> Tensor | None:
    """Return what BatchNorm in evaluation returns; None if the tensors do not fit x or have to be converted first."""
    dtype, shape = accumulation_dtype(x), x.shape[1:2]
    for each in (weight, bias, running_mean, running_var):
        if each is not None and not (_is_readable(each) and each.dtype == dtype and each.shape == shape):
            return None
    if torch.is_grad_enabled():  # the backward pass must see the values of now
        running_mean, running_var = running_mean.clone(), running_var.clone()
    return torch.native_batch_norm(x, weight, bias, running_mean, running_var, False, 0.0, eps)[0]


def _is_readable(tensor: Tensor) -> bool:
    """Return whether the extension can read a tensor as it is: plain, floating, contiguous and on CPU."""
    return (
        type(tensor) in _PLAIN_TENSOR_TYPES
        and tensor.is_cpu
        and tensor.dtype in cpu.FLOAT_CODES
        and tensor.is_contiguous()
    )


_mixing = cache(Mixing)
_PLAIN_TENSOR_TYPES = (Tensor, torch.nn.Parameter)


def _arguments(tensors: _LayerTensors, mixing: Mixing) -> dict[str, Any] | None:
    """Return the arguments of both passes, or None if the extension cannot read a tensor as it is."""
    x = tensors.x
    arguments = cpu.shared_arguments(x, mixing)
    if arguments is None:
        return None
    for name, tensor in zip(_LayerTensors._fields, tensors, strict=True):
        if tensor is not None and tensor is not x and not _is_readable(tensor):
            return None
        arguments[name] = cpu.describe(tensor)
    return arguments


def _run_forward(x: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, bool]:
    """Run the forward pass; return y, what it saved, and whether that contains moments.

    Saved are the moments (2, N, C) of x, which a pass at the vertex does not compute, then the constants (2, C).
    """
    table, channels = x.shape[0] * x.shape[1], x.shape[1]
    y, saved = torch.empty_like(x), x.new_empty(2 * (table + channels), dtype=accumulation_dtype(x))
    start, code, size = saved.data_ptr(), cpu.FLOAT_CODES[saved.dtype], saved.element_size()
    has_moments = cpu.call_forward(
        {
            **arguments,
            "mean": (start, code, table),
            "var": (start + table * size, code, table),
            "kept_constants": (start + 2 * table * size, code, 2 * channels),
            "y": cpu.describe(y),
            "batch_mean": None,
            "batch_var": None,
        }
    )
    return y, saved, has_moments


class _Direct(torch.autograd.Function):
    """Runs the passes of the extension. Its backward pass is differentiable by way of the plain formula."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Run the forward pass; `args` are the tensors of the layer, the mixing and the arguments of both passes."""
        *values, mixing, arguments = args
        y, saved, ctx.has_moments = _run_forward(values[0], arguments)
        ctx.save_for_backward(*values[:5], saved, *values[7:])
        ctx.mixing = mixing
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the tensors."""
        x, mean_gate, var_gate, weight, bias, saved, *matching = ctx.saved_tensors
        needs_input_grad = ctx.needs_input_grad[:5]
        tensors = _LayerTensors(x, mean_gate, var_gate, weight, bias, None, None, *matching)
        arguments = None if torch.is_grad_enabled() or not _is_readable(saved) else _arguments(tensors, ctx.mixing)
        if arguments is None:  # a second derivative, or a hook changed what was saved
            return *_general_gradients(dy, tensors, saved, ctx, needs_input_grad), *_NO_GRADIENTS
        dy, table, channels = match_layout(dy, x), x.shape[0] * x.shape[1], x.shape[1]
        gradients = cpu.empty_gradients(*tensors[:5], needs_input_grad)
        start, code, size = saved.data_ptr(), cpu.FLOAT_CODES[saved.dtype], saved.element_size()
        arguments["mean"] = (start, code, table) if ctx.has_moments else None
        arguments["var"] = (start + table * size, code, table) if ctx.has_moments else None
        arguments["constant_mean"] = (start + 2 * table * size, code, channels)
        arguments["constant_var"] = (start + (2 * table + channels) * size, code, channels)
        arguments["dy"] = cpu.describe(dy)
        for name, gradient in zip(_GRADIENTS, gradients, strict=True):
            arguments[name] = cpu.describe(gradient)
        cpu.call_backward(arguments)
        return *cast_gradients(gradients, tensors[:5]), *_NO_GRADIENTS


_GRADIENTS = ("dx", "mean_weight_gradient", "var_weight_gradient", "weight_gradient", "bias_gradient")
_NO_GRADIENTS = (None,) * 7


def _general_gradients(
    dy: Tensor, tensors: _LayerTensors, saved: Tensor, ctx: Any, needs_input_grad: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients by the backend, or by the plain formula if they need a graph."""
    samples, channels = tensors.x.shape[:2]
    constants = Moments(*saved[2 * samples * channels :].view(2, 1, channels))
    inputs = Inputs(*tensors[:5], constants, ctx.mixing, None, Matching(*tensors[7:]))
    if torch.is_grad_enabled():
        return differentiable_gradients(dy, inputs, needs_input_grad)
    moments = None
    if ctx.has_moments:
        moments = Moments(*saved[: 2 * samples * channels].view(2, samples, channels))
    return cast_gradients(NATIVE.backward(dy, inputs, moments, needs_input_grad), tensors[:5])
