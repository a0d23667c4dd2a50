"""Calibrate a model: compute its running statistics over a data set, the "batch average" of the paper.

Every value has the same weight: moments are pooled over all batches, calls and processes as mean of variances plus
variance of means, and the variance is stored unbiased, as torch stores it. `calibrate` changes running statistics and
the constants of matched branches, which follow them. After an error it restores all.
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
from normswap.running_stats.control import is_frozen
from normswap.running_stats.matching import (
    matchable_layers,
    measure,
    measured_variance,
    set_instance_variance,
)
from normswap.surgery.arguments import describe_invalid_batches, refuse_private, require_module
from normswap.surgery.discovery.instance_variance import SiteVariance
from normswap.surgery.module_tree import walk_modules
from normswap.surgery.norms.classes import is_norm_layer
from normswap.surgery.selection import SiteFilter, first_matching_patterns
from normswap.surgery.wrappers import unwrap
from normswap.text import first_line, pluralize, printable_as

_FROZEN_REASON = "frozen, its running statistics are constants: use include_frozen=True to calibrate it too"
_NOT_RUN_REASON = "did not run"
_NOT_SELECTED_REASON = "not selected"


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
    only: SiteFilter | Iterable[SiteFilter] = (),
    match: bool = False,
    device: torch.device | str | None = None,
    process_group: Any = None,
) -> Calibration:
    """Compute the running statistics of SN and BN layers over a data set, in place.

    The model runs in evaluation mode, so dropout is off. By default there is one pass, in which all these layers
    normalize by the batch, as in training; their old running statistics have no effect. This is the batch average that
    the paper uses for inference. Use large batches in random order. With `layer_by_layer`, each layer is calibrated in
    a pass of its own, with the calibrated statistics of the layers before it. This is exact at any batch size and needs
    one pass for every layer.

    The `in` and `ln` branches always use the statistics of the sample. Their constants in a matched layer follow the
    new running statistics while the layer has all its weight on `bn`; afterwards they are part of what it has learned,
    and change only with `match`. If `torch.distributed` is initialized, every process must call this
    function, with its own batches or with an empty list; the statistics are pooled. `num_batches_tracked` becomes the
    number of calls.

    Args:
        model: a model with SN layers, BN layers or both; it may be wrapped.
        batches: an iterable of inputs (a tensor, a tuple of positional arguments or a dict of keyword arguments), or of
            lists or tuples whose first item is such an input. `layer_by_layer` iterates over it several times.
        layer_by_layer: calibrate one layer after another, each in a pass of its own.
        include_frozen: also calibrate layers that replaced a frozen norm, and those that `freeze_statistics` froze.
        only: the layers to calibrate: glob patterns on names, regular expressions after `re:`, or functions
            `(module, fqn) -> bool`. All other layers normalize as in evaluation. Default: all.
        match: match the branches of all calibrated layers to the new statistics, `in` by the variance of single
            samples, which is measured in one more pass in evaluation mode.
        device: the device to move the inputs to; default is not to move them.
        process_group: the processes that pool their statistics; default is all.

    Returns:
        A `Calibration`: `.layers` with the change of each layer, `.skipped` with reasons.

    Raises:
        NothingToDo: no layer with running statistics ran.
        PlanError: a pattern in `only` matches no layer.
        DataError: there are no batches; or `batches` can be iterated only once and several passes are needed; or the
            input of a layer has NaN or infinite values, a wrong number of channels,
            or a single value per channel.
        ModelError: the model raises on a batch, another process failed, or the model trains with differential privacy.
        ArgumentError: `model` is not a module.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> normswap.calibrate(model, [torch.randn(16, 3, 8, 8) for _ in range(4)])
        Calibration(1 layer, 0 skipped, 4 batches)
    """
    if (layer_by_layer or match) and iter(batches) is iter(batches):
        option = "layer_by_layer" if layer_by_layer else "match"
        raise DataError(
            f"batches: {option} needs an iterable for several passes, such as a list or a DataLoader; got "
            f"{type(batches).__name__}: pass list(batches), or drop {option}"
        )
    model = unwrap(require_module(model))
    refuse_private(model, "calibrate would store statistics of the data in the model")
    if problem := describe_invalid_batches(batches):
        raise DataError(f"batches: {problem}")
    layers, skipped = _split_layers(model, include_frozen=include_frozen, only=only)
    run = _CalibrationRun(model, layers, device, ResultExchange(process_group), match)
    with run.rollback_on_error():
        (run.layer_by_layer if layer_by_layer else run.single_pass)(batches)
        if match:
            run.match(batches)
    done = {layer.fqn for layer in run.done}
    skipped |= run.skip_reasons
    skipped |= {name: _NOT_RUN_REASON for name in layers if name not in done and name not in skipped}
    if not done:
        details = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in [*skipped.items()][:3])
        raise NothingToDo(f"nothing to calibrate: no layer with running statistics ran{details and f' ({details})'}")
    return Calibration(tuple(run.done), tuple(SkippedLayer(*item) for item in skipped.items()), run.batches, run.passes)


def _split_layers(
    model: nn.Module, *, include_frozen: bool, only: SiteFilter | Iterable[SiteFilter]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers to calibrate, and the reasons to skip other norms, by name."""
    layers: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    entries = {entry.names[0]: entry for entry in walk_modules(model)}
    for name, entry in entries.items():
        module = entry.module
        reason = _skip_reason(module, include_frozen=include_frozen)
        if reason is not None:
            reasons[name] = reason
        elif isinstance(module, GatedModule | _BatchNorm):
            layers[name] = module
    filters = (only,) if isinstance(only, str) or callable(only) else tuple(only)
    if not filters:
        return layers, reasons
    names = [entries[name].names for name in (*layers, *reasons)]
    modules = {name: entry.module for name, entry in entries.items()}
    selected = first_matching_patterns(filters, names, "norms", modules=modules, argument="only")
    chosen = {name: layer for name, layer in layers.items() if name in selected}
    return chosen, {name: reasons.get(name, _NOT_SELECTED_REASON) for name in (*layers, *reasons) if name not in chosen}


