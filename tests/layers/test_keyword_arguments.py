"""Layers accept the input under the names that models use for it: `input` (torch) or `x` (timm)."""

from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import normswap
from normswap import SwitchNorm1d, SwitchNorm2d, SwitchNorm3d
from normswap.layers.switch_norm import SwitchNorm, SwitchNormAct2d
from normswap.surgery.discovery.sites import find_norm_sites


class Keyword(nn.Module):
    """Calls its norm with a keyword argument."""

    def __init__(self, norm: nn.Module, name: str) -> None:
        super().__init__()
        self.conv, self.norm, self.name = nn.Conv2d(3, 8, 3), norm, name

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(**{self.name: self.conv(x)}).relu()  # type: ignore[no-any-return]


class Functional(nn.Module):
    """A call of `F.batch_norm` with keyword arguments only, in a module that has another name for its input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, activation: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            input=activation, running_mean=self.mean, running_var=self.var, training=self.training
        )


NORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BatchNorm2d": (lambda: nn.BatchNorm2d(8), "input"),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(8), "input"),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(8, affine=True), "input"),
    "GroupNorm": (lambda: nn.GroupNorm(1, 8), "input"),
    "BatchNormAct2d": (lambda: timm.layers.BatchNormAct2d(8), "x"),
    "FrozenBatchNormAct2d": (lambda: timm.layers.FrozenBatchNormAct2d(8), "x"),
    "FrozenBatchNorm2d": (lambda: FrozenBatchNorm2d(8), "x"),
    "functional": (Functional, "activation"),
}
X = torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(0))


def convert(norm: Callable[[], nn.Module], name: str) -> tuple[nn.Module, Any]:
    net = Keyword(norm(), name).eval()
    return net, normswap.convert(net, X, kinds=("bn", "in", "gn1"))


@pytest.mark.parametrize(("norm", "name"), NORMS.values(), ids=NORMS)
def test_a_norm_that_is_called_by_keyword_is_converted_and_verified(norm: Callable[[], nn.Module], name: str) -> None:
    net, conversion = convert(norm, name)
    assert len(conversion.plan.swaps) == 1
    found = normswap.verify(net, conversion.model, [X])
    assert found.passed
    assert [max(site.evaluation or 0.0, site.training or 0.0) < 1e-9 for site in found.sites] == [True]
    assert all(site.evaluation is not None and site.training is not None for site in found.sites)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["BatchNorm2d", "BatchNormAct2d", "functional"])
def test_a_layer_that_is_called_by_keyword_compiles_exports_and_is_traced(case: str) -> None:
    _, conversion = convert(*NORMS[case])
    model = conversion.model.eval()
    expected = model(X)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(X), expected)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), expected)


@pytest.mark.parametrize("case", ["BatchNorm2d", "BatchNormAct2d", "functional"])
def test_calibration_sees_an_input_that_is_given_by_keyword(case: str) -> None:
    _, conversion = convert(*NORMS[case])
    assert [layer.calls for layer in normswap.calibrate(conversion.model, [X, X + 1]).layers] == [2]


def test_the_producer_of_an_input_by_keyword_is_known_without_an_example() -> None:
    for net in (Keyword(nn.BatchNorm2d(8), "input"), Keyword(timm.layers.BatchNormAct2d(8), "x")):
        assert [site.producer for site in find_norm_sites(net)] == ["conv"]


LAYERS: dict[str, tuple[Callable[[], SwitchNorm], Tensor]] = {
    "1d": (lambda: SwitchNorm1d(3), torch.randn(4, 3, 5)),
    "2d": (lambda: SwitchNorm2d(3), torch.randn(4, 3, 5, 5)),
    "3d": (lambda: SwitchNorm3d(3), torch.randn(4, 3, 2, 3, 3)),
    "act": (lambda: SwitchNormAct2d(3, act=nn.ReLU()), torch.randn(4, 3, 5, 5)),
}


@pytest.mark.parametrize(("make", "x"), LAYERS.values(), ids=LAYERS)
def test_both_names_are_answered_and_hooks_see_them(make: Callable[[], SwitchNorm], x: Tensor) -> None:
    layer = make().eval()
    seen: list[Any] = []
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    expected = layer(x)
    assert layer(x=x).equal(expected)
    assert layer(input=x).equal(expected)
    assert seen[0] == ((x,), {})
    assert [list(kwargs) for _, kwargs in seen[1:]] == [["x"], ["input"]]


@pytest.mark.parametrize(("make", "x"), LAYERS.values(), ids=LAYERS)
def test_a_wrong_number_of_inputs_raises_as_python_does(make: Callable[[], SwitchNorm], x: Tensor) -> None:
    layer = make()
    with pytest.raises(TypeError, match=r"\.forward\(\) missing 1 required positional argument: 'input'"):
        layer()
    for arguments, keywords in (((x,), {"input": x}), ((), {"input": x, "x": x})):
        with pytest.raises(TypeError, match=r"\.forward\(\) got multiple values for argument 'input'"):
            layer(*arguments, **keywords)
    with pytest.raises(TypeError, match=r"\.forward\(\) got multiple values for argument 'x'"):
        layer(x, x=x)
    with pytest.raises(TypeError, match=r"\.forward\(\) takes from 1 to 2 positional arguments but 3 were given"):
        layer(x, x)
    with pytest.raises(TypeError, match=r"\.forward\(\) got an unexpected keyword argument 'y'"):
        layer(y=x)
