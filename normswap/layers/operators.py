"""Fused backends as operators of torch, for compiled graphs: one opaque node instead of the plain formula.

A compiler gets the plain formula unless a fused backend is forced: it fuses that with what stands around it, which no
operator of ours can. With `use_backend("native")` around the compiled call it gets `normswap::switch_norm` and, behind
it, `normswap::switch_norm_backward`; both run what the backend would run in eager mode. They are functional: moments
of the batch are returned, and recorded outside.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from normswap.layers.dispatch import fused_backend
from normswap.layers.fused import Backend, Gradients
from normswap.layers.importance import Branch, Gate
from normswap.layers.mixing import Mixing
from normswap.layers.moments import Moments, accumulation_dtype
from normswap.layers.native import NATIVE


def switch_norm_operator(
    x: Tensor,
    mean_point: Tensor,
    var_point: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    constants: Moments | None,
    mixing: Mixing,
    record: Callable[[Moments], None] | None = None,
) -> Tensor:
    """Normalise x (N, C, *spatial) as one node of a graph; arguments as in `fused.switch_norm_fused`."""
    fixed = (None, None) if constants is None else constants
    y, batch_mean, batch_var, *_ = _forward(
        x, mean_point, var_point, weight, bias, *fixed, mixing.gate, " ".join(mixing.branches), mixing.eps
    )
    if record is not None:
        record(Moments(batch_mean, batch_var))
    return cast(Tensor, y)


@torch.library.custom_op("normswap::switch_norm", mutates_args=())
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
    y, batch, saved = _backend(x).forward(
        x, mean_point, var_point, weight, bias, _moments(bn_mean, bn_var), _mixing(gate, branches, eps)
    )
    empty = x.new_empty((1, 0), dtype=accumulation_dtype(x))
    # An operator returns nothing that shares memory with what it was given, as the mean of one position may.
    return y, *(batch or (empty, empty.clone())), saved.mean.clone(), saved.var


@_forward.register_fake
def _(
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
    taken = x.shape[1] if "bn" in branches.split() and bn_mean is None else 0
    batch, table = (x.new_empty(shape, dtype=accumulation_dtype(x)) for shape in ((1, taken), x.shape[:2]))
    return torch.empty_like(x), batch, torch.empty_like(batch), table, torch.empty_like(table)


@torch.library.custom_op("normswap::switch_norm_backward", mutates_args=())
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
    found = _backend(x).backward(
        dy,
        x,
        mean_point,
        var_point,
        weight,
        _moments(bn_mean, bn_var),
        Moments(mean, var),
        _mixing(gate, branches, eps),
        (True,) * len(Gradients._fields),
    )
    assert None not in found
    return cast(tuple[Tensor, Tensor, Tensor, Tensor, Tensor], tuple(found))


@_backward.register_fake
def _(
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
    sums = mean.new_empty(mean.shape[1])
    gates = torch.empty_like(mean_point), torch.empty_like(var_point)
    return torch.empty_like(x), *gates, sums, torch.empty_like(sums)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, gate, branches, eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.options = gate, branches, eps


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, mean_point, var_point, weight, bias, bn_mean, bn_var, mean, var = ctx.saved_tensors
    dx, *parameters = _backward(dy, x, mean_point, var_point, weight, bn_mean, bn_var, mean, var, *ctx.options)
    owners = (mean_point, var_point, weight, bias)
    gradients = (None if o is None else g.to(o.dtype) for g, o in zip(parameters, owners, strict=True))
    return dx, *gradients, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _backend(x: Tensor) -> Backend:
    """The backend for x now: a backward pass may come when none is forced any more, and any can do it."""
    return fused_backend(x) or NATIVE


def _moments(mean: Tensor | None, var: Tensor | None) -> Moments | None:
    return None if mean is None or var is None else Moments(mean, var)


def _mixing(gate: str, branches: str, eps: float) -> Mixing:
    return Mixing(cast(Gate, gate), cast(tuple[Branch, ...], tuple(branches.split())), eps)
