"""What the tensors of a call must agree in before any backend reads or writes their memory."""

import math
from typing import Any

import torch
from torch import Tensor

from normswap.errors import LayerError

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
            raise LayerError(_misfit("mean_weight" if gate is gates[0] else "var_weight", gate, gate.shape, x))
    if (per_channel[0] is None) != (per_channel[1] is None):
        raise LayerError("running_mean and running_var must either both be None or neither be None")
    shape = x.shape[1:2]
    for tensor in per_channel:
        if tensor is not None and (
            tensor.shape != shape
            or tensor.device != device
            or (tensor.dtype != dtype and not tensor.is_floating_point())
        ):
            raise LayerError(_first_misfit(x, per_channel))


def _first_misfit(x: Tensor, per_channel: PerChannel) -> str:
    """Say what is wrong with the first tensor that does not fit, or with x if all others agree on a length."""
    given = [(name, tensor) for name, tensor in zip(_PER_CHANNEL, per_channel, strict=True) if tensor is not None]
    shape = x.shape[1:2]
    found = [message for name, tensor in given if (message := _misfit(name, tensor, shape, x))]
    if all(tensor.dim() == 1 and tensor.shape == given[0][1].shape != shape for _, tensor in given):
        channels = given[0][1].shape[0]
        return f"expected {channels} channels in dimension 1, got an input of shape {tuple(x.shape)}: {found[0]}"
    return found[0]


def _misfit(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> str:
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
    kept = torch.float64 if x.dtype == torch.float64 else torch.float32
    expected = {"dy": (dy, x.shape, x.dtype), "mean": (mean, x.shape[:2], kept), "var": (var, x.shape[:2], kept)}
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
    if type(first) not in _PLAIN or type(second) not in _PLAIN or first.is_meta:
        return False
    begin, other, count = first.data_ptr(), second.data_ptr(), first.shape[0]
    step, other_step = max(first.stride(0), 1) * first.itemsize, max(second.stride(0), 1) * second.itemsize
    if begin >= other + count * other_step or other >= begin + count * step:
        return False
    return step != other_step or (other - begin) % step < first.itemsize or (begin - other) % step < second.itemsize


_PLAIN = (Tensor, torch.nn.Parameter)


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
