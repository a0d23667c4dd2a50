"""What the tensors of a call must agree in before any backend reads or writes their memory."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from normswap.errors import LayerError
from normswap.layers.backends.reference import Moments, switch_norm_reference
from normswap.layers.gating import Mixing, importance_weights

# MERGED DOC: Fused backends under autograd: what a backend has to provide, and the node that calls it in eager mode.


_PER_CHANNEL = ("running_mean", "running_var", "weight", "bias")

# Running mean, running variance, weight and bias, (C,) each or None.
PerChannel = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def check_tensors(x: Tensor, gates: tuple[Tensor, Tensor], branches: int, per_channel: PerChannel) -> None:
    """Check length, dtype and device of everything that x (N, C, *spatial) is normalised with.

    Args:
        gates: gate parameters of means and of variances, of shape (`branches`,).

    Raises:
        LayerError: x is not floating or has no channels, or a tensor has another length than x or the branches ask for,
            is not floating, or lies on another device; or only one of the running statistics is given.
    """
    dtype, device = x.dtype, x.device
    if x.dim() < 2 or not x.is_floating_point():
        raise LayerError(f"expected a floating tensor (N, C, *spatial), got {dtype} of shape {tuple(x.shape)}")
    for gate in gates:
        if gate.shape != (branches,):
            raise LayerError(f"expected gate parameters of shape {(branches,)}, got {tuple(gate.shape)}")
        if (gate.dtype != dtype and not gate.is_floating_point()) or gate.device != device:
            raise LayerError(
                _describe_mismatch("mean_weight" if gate is gates[0] else "var_weight", gate, gate.shape, x)
            )
    if (per_channel[0] is None) != (per_channel[1] is None):
        raise LayerError("running_mean and running_var must either both be None or neither be None")
    shape = x.shape[1:2]
    for tensor in per_channel:
        if tensor is not None and (
            tensor.shape != shape
            or tensor.device != device
            or (tensor.dtype != dtype and not tensor.is_floating_point())
        ):
            raise LayerError(_describe_first_mismatch(x, per_channel))


def _describe_first_mismatch(x: Tensor, per_channel: PerChannel) -> str:
    """Say what is wrong with the first tensor that does not fit, or with x if all others agree on a length."""
    given = [(name, tensor) for name, tensor in zip(_PER_CHANNEL, per_channel, strict=True) if tensor is not None]
    shape = x.shape[1:2]
    found = [message for name, tensor in given if (message := _describe_mismatch(name, tensor, shape, x))]
    if all(tensor.dim() == 1 and tensor.shape == given[0][1].shape != shape for _, tensor in given):
        channels = given[0][1].shape[0]
        return f"expected {channels} channels in dimension 1, got an input of shape {tuple(x.shape)}: {found[0]}"
    return found[0]


def _describe_mismatch(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> str:
    """Say what is wrong with a tensor; nothing if it fits."""
    if tensor.numel() != math.prod(shape):
        return f"{name} should contain {math.prod(shape)} elements not {tensor.numel()}"
    if tensor.shape != shape:
        return f"{name} should have the shape {tuple(shape)} not {tuple(tensor.shape)}"
    if not tensor.is_floating_point():
        return f"{name} should be a floating tensor not {tensor.dtype}"
    if tensor.device != x.device:
        return f"{name} should be on {x.device}, where the input is, not on {tensor.device}"
    return ""


def check_gradient(dy: Tensor, x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Check that dy fits x, and the moments (N, C) that the forward pass kept of it.

    Raises:
        LayerError: one has another shape, dtype or device.
    """
    saved_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    expected = {
        "dy": (dy, x.shape, x.dtype),
        "mean": (mean, x.shape[:2], saved_dtype),
        "var": (var, x.shape[:2], saved_dtype),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise LayerError(
                f"{name} should have the shape {tuple(shape)} and be {dtype} on {x.device}, got {tuple(tensor.shape)}, "
                f"{tensor.dtype} on {tensor.device}"
            )


def check_update(x: Tensor, running_mean: Tensor, running_var: Tensor, count: Tensor | None) -> None:
    """Check that running statistics (C,) can be updated in place by the moments of x; nothing is written here.

    Raises:
        LayerError: their elements share memory, `count` has not one element, or a transform of `torch.func` forbids it.
    """
    if count is not None and count.numel() != 1:
        raise LayerError(f"num_batches_tracked should contain 1 element not {count.numel()}")
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        _check_transforms(x, (running_mean, running_var))
        return
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if tensor.stride() == (0,) and tensor.shape[0] > 1:
            raise LayerError(
                f"{name} is an expanded tensor, and training updates it in place: pass a copy, {name}.clone()"
            )
    if _share_memory(running_mean, running_var):
        raise LayerError(
            "running_mean and running_var share memory, and training updates both in place: pass copies, such as "
            "running_var.clone()"
        )


def _share_memory(first: Tensor, second: Tensor) -> bool:
    """Say whether two tensors (C,) have an element in common; of two different strides, whether their ranges do."""
    if first is second:
        return True
    if type(first) not in _PLAIN_TENSOR_TYPES or type(second) not in _PLAIN_TENSOR_TYPES or first.is_meta:
        return False
    begin, other, count = first.data_ptr(), second.data_ptr(), first.shape[0]
    step, other_step = max(first.stride(0), 1) * first.itemsize, max(second.stride(0), 1) * second.itemsize
    if begin >= other + count * other_step or other >= begin + count * step:
        return False
    return step != other_step or (other - begin) % step < first.itemsize or (begin - other) % step < second.itemsize


_PLAIN_TENSOR_TYPES = (Tensor, torch.nn.Parameter)


def _check_transforms(x: Tensor, running: tuple[Tensor, Tensor]) -> None:
    """Refuse transforms of `torch.func` that would refuse the update with a message about some in-place operator."""
    functorch: Any = torch._C._functorch
    unmapped = _wrapped_levels(x) - (_wrapped_levels(running[0]) & _wrapped_levels(running[1]))
    if unmapped & set(_active_levels(functorch.TransformType.Vmap)):
        raise LayerError(
            "torch.func.vmap maps the input, but not the running statistics that training updates in place: call "
            'normswap.set_bn_statistics(model, "running") or model.eval() first'
        )
    if any(is_captured(tensor) for tensor in running):
        raise LayerError(
            "a derivative of torch.func was not given the running statistics that training updates in place: pass the "
            'buffers as an argument of the function, or call normswap.set_bn_statistics(model, "running") or '
            "model.eval() first"
        )


def is_captured(tensor: Tensor) -> bool:
    """Say whether a derivative of `torch.func` is taken that was not given this tensor: it may not change in place."""
    kinds: Any = torch._C._functorch.TransformType
    return not _wrapped_levels(tensor).issuperset(_active_levels(kinds.Grad, kinds.Jvp))


def _active_levels(*kinds: Any) -> list[int]:
    """The levels of the transforms of these kinds that are being applied."""
    functorch: Any = torch._C._functorch
    return [each.level() for each in functorch.get_interpreter_stack() or () if each.key() in kinds]


def _wrapped_levels(tensor: Tensor) -> set[int]:
    """The levels of transforms of `torch.func` that an argument of theirs, or a result, is wrapped for."""
    functorch: Any = torch._C._functorch
    levels = set()
    while functorch.is_functorch_wrapped_tensor(tensor):
        levels.add(functorch.maybe_get_level(tensor))
        tensor = functorch.get_unwrapped(tensor)
    return levels


# Records the moments (1, C) of a batch and returns those whose values the `bn` branch takes instead.
RunningStatsUpdate = Callable[[Moments], Moments]


class Inputs(NamedTuple):
    """What a layer computes y from: x (N, C, *spatial), gate parameters (K,), weight and bias (C,) or None, moments
    (1, C) that the `bn` branch takes instead of those of the batch, and how the branches are mixed.

    With `running_stats_update` the branch takes the values that it makes of the moments of the batch, which are the constants of the
    backward pass, while gradients go to the moments of the batch.
    """

    x: Tensor
    mean_point: Tensor
    var_point: Tensor
    weight: Tensor | None
    bias: Tensor | None
    constants: Moments | None
    mixing: Mixing
    running_stats_update: RunningStatsUpdate | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Those that a gradient can be asked of, in the order of `Gradients`."""
        return self.x, self.mean_point, self.var_point, self.weight, self.bias


class Normalised(NamedTuple):
    """y of the shape, dtype and layout of x; moments (1, C) of the batch where the `bn` branch took them; those of x
    over its positions (N, C), which are all that backward needs beside the inputs; what `running_stats_update` gave.
    """

    y: Tensor
    batch: Moments | None
    saved: Moments
    updated_stats: Moments | None = None


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
    renorm: bool = False


def switch_norm_fused(backend: Backend, inputs: Inputs, record: Callable[[Moments], None] | None = None) -> Tensor:
    """Normalise by `backend`, differentiably where a gradient is wanted.

    Args:
        record: is given the moments (1, C) of the batch.
    """
    if needs_backward(inputs):
        return cast(Tensor, _Fused.apply(*inputs, backend, record))
    return _run_forward(backend, inputs, record).y


def needs_backward(inputs: Inputs) -> bool:
    """Say whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs.tensors)


