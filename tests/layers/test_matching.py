"""Matched branches: what they promise, in every backend, and what becomes of their constants."""

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import normswap
from normswap import switch_norm
from normswap.errors import LayerError, SwapError
from normswap.layers.backends import cpu
from normswap.layers.gated_module import FunctionalSwitchNorm
from normswap.layers.gating import BRANCHES
from normswap.layers.in_place import convert_module, revert_module
from normswap.layers.matching import MATCHING_BUFFERS, Matching, match_statistics
from normswap.layers.switch_norm import SwitchNorm, SwitchNorm1d, SwitchNorm2d, SwitchNorm3d
from tests.helpers import oracles
from tests.helpers.norm_layers import trained

EPS = 1e-3


def trained_norm(channels: int = 6, **options: Any) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels, eps=EPS, dtype=torch.float64, **options)
    trained(bn)
    return bn.eval()


def matched_layer(bn: nn.Module, *, num_groups: int = 1, **options: Any) -> SwitchNorm2d:
    defaults: dict[str, Any] = {"gate": "simplex", "branches": BRANCHES, "bn_statistics": "running"}
    layer = copy.deepcopy(bn)
    convert_module(layer, SwitchNorm2d, **defaults | options, train_gates=True, matched=True, num_groups=num_groups)
    assert isinstance(layer, SwitchNorm2d)
    return layer


def set_gates(layer: Any, mean: list[float], var: list[float]) -> Any:
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor(mean, dtype=torch.float64))
        layer.var_weight.copy_(torch.tensor(var, dtype=torch.float64))
    return layer


def like_running_statistics(bn: nn.Module, shape: tuple[int, ...], num_groups: int = 1) -> Tensor:
    """An input whose moments of every sample, over the channels of each group, are those of the running statistics."""
    mean, var = (bn.get_buffer(name).reshape(num_groups, -1) for name in ("running_mean", "running_var"))
    x = torch.randn(shape).double()
    grouped = x.reshape(shape[0], num_groups, -1)
    grouped = (grouped - grouped.mean(-1, keepdim=True)) / grouped.std(-1, correction=0, keepdim=True)
    deviation = (var.mean(1) + mean.var(1, correction=0)).sqrt()
    return (grouped * deviation[:, None] + mean.mean(1)[:, None]).reshape(shape)


MIXES = [([0.0, 1.0, 0.0], [0.0, 1.0, 0.0]), ([0.0, 0.3, 0.7], [0.0, 0.9, 0.1]), ([0.0, 0.0, 1.0], [0.0, 0.5, 0.5])]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_groups", [1, 3])
def test_a_sample_with_the_running_moments_gets_the_output_of_bn(num_groups: int, backend: str, training: bool) -> None:
    bn = trained_norm()
    layer = matched_layer(bn, num_groups=num_groups).train(training)
    x = like_running_statistics(bn, (3, 6, 5, 4), num_groups)
    for mean, var in MIXES:
        assert oracles.relative_error(set_gates(layer, mean, var)(x).detach(), bn(x).detach()) < 1e-12


@pytest.mark.parametrize("num_groups", [1, 2, 6])
def test_pure_ln_is_a_group_norm_with_another_weight_and_bias(backend: str, num_groups: int) -> None:
    bn = trained_norm()
    layer = set_gates(matched_layer(bn, num_groups=num_groups), [0, 1, 0], [0, 1, 0])
    mean, var = bn.running_mean.reshape(num_groups, -1), bn.running_var.reshape(num_groups, -1)  # type: ignore[union-attr]
    centre = mean.mean(1, keepdim=True)
    pooled = var.mean(1, keepdim=True) + (mean - centre).square().mean(1, keepdim=True)
    weight = bn.weight * ((pooled + EPS) / (var + EPS)).sqrt().flatten()
    bias = bn.bias - bn.weight * ((mean - centre) / (var + EPS).sqrt()).flatten()
    x = torch.randn(4, 6, 5, 5).double() * 3 + 1
    y = layer(x).detach()
    assert oracles.relative_error(y, F.group_norm(x, num_groups, weight, bias, EPS).detach()) < 1e-13
    # The output does not depend on gain and offset of a sample (with a tiny eps).
    layer.eps = 1e-20
    assert oracles.relative_error(layer(5 * x + 3).detach(), layer(x).detach()) < 1e-12


