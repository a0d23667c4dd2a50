"""The interface of fused backends: checks of the tensors, inputs and results of the passes, the autograd function.

The checks come before any backend accesses memory. Equations: `moment_algebra`.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from normswap.errors import ArgumentError, LayerError
from normswap.layers.backends.reference import Moments, switch_norm_reference
from normswap.layers.gating import Mixing, importance_weights
from normswap.layers.matching import MATCHING_BUFFERS, Matching

# --- checks


_PER_CHANNEL = ("running_mean", "running_var", "weight", "bias")

# Running mean, running variance, weight and bias: (C,) each, or None.
PerChannel = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def check_tensors(x: Tensor, gates: tuple[Tensor, Tensor], branches: int, per_channel: PerChannel) -> None:
    """Check length, dtype and device of all tensors that normalize x (N, C, *spatial).

    Args:
        gates: gate parameters of means and of variances; both need the shape (`branches`,).

    Raises:
        LayerError: x is not floating or has no channels; a tensor has a wrong length, dtype or device; only one of the
            running statistics is given.
    """
    if not isinstance(x, Tensor):
        refuse_non_tensor("x", x)  # type: ignore[unreachable]
    dtype, device = x.dtype, x.device
    if x.dim() < 2 or not x.is_floating_point():
        raise LayerError(f"expected a floating tensor (N, C, *spatial), got {dtype} of shape {tuple(x.shape)}")
    for gate in gates:
        if not isinstance(gate, Tensor):
            refuse_non_tensor("mean_weight" if gate is gates[0] else "var_weight", gate)  # type: ignore[unreachable]
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
            not isinstance(tensor, Tensor)
            or tensor.shape != shape
            or tensor.device != device
            or (tensor.dtype != dtype and not tensor.is_floating_point())
        ):
            raise LayerError(_describe_first_mismatch(x, per_channel))


def check_matching(x: Tensor, matching: Matching) -> None:
    """Check shape, dtype and device of the constants of matched branches.

    Raises:
        LayerError: a constant does not match x, or only one of those of `ln` is given.
    """
    shape, dtype, device = x.shape[1:2], x.dtype, x.device
    for tensor in matching:
        if tensor is not None and (
            not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.shape != shape or tensor.device != device
        ):
            _check_each_constant(x, matching)
            break
    if (matching[0] is None) != (matching[1] is None):
        raise LayerError("ln_mean_shift and ln_var_scale must either both be None or neither be None")


def _check_each_constant(x: Tensor, matching: Matching) -> None:
    for name, tensor in zip(MATCHING_BUFFERS, matching, strict=True):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            refuse_non_tensor(name, tensor)  # type: ignore[unreachable]
        if found := _describe_mismatch(name, tensor, x.shape[1:2], x):
            raise LayerError(found)


def refuse_non_tensor(name: str, value: object) -> None:
    """Raise ArgumentError for an argument that is no tensor; a `Proxy` passes, whose own error explains tracing."""
    if isinstance(value, torch.fx.Proxy):
        return
    kind, module = type(value).__name__, type(value).__module__
    if module == "numpy" and hasattr(value, "shape"):
        hint = f": pass torch.from_numpy({name})"
    else:
        hint = f": pass torch.tensor({name})" if isinstance(value, list | tuple | int | float) else ""
    raise ArgumentError(
        f"{name}: expected a tensor, got {'None' if value is None else f'a value of type {kind}'}{hint}"
    )


def _describe_first_mismatch(x: Tensor, per_channel: PerChannel) -> str:
    """Describe the first wrong tensor; if all tensors agree on another number of channels, name x as the wrong one."""
    given = [(name, tensor) for name, tensor in zip(_PER_CHANNEL, per_channel, strict=True) if tensor is not None]
    for name, tensor in given:
        if not isinstance(tensor, Tensor):
            refuse_non_tensor(name, tensor)  # type: ignore[unreachable]
    shape = x.shape[1:2]
    found = [message for name, tensor in given if (message := _describe_mismatch(name, tensor, shape, x))]
    if all(tensor.dim() == 1 and tensor.shape == given[0][1].shape != shape for _, tensor in given):
        channels = given[0][1].shape[0]
        return f"expected {channels} channels in dimension 1, got an input of shape {tuple(x.shape)}: {found[0]}"
    return found[0]


def _describe_mismatch(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> str:
    """Describe what is wrong with a tensor; an empty string if nothing is."""
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
    """Check that dy and the saved moments (N, C) match x.

    Raises:
        LayerError: one of them has a wrong shape, dtype or device.
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


