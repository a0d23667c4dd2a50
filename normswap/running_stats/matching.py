"""Match the `in` branches of SN layers to their running statistics, by the variance of samples on data.

The constants of the `ln` branch follow from the running statistics alone. Those of `in` need E[var_in], the expected
variance of one sample and channel over its positions, which takes a few images without labels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from normswap.errors import DataError
from normswap.layers.gated_module import FunctionalSwitchNorm, GatedModule
from normswap.running_stats.accumulation import SITE_ARGUMENTS, evaluation_pass, first_tensor, run_batches
from normswap.surgery.arguments import describe_invalid_batches, require_module
from normswap.surgery.importance import gated_modules
from normswap.surgery.module_tree import walk_modules
from normswap.surgery.wrappers import unwrap


@dataclass
class InstanceVariance:
    """The variances of samples at one layer, and the running statistics with which it ran.

    Attributes:
        running_mean, running_var: (C,), on the CPU.
        eps: the epsilon of the layer.
        total: the sum of the variances of samples, (C,), in float64 on the CPU.
        samples: the number of samples.
    """

    running_mean: Tensor
    running_var: Tensor
    eps: float
    total: Tensor
    samples: int

    def __add__(self, other: Self) -> Self:
        """Return the sum over the samples of both, at the same layer."""
        return type(self)(
            self.running_mean, self.running_var, self.eps, self.total + other.total, self.samples + other.samples
        )

    def apply(self, layer: GatedModule) -> None:
        """Match the branches of the layer."""
        layer.match_to(self.running_mean, self.running_var, instance_var=self.total / self.samples, eps=self.eps)


@torch.no_grad()
def match_instance_variance(
    model: nn.Module, batches: Iterable[Any], *, device: torch.device | str | None = None
) -> list[str]:
    """Match the `in` branches of a converted model to their running statistics, in place.

    The model runs in evaluation mode. `in_var_scale` of each matched layer with an `in` branch is set; layers that
    get a single position, where `in` has no variance, are left out.

    Args:
        model: a converted model, wrapped or not.
        batches: an iterable of inputs, as in `calibrate`; a few images are enough, labels are not used.
        device: the device to move the inputs to; default is not to move them.

    Returns:
        The names of the layers that were matched.

    Raises:
        DataError: there are no batches.
        ModelError: the model raises on a batch.
        ArgumentError: `model` is not a module.
    """
    model = unwrap(require_module(model))
    if problem := describe_invalid_batches(batches):
        raise DataError(f"batches: {problem}")
    layers = matchable_layers(model)
    measured, count = measure_instance_variance(model, layers, batches, device=device)
    if not count:
        raise DataError("batches: expected at least one batch, got none")
    for name, variance in measured.items():
        variance.apply(layers[name])
    return [*measured]


def matchable_layers(model: nn.Module) -> dict[str, GatedModule]:
    """Return the layers whose `in` branch can be matched to running statistics, by name."""
    return {
        name: layer
        for name, layer in gated_modules(model).items()
        if layer._buffers.get("in_var_scale") is not None and _has_statistics(layer)
    }


def _has_statistics(layer: Any) -> bool:
    return isinstance(layer, FunctionalSwitchNorm) or layer.running_mean is not None


def measured_variance(layer: GatedModule, running_var: Tensor, eps: float) -> Tensor | None:
    """Return E[var_in] (C,) to which the layer is matched with these old statistics; None if it never was."""
    scale = layer._buffers.get("in_var_scale")
    if scale is None or bool((scale == 1).all()):
        return None
    return (running_var.double() + eps) / scale.double() - eps


def measure_instance_variance(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    device: torch.device | str | None = None,
) -> tuple[dict[str, InstanceVariance], int]:
    """Return the variances of samples at SN layers of a model by name, in evaluation mode, and the number of batches.

    Raises:
        ModelError: the model raises on a batch.
    """
    measured: dict[str, InstanceVariance] = {}
    number = 0
    modules = [entry.module for entry in walk_modules(model)]
    with evaluation_pass(modules, _hook_registrations(layers, measured)):
        for number in run_batches(model, batches, device=device):  # noqa: B007 - the number of batches
            pass
    return measured, number


def _hook_registrations(
    layers: Mapping[str, nn.Module], measured: dict[str, InstanceVariance]
) -> Iterator[Callable[[], Any]]:
    def measure(layer: Any, args: Any, kwargs: Any, *, name: str) -> None:
        x = first_tensor((args, kwargs))
        statistics = _statistics_of_call(layer, args, kwargs)
        if statistics is None or x.dim() < 3 or not len(x) or x[0, 0].numel() < 2:
            return
        mean, var, eps = statistics
        variance = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32)).var(2, correction=0)
        added = InstanceVariance(mean.cpu(), var.cpu(), eps, variance.sum(0).cpu().double(), len(x))
        measured[name] = measured[name] + added if name in measured else added

    for name, layer in layers.items():
        yield partial(layer.register_forward_pre_hook, partial(measure, name=name), with_kwargs=True)


def _statistics_of_call(layer: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, float] | None:
    """Return running mean, running variance and eps; None if a functional site is called without statistics."""
    if not isinstance(layer, FunctionalSwitchNorm):
        return layer.running_mean, layer.running_var, layer.normalising_eps
    call = SITE_ARGUMENTS.bind(layer, *args, **kwargs)
    call.apply_defaults()
    mean, var, eps = (call.arguments[name] for name in ("running_mean", "running_var", "eps"))
    return None if mean is None or var is None else (mean, var, eps)
