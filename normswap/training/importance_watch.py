"""Watching a training loop that is the user's own: importance weights told as they move, `bn_statistics` switched.

`watch_importance` hangs on the optimizer: no loop has to be changed, and batches that are accumulated, or steps that a
loss scaler leaves out, count as they should. This room reads gates and sets what layers make of their statistics; it
changes no parameter, and puts nothing into a state dict.
"""

from collections.abc import Callable, Mapping
from statistics import fmean
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from normswap.errors import OptimizerError, WatchError
from normswap.layers.gating import BRANCHES, BnStatistics, check_bn_statistics
from normswap.running_stats.control import set_bn_statistics
from normswap.surgery.importance import SiteWeights, gated_modules, importance_weights, trainable_gates

# As the loggers of W&B, MLflow, accelerate and Lightning are called.
WriteFunction = Callable[[dict[str, float], int], object]

# Where a wrapper keeps the optimizer whose step is the real one: accelerate and DeepSpeed, Lightning, timm's Lookahead.
_WRAPPED_ATTRIBUTES = ("optimizer", "_optimizer", "_base_optimizer")


class ScalarWriter(Protocol):
    """What TensorBoard's `SummaryWriter` offers."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Take one number."""


class _StepCallback(Protocol):
    def on_step(self, step: int) -> None: ...


class ImportanceLog:
    """Tells the importance weights of a model at step 0, and whenever the steps have passed a multiple of `every`.

    Args:
        done: how many steps there were before.

    Raises:
        WatchError: the model has no SN layer, or `every` is less than 1.
    """

    def __init__(
        self, model: nn.Module, write: WriteFunction | ScalarWriter, *, every: int, per_site: bool, start_step: int = 0
    ) -> None:
        if every < 1:
            raise WatchError(f"every: expected a number of steps, at least 1, got {every}")
        if not gated_modules(model):
            raise WatchError("expected a model with SN layers, found none: convert it first, normswap.convert(model)")
        self._model, self._write = model, _as_write_function(write)
        self._every, self._per_site = every, per_site
        self._last_period = start_step // every if start_step else -1

    def on_step(self, step: int) -> None:
        """Tell the weights after this step if they are due."""
        periods = step // self._every
        if periods > self._last_period:
            self._write(importance_scalars(self._model, per_site=self._per_site), step)
        self._last_period = periods


class StatisticsSwitch:
    """Switches what `bn` branches use in training in the course of a run, counted in steps or in epochs.

    Args:
        modes: by the step or epoch from which each holds. Before the first one layers are left as they are.

    Raises:
        LayerError: a mode is unknown.
        WatchError: a key is no whole number of at least 0, or the model has no SN layer with a `bn` branch.
    """

    def __init__(self, model: nn.Module, modes: Mapping[int, BnStatistics]) -> None:
        for start, mode in modes.items():
            check_bn_statistics(mode)
            if not isinstance(start, int) or start < 0:
                raise WatchError(f"bn_statistics: expected keys such as 0 and 1000, got {start!r}")
        if not any("bn" in layer.branches for layer in gated_modules(model).values()):
            raise WatchError("expected SN layers with a `bn` branch, found none: convert the model first")
        self._model, self._modes = model, sorted(modes.items(), reverse=True)
        self._mode: BnStatistics | None = None

    def on_step(self, step: int) -> None:
        """Set the mode that holds from this step or epoch on, unless it was set before."""
        mode = next((mode for start, mode in self._modes if start <= step), None)
        if mode is not None and mode != self._mode:
            set_bn_statistics(self._model, mode)
        self._mode = mode