def test_the_constants_are_those_of_the_law_of_total_variance() -> None:
    mean, var = torch.randn(4).double(), torch.rand(4).double() + 0.1
    found = match_statistics(mean, var, EPS)
    centre = sum(mean) / 4
    pooled = sum(var) / 4 + sum((m - centre) ** 2 for m in mean) / 4
    torch.testing.assert_close(found.ln_mean_shift, (mean - centre) / (pooled + EPS) ** 0.5, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found.ln_var_scale, (var + EPS) / (pooled + EPS), rtol=1e-14, atol=0)
    assert found.in_var_scale is not None
    assert found.in_var_scale.tolist() == [1] * 4
    seen = match_statistics(mean, var, EPS, instance_var=var / 2)
    torch.testing.assert_close(seen.in_var_scale, (var + EPS) / (var / 2 + EPS), rtol=1e-14, atol=0)


UNUSABLE: dict[str, tuple[Tensor, Tensor, float]] = {
    "no variance, no eps": (torch.zeros(4), torch.zeros(4), 0.0),
    "untrained": (torch.zeros(4), torch.ones(4), 1e-5),
    "NaN": (torch.tensor([0.0, float("nan"), 1.0, 2.0]), torch.ones(4), 1e-5),
    "infinite": (torch.zeros(4), torch.tensor([1.0, float("inf"), 1.0, 2.0]), 1e-5),
    "negative": (torch.zeros(4), -torch.ones(4), 1e-5),
}


