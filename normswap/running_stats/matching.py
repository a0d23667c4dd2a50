"""Match the `in` branches of SN layers to their running statistics on data.

The constants of the `ln` branch follow from the running statistics alone. Those of `in` need E[var_in], the expected
variance of one sample and channel over its positions, which takes a few images without labels.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import DataError
from normswap.layers.gated_module import FunctionalSwitchNorm, GatedModule
from normswap.running_stats.accumulation import batch_inputs, move_to_device
from normswap.surgery.arguments import describe_invalid_batches, refuse_private, require_module
from normswap.surgery.discovery.instance_variance import SiteVariance, match_in_branch, measure_instance_variance
from normswap.surgery.importance import gated_modules
from normswap.surgery.wrappers import unwrap


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
        ModelError: the model raises on a batch, or trains with differential privacy.
        ArgumentError: `model` is not a module.
    """
    model = unwrap(require_module(model))
    refuse_private(model, "matching would store statistics of the data in the model")
    if problem := describe_invalid_batches(batches):
        raise DataError(f"batches: {problem}")
    layers = matchable_layers(model)
    variances = measure(model, layers, batches, device=device)
    if variances is None:
        raise DataError("batches: expected at least one batch, got none")
    for name, variance in variances.items():
        set_instance_variance(layers[name], [variance])
    return [*variances]


def matchable_layers(model: nn.Module) -> dict[str, GatedModule]:
    """Return the layers whose `in` branch can be matched to running statistics, by name."""
    return {
        name: layer
        for name, layer in gated_modules(model).items()
        if layer.in_var_scale is not None
        and (isinstance(layer, FunctionalSwitchNorm) or _running_var(layer) is not None)
    }


def measure(
    model: nn.Module, layers: dict[str, GatedModule], batches: Iterable[Any], *, device: Any = None
) -> dict[str, SiteVariance] | None:
    """Return what `measure_instance_variance` finds, with batches as `calibrate` takes them; None without a batch."""
    inputs: Iterator[Any] = (move_to_device(batch_inputs(batch), device) for batch in batches)
    first = next(inputs, None)
    return None if first is None else measure_instance_variance(model, layers, chain([first], inputs))


def set_instance_variance(layer: GatedModule, variances: list[SiteVariance]) -> None:
    """Match the `in` branch of a layer by the pooled measurements of one or more processes."""
    samples = sum(each.samples for each in variances)
    instance_var = torch.stack([each.instance_var.cpu() * (each.samples / samples) for each in variances]).sum(0)
    own, first = _running_var(layer), variances[0]
    running_var = first.running_var if own is None else own
    pooled = first._replace(instance_var=instance_var, samples=samples)
    match_in_branch(layer, pooled, None if running_var is None else running_var.cpu())


def measured_variance(layer: GatedModule, running_var: Tensor, eps: float) -> Tensor | None:
    """Return E[var_in] (C,) to which the layer is matched with these old statistics; None if it never was."""
    scale = layer.in_var_scale
    if scale is None or bool((scale == 1).all()):
        return None
    return (running_var.double() + eps) / scale.double() - eps


def _running_var(layer: Any) -> Tensor | None:
    return layer._buffers.get("running_var")  # type: ignore[no-any-return]
