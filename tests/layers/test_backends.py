"""Fused backends: results of the plain formula, as exact as torch's norms, in every layout and mode."""

import itertools
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.errors import LayerError
from normswap.layers.backends import aten_passes, cpu, selection
from normswap.layers.backends.interface import Backend
from normswap.layers.functional import switch_norm
from normswap.layers.gating import BRANCHES, GATES, Branch, Gate, importance_weights, project, read_weights

# Passes run by the C extension if it was built, else by NumPy and torch.
COMPILED = pytest.mark.parametrize(
    "by_c",
    [
        pytest.param(True, id="C", marks=pytest.mark.skipif(not cpu.AVAILABLE, reason="built without a compiler")),
        pytest.param(False, id="no C"),
    ],
)

BRANCH_SETS: list[tuple[Branch, ...]] = [s for k in (1, 2, 3) for s in itertools.combinations(BRANCHES, k)]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def transposed(x: Tensor) -> Tensor:
    """Return the same values, neither contiguous nor channels_last."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "(N, C)": ((5, 4), torch.clone),
    "(N, C), transposed": ((5, 4), transposed),
    "(N, C, L)": ((3, 4, 7), torch.clone),
    "(N, C, L), transposed": ((3, 4, 7), transposed),
    "contiguous": ((3, 4, 5, 3), torch.clone),
    "channels_last": ((3, 4, 5, 3), channels_last),
    "transposed": ((3, 4, 5, 3), transposed),
    "one sample": ((1, 4, 5, 3), torch.clone),
    "one sample, channels_last": ((1, 4, 5, 3), channels_last),
    "one channel": ((3, 1, 5, 3), channels_last),
    "one position": ((3, 8, 1, 1), channels_last),
    "3-D": ((2, 3, 2, 3, 2), torch.clone),
    "3-D, channels_last": ((2, 3, 2, 3, 2), channels_last),
}
LAYOUT_CASES = pytest.mark.parametrize(("shape", "lay_out"), LAYOUTS.values(), ids=LAYOUTS)


def gate_points(gate: Gate, count: int, *, at_vertex: bool) -> tuple[Tensor, Tensor]:
    if at_vertex:
        point = torch.eye(count)[-1].double()
        return point, point.clone()
    mean, var = torch.rand(2, count).double() + 0.1
    return (mean / mean.sum(), var / var.sum()) if gate == "simplex" else (mean, var)


def run(backend: str, dy: Tensor, leaves: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Return y and all gradients of one backend, on copies of the leaves in the same layouts."""
    copies = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    statistics = {name: options[name].clone() for name in ("running_mean", "running_var")}
    with normswap.use_backend(backend):
        y = switch_norm(**copies, **(options | statistics))
        gradients = torch.autograd.grad(y, list(copies.values()), dy)
    return {"y": y.detach()} | dict(zip(copies, gradients, strict=True)) | statistics


@pytest.mark.slow
@COMPILED
@LAYOUT_CASES
@pytest.mark.parametrize("bn_statistics", ["batch", "running", "renorm"])
def test_backends_agree_in_every_layout(
    shape: tuple[int, ...],
    lay_out: Callable[[Tensor], Tensor],
    bn_statistics: str,
    by_c: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "AVAILABLE", by_c)
    positions = torch.Size(shape[2:]).numel()
    for branches, gate, at_vertex in itertools.product(BRANCH_SETS, GATES, (False, True)):
        if "in" in branches and positions == 1:
            continue
        mean_weight, var_weight = gate_points(gate, len(branches), at_vertex=at_vertex)
        affine = torch.rand(2, shape[1]).double() + 0.5
        x, dy = lay_out(torch.randn(shape).double() * 2 + 3), lay_out(torch.randn(shape).double())
        leaves = {"x": x, "mean_weight": mean_weight, "var_weight": var_weight, "weight": affine[0], "bias": affine[1]}
        options: dict[str, Any] = {"gate": gate, "branches": branches, "bn_statistics": bn_statistics}
        options |= {"running_mean": torch.randn(shape[1]).double(), "running_var": torch.rand(shape[1]).double() + 0.5}
        expected = run("reference", dy, leaves, training=True, **options)
        for name, value in run("native", dy, leaves, training=True, **options).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-10, msg=f"{name} {branches} {gate}")


