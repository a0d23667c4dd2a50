"""Converted networks in the form that Opacus accepts, and back."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils._expanded_weights.expanded_weights_impl import ExpandedWeight

from normswap.errors import ModelError
from normswap.layers.gated_module import GatedModule
from normswap.layers.in_place import FROZEN_BUFFERS, freeze_buffers, has_frozen_buffers, restore_buffers
from normswap.privacy.validation import find_problem
from normswap.running_stats.control import is_frozen_by_hooks
from normswap.surgery.arguments import has_sample_gradients, require_module
from normswap.surgery.importance import gated_modules
from normswap.surgery.module_tree import walk_modules
from normswap.surgery.wrappers import unwrap

# Attribute of a module that torch calls instead of its forward and hooks, and that copies leave out.
_CALL = "_compiled_call_impl"


def prepare(model: nn.Module) -> list[str]:
    """Prepare a converted model for `opacus.PrivacyEngine.make_private`, in place.

    Opacus refuses trainable modules with buffers. The running statistics and matching constants of SN layers become
    frozen parameters under the same names, so the keys and the values of the state dict do not change, nor does the
    function. While Opacus' hooks are on a module, its output is a copy, which code may change in place
    (`out += identity`, `ReLU(inplace=True)`); without the copy torch raises. Functions that would store statistics of
    data in the model, such as `normswap.calibrate`, refuse it afterwards. Build the optimizer before or after. After
    `model.requires_grad_(True)` or a copy of the model, prepare it again.

    Args:
        model: a converted model, wrapped or not, whose layers use running statistics in training (the default of
            conversion) or have no `bn` branch.

    Returns:
        The names of the layers that changed; [] if the model was prepared already.

    Raises:
        ModelError: a layer uses statistics of the batch, a norm was not converted, or a site is functional.
        ArgumentError: `model` is not a module.

    Examples:
        >>> import torch, normswap
        >>> import normswap.privacy
        >>> bn_model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> model = normswap.convert(bn_model, torch.randn(2, 3, 8, 8)).model
        >>> normswap.privacy.prepare(model)
        ['1']
        >>> [name for name, _ in model.named_buffers()]
        []
    """
    inside = unwrap(require_module(model))
    layers = gated_modules(inside)
    _refuse_other_norms(inside)
    if problem := next((found for layer in layers.values() if (found := find_problem(layer))), None):
        raise ModelError(problem)
    changed = [name for name, layer in layers.items() if freeze_buffers(layer)]
    for layer in layers.values():
        for name in vars(layer).get(FROZEN_BUFFERS, ()):
            if (parameter := layer._parameters.get(name)) is not None:
                parameter.requires_grad_(False)
    for module in inside.modules():
        if module._parameters and getattr(module, _CALL) is None:
            vars(module)[_CALL] = partial(_call_hooked, module)
    return changed


def restore(model: nn.Module) -> list[str]:
    """Undo `prepare`: the running statistics and matching constants are buffers again.

    Args:
        model: a model, wrapped or not; it is changed in place.

    Returns:
        The names of the layers that changed.

    Raises:
        ModelError: Opacus still records per-sample gradients of the model.
        ArgumentError: `model` is not a module.

    Examples:
        >>> import torch, normswap
        >>> import normswap.privacy
        >>> model = normswap.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))).model
        >>> normswap.privacy.prepare(model), normswap.privacy.restore(model)
        (['1'], ['1'])
    """
    inside = unwrap(require_module(model))
    if has_sample_gradients(inside):
        raise ModelError(
            "the model is private: Opacus records per-sample gradients of its parameters. Call "
            "model = private_model.to_standard_module() first"
        )
    layers = {name: layer for name, layer in gated_modules(inside).items() if has_frozen_buffers(layer)}
    for layer in layers.values():
        restore_buffers(layer)
    for module in inside.modules():
        if getattr(vars(module).get(_CALL), "func", None) is _call_hooked:
            del vars(module)[_CALL]
    return list(layers)


def _refuse_other_norms(model: nn.Module) -> None:
    """Refuse BN layers that would use the batch in training; Opacus looks at trainable ones only."""
    norms = [
        entry.names[0]
        for entry in walk_modules(model)
        if isinstance(entry.module, _BatchNorm) and not is_frozen_by_hooks(entry.module)
    ]
    if norms:
        raise ModelError(
            f"{norms[0] or 'the model'} is a BatchNorm, which mixes the samples of a batch: convert it with "
            "normswap.convert(model, example_inputs)"
        )


def _call_hooked(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a module; with backward hooks its output is a view that torch lets nobody change, so it is copied."""
    parameters = module._parameters.values()
    if isinstance(module, GatedModule) and any(isinstance(each, ExpandedWeight) for each in parameters):
        raise ModelError(
            'grad_sample_mode="ew" knows no SN layers: torch has a fixed list of functions with expanded weights. Use '
            '"hooks", "functorch" or "ghost"'
        )
    output = module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
    return output.clone() if module._backward_hooks and isinstance(output, Tensor) else output
