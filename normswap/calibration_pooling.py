"""What several processes gathered in a calibration pass, pooled; a failure in one is known to all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, distributed, nn

from normswap.calibration_pass import CalibrationPass, Gathered
from normswap.errors import ModelError
from normswap.surgery.tracing import first_line
from normswap.surgery.tree import join, modules_by_name


class Processes:
    """The processes that pool what they gathered; this one alone where there are no others."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def exchange(self, share: "Share") -> list["Share"]:
        """Return what every process brings, by rank."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return [share]
        shares: list[Any] = [None] * distributed.get_world_size(self._group)
        distributed.all_gather_object(shares, share, group=self._group)
        return shares


@dataclass(frozen=True)
class Sums:
    """What one process gathered of a layer, and the names of the two tensors that hold its statistics: of a functional
    site only a call tells them, and only if they are whole tensors of the model.
    """

    count: int
    mean: Tensor
    spread: Tensor
    calls: int
    eps: float
    tensors: tuple[str, str] | None


@dataclass(frozen=True)
class Share:
    """What one process brings: all that it gathered, or why it failed."""

    order: tuple[str, ...]
    sums: Mapping[str, Sums]
    passed_over: Mapping[str, str]
    batches: int
    failure: str | None

    @classmethod
    def of(cls, calibration: CalibrationPass, failure: Exception | None, model: nn.Module) -> "Share":
        """Return what a pass came to."""
        names = {id(tensor): name for name, tensor in _tensors(model).items()}

        def sums(layer: Gathered) -> Sums:
            whole = tuple(names.get(id(tensor)) for tensor in (layer.running_mean, layer.running_var))
            known = (whole[0], whole[1]) if whole[0] is not None and whole[1] is not None else None
            moments = layer.moments
            return Sums(moments.count, moments.mean.cpu(), moments.spread.cpu(), layer.calls, layer.eps, known)

        return cls(
            order=tuple(calibration.order),
            sums={name: sums(layer) for name, layer in calibration.gathered.items()},
            passed_over=calibration.passed_over,
            batches=calibration.batches,
            failure=None if failure is None else first_line(failure),
        )


def united(
    shares: list[Share], calibration: CalibrationPass, model: nn.Module
) -> tuple[list[str], dict[str, Gathered]]:
    """The layers in the order they ran, and what all processes gathered of each."""
    order = list(dict.fromkeys(name for share in shares for name in share.order))
    united: dict[str, Gathered] = {}
    for name in order:
        layer = calibration.gathered.get(name) or _named(name, shares, _tensors(model))
        united[name] = whole = Gathered(layer.running_mean, layer.running_var, layer.num_batches_tracked, layer.eps)
        for sums in (share.sums[name] for share in shares if name in share.sums):
            whole.moments.merge(sums.count, sums.mean, sums.spread)
            whole.calls += sums.calls
    return order, united


def _named(name: str, shares: list[Share], tensors: Mapping[str, Tensor]) -> Gathered:
    """A functional site that ran in other processes only."""
    sums = next(share.sums[name] for share in shares if name in share.sums)
    if sums.tensors is None:
        raise ModelError(
            f"layer {name!r}: only a call tells where its running statistics lie, and this process made none: give "
            "every process a batch"
        )
    mean, var = (tensors[tensor] for tensor in sums.tensors)
    return Gathered(mean, var, None, sums.eps)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every buffer and parameter by its name."""
    return {
        join(name, key): tensor
        for name, module in modules_by_name(model).items()
        for key, tensor in (module._buffers | module._parameters).items()
        if tensor is not None
    }
