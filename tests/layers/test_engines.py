"""Each engine of the C extension that this processor can run, and the short way of a layer to it."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import LayerError
from normswap.layers import direct_call
from normswap.layers.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.AVAILABLE, reason="built without a compiler")

ENGINES = cpu._C.list_engines() if cpu.AVAILABLE else []
# Shorter than a vector, no multiple of one, several vectors, several segments.
SHAPES = [(2, 3, 2, 2), (3, 5, 3, 3), (2, 20, 7, 7), (2, 33, 5, 9), (1, 64, 14, 14), (4, 130, 16, 17), (1, 9, 3, 4, 5)]
LIMITS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
MIXES = {"vertex": [0.0, 0.0, 1.0], "mix": [0.2, 0.3, 0.5], "ln": [0.0, 1.0, 0.0]}


@pytest.fixture(params=ENGINES)
def _engine(request: pytest.FixtureRequest) -> Iterator[None]:
    cpu._C.use_engine(request.param)
    yield
    cpu._C.use_engine(cpu.VARIANT)


def converted(channels: int, rank: int, mix: list[float], bn_statistics: str) -> nn.Module:
    norm, layer = {
        4: (nn.BatchNorm2d, normswap.SwitchNorm2d),
        5: (nn.BatchNorm3d, normswap.SwitchNorm3d),
    }[rank]
    bn = norm(channels)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    bn.running_mean, bn.running_var = torch.randn(channels), torch.rand(channels) + 0.5
    found = layer.from_batch_norm(bn, bn_statistics=bn_statistics)  # type: ignore[arg-type]
    with torch.no_grad():
        found.mean_weight.copy_(torch.tensor(mix))
        found.var_weight.copy_(torch.tensor(mix))
    return found


def outputs_and_gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


@pytest.mark.usefixtures("_engine")
@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("bn_statistics", ["running", "batch"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_every_engine_computes_the_plain_formula(
    dtype: torch.dtype, channels_last: bool, bn_statistics: str, mix: list[float]
) -> None:
    for shape in SHAPES:
        torch.manual_seed(0)
        layer = converted(shape[1], len(shape), mix, bn_statistics)
        x, dy = (torch.randn(shape).to(dtype) for _ in range(2))
        if channels_last:
            layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            x, dy = (each.contiguous(memory_format=layout) for each in (x, dy))
        if dtype == torch.float64:
            layer = layer.double()
        found = outputs_and_gradients(layer, x, dy)
        with normswap.use_backend("reference"):
            expected = outputs_and_gradients(layer.double(), x.double(), dy.double())
        # Gates: their gradient is a difference of sums over all values.
        for name, one, other in zip(("y", "x", *dict(layer.named_parameters())), found, expected, strict=True):
            limit = LIMITS[dtype] * (100 if name in ("mean_weight", "var_weight") else 1)
            error = (one.double() - other).norm() / other.norm().clamp_min(1e-3)
            assert error <= limit, (shape, name, error)


def test_the_environment_selects_an_engine() -> None:
    def variant(name: str) -> "subprocess.CompletedProcess[str]":
        code = "from normswap.layers.backends import cpu; print(cpu.VARIANT)"
        environment = {**os.environ, "NORMSWAP_CPU_VARIANT": name}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert variant("baseline").stdout.strip() == "baseline"
    refused = variant("avx1024")
    assert refused.returncode == 1
    assert "NORMSWAP_CPU_VARIANT: expected one of" in refused.stderr
    with pytest.raises(ValueError, match="expected the name of an engine that this processor can run, got 'no'"):
        cpu._C.use_engine("no")
    assert (os.environ.get("NORMSWAP_CPU_VARIANT") or ENGINES[-1]) == cpu.VARIANT


# --- the short way


def takes_the_short_way(layer: nn.Module, x: Tensor) -> bool:
    return direct_call.normalise_directly(layer, x, 1e-5) is not None  # type: ignore[arg-type]


def test_the_short_way_is_taken_where_the_branch_has_constants() -> None:
    x = torch.randn(2, 6, 5, 5)
    layer = converted(6, 4, MIXES["mix"], "running")
    assert takes_the_short_way(layer, x)
    assert takes_the_short_way(layer, x.contiguous(memory_format=torch.channels_last))
    assert not takes_the_short_way(layer, x.transpose(2, 3)[:, :, 1:])
    assert not takes_the_short_way(layer, x[:, :, :1, :1])  # `in` has no variance
    assert not takes_the_short_way(converted(6, 4, MIXES["mix"], "batch"), x)
    assert takes_the_short_way(converted(6, 4, MIXES["mix"], "batch").eval(), x)
    with normswap.use_backend("reference"):
        assert not takes_the_short_way(layer, x)


def test_gradients_are_those_of_the_statistics_at_the_forward_pass() -> None:
    layer, x, dy = converted(6, 4, MIXES["mix"], "running"), torch.randn(2, 6, 5, 5), torch.randn(2, 6, 5, 5)
    expected = outputs_and_gradients(layer, x, dy)[1]
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    layer.running_mean.add_(1)
    layer.running_var.mul_(3)
    assert torch.autograd.grad(y, leaf, dy)[0].equal(expected)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_hooks_on_saved_tensors_and_second_derivatives(mix: list[float]) -> None:
    layer, x = converted(6, 4, mix, "running").double(), torch.randn(2, 6, 3, 3).double()
    dy = torch.randn(2, 6, 3, 3).double()
    expected = outputs_and_gradients(layer, x, dy)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        found = outputs_and_gradients(layer, x, dy)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    # A hook that returns another layout: the general way computes the gradients.
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.t().contiguous().t() if t.dim() == 2 else t):
        found = outputs_and_gradients(layer, x, dy)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    layer.requires_grad_(False)
    assert torch.autograd.gradgradcheck(lambda each: layer(each).square(), x.requires_grad_(), atol=1e-4)


def test_a_refused_call_gets_the_error_of_the_general_way() -> None:
    layer = converted(6, 4, MIXES["mix"], "running")
    with pytest.raises(LayerError, match="expected 6 channels in dimension 1"):
        layer(torch.randn(2, 5, 4, 4))
    layer.mean_weight = nn.Parameter(torch.ones(2))
    with pytest.raises(LayerError, match="expected gate parameters of shape"):
        layer(torch.randn(2, 6, 4, 4))
    other = converted(6, 4, MIXES["vertex"], "running")
    other.gate = "hard"  # type: ignore[assignment]
    with pytest.raises(LayerError, match="gate"):
        other(torch.randn(2, 6, 4, 4))