@LAYOUT_CASES
def test_the_layout_is_that_of_batch_norm(shape: tuple[int, ...], lay_out: Callable[[Tensor], Tensor]) -> None:
    x = lay_out(torch.randn(shape)).requires_grad_()
    weights = torch.tensor([0.5, 0.5]).requires_grad_()
    y = switch_norm(x, weights, weights, branches=("ln", "bn"), gate="simplex", training=True)
    twin = F.batch_norm(x, None, None, training=True)
    assert y.stride() == twin.stride()
    for dy in (lay_out(torch.randn(shape)), torch.randn(shape), torch.randn(()).expand(shape)):
        (gradient,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        (expected,) = torch.autograd.grad(twin, x, dy, retain_graph=True)
        if x.is_contiguous() or aten_passes.is_channels_last(x):
            assert gradient.stride() == expected.stride()


# The limit is relative to torch: the largest error of its three norms on the same data.
TORCH_NORMS: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, training=True),
    lambda x, weight, bias: F.instance_norm(x, None, None, weight, bias),
    lambda x, weight, bias: F.group_norm(x, 1, weight, bias),
]
ACCURACY = {
    f"{str(dtype).removeprefix('torch.')}, {ratio:g}": (dtype, ratio)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for ratio in (0.0, 30.0, 3000.0)
}


def errors(function: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor) -> list[float]:
    """Return relative L2 errors of the value and of three gradients, compared with the function in float64."""

    def values(dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves[:3], dy.to(y.dtype))]

    with normswap.use_backend("reference"):
        exact = values(torch.float64)
    pairs = zip(values(None), exact, strict=True)
    return [float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs]


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3-D", "3-D, channels_last", "(N, C, L)"])
@pytest.mark.parametrize(("dtype", "ratio"), ACCURACY.values(), ids=ACCURACY)
def test_errors_are_at_most_twice_those_of_torchs_norms(
    dtype: torch.dtype, ratio: float, layout: str, by_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "AVAILABLE", by_c)
    # Where the mean is large, torch's kernel for the moments of single rows errs by one unit in the last place of it,
    # those of its norms by half of one, and gradients feel it more.
    factor = 4.0 if not by_c and dtype == torch.float32 and ratio > 0 else 2.0
    _, lay_out = LAYOUTS[layout]
    shape = {"(N, C, L)": (4, 8, 20)}.get(layout, (4, 8, 6, 7) if "3-D" not in layout else (2, 6, 3, 4, 5))
    x, dy = (lay_out((torch.randn(shape) + mean).to(dtype)) for mean in (ratio, 0.0))
    weight, bias = ((torch.rand(shape[1]) + 0.5).to(dtype) for _ in range(2))
    by_torch = [errors(norm, [x, weight, bias], dy) for norm in TORCH_NORMS]
    # Nothing is asked beyond the rounding of the result itself.
    limits = [factor * max(found) + torch.finfo(dtype).eps / 2 for found in zip(*by_torch, strict=True)]
    running = torch.full((shape[1],), ratio).to(dtype), torch.ones(shape[1]).to(dtype)
    for branches, gate, bn_statistics in itertools.product(BRANCH_SETS, GATES, ("batch", "running", "renorm")):
        gates = [point.float() for point in gate_points(gate, len(branches), at_vertex=False)]

        def layer(x: Tensor, weight: Tensor, bias: Tensor, *gates: Tensor, **options: Any) -> Tensor:
            statistics = [s.to(x.dtype) for s in running]
            return switch_norm(x, *gates, *statistics, weight, bias, True, 0.0, **options)

        def site(*values: Tensor, options: Any = (branches, gate, bn_statistics)) -> Tensor:
            names = ("branches", "gate", "bn_statistics")
            return layer(*values, **dict(zip(names, options, strict=True)))

        found = errors(site, [x, weight, bias, *gates], dy)
        assert all(map(float.__le__, found, limits)), (branches, gate, bn_statistics, found, limits)


def test_x_and_small_tables_are_all_that_is_saved() -> None:
    layer, x = normswap.SwitchNorm2d(8), torch.randn(4, 8, 16, 16, requires_grad=True)
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    parameters = sum(p.untyped_storage().nbytes() for p in layer.parameters())
    table = 4 * 8 * 4
    assert sum(sizes.values()) == x.untyped_storage().nbytes() + 2 * table + parameters


def test_an_activation_in_place_comes_after_it() -> None:
    layer, x = normswap.SwitchNorm2d(4).double(), torch.randn(3, 4, 5, 5).double()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    F.relu_(layer(leaves[0])).pow(2).sum().backward()
    F.relu(layer(leaves[1])).pow(2).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3-D, channels_last"])
