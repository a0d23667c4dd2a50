"""Fused backends under autograd: what a backend has to provide, and the node that calls it in eager mode.

The node keeps x, tables and parameters. With a graph of the backward pass asked for (double backward), the plain
formula is differentiated instead. Running statistics are recorded in the forward pass, before anything is saved:
gradient checkpointing runs it again only as far as backward needs it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from normswap.layers.importance import importance_weights
from normswap.layers.mixing import Mixing
from normswap.layers.moments import Moments
from normswap.layers.reference import switch_norm_reference


class Normalised(NamedTuple):
    """y of the shape, dtype and layout of x; moments (1, C) of the batch where the `bn` branch took them; those of x
    over its positions (N, C), which are all that backward needs beside the inputs.
    """

    y: Tensor
    batch: Moments | None
    saved: Moments


class Gradients(NamedTuple):
    """Gradients of x, the gate parameters, weight and bias; None where none was wanted."""

    x: Tensor | None
    mean_point: Tensor | None
    var_point: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Forward(Protocol):
    """Normalise x (N, C, *spatial) with gate parameters (K,); `constants` (1, C) are for the `bn` branch."""

    def __call__(
        self,
        x: Tensor,
        mean_point: Tensor,
        var_point: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        constants: Moments | None,
        mixing: Mixing,
    ) -> Normalised: ...


class Backward(Protocol):
    """Return the gradients `wanted`, in the order of `Gradients`."""

    def __call__(
        self,
        dy: Tensor,
        x: Tensor,
        mean_point: Tensor,
        var_point: Tensor,
        weight: Tensor | None,
        constants: Moments | None,
        saved: Moments,
        mixing: Mixing,
        wanted: tuple[bool, ...],
    ) -> Gradients: ...


class Backend(NamedTuple):
    """A fused implementation: its name, and its two passes."""

    name: str
    forward: Forward
    backward: Backward


def switch_norm_fused(
    backend: Backend,
    x: Tensor,
    mean_point: Tensor,
    var_point: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    constants: Moments | None,
    mixing: Mixing,
    record: Callable[[Moments], None] | None = None,
) -> Tensor:
    """Normalise x (N, C, *spatial) by `backend`, differentiably where a gradient is wanted.

    Args:
        record: is given the moments (1, C) of the batch.
    """
    inputs = (x, mean_point, var_point, weight, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _Fused.apply(*inputs, constants, mixing, backend, record)  # type: ignore[no-any-return]
    normalised = backend.forward(*inputs, constants, mixing)
    if record is not None and normalised.batch is not None:
        record(normalised.batch)
    return normalised.y


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean_point: Tensor,
        var_point: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        constants: Moments | None,
        mixing: Mixing,
        backend: Backend,
        record: Callable[[Moments], None] | None,
    ) -> Tensor:
        y, batch, saved = backend.forward(x, mean_point, var_point, weight, bias, constants, mixing)
        if record is not None and batch is not None:
            record(batch)
        ctx.save_for_backward(x, mean_point, var_point, weight, bias, *saved, *(constants or ()))
        ctx.mixing, ctx.backend = mixing, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean_point, var_point, weight, bias, mean, var, *rest = ctx.saved_tensors
        constants = Moments(*rest) if rest else None
        wanted = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            inputs = (x, mean_point, var_point, weight, bias)
            return *differentiable_gradients(dy, inputs, constants, ctx.mixing, wanted), *_NO_GRADIENTS
        found = ctx.backend.backward(
            dy, x, mean_point, var_point, weight, constants, Moments(mean, var), ctx.mixing, wanted
        )
        parameters = (mean_point, var_point, weight, bias)
        cast = (
            g if g is None or g.dtype == p.dtype else g.to(p.dtype) for g, p in zip(found[1:], parameters, strict=True)
        )
        return found.x, *cast, *_NO_GRADIENTS


_NO_GRADIENTS = (None, None, None, None)


def differentiable_gradients(
    dy: Tensor,
    inputs: tuple[Tensor | None, ...],
    constants: Moments | None,
    mixing: Mixing,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients `wanted` of x, gate parameters, weight and bias with a graph of their own."""
    with torch.enable_grad():
        # Views: the graph built here ends at them, and not where the caller's graph goes on.
        x, mean_point, var_point, weight, bias = (None if t is None else t.view_as(t) for t in inputs)
        assert x is not None
        assert mean_point is not None
        assert var_point is not None
        means, variances = (importance_weights(point, mixing.gate) for point in (mean_point, var_point))
        y = switch_norm_reference(
            x, means, variances, weight, bias, constants, branches=mixing.branches, eps=mixing.eps
        )
        leaves = (x, mean_point, var_point, weight, bias)
        asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want and leaf is not None]
        found = iter(torch.autograd.grad(y, asked, dy, create_graph=True, allow_unused=True))
        return tuple(next(found) if want else None for want in wanted)
