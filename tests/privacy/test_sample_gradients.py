"""Per-sample gradients of SN layers equal those of passes with one sample."""

from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from opacus.grad_sample.utils import prepare_module
from torch import Tensor, nn

import normswap
import normswap.privacy
from tests.privacy.networks import (
    assert_same,
    by_opacus,
    convert,
    one_by_one,
    randomize,
    small_network,
    spread_gates,
    square_loss,
)

# The first layer of a network gets inputs without gradients.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

MODES = ("hooks", "functorch")
SHAPES = {1: (6, 7), 2: (6, 5, 4), 3: (6, 3, 4, 2)}


def check(model: nn.Module, inputs: Tensor, mode: str, tolerance: float = 1e-11) -> None:
    expected = one_by_one(model, inputs)
    normswap.privacy.prepare(model)
    assert_same(by_opacus(model, inputs, mode=mode), expected, tolerance)


def make_layer(dims: int, **options: Any) -> nn.Module:
    cls = {1: normswap.SwitchNorm1d, 2: normswap.SwitchNorm2d, 3: normswap.SwitchNorm3d}[dims]
    layer = randomize(cls(6, bn_statistics="running", **options)).double()
    spread_gates(layer)
    return nn.Sequential(layer)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layers_of_each_rank(dims: int, batch: int, mode: str) -> None:
    check(make_layer(dims), torch.randn(batch, *SHAPES[dims], dtype=torch.float64), mode)


@pytest.mark.parametrize("gate", ["simplex", "softmax"])
@pytest.mark.parametrize(
    "branches", [("in", "ln"), ("ln", "bn"), ("in", "bn"), ("in",), ("ln",), ("bn",)], ids="-".join
)
def test_branches_and_gates(branches: Any, gate: Any) -> None:
    layer = make_layer(2, branches=branches, gate=gate, num_groups=2)
    check(layer, torch.randn(5, *SHAPES[2], dtype=torch.float64), "hooks")


def test_a_gate_outside_the_simplex_gets_the_gradient_at_its_projection() -> None:
    model = make_layer(2, gate="simplex")
    inputs = torch.randn(5, *SHAPES[2], dtype=torch.float64)
    with torch.no_grad():
        model[0].mean_weight.copy_(torch.tensor([0.9, -0.3, 0.6]))
    expected = one_by_one(model, inputs)
    with torch.no_grad():
        model[0].mean_weight.copy_(torch.tensor([0.9, -0.3, 0.6]))
    normswap.privacy.prepare(model)
    assert_same(by_opacus(model, inputs), expected)


@pytest.mark.parametrize("mode", MODES)
def test_inputs_with_one_position(mode: str) -> None:
    model = make_layer(1, branches=("in", "ln", "bn"), gate="softmax")
    model[0].site = None  # which warns of such inputs
    check(model, torch.randn(5, 6, dtype=torch.float64), mode)


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"bias": False}, {"track_running_stats": False, "branches": ("in", "ln")}],
    ids=["no affine", "no bias", "no running statistics"],
)
def test_layers_without_some_tensors(options: Any) -> None:
    check(make_layer(2, **options), torch.randn(5, *SHAPES[2], dtype=torch.float64), "hooks")


@pytest.mark.parametrize("frozen", ["weight", "mean_weight", "gates"])
def test_frozen_parts_have_no_gradients(frozen: str) -> None:
    model = make_layer(2)
    for name in ("mean_weight", "var_weight") if frozen == "gates" else (frozen,):
        getattr(model[0], name).requires_grad_(False)
    check(model, torch.randn(5, *SHAPES[2], dtype=torch.float64), "hooks")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [{}, {"match": False}, {"start": "ln"}, {"start": "gn", "num_groups": 3}],
    ids=["matched", "not", "ln", "gn"],
)
def test_converted_networks(options: Any, mode: str) -> None:
    inputs = torch.randn(5, 3, 10, 10)
    check(convert(small_network(), inputs, **options), inputs.double(), mode)


def test_matched_in_branches() -> None:
    inputs = torch.randn(5, 3, 10, 10)
    model = convert(small_network(), inputs, data=[torch.randn(8, 3, 10, 10)])
    assert not torch.equal(model[1].in_var_scale, torch.ones(6))
    check(model, inputs.double(), "hooks")


