"""Freeze, unfreeze, synchronize and update the running statistics of all SN and BN layers of a model.

Functions such as `torch.optim.swa_utils.update_bn` and timm's freezing select layers by the BatchNorm classes, so they
skip SN layers silently; the functions here handle both. A functional site can be frozen like a layer. The module that
calls it owns its running statistics, and `update_statistics` leaves them to the momentum of that call, as `update_bn`
does.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.errors import DataError, ModelError
from normswap.layers.gated_module import GatedModule
from normswap.layers.gating import BnStatistics, check_bn_statistics
from normswap.layers.in_place import STATISTICS, STATISTICS_BEFORE_FREEZE, has_frozen_affine
from normswap.layers.switch_norm import SwitchNorm
from normswap.model_state import call_model, training_flags
from normswap.running_stats.accumulation import batch_inputs, move_to_device
from normswap.surgery.arguments import describe_invalid_batches, refuse_private, require_module
from normswap.surgery.module_tree import ModuleEntry, model_training_flags, walk_modules
from normswap.surgery.selection import SiteFilter, first_matching_patterns
from normswap.surgery.wrappers import unwrap


def freeze_statistics(model: nn.Module) -> list[str]:
    """Freeze SN and BN layers: they normalize by their running statistics in training too, and do not update them.

    SN layers with `bn_statistics="running"`, the default of conversion, do so already; freezing them too only means
    that `calibrate` leaves them alone. The model is changed in place, and `model.train()` does not undo it. The `in`
    and `ln` branches still use the statistics of the sample, and parameters are still trained. To freeze a part of a
    model, pass that part.

    Args:
        model: a model, converted or not, wrapped or not.

    Returns:
        The names of the layers that were not frozen before. A layer without running statistics cannot be frozen.

    Raises:
        ArgumentError: `model` is not a module.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> normswap.freeze_statistics(model)
        ['1']
        >>> before = model[1].running_mean.clone()
        >>> _ = model.train()(torch.randn(2, 3, 8, 8))
        >>> torch.equal(model[1].running_mean, before)
        True
    """
    unfrozen = {entry.names[0]: entry.module for entry in walk_modules(unwrap(model)) if _can_be_frozen(entry.module)}
    for layer in unfrozen.values():
        if isinstance(layer, GatedModule):
            vars(layer)[STATISTICS_BEFORE_FREEZE] = layer.bn_statistics
            layer.bn_statistics = "running"
        else:
            layer.register_forward_pre_hook(_enter_evaluation)
            layer.register_forward_hook(_leave_evaluation, always_call=True)
    return list(unfrozen)


def unfreeze_statistics(model: nn.Module) -> list[str]:
    """Undo `freeze_statistics`: BN layers normalize by the batch in training again and update their statistics.

    The model is changed in place. An SN layer gets back the `bn_statistics` that it had before. To let layers that were
    converted with `"running"` normalize by the batch, use `set_bn_statistics(model, "batch")`.

    Args:
        model: a model, converted or not, wrapped or not.

    Returns:
        The names of the layers that were frozen before.

    Raises:
        ModelError: the model trains with differential privacy.
        ArgumentError: `model` is not a module.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> normswap.freeze_statistics(model), normswap.unfreeze_statistics(model)
        (['1'], ['1'])
    """
    frozen = {
        entry.names[0]: entry.module for entry in walk_modules(unwrap(model)) if _is_frozen_by_request(entry.module)
    }
    if frozen:
        refuse_private(unwrap(model), "statistics of the batch would mix its samples")
    for layer in frozen.values():
        if isinstance(layer, GatedModule):
            layer.bn_statistics = vars(layer).pop(STATISTICS_BEFORE_FREEZE, layer.bn_statistics)
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_enter_evaluation, _leave_evaluation)]:
                del hooks[key]
                layer._forward_hooks_always_called.pop(key, None)
    return list(frozen)


def synchronize_statistics(
    model: nn.Module, process_group: "torch.distributed.ProcessGroup | None" = None
) -> list[str]:
    """Synchronize SN layers: in training, their `bn` branch normalizes by the joint batch of all processes.

    The model is changed in place, also inside DDP. For BN layers, `torch.nn.SyncBatchNorm.convert_sync_batchnorm` does
    the same. `layer.synchronize = False` undoes it for a layer.

    Args:
        model: a converted model, wrapped or not.
        process_group: the processes with the joint batch; default is all.

    Returns:
        The names of the layers that were not synchronized before, or with another group. A layer without a `bn` branch
        cannot be synchronized.

    Raises:
        ArgumentError: `model` is not a module.

    Examples:
        >>> import torch, normswap
        >>> bn_model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> model = normswap.convert(bn_model, torch.randn(2, 3, 8, 8)).model
        >>> normswap.synchronize_statistics(model)
        ['1']
        >>> model[1].synchronize
        True
    """
    entries = walk_modules(unwrap(model))
    layers = {entry.names[0]: entry.module for entry in entries if isinstance(entry.module, GatedModule)}
    selected = {name: layer for name, layer in layers.items() if "bn" in layer.branches}
    changed = [
        name for name, layer in selected.items() if not layer.synchronize or layer.process_group is not process_group
    ]
    for layer in selected.values():
        layer.synchronize, layer.process_group = True, process_group
    return changed


def set_bn_statistics(
    model: nn.Module,
    mode: BnStatistics,
    *,
    include: SiteFilter | Iterable[SiteFilter] = (),
    exclude: SiteFilter | Iterable[SiteFilter] = (),
) -> list[str]:
    """Set the statistics that the `bn` branches of SN layers use in training.

    The model is changed in place. State dicts do not contain the setting, so set it again after loading. Layers without
    a `bn` branch or without running statistics are skipped.

    Args:
        model: a converted model, wrapped or not.
        mode: `"batch"`, `"running"` or `"renorm"`, as `bn_statistics` of `normswap.switch_norm`.
        include: the layers to set: glob patterns on names, regular expressions after `re:`, or functions
            `(module, fqn) -> bool`. By default all, except those that replaced a frozen BatchNorm; these are set only
            if a filter matches them.
        exclude: the layers to skip, by filters as in `include`.

    Returns:
        The names of the layers that changed.

    Raises:
        LayerError: `mode` is unknown.
        PlanError: a pattern matches no layer.
        ModelError: no layer has a `bn` branch with running statistics; or `mode` is `"running"` and the running
            statistics of a layer have not seen a batch yet; or it is another one, and the model trains with
            differential privacy.
        ArgumentError: `model` is not a module.

    Examples:
        >>> import torch, normswap
        >>> bn_model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> model = normswap.convert(bn_model, torch.randn(2, 3, 8, 8)).model
        >>> normswap.set_bn_statistics(model, "renorm")
        ['1']
        >>> model[1].bn_statistics
        'renorm'
    """
    check_bn_statistics(mode)
    entries = [entry for entry in walk_modules(unwrap(model)) if _can_use_running_statistics(entry.module)]
    if not entries:
        raise ModelError(
            "the model has no SN layer with a `bn` branch and running statistics: convert it with normswap.convert"
        )
    chosen = _select_layers(entries, include, exclude)
    changed = {name: layer for name, layer in chosen.items() if layer.bn_statistics != mode}
    empty = [name for name, layer in changed.items() if mode == "running" and _has_no_data(layer)]
    if empty:
        raise ModelError(
            f"the running statistics of {', '.join(empty)} have not seen a batch yet: train the model or call "
            "normswap.update_statistics first, or exclude these layers"
        )
    if mode != "running":
        refuse_private(unwrap(model), f"bn_statistics={mode!r} would mix the samples of a batch")
    for layer in changed.values():
        vars(layer).pop(STATISTICS_BEFORE_FREEZE, None)
        layer.bn_statistics = mode
    return list(changed)


def _select_layers(
    entries: Sequence[ModuleEntry],
    include: SiteFilter | Iterable[SiteFilter],
    exclude: SiteFilter | Iterable[SiteFilter],
) -> dict[str, Any]:
    names = [entry.names for entry in entries]
    what = "layers with a `bn` branch and running statistics"
    modules = {entry.names[0]: entry.module for entry in entries}
    included = first_matching_patterns(include, names, what, modules=modules)
    excluded = first_matching_patterns(exclude, names, what, modules=modules, argument="exclude")
    return {
        entry.names[0]: entry.module
        for entry in entries
        if (entry.names[0] in included if include else not _was_frozen(entry.module)) and entry.names[0] not in excluded
    }


def _can_use_running_statistics(module: nn.Module) -> bool:
    """Return whether the layer has a `bn` branch that can use running statistics."""
    tracked = not isinstance(module, SwitchNorm) or module.running_mean is not None
    return isinstance(module, GatedModule) and "bn" in module.branches and tracked


def _was_frozen(module: nn.Module) -> bool:
    """Return whether the layer replaced a norm that used its running statistics in training too."""
    return has_frozen_affine(module)


def _has_no_data(layer: Any) -> bool:
    """Return whether a conversion added the running statistics of the layer, and no batch updated them yet."""
    count = getattr(layer, "num_batches_tracked", None)
    return layer.vertex != "bn" and count is not None and int(count) == 0


@torch.no_grad()
def update_statistics(model: nn.Module, loader: Iterable[Any], *, device: torch.device | str | None = None) -> None:
    """Set the running statistics of SN and BN layers to their average over batches, as `update_bn` does for BN.

    The model runs one pass in training mode, so dropout is active; every batch has the same weight, also a smaller one.
    For the statistics of the data itself, use `calibrate`. Statistics that are constants in training do not change:
    those of frozen layers, and those of SN layers with `bn_statistics="running"`, the default of conversion; if there
    are no others, a warning says so. Synchronized layers average
    over all processes; each process must call this function with the same number of batches. Momenta and training
    flags are restored; after an error, the statistics are restored too.

    Args:
        model: a model, converted or not, wrapped or not; its running statistics are changed in place.
        loader: an iterable of inputs (a tensor, a tuple of positional arguments or a dict of keyword arguments), or of
            lists or tuples whose first item is such an input.
        device: the device to move the inputs to; default is not to move them.

    Raises:
        ModelError: `loader` is empty, or the model trains with differential privacy.
        DataError: `loader` is one input, not an iterable of inputs.
        ArgumentError: `model` is not a module.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> normswap.update_statistics(model, [torch.randn(16, 3, 8, 8) for _ in range(4)])
        >>> int(model[1].num_batches_tracked)
        4
    """
    modules = [entry.module for entry in walk_modules(require_module(model))]
    refuse_private(model, "update_statistics would store statistics of the data in the model")
    if problem := describe_invalid_batches(loader):
        raise DataError(f"loader: {problem}")
    in_evaluation = _kept_in_evaluation(model)
    unfrozen = [
        module for module in modules if isinstance(module, SwitchNorm | _BatchNorm) and _uses_batch_statistics(module)
    ]
    layers = [module for module in unfrozen if module not in in_evaluation]
    constant = [module for module in modules if isinstance(module, SwitchNorm) and _can_be_frozen(module)]
    if constant and not layers:
        warnings.warn(
            f"no layer was updated: all {len(constant)} with running statistics use them as constants in training; to "
            "compute them from data nevertheless, call normswap.calibrate(model, loader)",
            stacklevel=2,
        )
    with (
        training_flags(modules, training=True),
        training_flags(in_evaluation, training=False),
        _cumulative_average(layers),
    ):
        batches = 0
        for batch in loader:
            call_model(model, move_to_device(batch_inputs(batch), device))
            batches += 1
        if not batches:
            raise ModelError("loader: expected at least one batch, got none")


def _kept_in_evaluation(model: nn.Module) -> list[nn.Module]:
    """Return the modules that the model's own `train()` leaves in evaluation mode."""
    flags = model_training_flags(model)
    return [p.module for p in walk_modules(model) if flags is not None and not flags.training[p.names[0]]]


