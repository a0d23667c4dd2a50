"""One spatial position per channel: every backend adds the weight of `in` to that of `ln`, else to that of `bn`."""

import copy
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap import SwitchNorm1d, SwitchNorm2d
from normswap.errors import LayerError
from normswap.layers.backends import cpu
from normswap.layers.functional import switch_norm
from normswap.layers.gating import Branch
from tests.helpers import oracles

SHAPES = [(5, 4), (5, 4, 1), (5, 4, 1, 1), (3, 4, 1, 1, 1), (1, 4, 1, 1)]
BACKENDS = [
    "reference",
    pytest.param("native", id="native"),
    pytest.param("no C", id="native without C"),
    pytest.param("triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton.py")),
    pytest.param("compiled", id="compiled"),
]
POINTS = {"simplex": ([0.2, 0.5, 0.3], [0.6, 0.1, 0.3]), "softmax": ([0.4, -0.3, 0.9], [-0.6, 0.8, 0.1])}


def weights_of(point: Tensor, gate: str) -> Tensor:
    return point.softmax(0) if gate == "softmax" else point


def expected_gate_gradient(gradient: Tensor, weights: Tensor, branches: tuple[Branch, ...], gate: str) -> Tensor:
    """Return the gradient of a gate parameter from dL/dw of the other branches; `in` has that of the recipient."""
    rest = [branch for branch in branches if branch != "in"]
    recipient = "ln" if "ln" in rest else "bn"
    by_weight = torch.stack([gradient[rest.index(recipient if branch == "in" else branch)] for branch in branches])
    if gate == "softmax":
        return weights * (by_weight - (weights * by_weight).sum())
    return by_weight - by_weight.mean()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", ["simplex", "softmax"])
@pytest.mark.parametrize("branches", [("in", "ln", "bn"), ("in", "ln"), ("in", "bn")], ids="+".join)
def test_the_weight_of_in_goes_to_another_branch(
    branches: tuple[Branch, ...], gate: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(cpu, "AVAILABLE", cpu.AVAILABLE and backend != "no C")
    name = {"no C": "native", "compiled": "native"}.get(backend, backend)
    dtype = torch.float32 if name == "triton" else torch.float64
    slow = backend in ("compiled", "triton")
    shapes, modes = (SHAPES[2:3], (True,)) if slow else (SHAPES, (True, False))
    index = [("in", "ln", "bn").index(branch) for branch in branches]
    for shape, training in ((shape, training) for shape in shapes for training in modes):
        means, variances = (torch.tensor(p).double()[index] for p in POINTS[gate])
        if gate == "simplex":
            means, variances = means / means.sum(), variances / variances.sum()
        x, dy = (torch.randn(shape).to(dtype).double() for _ in range(2))
        affine = [torch.rand(4).to(dtype).double() + 0.5, torch.randn(4).to(dtype).double()]
        running = oracles.Constants(torch.randn(4).double(), torch.rand(4).double() + 0.5)
        constants = running if not training or shape[0] == 1 else None
        rest = tuple(branch for branch in branches if branch != "in")
        merged = []
        for point in (means, variances):
            weights = weights_of(point, gate)
            recipient = branches.index("ln" if "ln" in branches else "bn")
            merged.append(
                torch.stack([weights[i] + (weights[0] if i == recipient else 0) for i in range(1, len(branches))])
            )
        table = x.reshape(*shape[:2], 1)
        y = oracles.forward(table, *merged, *affine, rest, constants).reshape(shape)
        wanted = oracles.backward(dy.reshape(table.shape), table, *merged, affine[0], rest, constants)

        leaves = [t.to(dtype).requires_grad_() for t in (x, means, variances, *affine)]
        before = [leaf.detach().clone() for leaf in leaves]
        function: Any = switch_norm
        if backend == "compiled":
            torch.compiler.reset()
            function = torch.compile(switch_norm, fullgraph=True, backend="aot_eager")
        with normswap.use_backend(name):
            statistics = [t.to(dtype).clone() for t in (running.mean, running.var)]
            found = function(*leaves[:3], *statistics, *leaves[3:], training=training, gate=gate, branches=branches)
            gradients = torch.autograd.grad(found, leaves, dy.to(dtype))
        loose = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(found.double(), y, **loose)
        points = (
            expected_gate_gradient(gradient, weights_of(point, gate), branches, gate)
            for gradient, point in ((wanted.mean_weight, means), (wanted.var_weight, variances))
        )
        expected = (wanted.x.reshape(shape), *points, wanted.weight, wanted.bias)
        for gradient, right in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient.double(), right, **loose)
        assert all(leaf.equal(old) for leaf, old in zip(leaves, before, strict=True))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_in_as_the_only_branch_is_refused_at_one_position(backend: str) -> None:
    x = torch.randn(3, 4, 1, 1)
    expected = (
        "the `in` branch has no variance with one spatial position (input of shape (3, 4, 1, 1)), and there is no "
        "other branch: build the layer with branches=('ln', 'bn'), or plan with an input of the real size"
    )
    with normswap.use_backend(backend), pytest.raises(LayerError, match=re.escape(expected)):
        switch_norm(x, torch.ones(1), torch.ones(1), branches=("in",))


