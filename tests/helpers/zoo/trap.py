"""What a trap is, and the small layers, inputs and random values that traps are built with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


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