@pytest.mark.parametrize("bn_statistics", ["batch", "running"])
def test_a_fixed_batch_norm_is_batch_norm_bit_for_bit(
    layout: str, bn_statistics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If all weight is on `bn` and no gate needs a gradient, the layer computes no moments."""
    shape, lay_out = LAYOUTS[layout]
    bn = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm3d)(shape[1]).eval()
    bn.running_mean, bn.running_var = torch.randn(shape[1]), torch.rand(shape[1]) + 0.5
    sn_class = normswap.SwitchNorm2d if len(shape) == 4 else normswap.SwitchNorm3d
    layer = sn_class.from_batch_norm(bn, bn_statistics=bn_statistics).train(bn_statistics == "running")  # type: ignore[arg-type]
    monkeypatch.setattr(selection, "_FUSED_BACKENDS", {"native": lambda: Backend("none", None, None)})  # type: ignore[arg-type]
    x = lay_out(torch.randn(shape))
    with torch.no_grad():
        assert layer(x).equal(bn(x))
    layer.mean_weight.requires_grad_(False)
    layer.var_weight.requires_grad_(False)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for module, leaf in zip((layer, bn), leaves, strict=True):
        module(leaf).pow(2).sum().backward()
    assert leaves[0].grad is not None
    assert leaves[0].grad.equal(leaves[1].grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "3-D, channels_last"])
def test_a_fixed_batch_norm_has_the_gradients_of_its_forward_pass(layout: str) -> None:
    """The kernel of BatchNorm saves the running statistics, which may change before the backward pass."""
    shape, lay_out = LAYOUTS[layout]
    bn = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm3d)(shape[1]).eval()
    bn.running_mean, bn.running_var = torch.randn(shape[1]), torch.rand(shape[1]) + 0.5
    layer = (normswap.SwitchNorm2d if len(shape) == 4 else normswap.SwitchNorm3d).from_batch_norm(bn).train()
    layer.mean_weight.requires_grad_(False)
    layer.var_weight.requires_grad_(False)
    leaves = [lay_out(torch.randn(shape)).requires_grad_()]
    leaves.append(leaves[0].detach().clone().requires_grad_())
    y, expected = layer(leaves[0]), bn(leaves[1])
    assert y.equal(expected)
    expected.pow(2).sum().backward()
    assert layer.running_mean is not None
    layer.running_mean.add_(1)
    y.pow(2).sum().backward()
    for tensor, truth in ((leaves[0], leaves[1]), (layer.weight, bn.weight), (layer.bias, bn.bias)):
        assert tensor is not None
        assert tensor.grad is not None
        assert tensor.grad.equal(truth.grad)  # type: ignore[arg-type]


def test_frozen_gates_off_the_vertex_keep_their_mix() -> None:
    layer = normswap.SwitchNorm2d(4, gate="simplex").eval().requires_grad_(False)
    x = torch.randn(3, 4, 5, 5)
    with normswap.use_backend("reference"):
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(expected, F.batch_norm(x, layer.running_mean, layer.running_var))


def test_only_needed_gradients_are_computed() -> None:
    layer = normswap.SwitchNorm2d(4).double()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in ("var_weight", "bias"))
    x = torch.randn(3, 4, 5, 5).double()
    grads: dict[str, list[Tensor | None]] = {}
    for backend in ("native", "reference"):
        layer.zero_grad()
        with normswap.use_backend(backend):
            layer(x).pow(3).sum().backward()
        grads[backend] = [parameter.grad for parameter in layer.parameters()]
    assert [g is None for g in grads["native"]] == [True, False, True, False]
    for found, expected in zip(grads["native"], grads["reference"], strict=True):
        torch.testing.assert_close(found, expected)


# --- the extension


def test_the_extension_exists_if_it_can_be_built() -> None:
    """The build is optional, so without this test a mistake in it would only cost speed."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    command = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if header.exists() and shutil.which(command):
        assert cpu.AVAILABLE


@pytest.mark.skipif(not cpu.AVAILABLE, reason="built without a compiler")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 2, 40, 3), (3, 17, 5, 9), (2, 33, 1, 19)])
def test_a_first_value_far_out_costs_no_digits(layout: str, shape: tuple[int, ...]) -> None:
    """Squares are summed around the first value of a row, and again around the mean if it is far away."""
    x = torch.randn(shape)
    x[:, :, 0, 0] += 1e5
    x[0, 0, :, :] = 7.25  # and one row without any variance
    x = LAYOUTS[layout][1](x)
    weights = torch.tensor([1.0])
    y = switch_norm(x, weights, weights, branches=("in",), gate="simplex", training=True)
    expected = F.instance_norm(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not cpu.AVAILABLE, reason="built without a compiler")
