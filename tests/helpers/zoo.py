"""Tiny models that are each one named trap, met in real code: what must be swapped in them, what must stay, and why.

`TRAPS` is the list. A trap is built with its own seed and random running statistics and affine parameters, so that
no value is left from initialisation that would hide a mistake.
"""

import random
import warnings
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GroupNorm1, ScaledStdConv2d, StdConv2d
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, GroupNorm1Act, GroupNormAct
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune
from torchvision.ops.misc import FrozenBatchNorm2d


@dataclass(frozen=True)
class Trap:
    """A model, an input, and what a conversion with that input must do: the swapped fqns, and a reason per skip.

    `blind` holds both as they are without an input, where that differs. `raises_in` are the modes in which the model in
    float64 raises by itself, `idle` the sites that do not run; `kernels` says that batch norms of weights remain.
    `options` are deciding arguments of the conversion.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    swaps: tuple[str, ...] = ()
    skips: Mapping[str, str] = field(default_factory=dict)
    also_read_as_batch_norm: tuple[type[nn.Module], ...] = ()
    blind: tuple[tuple[str, ...], Mapping[str, str]] | None = None
    copyable: bool = True
    raises_in: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    kernels: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        """The model with random statistics and affine parameters, the same one at every call."""
        torch.manual_seed(7)
        return randomise(self.make())


def everything_in(model: nn.Module) -> list[nn.Module]:
    """Every module that `model` can reach, through registries and through lists, tuples and dicts."""
    found: dict[int, nn.Module] = {}

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            if id(value) not in found:
                found[id(value)] = value
                for name, item in [*value._modules.items(), *vars(value).items()]:
                    if name not in ("_parameters", "_buffers", "_modules") and not name.endswith("_hooks"):
                        visit(item, 3)
        elif depth and isinstance(value, list | tuple):
            for item in value:
                visit(item, depth - 1)
        elif depth and isinstance(value, dict):
            visit(list(value.values()), depth)

    visit(model, 3)
    return list(found.values())


def randomise(model: nn.Module) -> nn.Module:
    """Give every norm statistics and affine parameters as after training: nothing is 0, 1 or equal."""
    with torch.no_grad():
        for module in everything_in(model):
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for name, tensor in (*module._buffers.items(), *module._parameters.items()):
                if (
                    tensor is None
                    or not tensor.is_floating_point()
                    or nn.parameter.is_lazy(tensor)
                    or tensor.dim() != 1
                ):
                    continue
                noise = torch.rand(tensor.shape).to(tensor)
                if name.endswith("_var") or name in ("weight", "gamma", "scale"):
                    tensor.copy_(noise + 0.5)
                elif name.endswith("_mean") or name in ("bias", "beta"):
                    tensor.copy_(noise - 0.5)
    return model


def image(*shape: int) -> Callable[[], Tensor]:
    """A maker of a fixed input of this shape, not of mean 0 and deviation 1."""
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 1.5 + 0.25


IMAGE = image(3, 3, 9, 9)
FEATURES = image(3, 8, 5, 5)


def conv(inputs: int = 3, outputs: int = 8) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Chain(nn.Sequential):
    """conv, the given modules, ReLU, mean: the plainest place for a norm."""

    def __init__(self, *modules: nn.Module, channels: int = 8, head: int = 4) -> None:
        super().__init__(conv(outputs=channels), *modules, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.add_module("head", nn.Linear(channels, head))


# --- modules that call F.batch_norm themselves ------------------------------------------------------------------------


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
    """A kernel that is standardised by hand, and stored in a new tensor: a norm of a weight is no site."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.gain, self.bn = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.ones(8)), bn()

    def forward(self, x: Tensor) -> Tensor:
        kernel = (self.kernel * 2).reshape(1, 8, -1)
        kernel = F.batch_norm(kernel, None, None, weight=self.gain, training=True, momentum=0.0)
        return self.bn(F.conv2d(x, kernel.reshape_as(self.kernel)))


def bn(channels: int = 8, **options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **options)


