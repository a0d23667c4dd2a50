"""Layers of every kind, with values as after training."""

from collections.abc import Callable

import pytest
import torch
import torch.fx
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from normswap.layers.switch_norm import SwitchNorm, SwitchNorm2d, SwitchNormAct2d

LAYERS: dict[str, Callable[[], SwitchNorm]] = {
    "softmax": lambda: SwitchNorm2d(4),
    "simplex": lambda: SwitchNorm2d(4, gate="simplex"),
    "without bn": lambda: SwitchNorm2d(4, branches=("in", "ln")),
    "on running statistics": lambda: SwitchNorm2d(4, gate="simplex", bn_statistics="running"),
    "from BatchNorm": lambda: SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(4)),
    "from frozen BatchNorm": lambda: SwitchNorm2d.from_batch_norm(FrozenBatchNorm2d(4)),
    "with activation": lambda: SwitchNormAct2d.from_batch_norm(BatchNormAct2d(4)),
    "untracked": lambda: SwitchNorm2d(4, affine=False, track_running_stats=False),
}


LAYER_CASES = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def trained(layer: nn.Module) -> nn.Module:
    """Give every tensor of a norm layer a value that no initialization has; gates stay where they are."""
    with torch.no_grad():
        for name in ("weight", "running_var"):
            if isinstance(getattr(layer, name, None), Tensor):
                getattr(layer, name).uniform_(0.5, 1.5)
        for name in ("bias", "running_mean"):
            if isinstance(getattr(layer, name, None), Tensor):
                getattr(layer, name).normal_()
    return layer


def mixed(layer: SwitchNorm) -> SwitchNorm:
    """Move the gates into the interior, so that every branch takes part."""
    with torch.no_grad():
        k = len(layer.branches)
        for parameter, values in ((layer.mean_weight, [0.2, 0.5, 0.3]), (layer.var_weight, [0.6, 0.1, 0.3])):
            point = torch.tensor(values[:k]).to(parameter)
            parameter.copy_(point / point.sum())
    return layer


def gradients_as_one_vector(*tensors: Tensor | None) -> Tensor:
    return torch.cat([t.grad.flatten() for t in tensors if t is not None and t.grad is not None])
