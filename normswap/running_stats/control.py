"""Running statistics of a whole model: what libraries do to BatchNorm by its class, for SN and BN layers alike, and
what the `bn` branches of SN layers make of them in training.

`torch.optim.swa_utils.update_bn` and the freezing of timm ask for BatchNorm's classes and pass an SN layer by without
a word. A functional site is frozen with the rest; its statistics are its owner's, and `update_statistics` leaves
them to the momentum of the owner's call, as `update_bn` does. Several processes share the statistics of their batches
where they are told to.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap.errors import DataError, ModelError
from normswap.layers.gated_module import GatedModule
from normswap.layers.gating import BnStatistics, check_bn_statistics
from normswap.layers.in_place import STATISTICS, STATISTICS_BEFORE_FREEZE
from normswap.layers.switch_norm import SwitchNorm
from normswap.model_state import call_model, training_flags
from normswap.running_stats.accumulation import batch_inputs, move_to_device
from normswap.surgery.arguments import describe_invalid_batches, require_module
from normswap.surgery.module_tree import ModuleEntry, model_training_flags, walk_modules
from normswap.surgery.selection import first_matching_patterns
from normswap.surgery.wrappers import unwrap

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def freeze_statistics(model: nn.Module) -> list[str]:
    """Let SN and BN layers use their running statistics in training too, and leave these alone.

    In place and for good: `model.train()` does not undo it. IN and LN statistics are those of the sample as ever, and
    parameters train on. Pass a part of a model to freeze that part.

    Args:
        model: converted or not, wrapped or not; it is changed.

    Returns:
        The fqns of the layers that were not frozen before; one without running statistics cannot be.
    """
    unfrozen = {
        entry.names[0]: entry.module for entry in walk_modules(unwrap(model)) if _uses_batch_statistics(entry.module)
    }
    for layer in unfrozen.values():
        if isinstance(layer, GatedModule):
            if layer.bn_statistics != "batch":  # which is where every other one comes back to
                vars(layer)[STATISTICS_BEFORE_FREEZE] = layer.bn_statistics
            layer.bn_statistics = "running"
        else:
            layer.register_forward_pre_hook(_enter_evaluation)
            layer.register_forward_hook(_leave_evaluation, always_call=True)
    return list(unfrozen)


def unfreeze_statistics(model: nn.Module) -> list[str]:
    """Let SN and BN layers use the statistics of the batch in training again, and gather running ones.

    SN layers that were set to `"renorm"` before are again. Also SN layers that were planned with
    `bn_statistics="running"`; not those that replaced a frozen BatchNorm.

    Args:
        model: converted or not, wrapped or not; it is changed.

    Returns:
        The fqns of the layers that were frozen before.
    """
    frozen = {entry.names[0]: entry.module for entry in walk_modules(unwrap(model)) if _is_frozen(entry.module)}
    for layer in frozen.values():
        if isinstance(layer, GatedModule):
            layer.bn_statistics = vars(layer).pop(STATISTICS_BEFORE_FREEZE, "batch")
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_enter_evaluation, _leave_evaluation)]:
                del hooks[key]
                layer._forward_hooks_always_called.pop(key, None)
    return list(frozen)


def synchronize_statistics(model: nn.Module, process_group: "ProcessGroup | None" = None) -> list[str]:
    """Let SN layers take as the batch of their `bn` branch, in training, that of all processes.

    In place, also inside DDP. It is for SN layers what `torch.nn.SyncBatchNorm.convert_sync_batchnorm` is for the BN
    layers that a model still has. `layer.synchronize = False` undoes it.

    Args:
        model: converted, wrapped or not; it is changed.
        process_group: the processes that share their batch; default all there are.

    Returns:
        The fqns of the layers that were not synchronized before, or with another group; one without a `bn` branch
        cannot be.
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
    model: nn.Module, mode: BnStatistics, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """Set what the `bn` branches of SN layers use in training, after a conversion.

    In place; like any setting of a layer in no state dict, so set it again after loading. A layer without a `bn` branch
    or without running statistics has no choice and is left alone.

    Args:
        model: converted, wrapped or not; it is changed.
        mode: `"batch"`, `"running"` or `"renorm"`, as `bn_statistics` of `normswap.switch_norm`.
        include, exclude: globs on names, or regular expressions after `re:`. Without `include` all sites are meant, but
            those that replaced a frozen BatchNorm keep their running statistics; a pattern sets these too.

    Returns:
        The fqns of the layers that were changed.

    Raises:
        LayerError: `mode` is unknown.
        PlanError: a pattern matches nothing.
        ModelError: no layer has a `bn` branch; or `"running"` is asked of statistics that were begun by a conversion
            and have seen no batch.
    """
    check_bn_statistics(mode)
    entries = [entry for entry in walk_modules(unwrap(model)) if _can_use_running_statistics(entry.module)]
    if not entries:
        raise ModelError("expected SN layers with a `bn` branch and running statistics, found none: convert the model")
    chosen = _select_layers(entries, include, exclude)
    changed = {name: layer for name, layer in chosen.items() if layer.bn_statistics != mode}
    empty = [name for name, layer in changed.items() if mode == "running" and _has_no_data(layer)]
    if empty:
        raise ModelError(
            f"the running statistics of {', '.join(empty)} have seen no batch: train or call update_statistics first, "
            "or exclude these"
        )
    for layer in changed.values():
        vars(layer).pop(STATISTICS_BEFORE_FREEZE, None)
        layer.bn_statistics = mode
    return list(changed)


