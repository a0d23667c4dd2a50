"""The layers compared with BatchNorm: GroupNorm, our layer on each backend, and SN as in published code."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import normswap
from benchmarks.speed.records import BASE, EAGER, ours
from normswap import SwitchNorm2d, SwitchNorm3d
from normswap.layers.backends.selection import BACKENDS

_GROUPS = 32
_BATCH_NORMS = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_SWITCH_NORMS = {4: SwitchNorm2d, 5: SwitchNorm3d}


class EagerSwitchNorm(nn.Module):
    """Switchable Normalization in separate torch operations, as in published code (Luo et al., eq. 3-5).

    Shapes: weight, bias, running_mean, running_var (C,); mean_weight, var_weight (3,), for `in`, `ln`, `bn`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.mean_weight = nn.Parameter(torch.ones(3))
        self.var_weight = nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, *spatial)."""
        per_channel = (1, -1) + (1,) * (x.dim() - 2)
        var_in, mean_in = torch.var_mean(x, dim=tuple(range(2, x.dim())), correction=0, keepdim=True)
        square = var_in + mean_in**2
        mean_ln = mean_in.mean(1, keepdim=True)
        var_ln = square.mean(1, keepdim=True) - mean_ln**2
        if self.training:
            mean_bn = mean_in.mean(0, keepdim=True)
            var_bn = square.mean(0, keepdim=True) - mean_bn**2
            self.running_mean.lerp_(mean_bn.detach().flatten(), self.momentum)
            self.running_var.lerp_(var_bn.detach().flatten(), self.momentum)
        else:
            mean_bn, var_bn = self.running_mean.view(per_channel), self.running_var.view(per_channel)
        means, variances = self.mean_weight.softmax(0), self.var_weight.softmax(0)
        mean = means[0] * mean_in + means[1] * mean_ln + means[2] * mean_bn
        var = variances[0] * var_in + variances[1] * var_ln + variances[2] * var_bn
        x = (x - mean) / (var + self.eps).sqrt()
        return x * self.weight.view(per_channel) + self.bias.view(per_channel)


@dataclass(frozen=True)
class Competitor:
    """A layer in the comparison.

    Attributes:
        build: (channels, rank of the input, dtype of the input) -> layer.
        around: context manager for its calls.
    """

    name: str
    build: Callable[[int, int, torch.dtype], nn.Module]
    around: Callable[[], AbstractContextManager[None]] = nullcontext


def competitors(device: str) -> list[Competitor]:
    """Return all layers for a device, BatchNorm first."""
    return [
        Competitor(BASE, _batch_norm),
        Competitor(f"GroupNorm({_GROUPS})", _group_norm),
        *(competitor for name in _backends(device) for competitor in _ours(name)),
        Competitor(EAGER, _eager),
    ]


def compiled() -> list[Competitor]:
    """Return the eager SN and our layer, compiled by `torch.compile`."""
    builds = {EAGER: _eager, "normswap": _converted}
    return [
        Competitor(f"compiled {name}", lambda *size, build=build: torch.compile(build(*size)))  # type: ignore[misc]
        for name, build in builds.items()
    ]


def _backends(device: str) -> list[str]:
    return [name for name in BACKENDS if name != "triton" or device == "cuda"]


def _ours(backend: str) -> list[Competitor]:
    def around() -> AbstractContextManager[None]:
        return normswap.use_backend(backend)

    return [Competitor(ours(backend), _converted, around), Competitor(ours(backend, mixed=True), _mixed, around)]


def _batch_norm(channels: int, rank: int, dtype: torch.dtype) -> nn.Module:
    """Return a layer with float32 parameters for every dtype, as under autocast."""
    return _BATCH_NORMS[rank](channels)


def _converted(channels: int, rank: int, dtype: torch.dtype) -> nn.Module:
    return _SWITCH_NORMS[rank].from_batch_norm(_batch_norm(channels, rank, dtype))


def _mixed(channels: int, rank: int, dtype: torch.dtype) -> nn.Module:
    layer = copy.deepcopy(_converted(channels, rank, dtype))
    with torch.no_grad():
        for gate in (layer.mean_weight, layer.var_weight):
            gate.copy_(torch.tensor([0.25, 0.25, 0.5]))
    return layer


def _group_norm(channels: int, rank: int, dtype: torch.dtype) -> nn.Module:
    """Return a layer in the dtype of its input, which its CUDA kernels require."""
    return nn.GroupNorm(_GROUPS, channels).to(dtype)


def _eager(channels: int, rank: int, dtype: torch.dtype) -> nn.Module:
    """Return a layer in the dtype of its input. With float32 parameters its output would be float32."""
    return EagerSwitchNorm(channels).to(dtype)
