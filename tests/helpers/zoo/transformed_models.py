"""Models that torch has transformed: traced, exported, scripted, pruned, parametrized."""

import warnings

import torch
from timm.layers import StdConv2d
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune

from tests.helpers.zoo.trap import IMAGE, Chain, bn, conv


def half(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return model.to(dtype)


class Scripted(nn.Module):
    """A TorchScript part inside, whose norms have no Python class any more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # deprecated, and still found in models
            self.part = torch.jit.trace(nn.Sequential(conv(8, 8), bn(), nn.ReLU()).eval(), torch.randn(1, 8, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.bn(self.conv(x)))


class Scale(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


def parametrized(module: nn.Module, inside: nn.Module) -> nn.Module:
    parametrize.register_parametrization(inside, "weight", Scale())
    return module


def pruned() -> nn.Module:
    model = Chain(bn())
    prune.l1_unstructured(model[1], "weight", 0.25)
    return model


def traced(module: nn.Module) -> nn.Module:
    return fx.symbolic_trace(module)


def exported(*, training: bool) -> nn.Module:
    """The module of a program exported in one mode, whose batch_norm calls are ATen nodes."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), bn(), nn.ReLU(), bn()).train(training)
    return torch.export.export(model, (IMAGE(),), strict=False).module()


def own_parameter_kernel() -> nn.Module:
    """A weight-standardized convolution whose kernel is parametrized besides."""
    model = nn.Sequential(StdConv2d(3, 8, 3), bn())
    parametrize.register_parametrization(model[0], "weight", Scale())
    return model
