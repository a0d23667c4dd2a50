"""`switch_norm` against the float64 oracle: values, all gradients, running statistics, and the edges of its domain."""

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from normswap.errors import LayerError
from normswap.layers.functional import switch_norm
from normswap.layers.gating import BRANCHES, GATES
from tests.helpers import oracles

BRANCH_SETS = [subset for k in (1, 2, 3) for subset in itertools.combinations(BRANCHES, k)]
SHAPES = {
    "(N, C)": (5, 4),
    "(N, C, L)": (3, 4, 5),
    "(N, C, H, W)": (3, 4, 2, 3),
    "(N, C, D, H, W)": (2, 3, 2, 2, 2),
}
# For one position see test_single_position.py.
SHAPES_AND_BRANCHES = [
    pytest.param(shape, branches, id=f"{name}-{'+'.join(branches)}")
    for name, shape in SHAPES.items()
    for branches in BRANCH_SETS
    if len(shape) > 2 or "in" not in branches
]
# (training, bn_statistics, running statistics are given)
MODES = {
    "training on the batch": (True, "batch", True),
    "training on running statistics": (True, "running", True),
    "training on renewed statistics": (True, "renorm", True),
    "training, untracked": (True, "batch", False),
    "evaluation": (False, "batch", True),
    "evaluation, untracked": (False, "batch", False),
}
GATE_CASES = pytest.mark.parametrize("gate", GATES)
BRANCH_CASES = pytest.mark.parametrize("branches", BRANCH_SETS, ids="+".join)
MODE_CASES = pytest.mark.parametrize(("training", "bn_statistics", "tracked"), MODES.values(), ids=MODES)

GATE_POINTS = {
    "softmax": ([0.4, -0.3, 0.9], [-0.6, 0.8, 0.1]),
    "simplex": ([0.2, 0.5, 0.3], [0.6, 0.1, 0.3]),
}
VERTEX = torch.tensor([0.0, 0.0, 1.0])