def overridden(model: nn.Module, path: str) -> nn.Module:
    """The module at `path` gets a forward of its own on the instance, as monkey patches do."""
    module = model.get_submodule(path)
    module.forward = DoubledForward(module)
    return model


class DoubledForward:
    """A patch of one instance's forward that can be copied and pickled."""

    def __init__(self, module: nn.Module) -> None:
        self.module = [module]

    def __call__(self, x: Tensor) -> Tensor:
        return type(self.module[0]).forward(self.module[0], x) * 2


# --- norms as modules, in places where a converter loses them ---------------------------------------------------------


class TwoNames(nn.Module):
    """One BN under two names, each called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()
        self.alias, self.second = self.bn, conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.second(F.relu(self.bn(self.conv(x)))))


class SharedBlock(nn.Module):
    """A whole block in two places."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = conv()
        self.left = block
        self.right = nn.Sequential(block, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.left(self.stem(x)))


class InContainers(nn.Module):
    """Norms held in a plain list and a plain dict only: in no state dict, but they run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.norms = [bn()]
        self.table = {"last": {"norm": bn()}}

    def forward(self, x: Tensor) -> Tensor:
        return self.table["last"]["norm"](F.relu(self.norms[0](self.conv(x))))


class ListBeside(nn.Module):
    """Registered norms that are also called through a plain list and a closure-like dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = conv(), bn(), bn()
        self.order = [self.bn1, self.bn2]
        self.by_name = {"first": self.bn1}

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for norm in (*self.order, self.by_name["first"]):
            x = norm(F.relu(x))
        return x


class AfterPooling(nn.Module):
    """One position per sample, with `channels` channels, beside an ordinary site."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = conv(3, channels), bn(channels)
        self.pool, self.pooled = nn.AdaptiveAvgPool2d(1), bn(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.pool(F.relu(self.bn(self.conv(x)))))


class Recurrent(nn.Module):
    """One norm called several times in a forward pass, at different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.bn = conv(), conv(8, 8), bn()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2, ceil_mode=True)
        return x


class NeverCalled(nn.Module):
    """A norm that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.unused = conv(), bn(), bn()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Hooked(nn.Module):
    """Hooks of every kind on a norm, each changing what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = conv(), bn(), conv(8, 8)
        self.bn.register_forward_pre_hook(_shift_input)
        self.bn.register_forward_hook(_double_output)
        self.bn.register_full_backward_hook(_halve_gradient)
        self.bn.register_state_dict_post_hook(_sign_state_dict)
        self.bn.register_load_state_dict_post_hook(_allow_anything)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.bn(self.conv(x))))


