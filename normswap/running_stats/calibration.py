"""calibrate: running statistics computed anew over a data set, the "batch average" of the paper done right.

Every value counts once: a batch weighs by its number of values, moments are pooled over all batches, calls and
processes as mean of variances + variance of means, and the variance of that whole population is stored unbiased, as
torch stores it. Nothing but statistics is changed, and these all or none.
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
from normswap.layers.gated_module import GatedModule
from normswap.layers.switch_norm import FunctionalSwitchNorm
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

_FROZEN_REASON = (
    "frozen, its running statistics are constants: include_frozen=True (--include-frozen) calibrates it too"
)
_NOT_RUN_REASON = "did not run: left as it was"


@dataclass(frozen=True)
class CalibratedLayer:
    """What became of the statistics of one layer.

    Attributes:
        values: per channel, over all batches and processes.
        calls: how often the layer ran.
        mean_shift: how far the mean moved, in new deviations sqrt(var + eps), in the channel where that is most.
        deviation_ratio: old deviation over new one, in the channel where that is farthest from 1.
        shift: by how much at most, over channels, the normalized value of an input within one old deviation of the old
            mean changes in evaluation.
    """

    fqn: str
    values: int
    calls: int
    mean_shift: float
    deviation_ratio: float
    shift: float


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that was left as it was, and why."""

    fqn: str
    reason: str


