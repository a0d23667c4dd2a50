"""Whether code could call a function that normalizes, judged without running it."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from normswap.surgery.graphs import module_trace
from normswap.surgery.graphs.module_trace import mentions_norm_function, name_uses, names_in
from normswap.surgery.norms.classes import is_norm_layer
from tests.helpers import zoo


def normalise(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def through_another(x: Tensor) -> Tensor:
    return normalise(x)


class Normaliser:
    """An object that is no module."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)


class Plain(nn.Module):
    """Nothing that normalizes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class ByMethod(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)

    def helper(self, x: Tensor) -> Tensor:
        return F.instance_norm(x)


class ByProperty(Plain):
    @property
    def normalised(self) -> Tensor:
        return normalise(torch.zeros(2, 2, 2))


class ByStaticMethod(Plain):
    @staticmethod
    def helper(x: Tensor) -> Tensor:
        return normalise(x)


class ByFunction(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return through_another(x)


class ByModuleOfFunctions(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return zoo_functions.functional_norm(x)


class zoo_functions:  # noqa: N801 - stands for a module of functions
    @staticmethod
    def functional_norm(x: Tensor) -> Tensor:
        return normalise(x)


class ByDecorator(Plain):
    @functools.wraps(normalise)
    def forward(self, x: Tensor) -> Tensor:
        return x


class ByDefault(Plain):
    def forward(self, x: Tensor, norm: Callable[[Tensor], Tensor] = normalise) -> Tensor:
        return norm(x)


class ByInnerFunction(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return (lambda y: F.batch_norm(y, None, None, training=True))(x)


class OnlyBuildsOne(Plain):
    """Makes a norm module, which as a part of the model is asked itself."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)


def holding(value: Any) -> nn.Module:
    model = Plain()
    model.held = value
    return model


def enclosing() -> Callable[[Tensor], Tensor]:
    function = normalise
    return lambda x: function(x)


COULD: dict[str, Callable[[], nn.Module]] = {
    "a call": zoo.FunctionalBlock,
    "a method": ByMethod,
    "a property": ByProperty,
    "a static method": ByStaticMethod,
    "a function that calls one": ByFunction,
    "a class of functions": ByModuleOfFunctions,
    "what a decorator wraps": ByDecorator,
    "a default": ByDefault,
    "an inner function": ByInnerFunction,
    "a function held": lambda: holding(F.batch_norm),
    "a partial held": lambda: holding(functools.partial(normalise)),
    "a closure held": lambda: holding(enclosing()),
    "a bound method held": lambda: holding(Normaliser().__call__),
    "an object held": lambda: holding(Normaliser()),
    "a list of functions held": lambda: holding([F.relu, normalise]),
    "a dict of functions held": lambda: holding({"norm": normalise}),
    "its own forward overridden": lambda: overridden(),
    "a graph": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())),
}
COULD_NOT: dict[str, Callable[[], nn.Module]] = {
    "plain code": Plain,
    "a norm module built": OnlyBuildsOne,
    "a container": lambda: nn.Sequential(nn.ReLU()),
    "functions held": lambda: holding([F.relu, torch.sum, len, functools.partial(F.relu)]),
    "numbers held": lambda: holding({"batch_norm": 1}),
}


def overridden() -> nn.Module:
    model = Plain()
    model.forward = normalise  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("make", COULD.values(), ids=COULD)
def test_a_call_is_found_wherever_it_hides(make: Callable[[], nn.Module]) -> None:
    assert mentions_norm_function(make())


@pytest.mark.parametrize("make", COULD_NOT.values(), ids=COULD_NOT)
def test_other_code_is_not_suspected(make: Callable[[], nn.Module]) -> None:
    assert not mentions_norm_function(make())


def test_code_that_goes_in_circles_ends() -> None:
    assert not mentions_norm_function(holding(circle))


def circle(x: Tensor) -> Tensor:
    return circle(x) if x.numel() else other_half(x)


def other_half(x: Tensor) -> Tensor:
    return circle(x)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "levit_128s", "mobilenetv3_small_050"])
def test_models_of_timm_call_none_themselves(name: str) -> None:
    model = timm.create_model(name)
    assert not any(mentions_norm_function(m) for m in model.modules() if not is_norm_layer(m))


def test_models_of_torchvision_call_none_themselves() -> None:
    model = torchvision.models.get_model("googlenet", weights=None, init_weights=False)
    assert not any(mentions_norm_function(m) for m in model.modules() if not is_norm_layer(m))


def test_kernels_that_are_standardised_are_suspected() -> None:
    assert mentions_norm_function(timm.layers.StdConv2d(3, 4, 3))


class Namesake(Plain):
    """A child called like the function, in code with constants of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, sizes: tuple[int, ...] = ()) -> Tensor:
        for size in () if not sizes else (1, 2):
            x = x + size
        return self.batch_norm(x)


def test_a_child_called_like_the_function_is_not_suspected() -> None:
    assert not mentions_norm_function(Namesake())
    model = Namesake()
    del model._modules["batch_norm"]
    vars(model)["batch_norm"] = normalise
    assert mentions_norm_function(model)
    assert not mentions_norm_function(Namesake())


def test_uses_of_a_name_are_distinguished_from_attributes_of_self() -> None:
    uses = dict(name_uses(Namesake.forward.__code__))
    assert uses["batch_norm"] is True
    assert dict(name_uses(ByMethod.helper.__code__))["instance_norm"] is False


def test_names_are_read_in_inner_functions_too() -> None:
    assert {"F", "batch_norm"} <= names_in(ByInnerFunction.forward.__code__)
    assert "batch_norm" in module_trace._norm_function_names()