class RunningStats(NamedTuple):
    """Running statistics (C,) of a layer, the number of batches, and the weight of the next batch in them."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float


def check_update(x: Tensor, running: RunningStats) -> None:
    """Check that running statistics can be updated in place by the moments of x.

    Raises:
        LayerError: their elements share memory, the count has not one element, or a transform of `torch.func` forbids
            the update.
    """
    running_mean, running_var, count, _ = running
    if count is not None and not isinstance(count, Tensor):
        refuse_non_tensor("num_batches_tracked", count)  # type: ignore[unreachable]
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
    """Return whether two tensors (C,) share an element. If their strides differ, overlapping ranges count as shared."""
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
    """Raise for transforms of `torch.func` that forbid the update, with a clearer message than that of torch."""
    functorch: Any = torch._C._functorch
    unmapped = _wrapped_levels(x) - (_wrapped_levels(running[0]) & _wrapped_levels(running[1]))
    if unmapped & set(_active_levels(functorch.TransformType.Vmap)):
        raise LayerError(
            "torch.func.vmap maps the input but not the running statistics that training updates in place: call "
            'normswap.set_bn_statistics(model, "running") or model.eval() first'
        )
    if any(is_captured(tensor) for tensor in running):
        raise LayerError(
            "training updates running statistics in place, and the function that torch.func differentiates does not "
            "take them as an argument: pass the buffers as an argument, or call "
            'normswap.set_bn_statistics(model, "running") or model.eval() first'
        )


def is_captured(tensor: Tensor) -> bool:
    """Return whether `torch.func` takes a derivative and this tensor is no argument; it must not change in place."""
    kinds: Any = torch._C._functorch.TransformType
    return not _wrapped_levels(tensor).issuperset(_active_levels(kinds.Grad, kinds.Jvp))


def _active_levels(*kinds: Any) -> list[int]:
    """Return the levels of the active transforms of these kinds."""
    functorch: Any = torch._C._functorch
    return [each.level() for each in functorch.get_interpreter_stack() or () if each.key() in kinds]


def _wrapped_levels(tensor: Tensor) -> set[int]:
    """Return the levels of the transforms of `torch.func` that wrap this tensor."""
    functorch: Any = torch._C._functorch
    levels = set()
    while functorch.is_functorch_wrapped_tensor(tensor):
        levels.add(functorch.maybe_get_level(tensor))
        tensor = functorch.get_unwrapped(tensor)
    return levels


# --- inputs and results of the passes


# Updates running statistics by the moments (1, C) of a batch and returns the moments that the `bn` branch uses.
RunningStatsUpdate = Callable[[Moments], Moments]


class Inputs(NamedTuple):
    """Inputs of a layer.

    Attributes:
        x: (N, C, *spatial).
        mean_gate, var_gate: gate parameters (K,).
        weight, bias: (C,), or None.
        constants: moments (1, C) that the `bn` branch uses instead of those of the batch.
        mixing: how the branches are mixed.
        running_stats_update: if given, the `bn` branch uses the values that it returns, with the gradients of the
            moments of the batch. In the backward pass these values are `constants`.
        matching: constants of matched branches, contiguous, in the dtype of moments; only those of mixed branches.
    """

    x: Tensor
    mean_gate: Tensor
    var_gate: Tensor
    weight: Tensor | None
    bias: Tensor | None
    constants: Moments | None
    mixing: Mixing
    running_stats_update: RunningStatsUpdate | None = None
    matching: Matching | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The tensors that can have a gradient, in the order of `Gradients`."""
        return self.x, self.mean_gate, self.var_gate, self.weight, self.bias


class Normalised(NamedTuple):
    """Results of a forward pass.

    Attributes:
        y: normalized x, with its shape, dtype and layout.
        batch: moments (1, C) of the batch; None if the `bn` branch does not use them.
        saved: moments (N, C) of x over its positions; None if the forward pass did not need them, and the backward pass
            computes them if it does.
        updated_stats: the result of `Inputs.running_stats_update`.
    """

    y: Tensor
    batch: Moments | None
    saved: Moments | None
    updated_stats: Moments | None = None


class Gradients(NamedTuple):
    """Gradients of x, the gate parameters, weight and bias; None if a gradient is not needed."""

    x: Tensor | None
    mean_gate: Tensor | None
    var_gate: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


