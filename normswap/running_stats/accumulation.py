"""Measure the inputs of layers over batches, and merge the measurements of several processes.

During a `CalibrationPass` the model is in evaluation mode, so that nothing is random and nothing is trained, and the
measured layers have no running statistics: torch's layers and SN layers then normalize by the batch, update nothing and
do not synchronize. Afterwards the model is restored.
"""

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from normswap.errors import DataError, ModelError
from normswap.layers.backends.reference import MomentAccumulator
from normswap.layers.gated_module import FunctionalSwitchNorm
from normswap.layers.in_place import STATISTICS
from normswap.model_state import call_model, preserved_random_state, preserved_state, registered_hooks, training_flags
from normswap.surgery.arguments import describe_inputs
from normswap.surgery.module_tree import modules_by_name, walk_modules
from normswap.surgery.norms.classes import is_norm_layer
from normswap.surgery.norms.functions import NORM_CALLS
from normswap.text import first_line, join_fqn

T = TypeVar("T")

NO_STATISTICS = "keeps no running statistics"
_EPS = 1e-5  # torch's default, for a layer without such an attribute
_ARGUMENTS = inspect.signature(FunctionalSwitchNorm.forward)


# --- one pass ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class LayerStatistics:
    """The running statistics of a layer, and the moments of its inputs over several calls.

    Attributes:
        running_mean: of shape (C,).
        running_var: of shape (C,).
        num_batches_tracked: the counter of batches; None for a functional site, whose owner may have one.
        eps: the epsilon of the layer.
        moments: the moments of all inputs so far.
        calls: the number of calls so far.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None
    eps: float
    moments: MomentAccumulator = field(init=False)
    calls: int = 0

    def __post_init__(self) -> None:
        self.moments = MomentAccumulator(len(self.running_mean))


class CalibrationPass:
    """Passes of a model over batches, in which the inputs of layers are measured.

    Args:
        model: without wrappers.
        layers: BN layers, SN layers and the gates of functional sites, by name.
        only: the names of the layers to measure; all others normalize as in evaluation. Default: all.

    Attributes:
        layer_statistics: the measurements by name.
        order: the names in the order of their first call.
        skip_reasons: why functional calls were not measured, by name.
        batches: the number of batches so far.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        *,
        only: Collection[str] | None = None,
    ) -> None:
        self.layer_statistics = {
            name: _no_measurements(layer)
            for name, layer in layers.items()
            if not isinstance(layer, FunctionalSwitchNorm)
        }
        self.order: dict[str, None] = {}
        self.skip_reasons: dict[str, str] = {}
        self.batches = 0
        self._model, self._layers, self._only = model, layers, only
        self._modules = [entry.module for entry in walk_modules(model)]
        self._owners = tensor_owners(model)

    def run(self, batches: Any, *, device: torch.device | str | None = None) -> None:
        """Run the model on batches.

        Args:
            batches: each an input of the model, or a list or tuple whose first item is the input.
            device: the device to move the inputs to; default is not to move them.

        Raises:
            ModelError: the model raises on a batch.
            DataError: the input of a layer has values that are not finite, or a wrong number of channels.
        """
        with self._instrumented():
            for batch in batches:
                inputs = move_to_device(batch_inputs(batch), device)
                try:
                    with preserved_random_state():
                        call_model(self._model, inputs)
                except (DataError, ModelError):
                    raise
                except Exception as error:
                    raise ModelError(
                        f"batch {self.batches} (counted from 0): the model fails on an input of "
                        f"{describe_inputs(inputs)}: {first_line(error)}"
                    ) from error
                self.batches += 1

    @contextmanager
    def _instrumented(self) -> Iterator[None]:
        modules = self._modules
        # A compiled model would compile the hooks too. If nothing is compiled, the compiler is not imported.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with (
            torch.no_grad(),
            eager,
            training_flags(modules, training=False),
            preserved_state(modules),
            registered_hooks(self._hook_registrations()),
            _UnconvertedCalls(self),
        ):
            for name, layer in self._layers.items():
                if not isinstance(layer, FunctionalSwitchNorm) and self._is_selected(name):
                    for statistic in STATISTICS:
                        setattr(layer, statistic, None)
            yield

    def _hook_registrations(self) -> Iterator[Callable[[], Any]]:
        for name, layer in self._layers.items():
            hook = self._site_hook(name) if isinstance(layer, FunctionalSwitchNorm) else self._layer_hook(name)
            yield partial(layer.register_forward_pre_hook, hook, with_kwargs=True)

    def _layer_hook(self, name: str) -> Callable[..., None]:
        def hook(_layer: nn.Module, args: Any, kwargs: Any) -> None:
            self._accumulate(name, next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))

        return hook

    def _site_hook(self, name: str) -> Callable[..., Any]:
        def hook(site: nn.Module, args: Any, kwargs: Any) -> Any:
            """Measure the input; return the arguments without running statistics, so that the batch is used."""
            call = _ARGUMENTS.bind(site, *args, **kwargs)
            call.apply_defaults()
            mean, var = call.arguments["running_mean"], call.arguments["running_var"]
            if mean is None or var is None:
                self.skip_reasons[name] = NO_STATISTICS
                return None
            if mean.untyped_storage()._cdata not in self._owners:
                self.skip_reasons[name] = "its running statistics are computed again in each call"
                return None
            key = self._statistics_key(name, mean)
            self.layer_statistics.setdefault(key, LayerStatistics(mean, var, None, call.arguments["eps"]))
            self._accumulate(key, call.arguments["x"])
            if not self._is_selected(key):
                return None
            call.arguments |= {"running_mean": None, "running_var": None}
            return call.args[1:], call.kwargs

        return hook

    def _statistics_key(self, name: str, mean: Tensor) -> str:
        """Return the name of a functional site, with a number if it is called with several running statistics."""
        key, number = name, 0
        while key in self.layer_statistics and not _same_memory(self.layer_statistics[key].running_mean, mean):
            number += 1
            key = f"{name}[{number}]"
        return key

    def _accumulate(self, name: str, x: Tensor) -> None:
        """Add the input of a layer that is to be measured."""
        layer_statistics = self.layer_statistics[name]
        self.order.setdefault(name)
        if not self._is_selected(name):
            return
        channels, shape = len(layer_statistics.running_mean), "x".join(map(str, x.shape))
        context = f"batch {self.batches} (counted from 0): layer {name!r}"
        if x.dim() < 2 or x.shape[1] != channels:
            raise DataError(
                f"{context} expects an input of {channels} channels, got {shape}: pass batches that fit the model"
            )
        if x.numel() == channels:
            raise DataError(
                f"{context} got a single value per channel ({shape}), which has no variance: use larger batches, and "
                "drop a smaller last one (drop_last=True)"
            )
        layer_statistics.moments.add(x)
        layer_statistics.calls += 1
        if not bool(layer_statistics.moments.squared_deviations.isfinite().all()):
            raise DataError(f"{context} got NaN or infinite values ({shape}): check the images of this batch")

    def _is_selected(self, name: str) -> bool:
        return self._only is None or name in self._only

    def record_unconverted_call(self, running_mean: Tensor) -> None:
        """Record a call of `F.batch_norm` whose running statistics belong to no layer."""
        name, owner = self._owners.get(running_mean.untyped_storage()._cdata, ("", self._model))
        if not is_norm_layer(owner):
            self.skip_reasons[name] = "calls F.batch_norm itself: convert the model first, then calibrate it"