def test_values_that_are_not_finite_equal_those_of_torch() -> None:
    for value in (float("nan"), float("inf")):
        x = torch.randn(2, 3, 4, 4)
        x[0, 1, 2, 2] = value
        weights = torch.tensor([0.5, 0.0, 0.5])
        found = switch_norm(x, weights, weights, training=True, gate="simplex")
        with normswap.use_backend("reference"):
            expected = switch_norm(x, weights, weights, training=True, gate="simplex")
        torch.testing.assert_close(found, expected, equal_nan=True)


# Sizes with several threads; in the last two a channels_last sample is divided into segments.
SHARED_SHAPES = [(3, 40, 17, 33), (1, 8, 130, 131), (2, 3, 6, 70, 90)]
NEEDS_C = pytest.mark.skipif(not cpu.AVAILABLE, reason="built without a compiler")


@NEEDS_C
def test_the_extension_finds_the_threads_of_torch() -> None:
    """Without this test a failure would only cost speed."""
    if sys.platform == "linux" and torch.backends.openmp.is_available():
        assert cpu._USES_TORCH_THREADS


@pytest.mark.slow
@NEEDS_C
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHARED_SHAPES)
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x, dy = (LAYOUTS[layout][1](torch.randn(shape).to(dtype)) for _ in range(2))
    leaves = {"x": x, "weight": torch.rand(shape[1]), "bias": torch.rand(shape[1])}
    leaves |= {"mean_weight": torch.tensor([0.2, 0.3, 0.5]), "var_weight": torch.tensor([0.5, 0.2, 0.3])}
    statistics = {"running_mean": torch.rand(shape[1]), "running_var": torch.rand(shape[1])}
    for training in (True, False):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run("native", dy, leaves, training=training, gate="simplex", **statistics))
        for other in found[1:]:
            assert all(other[name].equal(value) for name, value in found[0].items())


@pytest.mark.slow
@NEEDS_C
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHARED_SHAPES)
def test_large_activations_agree_with_the_plain_formula(shape: tuple[int, ...], training: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    x, dy = (channels_last(torch.randn(shape).double() + 3) for _ in range(2))
    leaves = {"x": x, "weight": torch.rand(shape[1]).double(), "bias": torch.rand(shape[1]).double()}
    leaves |= {name: torch.tensor([0.2, 0.3, 0.5]).double() for name in ("mean_weight", "var_weight")}
    statistics = {"running_mean": torch.rand(shape[1]).double(), "running_var": torch.rand(shape[1]).double()}
    expected, found = (
        run(backend, dy, leaves, training=training, gate="simplex", **statistics) for backend in ("reference", "native")
    )
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-9, msg=name)


@NEEDS_C
def test_large_activations_use_torch_if_its_threads_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.Size] = []
    served = cpu.extension_forward
    monkeypatch.setattr(cpu, "extension_forward", lambda inputs: [seen.append(inputs.x.shape), served(inputs)][1])
    layer, small, large = normswap.SwitchNorm2d(4), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 512, 512)
    for threads, shares in ((2, True), (1, False), (2, False)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(cpu, "_USES_TORCH_THREADS", shares)
        layer(small)
        layer(large)
    assert seen == [small.shape, large.shape] * 2 + [small.shape]


@NEEDS_C
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number_is_read_and_rounded_as_torch_does(dtype: torch.dtype, layout: str) -> None:
    """With mean 0, variance 1 and eps 0 a layer computes one product and one sum in float32."""
    every = torch.arange(-(2**15), 2**15).short().view(dtype).view(1, 4, 128, 128)
    x, zeros, ones = LAYOUTS[layout][1](every), torch.zeros(4), torch.ones(4)
    point = torch.ones(1, requires_grad=True)  # else the kernel of batch normalization does it
    for factor, term in ((1.0, 0.0), (1.1, 0.0), (3e-5, 0.0), (1.0, 65504.0), (2.0, 1e-5)):
        weight, bias = torch.full((4,), factor), torch.full((4,), term)
        y = switch_norm(x, point, point, zeros, ones, weight, bias, eps=0.0, branches=("bn",), gate="simplex")
        # Exact in float64, since both are short numbers, so that it is rounded as by one operation.
        expected = torch.where(every.isnan(), every.float(), (every.double() * weight[0] + bias[0]).float()).to(dtype)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(0.0), expected.nan_to_num(0.0))


