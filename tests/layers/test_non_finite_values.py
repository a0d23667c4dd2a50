"""Statistics that are not finite: a layer with all weight on `bn` equals BN, and no gate gets a NaN."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import normswap
from normswap import SwitchNorm2d
from normswap.layers.backends import cpu
from normswap.layers.functional import switch_norm

try:
    import triton  # noqa: F401 - `conftest.py` has asked for its interpreter
except ImportError:
    HAS_TRITON = False
else:
    HAS_TRITON = True

INF, NAN = math.inf, math.nan
BACKENDS = {
    "reference": ("reference", False),
    "native, by C": ("native", True),
    "native, without C": ("native", False),
    "triton": ("triton", False),
}
BACKEND_CASES = pytest.mark.parametrize(("backend", "by_c"), BACKENDS.values(), ids=BACKENDS)
# Triton's interpreter is slow: each dtype and each layout only once.
FORMS = pytest.mark.parametrize(
    ("backend", "by_c", "dtype", "layout"),
    [
        pytest.param(*how, dtype, layout, id=f"{name}-{dtype}-{layout}", marks=[pytest.mark.slow] * (name == "triton"))
        for name, how in BACKENDS.items()
        for dtype in (torch.float32, torch.bfloat16)
        for layout in (torch.contiguous_format, torch.channels_last)
        if name != "triton" or (dtype == torch.float32) == (layout == torch.contiguous_format)
    ],
)
# Values of channel 2 of running mean and running variance, and the factor of x in that channel.
CASES: dict[str, tuple[float, float, float]] = {
    "variance infinite": (0.3, INF, 1),
    "mean infinite": (INF, 1, 1),
    "mean minus infinite": (-INF, 2, 1),
    "both infinite": (INF, INF, 1),
    "variance NaN": (0.3, NAN, 1),
    "mean NaN": (NAN, 1, 1),
    "squares of x overflow": (0.3, 1, 1e25),
}


@pytest.fixture(autouse=True)
def _infinities_pass_as_on_a_device() -> Any:
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bool], Any]:
    def chosen(backend: str, by_c: bool) -> Any:
        if by_c and not cpu.AVAILABLE:
            pytest.skip("built without a compiler")
        if backend == "triton" and not HAS_TRITON:
            pytest.skip("no Triton")
        monkeypatch.setattr(cpu, "AVAILABLE", by_c)
        return normswap.use_backend(backend)

    return chosen


def statistics(case: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
    mean, var = torch.rand(6), torch.rand(6) + 0.5
    mean[2], var[2] = case[:2]
    return mean, var


@FORMS
@pytest.mark.parametrize("mode", ["batch", "running", "evaluation"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_those_of_batch_norm(
    case: tuple[float, float, float],
    mode: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    backend: str,
    by_c: bool,
    use: Callable[[str, bool], Any],
) -> None:
    training = mode != "evaluation"
    x = torch.randn(4, 6, 3, 3).to(dtype)
    x[:, 2] *= case[2]
    x, dy = x.contiguous(memory_format=layout), torch.randn(4, 6, 3, 3).to(dtype)
    known = statistics(case)
    leaves = [x, torch.rand(6) + 0.5, torch.randn(6)]
    old, new = [[leaf.detach().clone().requires_grad_() for leaf in leaves] for _ in range(2)]
    old[0] = leaves[0].float().requires_grad_()
    expected_statistics, found_statistics = ([t.clone() for t in known] for _ in range(2))
    expected = F.batch_norm(old[0], *expected_statistics, *old[1:], training=mode == "batch")
    expected_gradients = torch.autograd.grad(expected, old, dy.float())
    points = [torch.tensor([0.0, 0.0, 1.0]).requires_grad_() for _ in range(2)]
    options: dict[str, Any] = {"training": training, "gate": "simplex"}
    options["bn_statistics"] = "running" if mode == "running" else "batch"
    with use(backend, by_c):
        y = switch_norm(new[0], *points, *found_statistics, *new[1:], **options)
        gradients = torch.autograd.grad(y, [*new, *points], dy)
    loose = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(y.float(), expected, equal_nan=True, **loose)
    for found, wanted in zip(gradients, expected_gradients, strict=False):
        torch.testing.assert_close(found.float(), wanted.float(), equal_nan=True, **loose)
    for found, wanted in zip(found_statistics, expected_statistics, strict=True):
        torch.testing.assert_close(found, wanted, equal_nan=True, **loose)
    if all(t.isfinite().all() for t in (expected, *expected_gradients)):
        assert all(gradient.isfinite().all() for gradient in gradients)


@BACKEND_CASES
@pytest.mark.parametrize("gate", ["simplex", "softmax"])
@pytest.mark.parametrize("mode", ["batch", "running", "evaluation", "renorm"])
def test_no_gradient_is_nan_where_a_mixture_meets_an_infinite_variance(
    mode: str, gate: Any, backend: str, by_c: bool, use: Callable[[str, bool], Any]
) -> None:
    """Only this channel changes: its y is the bias, and the gates get the gradients of the other channels."""
    options: dict[str, Any] = {"training": mode != "evaluation", "gate": gate, "branches": ("in", "bn")}
    options["bn_statistics"] = "batch" if mode == "evaluation" else mode
    x, dy = torch.randn(4, 6, 3, 3), torch.randn(4, 6, 3, 3)
    x[:, 2] *= 1e25 if mode == "batch" else 1
    known = statistics(CASES["variance infinite"])

    def run(keep: Any) -> tuple[Tensor, ...]:
        points = [torch.tensor([0.3, 0.7]).requires_grad_() for _ in range(2)]
        leaf = x[:, keep].clone().requires_grad_()
        y = switch_norm(leaf, *points, *(t[keep].clone() for t in known), **options)
        return y.detach(), *torch.autograd.grad(y, [leaf, *points], dy[:, keep])

    with use(backend, by_c):
        y, *gradients = run(slice(None))
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    with use("reference", False):
        _, _, _, expected = run([0, 1, 3, 4, 5])
    torch.testing.assert_close(gradients[2], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by_c", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_infinite_running_variance_stays_infinite_as_in_batch_norm(
    dtype: torch.dtype, by_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: updating by a difference made it NaN, and the layer too."""
    if by_c and not cpu.AVAILABLE:
        pytest.skip("built without a compiler")
    monkeypatch.setattr(cpu, "AVAILABLE", by_c)
    layer, bn = SwitchNorm2d.from_batch_norm(torch.nn.BatchNorm2d(4)).to(dtype), torch.nn.BatchNorm2d(4).to(dtype)
    for model in (layer, bn):
        model.running_var[1] = INF
        model.running_mean[2] = INF
        for mode in ("batch", "renorm"):
            if model is layer:
                layer.bn_statistics = mode
            torch.manual_seed(0)
            model.train()(torch.randn(3, 4, 5, 5).to(dtype))
    close = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(layer.running_var, bn.running_var, **close)
    torch.testing.assert_close(layer.running_mean, bn.running_mean, **close)
    x = torch.randn(3, 4, 5, 5).to(dtype)
    y = layer.eval()(x)
    assert y[:, [0, 1, 3]].isfinite().all()
    torch.testing.assert_close(y, bn.eval()(x), equal_nan=True, **close)