@pytest.mark.parametrize(("mean", "var", "eps"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_statistics_give_the_identity(mean: Tensor, var: Tensor, eps: float) -> None:
    shift, scale, in_scale = (each.tolist() for each in match_statistics(mean, var, eps) if each is not None)
    assert (shift, scale, in_scale) == ([0] * 4, [1] * 4, [1] * 4)


@pytest.mark.parametrize("training", [True, False])
def test_identity_constants_are_the_raw_layer(backend: str, training: bool) -> None:
    bn = nn.BatchNorm2d(6, dtype=torch.float64)
    x = torch.randn(3, 6, 4, 4).double()
    mix = [0.2, 0.5, 0.3], [0.6, 0.1, 0.3]
    raw = set_gates(SwitchNorm2d.from_batch_norm(bn, matched=False), *mix).train(training)
    matched = set_gates(SwitchNorm2d.from_batch_norm(bn), *mix).train(training)
    assert matched.matched
    assert not raw.matched
    assert oracles.relative_error(matched(x).detach(), raw(x).detach()) < 1e-15


# --- values and gradients of every backend


def constants(channels: int, which: str) -> Matching:
    shift, scale, in_scale = torch.randn(channels) * 0.3, torch.rand(channels) + 0.3, torch.rand(channels) + 0.3
    shift[0] = 0
    ln = (shift.double(), scale.double()) if "ln" in which else (None, None)
    return Matching(*ln, in_scale.double() if "in" in which else None)


# (branches, importance weights of means and variances, number of groups, which branches are matched, `bn` uses)
CASES: list[tuple[tuple[Any, ...], list[float], list[float], int, str, Any]] = [
    (BRANCHES, [0.2, 0.5, 0.3], [0.6, 0.1, 0.3], 1, "ln in", "running"),
    (BRANCHES, [0.2, 0.5, 0.3], [0.6, 0.1, 0.3], 2, "ln in", "batch"),
    (BRANCHES, [0.2, 0.5, 0.3], [0.6, 0.1, 0.3], 2, "", "renorm"),
    (BRANCHES, [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], 4, "ln", "running"),
    (BRANCHES, [0.0, 0.0, 1.0], [0.0, 1.0, 0.0], 1, "ln in", "batch"),
    (("in", "ln"), [0.3, 0.7], [0.6, 0.4], 2, "ln in", "running"),
    (("ln", "bn"), [0.3, 0.7], [0.6, 0.4], 1, "ln", "running"),
    (("in", "bn"), [0.3, 0.7], [0.6, 0.4], 1, "in", "batch"),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "3-D": lambda x: x.flatten(2),
}


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "AVAILABLE", False)


@pytest.fixture(params=["reference", "native", "without extension"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "without extension":
        request.getfixturevalue("without_extension")
    elif request.param == "native" and not cpu.AVAILABLE:
        pytest.skip("needs the C extension")
    name = "native" if request.param == "without extension" else request.param
    with normswap.use_backend(name):
        yield name


@dataclass
class Problem:
    """The inputs of a layer, in float64, and what the oracle finds."""

    leaves: dict[str, Tensor]
    running: tuple[Tensor, Tensor]
    dy: Tensor
    options: dict[str, Any]
    expected_y: Tensor
    expected: oracles.Gradients


def problem(case: Any, of: Callable[[Tensor], Tensor], gate: Any = "simplex") -> Problem:
    branches, mean, var, num_groups, which, mode = case
    x = of(torch.randn(3, 4, 3, 2).double() * 1.5 + 0.7)
    leaves = {"x": x, "weight": torch.rand(4).double() + 0.5, "bias": torch.randn(4).double()}
    leaves |= {"mean_weight": torch.tensor(mean).double(), "var_weight": torch.tensor(var).double()}
    leaves |= {name: leaves[name] / leaves[name].sum() for name in ("mean_weight", "var_weight")}
    dy, matching = torch.randn(x.shape).double(), constants(4, which)
    statistics = oracles.Constants(torch.randn(4).double(), torch.rand(4).double() + 0.5)
    used = {"running": statistics, "batch": None, "renorm": oracles.updated_running(statistics, x, 0.3)}[mode]
    expected_y, expected = oracles.switch_norm(
        dy=dy,
        **leaves,
        gate=gate,
        branches=branches,
        constants=used,
        follows_batch=mode == "renorm",
        layer=oracles.Layer(EPS, num_groups, *matching),
    )
    options = {"branches": branches, "bn_statistics": mode, "matching": matching, "num_groups": num_groups}
    options |= {"gate": gate, "training": True, "momentum": 0.3, "eps": EPS}
    for leaf in leaves.values():
        leaf.requires_grad_()
    return Problem(leaves, (statistics.mean, statistics.var), dy, options, expected_y, expected)


@pytest.mark.parametrize("of", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=map(str, range(len(CASES))))
def test_values_and_all_gradients_equal_the_oracle(backend: str, case: Any, of: Callable[[Tensor], Tensor]) -> None:
    given = problem(case, of)
    y = switch_norm(**given.leaves, running_mean=given.running[0], running_var=given.running[1], **given.options)
    assert oracles.relative_error(y.detach(), given.expected_y) < 1e-12
    y.backward(given.dy)
    for name, leaf in given.leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, getattr(given.expected, name), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", CASES[:2], ids=["one group", "two groups"])
def test_float32_and_half_precision_round_once(backend: str, case: Any) -> None:
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        given = problem(case, lambda x: x, "softmax")
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in given.leaves.items()}
        running = (tensor.to(dtype) for tensor in given.running)
        y = switch_norm(
            leaves.pop("x"),
            **leaves,
            **dict(zip(("running_mean", "running_var"), running, strict=True)),
            **given.options,
        )
        assert y.dtype == dtype
        assert oracles.relative_error(y.detach(), given.expected_y) < tolerance


@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=["three branches", "groups"])
def test_second_derivatives(backend: str, case: Any) -> None:
    given = problem(case, lambda x: x[:2, :, :2], "softmax")
    leaves = [leaf.detach().requires_grad_() for leaf in given.leaves.values()]

    def of(*tensors: Tensor) -> Tensor:
        named = dict(zip(given.leaves, tensors, strict=True))
        return switch_norm(**named, running_mean=given.running[0], running_var=given.running[1], **given.options)

    assert torch.autograd.gradcheck(of, leaves)
    assert torch.autograd.gradgradcheck(of, leaves)


def test_a_weight_of_zero_ignores_what_is_infinite(backend: str) -> None:
    x = torch.randn(2, 4, 3, 3).double()
    x[0] = 1e200  # variance of pooled values overflows
    x[0, 0] = -1e200
    leaf, layer = x.requires_grad_(), matched_layer(trained_norm(4))
    y = layer(leaf)
    assert bool(y.isfinite().all())
    y[1].sum().backward()
    assert leaf.grad is not None
    assert bool(leaf.grad[1].isfinite().all())
    assert bool(layer.weight.grad.isfinite().all())  # type: ignore[union-attr]


def test_a_constant_input_is_finite(backend: str) -> None:
    layer = set_gates(matched_layer(trained_norm(4), num_groups=2), [0.2, 0.5, 0.3], [0.5, 0.5, 0.0])
    leaf = torch.full((2, 4, 3, 3), 2.0).double().requires_grad_()
    y = layer(leaf)
    y.square().sum().backward()
    assert bool(y.isfinite().all())
    assert bool(leaf.grad.isfinite().all())  # type: ignore[union-attr]


def test_all_weight_on_bn_with_frozen_gates_is_the_kernel_of_bn(backend: str) -> None:
    bn, x = trained_norm(), torch.randn(2, 6, 4, 4).double()
    layer = matched_layer(bn).requires_grad_(False)
    assert layer(x).equal(bn.requires_grad_(False)(x)) or backend == "reference"


# --- torch.func, compilers, exporters


def trained_layer(num_groups: int) -> SwitchNorm2d:
    layer = set_gates(matched_layer(trained_norm(), num_groups=num_groups), [0.2, 0.5, 0.3], [0.6, 0.1, 0.3])
    layer.in_var_scale.fill_(1.5)
    return layer.train()  # type: ignore[no-any-return]


@pytest.mark.parametrize("num_groups", [1, 3])
def test_gradients_per_sample_equal_those_of_one_sample_at_a_time(num_groups: int) -> None:
    layer, x = trained_layer(num_groups), torch.randn(4, 6, 3, 3).double()
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())

    def loss(parameters: Any, sample: Tensor) -> Tensor:
        y: Tensor = functional_call(layer, (parameters, buffers), (sample[None],))
        return y.pow(3).sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for n, sample in enumerate(x):
        expected = torch.autograd.grad(layer(sample[None]).pow(3).sum(), [*parameters.values()])
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(each[name][n], gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("num_groups", [1, 3])
def test_compiled_graphs_and_exports_compute_the_same(num_groups: int) -> None:
    layer, x = trained_layer(num_groups), torch.randn(4, 6, 3, 3).double()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for module in (layer, compiled):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        layer.zero_grad()
        y.pow(3).sum().backward()
        results.append((y.detach(), leaf.grad, *(p.grad for p in layer.parameters())))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    exported = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), layer(x), rtol=1e-12, atol=1e-12)