def _select_layers(entries: Sequence[ModuleEntry], include: Sequence[str], exclude: Sequence[str]) -> dict[str, Any]:
    names = [entry.names for entry in entries]
    included = first_matching_patterns(include, names, "layers that have a choice")
    excluded = first_matching_patterns(exclude, names, "layers that have a choice")
    return {
        entry.names[0]: entry.module
        for entry in entries
        if (entry.names[0] in included if include else not _was_frozen(entry.module)) and entry.names[0] not in excluded
    }


def _can_use_running_statistics(module: nn.Module) -> bool:
    """Whether the layer has a `bn` branch that could use running statistics."""
    tracked = not isinstance(module, SwitchNorm) or module.running_mean is not None
    return isinstance(module, GatedModule) and "bn" in module.branches and tracked


def _was_frozen(module: nn.Module) -> bool:
    """Whether the layer replaced a norm that used its running statistics in training too."""
    return "weight" in module._buffers


def _has_no_data(layer: Any) -> bool:
    """Whether running statistics were begun where there had been none, and are still those of no data."""
    count = getattr(layer, "num_batches_tracked", None)
    return layer.vertex != "bn" and count is not None and int(count) == 0


@torch.no_grad()
def update_statistics(model: nn.Module, loader: Iterable[Any], *, device: torch.device | str | None = None) -> None:
    """Set the running statistics of SN and BN layers to their average over `loader`, as `update_bn` does for BN.

    One pass in training; frozen statistics stay. Of synchronized layers it is the average over all processes, each of
    which has to call this, with as many batches as the others. Momenta and training flags are put back, and the
    statistics too if the pass fails. Dropout is active, and a batch counts as any other, however small: `calibrate`
    gives the statistics of the data itself.

    Args:
        model: converted or not, wrapped or not; its running statistics are changed.
        loader: batches, each what the model is called with, or a list or tuple with that first.
        device: where to move the inputs; default is to leave them.

    Raises:
        ModelError: `loader` is empty; DataError: it is one input, not an iterable of inputs.
    """
    modules = [entry.module for entry in walk_modules(require_module(model))]
    if problem := describe_invalid_batches(loader):
        raise DataError(f"loader: {problem}")
    in_evaluation = _kept_in_evaluation(model)
    unfrozen = [
        module for module in modules if isinstance(module, SwitchNorm | _BatchNorm) and _uses_batch_statistics(module)
    ]
    layers = [module for module in unfrozen if module not in in_evaluation]
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
    """The modules that the model's own `train()` leaves in evaluation."""
    flags = model_training_flags(model)
    return [p.module for p in walk_modules(model) if flags is not None and not flags.training[p.names[0]]]


@contextmanager
def _cumulative_average(layers: list[Any]) -> Iterator[None]:
    """Gather a plain average from nothing; put momenta back, and after a failure what was known before."""
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


def _uses_batch_statistics(module: nn.Module) -> bool:
    """Whether the layer uses batch statistics in training, and could use running ones."""
    if isinstance(module, GatedModule):
        return _can_use_running_statistics(module) and module.bn_statistics != "running"
    return isinstance(module, _BatchNorm) and module.running_mean is not None and not is_frozen_by_hooks(module)


def _is_frozen(module: nn.Module) -> bool:
    """Whether the layer uses running statistics in training, and not because it replaced one that always did."""
    if isinstance(module, GatedModule) and module.bn_statistics == "running":
        return not _was_frozen(module)
    return is_frozen_by_hooks(module)


def is_frozen_by_hooks(module: nn.Module) -> bool:
    """Say whether `freeze_statistics` has frozen a BN layer."""
    return _enter_evaluation in module._forward_pre_hooks.values()


def _enter_evaluation(module: nn.Module, _args: Any) -> None:
    # Not by its flag for good, which the next `model.train()` would set again.
    vars(module)["unfrozen_training"] = module.training
    module.training = False


def _leave_evaluation(module: nn.Module, _args: Any, _output: Any) -> None:
    module.training = vars(module).pop("unfrozen_training", module.training)
