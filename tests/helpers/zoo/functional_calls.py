"""Modules that call `F.batch_norm` themselves."""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.zoo.trap import bn, conv


class OwnTensors(nn.Module):
    """What a functional batch norm needs, held by the module that calls it."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))


class FunctionalBlock(OwnTensors):
    """conv -> F.batch_norm with `self.training` -> relu."""

    label = "a class attribute"

    def __init__(self, inputs: int = 3, channels: int = 8) -> None:
        super().__init__(channels)
        self.conv = conv(inputs, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.2, 1e-3)
        return F.relu(x)

    def describe(self) -> str:
        return f"{type(self).__name__} of {self.weight.shape[0]} channels"


class TorchFunctionalBlock(FunctionalBlock):
    """The same call by its other name, whose arguments have another order."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.2, 1e-3, True
        )
        return F.relu(x)


class KeywordBlock(FunctionalBlock):
    """Every argument by keyword, in no order."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            eps=1e-2,
            training=self.training,
            bias=self.bias,
            running_var=self.running_var,
            running_mean=self.running_mean,
            input=self.conv(x),
            momentum=0.4,
        )


class BranchingBlock(FunctionalBlock):
    """Two calls in the code, one in each mode."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.training:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.2)
            return F.relu(x) * 2
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False)
        return F.relu(x)


class TrainingOnlyBlock(FunctionalBlock):
    """A call in training, arithmetic in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.2)
        scale = self.weight / (self.running_var + 1e-5).sqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class DropoutBlock(FunctionalBlock):
    """A dropout beside it, which must go on obeying the mode."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.conv(x), 0.3, self.training)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)
        return F.dropout(F.relu(x), 0.5, training=self.training)


class TwiceBlock(nn.Module):
    """Two calls in one forward, of different channels, the second without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = FunctionalBlock(3, 8), conv(8, 12)
        self.own = OwnTensors(8)

    def forward(self, x: Tensor) -> Tensor:
        own = self.own
        x = F.batch_norm(self.first(x), own.running_mean, own.running_var, own.weight, None, self.training)
        return F.batch_norm(self.second(F.relu(x)), None, None, training=True)


def conv_norm_relu(x: Tensor, kernel: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x = F.batch_norm(F.conv2d(x, kernel, padding=1), None, None, scale, shift, training=True)
    return F.max_pool2d(F.relu(x), 2)


class MamlConv4(nn.Module):
    """A few-shot net whose parameters come in as an argument, through a helper function."""

    def forward(self, x: Tensor, parameters: list[Tensor]) -> Tensor:
        for layer in range(2):
            x = conv_norm_relu(x, *(parameters[3 * layer + i] for i in range(3)))
        return x.flatten(1)


def maml_inputs() -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(3)
    shapes = [(8, 3, 3, 3), (8,), (8,), (8, 8, 3, 3), (8,), (8,)]
    return torch.randn(4, 3, 12, 12), [torch.randn(shape) * 0.3 + 0.5 for shape in shapes]


class OptionalParameters(FunctionalBlock):
    """MAML as it is often written: the module's own parameters, unless others are given."""

    def forward(self, x: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        if parameters is None:
            parameters = dict(self.named_parameters())
        x = F.conv2d(x, parameters["conv.weight"], padding=1)
        return F.batch_norm(
            x, self.running_mean, self.running_var, parameters["weight"], parameters["bias"], self.training
        )


class UnusedOption(FunctionalBlock):
    """An optional argument that changes nothing of what runs."""

    def forward(self, x: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:
        x = F.batch_norm(self.conv(x), self.running_mean, self.running_var, training=self.training)
        return x * scale


class ConditionalNorm(OwnTensors):
    """Class-conditional: scale and shift from a label."""

    def __init__(self, channels: int = 8, classes: int = 5) -> None:
        super().__init__(channels)
        self.scale, self.shift = nn.Embedding(classes, channels), nn.Embedding(classes, channels)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, None, None, self.training, 0.1, 1e-4)
        return x * (1 + self.scale(label)[:, :, None, None]) + self.shift(label)[:, :, None, None]


class Generator(nn.Module):
    """A generator of class-conditional norms, fed a latent and a label."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 8 * 4 * 4)
        self.norms = nn.ModuleList([ConditionalNorm(), ConditionalNorm()])
        self.convs = nn.ModuleList([conv(8, 8), conv(8, 8)])
        self.last_norm, self.to_image = nn.BatchNorm2d(8), conv(8, 3)

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        x = self.project(latent).reshape(-1, 8, 4, 4)
        for norm, layer in zip(self.norms, self.convs, strict=True):
            x = layer(F.interpolate(F.relu(norm(x, label)), scale_factor=2.0))
        return torch.tanh(self.to_image(F.relu(self.last_norm(x))))


class OwnNorm(OwnTensors):
    """A user's norm with BN's buffers, which calls F.batch_norm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.05)


