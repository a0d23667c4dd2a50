"""Calibrate a model: compute its running statistics over a data set, the "batch average" of the paper.

Every value has the same weight: moments are pooled over all batches, calls and processes as mean of variances plus
variance of means, and the variance is stored unbiased, as torch stores it. `calibrate` changes only running statistics;
after an error it restores all of them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from normswap.errors import DataError, ModelError, NothingToDo
from normswap.layers.gated_module import FunctionalSwitchNorm, GatedModule
from normswap.running_stats.accumulation import (
    NO_STATISTICS,
    CalibrationPass,
    LayerStatistics,
    ProcessResult,
    ResultExchange,
    merge_processes,
)
from normswap.running_stats.control import is_frozen_by_hooks
from normswap.surgery.arguments import describe_invalid_batches, require_module
from normswap.surgery.module_tree import walk_modules
from normswap.surgery.norms.classes import is_norm_layer
from normswap.surgery.wrappers import unwrap
from normswap.text import pluralize, printable_as

_FROZEN_REASON = "frozen, its running statistics are constants: use include_frozen=True to calibrate it too"
_NOT_RUN_REASON = "did not run"


@dataclass(frozen=True)
class CalibratedLayer:
    """The change of the running statistics of one layer. A deviation is sqrt(var + eps).

    Attributes:
        fqn: the name of the layer.
        values: the number of values per channel, over all batches and processes.
        calls: the number of calls of the layer.
        mean_shift: the largest change of the mean over channels, in new deviations.
        deviation_ratio: the old deviation divided by the new one, in the channel where it is farthest from 1.
        shift: the largest change, over channels, of the normalized value in evaluation of an input within one old
            deviation of the old mean.
    """

    fqn: str
    values: int
    calls: int
    mean_shift: float
    deviation_ratio: float
    shift: float


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that was not calibrated, and the reason."""

    fqn: str
    reason: str


