"""The layers that are compared with BatchNorm in training: frozen BatchNorm, GroupNorm, our layer, SN as published."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap import SwitchNorm2d, SwitchNorm3d
from normswap.layers.gated_module import GatedModule
from normswap.layers.gating import BnStatistics

BASE = "BatchNorm"
FROZEN = "frozen BatchNorm"
EAGER = "eager SN"
COPY = "copy"
# Our layers: the statistics of the `bn` branch and the gates.
RUNNING = "running"
RUNNING_FIXED = "running, fixed gates"
RUNNING_MOVED = "running, moved gates"
BATCH = "batch"
BATCH_MIX = "batch, mix"
MOVED = (0.05, 0.05, 0.9)  # importance weights of `in`, `ln`, `bn`: gates that training moved from the vertex
_MIX = (0.25, 0.25, 0.5)
_GROUPS = 32
GROUP_NORM = f"GroupNorm({_GROUPS})"
_BATCH_NORMS = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_SWITCH_NORMS = {4: SwitchNorm2d, 5: SwitchNorm3d}
MODES = ("train", "eval")


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
class Arm:
    """A layer in the comparison.

    Attributes:
        build: (channels, rank of the input, dtype of the input) -> layer.
        modes: in which it is measured. Without gradients, arms with the same gates compute the same.
        is_frozen: it stays in evaluation mode in training.
        every: it runs in every so many rounds only, because it is slow.
    """

    name: str
    build: Callable[[int, int, torch.dtype], nn.Module]
    modes: Sequence[str] = MODES
    is_frozen: bool = False
    every: int = 1


def _batch_norm(channels: int, rank: int, dtype: torch.dtype) -> nn.Module:
    """Return a layer with float32 parameters for every dtype, as under autocast."""
    return _BATCH_NORMS[rank](channels)


def _group_norm(channels: int, rank: int, dtype: torch.dtype) -> nn.Module:
    """Return a layer in the dtype of its input, which its CUDA kernels require."""
    return nn.GroupNorm(_GROUPS, channels).to(dtype)


def _eager(channels: int, rank: int, dtype: torch.dtype) -> nn.Module:
    """Return a layer in the dtype of its input. With float32 parameters its output would be float32."""
    return EagerSwitchNorm(channels).to(dtype)


def _ours(
    statistics: BnStatistics, gates: tuple[float, ...] | None = None, *, trains_gates: bool = True
) -> Callable[[int, int, torch.dtype], nn.Module]:
    def build(channels: int, rank: int, dtype: torch.dtype) -> nn.Module:
        layer = _SWITCH_NORMS[rank].from_batch_norm(_batch_norm(channels, rank, dtype), bn_statistics=statistics)
        if gates is not None:
            move_gates(layer, gates)
        for gate in (layer.mean_weight, layer.var_weight):
            gate.requires_grad_(trains_gates)
        return layer

    return build


def move_gates(module: nn.Module, weights: tuple[float, ...] = MOVED) -> nn.Module:
    """Set the importance weights of all simplex gates in a module to `weights` (`in`, `ln`, `bn`), in place.

    A site without one of the branches adds its weight to that of its vertex.
    """
    for site in module.modules():
        if isinstance(site, GatedModule):
            shares = dict(zip(("in", "ln", "bn"), weights, strict=True))
            shares = {branch: shares[branch] for branch in site.branches}
            shares[site.vertex] += 1 - sum(shares.values())
            for gate in (site.mean_weight, site.var_weight):
                gate.data.copy_(torch.tensor([*shares.values()]))
    return module


ARMS = (
    Arm(BASE, _batch_norm),
    Arm(FROZEN, _batch_norm, ("train",), is_frozen=True),
    Arm(GROUP_NORM, _group_norm),
    Arm(RUNNING, _ours("running")),
    Arm(RUNNING_FIXED, _ours("running", trains_gates=False), ("train",)),
    Arm(RUNNING_MOVED, _ours("running", MOVED)),
    Arm(BATCH, _ours("batch"), ("train",)),
    Arm(BATCH_MIX, _ours("batch", _MIX), ("train",)),
)
OURS = (RUNNING, RUNNING_FIXED, RUNNING_MOVED, BATCH, BATCH_MIX)
EAGER_ARM = Arm(EAGER, _eager, every=4)