# opcheck itself reads gradients of tensors that are no leaves.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("constant", [False, True])
def test_operators_with_constants_pass_opcheck(constant: bool) -> None:
    tensors = [torch.randn(3, 4, 2, 3), torch.rand(3), torch.rand(3), torch.rand(4), torch.rand(4)]
    inputs = [tensor.double().requires_grad_() for tensor in tensors]
    moments = (torch.zeros(1, 4).double(), torch.ones(1, 4).double()) if constant else (None, None)
    arguments = (*inputs, *moments, "softmax", "in ln bn", 1e-5, 2, *constants(4, "ln in"))
    torch.library.opcheck(torch.ops.normswap.switch_norm.default, arguments)


# --- construction, state dicts, copies


def test_num_groups_must_divide_the_channels() -> None:
    message = "num_groups: expected a positive integer that divides the number of channels, 6, got 4"
    with pytest.raises(LayerError, match=message):
        SwitchNorm2d(6, num_groups=4)
    with pytest.raises(LayerError, match=message):
        normswap.switch_norm(torch.randn(2, 6, 4, 4), torch.ones(3), torch.ones(3), training=True, num_groups=4)
    with pytest.raises(LayerError, match=message):
        matched_layer(trained_norm(), num_groups=4)
    with pytest.raises(LayerError, match="num_groups: expected a positive integer, got 0"):
        FunctionalSwitchNorm(gate="simplex", branches=BRANCHES, num_groups=0)
    assert "num_groups=3" in repr(SwitchNorm2d(6, num_groups=3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.ones(5), torch.ones(5), None), "ln_mean_shift should contain 6 elements not 5"),
        ((torch.ones(6), None, None), "ln_mean_shift and ln_var_scale must either both be None"),
        ((None, None, torch.ones(6, dtype=torch.long)), "in_var_scale should be a floating tensor"),
        ((None, None, [1.0] * 6), "in_var_scale: expected a tensor, got a value of type list"),
    ],
)
def test_wrong_constants_are_refused(given: Any, message: str) -> None:
    x, gate = torch.randn(2, 6, 4, 4), torch.ones(3)
    with pytest.raises((LayerError, normswap.ArgumentError), match=message):
        normswap.switch_norm(x, gate, gate, training=True, matching=Matching(*given))