def _skip_reason(module: nn.Module, *, include_frozen: bool) -> str | None:
    """Return why a norm is skipped; None for a layer to calibrate and for a module that is not a norm."""
    if isinstance(module, GatedModule):
        reason = _gated_skip_reason(module)
    elif isinstance(module, _BatchNorm):
        reason = _batch_norm_skip_reason(module)
    else:
        return _other_skip_reason(module)
    return reason or (_FROZEN_REASON if is_frozen(module) and not include_frozen else None)


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
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        device: Any,
        exchange: ResultExchange,
        match: bool,
    ) -> None:
        self.done: list[CalibratedLayer] = []
        self.skip_reasons: dict[str, str] = {}
        self.batches = self.passes = 0
        self._model, self._layers, self._device, self._exchange = model, layers, device, exchange
        self._match_all = match
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
        _raise_failure(failure, [process_result.failure for process_result in process_results])
        self.batches, self.passes = sum(process_result.batches for process_result in process_results), self.passes + 1
        if not self.batches:
            raise DataError("batches: expected at least one batch, got none")
        self.skip_reasons |= {
            name: reason for process_result in process_results for name, reason in process_result.skip_reasons.items()
        }
        return merge_processes(process_results, calibration, self._model)

    def match(self, batches: Iterable[Any]) -> None:
        """Match the `in` branches of the calibrated layers by the variance of samples, in one more pass."""
        done = {layer.fqn for layer in self.done}
        layers = {name: layer for name, layer in matchable_layers(self._model).items() if name in done}
        failure: Exception | None = None
        variances: dict[str, SiteVariance] = {}
        try:
            variances = measure(self._model, layers, batches, device=self._device) or {}
        except Exception as error:  # noqa: BLE001 - the other processes wait for the result of this one
            failure = error
        problem = None if failure is None else first_line(failure)
        results = self._exchange.all_gather(({name: _on_cpu(each) for name, each in variances.items()}, problem))
        _raise_failure(failure, [problem for _, problem in results])
        for name, layer in layers.items():
            found = [of_process[name] for of_process, _ in results if name in of_process]
            if found:
                self._save(layer.in_var_scale)
                set_instance_variance(layer, found)
        self.passes += 1

    def _save(self, *tensors: Tensor | None) -> None:
        self._saved_values += [(tensor, tensor.clone()) for tensor in tensors if tensor is not None]

    def _write(self, layer_statistics: Mapping[str, LayerStatistics]) -> None:
        """Compute all values, then write them."""
        new: list[tuple[Tensor, Tensor]] = []
        matched: list[tuple[GatedModule, LayerStatistics, Tensor | None]] = []
        for name, statistics in layer_statistics.items():
            if not statistics.moments.count:
                self.skip_reasons[name] = "got empty batches only"
                continue
            values = _new_statistics(name, statistics)
            layer: Any = self._layers.get(name)
            if getattr(layer, "matched", False) and (self._match_all or layer.is_at("bn")):
                matched.append((layer, statistics, measured_variance(layer, statistics.running_var, statistics.eps)))
            self.done.append(_layer_report(name, statistics, values))
            new += zip((statistics.running_mean, statistics.running_var), values, strict=True)
            if statistics.num_batches_tracked is not None:
                new.append((statistics.num_batches_tracked, torch.tensor(statistics.calls)))
        for tensor, value in new:
            self._save(tensor)
            tensor.copy_(value)
        for layer, statistics, instance_var in matched:
            self._save(*layer._buffers.values())
            layer.match_to(
                statistics.running_mean, statistics.running_var, instance_var=instance_var, eps=statistics.eps
            )


def _raise_failure(failure: Exception | None, problems: Iterable[str | None]) -> None:
    """Raise the error of this process, or one that names the process that failed."""
    if failure is not None:
        raise failure
    for rank, problem in enumerate(problems):
        if problem:
            raise ModelError(f"process {rank} failed, no process changed its model: {problem}")


def _on_cpu(variance: SiteVariance) -> SiteVariance:
    """Return a measurement that other processes can read."""
    running_var = variance.running_var
    return variance._replace(
        instance_var=variance.instance_var.cpu(), running_var=None if running_var is None else running_var.cpu()
    )


def _new_statistics(name: str, layer: LayerStatistics) -> tuple[Tensor, Tensor]:
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
