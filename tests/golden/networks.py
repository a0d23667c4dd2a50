"""The classes that the golden files name. Their module is `golden_networks` in every pickle: see `README.md`.

Never rename a class or an attribute here: a pickle finds them by name.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from normswap import SwitchNorm1d, SwitchNorm2d, SwitchNorm3d, SwitchNormAct

SHAPE = (2, 3, 5, 5)
CLASSES = 10


class Functional(nn.Module):
    """Two calls of `F.batch_norm`, and an argument that decides what runs after them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        for name in ("first", "second"):
            self.register_buffer(f"{name}_mean", torch.zeros(4))
            self.register_buffer(f"{name}_var", torch.ones(4))
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        x = self.conv(x)
        x = F.batch_norm(x, self.first_mean, self.first_var, self.weight, self.bias, self.training).relu()
        x = F.batch_norm(x, self.second_mean, self.second_var, training=self.training, momentum=0.2)
        return 2 * x if double else x


class Called(nn.Module):
    """Calls both functions of torch that normalize by batch; traced, its graph holds the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.conv(x), self.mean, self.var, self.weight, self.bias).relu()
        native = torch.ops.aten.native_batch_norm.default
        return native(x, self.weight, self.bias, self.mean, self.var, False, 0.1, 1e-5)[0]  # type: ignore[no-any-return]


class NormRelu(nn.Module):
    """A fused norm and activation that normswap does not know by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps, self.momentum, self.num_features = 1e-5, 0.1, channels
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        arguments = self.running_mean, self.running_var, self.weight, self.bias, self.training
        return self.relu(F.batch_norm(x, *arguments, self.momentum, self.eps))


class Dropping(nn.Module):
    """Reads its mode in its forward: one graph of it needs the flag."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.bn(self.conv(x)).relu(), 0.5, self.training)


class Shared(nn.Module):
    """One norm under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.again = self.bn

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.bn(self.conv(x)).relu())


class Ranks(nn.Module):
    """A layer of each rank, and one with an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = SwitchNorm1d(3, branches=("ln", "bn")), SwitchNorm2d(3, bn_statistics="renorm")
        self.three, self.act = SwitchNorm3d(3, gate="simplex"), SwitchNormAct(3, act=nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x.flatten(2)).view_as(x)
        return self.act(self.three(self.two(x).unsqueeze(2)).squeeze(2))


class Unknown(nn.BatchNorm2d):
    """Derived from BatchNorm, and in no table."""


class Sites(nn.Module):
    """A site of every kind, and a reason of every kind to leave one as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn, self.excluded, self.unknown = nn.BatchNorm2d(4), nn.BatchNorm2d(4), Unknown(4)
        self.unused, self.frozen, self.act = nn.BatchNorm2d(4), FrozenBatchNorm2d(4), BatchNormAct2d(4)
        self.instance, self.group, self.groups = nn.InstanceNorm2d(4), nn.GroupNorm(1, 4), nn.GroupNorm(2, 4)
        self.layer, self.single = nn.LayerNorm(5), nn.BatchNorm1d(4)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None)
        self.functional, self.done = Functional(), SwitchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.functional(x).mean((2, 3))
        x = self.unknown(self.excluded(self.bn(self.conv(x))))
        x = self.groups(self.group(self.instance(self.act(self.frozen(x)))))
        return self.single(self.done(self.parametrized(self.layer(x))).mean((2, 3)) + y)


class Classifier(nn.Module):
    """What the golden checkpoints and the golden run hold: small, and good for digits."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, stride=4, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.head(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def classifier(**options: Any) -> nn.Module:
    """The architecture that golden files and recipes name, `networks.py:classifier`."""
    return Classifier(**options)


def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """A forward hook that a pickle holds."""
    return 3 * output