@printable_as("calibration")
@dataclass(frozen=True, repr=False)
class Calibration:
    """The result of `calibrate`. `print(calibration)` shows it as a table.

    Attributes:
        layers: the calibrated layers in the order of their first call.
        skipped: the layers that were not calibrated, with reasons.
        batches: the number of batches of one pass, over all processes.
        passes: the number of passes over the batches.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> calibration = normswap.calibrate(model, [torch.randn(16, 3, 8, 8) for _ in range(4)])
        >>> [(layer.fqn, layer.values) for layer in calibration.layers]  # 4 batches, 16 images, 6x6 positions
        [('1', 2304)]
    """

    __module__ = "normswap"

    layers: tuple[CalibratedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    batches: int
    passes: int

    def __repr__(self) -> str:
        layers, skipped = pluralize(len(self.layers), "layer"), f"{len(self.skipped)} skipped"
        return f"Calibration({layers}, {skipped}, {self.batches} batch{'es' * (self.batches != 1)})"

    @property
    def largest_shift(self) -> float:
        """The largest `shift` over all layers."""
        return max(layer.shift for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers."""
        return {**asdict(self), "largest_shift": self.largest_shift}


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layer_by_layer: bool = False,
    include_frozen: bool = False,
    device: torch.device | str | None = None,
    process_group: Any = None,
) -> Calibration:
    """Compute the running statistics of SN and BN layers over a data set, in place.

    The model runs in evaluation mode, so dropout is off. By default there is one pass, in which all these layers
    normalize by the batch, as in training; their old running statistics have no effect. This is the batch average that
    the paper uses for inference. Use large batches in random order. With `layer_by_layer`, each layer is calibrated in
    a pass of its own, with the calibrated statistics of the layers before it. This is exact at any batch size and needs
    one pass for every layer.

    The `in` and `ln` branches always use the statistics of the sample. If `torch.distributed` is initialized, every
    process must call this function, with its own batches or with an empty list; the statistics are pooled.
    `num_batches_tracked` becomes the number of calls.

    Args:
        model: a model with SN layers, BN layers or both; it may be wrapped.
        batches: an iterable of inputs (a tensor, a tuple of positional arguments or a dict of keyword arguments), or of
            lists or tuples whose first item is such an input. `layer_by_layer` iterates over it several times.
        layer_by_layer: calibrate one layer after another, each in a pass of its own.
        include_frozen: also calibrate layers that use their running statistics in training.
        device: the device to move the inputs to; default is not to move them.
        process_group: the processes that pool their statistics; default is all.

    Returns:
        A `Calibration`: `.layers` with the change of each layer, `.skipped` with reasons.

    Raises:
        NothingToDo: no layer with running statistics ran.
        DataError: there are no batches; or the input of a layer has NaN or infinite values, a wrong number of channels,
            or a single value per channel.
        ModelError: the model raises on a batch, or another process failed.
        ArgumentError: `model` is not a module.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> normswap.calibrate(model, [torch.randn(16, 3, 8, 8) for _ in range(4)])
        Calibration(1 layer, 0 skipped, 4 batches)
    """
    if layer_by_layer and iter(batches) is iter(batches):
        raise DataError(
            "batches: layer_by_layer needs an iterable for several passes, such as a list or a DataLoader; got "
            f"{type(batches).__name__}: pass list(batches), or drop layer_by_layer"
        )
    model = unwrap(require_module(model))
    if problem := describe_invalid_batches(batches):
        raise DataError(f"batches: {problem}")
    layers, skipped = _split_layers(model, include_frozen=include_frozen)
    run = _CalibrationRun(model, layers, device, ResultExchange(process_group))
    with run.rollback_on_error():
        (run.layer_by_layer if layer_by_layer else run.single_pass)(batches)
    done = {layer.fqn for layer in run.done}
    skipped |= run.skip_reasons
    skipped |= {name: _NOT_RUN_REASON for name in layers if name not in done and name not in skipped}
    if not done:
        details = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in [*skipped.items()][:3])
        raise NothingToDo(f"nothing to calibrate: no layer with running statistics ran{details and f' ({details})'}")
    return Calibration(tuple(run.done), tuple(SkippedLayer(*item) for item in skipped.items()), run.batches, run.passes)


def _split_layers(model: nn.Module, *, include_frozen: bool) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers to calibrate, and the reasons to skip other norms, by name."""
    layers: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    for entry in walk_modules(model):
        name, module = entry.names[0], entry.module
        reason = _skip_reason(module, include_frozen=include_frozen)
        if reason is not None:
            reasons[name] = reason
        elif isinstance(module, GatedModule | _BatchNorm):
            layers[name] = module
    return layers, reasons


def _skip_reason(module: nn.Module, *, include_frozen: bool) -> str | None:
    """Return why a norm is skipped; None for a layer to calibrate and for a module that is not a norm."""
    reason: str | None
    if isinstance(module, GatedModule):
        reason, frozen = _gated_skip_reason(module), module.bn_statistics == "running"
    elif isinstance(module, _BatchNorm):
        reason, frozen = _batch_norm_skip_reason(module), is_frozen_by_hooks(module)
    else:
        return _other_skip_reason(module)
    return reason or (_FROZEN_REASON if frozen and not include_frozen else None)


def _gated_skip_reason(layer: Any) -> str | None:
    if "bn" not in layer.branches:
        return "has no `bn` branch"
    # A functional site receives its statistics with each call.
    return None if isinstance(layer, FunctionalSwitchNorm) or layer.running_mean is not None else NO_STATISTICS


def _batch_norm_skip_reason(layer: Any) -> str | None:
    if layer.running_mean is None:
        return NO_STATISTICS
    return "has seen no input yet: run one batch through the model first" if is_lazy(layer.running_mean) else None


def _other_skip_reason(module: nn.Module) -> str | None:
    if not is_norm_layer(module) or not isinstance(module._buffers.get("running_mean"), Tensor):
        return None
    if isinstance(module, _InstanceNorm):
        return "an InstanceNorm, whose running statistics are averages over samples"
    return "a frozen BatchNorm: convert the model first, then calibrate it with include_frozen=True"


# --- one run ----------------------------------------------------------------------------------------------------------


class _CalibrationRun:
    """The passes over the data, and their results."""

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], device: Any, exchange: ResultExchange
    ) -> None:
        self.done: list[CalibratedLayer] = []
        self.skip_reasons: dict[str, str] = {}
        self.batches = self.passes = 0
        self._model, self._layers, self._device, self._exchange = model, layers, device, exchange
        self._saved_values: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def rollback_on_error(self) -> Iterator[None]:
        """After an error inside the context, restore every statistic that was written."""
        try:
            yield
        except BaseException:
            for tensor, value in reversed(self._saved_values):
                tensor.copy_(value)
            raise

    def single_pass(self, batches: Iterable[Any]) -> None:
        """Measure all layers in one pass, then write their statistics."""
        order, layer_statistics = self._pass(batches)
        self._write({name: layer_statistics[name] for name in order})

    def layer_by_layer(self, batches: Iterable[Any]) -> None:
        """Measure one layer in each pass and write its statistics, in the order in which the layers run."""
        # The first batch gives the order; the passes add layers that run only on later batches.
        order = dict.fromkeys(self._pass(islice(batches, 1), only=())[0])
        self.passes = 0
        done: set[str] = set()
        while pending := [name for name in order if name not in done]:
            executed, layer_statistics = self._pass(batches, only=pending[:1])
            self._write({pending[0]: layer_statistics[pending[0]]})
            done.add(pending[0])
            order |= dict.fromkeys(executed)

    def _pass(
        self, batches: Iterable[Any], *, only: Sequence[str] | None = None
    ) -> tuple[list[str], dict[str, LayerStatistics]]:
        """Run one pass in all processes; return the names in the order of their first call, and the measurements."""
        calibration = CalibrationPass(self._model, self._layers, only=only)
        failure: Exception | None = None
        try:
            calibration.run(batches, device=self._device)
        except Exception as error:  # noqa: BLE001 - the other processes wait for the result of this one
            failure = error
        process_results = self._exchange.all_gather(ProcessResult.from_pass(calibration, failure, self._model))
        if failure is not None:
            raise failure
        for rank, process_result in enumerate(process_results):
            if process_result.failure:
                raise ModelError(f"process {rank} failed, no process changed its model: {process_result.failure}")
        self.batches, self.passes = sum(process_result.batches for process_result in process_results), self.passes + 1
        if not self.batches:
            raise DataError("batches: expected at least one batch, got none")
        self.skip_reasons |= {
            name: reason for process_result in process_results for name, reason in process_result.skip_reasons.items()
        }
        return merge_processes(process_results, calibration, self._model)

    def _write(self, layer_statistics: Mapping[str, LayerStatistics]) -> None:
        """Compute all statistics, then write them."""
        new: list[tuple[Tensor, Tensor]] = []
        for name, layer in layer_statistics.items():
            if not layer.moments.count:
                self.skip_reasons[name] = "got empty batches only"
                continue
            statistics = _statistics(name, layer)
            self.done.append(_layer_report(name, layer, statistics))
            new += zip((layer.running_mean, layer.running_var), statistics, strict=True)
            if layer.num_batches_tracked is not None:
                new.append((layer.num_batches_tracked, torch.tensor(layer.calls)))
        for tensor, value in new:
            self._saved_values.append((tensor, tensor.clone()))
            tensor.copy_(value)


