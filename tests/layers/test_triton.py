"""The Triton kernels against the float64 oracle: on a GPU if there is one, else on CPU by Triton's interpreter.

The interpreter is slow, so tensors are tiny and tiles are cut small enough for every loop, mask and split to be used.
`conftest.py` asks for it before anything imports Triton. It takes code that the compiler refuses: kernels are compiled
here too, for a GPU that need not be present.
"""

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.errors import LayerError
from normswap.layers.backends import selection
from normswap.layers.backends.interface import Inputs
from normswap.layers.backends.reference import Moments
from normswap.layers.backends.selection import fused_backend, use_backend
from normswap.layers.functional import switch_norm
from normswap.layers.gating import BRANCHES, GATES, Mixing
from normswap.layers.in_place import GATE_PARAMETERS
from normswap.layers.matching import Matching
from normswap.layers.switch_norm import SwitchNorm2d
from tests.helpers import oracles

pytest.importorskip("triton")
from normswap.layers.backends import triton_launch

# The interpreter of Triton 3.4 warns about the bounds of loops.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BRANCH_SETS = [subset for k in (1, 2, 3) for subset in itertools.combinations(BRANCHES, k)]
POINTS = {
    "softmax": ([0.4, -0.3, 0.9], [-0.6, 0.8, 0.1]),
    "simplex": ([0.2, 0.5, 0.3], [0.6, 0.1, 0.3]),
}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(autouse=True)
def _infinities_pass_as_on_a_device() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


@contextmanager
def never_waiting() -> Iterator[None]:
    """Fail if anything inside waits for the device."""
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def cut_small(monkeypatch: pytest.MonkeyPatch, tile: int, table_tile: int, programs: int) -> None:
    for name, value in {"_TILE": tile, "_TABLE_TILE": table_tile, "_PROGRAMS": programs}.items():
        monkeypatch.setattr(triton_launch, name, value)


def gate_points(gate: str, branches: tuple[str, ...]) -> list[Tensor]:
    index = [BRANCHES.index(branch) for branch in branches]  # type: ignore[arg-type]
    points = [torch.tensor(values)[index] for values in POINTS[gate]]
    return [point / point.sum() for point in points] if gate == "simplex" else points


