"""The networks that are exported: converted, with gates at random points of the simplex, or all at BN."""

from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn

import normswap
from normswap.surgery.importance import gated_modules

SEED = 0


class Network(NamedTuple):
    """A network: the function that builds it, and the shape of its example input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


NETWORKS = {
    "timm resnet18": Network(lambda: timm.create_model("resnet18"), (2, 3, 64, 64)),
    "timm resnet50": Network(lambda: timm.create_model("resnet50"), (2, 3, 64, 64)),
    "timm efficientnet_b0": Network(lambda: timm.create_model("efficientnet_b0"), (2, 3, 64, 64)),
    "timm regnety_002": Network(lambda: timm.create_model("regnety_002"), (2, 3, 64, 64)),
    "torchvision r3d_18": Network(lambda: torchvision.models.get_model("r3d_18"), (2, 3, 8, 48, 48)),
    "timm densenet121": Network(lambda: timm.create_model("densenet121"), (2, 3, 64, 64)),
}


def build(network: Network) -> tuple[nn.Module, Tensor]:
    """Return a BN network in evaluation with statistics and affine parameters that are not the initial ones."""
    torch.manual_seed(SEED)
    model, x = network.build().eval(), torch.randn(network.shape)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor, low, high in (
                    (module.running_mean, -0.3, 0.3),
                    (module.running_var, 0.5, 2.0),
                    (module.weight, 0.7, 1.3),
                    (module.bias, -0.2, 0.2),
                ):
                    if tensor is not None:
                        tensor.uniform_(low, high)
    return model, x


def convert(model: nn.Module, x: Tensor, *, moved: bool) -> nn.Module:
    """Return the converted network, with gates at BN or at random points of the simplex."""
    converted = normswap.convert(model, x).model.eval()
    return move_gates(converted) if moved else converted


def move_gates(model: nn.Module, branches: tuple[str, ...] = ("in", "ln", "bn")) -> nn.Module:
    """Move the gates to random points of the simplex, with weight on some branches only."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for layer in gated_modules(model).values():
            mask = torch.tensor([float(branch in branches) for branch in layer.branches])
            for gate in (layer.mean_weight, layer.var_weight):
                point = (torch.rand(len(mask), generator=generator) + 0.05) * mask
                gate.copy_(point / point.sum())
    return model
