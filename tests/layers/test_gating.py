"""Gates: projection and softmax against the oracle, exact one-hot points, linear gradients, errors."""

import itertools
import re

import pytest
import torch

from normswap.errors import LayerError
from normswap.layers.gating import (
    BRANCHES,
    GATES,
    check_bn_statistics,
    check_branches,
    check_gate,
    importance_weights,
    initial_point,
    project_to_simplex,
)
from tests.helpers import oracles

POINTS = {
    "vertex": [0.0, 0.0, 1.0],
    "edge": [0.0, 0.4, 0.6],
    "centre": [1 / 3, 1 / 3, 1 / 3],
    "interior": [0.2, 0.5, 0.3],
    "outside one face": [-0.1, 0.6, 0.5],
    "beyond a vertex": [-0.3, -0.2, 1.9],
    "equal and too large": [2.0, 2.0, 2.0],
    "equal and negative": [-5.0, -5.0, -5.0],
    "ties": [0.9, 0.9, -3.0],
    "pushed outwards for long": [-40.0, 12.0, 80.0],
    "swallows a unit in float32": [1e20, 0.0, -1e20],
    "swallows a unit, tied": [3e9, 3e9, 0.0],
    "one branch": [0.3],
    "two branches": [1.2, 0.9],
    "four entries": [0.1, 0.7, 0.7, -0.2],
}
POINT_CASES = pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
GATE_CASES = pytest.mark.parametrize("gate", GATES)
VERTICES = [
    (branches, vertex) for k in (1, 2, 3) for branches in itertools.combinations(BRANCHES, k) for vertex in branches
]

BAD_BRANCHES = {
    "empty": (),
    "unknown": ("in", "gn"),
    "repeated": ("in", "in"),
    "a string": "in",
}


@POINT_CASES
def test_projection_is_the_nearest_point_of_the_simplex(point: list[float]) -> None:
    z = torch.tensor(point).double()
    projected = project_to_simplex(z)
    assert oracles.relative_error(projected, oracles.project_by_enumeration(z)) < 1e-12
    if z.abs().max() < 1e6:  # bisection works in absolute terms
        assert oracles.relative_error(projected, oracles.project_by_bisection(z)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@POINT_CASES
def test_projection_is_on_the_simplex(point: list[float], dtype: torch.dtype) -> None:
    projected = project_to_simplex(torch.tensor(point, dtype=dtype))
    assert projected.dtype == dtype
    assert bool((projected >= 0).all())
    assert abs(float(projected.double().sum()) - 1) <= 4 * torch.finfo(dtype).eps


@POINT_CASES
def test_projection_is_idempotent_and_indifferent_to_shift_and_order(point: list[float]) -> None:
    z = torch.tensor(point).double()
    projected = project_to_simplex(z)
    assert oracles.relative_error(project_to_simplex(projected), projected) < 1e-15
    torch.testing.assert_close(project_to_simplex(z.flip(0)), projected.flip(0), rtol=0, atol=0)
    if z.abs().max() < 1e6:
        assert oracles.relative_error(project_to_simplex(z + 0.7), projected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("branches", "vertex"), VERTICES)
def test_a_one_hot_point_is_its_own_projection(branches: tuple[str, ...], vertex: str, dtype: torch.dtype) -> None:
    point = initial_point("simplex", branches, vertex=vertex).to(dtype)
    one_hot = [float(branch == vertex) for branch in branches]
    assert point.tolist() == one_hot
    assert project_to_simplex(point).tolist() == one_hot
    assert importance_weights(point, "simplex").tolist() == one_hot


def test_projection_works_on_the_last_dimension_of_a_batch() -> None:
    batch = torch.randn(4, 5, 3).double()
    rows = torch.stack([project_to_simplex(row) for row in batch.reshape(-1, 3)]).reshape(4, 5, 3)
    torch.testing.assert_close(project_to_simplex(batch), rows, rtol=0, atol=0)


def test_a_point_that_is_not_a_number_stays_one() -> None:
    assert bool(project_to_simplex(torch.tensor([0.5, float("nan"), 0.5])).isnan().all())


@GATE_CASES
@POINT_CASES
def test_weights_and_gradient_equal_the_oracle(point: list[float], gate: str) -> None:
    z = torch.tensor(point).double().requires_grad_()
    upstream = torch.randn(len(point)).double()
    weights = importance_weights(z, check_gate(gate))
    weights.backward(upstream)
    assert oracles.relative_error(weights.detach(), oracles.shares_of(z.detach(), gate)) < 1e-12
    expected = oracles.gate_gradient(z.detach(), gate, upstream)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, expected, rtol=1e-12, atol=1e-15)


