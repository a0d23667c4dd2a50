"""Callbacks for a training loop: log importance weights, and switch `bn_statistics` at given steps.

`watch_importance` registers a hook on the optimizer, so the loop itself does not change, and only steps that the
optimizer takes count: not accumulated batches, nor steps that a gradient scaler skips. The callbacks change no
parameters and add nothing to state dicts.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from normswap.errors import OptimizerError, WatchError
from normswap.layers.gating import BRANCHES, BnStatistics, check_bn_statistics
from normswap.renamed import warn_renamed
from normswap.running_stats.control import set_bn_statistics
from normswap.surgery.importance import SiteWeights, gated_modules, importance_weights, trainable_gates
from normswap.training.output_watch import OutputWatch

logger = logging.getLogger(__name__)

# The signature of the loggers of W&B, MLflow, accelerate and Lightning.
WriteFunction = Callable[[dict[str, float], int], object]

# The attribute of a wrapper with the optimizer inside: accelerate and DeepSpeed, Lightning, timm's Lookahead.
_WRAPPED_ATTRIBUTES = ("optimizer", "_optimizer", "_base_optimizer")


class ScalarWriter(Protocol):
    """The part of TensorBoard's `SummaryWriter` that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Log one number."""


class _StepCallback(Protocol):
    def on_step(self, step: int) -> None: ...


class ImportanceLog:
    """Writes the importance weights of a model at step 0 and each time the steps pass a multiple of `every`.

    Args:
        model, write, every, per_site: as in `watch_importance`.
        start_step: the number of steps before; nothing is written for them.

    Raises:
        WatchError: the model has no SN layer, or `every` is less than 1.
    """

    def __init__(
        self, model: nn.Module, write: WriteFunction | ScalarWriter, *, every: int, per_site: bool, start_step: int = 0
    ) -> None:
        if every < 1:
            raise WatchError(f"every: expected a number of steps of at least 1, got {every}")
        if not gated_modules(model):
            raise WatchError(
                "expected a model with SN layers, found none: convert it first with normswap.convert(model)"
            )
        self._model, self._write = model, _as_write_function(write)
        self._every, self._per_site = every, per_site
        self._last_period = start_step // every if start_step else -1

    def on_step(self, step: int) -> None:
        """Write the weights after this step if they are due."""
        periods = step // self._every
        if periods > self._last_period:
            self._write(importance_scalars(self._model, per_site=self._per_site), step)
        self._last_period = periods

    def reach(self, step: int) -> None:
        """Call `on_step(step)`; the old name of that method."""
        warn_renamed("ImportanceLog.reach", "on_step")
        self.on_step(step)


class StatisticsSwitch:
    """Switches the `bn_statistics` of a model at given steps or epochs.

    Args:
        model: the model whose SN layers are switched.
        modes: the mode from each step or epoch on. Before the first one, layers keep their own.

    Raises:
        LayerError: a mode is unknown.
        WatchError: a key is not a whole number of at least 0, or the model has no SN layer with a `bn` branch.
    """

    def __init__(self, model: nn.Module, modes: Mapping[int, BnStatistics]) -> None:
        for start, mode in modes.items():
            check_bn_statistics(mode)
            if not isinstance(start, int) or start < 0:
                raise WatchError(f"bn_statistics: expected step numbers such as 0 and 1000 as keys, got {start!r}")
        if not any("bn" in layer.branches for layer in gated_modules(model).values()):
            raise WatchError("expected SN layers with a `bn` branch, found none: convert the model first")
        self._model, self._modes = model, sorted(modes.items(), reverse=True)
        self._mode: BnStatistics | None = None

    def on_step(self, step: int) -> None:
        """Set the mode of this step or epoch, unless it is set already."""
        mode = next((mode for start, mode in self._modes if start <= step), None)
        if mode is not None and mode != self._mode:
            set_bn_statistics(self._model, mode)
            logger.info("bn_statistics=%r from step or epoch %d on", mode, step)
        self._mode = mode

    def reach(self, step: int) -> None:
        """Call `on_step(step)`; the old name of that method."""
        warn_renamed("StatisticsSwitch.reach", "on_step")
        self.on_step(step)


