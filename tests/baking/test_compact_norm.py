"""Compact layers: the function of the SN layer in evaluation, in every precision, through every tracer."""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import normswap
from normswap.baking.compact_norm import CompactNorm, read_site_weights
from normswap.errors import LayerError
from normswap.layers.switch_norm import SwitchNorm

WEIGHTS: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "all branches": ((0.2, 0.3, 0.5), (0.5, 0.1, 0.4)),
    "in and bn": ((0.4, 0.0, 0.6), (0.1, 0.0, 0.9)),
    "ln and bn": ((0.0, 0.4, 0.6), (0.0, 0.7, 0.3)),
    "in and ln": ((0.4, 0.6, 0.0), (0.3, 0.7, 0.0)),
    "means of ln, variances of bn": ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "means of bn, variances of in": ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0)),
    "only bn": ((0.0, 0.0, 1.0), (0.0, 0.0, 1.0)),
    "only ln": ((0.0, 1.0, 0.0), (0.0, 1.0, 0.0)),
    "only in": ((1.0, 0.0, 0.0), (1.0, 0.0, 0.0)),
}
SHAPES = {1: (3, 6, 10), 2: (3, 6, 5, 4), 3: (2, 6, 3, 4, 2)}


def make_layer(rank: int, weights: str, *, matched: bool = True, num_groups: int = 1, **options: Any) -> SwitchNorm:
    """A trained layer of a converted BN with moved gates, in evaluation."""
    torch.manual_seed(0)
    norm = getattr(nn, f"BatchNorm{rank}d")(6, **options)
    with torch.no_grad():
        for tensor in (*norm.parameters(), norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    plan = normswap.SwapOptions(match=matched)
    layer: Any = normswap.convert(norm, options=plan).model
    layer.num_groups = num_groups
    with torch.no_grad():
        for name, values in zip(("mean_weight", "var_weight"), WEIGHTS[weights], strict=True):
            getattr(layer, name).copy_(torch.tensor(values))
        if layer.in_var_scale is not None:
            layer.in_var_scale.uniform_(0.5, 2)
    return layer.eval()  # type: ignore[no-any-return]


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize(("matched", "num_groups"), [(True, 1), (False, 3)])
def test_it_computes_the_function_of_the_layer(rank: int, weights: str, matched: bool, num_groups: int) -> None:
    layer, x = make_layer(rank, weights, matched=matched, num_groups=num_groups), torch.randn(SHAPES[rank]) + 3
    found = CompactNorm(layer)(x)
    assert relative(found, copy.deepcopy(layer).double()(x.double())) < 1e-6
    assert found.shape == x.shape


@pytest.mark.parametrize("weights", ["ln and bn", "only ln", "only bn"])
def test_an_input_without_positions(weights: str) -> None:
    layer, x = make_layer(1, weights), torch.randn(4, 6)
    with torch.no_grad():
        assert relative(CompactNorm(layer)(x), layer(x)) < 1e-5


def test_without_affine_parameters_and_with_buffers_of_a_frozen_norm() -> None:
    torchvision = pytest.importorskip("torchvision")
    x = torch.randn(3, 6, 5, 4)
    plain = make_layer(2, "all branches", affine=False)
    assert relative(CompactNorm(plain)(x), plain(x)) < 1e-6
    frozen: Any = normswap.convert(torchvision.ops.FrozenBatchNorm2d(6)).model.eval()
    frozen.mean_weight.data.copy_(torch.tensor([0.0, 0.5, 0.5]))
    compact = CompactNorm(frozen)
    assert relative(compact(x), frozen(x)) < 1e-6
    assert "weight" in dict(compact.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_constants_in_float32(dtype: torch.dtype) -> None:
    layer, x = make_layer(2, "all branches"), torch.randn(3, 6, 5, 4) * 3 + 40
    compact = CompactNorm(layer).to(dtype)
    assert {name: buffer.dtype for name, buffer in compact.named_buffers()} == dict.fromkeys(
        ("ln_shift", "mean_offset", "in_factor", "ln_factor", "var_offset"), torch.float32
    )
    low = x.to(dtype)
    exact = copy.deepcopy(layer).to(dtype).double()(low.double())
    assert compact(low).dtype == dtype
    assert relative(compact(low), exact) < 4 * torch.finfo(dtype).eps


def test_a_mean_of_many_deviations_costs_no_digits() -> None:
    layer, x = make_layer(2, "all branches"), torch.randn(3, 6, 8, 8) + 3000
    layer.mean_weight.data.copy_(torch.tensor([1.0, 0.0, 0.0]))
    assert relative(CompactNorm(layer)(x), copy.deepcopy(layer).double()(x.double())) < 2e-3


def test_the_memory_format_and_the_training_mode_stay() -> None:
    layer, x = make_layer(2, "all branches"), torch.randn(3, 6, 5, 4).to(memory_format=torch.channels_last)
    compact = CompactNorm(layer)
    assert compact(x).is_contiguous(memory_format=torch.channels_last)
    before = {name: t.clone() for name, t in compact.state_dict().items()}
    assert torch.equal(compact.train()(x), compact.eval()(x))
    assert all(torch.equal(t, before[name]) for name, t in compact.state_dict().items())


def test_the_modules_after_the_norm_still_run() -> None:
    layer = normswap.SwitchNormAct(6, act=nn.ReLU()).eval()
    x = torch.randn(3, 6, 5, 4)
    assert relative(CompactNorm(layer)(x), layer(x)) < 1e-6
    assert bool((CompactNorm(layer)(x) >= 0).all())


def test_one_position_is_refused_where_instance_norm_has_weight() -> None:
    with pytest.raises(LayerError, match="one spatial position per channel"):
        CompactNorm(make_layer(2, "in and bn"))(torch.randn(3, 6, 1, 1))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_symbolic_tracing_and_export_with_dynamic_sizes(weights: str) -> None:
    model, x = nn.Sequential(CompactNorm(make_layer(2, weights))).eval(), torch.randn(3, 6, 5, 4)
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},), strict=False)
    other = torch.randn(2, 6, 7, 9)
    assert torch.allclose(program.module()(other), model(other), atol=1e-6)