def _shift_input(_module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    return args[0] + 0.5


def _double_output(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output * 2


def _halve_gradient(_module: nn.Module, grad_input: tuple[Tensor | None, ...], _grad: Any) -> Any:
    return tuple(None if gradient is None else gradient / 2 for gradient in grad_input)


def _sign_state_dict(_module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    state_dict[prefix + "signature"] = torch.tensor(42)


def _allow_anything(_module: nn.Module, incompatible: Any) -> None:
    incompatible.unexpected_keys.clear()


class HalfFrozen(nn.Module):
    """A frozen stem in evaluation inside a model in training, as in every detector."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(), bn(), nn.ReLU())
        self.body = nn.Sequential(conv(8, 8), bn())
        self.stem.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))


def untracked_later() -> nn.Module:
    """The trick of test-time adaptation: a trained BN that is told to stop tracking."""
    model = Chain(bn())
    model[1].track_running_stats = False
    return model


def statistics_dropped() -> nn.Module:
    """The stronger form of it: the statistics are gone as well."""
    model = untracked_later()
    model[1].running_mean = None
    model[1].running_var = None
    return model


def evaluated_norm() -> nn.Module:
    model = Chain(bn())
    model[1].eval()
    return model


def frozen_norm() -> nn.Module:
    model = Chain(bn())
    model[1].requires_grad_(False)
    return model


class Heads(nn.Module):
    """(N, C) and (N, C, L) at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence, self.norm_sequence = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)
        self.head, self.norm_head, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm_sequence(self.sequence(x))).mean(-1)
        return self.last(F.relu(self.norm_head(self.head(x))))


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class TheirNorm(nn.BatchNorm2d):
    """An unknown subclass that does no more than its base class."""


class DoublingNorm(nn.BatchNorm2d):
    """An unknown subclass that does more than its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class ActivatedNorm(nn.BatchNorm2d):
    """An unknown subclass with an activation inside, which a caller wrongly says to be a plain BN."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.activation = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


class TheirInstanceNorm(nn.InstanceNorm2d):
    """A subclass that may do anything."""


class TheirGroupNorm(nn.GroupNorm):
    """The same of GroupNorm."""


class WithoutBatch(nn.Module):
    """An InstanceNorm that is fed one image at a time, as (C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.InstanceNorm2d(8, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.norm(single) for single in self.conv(x)])


class Sequences(nn.Module):
    """Norms over (N, C, L) and (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.instance, self.group, self.flat = nn.InstanceNorm1d(3, affine=True), nn.GroupNorm(1, 3), nn.GroupNorm(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.group(self.instance(x)).mean(2))


class Stylised(nn.Module):
    """BN and InstanceNorm side by side, as IBN blocks have them, and a GroupNorm called twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.instance = conv(), bn(4), nn.InstanceNorm2d(4, affine=True)
        self.group = self.again = nn.GroupNorm(1, 8, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv(x).chunk(2, 1)
        return self.again(F.relu(self.group(torch.cat([self.bn(left), self.instance(right)], 1))))


class ConvNormAct(nn.Module):
    """A container that is named like a norm and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.scale = conv(8, 8), bn(), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x))) * self.scale


class OtherNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()
        self.group, self.instance = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.layer, self.rms = nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.instance(self.group(self.bn(self.conv(x))))
        return self.rms(self.layer(F.relu(x).mean((2, 3))))


class DictInput(nn.Module):
    """One positional argument that is a dict, and a dict of nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        x = self.bn(self.conv(batch["image"]))
        return {"logits": x.mean((2, 3)), "rest": (x, [batch["label"]]), "count": len(batch)}


Pair = namedtuple("Pair", "a b")


class KeywordInput(nn.Module):
    """Keyword arguments, and a named tuple as output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, *, left: Tensor, right: Tensor) -> Pair:
        return Pair(self.bn(self.conv(left)), self.bn(self.conv(right)).mean())


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
    """A weight-standardised convolution whose kernel is parametrized besides."""
    model = nn.Sequential(StdConv2d(3, 8, 3), bn())
    parametrize.register_parametrization(model[0], "weight", Scale())
    return model


def _trap(name: str, make: Callable[[], nn.Module], inputs: Callable[[], Any], *swaps: str, **more: Any) -> Trap:
    return Trap(name, make, inputs, swaps, **more)


NOT_TRACED = r"cannot be rewritten.*module of its own"
STAYS = "has no batch statistics to lose at small batches: stays as it is"
OTHER_KINDS = {"kinds": ("bn", "in", "gn1")}
BEGUN = {**OTHER_KINDS, "settings": {"*": {"branches": ("in", "ln", "bn")}}}