@NEEDS_C
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gates_off_the_simplex_are_read_as_the_plain_formula_reads_them(dtype: torch.dtype) -> None:
    x, dy = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    statistics = {"running_mean": torch.zeros(3).double(), "running_var": torch.ones(3).double()}
    points = [[0.5, 0.5, 0.5], [-1.0, 3.0, 0.2], [100.0, 100.5, 99.0], [0.0, 0.0, 1.0]]
    for gate, mean, var in itertools.product(GATES, points, points):
        leaves = {"x": x, "mean_weight": torch.tensor(mean).to(dtype), "var_weight": torch.tensor(var).to(dtype)}
        expected, found = (
            run(backend, dy, leaves, training=True, gate=gate, **statistics) for backend in ("reference", "native")
        )
        for name, value in found.items():
            loose = {"rtol": 2e-2, "atol": 1e-3} if value.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(value, expected[name], **loose, msg=f"{name} {gate} {mean} {var}")


@NEEDS_C
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_statistics_update_as_in_batch_norm_and_change_their_version(dtype: torch.dtype) -> None:
    layer, bn = normswap.SwitchNorm2d(3).to(dtype), nn.BatchNorm2d(3)
    for _ in range(3):
        x, versions = torch.randn(4, 3, 5, 5).to(dtype) + 1, [buffer._version for buffer in layer.buffers()]
        layer(x)
        bn(x.float())
        assert all(buffer._version > old for buffer, old in zip(layer.buffers(), versions, strict=True))
    for found, expected in zip(layer.buffers(), bn.buffers(), strict=True):
        torch.testing.assert_close(found.to(expected.dtype), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@NEEDS_C
def test_the_extension_refuses_calls_that_make_no_sense() -> None:
    for function, count in ((cpu._C.forward, 26), (cpu._C.backward, 28), (cpu._C.update_running, 8)):
        with pytest.raises(TypeError, match=f"expected a dict of {count} arguments"):
            function(0)
    with pytest.raises(TypeError, match="expected 3 arguments, got 1"):
        cpu._C.use_threads(0)


# --- the choice of the backend


def test_the_default_on_cpu_is_native() -> None:
    backend = selection.fused_backend(torch.ones(1))
    assert backend is not None
    assert backend.name == "native"


def test_use_backend_is_undone_and_nests() -> None:
    x = torch.ones(1)
    with normswap.use_backend("reference"):
        assert selection.fused_backend(x) is None
        with normswap.use_backend("native"):
            assert selection.fused_backend(x) is not None
        assert selection.fused_backend(x) is None
    assert selection.fused_backend(x) is not None


def renewed(x: Tensor, *leaves: Tensor) -> Tensor:
    statistics = torch.linspace(-1, 1, 4).double(), torch.linspace(0.5, 2, 4).double()
    return switch_norm(x, *leaves[:2], *statistics, *leaves[2:], training=True, bn_statistics="renorm")


def renewed_leaves() -> list[Tensor]:
    shapes = ((3, 4, 2, 3), (3,), (3,), (4,), (4,))
    return [torch.randn(shape).double().requires_grad_() for shape in shapes]


def test_second_derivatives_with_renorm() -> None:
    """Their values are constants, also in second derivatives."""
    leaves, found = renewed_leaves(), {}
    for backend in ("native", "reference"):
        with normswap.use_backend(backend):
            slopes = torch.autograd.grad(renewed(*leaves).pow(3).sum(), leaves, create_graph=True)
            found[backend] = torch.autograd.grad(sum(slope.pow(2).sum() for slope in slopes), leaves)
    torch.testing.assert_close(found["native"], found["reference"], rtol=1e-9, atol=1e-9)


def test_renorm_does_not_use_a_backend_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = renewed_leaves()
    expected = renewed(*leaves)
    monkeypatch.setattr(selection, "_FUSED_BACKENDS", {"native": lambda: Backend("none", None, None)})  # type: ignore[arg-type]
    torch.testing.assert_close(renewed(*leaves), expected)


def test_unknown_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "use_backend: expected one of ('reference', 'native', 'triton'), got 'cudnn'"
    with pytest.raises(LayerError, match=re.escape(message)), normswap.use_backend("cudnn"):
        pass
    monkeypatch.setattr(selection, "_from_environment", "fast")
    with pytest.raises(LayerError, match="NORMSWAP_BACKEND: expected one of"):
        normswap.SwitchNorm2d(2)(torch.randn(2, 2, 3, 3))
    monkeypatch.setattr(selection, "_from_environment", "reference")
    assert selection.fused_backend(torch.ones(1)) is None


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:FutureWarning")  # exporters of old still use it
def test_tensors_that_are_not_eager_get_the_plain_formula() -> None:
    seen = []

    def note(x: Tensor) -> Tensor:
        seen.append(selection.is_eager(x))
        return x

    torch.func.vmap(note)(torch.ones(2))
    torch.jit.trace(note, torch.ones(2), check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        note(torch.ones(2))
    note(torch.ones(2, device="meta"))
    with torch._subclasses.FakeTensorMode() as mode:
        note(torch.ones(2))
    note(mode.from_tensor(torch.ones(2)))
    assert seen == [False] * len(seen)
    assert len(seen) == 6
    note(nn.Parameter(torch.ones(2)))
    assert seen[-1]


# torch compiles its forward-mode formulas with its deprecated scripting compiler.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_forward_mode_derivatives() -> None:
    layer, x = normswap.SwitchNorm2d(3).double(), torch.randn(2, 3, 4, 4).double()
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, tangent))
        slope = torch.autograd.forward_ad.unpack_dual(y).tangent
    layer.eval()
    assert slope is not None
    layer.train()
    difference = (layer(x + 1e-6 * tangent) - layer(x - 1e-6 * tangent)) / 2e-6
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-7)