@POINT_CASES
def test_simplex_gradient_is_linear_and_the_same_everywhere(point: list[float]) -> None:
    """Gradient accumulation, DDP and shared sites are exact only if the gradient does not depend on the point."""

    def gradient(at: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(importance_weights(at, "simplex"), at, upstream)[0]

    here, centre = torch.tensor(point).double(), torch.full((len(point),), 1 / len(point)).double()
    a, b = torch.randn(2, len(point)).double()
    torch.testing.assert_close(gradient(here, a + 3 * b), gradient(here, a) + 3 * gradient(here, b))
    torch.testing.assert_close(gradient(here, a), gradient(centre, a), rtol=0, atol=0)


@pytest.mark.parametrize("point", [POINTS["centre"], POINTS["interior"], POINTS["two branches"]])
def test_simplex_gradient_is_the_true_one_at_interior_points(point: list[float]) -> None:
    z = torch.tensor(point).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: importance_weights(z, "simplex"), z)


@GATE_CASES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_float32_or_wider(gate: str, dtype: torch.dtype) -> None:
    weights = importance_weights(torch.tensor([0.25, 0.5, 0.25], dtype=dtype), check_gate(gate))
    assert weights.dtype == torch.promote_types(dtype, torch.float32)
    assert abs(float(weights.sum()) - 1) < 1e-6


def test_initial_points() -> None:
    assert initial_point("softmax", BRANCHES).tolist() == [1, 1, 1]
    assert initial_point("softmax", ("in", "ln"), vertex="bn").tolist() == [1, 1]
    assert initial_point("simplex", ("in", "bn")).tolist() == [0.5, 0.5]
    assert initial_point("simplex", ("in", "bn"), vertex="in").tolist() == [1, 0]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_both_gates_start_with_equal_weights(k: int) -> None:
    mixes = [importance_weights(initial_point(gate, BRANCHES[:k]), gate) for gate in GATES]
    torch.testing.assert_close(mixes[0], mixes[1])


def test_branches_come_back_in_canonical_order() -> None:
    assert check_branches(["bn", "in"]) == ("in", "bn")
    assert check_branches(BRANCHES[::-1]) == BRANCHES


@pytest.mark.parametrize("branches", BAD_BRANCHES.values(), ids=BAD_BRANCHES)
def test_bad_branches_are_refused(branches: tuple[str, ...]) -> None:
    expected = f"branches: expected a non-empty subset of ('in', 'ln', 'bn'), got {branches!r}"
    with pytest.raises(LayerError, match=re.escape(expected)):
        check_branches(branches)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(LayerError, match=r"gate: expected one of \('simplex', 'softmax'\), got 'sparsemax'"):
        check_gate("sparsemax")
    with pytest.raises(
        LayerError, match=r"bn_statistics: expected one of \('batch', 'running', 'renorm'\), got 'moving'"
    ):
        check_bn_statistics("moving")


def test_a_vertex_outside_the_branches_is_refused() -> None:
    with pytest.raises(LayerError, match=r"expected 'bn' among them, where the gate starts, got \('in', 'ln'\)"):
        initial_point("simplex", ("in", "ln"), vertex="bn")