class ImportanceWatch:
    """What `watch_importance` returns: `step` counts; `remove()`, or the end of a `with` block, ends it."""

    def __init__(self, callbacks: list[_StepCallback], step: int) -> None:
        self.step = step
        self._callbacks = callbacks
        self._handle: RemovableHandle | None = None
        self._on_step()

    def attach(self, optimizer: torch.optim.Optimizer) -> Self:
        """Count the steps of an optimizer from here on."""
        self._handle = optimizer.register_step_post_hook(self._count)
        return self

    def remove(self) -> None:
        """Stop watching; the layers keep the statistics that they were switched to."""
        if self._handle is not None:
            self._handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _count(self, _optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        self.step += 1
        self._on_step()

    def _on_step(self) -> None:
        for callback in self._callbacks:
            callback.on_step(self.step)


def watch_importance(
    model: nn.Module,
    optimizer: Any,
    *,
    write: WriteFunction | ScalarWriter | None = None,
    every: int = 100,
    per_site: bool = False,
    bn_statistics: Mapping[int, BnStatistics] | None = None,
    step: int = 0,
) -> ImportanceWatch:
    """Log importance weights, and switch `bn_statistics`, after the steps of an optimizer; the loop stays as it is.

    Weights are read from the device at each writing and not in between. Where several processes train, give `write` in
    the one that logs; `bn_statistics` in all.

    Args:
        model: converted, wrapped or not.
        optimizer: the one that has the gates, also as accelerate, Lightning or timm's Lookahead wrap it.
        write: called as `write(values, step)`, as are `wandb.log`, `mlflow.log_metrics`, `accelerator.log` and
            `logger.log_metrics` of Lightning; or a `SummaryWriter`. The names are `importance/mean/bn`,
            `importance/var/in` and so on for averages over all sites, a branch that a site lacks being 0 there.
        every: how many steps lie between two writings. The first one is at step 0, before any training.
        per_site: also write `importance/FQN/mean/bn` and so on for every site.
        bn_statistics: what `bn` branches are to use in training, by the number of steps from which on, as
            `{0: "batch", 1000: "running"}`; see `normswap.set_bn_statistics`.
        step: how many steps a run that is resumed had before. What holds there is set at once.

    Returns:
        A handle: `watch.step`, `watch.remove()`; it also ends a `with` block.

    Raises:
        WatchError: there is nothing to do, nothing to watch, `every` is less than 1 or a key no number of steps.
        OptimizerError: `optimizer` is none, or has none of the gates that train.
        LayerError: a mode is unknown.
        ModelError: `set_bn_statistics` refuses.
    """
    inner_optimizer = unwrap_optimizer(optimizer)
    _check_gates(model, inner_optimizer)
    callbacks: list[_StepCallback] = []
    if bn_statistics:
        callbacks.append(StatisticsSwitch(model, bn_statistics))
    if write is not None:
        callbacks.append(ImportanceLog(model, write, every=every, per_site=per_site, start_step=step))
    if not callbacks:
        raise WatchError("nothing to do: give write=, such as write=print, or bn_statistics={1000: 'running'}")
    return ImportanceWatch(callbacks, step).attach(inner_optimizer)


def importance_scalars(model: nn.Module, *, per_site: bool = False) -> dict[str, float]:
    """Return the importance weights as numbers by name, as `watch_importance` writes them."""
    sites = importance_weights(model)
    scalars = {
        f"importance/{statistic}/{branch}": fmean(getattr(site, statistic).get(branch, 0.0) for site in sites.values())
        for statistic in SiteWeights._fields
        for branch in BRANCHES
    }
    for fqn, site in sites.items() if per_site else ():
        for statistic, shares in site._asdict().items():
            scalars |= {f"importance/{fqn}/{statistic}/{branch}": share for branch, share in shares.items()}
    return scalars


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside its wrappers, whose step calls hooks; those of a wrapper are never called.

    Raises:
        OptimizerError: there is none.
    """
    found = optimizer
    while (
        name := next((name for name in _WRAPPED_ATTRIBUTES if name in getattr(found, "__dict__", {})), None)
    ) is not None:
        found = vars(found)[name]
    if not isinstance(found, torch.optim.Optimizer):
        raise OptimizerError(f"expected an optimizer of torch, got {type(optimizer).__name__}: pass optimizer")
    return found


def _as_write_function(write: Any) -> WriteFunction:
    if not hasattr(write, "add_scalar"):
        return write  # type: ignore[no-any-return]

    def add(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            write.add_scalar(name, value, step)

    return add


def _check_gates(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    gates = set(trainable_gates(model).values())
    if gates and not any(parameter in gates for group in optimizer.param_groups for parameter in group["params"]):
        raise OptimizerError(
            f"the optimizer has none of the model's {len(gates)} gates, so they would never move: build it from "
            "normswap.param_groups(model, lr=...) after the conversion"
        )