def _statistics(name: str, layer: LayerStatistics) -> tuple[Tensor, Tensor]:
    """Return the mean and the unbiased variance in the dtype of the layer."""
    moments = layer.moments
    found = moments.mean, moments.squared_deviations / (moments.count - 1)
    stored = tuple(
        value.to(old.dtype) for value, old in zip(found, (layer.running_mean, layer.running_var), strict=True)
    )
    if not all(bool(value.isfinite().all()) for value in stored):
        raise DataError(
            f"layer {name!r}: its statistics reach {max(float(value.abs().max()) for value in found):.1e}, beyond the "
            f"range of {layer.running_var.dtype}: calibrate the model in float32"
        )
    return stored[0], stored[1]


def _layer_report(name: str, layer: LayerStatistics, statistics: tuple[Tensor, Tensor]) -> CalibratedLayer:
    """Return the change of the statistics, infinite if the old ones are NaN."""
    old_mean, old_var, new_mean, new_var = (
        tensor.to(layer.moments.mean) for tensor in (layer.running_mean, layer.running_var, *statistics)
    )
    deviation = (new_var + layer.eps).sqrt()
    ratio = (old_var + layer.eps).sqrt() / deviation
    moved = (old_mean - new_mean).abs() / deviation
    farthest = ratio[ratio.log().abs().nan_to_num(math.inf).argmax()]
    shift = (moved + (ratio - 1).abs()).nan_to_num(math.inf)
    return CalibratedLayer(
        name,
        values=layer.moments.count,
        calls=layer.calls,
        mean_shift=float(moved.nan_to_num(math.inf).max()),
        deviation_ratio=float(farthest),
        shift=float(shift.max()),
    )