# --- operators of compiled graphs


# opcheck itself reads gradients of tensors that are no leaves.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("branches", "constant"), [("in ln bn", False), ("ln bn", True)])
def test_the_operator_passes_opcheck(branches: str, constant: bool) -> None:
    count = len(branches.split())
    tensors = [torch.randn(3, 4, 2, 3), torch.rand(count), torch.rand(count), torch.rand(4), torch.rand(4)]
    inputs = [tensor.double().requires_grad_() for tensor in tensors]
    constants = (torch.zeros(1, 4).double(), torch.ones(1, 4).double()) if constant else (None, None)
    torch.library.opcheck(torch.ops.normswap.switch_norm.default, (*inputs, *constants, "softmax", branches, 1e-5))


def test_the_operator_of_the_update_passes_opcheck() -> None:
    statistics = torch.zeros(4).double(), torch.ones(4).double(), torch.tensor(0)
    batch = torch.randn(1, 4).double(), torch.rand(1, 4).double()
    operator = torch.ops.normswap.update_running_stats.default
    torch.library.opcheck(operator, (*statistics, 0.1, 12, *batch))
    torch.library.opcheck(operator, (*statistics[:2], None, 0.1, 12, *batch))


@pytest.mark.parametrize("training", [True, False])
def test_a_forced_backend_is_one_node_of_a_compiled_graph(training: bool) -> None:
    layer = normswap.SwitchNorm2d(4).double().train(training)
    targets: list[str] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    leaves = [torch.randn(3, 4, 5, 5).double().requires_grad_()]
    leaves.append(leaves[0].detach().clone().requires_grad_())
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with normswap.use_backend("native"):
        y = compiled(leaves[0])
    twin = normswap.SwitchNorm2d(4).double().train(training)
    twin.load_state_dict(before)
    expected = twin(leaves[1])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dict(layer.state_dict()), dict(twin.state_dict()))
    for value in (y, expected):
        value.pow(3).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    assert [t for t in targets if "normswap" in t] == ["normswap.switch_norm.default"]


# --- gates on Python numbers


@pytest.mark.parametrize("gate", GATES)
def test_weights_on_numbers_are_those_on_tensors(gate: Gate) -> None:
    for count, scale in itertools.product((1, 2, 3), (0.1, 1.0, 30.0)):
        for point in torch.randn(20, count).double() * scale:
            numbers, tensor = read_weights(point, gate), importance_weights(point, gate)
            torch.testing.assert_close(torch.tensor(numbers, dtype=torch.float64), tensor, rtol=1e-12, atol=1e-12)
    assert project([0.0, 1.0, 0.0]) == [0, 1, 0]
    assert all(value != value for value in project([float("nan"), 0.0, 1.0]))