class ImportanceWatch:
    """The handle that `normswap.watch_importance` returns; `remove()`, or the end of a `with` block, stops it.

    Args:
        callbacks: objects with a method `on_step(step)`, which is called at once and after every step.
        step: the number of steps that the optimizer has taken.
        parts: the old name of `callbacks`.

    Examples:
        >>> import torch, normswap
        >>> model = normswap.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))).model
        >>> optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.1))
        >>> with normswap.watch_importance(model, optimizer, bn_statistics={2: "batch"}) as watch:
        ...     for _ in range(2):
        ...         optimizer.step()
        >>> watch.step, model[1].bn_statistics
        (2, 'batch')
    """

    __module__ = "normswap"

    def __init__(
        self, callbacks: Sequence[_StepCallback] = (), step: int = 0, *, parts: Sequence[_StepCallback] | None = None
    ) -> None:
        if parts is not None:
            warn_renamed("ImportanceWatch(parts=)", "callbacks")
            callbacks = parts
        self.step = step
        self._callbacks = callbacks
        self._handle: RemovableHandle | None = None
        self._on_step()

    def attach(self, optimizer: torch.optim.Optimizer) -> Self:
        """Count the steps of an optimizer from now on."""
        self._handle = optimizer.register_step_post_hook(self._count)
        return self

    def hang_on(self, optimizer: torch.optim.Optimizer) -> Self:
        """Call `attach(optimizer)`; the old name of that method."""
        warn_renamed("ImportanceWatch.hang_on", "attach")
        return self.attach(optimizer)

    def remove(self) -> None:
        """Stop; the layers keep their present `bn_statistics`."""
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
    inputs: Any = None,
    report: Callable[[str], object] = logger.warning,
    step: int = 0,
) -> ImportanceWatch:
    """Log importance weights, and switch `bn_statistics`, after steps of an optimizer, without a change of the loop.

    With `inputs` it also looks for layers whose outputs died: that no longer differ between samples, are NaN or
    infinite.

    The weights are read from the device only when they are written. In several processes, pass `write` in the one that
    logs, and `bn_statistics` in all.

    Args:
        model: a converted model, wrapped or not.
        optimizer: the optimizer of the gates, also if accelerate, Lightning or timm's Lookahead wrap it.
        write: a function `write(values, step)` such as `wandb.log`, `mlflow.log_metrics`, `accelerator.log` or
            `logger.log_metrics` of Lightning; or a `SummaryWriter`. The names of the values are `importance/mean/bn`,
            `importance/var/in` and so on: averages over all sites, in which a missing branch counts 0.
        every: the number of steps between two calls of `write`. The first call is at step 0, before training.
        per_site: also write `importance/FQN/mean/bn` and so on for every site.
        bn_statistics: the statistics of `bn` branches in training, by the number of steps after which they start,
            such as `{0: "batch", 1000: "running"}`; see `normswap.set_bn_statistics`.
        inputs: one input of the model with a few different samples, on which the model runs in evaluation mode every
            100 steps, to look for outputs that died.
        report: called once, with a sentence, if outputs died; default: a warning of Python's logging.
        step: the number of steps that a resumed run has taken before. The mode of that step is set at once.

    Returns:
        A handle with `watch.step` and `watch.remove()`; also a context manager.

    Raises:
        WatchError: `write`, `bn_statistics` and `inputs` are all missing; the model has no SN layers; `every` is less
            than 1; a key of `bn_statistics` is not a number of steps; `inputs` has a single sample.
        OptimizerError: `optimizer` is not an optimizer, or has none of the trainable gates.
        LayerError: a mode is unknown.
        ModelError: the layers do not support a mode; see `normswap.set_bn_statistics`.

    Examples:
        >>> import torch, normswap
        >>> model = normswap.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))).model
        >>> optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.1))
        >>> def write(values, step):
        ...     print(step, values["importance/mean/bn"])
        >>> watch = normswap.watch_importance(model, optimizer, write=write, every=100)
        0 1.0
        >>> watch.remove()
    """
    inner_optimizer = unwrap_optimizer(optimizer)
    _check_gates(model, inner_optimizer)
    callbacks: list[_StepCallback] = []
    if bn_statistics:
        callbacks.append(StatisticsSwitch(model, bn_statistics))
    if write is not None:
        callbacks.append(ImportanceLog(model, write, every=every, per_site=per_site, start_step=step))
    if inputs is not None:
        callbacks.append(OutputWatch(model, inputs, report))
    if not callbacks:
        raise WatchError("nothing to do: pass write, such as write=print, bn_statistics={1000: 'running'}, or inputs")
    return ImportanceWatch(callbacks, step).attach(inner_optimizer)


def importance_scalars(model: nn.Module, *, per_site: bool = False) -> dict[str, float]:
    """Return the importance weights as a dict of numbers, as `watch_importance` writes them."""
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
    """Return the optimizer inside its wrappers. Only its own `step` calls hooks; a wrapper's hooks are never called.

    Raises:
        OptimizerError: there is no optimizer of torch inside.
    """
    found = optimizer
    while (
        name := next((name for name in _WRAPPED_ATTRIBUTES if name in getattr(found, "__dict__", {})), None)
    ) is not None:
        found = vars(found)[name]
    if not isinstance(found, torch.optim.Optimizer):
        raise OptimizerError(f"optimizer: expected a torch optimizer, got {type(optimizer).__name__}")
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
            f"optimizer: has none of the model's {len(gates)} gates, so they would not be trained: build it from "
            "normswap.param_groups(model, lr=...) after the conversion"
        )