# The forward pass.
Forward = Callable[[Inputs], Normalised]
# The backward pass, from dy, the inputs, the saved moments, and which gradients are needed, in the order of
# `Gradients`.
Backward = Callable[[Tensor, Inputs, Moments | None, tuple[bool, ...]], Gradients]


class Backend(NamedTuple):
    """A fused implementation: name, passes, and whether they support `Inputs.running_stats_update`."""

    name: str
    forward: Forward
    backward: Backward
    supports_running_stats_update: bool = False


# --- autograd


def switch_norm_fused(
    backend: Backend, inputs: Inputs, on_batch_moments: Callable[[Moments], None] | None = None
) -> Tensor:
    """Normalize by `backend`, with a backward pass if a gradient is needed.

    Args:
        on_batch_moments: gets the moments (1, C) of the batch.
    """
    if needs_backward(inputs):
        return cast(Tensor, _Fused.apply(*inputs, backend, on_batch_moments))
    return _run_forward(backend, inputs, on_batch_moments).y


def needs_backward(inputs: Inputs) -> bool:
    """Return whether a backward pass can follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs.tensors)


def _run_forward(backend: Backend, inputs: Inputs, on_batch_moments: Callable[[Moments], None] | None) -> Normalised:
    normalised = backend.forward(inputs)
    if on_batch_moments is not None and normalised.batch is not None:
        on_batch_moments(normalised.batch)
    return normalised


class _Fused(torch.autograd.Function):
    """Runs the passes of a backend. Its backward pass is differentiable by way of the plain formula."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Run the forward pass; `args` are those of `Inputs`, the backend and `on_batch_moments`."""
        *values, backend, on_batch_moments = args
        inputs = Inputs(*values)
        normalised = _run_forward(backend, inputs, on_batch_moments)
        saved = normalised.saved or (None, None)
        ctx.save_for_backward(*inputs.tensors, *saved, *(normalised.updated_stats or inputs.constants or ()))
        ctx.mixing, ctx.backend, ctx.running_stats_update = inputs.mixing, backend, inputs.running_stats_update
        ctx.matching = inputs.matching
        return normalised.y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `Inputs`."""
        x, mean_gate, var_gate, weight, bias, mean, var, *rest = ctx.saved_tensors
        constants = Moments(*rest) if rest else None
        inputs = Inputs(
            x, mean_gate, var_gate, weight, bias, constants, ctx.mixing, ctx.running_stats_update, ctx.matching
        )
        needs_input_grad = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            return *differentiable_gradients(dy, inputs, needs_input_grad), *_NO_GRADIENTS
        saved = None if mean is None else Moments(mean, var)
        found = ctx.backend.backward(dy, inputs, saved, needs_input_grad)
        return *cast_gradients(found, inputs.tensors), *_NO_GRADIENTS


_NO_GRADIENTS = (None,) * 6


def cast_gradients(gradients: Iterable[Tensor | None], tensors: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return gradients in the dtypes of their inputs; None for an input that is None."""
    return tuple(
        gradient if gradient is None or owner is None or gradient.dtype == owner.dtype else gradient.to(owner.dtype)
        for gradient, owner in zip(gradients, tensors, strict=True)
    )


def differentiable_gradients(
    dy: Tensor, inputs: Inputs, needs_input_grad: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return gradients that can be differentiated again, in the order of `Gradients`."""
    with torch.enable_grad():
        # Views: the graph that is built here ends at them and does not continue into the caller's graph.
        views = (None if tensor is None else tensor.view_as(tensor) for tensor in inputs.tensors)
        leaves = Inputs._make((*views, inputs.constants, inputs.mixing, None, inputs.matching))
        mixing = inputs.mixing
        points = torch.stack((leaves.mean_gate, leaves.var_gate))
        means, variances = importance_weights(points, mixing.gate).unbind()
        y = switch_norm_reference(
            leaves.x,
            means,
            variances,
            leaves.weight,
            leaves.bias,
            inputs.constants if inputs.running_stats_update is None else None,
            mixing=mixing,
            matching=inputs.matching,
            on_batch_moments=None if inputs.running_stats_update is None else lambda _: inputs.constants,
        )
        grad_inputs = [
            leaf for leaf, needed in zip(leaves.tensors, needs_input_grad, strict=True) if needed and leaf is not None
        ]
        found = iter(torch.autograd.grad(y, grad_inputs, dy, create_graph=True, allow_unused=True))
        return tuple(next(found) if needed else None for needed in needs_input_grad)