def test_only_mixed_branches_have_constants() -> None:
    bn = trained_norm()
    for branches, names in (
        (("in", "bn"), {"in_var_scale"}),
        (("ln", "bn"), {"ln_mean_shift", "ln_var_scale"}),
        (("bn",), set()),
    ):
        layer = matched_layer(bn, branches=branches)
        assert layer.state_dict().keys() & MATCHING_BUFFERS.keys() == names
        assert layer.matched == bool(names)
        assert all((getattr(layer, name) is not None) == (name in names) for name in MATCHING_BUFFERS)
        layer.mean_weight.data.fill_(1 / len(branches))
        assert bool(layer(torch.randn(2, 6, 3, 3).double()).isfinite().all())
    for raw in (SwitchNorm2d(6), SwitchNorm2d.from_batch_norm(bn, gate="softmax"), matched_layer(bn).matching):
        assert not isinstance(raw, SwitchNorm) or not raw.matched


def test_a_state_dict_without_constants_is_matched_to_its_running_statistics() -> None:
    bn = trained_norm()
    layer = matched_layer(bn)
    other = matched_layer(nn.BatchNorm2d(6, eps=EPS, dtype=torch.float64))
    stored = {name: value for name, value in layer.state_dict().items() if name not in MATCHING_BUFFERS}
    other.load_state_dict(stored)
    assert all(value.equal(layer.state_dict()[name]) for name, value in other.state_dict().items())
    # A state dict of BN lacks the gates too; strict loading reports only these.
    third = matched_layer(nn.BatchNorm2d(6, eps=EPS, dtype=torch.float64))
    assert third.load_state_dict(bn.state_dict(), strict=False).missing_keys == ["mean_weight", "var_weight"]
    assert third.ln_mean_shift.equal(layer.ln_mean_shift)  # type: ignore[union-attr, arg-type]
    # Stored constants are loaded as they are.
    fourth = matched_layer(nn.BatchNorm2d(6, eps=EPS, dtype=torch.float64))
    layer.in_var_scale.fill_(3)  # type: ignore[union-attr]
    fourth.load_state_dict(layer.state_dict())
    assert all(value.equal(layer.state_dict()[name]) for name, value in fourth.state_dict().items())
    # Without statistics the constants are the identity.
    started = matched_layer(bn, start="ln")
    started.load_state_dict({k: v for k, v in started.state_dict().items() if k not in MATCHING_BUFFERS})
    assert started.ln_mean_shift.eq(0).all()  # type: ignore[union-attr]


