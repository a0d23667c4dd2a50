"""Batch Normalization on data, without labels: how far training at a batch size is from evaluation, site by site.

In evaluation every sample runs alone, so one pass gives the input of each site, and small batches are cut out of it. Of
each batch only sums over (C,) are kept. For a channel with scale g and two pairs of statistics, the outputs of inputs
with mean m and variance v differ by

    g^2 (v (1/s1 - 1/s2)^2 + ((m - m1)/s1 - (m - m2)/s2)^2),  s = sqrt(var + eps)

on average, and three distances follow: `gap` between the statistics of each batch and the running ones, `noise` between
those of each batch and those of all data, `shift` between those of all data and the running ones.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import exp
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.layers.gated_module import GatedModule
from normswap.layers.in_place import STATISTICS
from normswap.model_state import registered_hooks
from normswap.running_stats.accumulation import tensor_owners
from normswap.running_stats.control import is_frozen
from normswap.surgery.module_tree import never_updated, walk_modules
from normswap.surgery.norms.classes import has_frozen_structure
from normswap.surgery.norms.functions import NORM_CALLS


@dataclass(frozen=True)
class BatchNormSite:
    """What was measured at one Batch Normalization. Distances are relative L2 of the outputs without the bias.

    Attributes:
        fqn: the name of the module that has the running statistics.
        gap: between training, with the statistics of small batches, and evaluation; 0 if the layer is frozen.
        noise: what would be left of the gap if the running statistics were those of the data.
        shift: between evaluation with the statistics of the data and with the running ones.
        mean_distance: root mean square over channels of the difference of the two means, in running deviations.
        deviation_ratio: typical factor, at least 1, between the two deviations.
        untrained: whether the running statistics were never updated.
        frozen: whether the layer uses its running statistics in training too.
    """

    fqn: str
    gap: float
    noise: float
    shift: float
    mean_distance: float
    deviation_ratio: float
    untrained: bool = False
    frozen: bool = False


class _Sums:
    """Sums over batches and positions of one site, each (C,) in float64."""

    def __init__(self, mean: Tensor, var: Tensor, scale: Tensor | None, eps: float) -> None:
        self.mean, self.var = (each.detach().double().clone() for each in (mean, var))
        self.scale = torch.ones_like(self.mean) if scale is None else scale.detach().double()
        self._eps, self._batches = eps, 0
        self._m, self._mm, self._v, self._vs, self._vss = (torch.zeros_like(self.mean) for _ in range(5))

    def add(self, x: Tensor, size: int) -> None:
        """Add inputs (N, C, *spatial), in batches of `size`; samples that fill no batch are left out."""
        count = len(x) // size
        batches = x[: count * size].reshape(count, size, x.shape[1], -1)
        var, mean = (each.double() for each in torch.var_mean(batches.float(), (1, 3), correction=0))
        own = (var + self._eps).sqrt()
        self._batches += count
        for total, part in zip(
            (self._m, self._mm, self._v, self._vs, self._vss),
            (mean, mean.square(), var, var / own, var / own.square()),
            strict=True,
        ):
            total += part.sum(0)

    def site(self, fqn: str, module: nn.Module) -> BatchNormSite:
        """Return the distances."""
        m, mm, v, vs, vss = (each / self._batches for each in (self._m, self._mm, self._v, self._vs, self._vss))
        data_mean, data_var = m, v + (mm - m.square()).clamp_min(0)
        running, data = (self.var + self._eps).sqrt(), (data_var + self._eps).sqrt()
        # Means over batches, of the squares of: the value in evaluation, and the three differences.
        around = (mm - 2 * m * self.mean + self.mean.square()).clamp_min(0)
        size = (v + around) / running.square()
        gap = vss - 2 * vs / running + size
        noise = vss - 2 * vs / data + (v + (mm - m.square()).clamp_min(0)) / data.square()
        shift = data_var * (1 / data - 1 / running).square() + ((data_mean - self.mean) / running).square()
        frozen = _is_constant(module)
        return BatchNormSite(
            fqn,
            0.0 if frozen else self._relative(gap, size),
            self._relative(noise, data_var / data.square()),
            self._relative(shift, size),
            float(((data_mean - self.mean) / running).square().mean().sqrt()),
            exp(float((data / running).log().square().mean().sqrt())),
            never_updated(*(module._buffers.get(name) for name in STATISTICS)),
            frozen,
        )

    def _relative(self, difference: Tensor, size: Tensor) -> float:
        weights = self.scale.square()
        total = float((weights * size).sum())
        return (max(float((weights * difference).sum()), 0.0) / total) ** 0.5 if total else 0.0


class BatchNormCalls(TorchFunctionMode):
    """Measures every call of Batch Normalization with running statistics, and can run it as in training.

    Calls inside of normswap's layers are left alone.

    Args:
        model: without wrappers.
        batch_size: the number of samples of a batch in training.
        as_in_training: normalize every batch of that size by its own statistics, instead of measuring.
    """

    def __init__(self, model: nn.Module, batch_size: int, *, as_in_training: bool = False) -> None:
        super().__init__()
        self.samples = batch_size  # of the batch that runs
        self._model, self._batch_size, self._as_in_training = model, batch_size, as_in_training
        self._owners = tensor_owners(model)
        self._sums: dict[str, _Sums] = {}
        self._modules: dict[str, nn.Module] = {}
        self._depth = 0

    def sites(self) -> tuple[BatchNormSite, ...]:
        """Return what was measured, in the order of the first call."""
        return tuple(sums.site(name, self._modules[name]) for name, sums in self._sums.items())

    @property
    def has_sites(self) -> bool:
        """Whether a call was measured."""
        return bool(self._sums)

    def ignored(self) -> Any:
        """Return a context in which calls of normswap's layers are left alone."""
        layers = [entry.module for entry in walk_modules(self._model) if isinstance(entry.module, GatedModule)]
        return registered_hooks(registration for layer in layers for registration in self._registrations(layer))

    def _registrations(self, layer: nn.Module) -> Iterator[Callable[[], Any]]:
        yield partial(layer.register_forward_pre_hook, self._enter)
        yield partial(layer.register_forward_hook, self._leave, always_call=True)

    def _enter(self, _module: nn.Module, _args: Any) -> None:
        self._depth += 1

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._depth -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call, kwargs = NORM_CALLS.get(func), kwargs or {}
        if call is not None and call.kind == "bn" and not self._depth:
            values = {**dict(zip(call.parameters, args, strict=False)), **kwargs, **call.fixed_arguments}
            owner = self._owner(values)
            if owner is not None and not self._as_in_training:
                self._measure(*owner, values)
            elif owner is not None and call.results is None and not _is_constant(owner[1]):
                return self._in_training(values)
        return func(*args, **kwargs)

    def _owner(self, values: Mapping[str, Any]) -> tuple[str, nn.Module] | None:
        mean = values.get("running_mean")
        return None if mean is None else self._owners.get(mean.untyped_storage()._cdata)

    def _size(self, x: Tensor) -> int:
        """The number of rows of an input that a batch in training has: modules may fold other dimensions into it."""
        return max(1, self._batch_size * len(x) // self.samples)

    def _measure(self, name: str, module: nn.Module, values: Mapping[str, Any]) -> None:
        if name not in self._sums:
            self._modules[name] = module
            self._sums[name] = _Sums(
                values["running_mean"], values["running_var"], values.get("weight"), values.get("eps", 1e-5)
            )
        self._sums[name].add(values["input"], self._size(values["input"]))

    def _in_training(self, values: Mapping[str, Any]) -> Tensor:
        affine = {"weight": values.get("weight"), "bias": values.get("bias"), "eps": values.get("eps", 1e-5)}
        return torch.cat(
            [_normalize_by_batch(batch, **affine) for batch in values["input"].split(self._size(values["input"]))]
        )


def _normalize_by_batch(x: Tensor, **affine: Any) -> Tensor:
    if x.numel() == x.shape[1]:  # a single value per channel, which torch refuses, is its own mean
        x = torch.cat([x, x])
        return F.batch_norm(x, None, None, training=True, **affine)[:1]
    return F.batch_norm(x, None, None, training=True, **affine)


def _is_constant(module: nn.Module) -> bool:
    """Whether a module uses its running statistics in training too: a frozen class, or frozen by request."""
    return is_frozen(module) or has_frozen_structure(module)
