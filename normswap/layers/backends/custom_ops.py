"""Fused backends as operators of torch, for compiled graphs: one opaque node instead of the plain formula.

On CPU, and where a fused backend is forced around the compiled call, a compiler gets `normswap::switch_norm` and,
behind it, `normswap::switch_norm_backward`; both run what the backend would run in eager mode. The plain formula is
some 150 nodes of a graph, each of which is traced, differentiated, lowered and handed to a C++ compiler. Operators are
functional: moments of the batch are returned, and recorded outside; only `normswap::project_points` writes.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from normswap.layers.backends.aten_passes import to_supported_layout
from normswap.layers.backends.cpu import NATIVE
from normswap.layers.backends.interface import (
    Backend,
    Gradients,
    Inputs,
    cast_gradients,
    check_gradient,
    check_tensors,
    differentiable_gradients,
    needs_backward,
)
from normswap.layers.backends.reference import Moments, accumulation_dtype, batch_norm, is_batch_norm
from normswap.layers.backends.selection import fused_backend
from normswap.layers.gating import Branch, Gate, Mixing, project_

# Both layouts are served, and the operators say in which one a result comes: a compiler may choose.
_TAGS = (torch.Tag.flexible_layout,)


def switch_norm_operator(inputs: Inputs, record: Callable[[Moments], None] | None = None) -> Tensor:
    """Normalise as one node of a graph; arguments as in `fused.switch_norm_fused`."""
    mixing, constants = inputs.mixing, inputs.constants
    options = mixing.gate, " ".join(mixing.branches), mixing.eps
    if constants is not None and not needs_backward(inputs):
        return cast(Tensor, _evaluate(*inputs.tensors, *constants, *options))
    y, batch_mean, batch_var, *_ = _forward(*inputs.tensors, *(constants or (None, None)), *options)
    if record is not None:
        record(Moments(batch_mean, batch_var))
    return cast(Tensor, y)


@torch.library.custom_op("normswap::project_points", mutates_args=("points",), device_types="cpu")
def project_points(points: list[Tensor]) -> None:
    """Put simplex points (K,) back on the simplex; one that lies there is left alone."""
    for point in points:
        project_(point)


@torch.library.custom_op("normswap::switch_norm_constant", mutates_args=(), tags=_TAGS)
def _evaluate(
    x: Tensor,
    mean_point: Tensor,
    var_point: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bn_mean: Tensor,
    bn_var: Tensor,
    gate: str,
    branches: str,
    eps: float,
) -> Tensor:
    inputs = _inputs(x, mean_point, var_point, weight, bias, bn_mean, bn_var, gate, branches, eps)
    if is_batch_norm((mean_point, var_point), inputs.mixing):
        return batch_norm(x, weight, bias, Moments(bn_mean, bn_var), eps)
    return _backend_for(x).forward(inputs).y


@_evaluate.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(to_supported_layout(x))


@torch.library.custom_op("normswap::switch_norm", mutates_args=(), tags=_TAGS)
def _forward(
    x: Tensor,
    mean_point: Tensor,
    var_point: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bn_mean: Tensor | None,
    bn_var: Tensor | None,
    gate: str,
    branches: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _inputs(x, mean_point, var_point, weight, bias, bn_mean, bn_var, gate, branches, eps)
    y, batch, saved, _ = _backend_for(x).forward(inputs)
    empty = x.new_empty((1, 0), dtype=accumulation_dtype(x))
    # An operator returns nothing that shares memory with what it was given, as the mean of one position may.
    return y, *(batch or (empty, empty.clone())), saved.mean.clone(), saved.var


@_forward.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, bn_mean, _, _, branches, _ = rest
    bn_channels = x.shape[1] if "bn" in branches.split() and bn_mean is None else 0
    batch, table = (x.new_empty(shape, dtype=accumulation_dtype(x)) for shape in ((1, bn_channels), x.shape[:2]))
    return torch.empty_like(to_supported_layout(x)), batch, torch.empty_like(batch), table, torch.empty_like(table)


@torch.library.custom_op("normswap::switch_norm_backward", mutates_args=(), tags=_TAGS)
def _backward(
    dy: Tensor,
    x: Tensor,
    mean_point: Tensor,
    var_point: Tensor,
    weight: Tensor | None,
    bn_mean: Tensor | None,
    bn_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gate: str,
    branches: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _inputs(x, mean_point, var_point, weight, None, bn_mean, bn_var, gate, branches, eps)
    check_gradient(dy, x, mean, var)
    found = _backend_for(x).backward(dy, inputs, Moments(mean, var), (True,) * len(Gradients._fields))
    assert None not in found
    return cast(tuple[Tensor, Tensor, Tensor, Tensor, Tensor], tuple(found))


@_backward.register_fake
def _(dy: Tensor, x: Tensor, mean_point: Tensor, var_point: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, mean, _, _, _, _ = rest
    sums = mean.new_empty(mean.shape[1])
    gates = torch.empty_like(mean_point), torch.empty_like(var_point)
    return torch.empty_like(to_supported_layout(x)), *gates, sums, torch.empty_like(sums)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, gate, branches, eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.options = gate, branches, eps


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, mean_point, var_point, weight, bias, bn_mean, bn_var, mean, var = ctx.saved_tensors
    inputs = _inputs(x, mean_point, var_point, weight, bias, bn_mean, bn_var, *ctx.options)
    if torch.is_grad_enabled():
        return *differentiable_gradients(dy, inputs, ctx.needs_input_grad[:5]), *_NO_GRADIENTS
    found = _backward(dy, x, mean_point, var_point, weight, bn_mean, bn_var, mean, var, *ctx.options)
    present = (None if owner is None else gradient for gradient, owner in zip(found, inputs.tensors, strict=True))
    return *cast_gradients(present, inputs), *_NO_GRADIENTS


_NO_GRADIENTS = (None, None, None, None, None)  # of constants and options
_forward.register_autograd(_differentiate, setup_context=_save)


def _backend_for(x: Tensor) -> Backend:
    """The backend for x now: a backward pass may come when none is forced any more, and any can do it."""
    return fused_backend(x) or NATIVE


def _inputs(
    x: Tensor,
    mean_point: Tensor,
    var_point: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    bn_mean: Tensor | None,
    bn_var: Tensor | None,
    gate: str,
    branches: str,
    eps: float,
) -> Inputs:
    """What the arguments of an operator say to a backend."""
    flat_moments = (None if moment is None else moment.reshape(-1) for moment in (bn_mean, bn_var))
    check_tensors(x, (mean_point, var_point), len(branches.split()), (*flat_moments, weight, bias))  # type: ignore[arg-type]
    constants = None if bn_mean is None or bn_var is None else Moments(bn_mean, bn_var)
    mixing = Mixing(cast(Gate, gate), cast(tuple[Branch, ...], tuple(branches.split())), eps)
    return Inputs(x, mean_point, var_point, weight, bias, constants, mixing)
