"""Fused backends under autograd: what a backend has to provide, and the node that calls it in eager mode.

The node keeps x, tables and parameters. With a graph of the backward pass asked for (double backward), the plain
formula is differentiated instead.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from normswap.layers.importance import importance_weights
from normswap.layers.mixing import Mixing
from normswap.layers.moments import Moments
from normswap.layers.reference import switch_norm_reference

# Records the moments (1, C) of a batch and returns those whose values the `bn` branch takes instead.
Renew = Callable[[Moments], Moments]


class Inputs(NamedTuple):
    """What a layer computes y from: x (N, C, *spatial), gate parameters (K,), weight and bias (C,) or None, moments
    (1, C) that the `bn` branch takes instead of those of the batch, and how the branches are mixed.

    With `renew` the branch takes the values that it makes of the moments of the batch, which are the constants of the
    backward pass, while gradients go to the moments of the batch.
    """

    x: Tensor
    mean_point: Tensor
    var_point: Tensor
    weight: Tensor | None
    bias: Tensor | None
    constants: Moments | None
    mixing: Mixing
    renew: Renew | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Those that a gradient can be asked of, in the order of `Gradients`."""
        return self.x, self.mean_point, self.var_point, self.weight, self.bias


class Normalised(NamedTuple):
    """y of the shape, dtype and layout of x; moments (1, C) of the batch where the `bn` branch took them; those of x
    over its positions (N, C), which are all that backward needs beside the inputs; what `renew` gave.
    """

    y: Tensor
    batch: Moments | None
    saved: Moments
    renewed: Moments | None = None


class Gradients(NamedTuple):
    """Gradients of x, the gate parameters, weight and bias; None where none was wanted."""

    x: Tensor | None
    mean_point: Tensor | None
    var_point: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


# Normalise.
Forward = Callable[[Inputs], Normalised]
# From dy, the inputs and what `Forward` saved: the gradients wanted, in the order of `Gradients`.
Backward = Callable[[Tensor, Inputs, Moments, tuple[bool, ...]], Gradients]


class Backend(NamedTuple):
    """A fused implementation: its name, its two passes, and whether they heed `Inputs.renew`."""

    name: str
    forward: Forward
    backward: Backward
    renews: bool = False


def switch_norm_fused(backend: Backend, inputs: Inputs, record: Callable[[Moments], None] | None = None) -> Tensor:
    """Normalise by `backend`, differentiably where a gradient is wanted.

    Args:
        record: is given the moments (1, C) of the batch.
    """
    if asks_gradient(inputs):
        return cast(Tensor, _Fused.apply(*inputs, backend, record))
    return _normalised(backend, inputs, record).y


def asks_gradient(inputs: Inputs) -> bool:
    """Say whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs.tensors)


def _normalised(backend: Backend, inputs: Inputs, record: Callable[[Moments], None] | None) -> Normalised:
    normalised = backend.forward(inputs)
    if record is not None and normalised.batch is not None:
        record(normalised.batch)
    return normalised


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *values, backend, record = args
        inputs = Inputs(*values)
        normalised = _normalised(backend, inputs, record)
        ctx.save_for_backward(*inputs.tensors, *normalised.saved, *(normalised.renewed or inputs.constants or ()))
        ctx.mixing, ctx.backend, ctx.renew = inputs.mixing, backend, inputs.renew
        return normalised.y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean_point, var_point, weight, bias, mean, var, *rest = ctx.saved_tensors
        constants = Moments(*rest) if rest else None
        inputs = Inputs(x, mean_point, var_point, weight, bias, constants, ctx.mixing, ctx.renew)
        wanted = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            return *differentiable_gradients(dy, inputs, wanted), *_NO_GRADIENTS
        found = ctx.backend.backward(dy, inputs, Moments(mean, var), wanted)
        return *in_dtype_of(found, inputs), *_NO_GRADIENTS


_NO_GRADIENTS = (None,) * 5


def in_dtype_of(gradients: Iterable[Tensor | None], inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Return gradients in the dtype of the inputs that they belong to; None for an input that is not there."""
    return tuple(
        gradient if gradient is None or owner is None or gradient.dtype == owner.dtype else gradient.to(owner.dtype)
        for gradient, owner in zip(gradients, inputs.tensors, strict=True)
    )


def differentiable_gradients(dy: Tensor, inputs: Inputs, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Return the gradients `wanted`, in the order of `Gradients`, with a graph of their own."""
    with torch.enable_grad():
        # Views: the graph built here ends at them, and not where the caller's graph goes on.
        views = (None if tensor is None else tensor.view_as(tensor) for tensor in inputs.tensors)
        leaves = Inputs._make((*views, inputs.constants, inputs.mixing, None))
        mixing = inputs.mixing
        points = torch.stack((leaves.mean_point, leaves.var_point))
        means, variances = importance_weights(points, mixing.gate).unbind()
        y = switch_norm_reference(
            leaves.x,
            means,
            variances,
            leaves.weight,
            leaves.bias,
            inputs.constants if inputs.renew is None else None,
            branches=mixing.branches,
            eps=mixing.eps,
            record=None if inputs.renew is None else lambda _: inputs.constants,
        )
        asked = [leaf for leaf, want in zip(leaves.tensors, wanted, strict=True) if want and leaf is not None]
        found = iter(torch.autograd.grad(y, asked, dy, create_graph=True, allow_unused=True))
        return tuple(next(found) if want else None for want in wanted)