@BACKEND_CASES
@pytest.mark.parametrize("case", [*CASES.values(), (0.3, -5.0, 1)], ids=[*CASES, "variance negative"])
def test_updated_statistics_are_finite_in_training_if_those_of_batch_norm_are(
    case: tuple[float, float, float], backend: str, by_c: bool, use: Callable[[str, bool], Any]
) -> None:
    """A channel with unusable running statistics uses the moments of the batch, with their gradients."""
    leaves = [torch.randn(4, 6, 3, 3).requires_grad_(), torch.rand(6).requires_grad_(), torch.randn(6).requires_grad_()]
    points = [torch.tensor([0.2, 0.3, 0.5]).requires_grad_() for _ in range(2)]
    known = statistics((*case[:2], 1))
    with use(backend, by_c):
        y = switch_norm(leaves[0], *points, *known, *leaves[1:], training=True, gate="simplex", bn_statistics="renorm")
        gradients = torch.autograd.grad(y, [*leaves, *points], torch.randn(4, 6, 3, 3))
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.slow
def test_a_compiled_layer_has_finite_gradients_beside_an_infinite_variance() -> None:
    torch.compiler.reset()
    layer = SwitchNorm2d.from_batch_norm(torch.nn.BatchNorm2d(4), bn_statistics="running")
    layer.running_var[1] = INF
    torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.randn(3, 4, 5, 5)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())  # type: ignore[union-attr]