def test_gradients_reach_the_input_and_the_affine_parameters() -> None:
    layer, x = make_layer(2, "all branches"), torch.randn(3, 6, 5, 4)
    modules: list[Any] = [CompactNorm(layer), layer]
    found, expected = (
        torch.autograd.grad(module(y := x.clone().requires_grad_()).square().sum(), (y, module.weight, module.bias))
        for module in modules
    )
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


def test_a_layer_of_two_branches_is_small_in_onnx() -> None:
    pytest.importorskip("onnxscript")
    limits = {"ln and bn": 20, "in and bn": 20, "all branches": 30, "only bn": 1}
    x = torch.randn(3, 6, 5, 4)
    counts = {}
    for weights in limits:
        model = nn.Sequential(CompactNorm(make_layer(2, weights))).eval()
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
        assert program is not None
        counts[weights] = len([node for node in program.model.graph if node.op_type != "Constant"])
    assert all(counts[name] <= limit for name, limit in limits.items()), counts


def test_the_constants_follow_from_the_weights_alone() -> None:
    """A file is read into the structure that its recorded weights give, before its tensors are."""
    for first, second in itertools.pairwise(WEIGHTS):
        blank, moved = make_layer(2, first), make_layer(2, second)
        with torch.no_grad():
            blank.running_mean.zero_()  # type: ignore[union-attr]
        rebuilt = CompactNorm(blank, read_site_weights(moved))
        rebuilt.load_state_dict(CompactNorm(moved).state_dict())
        x = torch.randn(3, 6, 5, 4)
        assert torch.equal(rebuilt(x), CompactNorm(moved)(x))