@printable_as("calibration")
@dataclass(frozen=True, repr=False)
class Calibration:
    """What `calibrate` did: the layers in the order they ran, those it left, and what it ran on.

    `batches` is their number over all processes in one pass, `passes` how often they were gone through.
    """

    layers: tuple[CalibratedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    batches: int
    passes: int

    def __repr__(self) -> str:
        layers, skipped = pluralize(len(self.layers), "layer"), f"{len(self.skipped)} skipped"
        return f"Calibration({layers}, {skipped}, {self.batches} batch{'es' * (self.batches != 1)})"

    @property
    def largest_shift(self) -> float:
        """The largest `shift` of all layers."""
        return max(layer.shift for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data."""
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
    """Compute the running statistics of SN and BN layers anew, over all of `batches`, in place.

    The model runs in evaluation, where its statistics are to be used: dropout and the like are off. By default in one
    pass, in which each of these layers normalizes by the statistics of the batch (as in training, and as the paper has
    it), so that the next one is fed what it would be fed with good statistics, whatever the old ones are. It wants
    batches of many images in random order. With `layer_by_layer` each layer is fed what it will be fed in evaluation,
    its predecessors being calibrated already, which is exact at any batch size and costs a pass for every layer.

    IN and LN statistics are those of the sample as ever. Where `torch.distributed` is initialised, every process has to
    call this, with batches of its own or none; statistics are pooled. `num_batches_tracked` becomes the number of
    calls.

    Args:
        model: SN, BN or both, also wrapped.
        batches: each what the model is called with (a tensor, a tuple of positional or a dict of keyword arguments), or
            a list or tuple with that first. To be gone through more than once with `layer_by_layer`.
        layer_by_layer: one layer after another, each in a pass of its own; exact at any batch size.
        include_frozen: also layers that use their running statistics in training.
        device: where to move inputs; default is to leave them.
        process_group: the processes that pool; default all.

    Returns:
        A `Calibration`: `.layers` with how far each moved, `.skipped` with reasons. `print(result)` shows a table.

    Raises:
        NothingToDo: no layer with running statistics ran.
        DataError: no batches; a layer is fed NaN or infinite values, another number of channels, or a single value
            per channel.
        ModelError: the model fails on a batch; in another process something failed.
        ArgumentError: `model` is no module.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> normswap.calibrate(model, [torch.randn(16, 3, 8, 8) for _ in range(4)])
        Calibration(1 layer, 0 skipped, 4 batches)
    """
    if layer_by_layer and iter(batches) is iter(batches):
        raise DataError(
            "batches: expected what can be gone through once for each layer, such as a list or a DataLoader, got "
            f"{type(batches).__name__}: make a list of it, or leave layer_by_layer out"
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
        raise NothingToDo(f"no layer with running statistics ran: nothing to calibrate{details and f' ({details})'}")
    return Calibration(tuple(run.done), tuple(SkippedLayer(*item) for item in skipped.items()), run.batches, run.passes)


def _split_layers(model: nn.Module, *, include_frozen: bool) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to calibrate by name, and the reasons why others are none of them."""
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
    """Why a norm is not calibrated; None where it is, and of what is no norm."""
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
    # A functional site is given its statistics at each call.
    return None if isinstance(layer, FunctionalSwitchNorm) or layer.running_mean is not None else NO_STATISTICS


def _batch_norm_skip_reason(layer: Any) -> str | None:
    if layer.running_mean is None:
        return NO_STATISTICS
    return "has seen no input yet: run one batch through the model first" if is_lazy(layer.running_mean) else None


def _other_skip_reason(module: nn.Module) -> str | None:
    if not is_norm_layer(module) or not isinstance(module._buffers.get("running_mean"), Tensor):
        return None
    if isinstance(module, _InstanceNorm):
        return "an InstanceNorm, which gathers its running statistics sample by sample"
    return "a frozen BatchNorm: convert the model first, then calibrate it with include_frozen=True (--include-frozen)"


# --- one run ----------------------------------------------------------------------------------------------------------


class _CalibrationRun:
    """The passes over the data, and what they led to."""

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], device: Any, exchange_group: "ResultExchange"
    ) -> None:
        self.done: list[CalibratedLayer] = []
        self.skip_reasons: dict[str, str] = {}
        self.batches = self.passes = 0
        self._model, self._layers, self._device, self._exchange = model, layers, device, exchange_group
        self._saved_values: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def rollback_on_error(self) -> Iterator[None]:
        """Put back every statistic that was written if what is done inside fails."""
        try:
            yield
        except BaseException:
            for tensor, value in reversed(self._saved_values):
                tensor.copy_(value)
            raise

    def single_pass(self, batches: Iterable[Any]) -> None:
        """Gather all layers in one pass, then write."""
        order, layer_statistics = self._pass(batches)
        self._write({name: layer_statistics[name] for name in order})

    def layer_by_layer(self, batches: Iterable[Any]) -> None:
        """Gather and write one layer after another in the order in which they run."""
        # One batch tells the order; what runs on later ones only is met in the passes.
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
        """One pass in all processes: the names in the order they ran, and what was gathered by name."""
        calibration = CalibrationPass(self._model, self._layers, only=only)
        failure: Exception | None = None
        try:
            calibration.run(batches, device=self._device)
        except Exception as error:  # noqa: BLE001 - the other processes wait for a word of this one
            failure = error
        process_results = self._exchange.all_gather(ProcessResult.from_pass(calibration, failure, self._model))
        if failure is not None:
            raise failure
        for rank, process_result in enumerate(process_results):
            if process_result.failure:
                raise ModelError(f"process {rank} failed, and nothing was changed in any: {process_result.failure}")
        self.batches, self.passes = sum(process_result.batches for process_result in process_results), self.passes + 1
        if not self.batches:
            raise DataError("batches: expected at least one batch, got none")
        self.skip_reasons |= {
            name: reason for process_result in process_results for name, reason in process_result.skip_reasons.items()
        }
        return merge_processes(process_results, calibration, self._model)

    def _write(self, layer_statistics: Mapping[str, LayerStatistics]) -> None:
        """Work out all statistics, then write them."""
        new: list[tuple[Tensor, Tensor]] = []
        for name, layer in layer_statistics.items():
            if not layer.moments.count:
                self.skip_reasons[name] = "was fed empty batches only: left as it was"
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
    """Mean and unbiased variance as the layer stores them."""
    moments = layer.moments
    found = moments.mean, moments.squared_deviations / (moments.count - 1)
    stored = tuple(
        value.to(old.dtype) for value, old in zip(found, (layer.running_mean, layer.running_var), strict=True)
    )
    if not all(bool(value.isfinite().all()) for value in stored):
        raise DataError(
            f"layer {name!r}: its statistics reach {max(float(value.abs().max()) for value in found):.1e}, which "
            f"{layer.running_var.dtype} does not hold: calibrate the model in float32"
        )
    return stored[0], stored[1]


def _layer_report(name: str, layer: LayerStatistics, statistics: tuple[Tensor, Tensor]) -> CalibratedLayer:
    """How far the statistics move; of old ones that are no numbers, infinitely far."""
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