def tensor_owners(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """Return the module of each buffer and parameter, with its first name, by the identity of the tensor's storage."""
    return {
        tensor.untyped_storage()._cdata: (entry.names[0], entry.module)
        for entry in reversed(walk_modules(model))
        for tensor in (*entry.module._buffers.values(), *entry.module._parameters.values())
        if tensor is not None and not is_lazy(tensor)
    }


class _UnconvertedCalls(TorchFunctionMode):
    """Report every call of a function with running statistics to a `CalibrationPass`."""

    def __init__(self, calibration: CalibrationPass) -> None:
        super().__init__()
        self._calibration = calibration

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call, kwargs = NORM_CALLS.get(func), kwargs or {}
        if call is not None and call.kind == "bn":
            mean = (dict(zip(call.parameters, args, strict=False)) | kwargs).get("running_mean")
            if mean is not None:
                self._calibration.record_unconverted_call(mean)
        return func(*args, **kwargs)


def _no_measurements(layer: Any) -> LayerStatistics:
    mean, var, count = (getattr(layer, statistic) for statistic in STATISTICS)
    # The property `eps` of an SN layer can raise.
    eps = vars(layer).get("normalising_eps", vars(layer).get("eps", _EPS))
    return LayerStatistics(mean, var, count, eps)


def batch_inputs(batch: Any) -> Any:
    """Return the input of the model: the first item of a batch that is a list or tuple, otherwise the batch."""
    return batch[0] if isinstance(batch, list | tuple) else batch


def move_to_device(inputs: Any, device: torch.device | str | None) -> Any:
    """Return inputs on a device, or unchanged if `device` is None."""
    return inputs if device is None else tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, inputs)