class Net(nn.Module):
    """Has maps of 2x2, or of 1x1 for smaller inputs; the second norm is a call of `F.batch_norm`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return nn.functional.batch_norm(x, self.mean, self.var, training=self.training)


LARGE, SMALL = (4, 3, 4, 4), (4, 3, 2, 2)


def trained(model: nn.Module) -> nn.Module:
    """Return the model with moved gates."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("mean_weight", "var_weight")):
                parameter.copy_(torch.tensor([0.3, 0.2, 0.5]))
    return model


def warning_of(name: str) -> str:
    return (
        f"{name} got an input with one spatial position per channel, where `in` has no variance: in such calls its "
        "weight is added to that of `ln`; the parameters do not change. To leave `in` out, convert with an example "
        "input of the real size"
    )


def warned(model: Any, x: Tensor, steps: int = 3) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            model(x).square().sum().backward()
    return [str(warning.message) for warning in caught if "spatial position" in str(warning.message)]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_each_site_warns_once_and_by_its_name(backend: str) -> None:
    model = trained(normswap.convert(Net(), torch.randn(LARGE)).model).train()
    state = {name: p.clone() for name, p in model.named_parameters()}
    with normswap.use_backend(backend):
        assert warned(model, torch.randn(LARGE)) == []
        assert warned(model, torch.randn(SMALL)) == [warning_of("norm"), warning_of("batch_norm")]
        assert warned(model, torch.randn(SMALL)) == []
        assert warned(copy.deepcopy(model), torch.randn(SMALL)) == []  # the same sites
        assert warned(pickle.loads(pickle.dumps(model.norm)), torch.randn(4, 8, 1, 1)) == []
    assert all(parameter.equal(state[name]) for name, parameter in model.named_parameters())


def test_another_conversion_warns_of_its_own_sites() -> None:
    for _ in range(2):
        model = trained(normswap.convert(Net(), torch.randn(LARGE)).model).train()
        assert warned(model, torch.randn(SMALL), steps=1) == [warning_of("norm"), warning_of("batch_norm")]


def test_a_site_whose_in_has_no_weight_does_not_warn_and_is_batch_norm() -> None:
    net = Net()
    model = normswap.convert(net, torch.randn(LARGE)).model
    x = torch.randn(SMALL)
    torch.testing.assert_close(model.eval()(x), net.eval()(x))
    assert warned(model.train(), x) == []


def test_a_training_run_goes_on_where_maps_shrink_to_one_position() -> None:
    """Regression: after planning with a larger input, the second step raised, when `in` first had a weight."""
    model = normswap.convert(Net(), torch.randn(LARGE)).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(SMALL)).pow(3).sum().backward()
            optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_compiled_model_warns_once_for_each_site_without_breaking_its_graph() -> None:
    torch.compiler.reset()
    model = trained(normswap.convert(Net(), torch.randn(LARGE)).model).train()
    run = torch.compile(model, fullgraph=True, backend="eager")
    assert warned(run, torch.randn(SMALL)) == [warning_of("norm"), warning_of("batch_norm")]
    assert warned(run, torch.randn(2, *SMALL[1:])) == []


def test_a_layer_built_by_hand_is_named_by_its_class() -> None:
    assert warned(SwitchNorm2d(8), torch.randn(4, 8, 1, 1)) == [warning_of("a SwitchNorm2d of 8 channels")]
    layer = SwitchNorm1d.from_batch_norm(nn.BatchNorm1d(8), gate="softmax")
    assert warned(layer, torch.randn(4, 8)) == [warning_of("a SwitchNorm1d of 8 channels")]


def test_the_name_of_a_site_is_gone_after_reverting() -> None:
    net = Net()
    before = set(vars(net.norm))
    model = normswap.revert(normswap.convert(net, torch.randn(LARGE)).model)
    assert set(vars(model.norm)) == before
