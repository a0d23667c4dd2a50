"""Frozen BN is recognized by what it holds and computes, under any class name - and nothing else is."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from normswap.layers.matching import MATCHING_BUFFERS
from normswap.surgery.norms.classes import frozen_eps, has_frozen_structure
from tests.helpers import guarantees


class ConstantEps(nn.Module):
    """As detection transformers write it: eps is a constant in the forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class AttributeEps(ConstantEps):
    """As detectron-style code writes it."""

    def __init__(self, channels: int, eps: float = 3.3e-4) -> None:
        super().__init__(channels)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class Activated(AttributeEps):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class NoMean(AttributeEps):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.reshape(1, -1, 1, 1)


class BatchInTraining(AttributeEps):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


class Raising(AttributeEps):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not today")


@pytest.mark.parametrize(
    ("build", "eps"),
    [
        (ConstantEps, 1e-5),
        (AttributeEps, 3.3e-4),
        (lambda c: AttributeEps(c, eps=0.0), 0.0),
        (Activated, None),
        (NoMean, None),
        (BatchInTraining, None),
        (Raising, None),
    ],
    ids=["constant", "attribute", "zero", "activated", "no mean", "batch in training", "raising"],
)
def test_eps_is_measured_and_the_map_is_verified(build: Callable[[int], nn.Module], eps: float | None) -> None:
    assert has_frozen_structure(build(8))
    assert frozen_eps(build(8)) == eps


def test_tensors_do_not_matter() -> None:
    module = ConstantEps(8)
    module.weight.zero_()
    assert frozen_eps(module) == 1e-5
    assert frozen_eps(module.half()) == 1e-5
    assert frozen_eps(module.to("meta")) == 1e-5


@pytest.mark.parametrize("other", [nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), nn.Conv2d(3, 8, 1), nn.ReLU()])
def test_other_modules_have_another_structure(other: nn.Module) -> None:
    assert not has_frozen_structure(other)
    assert frozen_eps(other) is None


def trained(module: nn.Module) -> nn.Module:
    nn.init.normal_(module.running_mean)
    nn.init.uniform_(module.running_var, 0.5, 2.0)
    nn.init.uniform_(module.weight, 0.5, 2.0)
    nn.init.normal_(module.bias)
    return module


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), trained(ConstantEps(8)), nn.ReLU(), trained(AttributeEps(8)), trained(Activated(8))
    )


def test_they_are_swapped_and_stay_frozen() -> None:
    model, x = network(), torch.randn(2, 3, 9, 9)
    conversion = normswap.convert(model, x)
    assert [(s.fqn, s.bn_statistics, s.train_gates) for s in conversion.plan.swaps] == [
        ("1", "running", False),
        ("3", "running", False),
    ]
    assert [skip.fqn for skip in conversion.plan.skips] == ["4"]
    layer = conversion.model[1]
    assert layer.eps == 1e-5
    assert {*layer._buffers} == {"weight", "bias", "running_mean", "running_var", *MATCHING_BUFFERS}
    assert normswap.verify(model, conversion.model, [x]).passed


def test_the_guarantees_hold() -> None:
    checked = guarantees.check_all(network, torch.randn(2, 3, 9, 9))
    assert len(checked.conversion.plan.swaps) == 2