def problem(
    shape: tuple[int, ...],
    gate: str,
    branches: tuple[str, ...],
    *,
    last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Return leaf tensors as of a trained layer: no value is 0 or 1."""
    mean_weight, var_weight = gate_points(gate, branches)
    x = (torch.randn(shape) * 1.5 + 0.7).to(dtype)
    leaves = {
        "x": x.contiguous(memory_format=FORMATS[x.dim()]) if last else x,
        "mean_weight": mean_weight,
        "var_weight": var_weight,
        "weight": torch.rand(shape[1]) + 0.5,
        "bias": torch.randn(shape[1]),
    }
    return {name: tensor.to(DEVICE).requires_grad_() for name, tensor in leaves.items()}


def normalised(leaves: dict[str, Tensor], dy: Tensor, running: Any = None, **options: Any) -> Tensor:
    """Return y of the kernels; the leaves get the gradients."""
    statistics = {} if running is None else {"running_mean": running.mean, "running_var": running.var}
    statistics = {name: tensor.float().to(DEVICE) for name, tensor in statistics.items()}
    dy = dy.to(DEVICE)
    with use_backend("triton"):
        y = switch_norm(**leaves, **statistics, training=running is None, **options)
        with never_waiting():
            y.backward(dy)
    return y.detach()


def gradient(leaf: Tensor) -> Tensor:
    """Return the gradient of a leaf, on CPU in float64 as that of the oracle."""
    assert leaf.grad is not None
    return leaf.grad.cpu().double()


def expected_of(leaves: dict[str, Tensor], dy: Tensor, **options: Any) -> tuple[Tensor, oracles.Gradients]:
    return oracles.switch_norm(dy=dy, **{name: leaf.detach().cpu() for name, leaf in leaves.items()}, **options)


def assert_equal_to_the_oracle(leaves: dict[str, Tensor], running: Any = None, **options: Any) -> None:
    x = leaves["x"]
    dy = torch.randn(x.shape)
    y = normalised(leaves, dy, running, **options)
    expected_y, expected = expected_of(leaves, dy, constants=running, **options)
    assert y.stride() == x.stride()
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.cpu().double(), expected_y, rtol=3e-6, atol=3e-6)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        # Sums over the batch that cancel keep the rounding of their terms.
        torch.testing.assert_close(
            gradient(leaf),
            getattr(expected, name),
            rtol=1e-5,
            atol=2e-5,
            msg=lambda text, n=name: f"{n}: {text}",
        )
    assert x.grad is not None
    assert x.grad.stride() == x.stride()


def running_statistics(channels: int) -> oracles.Constants:
    return oracles.Constants(torch.randn(channels).double(), torch.rand(channels).double() + 0.5)


# (gate, branches, the `bn` branch has constants, shape, channels_last): every set of branches, rank and layout.
CASES: list[tuple[str, tuple[str, ...], bool, tuple[int, ...], bool]] = [
    ("simplex", ("in",), False, (2, 5, 3, 3), True),
    ("simplex", ("ln",), False, (5, 4), False),
    ("simplex", ("bn",), False, (3, 2, 1, 1), False),
    ("simplex", ("in", "ln"), False, (2, 3, 2, 1, 3), True),
    ("softmax", ("in", "ln"), False, (2, 3, 7), False),
    ("simplex", ("in", "bn"), False, (1, 3, 2, 5), False),
    ("softmax", ("in", "bn"), True, (2, 1, 2, 2), False),
    ("simplex", ("ln", "bn"), True, (5, 4), False),
    ("softmax", ("ln", "bn"), False, (2, 3, 2, 1, 3), True),
    ("simplex", BRANCHES, True, (1, 2, 3, 2, 2), False),
    ("softmax", BRANCHES, True, (2, 5, 3, 3), True),
    ("softmax", BRANCHES, False, (2, 3, 7), False),
]


@pytest.mark.parametrize(("gate", "branches", "constant", "shape", "last"), CASES)
def test_value_and_all_gradients_equal_the_oracle(
    gate: str, branches: tuple[str, ...], constant: bool, shape: tuple[int, ...], last: bool
) -> None:
    leaves = problem(shape, gate, branches, last=last)
    running = running_statistics(shape[1]) if constant else None
    assert_equal_to_the_oracle(leaves, running, gate=gate, branches=branches)


# (branches, the `bn` branch has constants, number of groups, which constants of matched branches are given)
MATCHED: list[tuple[tuple[str, ...], bool, int, tuple[bool, bool]]] = [
    (BRANCHES, True, 1, (True, True)),
    (BRANCHES, False, 2, (True, True)),
    (BRANCHES, True, 2, (False, False)),
    (("in", "ln"), False, 2, (True, False)),
    (("in", "bn"), True, 1, (False, True)),
]


@pytest.mark.parametrize(("branches", "constant", "num_groups", "given"), MATCHED)
def test_matched_branches_and_groups_equal_the_oracle(
    branches: tuple[str, ...],
    constant: bool,
    num_groups: int,
    given: tuple[bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut_small(monkeypatch, 8, 8, 8)
    leaves = problem((2, 4, 3, 3), "softmax", branches)
    running = running_statistics(4) if constant else None
    shift, scale, in_scale = (torch.randn(4) * 0.3, torch.rand(4) + 0.5, torch.rand(4) + 0.5)
    ln = (shift, scale) if given[0] else (None, None)
    matching = Matching(*ln, in_scale if given[1] else None)
    dy = torch.randn(leaves["x"].shape)
    on_device = Matching(*(None if each is None else each.to(DEVICE) for each in matching))
    options: dict[str, Any] = {"gate": "softmax", "branches": branches}
    y = normalised(leaves, dy, running, matching=on_device, num_groups=num_groups, **options)
    layer = oracles.Layer(1e-5, num_groups, *matching)
    expected_y, expected = expected_of(leaves, dy, constants=running, layer=layer, **options)
    torch.testing.assert_close(y.cpu().double(), expected_y, rtol=3e-6, atol=3e-6)
    for name, leaf in leaves.items():
        torch.testing.assert_close(gradient(leaf), getattr(expected, name), rtol=1e-5, atol=2e-5)


# (shape, channels_last, positions and table entries that a program holds, programs wanted): what must be met.
CUTS = {
    "split rows": ((1, 2, 5, 5), False, 8, 64, 8, lambda cut: cut.splits == 4),
    "split rows, channels_last": ((1, 3, 3, 7), True, 16, 64, 8, lambda cut: cut.splits > 2),
    "split rows of several samples": (
        (2, 2, 9),
        False,
        4,
        8,
        12,
        lambda cut: cut.splits == 3 and cut.sample_programs > 1,
    ),
    "several tiles a program": ((2, 3, 9), False, 4, 8, 1, lambda cut: cut.splits == 1 and cut.span > 4),
    "several tiles of a table": ((3, 4, 2), False, 64, 2, 1, lambda cut: cut.channel_programs > 1),
    "blocks of channels": ((2, 5, 2, 3), True, 4, 64, 1, lambda cut: cut.row_programs > 2),
}


@pytest.mark.parametrize(("shape", "last", "tile", "table_tile", "programs", "met"), CUTS.values(), ids=CUTS)
def test_every_tiling(
    shape: tuple[int, ...],
    last: bool,
    tile: int,
    table_tile: int,
    programs: int,
    met: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut_small(monkeypatch, tile, table_tile, programs)
    leaves = problem(shape, "softmax", BRANCHES, last=last)
    assert met(triton_launch._tiling_of(leaves["x"]))
    assert_equal_to_the_oracle(leaves, gate="softmax", branches=BRANCHES)


@pytest.mark.parametrize("seed", range(3))
def test_random_problems_equal_the_oracle(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    cut_small(monkeypatch, draw.choice([8, 32]), draw.choice([4, 32]), draw.choice([1, 6]))
    shape = (draw.randint(1, 3), draw.randint(1, 5), *(draw.randint(1, 4) for _ in range(draw.randint(0, 3))))
    positions = torch.Size(shape[2:]).numel()
    branches = draw.choice([b for b in BRANCH_SETS if positions > 1 or "in" not in b])
    gate = draw.choice(GATES)
    leaves = problem(shape, gate, branches, last=len(shape) > 3 and draw.random() < 0.5)
    # A single value per channel has no moments of a batch.
    running = running_statistics(shape[1]) if shape[0] * positions == 1 or draw.random() < 0.5 else None
    # A large eps: two values that happen to lie close together make any float32 lose digits.
    assert_equal_to_the_oracle(leaves, running, gate=gate, branches=branches, eps=0.1)


UNIFORM, VERTEX = [1 / 3] * 3, [0.0, 0.0, 1.0]
ACCURACY = [
    *((torch.float32, ratio, point) for ratio, point in ((0.0, VERTEX), (30.0, UNIFORM))),
    *((torch.float32, 3000.0, point) for point in (VERTEX, UNIFORM)),
    *((torch.bfloat16, ratio, point) for ratio, point in ((0.0, UNIFORM), (30.0, VERTEX), (3000.0, UNIFORM))),
    *((torch.float16, ratio, point) for ratio, point in ((30.0, UNIFORM), (3000.0, VERTEX))),
]


@pytest.mark.parametrize(("dtype", "ratio", "point"), ACCURACY)
def test_errors_are_at_most_twice_those_of_batch_norm(
    dtype: torch.dtype, ratio: float, point: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare with BN on the same data; one rounding is allowed if BN is more exact than that."""
    split = dtype == torch.float32 and ratio == 3000
    cut_small(monkeypatch, 512 if split else 1024, 64, 4)
    x, dy = (
        (torch.randn(2, 16, 6, 10) + shift).to(dtype).contiguous(memory_format=torch.channels_last)
        for shift in (ratio, 0.0)
    )
    theirs = {"x": x, "weight": torch.rand(16) + 0.5, "bias": torch.randn(16)}
    theirs = {name: tensor.clone().to(DEVICE).requires_grad_() for name, tensor in theirs.items()}
    ours = {name: leaf.detach().clone().requires_grad_() for name, leaf in theirs.items()}
    gates = {name: torch.tensor(point, device=DEVICE).requires_grad_() for name in GATE_PARAMETERS}
    y = normalised(ours | gates, dy, gate="simplex")
    truth, expected = expected_of(ours | gates, dy, gate="simplex")

    y_of_theirs = F.batch_norm(theirs["x"], None, None, theirs["weight"], theirs["bias"], training=True)
    y_of_theirs.backward(dy.to(DEVICE))
    at_vertex = {name: torch.tensor(VERTEX) for name in GATE_PARAMETERS}
    truth_of_theirs, expected_of_theirs = expected_of(theirs | at_vertex, dy, gate="simplex")

    def errors(leaves: dict[str, Tensor], y: Tensor, truth: Tensor, expected: oracles.Gradients) -> dict[str, float]:
        pairs = {name: (gradient(leaf), getattr(expected, name)) for name, leaf in leaves.items()}
        return {name: oracles.relative_error(*pair) for name, pair in {"y": (y.cpu(), truth), **pairs}.items()}

    allowed = errors(theirs, y_of_theirs.detach(), truth_of_theirs, expected_of_theirs)
    for name, error in errors(ours, y, truth, expected).items():
        rounding = torch.finfo(dtype if name in ("x", "y") else torch.float32).eps
        assert error <= 2 * max(allowed[name], rounding), name
    for name, gate in gates.items():
        torch.testing.assert_close(gradient(gate), getattr(expected, name), rtol=1e-3, atol=2e-4 * (1 + ratio))


@pytest.mark.parametrize("vertex", [0, 2], ids=["in", "bn"])
def test_one_hot_gates_have_gradients_that_equal_the_oracle(vertex: int) -> None:
    leaves = problem((2, 3, 4), "simplex", BRANCHES)
    for name in GATE_PARAMETERS:
        leaves[name] = torch.eye(3)[vertex].to(DEVICE).requires_grad_()
    assert_equal_to_the_oracle(leaves, gate="simplex")
    assert all(bool((leaves[name].grad != 0).any()) for name in GATE_PARAMETERS)


@pytest.mark.parametrize("branches", [BRANCHES, ("ln", "bn")], ids="+".join)
def test_a_weight_of_zero_ignores_infinite_statistics(branches: tuple[str, ...]) -> None:
    """In evaluation with all weight on `bn`, the variances of the other branches overflow and BN is finite."""
    x = (torch.randn(2, 3, 4) * 1e20).requires_grad_()
    running = oracles.Constants(torch.randn(3), torch.rand(3) + 0.5)
    leaves = {"x": x.detach().to(DEVICE).requires_grad_()}
    vertex = torch.eye(len(branches))[-1]
    leaves |= {name: vertex.clone().to(DEVICE).requires_grad_() for name in GATE_PARAMETERS}
    dy = torch.randn_like(x) * 1e-20
    y = normalised(leaves, dy, running, gate="simplex", branches=branches)
    expected = F.batch_norm(x, running.mean, running.var)
    expected.backward(dy)
    torch.testing.assert_close(y.cpu(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(leaves["x"].grad.cpu(), x.grad, rtol=1e-5, atol=0)  # type: ignore[union-attr]
    assert all(bool(leaves[name].grad.isfinite().all()) for name in GATE_PARAMETERS)  # type: ignore[union-attr]


def test_a_weight_of_zero_ignores_infinite_constants() -> None:
    leaves = problem((2, 3, 4), "simplex", BRANCHES)
    for name in GATE_PARAMETERS:
        leaves[name] = torch.tensor([0.4, 0.6, 0.0]).to(DEVICE).requires_grad_()
    dy = torch.randn(2, 3, 4)
    infinite = oracles.Constants(torch.full((3,), float("inf")), torch.full((3,), float("nan")))
    y = normalised(leaves, dy, infinite, gate="simplex")
    finite = oracles.Constants(torch.zeros(3).double(), torch.ones(3).double())
    expected_y, expected = expected_of(leaves, dy, gate="simplex", constants=finite)
    torch.testing.assert_close(y.cpu().double(), expected_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(leaves["x"]), expected.x, rtol=1e-5, atol=1e-5)
    assert all(bool(leaves[name].grad.isfinite().all()) for name in GATE_PARAMETERS)  # type: ignore[union-attr]


@pytest.mark.parametrize("given", ["weight", "bias"])
def test_missing_affine_parameters_are_ones_and_zeros(given: str) -> None:
    leaves = problem((2, 3, 5), "softmax", BRANCHES)
    kept = {name: leaf for name, leaf in leaves.items() if name not in ("weight", "bias") or name == given}
    y = normalised(kept, torch.randn(2, 3, 5))
    stand_ins = {"weight": torch.ones(3), "bias": torch.zeros(3)}
    expected, _ = expected_of(stand_ins | kept, torch.randn(2, 3, 5), gate="softmax")
    torch.testing.assert_close(y.cpu().double(), expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("frozen", ["gates", "all but weight"])
def test_only_needed_gradients_are_computed(frozen: str) -> None:
    leaves = problem((2, 3, 5), "softmax", BRANCHES)
    dy = torch.randn(2, 3, 5)
    _, expected = expected_of(leaves, dy, gate="softmax")
    chosen = {"gates": [*GATE_PARAMETERS], "all but weight": ["x", *GATE_PARAMETERS, "bias"]}[frozen]
    for name in chosen:
        leaves[name].requires_grad_(False)
    normalised(leaves, dy)
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name in chosen)
        if leaf.grad is not None:
            torch.testing.assert_close(gradient(leaf), getattr(expected, name), rtol=1e-5, atol=1e-5)


def test_parameters_may_have_another_dtype_than_x() -> None:
    leaves = problem((2, 3, 5), "softmax", BRANCHES, dtype=torch.float16)
    leaves["weight"] = leaves["weight"].detach().bfloat16().requires_grad_()
    leaves["mean_weight"] = leaves["mean_weight"].detach().half().requires_grad_()
    dy = torch.randn(2, 3, 5).half()
    y = normalised(leaves, dy)
    expected_y, expected = expected_of(leaves, dy, gate="softmax")
    assert oracles.relative_error(y.cpu(), expected_y) < 1e-3
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert oracles.relative_error(gradient(leaf), getattr(expected, name)) < 5e-3


@pytest.mark.parametrize("expanded", [True, False])
def test_gradients_inputs_and_parameters_of_any_strides(expanded: bool) -> None:
    leaves = problem((2, 3, 4), "softmax", BRANCHES)
    if not expanded:
        leaves["x"] = torch.randn(4, 3, 2).permute(2, 1, 0).to(DEVICE).requires_grad_()
        leaves |= {
            name: torch.rand(3, 2, device=DEVICE)[:, 0].requires_grad_() for name in ("weight", *GATE_PARAMETERS)
        }
    dy = torch.randn(2, 1, 4).expand(2, 3, 4) if expanded else torch.randn(4, 3, 2).permute(2, 1, 0)
    y = normalised(leaves, dy)
    expected_y, expected = expected_of(leaves, dy, gate="softmax")
    torch.testing.assert_close(y.cpu().double(), expected_y, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(gradient(leaves["x"]), expected.x, rtol=1e-5, atol=1e-5)


def test_running_statistics_are_updated_in_float32() -> None:
    x = torch.randn(2, 3, 5, device=DEVICE).half()
    mixing = Mixing("simplex", BRANCHES, 1e-5)
    vertex = torch.tensor([1.0, 0.0, 0.0], device=DEVICE)
    _, batch, saved, _ = triton_launch.forward(Inputs(x, vertex, vertex, None, None, None, mixing))
    assert batch is not None
    assert all(table.dtype == torch.float32 for table in (*batch, *saved))
    torch.testing.assert_close(batch.mean, x.float().mean((0, 2))[None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch.var, x.float().var((0, 2), correction=0)[None], rtol=1e-5, atol=1e-6)
    constants = Moments(torch.zeros(1, 3, device=DEVICE), torch.ones(1, 3, device=DEVICE))
    assert triton_launch.forward(Inputs(x, vertex, vertex, None, None, constants, mixing)).batch is None


def test_one_position_leaves_in_no_variance_and_y_finite() -> None:
    """On CPU `switch_norm` refuses this before it selects a backend; on devices it would have to wait."""
    x, uniform = torch.randn(3, 4, 1, device=DEVICE), torch.full((3,), 1 / 3, device=DEVICE)
    mixing = Mixing("simplex", BRANCHES, 1e-5)
    inputs = Inputs(x, uniform, uniform, None, None, None, mixing)
    y, _, saved, _ = triton_launch.forward(inputs)
    found = triton_launch.backward(x, inputs, saved, (True, True, True, False, False))
    assert bool((saved.var == 0).all())
    assert all(bool(tensor.isfinite().all()) for tensor in (y, *found[:3]))  # type: ignore[union-attr]


# (branches, constants are given) to the kernels started forward and backward, where rows are not split.
LAUNCHES = {
    "training": (BRANCHES, False, ["moments", "pool", "affine"]),
    "in and running statistics": (("in", "bn"), True, ["moments", "affine"]),
}


@pytest.mark.parametrize(("branches", "constant", "forward"), LAUNCHES.values(), ids=LAUNCHES)
def test_launches_are_few(
    branches: tuple[str, ...], constant: bool, forward: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[str] = []
    for name in ("moments", "pool", "affine", "sums", "terms", "gradient"):
        kernel = getattr(triton_launch, f"{name}_kernel")
        monkeypatch.setattr(triton_launch, f"{name}_kernel", _Counted(name, kernel, launches))
    leaves = problem((2, 3, 4), "softmax", branches)
    normalised(leaves, torch.randn(2, 3, 4), running_statistics(3) if constant else None, branches=branches)
    assert launches == [*forward, "sums", "terms", "gradient"]


class _Counted:
    """A kernel that records its name when it starts."""

    def __init__(self, name: str, kernel: Any, launches: list[str]) -> None:
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches.append(self.name)
        return self.kernel[grid]


# --- gates -----------------------------------------------------------------------------------------------------------

OFF_SIMPLEX = {
    "beyond the vertex": [-0.4, -0.1, 1.5],
    "sum too large": [0.9, 0.8, 0.7],
    "negative": [-3.0, -1.0, -2.0],
    "beyond float32's unit": [1e10, -1e10, 5.0],
}


@pytest.mark.parametrize("point", OFF_SIMPLEX.values(), ids=OFF_SIMPLEX)
def test_a_training_step_projects_the_stored_points_as_the_oracle(point: list[float]) -> None:
    layer = SwitchNorm2d(4, gate="simplex", device=DEVICE)
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor(point))
        layer.var_weight.copy_(torch.tensor([0.2, 0.3, 0.5]))
    before = layer.var_weight.detach().clone()
    with use_backend("triton"), never_waiting():
        layer.project_gates()
    assert (
        oracles.relative_error(layer.mean_weight.detach().cpu(), oracles.project_by_enumeration(torch.tensor(point)))
        < 1e-6
    )
    assert layer.var_weight.detach().equal(before)


def test_weights_off_the_simplex_are_projected_and_the_gradient_is_centred() -> None:
    leaves = problem((2, 3, 4), "simplex", BRANCHES)
    leaves["mean_weight"] = torch.tensor([0.3, -0.2, 1.4]).to(DEVICE).requires_grad_()
    assert_equal_to_the_oracle(leaves, gate="simplex")


@pytest.mark.parametrize("branches", [("bn",), ("in", "bn")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_points_of_any_branches_and_dtype_are_projected_in_float32(dtype: torch.dtype, branches: Any) -> None:
    points = [torch.tensor([0.8, 0.9][: len(branches)], dtype=dtype, device=DEVICE) for _ in range(2)]
    exact = oracles.project_by_enumeration(points[0].float().cpu())
    version = points[0]._version
    triton_launch.project_points(points, branches)
    tolerance = 1e-6 if dtype == torch.float32 else 0.0
    for point in points:
        torch.testing.assert_close(point.cpu(), exact.to(dtype), rtol=tolerance, atol=0)
    before = points[0].clone()
    triton_launch.project_points(points[:1], branches)
    assert points[0].equal(before)
    assert points[0]._version == version


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_that_is_not_a_number_is_not_hidden(gate: str) -> None:
    x, point = torch.randn(1, 2, 3, device=DEVICE), torch.tensor([0.2, float("nan"), 0.5], device=DEVICE)
    fine = torch.full((3,), 1 / 3, device=DEVICE)
    mixing = Mixing(gate, BRANCHES, 1e-5)  # type: ignore[arg-type]
    assert bool(triton_launch.forward(Inputs(x, point, fine, None, None, None, mixing)).y.isnan().all())


def test_a_fixed_one_hot_gate_trains_as_batch_norm() -> None:
    bn = nn.BatchNorm2d(3, device=DEVICE)
    twin = nn.BatchNorm2d(3, device=DEVICE)
    layer = SwitchNorm2d.from_batch_norm(bn, bn_statistics="batch")
    for _ in range(2):
        x = torch.randn(2, 3, 2, 2, device=DEVICE)
        with use_backend("triton"):
            y = layer(x)
        torch.testing.assert_close(y, twin(x), rtol=1e-5, atol=1e-5)
    assert layer.mean_weight.tolist() == layer.var_weight.tolist() == [0, 0, 1]
    torch.testing.assert_close(layer.running_var, twin.running_var, rtol=1e-5, atol=1e-6)


# --- choice ----------------------------------------------------------------------------------------------------------


def test_on_a_gpu_it_is_the_default_but_for_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_can_compile_for", lambda device: True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stub: Any = SimpleNamespace(dtype=dtype, device=torch.device("cuda"))
        assert fused_backend(stub) is triton_launch.TRITON
    double: Any = SimpleNamespace(dtype=torch.float64, device=torch.device("cuda"))
    assert fused_backend(double) is None
    with use_backend("triton"):
        assert fused_backend(double) is None


@pytest.mark.parametrize(("capability", "backend"), [((6, 1), None), ((7, 0), "triton"), ((9, 0), "triton")])
def test_a_gpu_that_triton_does_not_compile_for_gets_the_reference(
    capability: tuple[int, int], backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_can_compile_for", selection._can_compile_for.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    stub: Any = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    found = fused_backend(stub)
    assert (found and found.name) == backend


def test_without_triton_a_gpu_gets_the_reference_and_asking_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stub: Any = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    monkeypatch.setattr(selection, "_has_triton", lambda: False)
    monkeypatch.setattr(selection, "_load_triton", selection._load_triton.__wrapped__)
    assert fused_backend(stub) is None
    with (
        use_backend("triton"),
        pytest.raises(LayerError, match=r"the backend 'triton' needs Triton, .* cannot be imported: pip install"),
    ):
        fused_backend(stub)


def test_cpu_tensors_are_refused_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "is_interpreted", lambda: False)
    gates = torch.ones(3)
    with (
        use_backend("triton"),
        pytest.raises(
            LayerError,
            match=r"the backend 'triton' runs on CUDA devices, got a tensor on cpu: move model and input to one, use "
            r"the backend 'native', or set TRITON_INTERPRET=1 before Triton is imported",
        ),
    ):
        switch_norm(torch.randn(2, 3, 4), gates, gates, training=True)


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Absent:  # what Triton asks a device before it compiles for it
    def get_current_target(self): return GPUTarget("cuda", 80, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Absent())
run = JITFunction.run
def compile_only(self, *args, grid, warmup, **options):
    assert "ptx" in run(self, *args, grid=grid, warmup=True, **options).asm
    print(self.fn.__name__)
JITFunction.run = compile_only

from normswap.layers.backends import triton_launch
from normswap.layers.backends.interface import Inputs
from normswap.layers.gating import Mixing
from normswap.layers.matching import Matching
triton_launch._TILE = triton_launch._TABLE_TILE = 128
x, point, weight = torch.empty(1, 2, 20, 20, dtype=torch.bfloat16), torch.empty(3), torch.empty(2)
mixing = Mixing("simplex", ("in", "ln", "bn"), 1e-5)
inputs = Inputs(x, point, point, weight, weight, None, mixing)
y, _, saved, _ = triton_launch.forward(inputs)
triton_launch.backward(y, inputs, saved, (True,) * 5)
triton_launch.project_points([point, point], mixing.branches)
x, weight = torch.empty(1, 4, 20, 20), torch.empty(4)
mixing = Mixing("simplex", ("in", "ln", "bn"), 1e-5, 2)
inputs = Inputs(x, point, point, weight, weight, None, mixing, None, Matching(weight, weight, weight))
triton_launch.backward(y.new_empty(x.shape, dtype=x.dtype), inputs, triton_launch.forward(inputs).saved, (True,) * 5)
"""


@pytest.mark.multiprocess
def test_the_compiler_takes_every_kernel(tmp_path: Any) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=environment)
    passes = ("moments", "pool", "affine", "sums", "terms", "gradient")
    names = (*passes, "project", *passes)  # then of matched branches
    assert done.stdout.split() == [f"{name}_kernel" for name in names], done.stderr[-2000:]