def _run_forward(backend: Backend, inputs: Inputs, record: Callable[[Moments], None] | None) -> Normalised:
    normalised = backend.forward(inputs)
    if record is not None and normalised.batch is not None:
        record(normalised.batch)
    return normalised


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *values, backend, record = args
        inputs = Inputs(*values)
        normalised = _run_forward(backend, inputs, record)
        ctx.save_for_backward(*inputs.tensors, *normalised.saved, *(normalised.updated_stats or inputs.constants or ()))
        ctx.mixing, ctx.backend, ctx.running_stats_update = inputs.mixing, backend, inputs.running_stats_update
        return normalised.y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean_point, var_point, weight, bias, mean, var, *rest = ctx.saved_tensors
        constants = Moments(*rest) if rest else None
        inputs = Inputs(x, mean_point, var_point, weight, bias, constants, ctx.mixing, ctx.running_stats_update)
        needs_input_grad = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            return *differentiable_gradients(dy, inputs, needs_input_grad), *_NO_GRADIENTS
        found = ctx.backend.backward(dy, inputs, Moments(mean, var), needs_input_grad)
        return *cast_gradients(found, inputs), *_NO_GRADIENTS


_NO_GRADIENTS = (None,) * 5


def cast_gradients(gradients: Iterable[Tensor | None], inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Return gradients in the dtype of the inputs that they belong to; None for an input that is not there."""
    return tuple(
        gradient if gradient is None or owner is None or gradient.dtype == owner.dtype else gradient.to(owner.dtype)
        for gradient, owner in zip(gradients, inputs.tensors, strict=True)
    )


def differentiable_gradients(
    dy: Tensor, inputs: Inputs, needs_input_grad: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
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
            inputs.constants if inputs.running_stats_update is None else None,
            branches=mixing.branches,
            eps=mixing.eps,
            record=None if inputs.running_stats_update is None else lambda _: inputs.constants,
        )
        grad_inputs = [
            leaf for leaf, want in zip(leaves.tensors, needs_input_grad, strict=True) if want and leaf is not None
        ]
        found = iter(torch.autograd.grad(y, grad_inputs, dy, create_graph=True, allow_unused=True))
        return tuple(next(found) if want else None for want in needs_input_grad)