COPIES: dict[str, Callable[[SwitchNorm2d], SwitchNorm2d]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "state dict by assignment": lambda layer: assigned(layer),
}


def assigned(layer: SwitchNorm2d) -> SwitchNorm2d:
    empty = matched_layer(nn.BatchNorm2d(6, eps=EPS, device="meta", dtype=torch.float64))
    assert empty.ln_mean_shift.is_meta  # type: ignore[union-attr]
    empty.load_state_dict(layer.state_dict(), assign=True)
    return empty


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies_compute_the_same(make_copy: Callable[[SwitchNorm2d], SwitchNorm2d]) -> None:
    layer = set_gates(matched_layer(trained_norm()), [0.2, 0.5, 0.3], [0.6, 0.1, 0.3])
    layer.in_var_scale.fill_(1.5)
    x = torch.randn(2, 6, 3, 3).double()
    assert make_copy(layer)(x).equal(layer(x))


def test_constants_follow_the_dtype_and_the_small_scales_survive_half_precision() -> None:
    bn = trained_norm()
    bn.running_var[0] = 0  # type: ignore[index]
    bn.running_var[1:] = 1e6  # type: ignore[index]
    layer = set_gates(matched_layer(bn), [0, 1, 0], [0, 1, 0]).half()
    assert layer.ln_var_scale.dtype == torch.float16
    assert bool(layer(torch.randn(2, 6, 3, 3).half()).isfinite().all())


def test_resetting_gives_the_identity() -> None:
    layer = matched_layer(trained_norm())
    assert "matched=True" in repr(layer)
    layer.reset_parameters()
    assert layer.ln_mean_shift.tolist() == [0] * 6  # type: ignore[union-attr]
    assert layer.ln_var_scale.tolist() == layer.in_var_scale.tolist() == [1] * 6  # type: ignore[union-attr]
    assert layer.is_at("bn")


# --- match_to


def test_match_to_writes_the_constants_in_place() -> None:
    layer, bn = matched_layer(nn.BatchNorm2d(6, eps=EPS, dtype=torch.float64)), trained_norm()
    buffers = [layer.get_buffer(name) for name in MATCHING_BUFFERS]
    layer.match_to(bn.running_mean, bn.running_var)  # type: ignore[arg-type]
    expected = match_statistics(bn.running_mean, bn.running_var, EPS)  # type: ignore[arg-type]
    for buffer, name, value in zip(buffers, MATCHING_BUFFERS, expected, strict=True):
        assert layer.get_buffer(name) is buffer
        assert buffer.equal(value)  # type: ignore[arg-type]
    seen = torch.rand(6).double()
    layer.match_to(bn.running_mean, bn.running_var, instance_var=seen)  # type: ignore[arg-type]
    assert layer.in_var_scale.allclose((bn.running_var + EPS) / (seen + EPS))  # type: ignore[union-attr, operator]
    layer.match_to(bn.running_mean, bn.running_var)  # type: ignore[arg-type]
    assert layer.in_var_scale.ne(1).any()  # type: ignore[union-attr]
    with pytest.raises(LayerError, match="running_mean should have the shape"):
        layer.match_to(torch.zeros(5), torch.ones(5))
    with pytest.raises(LayerError, match="expected a matched layer, got a SwitchNorm2d without matching constants"):
        SwitchNorm2d(6).match_to(torch.zeros(6), torch.ones(6))


