"""Random values for batch norms that make mistakes of a conversion visible.

A new batch norm has mean 0, variance 1, weight 1 and bias 0; a conversion could lose any of them without an effect on
the outputs. Arbitrary statistics make the activations of deep networks explode. So statistics are measured on an input
and then perturbed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normswap.model_state import call_model, seeded, training_flags

_SEED = 1
_MEAN_SPREAD = 0.1
_VAR_RANGE = (0.7, 1.4)
_WEIGHT_RANGE = (0.7, 1.3)
_BIAS_SPREAD = 0.1
_SMALLEST_VAR = 1e-3


def batch_norms(model: nn.Module) -> set[nn.Module]:
    """Return every module that normalizes with batch statistics, by its class or its buffers."""
    return {module for module in model.modules() if _is_batch_norm(module)}


def _is_batch_norm(module: nn.Module) -> bool:
    if isinstance(module, _InstanceNorm):
        return False
    return isinstance(module, _BatchNorm) or {"running_mean", "running_var"} <= module._buffers.keys()


def randomise(model: nn.Module, inputs: Any | None) -> Any:
    """Give every batch norm of `model` random weight, bias and statistics, near those of `inputs` if given.

    Returns the outputs of the model in training mode on `inputs`, or the exception; None without inputs.
    """
    generator = torch.Generator().manual_seed(_SEED)
    norms = [module for module in model.modules() if _is_batch_norm(module)]
    for norm in norms:
        _reset(norm)
    for norm in norms:
        _fill(getattr(norm, "weight", None), generator, uniform=_WEIGHT_RANGE)
        _fill(getattr(norm, "bias", None), generator, normal=_BIAS_SPREAD)
    outputs = None if inputs is None else _measure(model, norms, inputs)
    for norm in norms:
        _perturb(norm, generator)
    return outputs


def _reset(norm: nn.Module) -> None:
    if isinstance(norm.running_mean, Tensor) and isinstance(norm.running_var, Tensor):
        norm.running_mean.zero_()
        norm.running_var.fill_(1.0)


def _fill(
    tensor: Any,
    generator: torch.Generator,
    *,
    uniform: tuple[float, float] | None = None,
    normal: float | None = None,
) -> None:
    if not isinstance(tensor, Tensor):
        return
    with torch.no_grad():
        if uniform is not None:
            tensor.uniform_(*uniform, generator=generator)
        if normal is not None:
            tensor.normal_(0.0, normal, generator=generator)


def _measure(model: nn.Module, norms: list[nn.Module], inputs: Any) -> Any:
    """Run one training pass with momentum 1. If the model fails, the statistics stay at 0 and 1."""
    momenta = [(norm, norm.momentum) for norm in norms if isinstance(norm, _BatchNorm)]
    try:
        for norm, _ in momenta:
            norm.momentum = 1.0
        with torch.no_grad(), seeded(0), training_flags(list(model.modules()), training=True):
            return call_model(model, inputs)
    except Exception as error:  # noqa: BLE001 - the caller handles it
        for norm in norms:
            _reset(norm)
        return error
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum


def _perturb(norm: nn.Module, generator: torch.Generator) -> None:
    mean, var = norm.running_mean, norm.running_var
    if not (isinstance(mean, Tensor) and isinstance(var, Tensor)):
        return
    finite = mean.isfinite().all() and var.isfinite().all()
    if not finite:
        _reset(norm)
    var.clamp_(min=max(_SMALLEST_VAR, 0.05 * float(var.mean())))
    var.mul_(torch.empty_like(var).uniform_(*_VAR_RANGE, generator=generator))
    mean.add_(torch.empty_like(mean).normal_(0.0, _MEAN_SPREAD, generator=generator) * var.sqrt())
    count = getattr(norm, "num_batches_tracked", None)
    if isinstance(count, Tensor):
        count.fill_(7)