def test_mixed_kinds() -> None:
    norms = nn.Sequential(nn.InstanceNorm2d(6, affine=True), nn.GroupNorm(1, 6), nn.GroupNorm(3, 6), nn.BatchNorm2d(6))
    inputs = torch.randn(4, 3, 10, 10)
    model = convert(small_network(norm=norms), inputs, kinds=("bn", "in", "gn1", "gn"), branches=("in", "ln", "bn"))
    check(model, inputs.double(), "hooks")


def test_several_calls_of_one_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.tanh(self.norm(x)))

    inputs = torch.randn(5, 3, 6, 6)
    check(convert(randomize(Twice()), inputs), inputs.double(), "hooks")


def test_single_precision() -> None:
    inputs = torch.randn(5, 3, 10, 10)
    model = convert(small_network(), inputs)
    expected = one_by_one(model, inputs.double())
    normswap.privacy.prepare(model.float())
    assert_same(by_opacus(model, inputs), {name: each.float() for name, each in expected.items()}, 1e-5)


def test_an_empty_batch_has_no_gradients() -> None:
    model = convert(small_network(), torch.randn(2, 3, 10, 10))
    normswap.privacy.prepare(model)
    found = by_opacus(model, torch.randn(0, 3, 10, 10, dtype=torch.float64), loss=lambda y: y.sum())
    assert all(found[name].shape == (0, *each.shape) for name, each in model.named_parameters() if each.requires_grad)


@pytest.mark.parametrize("mode", MODES)
def test_norms_with_activations(mode: str) -> None:
    model = timm.create_model("test_efficientnet", num_classes=4)
    inputs = torch.randn(3, 3, 32, 32)
    converted = convert(randomize(model), inputs)
    assert any(type(module).__name__ == "SwitchNormAct2d" for module in converted.modules())
    check(converted, inputs.double(), mode)


@pytest.mark.slow
def test_resnet18() -> None:
    inputs = torch.randn(2, 3, 64, 64)
    check(convert(randomize(torchvision.models.resnet18(num_classes=4)), inputs), inputs.double(), "hooks")


@pytest.mark.parametrize("network", ["small", "efficientnet"])
def test_ghost_clipping_finds_the_same_norms(network: str) -> None:
    inputs = torch.randn(5, 3, 32, 32)
    model = small_network(norm=None) if network == "small" else timm.create_model("test_efficientnet", num_classes=4)
    if network == "small":
        inputs = inputs[..., :10, :10]
    converted = convert(randomize(model), inputs)
    gradients = one_by_one(converted, inputs.double())
    norms = torch.cat([each.flatten(1) for each in gradients.values()], 1).norm(dim=1)
    normswap.privacy.prepare(converted)
    private: Any = prepare_module(converted, grad_sample_mode="ghost")
    square_loss(private(inputs.double())).backward()
    torch.testing.assert_close(private.get_norm_sample(), norms, rtol=1e-10, atol=0)


def test_functorch_and_hooks_find_the_same() -> None:
    inputs = torch.randn(5, 3, 10, 10)
    model = convert(small_network(), inputs)
    normswap.privacy.prepare(model)
    found = [by_opacus(model, inputs.double(), mode=mode) for mode in MODES]
    assert_same(*found)


def test_statistics_of_the_batch_that_are_set_later_are_refused() -> None:
    inputs = torch.randn(5, 3, 10, 10)
    model = convert(small_network(), inputs)
    normswap.privacy.prepare(model)
    model[1].bn_statistics = "batch"
    with pytest.raises(normswap.ModelError, match="normalizes by the batch, so the gradient of a sample depends"):
        by_opacus(model, inputs.double())


def test_expanded_weights_are_refused() -> None:
    inputs = torch.randn(5, 3, 10, 10)
    model = convert(small_network(), inputs)
    normswap.privacy.prepare(model)
    with pytest.raises(normswap.ModelError, match='grad_sample_mode="ew" knows no SN layers'):
        partial(prepare_module, grad_sample_mode="ew")(model)(inputs.double())