def test_a_functional_site_is_matched_like_a_layer() -> None:
    bn = trained_norm()
    site = FunctionalSwitchNorm(
        gate="simplex", branches=BRANCHES, bn_statistics="running", num_groups=2, matched_channels=6
    ).double()
    site.match_to(bn.running_mean, bn.running_var, eps=EPS)  # type: ignore[arg-type]
    layer = matched_layer(bn, num_groups=2)
    x, mix = torch.randn(2, 6, 4, 4).double(), ([0.2, 0.5, 0.3], [0.6, 0.1, 0.3])
    arguments: Any = (bn.running_mean, bn.running_var, bn.weight, bn.bias, True, 0.1, EPS)
    y = set_gates(site, *mix)(x, *arguments)
    assert oracles.relative_error(y.detach(), set_gates(layer, *mix)(x).detach()) < 1e-15
    assert "num_groups=2, matched=True" in repr(site)
    assert {*site.state_dict()} == {"mean_weight", "var_weight", *MATCHING_BUFFERS}
    site.reset_parameters()
    assert site.ln_mean_shift.eq(0).all()  # type: ignore[union-attr]
    started = FunctionalSwitchNorm(gate="simplex", branches=("in", "ln"), vertex="ln")
    assert started.mean_weight.tolist() == [0, 1]
    assert FunctionalSwitchNorm(gate="simplex", branches=("in", "ln")).mean_weight.tolist() == [0.5, 0.5]


# --- start


@pytest.mark.parametrize(("start", "point"), [("ln", [0, 1]), ("gn", [0, 1]), ("uniform", [0.5, 0.5])])
def test_a_layer_that_starts_without_bn_depends_on_no_batch(start: str, point: list[float]) -> None:
    bn = trained_norm()
    layer = matched_layer(bn, start=start, num_groups=2 if start == "gn" else 1)
    assert layer.branches == ("in", "ln")
    assert layer.mean_weight.tolist() == layer.var_weight.tolist() == point
    assert {*layer.state_dict()} == {"weight", "bias", "mean_weight", "var_weight", *MATCHING_BUFFERS}
    assert not layer.track_running_stats
    x = torch.randn(3, 6, 5, 5).double()
    assert torch.cat([layer(sample) for sample in x.split(1)]).allclose(layer.train()(x), rtol=1e-12)  # type: ignore[no-untyped-call]
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert layer.mean_weight.tolist() == point
    layer.load_state_dict(before)
    with pytest.raises(SwapError, match="cannot put back BatchNorm2d: the layer started without `bn`"):
        revert_module(layer)


def test_a_start_without_branches_is_refused() -> None:
    with pytest.raises(LayerError, match="branches: expected `in` or `ln` among them for start='uniform'"):
        matched_layer(trained_norm(), branches=("bn",), start="uniform")


def test_a_group_norm_of_several_groups_keeps_its_function() -> None:
    norm = nn.GroupNorm(3, 6, dtype=torch.float64)
    trained(norm)
    layer = copy.deepcopy(norm)
    convert_module(
        layer,
        SwitchNorm2d,
        gate="simplex",
        branches=BRANCHES,
        bn_statistics="batch",
        train_gates=True,
        vertex="ln",
    )
    assert layer.num_groups == 3
    x = torch.randn(2, 6, 4, 4).double()
    assert oracles.relative_error(layer(x).detach(), norm(x).detach()) < 1e-13
    revert_module(layer)
    assert type(layer) is nn.GroupNorm
    assert layer.num_groups == 3
    assert layer(x).equal(norm(x))


def test_reverting_a_matched_layer_removes_its_constants() -> None:
    bn = trained_norm()
    layer = matched_layer(bn)
    keys, buffers = list(bn.state_dict()), list(bn._buffers)
    revert_module(layer)
    assert list(layer.state_dict()) == keys
    assert list(layer._buffers) == buffers
    assert "num_groups" not in layer.__dict__


@pytest.mark.parametrize(
    ("sn_class", "shape"), [(SwitchNorm1d, (3, 6)), (SwitchNorm1d, (3, 6, 5)), (SwitchNorm3d, (2, 6, 2, 3, 2))]
)
def test_other_ranks(sn_class: type[SwitchNorm], shape: tuple[int, ...]) -> None:
    bn = trained({2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}[len(shape)](6, eps=EPS)).double().eval()
    layer = sn_class.from_batch_norm(copy.deepcopy(bn), branches=("ln", "bn"))
    x = like_running_statistics(bn, shape)
    set_gates(layer, [0.4, 0.6], [0.7, 0.3])
    assert oracles.relative_error(layer(x).detach(), bn(x).detach()) < 1e-12
