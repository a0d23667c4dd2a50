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
from normswap.layers.in_place import STATISTICS, UNFROZEN
from normswap.layers.switch_norm import SwitchNorm
from normswap.model_state import call_model, training_flags
from normswap.running_stats.accumulation import inputs_of, on_device
from normswap.surgery.arguments import mistaken_batches, require_module
from normswap.surgery.module_tree import Place, own_flags, walk_modules
from normswap.surgery.selection import first_matches
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
    live = {place.names[0]: place.module for place in walk_modules(unwrap(model)) if _is_live(place.module)}
    for layer in live.values():
        if isinstance(layer, GatedModule):
            if layer.bn_statistics != "batch":  # which is where every other one comes back to
                vars(layer)[UNFROZEN] = layer.bn_statistics
            layer.bn_statistics = "running"
        else:
            layer.register_forward_pre_hook(_enter_evaluation)
            layer.register_forward_hook(_leave_evaluation, always_call=True)
    return list(live)


def unfreeze_statistics(model: nn.Module) -> list[str]:
    """Let SN and BN layers use the statistics of the batch in training again, and gather running ones.

    SN layers that were set to `"renorm"` before are again. Also SN layers that were planned with
    `bn_statistics="running"`; not those that replaced a frozen BatchNorm.

    Args:
        model: converted or not, wrapped or not; it is changed.

    Returns:
        The fqns of the layers that were frozen before.
    """
    frozen = {place.names[0]: place.module for place in walk_modules(unwrap(model)) if _is_frozen(place.module)}
    for layer in frozen.values():
        if isinstance(layer, GatedModule):
            layer.bn_statistics = vars(layer).pop(UNFROZEN, "batch")
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
    places = walk_modules(unwrap(model))
    layers = {place.names[0]: place.module for place in places if isinstance(place.module, GatedModule)}
    told = {name: layer for name, layer in layers.items() if "bn" in layer.branches}
    changed = [
        name for name, layer in told.items() if not layer.synchronize or layer.process_group is not process_group
    ]
    for layer in told.values():
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
    places = [place for place in walk_modules(unwrap(model)) if _has_choice(place.module)]
    if not places:
        raise ModelError("expected SN layers with a `bn` branch and running statistics, found none: convert the model")
    chosen = _chosen(places, include, exclude)
    changed = {name: layer for name, layer in chosen.items() if layer.bn_statistics != mode}
    empty = [name for name, layer in changed.items() if mode == "running" and _saw_nothing(layer)]
    if empty:
        raise ModelError(
            f"the running statistics of {', '.join(empty)} have seen no batch: train or call update_statistics first, "
            "or exclude these"
        )
    for layer in changed.values():
        vars(layer).pop(UNFROZEN, None)
        layer.bn_statistics = mode
    return list(changed)


def _chosen(places: Sequence[Place], include: Sequence[str], exclude: Sequence[str]) -> dict[str, Any]:
    names = [place.names for place in places]
    included = first_matches(include, names, "layers that have a choice")
    excluded = first_matches(exclude, names, "layers that have a choice")
    return {
        place.names[0]: place.module
        for place in places
        if (place.names[0] in included if include else not _was_frozen(place.module)) and place.names[0] not in excluded
    }


def _has_choice(module: nn.Module) -> bool:
    """Whether the layer has a `bn` branch that could use running statistics."""
    tracked = not isinstance(module, SwitchNorm) or module.running_mean is not None
    return isinstance(module, GatedModule) and "bn" in module.branches and tracked


def _was_frozen(module: nn.Module) -> bool:
    """Whether the layer replaced a norm that used its running statistics in training too."""
    return "weight" in module._buffers


def _saw_nothing(layer: Any) -> bool:
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
    modules = [place.module for place in walk_modules(require_module(model))]
    if problem := mistaken_batches(loader):
        raise DataError(f"loader: {problem}")
    kept = _kept_in_evaluation(model)
    live = [module for module in modules if isinstance(module, SwitchNorm | _BatchNorm) and _is_live(module)]
    layers = [module for module in live if module not in kept]
    with training_flags(modules, training=True), training_flags(kept, training=False), _averaging(layers):
        batches = 0
        for batch in loader:
            call_model(model, on_device(inputs_of(batch), device))
            batches += 1
        if not batches:
            raise ModelError("loader: expected at least one batch, got none")


def _kept_in_evaluation(model: nn.Module) -> list[nn.Module]:
    """The modules that the model's own `train()` leaves in evaluation."""
    flags = own_flags(model)
    return [p.module for p in walk_modules(model) if flags is not None and not flags.training[p.names[0]]]


@contextmanager
def _averaging(layers: list[Any]) -> Iterator[None]:
    """Gather a plain average from nothing; put momenta back, and after a failure what was known before."""
    momenta = [layer.momentum for layer in layers]
    buffers = [getattr(layer, name) for layer in layers for name in STATISTICS]
    known = [(buffer, buffer.clone()) for buffer in buffers if buffer is not None]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
        yield
    except BaseException:
        for buffer, value in known:
            buffer.copy_(value)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _is_live(module: nn.Module) -> bool:
    """Whether the layer uses batch statistics in training, and could use running ones."""
    if isinstance(module, GatedModule):
        return _has_choice(module) and module.bn_statistics != "running"
    return isinstance(module, _BatchNorm) and module.running_mean is not None and not is_hooked(module)


def _is_frozen(module: nn.Module) -> bool:
    """Whether the layer uses running statistics in training, and not because it replaced one that always did."""
    if isinstance(module, GatedModule) and module.bn_statistics == "running":
        return not _was_frozen(module)
    return is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    """Say whether `freeze_statistics` has frozen a BN layer."""
    return _enter_evaluation in module._forward_pre_hooks.values()


def _enter_evaluation(module: nn.Module, _args: Any) -> None:
    # Not by its flag for good, which the next `model.train()` would set again.
    vars(module)["unfrozen_training"] = module.training
    module.training = False


def _leave_evaluation(module: nn.Module, _args: Any, _output: Any) -> None:
    module.training = vars(module).pop("unfrozen_training", module.training)