@contextmanager
def _cumulative_average(layers: list[Any]) -> Iterator[None]:
    """Let layers compute a plain average from zero; restore momenta, and after an error the statistics too."""
    momenta = [layer.momentum for layer in layers]
    buffers = [getattr(layer, name) for layer in layers for name in STATISTICS]
    saved = [(buffer, buffer.clone()) for buffer in buffers if buffer is not None]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
        yield
    except BaseException:
        for buffer, value in saved:
            buffer.copy_(value)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _can_be_frozen(module: nn.Module) -> bool:
    """Return whether the layer has running statistics and is not frozen yet."""
    if isinstance(module, GatedModule):
        return _can_use_running_statistics(module) and not is_frozen(module)
    return isinstance(module, _BatchNorm) and module.running_mean is not None and not is_frozen_by_hooks(module)


def _uses_batch_statistics(module: nn.Module) -> bool:
    """Return whether the layer normalizes by the batch in training, and has running statistics to use instead."""
    return _can_be_frozen(module) and getattr(module, "bn_statistics", "batch") != "running"


def is_frozen(module: nn.Module) -> bool:
    """Return whether the layer was frozen by `freeze_statistics`, or replaced a norm that was frozen."""
    return (isinstance(module, GatedModule) and _was_frozen(module)) or _is_frozen_by_request(module)


def _is_frozen_by_request(module: nn.Module) -> bool:
    return STATISTICS_BEFORE_FREEZE in vars(module) or is_frozen_by_hooks(module)


def is_frozen_by_hooks(module: nn.Module) -> bool:
    """Return whether `freeze_statistics` has frozen a BN layer."""
    return _enter_evaluation in module._forward_pre_hooks.values()


def _enter_evaluation(module: nn.Module, _args: Any) -> None:
    # For this call only: the next `model.train()` would set the flag again.
    vars(module)["unfrozen_training"] = module.training
    module.training = False


def _leave_evaluation(module: nn.Module, _args: Any, _output: Any) -> None:
    module.training = vars(module).pop("unfrozen_training", module.training)