class HandMadeNorm(OwnTensors):
    """A user's norm with BN's buffers and no call of batch_norm at all."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / (self.running_var + 1e-5).sqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class SelfCounting(OwnTensors):
    """A user's norm whose forward cannot be traced: its momentum depends on a value."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__(channels)
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        momentum = 0.1
        if self.training:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum)


class Constant(FunctionalBlock):
    """A tensor made in the forward pass: a graph would hold it as a constant that no module has."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) + torch.tensor([0.5])
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class Drawing(FunctionalBlock):
    """A number drawn in the forward pass: a graph would draw it once and for all."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) * (1.0 + random.random())
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class Remembering(FunctionalBlock):
    """A value kept on the module: a graph would keep nothing."""

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.conv(x)
        x = self.features
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class Collecting(FunctionalBlock):
    """A value kept in a list of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append("once more")
        return F.batch_norm(self.conv(x), self.running_mean, self.running_var, training=self.training)


class PartlyWithoutGradient(FunctionalBlock):
    """A frozen trunk by context manager, which a graph does not know."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.conv(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class WithoutAutocast(FunctionalBlock):
    """A norm kept in full precision by context manager, which a graph does not know."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        with torch.autocast("cpu", enabled=False):
            x = F.batch_norm(x.float(), self.running_mean, self.running_var, training=self.training)
        return F.relu(x)


class WrongTrace(FunctionalBlock):
    """A trace of it succeeds and is wrong: a proxy is no tensor, so the skip connection goes."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = F.batch_norm(y, self.running_mean, self.running_var, self.weight, self.bias, self.training)
        return y + x if isinstance(x, Tensor) else y


class WrongTraceOfModules(nn.Module):
    """The same in a module whose norms are modules: nothing is rewritten, so nothing is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(8, 8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y + x if isinstance(x, Tensor) else y


class Untraceable(nn.Module):
    """Control flow on a value, around module norms and around a block with a functional one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.block = conv(), nn.BatchNorm2d(8), FunctionalBlock(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return self.block(x) if x.mean() > -100 else x


class UntraceableCall(FunctionalBlock):
    """Control flow on a value, in the very module that calls batch_norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.mean() > -100:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)
        return x


class HiddenHelper(nn.Module):
    """A functional norm with statistics in other names, in a block that a coarser trace takes for norm-free."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = conv(channels, channels)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.variance, training=self.training)


class DataDependentTail(nn.Module):
    """Control flow without norms, so that only a coarse trace succeeds; a functional norm is inside a leaf of it."""

    class Tail(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.mean() > -100 else x

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.hidden, self.tail = conv(), nn.BatchNorm2d(8), HiddenHelper(), self.Tail()

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.hidden(self.bn(self.conv(x))))


class Idle(nn.Module):
    """An auxiliary head with a functional norm, which runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.auxiliary = conv(), nn.BatchNorm2d(8), FunctionalBlock(8, 8)

    def forward(self, x: Tensor) -> Any:
        x = self.bn(self.conv(x))
        return (x, self.auxiliary(x)) if self.training else x


class Inheriting(FunctionalBlock):
    """The call is in the forward of its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class OwnSequential(nn.Sequential):
    """A Sequential that walks over its children, so one child more would run."""

    def __init__(self) -> None:
        super().__init__(conv(), nn.ReLU(), conv(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return F.batch_norm(x, None, None, training=True)


class NormAsContainer(nn.Module):
    """A BatchNorm that never runs and only holds the tensors of a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        return F.batch_norm(
            self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, bn.momentum, bn.eps
        )


class ForwardCalled(nn.Module):
    """A BatchNorm that is called by its forward: no hook sees it run, and its call seems to be its owner's."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = conv(), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn.forward(self.conv(x))

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.block(x))


class Standardised(nn.Module):
    """A kernel that is standardized by hand, and stored in a new tensor: a norm of a weight is no site."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.gain, self.bn = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.ones(8)), bn()

    def forward(self, x: Tensor) -> Tensor:
        kernel = (self.kernel * 2).reshape(1, 8, -1)
        kernel = F.batch_norm(kernel, None, None, weight=self.gain, training=True, momentum=0.0)
        return self.bn(F.conv2d(x, kernel.reshape_as(self.kernel)))