def gate_points(gate: str, branches: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Return gate parameters in the interior for means and variances; simplex points of fewer branches are rescaled."""
    index = [BRANCHES.index(branch) for branch in branches]  # type: ignore[arg-type]
    mean, var = (torch.tensor(values).double()[index] for values in GATE_POINTS[gate])
    return (mean / mean.sum(), var / var.sum()) if gate == "simplex" else (mean, var)


def problem(shape: tuple[int, ...], gate: str, branches: tuple[str, ...]) -> dict[str, Tensor]:
    """Return leaf tensors as of a trained layer: no value is 0 or 1."""
    channels = shape[1]
    mean_weight, var_weight = gate_points(gate, branches)
    leaves = {
        "x": torch.randn(shape).double() * 1.5 + 0.7,
        "mean_weight": mean_weight,
        "var_weight": var_weight,
        "weight": torch.rand(channels).double() + 0.5,
        "bias": torch.randn(channels).double(),
    }
    return {name: tensor.requires_grad_() for name, tensor in leaves.items()}


def running_statistics(channels: int) -> oracles.Constants:
    return oracles.Constants(torch.randn(channels).double(), torch.rand(channels).double() + 0.5)


@pytest.mark.parametrize("bn", ["batch", "constant", "renewed"])
@BRANCH_CASES
def test_the_oracle_agrees_with_finite_differences(branches: tuple[str, ...], bn: str) -> None:
    """Check the oracle itself: its closed form against central differences of its definition.

    Renewed constants move with the moments of the batch, from where they are.
    """
    x, dy = torch.randn(2, 2, 2, 3, 2).double()
    weight, bias = torch.rand(2, 2).double() + 0.5
    shares, var_shares = gate_points("simplex", branches)
    constants = running_statistics(2) if bn != "batch" else None

    def moved(x_now: Tensor) -> oracles.Constants | None:
        if constants is None or bn != "renewed":
            return constants
        now, before = (oracles.statistics(values, "bn") for values in (x_now, x))
        return oracles.Constants(
            constants.mean + (now.mean - before.mean)[0], constants.var + (now.var - before.var)[0]
        )

    def loss(**changed: Tensor) -> float:
        values = {"x": x, "shares": shares, "var_shares": var_shares, "weight": weight, "bias": bias} | changed
        return float((oracles.forward(**values, branches=branches, constants=moved(values["x"])) * dy).sum())

    def differences(**named: Tensor) -> Tensor:
        ((name, tensor),) = named.items()
        slopes, step = torch.empty_like(tensor), 1e-5
        for index in itertools.product(*map(range, tensor.shape)):
            perturb = torch.zeros_like(tensor)
            perturb[index] = step
            slopes[index] = (loss(**{name: tensor + perturb}) - loss(**{name: tensor - perturb})) / (2 * step)
        return slopes

    closed = oracles.backward(dy, x, shares, var_shares, weight, branches, constants, follows_batch=bn == "renewed")
    for expected, actual in (
        (differences(x=x), closed.x),
        (differences(weight=weight), closed.weight),
        (differences(bias=bias), closed.bias),
        (differences(shares=shares), closed.mean_weight),
        (differences(var_shares=var_shares), closed.var_weight),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "branches"), SHAPES_AND_BRANCHES)
@MODE_CASES
@GATE_CASES
def test_value_and_all_gradients_equal_the_oracle(
    gate: str, branches: tuple[str, ...], training: bool, bn_statistics: str, tracked: bool, shape: tuple[int, ...]
) -> None:
    leaves = problem(shape, gate, branches)
    dy = torch.randn(shape).double()
    running = running_statistics(shape[1]) if tracked else None
    buffers = (running.mean.clone(), running.var.clone()) if running else (None, None)
    options: dict[str, Any] = {"gate": gate, "branches": branches}

    y = switch_norm(
        leaves["x"],
        leaves["mean_weight"],
        leaves["var_weight"],
        *buffers,
        leaves["weight"],
        leaves["bias"],
        training,
        0.3,
        1e-3,
        bn_statistics=bn_statistics,  # type: ignore[arg-type]
        **options,
    )
    y.backward(dy)

    updated = training and bn_statistics != "running" and running is not None and "bn" in branches
    after = oracles.updated_running(running, leaves["x"].detach(), 0.3) if updated and running else running
    expected_y, expected = oracles.switch_norm(
        dy=dy,
        **{k: v.detach() for k, v in leaves.items()},
        constants=None if training and bn_statistics == "batch" else after,
        follows_batch=training and bn_statistics == "renorm",
        eps=1e-3,
        **options,
    )
    assert oracles.relative_error(y.detach(), expected_y) < 1e-12
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        # The absolute term is for truths of zero: a gate of one branch, a mean that drops out.
        torch.testing.assert_close(leaf.grad, getattr(expected, name), rtol=1e-9, atol=1e-11, msg=name)
    if after and buffers[0] is not None and buffers[1] is not None:
        assert oracles.relative_error(buffers[0], after.mean) < (1e-14 if updated else 1e-300)
        assert oracles.relative_error(buffers[1], after.var) < (1e-14 if updated else 1e-300)


@pytest.mark.parametrize("vertex", range(3), ids=BRANCHES)
@pytest.mark.parametrize("training", [True, False])
def test_one_hot_gates_have_gradients_that_equal_the_oracle(vertex: int, training: bool) -> None:
    leaves = problem((3, 4, 2, 3), "simplex", BRANCHES)
    for name in ("mean_weight", "var_weight"):
        leaves[name] = torch.eye(3).double()[vertex].requires_grad_()
    running = running_statistics(4)
    dy = torch.randn(3, 4, 2, 3).double()
    y = switch_norm(
        **leaves, running_mean=running.mean.clone(), running_var=running.var.clone(), training=training, gate="simplex"
    )
    y.backward(dy)
    _, expected = oracles.switch_norm(
        dy=dy, **{k: v.detach() for k, v in leaves.items()}, gate="simplex", constants=None if training else running
    )
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert bool((leaf.grad != 0).any()), name
        torch.testing.assert_close(leaf.grad, getattr(expected, name), rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("point", [[0.3, -0.2, 1.4], [2.0, 1.9, -1.0], [-3.0, 0.2, 0.1]])
def test_off_the_simplex_the_weights_are_projected_and_the_gradient_is_centred(
    point: list[float], training: bool
) -> None:
    leaves = problem((2, 3, 2, 2), "simplex", BRANCHES)
    leaves["mean_weight"] = torch.tensor(point).double().requires_grad_()
    dy, running = torch.randn(2, 3, 2, 2).double(), running_statistics(3)
    y = switch_norm(
        **leaves, running_mean=running.mean.clone(), running_var=running.var.clone(), training=training, gate="simplex"
    )
    y.backward(dy)
    expected_y, expected = oracles.switch_norm(
        dy=dy, **{k: v.detach() for k, v in leaves.items()}, gate="simplex", constants=None if training else running
    )
    assert oracles.relative_error(y.detach(), expected_y) < 1e-12
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, getattr(expected, name), rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", "neither"])
@GATE_CASES
def test_missing_affine_parameters_are_ones_and_zeros(gate: str, affine: str) -> None:
    leaves = problem((3, 4, 2, 3), gate, BRANCHES)
    stand_ins = {"weight": torch.ones(4).double(), "bias": torch.zeros(4).double()}
    given = {k: v for k, v in leaves.items() if k not in stand_ins or k in affine}
    full = given | {k: v for k, v in stand_ins.items() if k not in given}
    options: dict[str, Any] = {"gate": gate, "training": True}
    torch.testing.assert_close(switch_norm(**given, **options), switch_norm(**full, **options), rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.37, 1.0])
def test_running_statistics_follow_torch_and_the_oracle(momentum: float) -> None:
    x, start = torch.randn(3, 4, 2, 3).double() + 1, running_statistics(4)
    ours, theirs = ([start.mean.clone(), start.var.clone()] for _ in range(2))
    for _ in range(3):
        switch_norm(x, VERTEX.double(), VERTEX.double(), *ours, training=True, momentum=momentum, gate="simplex")
        F.batch_norm(x, *theirs, training=True, momentum=momentum)
        start = oracles.updated_running(start, x, momentum)
        for mine, torchs, truth in zip(ours, theirs, (start.mean, start.var), strict=True):
            assert oracles.relative_error(mine, torchs) < 1e-14
            assert oracles.relative_error(mine, truth) < 1e-14


def test_running_statistics_do_not_depend_on_the_gates() -> None:
    x = torch.randn(3, 4, 2, 3).double()
    results = []
    for point in ([0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.3, 0.3, 0.4]):
        buffers = torch.zeros(4).double(), torch.ones(4).double()
        gates = torch.tensor(point).double()
        switch_norm(x, gates, gates, *buffers, training=True, gate="simplex")
        results.append(torch.cat(buffers))
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


# Metamorphic properties: branches that have it, transformation of x, transformation of y.
INVARIANCES = {
    "in: scale and shift of every (n, c)": (("in",), lambda x: x * 3 + torch.arange(12.0).reshape(3, 4, 1, 1)),
    "ln: scale and shift of every sample": (("ln",), lambda x: x * 3 + torch.arange(3.0).reshape(3, 1, 1, 1)),
    "bn: scale and shift of every channel": (("bn",), lambda x: x * 3 + torch.arange(4.0).reshape(1, 4, 1, 1)),
    "all: one scale and shift": (BRANCHES, lambda x: x * 3 - 5),
}


@pytest.mark.parametrize(("branches", "change"), INVARIANCES.values(), ids=INVARIANCES)
def test_each_branch_ignores_the_values_of_other_samples_or_channels(branches: tuple[str, ...], change: Any) -> None:
    x = torch.randn(3, 4, 5, 5).double()
    gates = gate_points("simplex", branches)
    y, changed = (
        switch_norm(v, *gates, training=True, eps=0.0, gate="simplex", branches=branches)  # type: ignore[arg-type]
        for v in (x, change(x))
    )
    torch.testing.assert_close(changed, y, rtol=1e-10, atol=1e-10)


@GATE_CASES
def test_samples_channels_and_positions_can_be_permuted(gate: str) -> None:
    leaves = {k: v.detach() for k, v in problem((3, 4, 2, 5), gate, BRANCHES).items()}
    y = switch_norm(**leaves, training=True, gate=gate)  # type: ignore[arg-type]
    n, c, w = torch.randperm(3), torch.randperm(4), torch.randperm(5)
    permuted = leaves | {
        "x": leaves["x"][n][:, c][..., w],
        "weight": leaves["weight"][c],
        "bias": leaves["bias"][c],
    }
    torch.testing.assert_close(switch_norm(**permuted, training=True, gate=gate), y[n][:, c][..., w])  # type: ignore[arg-type]


def test_branch_order_is_that_of_the_gate_entries() -> None:
    x, gates = torch.randn(3, 4, 2, 3).double(), gate_points("simplex", BRANCHES)
    straight = switch_norm(x, *gates, training=True, gate="simplex")
    flipped = [gate.flip(0) for gate in gates]
    torch.testing.assert_close(
        switch_norm(x, *flipped, training=True, gate="simplex", branches=BRANCHES[::-1]), straight
    )


# Not `renorm`, whose value has the gradients of another function.
DIFFERENTIABLE = {name: mode for name, mode in MODES.items() if mode[1] != "renorm"}
GRADCHECK_GATES = {"softmax": "softmax", "simplex, interior": "simplex"}


@pytest.mark.slow
@pytest.mark.parametrize(("training", "bn_statistics", "tracked"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
@pytest.mark.parametrize("gate", GRADCHECK_GATES.values(), ids=GRADCHECK_GATES)
def test_first_and_second_derivatives_against_finite_differences(
    gate: str, training: bool, bn_statistics: str, tracked: bool
) -> None:
    """In the interior the Jacobian of the projection subtracts the mean, so numerical derivatives agree."""
    leaves = problem((2, 2, 3), gate, BRANCHES)
    running = running_statistics(2) if tracked else None

    def layer(*values: Tensor) -> Tensor:
        buffers = (running.mean.clone(), running.var.clone()) if running else (None, None)
        named = dict(zip(leaves, values, strict=True))
        options: dict[str, Any] = {"gate": gate, "bn_statistics": bn_statistics, "training": training}
        return switch_norm(**named, running_mean=buffers[0], running_var=buffers[1], **options)

    assert torch.autograd.gradcheck(layer, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(layer, tuple(leaves.values()))


# (dtype, mean over standard deviation, largest absolute error of y). Beyond float32 the input's own rounding rules.
STABILITY = {
    "float32, 30": (torch.float32, 30.0, 1e-4),
    "float32, 3000": (torch.float32, 3000.0, 5e-3),
    "bfloat16, 30": (torch.bfloat16, 30.0, 5e-2),
    "bfloat16, 3000": (torch.bfloat16, 3000.0, 5e-2),
    "float16, 300": (torch.float16, 300.0, 5e-2),
}


@pytest.mark.parametrize("gates", [VERTEX, torch.tensor([1 / 3] * 3)], ids=["bn vertex", "uniform"])
@pytest.mark.parametrize(("dtype", "ratio", "tolerance"), STABILITY.values(), ids=STABILITY)
def test_a_mean_much_larger_than_the_deviation_costs_no_digits(
    dtype: torch.dtype, ratio: float, tolerance: float, gates: Tensor
) -> None:
    x = (torch.randn(2, 3, 8, 8) + ratio).to(dtype).requires_grad_()
    buffers = torch.zeros(3), torch.ones(3)
    parameters = [gates.clone().requires_grad_() for _ in range(2)]
    y = switch_norm(x, *parameters, *buffers, training=True, gate="simplex")
    expected = oracles.forward(x.detach(), gates, gates, torch.ones(3).double(), torch.zeros(3).double())
    assert y.dtype == dtype
    assert float((y.detach().double() - expected).abs().max()) < tolerance
    y.float().pow(2).sum().backward()
    for tensor in (x.grad, *(p.grad for p in parameters), *buffers):
        assert tensor is not None
        assert bool(tensor.isfinite().all())
    assert bool((buffers[1] >= 0).all())


@pytest.mark.parametrize("bn_statistics", ["batch", "running"])
def test_a_weight_of_zero_ignores_infinite_statistics(bn_statistics: str) -> None:
    """In evaluation with all weight on `bn`, the variances of `in` and `ln` overflow and BN is finite."""
    x = (torch.randn(2, 3, 4, 4) * 1e20).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    running = torch.randn(3), torch.rand(3) + 0.5
    gates = [VERTEX.clone().requires_grad_() for _ in range(2)]
    y = switch_norm(x, *gates, *running, gate="simplex", bn_statistics=bn_statistics)  # type: ignore[arg-type]
    expected = F.batch_norm(twin, *running)
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=0)
    dy = torch.randn_like(x) * 1e-20
    y.backward(dy)
    expected.backward(dy)
    assert x.grad is not None
    assert bool((x.grad != 0).any())
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-5, atol=0)
    for gate in gates:
        assert gate.grad is not None
        assert bool(gate.grad.isfinite().all())


def test_infinite_statistics_that_have_weight_are_not_hidden() -> None:
    x = torch.randn(2, 3, 4, 4) * 1e20
    uniform = torch.tensor([1 / 3] * 3)
    y = switch_norm(x, uniform, uniform, torch.zeros(3), torch.ones(3), gate="simplex")
    assert not bool((y.abs() > 1).any())  # the infinite variance divides to zero, as it should


EMPTY_SHAPES = {
    "(0, C)": (0, 3),
    "(0, C, L)": (0, 3, 5),
    "(0, C, H, W)": (0, 3, 4, 4),
    "(N, C, 0, W)": (2, 3, 0, 4),
}


@pytest.mark.parametrize("shape", EMPTY_SHAPES.values(), ids=EMPTY_SHAPES)
@pytest.mark.parametrize("training", [True, False])
@GATE_CASES
def test_an_empty_batch_equals_batch_norm(gate: str, training: bool, shape: tuple[int, ...]) -> None:
    leaves = {
        "x": torch.empty(shape),
        "mean_weight": torch.tensor([0.2, 0.3, 0.5]),
        "var_weight": torch.tensor([0.2, 0.3, 0.5]),
        "weight": torch.rand(3),
        "bias": torch.rand(3),
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    ours, theirs = ([torch.full((3,), 0.5), torch.full((3,), 2.0)] for _ in range(2))
    y = switch_norm(
        **leaves,
        running_mean=ours[0],
        running_var=ours[1],
        training=training,
        gate=gate,  # type: ignore[arg-type]
    )
    expected = F.batch_norm(leaves["x"], *theirs, leaves["weight"], leaves["bias"], training)
    assert y.shape == expected.shape == shape
    assert y.dtype == expected.dtype
    for mine, torchs in zip(ours, theirs, strict=True):
        assert mine.equal(torchs)
    y.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert bool((leaf.grad == 0).all()), name


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)])
def test_one_value_per_channel_in_training_uses_the_running_statistics(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    running = torch.randn(3), torch.rand(3) + 0.5
    before = [r.clone() for r in running]
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        F.batch_norm(x, *running, training=True)
    y = switch_norm(x, VERTEX, VERTEX, *running, training=True, gate="simplex")
    torch.testing.assert_close(y, F.batch_norm(x, *running))
    assert all(r.equal(b) for r, b in zip(running, before, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_one_value_per_channel_without_running_statistics_is_refused(training: bool) -> None:
    with pytest.raises(
        LayerError,
        match=r"more than one value per channel, .* shape \(1, 3, 1, 1\) and no running statistics: .*"
        r"track_running_stats=True, or without `bn` in branches",
    ):
        switch_norm(torch.randn(1, 3, 1, 1), VERTEX, VERTEX, training=training, gate="simplex")
    # BatchNorm without running statistics normalizes by the batch in evaluation too, and fails alike.
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        F.batch_norm(torch.randn(1, 3, 1, 1), None, None, training=True)


ONE_POSITION = [(4, 3), (4, 3, 1), (4, 3, 1, 1), (4, 3, 1, 1, 1), (1, 3, 1, 1)]


@pytest.mark.parametrize("shape", ONE_POSITION)
@pytest.mark.parametrize("training", [True, False])
def test_one_position_at_the_bn_vertex_is_batch_norm(shape: tuple[int, ...], training: bool) -> None:
    x = torch.randn(shape).double().requires_grad_()
    running = torch.randn(3).double(), torch.rand(3).double() + 0.5
    vertex = VERTEX.double()
    expected = F.batch_norm(x, *(r.clone() for r in running), training=training and shape[0] > 1)
    y = switch_norm(x, vertex, vertex, *running, training=training, gate="simplex")
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.pow(3).sum(), x)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@GATE_CASES
def test_one_sample_and_one_channel_equal_the_oracle(gate: str, training: bool) -> None:
    for shape in ((1, 3, 2, 4), (3, 1, 2, 4), (1, 1, 2, 4)):
        leaves = {k: v.detach() for k, v in problem(shape, gate, BRANCHES).items()}
        running = running_statistics(shape[1])
        y = switch_norm(
            **leaves,
            running_mean=running.mean.clone(),
            running_var=running.var.clone(),
            training=training,
            gate=gate,  # type: ignore[arg-type]
        )
        constants = None if training else running
        expected, _ = oracles.switch_norm(dy=leaves["x"], **leaves, gate=gate, constants=constants)
        assert oracles.relative_error(y, expected) < 1e-12


REFUSED_INPUTS: dict[str, tuple[Tensor, str]] = {
    "no batch dimension": (
        torch.randn(3),
        "expected a floating tensor (N, C, *spatial), got torch.float32 of shape (3,)",
    ),
    "integers": (
        torch.ones(2, 3, 4, dtype=torch.long),
        "expected a floating tensor (N, C, *spatial), got torch.int64 of shape (2, 3, 4)",
    ),
    "complex": (torch.ones(2, 3, 4, dtype=torch.complex64), "got torch.complex64 of shape (2, 3, 4)"),
    "wrong channels": (
        torch.randn(2, 4, 5),
        "expected 3 channels in dimension 1, got an input of shape (2, 4, 5)",
    ),
    "empty with wrong channels": (torch.randn(0, 4, 5), "expected 3 channels in dimension 1"),
}


@pytest.mark.parametrize(("x", "message"), REFUSED_INPUTS.values(), ids=REFUSED_INPUTS)
@pytest.mark.parametrize("training", [True, False])
def test_bad_inputs_are_refused_before_anything_is_written(x: Tensor, message: str, training: bool) -> None:
    for weight, running in ((None, [torch.zeros(3), torch.ones(3)]), (torch.ones(3), [None, None])):
        with pytest.raises(LayerError, match=re.escape(message)):
            switch_norm(x, VERTEX, VERTEX, *running, weight, training=training, gate="simplex")
        if running[0] is not None:
            assert running[0].equal(torch.zeros(3))


REFUSED_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "gate": ({"gate": "hard"}, "gate: expected one of"),
    "branches": ({"branches": ("in", "gn", "bn")}, "branches: expected a non-empty subset"),
    "bn_statistics": ({"bn_statistics": "moving"}, "bn_statistics: expected one of"),
    "too few branches": ({"branches": ("in", "bn")}, "expected gate parameters of shape (2,), got (3,)"),
    "too small a gate": ({"var_weight": torch.ones(2)}, "expected gate parameters of shape (3,), got (2,)"),
    "a published gate": ({"mean_weight": torch.ones(1, 3)}, "expected gate parameters of shape (3,), got (1, 3)"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED_OPTIONS.values(), ids=REFUSED_OPTIONS)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"mean_weight": torch.ones(3), "var_weight": torch.ones(3)} | options
    with pytest.raises(LayerError, match=re.escape(message)):
        switch_norm(torch.randn(2, 3, 4), **arguments)


def test_a_layer_without_gates_on_bn_needs_no_statistics() -> None:
    x = torch.randn(1, 3, 1, 1)
    y = switch_norm(x, torch.ones(1), torch.ones(1), branches=("ln",))
    torch.testing.assert_close(y, F.layer_norm(x, x.shape[1:]))


@pytest.mark.parametrize(
    ("options", "counted"),
    [
        ({}, 1),
        ({"training": False}, 0),
        ({"bn_statistics": "running"}, 0),
        ({"bn_statistics": "renorm"}, 1),
        ({"x": torch.randn(1, 3)}, 0),
        ({"x": torch.randn(1, 3), "bn_statistics": "renorm"}, 0),
        ({"x": torch.empty(0, 3)}, 1),
    ],
    ids=["training", "evaluation", "running", "renorm", "one value", "one value, renorm", "empty"],
)
def test_batches_are_counted_where_batch_norm_counts_them(options: dict[str, Any], counted: int) -> None:
    count, gate = torch.tensor(0), torch.ones(2)
    given: dict[str, Any] = {"x": torch.randn(4, 3), "training": True} | options
    switch_norm(
        given.pop("x"),
        gate,
        gate,
        torch.zeros(3),
        torch.ones(3),
        branches=("ln", "bn"),
        num_batches_tracked=count,
        **given,
    )
    assert count == counted
