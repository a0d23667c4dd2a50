"""A pass in which layers are fed batch statistics and watched: the moments of all that each is fed.

The model is in evaluation, so that nothing is random and nothing is learned, and the layers that are gathered have no
running statistics meanwhile: torch's layers and SN then take those of the batch, update nothing and ask no other
process. Everything is put back; what comes out are moments.
"""

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from normswap.errors import DataError, ModelError
from normswap.layers.backends.reference import MomentAccumulator
from normswap.layers.in_place import STATISTICS
from normswap.layers.switch_norm import FunctionalSwitchNorm
from normswap.model_state import call_model, preserved_random_state, preserved_state, registered_hooks, training_flags
from normswap.surgery.arguments import describe_inputs
from normswap.surgery.module_tree import modules_by_name, walk_modules
from normswap.surgery.norms.classes import is_norm_layer
from normswap.surgery.norms.functions import NORM_CALLS
from normswap.text import first_line, join_fqn

# MERGED DOC: What several processes gathered in a calibration pass, pooled; a failure in one is known to all.


NO_STATISTICS = "keeps no running statistics"
_EPS = 1e-5  # torch's, where a layer has none as an attribute
_ARGUMENTS = inspect.signature(FunctionalSwitchNorm.forward)


@dataclass(eq=False)
class LayerStatistics:
    """The running statistics (C,) of a layer, and the moments of what it was fed in a number of calls.

    A functional site has no count of batches: its owner keeps that, if anybody does.
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
    """Passes over batches, and what was gathered in them by the name of each layer.

    `order` holds the names as they first ran; `skip_reasons` says of functional calls why nothing is gathered of them.

    Args:
        model: without wrappers.
        layers: BN and SN layers and the gates of functional sites, by name.
        only: gather these layers alone; all others normalize as in evaluation. Default: all.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], *, only: Collection[str] | None = None
    ) -> None:
        self.layer_statistics = {
            name: _nothing_yet(layer) for name, layer in layers.items() if not isinstance(layer, FunctionalSwitchNorm)
        }
        self.order: dict[str, None] = {}
        self.skip_reasons: dict[str, str] = {}
        self.batches = 0
        self._model, self._layers, self._only = model, layers, only
        self._modules = [entry.module for entry in walk_modules(model)]
        self._owners = {
            tensor.untyped_storage()._cdata: (entry.names[0], entry.module)
            for entry in reversed(walk_modules(model))
            for tensor in (*entry.module._buffers.values(), *entry.module._parameters.values())
            if tensor is not None and not is_lazy(tensor)
        }

    def run(self, batches: Any, *, device: torch.device | str | None = None) -> None:
        """Run the model on batches, each with its input first.

        Raises:
            ModelError: the model fails on a batch; DataError: a layer is fed what is not finite, or other channels.
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
        # Hooks would be compiled into parts that are; and where nothing is, the compiler is not even imported.
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
            call = _ARGUMENTS.bind(site, *args, **kwargs)
            call.apply_defaults()
            mean, var = call.arguments["running_mean"], call.arguments["running_var"]
            if mean is None or var is None:
                self.skip_reasons[name] = NO_STATISTICS
                return None
            if mean.untyped_storage()._cdata not in self._owners:
                self.skip_reasons[name] = "its running statistics are computed anew at each call"
                return None
            key = self._statistics_key(name, mean)
            self.layer_statistics.setdefault(key, LayerStatistics(mean, var, None, call.arguments["eps"]))
            if not self._accumulate(key, call.arguments["x"]):
                return None
            call.arguments |= {"running_mean": None, "running_var": None}
            return call.args[1:], call.kwargs

        return hook

    def _statistics_key(self, name: str, mean: Tensor) -> str:
        """The name of a site, numbered where it is called with several running statistics."""
        key, number = name, 0
        while key in self.layer_statistics and not _same_memory(self.layer_statistics[key].running_mean, mean):
            number += 1
            key = f"{name}[{number}]"
        return key

    def _accumulate(self, name: str, x: Tensor) -> bool:
        """Gather what a layer is fed; say whether it is to take the statistics of the batch."""
        layer_statistics = self.layer_statistics[name]
        self.order.setdefault(name)
        if not self._is_selected(name):
            return False
        channels, shape = len(layer_statistics.running_mean), "x".join(map(str, x.shape))
        context = f"batch {self.batches} (counted from 0): layer {name!r}"
        if x.dim() < 2 or x.shape[1] != channels:
            raise DataError(f"{context} expects {channels} channels, and is fed {shape}: batches must fit the model")
        if x.numel() == channels:
            raise DataError(
                f"{context} is fed a single value per channel ({shape}), which has no variance: use larger batches, and "
                "leave a smaller last one out (drop_last=True)"
            )
        layer_statistics.moments.add(x)
        layer_statistics.calls += 1
        if not bool(layer_statistics.moments.squared_deviations.isfinite().all()):
            raise DataError(f"{context} is fed NaN or infinite values ({shape}): look at the images of this batch")
        return True

    def _is_selected(self, name: str) -> bool:
        return self._only is None or name in self._only

    def record_unconverted_call(self, running_mean: Tensor) -> None:
        """Note a call of batch_norm with running statistics that are those of no layer."""
        name, owner = self._owners.get(running_mean.untyped_storage()._cdata, ("", self._model))
        if not is_norm_layer(owner):
            self.skip_reasons[name] = "calls F.batch_norm itself: convert the model first, then calibrate it"


class _UnconvertedCalls(TorchFunctionMode):
    """Tells the pass of functions called with running statistics."""

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


def _nothing_yet(layer: Any) -> LayerStatistics:
    mean, var, count = (getattr(layer, statistic) for statistic in STATISTICS)
    return LayerStatistics(mean, var, count, vars(layer).get("eps", _EPS))


def batch_inputs(batch: Any) -> Any:
    """Return what a model is called with: the first item of a batch that is a list or a tuple, else the batch."""
    return batch[0] if isinstance(batch, list | tuple) else batch


def move_to_device(inputs: Any, device: torch.device | str | None) -> Any:
    """Return inputs with what can be moved on a device; as they are where none is named."""
    return inputs if device is None else tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, inputs)


def _same_memory(first: Tensor, second: Tensor) -> bool:
    """Say whether two tensors are the same numbers in memory, such as the same row of a table."""
    return first is second or (first.data_ptr() == second.data_ptr() and first.shape == second.shape)


class ResultExchange:
    """The processes that pool what they gathered; this one alone where there are no others."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def all_gather(self, process_result: "ProcessResult") -> list["ProcessResult"]:
        """Return what every process brings, by rank."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return [process_result]
        process_results: list[Any] = [None] * distributed.get_world_size(self._group)
        distributed.all_gather_object(process_results, process_result, group=self._group)
        return process_results


@dataclass(frozen=True)
class LayerSums:
    """What one process gathered of a layer, and the names of the two tensors that hold its statistics: of a functional
    site only a call tells them, and only if they are whole tensors of the model.
    """

    count: int
    mean: Tensor
    squared_deviations: Tensor
    calls: int
    eps: float
    tensors: tuple[str, str] | None


@dataclass(frozen=True)
class ProcessResult:
    """What one process brings: all that it gathered, or why it failed."""

    order: tuple[str, ...]
    sums: Mapping[str, LayerSums]
    skip_reasons: Mapping[str, str]
    batches: int
    failure: str | None

    @classmethod
    def from_pass(cls, calibration: CalibrationPass, failure: Exception | None, model: nn.Module) -> "ProcessResult":
        """Return what a pass came to."""
        names = {id(tensor): name for name, tensor in _tensors_by_name(model).items()}

        def sums(layer: LayerStatistics) -> LayerSums:
            merged = tuple(names.get(id(tensor)) for tensor in (layer.running_mean, layer.running_var))
            known = (merged[0], merged[1]) if merged[0] is not None and merged[1] is not None else None
            moments = layer.moments
            return LayerSums(
                moments.count, moments.mean.cpu(), moments.squared_deviations.cpu(), layer.calls, layer.eps, known
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
    """The layers in the order they ran, and what all processes gathered of each."""
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
    """A functional site that ran in other processes only."""
    sums = next(process_result.sums[name] for process_result in process_results if name in process_result.sums)
    if sums.tensors is None:
        raise ModelError(
            f"layer {name!r}: only a call tells where its running statistics lie, and this process made none: give "
            "every process a batch"
        )
    mean, var = (tensors[tensor] for tensor in sums.tensors)
    return LayerStatistics(mean, var, None, sums.eps)


def _tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Every buffer and parameter by its name."""
    return {
        join_fqn(name, key): tensor
        for name, module in modules_by_name(model).items()
        for key, tensor in (module._buffers | module._parameters).items()
        if tensor is not None
    }