def _same_memory(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are the same memory, such as the same row of a table."""
    return first is second or (first.data_ptr() == second.data_ptr() and first.shape == second.shape)


# --- several processes ------------------------------------------------------------------------------------------------


class ResultExchange:
    """The exchange of results between the processes of a group; without `torch.distributed`, this process alone."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def all_gather(self, process_result: T) -> list[T]:
        """Return the results of all processes by rank."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return [process_result]
        process_results: list[Any] = [None] * distributed.get_world_size(self._group)
        distributed.all_gather_object(process_results, process_result, group=self._group)
        return process_results


@dataclass(frozen=True)
class LayerSums:
    """The measurements of a layer in one process.

    Attributes:
        count: the number of values per channel.
        mean: of shape (C,).
        squared_deviations: the sum of squared deviations from the mean, of shape (C,).
        calls: the number of calls.
        eps: the epsilon of the layer.
        tensors: the names of the tensors with the running mean and variance; None if they are views. For a functional
            site only a call shows which tensors these are.
    """

    count: int
    mean: Tensor
    squared_deviations: Tensor
    calls: int
    eps: float
    tensors: tuple[str, str] | None


@dataclass(frozen=True)
class ProcessResult:
    """The results of a pass in one process: all measurements, or the error."""

    order: tuple[str, ...]
    sums: Mapping[str, LayerSums]
    skip_reasons: Mapping[str, str]
    batches: int
    failure: str | None

    @classmethod
    def from_pass(cls, calibration: CalibrationPass, failure: Exception | None, model: nn.Module) -> "ProcessResult":
        """Return the results of a pass that ended, with `failure` if it raised."""
        names = {id(tensor): name for name, tensor in _tensors_by_name(model).items()}

        def sums(layer: LayerStatistics) -> LayerSums:
            """Return the measurements of a layer as CPU tensors, which other processes can read."""
            mean_name, var_name = (names.get(id(tensor)) for tensor in (layer.running_mean, layer.running_var))
            tensors = (mean_name, var_name) if mean_name is not None and var_name is not None else None
            moments = layer.moments
            return LayerSums(
                moments.count, moments.mean.cpu(), moments.squared_deviations.cpu(), layer.calls, layer.eps, tensors
            )

        return cls(
            order=tuple(calibration.order),
            sums={name: sums(layer) for name, layer in calibration.layer_statistics.items()},
            skip_reasons=calibration.skip_reasons,
            batches=calibration.batches,
            failure=None if failure is None else first_line(failure),
        )


def merge_processes(
    process_results: list[ProcessResult], calibration: CalibrationPass, model: nn.Module
) -> tuple[list[str], dict[str, LayerStatistics]]:
    """Return the names of the layers in the order of their first call, and the merged measurements of each."""
    order = list(dict.fromkeys(name for process_result in process_results for name in process_result.order))
    merged_layers: dict[str, LayerStatistics] = {}
    for name in order:
        layer = calibration.layer_statistics.get(name) or _statistics_from_other_process(
            name, process_results, _tensors_by_name(model)
        )
        merged_layers[name] = merged = LayerStatistics(
            layer.running_mean, layer.running_var, layer.num_batches_tracked, layer.eps
        )
        for sums in (process_result.sums[name] for process_result in process_results if name in process_result.sums):
            merged.moments.merge(sums.count, sums.mean, sums.squared_deviations)
            merged.calls += sums.calls
    return order, merged_layers


def _statistics_from_other_process(
    name: str, process_results: list[ProcessResult], tensors: Mapping[str, Tensor]
) -> LayerStatistics:
    """Return the statistics of a functional site that ran only in other processes."""
    sums = next(process_result.sums[name] for process_result in process_results if name in process_result.sums)
    if sums.tensors is None:
        raise ModelError(
            f"layer {name!r} did not run in this process, and only a call shows which tensors are its running "
            "statistics: give every process a batch"
        )
    mean, var = (tensors[tensor] for tensor in sums.tensors)
    return LayerStatistics(mean, var, None, sums.eps)


def _tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Return every buffer and parameter by name."""
    return {
        join_fqn(name, key): tensor
        for name, module in modules_by_name(model).items()
        for key, tensor in (module._buffers | module._parameters).items()
        if tensor is not None
    }