TRAPS: tuple[Trap, ...] = (
    # functional sites
    _trap("functional", lambda: nn.Sequential(FunctionalBlock()), IMAGE, "0.batch_norm"),
    _trap("functional at the root", FunctionalBlock, IMAGE, "batch_norm"),
    _trap("torch.batch_norm", TorchFunctionalBlock, IMAGE, "batch_norm"),
    _trap("keyword arguments", KeywordBlock, IMAGE, "batch_norm"),
    _trap("one call in each mode", BranchingBlock, IMAGE, "batch_norm"),
    _trap("a call in training only", TrainingOnlyBlock, IMAGE, skips={"batch_norm": NOT_TRACED}),
    _trap("dropout beside it", DropoutBlock, IMAGE, "batch_norm"),
    _trap("two calls", TwiceBlock, IMAGE, "first.batch_norm", "batch_norm", "batch_norm_1"),
    _trap("parameters as arguments", MamlConv4, maml_inputs, "batch_norm", "batch_norm_1"),
    _trap("optional parameters", OptionalParameters, IMAGE, "batch_norm"),
    _trap("an option that is not used", UnusedOption, IMAGE, "batch_norm"),
    _trap(
        "class-conditional generator",
        Generator,
        lambda: (image(3, 6)(), torch.tensor([0, 4, 2])),
        "norms.0.batch_norm",
        "norms.1.batch_norm",
        "last_norm",
    ),
    _trap("own norm, functional", lambda: Chain(OwnNorm()), IMAGE, "1.batch_norm"),
    _trap("own norm, by hand", lambda: Chain(HandMadeNorm()), IMAGE, skips={"1": "not in the table of known norms"}),
    _trap("own norm, untraceable", lambda: Chain(SelfCounting()), IMAGE, skips={"1.batch_norm": NOT_TRACED}),
    _trap("constant made in forward", Constant, IMAGE, skips={"batch_norm": r"makes a tensor of constants.*buffer"}),
    _trap("number drawn in forward", Drawing, IMAGE, skips={"batch_norm": "draws random numbers"}),
    _trap("attribute written in forward", Remembering, IMAGE, skips={"batch_norm": r"writes.*features"}),
    _trap("list filled in forward", Collecting, IMAGE, skips={"batch_norm": r"writes.*seen"}),
    _trap("no_grad inside", PartlyWithoutGradient, IMAGE, skips={"batch_norm": "gradients or autocast"}),
    _trap(
        "autocast switched inside",
        WithoutAutocast,
        IMAGE,
        skips={"batch_norm": "gradients or autocast"},
        raises_in=("evaluation", "training", "as it is"),
    ),
    _trap(
        "a trace that is wrong",
        WrongTrace,
        FEATURES,
        skips={"batch_norm": "differs from the real one"},
        blind=(("batch_norm",), {}),
    ),
    _trap("a wrong trace around modules", WrongTraceOfModules, FEATURES, "bn"),
    _trap("control flow around modules", Untraceable, IMAGE, "bn", "block.batch_norm"),
    _trap("control flow around a call", UntraceableCall, IMAGE, skips={"batch_norm": NOT_TRACED}),
    _trap("hidden in a leaf of a coarse trace", DataDependentTail, IMAGE, "bn", "hidden.batch_norm"),
    _trap("in training only, another module", Idle, IMAGE, "bn", "auxiliary.batch_norm"),
    _trap("inherited forward", Inheriting, IMAGE, "batch_norm"),
    _trap("a Sequential that calls it", OwnSequential, IMAGE, "batch_norm"),
    _trap("shared functional block", lambda: SharedBlock(FunctionalBlock(8, 8)), IMAGE, "left.batch_norm"),
    _trap(
        "overridden on the instance, functional",
        lambda: overridden(nn.Sequential(FunctionalBlock()), "0"),
        IMAGE,
        skips={"0.batch_norm": "overridden on the instance"},
    ),
    _trap(
        "BN as a container",
        NormAsContainer,
        IMAGE,
        "batch_norm",
        skips={"bn": "does not run, but holds the tensors of a batch_norm call in the model: that is the site"},
    ),
    _trap(
        "BN whose forward is called past its hooks",
        ForwardCalled,
        IMAGE,
        "block.bn",
        skips={"block.batch_norm": NOT_TRACED},
        blind=(("block.bn",), {}),
        idle=("block.bn",),
    ),
    _trap("a GraphModule with a functional call", lambda: traced(FunctionalBlock()), IMAGE, "batch_norm"),
    _trap("a program exported in evaluation", lambda: exported(training=False), IMAGE, "batch_norm", "batch_norm_1"),
    _trap("a program exported in training", lambda: exported(training=True), IMAGE, "batch_norm", "batch_norm_1"),
    # weights, which are no activations
    _trap("StdConv2d", lambda: nn.Sequential(StdConv2d(3, 8, 3), bn()), IMAGE, "1", kernels=True),
    _trap("ScaledStdConv2d", lambda: nn.Sequential(ScaledStdConv2d(3, 8, 3), bn()), IMAGE, "1", kernels=True),
    _trap("kernel standardised by hand", Standardised, IMAGE, "bn", kernels=True),
    _trap("parametrized kernel", own_parameter_kernel, IMAGE, "1", kernels=True),
    # names and places
    _trap("two names", TwoNames, IMAGE, "bn"),
    _trap("shared block", lambda: SharedBlock(nn.Sequential(conv(8, 8), bn())), IMAGE, "left.1"),
    _trap("in a list and a dict only", InContainers, IMAGE, "norms[0]", "table['last']['norm']"),
    _trap("in a list besides", ListBeside, IMAGE, "bn1", "bn2"),
    _trap("called several times", Recurrent, IMAGE, "bn"),
    _trap("never called", NeverCalled, IMAGE, "bn", "unused", idle=("unused",)),
    _trap("hooks", Hooked, IMAGE, "bn"),
    _trap("the root is a BN", lambda: bn(3), IMAGE, ""),
    _trap("a container named like a norm", lambda: Chain(ConvNormAct()), IMAGE, "1.bn"),
    # shapes
    _trap("one position", lambda: AfterPooling(8), IMAGE, "bn", "pooled"),
    _trap(
        "one position, few channels",
        lambda: AfterPooling(7),
        IMAGE,
        "bn",
        skips={"pooled": "7 channels at one spatial position"},
        blind=(("bn", "pooled"), {}),
    ),
    _trap("one channel", lambda: Chain(bn(1), channels=1), IMAGE, "1"),
    _trap("(N, C) and (N, C, L)", Heads, image(4, 3, 10), "norm_sequence", "norm_head"),
    _trap("volumes", Volumes, image(2, 1, 5, 6, 7), "bn"),
    _trap("channels_last", lambda: Chain(bn()).to(memory_format=torch.channels_last), IMAGE, "1"),
    # options
    _trap("affine=False", lambda: Chain(bn(affine=False)), IMAGE, "1"),
    _trap("bias=False", lambda: Chain(bn(bias=False)), IMAGE, "1"),
    _trap("momentum=None", lambda: Chain(bn(momentum=None)), IMAGE, "1"),
    _trap("momentum=0.0", lambda: Chain(bn(momentum=0.0)), IMAGE, "1"),
    _trap("track_running_stats=False", lambda: Chain(bn(track_running_stats=False)), IMAGE, "1"),
    _trap("no tensor at all", lambda: Chain(bn(affine=False, track_running_stats=False)), IMAGE, "1"),
    _trap("tracking stopped later", untracked_later, IMAGE, "1"),
    _trap("statistics dropped later", statistics_dropped, IMAGE, "1"),
    _trap("eps=0.7", lambda: Chain(bn(eps=0.7)), IMAGE, "1"),
    _trap("in evaluation inside training", evaluated_norm, IMAGE, "1"),
    _trap("frozen parameters", frozen_norm, IMAGE, "1"),
    _trap("half-frozen", HalfFrozen, IMAGE, "stem.1", "body.1"),
    _trap("bfloat16", lambda: half(Chain(bn()), torch.bfloat16), lambda: IMAGE().bfloat16(), "1"),
    _trap("float16", lambda: half(Chain(bn()), torch.float16), lambda: IMAGE().half(), "1"),
    _trap("dict input", DictInput, lambda: ({"image": IMAGE(), "label": torch.tensor([1, 2, 3])},), "bn"),
    _trap("keyword input", KeywordInput, lambda: {"left": IMAGE(), "right": IMAGE() * 2}, "bn"),
    # classes
    _trap("SyncBatchNorm", lambda: Chain(nn.SyncBatchNorm(8)), IMAGE, "1"),
    _trap(
        "BatchNormAct2d",
        lambda: Chain(BatchNormAct2d(8, act_layer=nn.Hardswish, drop_layer=lambda: nn.Dropout(0.4))),
        IMAGE,
        "1",
    ),
    _trap("torchvision FrozenBatchNorm2d", lambda: Chain(FrozenBatchNorm2d(8, eps=0.0)), IMAGE, "1"),
    _trap("FrozenBatchNormAct2d", lambda: Chain(FrozenBatchNormAct2d(8, act_layer=nn.SiLU)), IMAGE, "1"),
    _trap(
        "unknown subclass",
        lambda: Chain(TheirNorm(8)),
        IMAGE,
        skips={"1": r"KNOWN_NORMS \| \{\"tests.helpers.zoo[.a-z]*.TheirNorm\": read_batch_norm"},
    ),
    _trap("unknown subclass made known", lambda: Chain(TheirNorm(8)), IMAGE, "1", also_read_as_batch_norm=(TheirNorm,)),
    _trap(
        "known by mistake: more inside",
        lambda: Chain(ActivatedNorm(8)),
        IMAGE,
        skips={"1": "activation"},
        also_read_as_batch_norm=(ActivatedNorm,),
    ),
    _trap("subclass that does more", lambda: Chain(DoublingNorm(8)), IMAGE, skips={"1": "may do more than BatchNorm"}),
    _trap(
        "overridden on the instance",
        lambda: overridden(Chain(bn()), "1"),
        IMAGE,
        skips={"1": "overridden on the instance"},
    ),
    _trap(
        "parametrized BN",
        lambda: parametrized(model := Chain(bn()), model[1]),
        IMAGE,
        skips={"1": "remove_parametrizations"},
    ),
    _trap("pruned BN", pruned, IMAGE, skips={"1": "weight"}, copyable=False),
    _trap(
        "lazy BN",
        lambda: Chain(nn.LazyBatchNorm2d()),
        lambda: None,
        skips={"1": "run one forward pass, then convert"},
        copyable=False,
    ),
    _trap("TorchScript inside", Scripted, IMAGE, "bn", skips={"part.1": "TorchScript"}),
    _trap("a GraphModule with module norms", lambda: traced(Chain(bn())), IMAGE, "1"),
    _trap(
        "norms that are no BN",
        OtherNorms,
        IMAGE,
        "bn",
        skips={"group": STAYS, "instance": "running statistics in evaluation", "layer": STAYS, "rms": STAYS},
    ),
    # other norms on request
    _trap(
        "other norms, not asked for",
        Stylised,
        IMAGE,
        "bn",
        skips={
            "instance": rf"is Instance Normalization, .*{STAYS}, unless asked .*kinds=\('bn', 'in'\) \(--kinds bn,in\)",
            "group": rf"is GroupNorm of one group, .*{STAYS}, unless asked .*kinds=\('bn', 'gn1'\)",
        },
    ),
    _trap("three kinds", Stylised, IMAGE, "bn", "instance", "group", options=OTHER_KINDS),
    _trap(
        "InstanceNorm alone",
        Stylised,
        IMAGE,
        "instance",
        skips={
            "bn": r"is Batch Normalization: stays as it is, unless asked for with kinds=\('bn', 'in'\)",
            "group": "--kinds in,gn1",
        },
        options={"kinds": ("in",)},
    ),
    _trap("three kinds, statistics begun", Stylised, IMAGE, "bn", "instance", "group", options=BEGUN),
    _trap("InstanceNorm, affine=False", lambda: Chain(nn.InstanceNorm2d(8)), IMAGE, "1", options=OTHER_KINDS),
    _trap("affine=False, statistics begun", lambda: Chain(nn.InstanceNorm2d(8)), IMAGE, "1", options=BEGUN),
    _trap("the root is an InstanceNorm", lambda: nn.InstanceNorm2d(3, eps=0.7), IMAGE, "", options=OTHER_KINDS),
    _trap(
        "InstanceNorm with statistics",
        lambda: Chain(nn.InstanceNorm2d(8, track_running_stats=True)),
        IMAGE,
        skips={"1": "track_running_stats=True"},
        options=OTHER_KINDS,
    ),
    _trap(
        "InstanceNorm of one channel",
        lambda: Chain(nn.InstanceNorm2d(1, affine=True), channels=1),
        IMAGE,
        skips={"1": "^1 channel leaves only the branch in: nothing to switch to$"},
        options=OTHER_KINDS,
    ),
    _trap(
        "one channel, statistics begun",
        lambda: Chain(nn.InstanceNorm2d(1, affine=True), channels=1),
        IMAGE,
        "1",
        options=BEGUN,
    ),
    _trap(
        "InstanceNorm without a batch",
        WithoutBatch,
        IMAGE,
        skips={"norm": r"^was fed 8x9x9, .* takes \(N, C, \*spatial\): add the dimension of the batch$"},
        blind=(("norm",), {}),
        options=OTHER_KINDS,
    ),
    _trap(
        "other norms of sequences",
        Sequences,
        image(4, 3, 10),
        "instance",
        "group",
        skips={"flat": "^3 channels at one spatial position leave only the branch ln"},
        blind=(("instance", "group", "flat"), {}),
        options=OTHER_KINDS,
    ),
    _trap("one position, statistics begun", Sequences, image(4, 3, 10), "instance", "group", "flat", options=BEGUN),
    _trap(
        "InstanceNorm of volumes",
        lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4, affine=True)),
        image(2, 1, 5, 6, 7),
        "1",
        options=OTHER_KINDS,
    ),
    _trap("GroupNorm, affine=False", lambda: Chain(nn.GroupNorm(1, 8, affine=False)), IMAGE, "1", options=OTHER_KINDS),
    _trap("GroupNorm, affine=False, begun", lambda: Chain(nn.GroupNorm(1, 8, affine=False)), IMAGE, "1", options=BEGUN),
    _trap("GroupNorm of two groups", lambda: Chain(nn.GroupNorm(2, 8)), IMAGE, skips={"1": STAYS}, options=OTHER_KINDS),
    _trap(
        "GroupNorm of one channel",
        lambda: Chain(nn.GroupNorm(1, 1), channels=1),
        IMAGE,
        skips={"1": "^1 channel leaves only the branch ln: nothing to switch to$"},
        options=OTHER_KINDS,
    ),
    _trap("GroupNorm1 of timm", lambda: Chain(GroupNorm1(8)), IMAGE, "1", options=OTHER_KINDS),
    _trap(
        "GroupNormAct of timm",
        lambda: Chain(GroupNormAct(8, 1, act_layer=nn.Hardswish, drop_layer=lambda: nn.Dropout(0.4)), GroupNorm1Act(8)),
        IMAGE,
        "1",
        "2",
        options=OTHER_KINDS,
    ),
    _trap(
        "frozen InstanceNorm",
        lambda: Chain(nn.InstanceNorm2d(8, affine=True).requires_grad_(False)),
        IMAGE,
        "1",
        options=OTHER_KINDS,
    ),
    _trap(
        "bfloat16 without weight",
        lambda: half(Chain(nn.InstanceNorm2d(8)), torch.bfloat16),
        lambda: IMAGE().bfloat16(),
        "1",
        options=BEGUN,
    ),
    _trap(
        "unknown subclasses of other norms",
        lambda: Chain(TheirInstanceNorm(8), TheirGroupNorm(1, 8), TheirGroupNorm(2, 8)),
        IMAGE,
        skips={
            "1": r"KNOWN_NORMS \| \{\"tests.helpers.zoo[.a-z]*.TheirInstanceNorm\": read_instance_norm\}$",
            "2": r"KNOWN_NORMS \| \{\"tests.helpers.zoo[.a-z]*.TheirGroupNorm\": read_group_norm\}$",
            "3": f"^{STAYS}$",
        },
        options=OTHER_KINDS,
    ),
)

BY_NAME: Mapping[str, Trap] = MappingProxyType({trap.name: trap for trap in TRAPS})
