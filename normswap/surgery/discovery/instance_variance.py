"""The variance of single samples at norm layers, measured on data without labels, to which `in` branches are matched.

The model runs in evaluation mode without gradients, and keeps its state.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.errors import ModelError
from normswap.layers.gated_module import FunctionalSwitchNorm, GatedModule
from normswap.layers.matching import match_statistics
from normswap.model_state import call_model, preserved_state, registered_hooks, training_flags
from normswap.surgery.arguments import describe_inputs, describe_invalid_batches
from normswap.surgery.module_tree import walk_modules
from normswap.text import first_line


class SiteVariance(NamedTuple):
    """What a layer received.

    Attributes:
        instance_var: the variance (C,) of one sample over its positions, averaged over all samples.
        running_var: the running variance (C,) of the call that a functional site replaced; None for a module.
        eps: that of this call; None for a module.
        samples: the number of samples.
    """

    instance_var: Tensor
    running_var: Tensor | None = None
    eps: float | None = None
    samples: int = 1


def measure_instance_variance(
    model: nn.Module, layers: Mapping[str, GatedModule], batches: Iterable[Any]
) -> dict[str, SiteVariance]:
    """Return the variance of single samples at each layer, by name; inputs with one position are left out.

    Args:
        model: runs on the batches; its state does not change.
        layers: layers of `model` by name.
        batches: an iterable of inputs; each is a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        ModelError: `batches` is no iterable of inputs, or has none, or the model fails on one.
    """
    if problem := describe_invalid_batches(batches):
        raise ModelError(f"data: {problem}")
    modules = [entry.module for entry in walk_modules(model)]
    meters = {name: _Meter(layer) for name, layer in layers.items()}
    hooks = (meter.register for meter in meters.values())
    count = 0
    with training_flags(modules, training=False), preserved_state(modules), torch.no_grad(), registered_hooks(hooks):
        for batch in batches:
            try:
                call_model(model, batch)
            except Exception as error:
                raise ModelError(
                    f"data: the model fails on an input of {describe_inputs(batch)}: {first_line(error)}"
                ) from error
            count += 1
    if not count:
        raise ModelError("data: expected at least one input, got none: pass a list, such as [x]")
    return {name: found for name, meter in meters.items() if (found := meter.result()) is not None}


def match_in_branch(layer: GatedModule, found: SiteVariance, running_var: Tensor | None) -> None:
    """Match the `in` branch of a layer to a running variance (C,), or else to that of the call in `found`."""
    running_var = found.running_var if running_var is None else running_var
    if running_var is None or layer.in_var_scale is None:
        return
    eps = getattr(layer, "normalising_eps", 1e-5) if found.eps is None else found.eps
    constants = match_statistics(torch.zeros_like(running_var), running_var, eps, instance_var=found.instance_var)
    if constants.in_var_scale is not None:
        layer.in_var_scale.copy_(constants.in_var_scale)


class _Meter:
    """Sums the variances of the samples that one layer receives."""

    def __init__(self, layer: GatedModule) -> None:
        self._layer = layer
        self._sum: Tensor | None = None
        self._samples = 0
        self._running_var: Tensor | None = None
        self._eps: float | None = None

    def register(self) -> Any:
        """Register the hook, and return its handle."""
        return self._layer.register_forward_pre_hook(self._hook(), with_kwargs=True)

    def result(self) -> SiteVariance | None:
        """Return the average, None if the layer received no input with several positions."""
        if self._sum is None:
            return None
        return SiteVariance(self._sum / self._samples, self._running_var, self._eps, self._samples)

    def _hook(self) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("x", kwargs.get("input"))
            if isinstance(x, Tensor) and x.dim() > 2 and x.numel() > x.shape[0] * x.shape[1]:
                sums = x.double().flatten(2).var(2, correction=0).sum(0)
                self._sum = sums if self._sum is None else self._sum + sums
                self._samples += x.shape[0]
            if isinstance(self._layer, FunctionalSwitchNorm):
                self._running_var = args[2] if len(args) > 2 else kwargs.get("running_var")
                self._eps = kwargs.get("eps", 1e-5)

        return hook
