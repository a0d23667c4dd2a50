"""What Opacus must refuse in SN layers, each with the call that mends it."""

from collections.abc import Callable
from typing import Any

from opacus.validators import register_module_fixer, register_module_validator
from opacus.validators.errors import IllegalModuleConfigurationError
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from normswap.layers.gated_module import FunctionalSwitchNorm, GatedModule
from normswap.layers.in_place import FROZEN_BUFFERS, freeze_buffers
from normswap.layers.switch_norm import (
    SwitchNorm,
    SwitchNorm1d,
    SwitchNorm2d,
    SwitchNorm3d,
    SwitchNormAct,
    SwitchNormAct2d,
)

# Opacus finds a layer by its class itself, not by a base class.
LAYER_CLASSES = [SwitchNorm, SwitchNorm1d, SwitchNorm2d, SwitchNorm3d, SwitchNormAct, SwitchNormAct2d]


def describe_shared_statistics(layer: GatedModule) -> str | None:
    """Return why samples of a batch share statistics in a layer, and what to call; None if they do not."""
    if "bn" not in layer.branches:
        return None
    if getattr(layer, "running_mean", None) is None:
        return (
            f"{_name(layer)} has a `bn` branch without running statistics, which uses those of the batch: build it "
            "with branches=('in', 'ln'), or convert with start=\"ln\""
        )
    if layer.bn_statistics != "running":
        return (
            f"{_name(layer)} normalizes by the batch, so the gradient of a sample depends on the others: call "
            'normswap.set_bn_statistics(model, "running")'
        )
    return None


def _describe_functional_site(layer: GatedModule) -> str | None:
    if not isinstance(layer, FunctionalSwitchNorm):
        return None
    return (
        f"{_name(layer)} replaced a call of {layer.replaced_call}, whose weights belong to another module, so that "
        "Opacus finds no gradients of samples: write the norm as a module (torch.nn.BatchNorm2d), then convert"
    )


def _describe_following_modules(layer: GatedModule) -> str | None:
    following = {name: getattr(layer, name) for name in getattr(layer, "then", ())}
    for name, module in following.items():
        if any(parameter.requires_grad for parameter in module.parameters()):
            return (
                f"{_name(layer)} contains trainable parameters in `{name}`, which Opacus would count twice: call "
                f"layer.{name}.requires_grad_(False)"
            )
        if any(map(_is_random, module.modules())):
            return (
                f"{_name(layer)} contains the random module `{name}`, which Opacus would run a second time with other "
                f"random numbers: set its probability to 0"
            )
    return None


def _is_random(module: nn.Module) -> bool:
    probability: Any = module.p if isinstance(module, _DropoutNd) else getattr(module, "drop_prob", 0)
    return isinstance(module, nn.RReLU) or bool(probability)


def _describe_trainable_statistics(layer: GatedModule) -> str | None:
    names = vars(layer).get(FROZEN_BUFFERS, ())
    trainable = [name for name in names if name in layer._parameters and layer._parameters[name].requires_grad]  # type: ignore[union-attr]
    if not trainable:
        return None
    return f"{', '.join(trainable)} of {_name(layer)} would be trained: call normswap.privacy.prepare(model) again"


def _describe_buffers(layer: GatedModule) -> str | None:
    if all(buffer is None for buffer in layer._buffers.values()):
        return None
    return f"{_name(layer)} has buffers, which Opacus refuses: call normswap.privacy.prepare(model)"


_Check = Callable[[GatedModule], str | None]
# What `prepare` cannot mend.
_PROBLEMS: tuple[_Check, ...] = (
    _describe_functional_site,
    describe_shared_statistics,
    _describe_following_modules,
)
# What it mends.
_UNPREPARED: tuple[_Check, ...] = (_describe_trainable_statistics, _describe_buffers)


def find_problem(layer: GatedModule, checks: tuple[_Check, ...] = _PROBLEMS) -> str | None:
    """Return the first reason why a layer cannot be prepared for Opacus; None if it can."""
    return next((problem for check in checks if (problem := check(layer))), None)


@register_module_validator([*LAYER_CLASSES, FunctionalSwitchNorm])  # type: ignore[untyped-decorator]
def validate(layer: GatedModule) -> list[Exception]:
    """Return the error with which Opacus refuses a layer, if any."""
    problem = find_problem(layer, (*_PROBLEMS, *_UNPREPARED))
    return [] if problem is None else [IllegalModuleConfigurationError(problem)]


@register_module_fixer(LAYER_CLASSES)  # type: ignore[untyped-decorator]
def fix(layer: SwitchNorm, **_: Any) -> SwitchNorm:
    """Return the layer itself with frozen parameters instead of buffers; `ModuleValidator.fix` passes a copy."""
    freeze_buffers(layer)
    return layer


def _name(layer: GatedModule) -> str:
    return type(layer).__name__ if layer.site is None else layer.site.name
