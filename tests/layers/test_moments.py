"""Moments: compared with all values, pooled along either axis, and stable where E[x^2] - E[x]^2 cancels."""

import pytest
import torch

from normswap.layers.backends.reference import (
    MomentAccumulator,
    Moments,
    accumulation_dtype,
    instance_moments,
    pool_moments,
)
from tests.helpers import oracles

SHAPES = {
    "(N, C)": (3, 4),
    "(N, C, L)": (3, 4, 5),
    "(N, C, H, W)": (3, 4, 2, 3),
    "(N, C, D, H, W)": (2, 3, 2, 2, 3),
    "one position": (3, 4, 1, 1),
    "one sample": (1, 4, 2, 3),
    "one channel": (3, 1, 2, 3),
}
SHAPE_CASES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)

# (dtype of the input, mean over standard deviation): each is NaN or negative for E[x^2] - E[x]^2 in that dtype.
RATIOS = {
    "bfloat16, 30": (torch.bfloat16, 30.0),
    "bfloat16, 3000": (torch.bfloat16, 3000.0),
    "float16, 300": (torch.float16, 300.0),
    "float32, 30": (torch.float32, 30.0),
    "float32, 3000": (torch.float32, 3000.0),
    "float32, 100000": (torch.float32, 1e5),
}
RATIO_CASES = pytest.mark.parametrize(("dtype", "ratio"), RATIOS.values(), ids=RATIOS)

BRANCH_OF_DIM = {"bn": 0, "ln": 1}


@SHAPE_CASES
def test_instance_moments_are_those_of_the_gathered_values(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).double() * 2 + 1
    moments, expected = instance_moments(x), oracles.statistics(x, "in")
    torch.testing.assert_close(moments.mean, expected.mean, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(moments.var, expected.var, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("branch", "dim"), BRANCH_OF_DIM.items(), ids=BRANCH_OF_DIM)
@SHAPE_CASES
def test_pooled_moments_are_those_of_the_gathered_values(shape: tuple[int, ...], branch: str, dim: int) -> None:
    x = torch.randn(shape).double() * 2 + 1
    pooled, expected = pool_moments(instance_moments(x), dim), oracles.statistics(x, branch)
    assert pooled.mean.shape == pooled.var.shape == tuple(1 if d == dim else shape[d] for d in (0, 1))
    torch.testing.assert_close(pooled.mean.expand(shape[:2]), expected.mean, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(pooled.var.expand(shape[:2]), expected.var, rtol=1e-13, atol=1e-14)


def test_pooling_in_either_order_gives_the_moments_of_everything() -> None:
    x = torch.randn(4, 3, 5, 2).double() + 3
    table = instance_moments(x)
    for first, second in ((0, 1), (1, 0)):
        everything = pool_moments(pool_moments(table, first), second)
        torch.testing.assert_close(everything.mean.squeeze(), x.mean())
        torch.testing.assert_close(everything.var.squeeze(), x.var(correction=0))


def test_moments_follow_shift_and_scale() -> None:
    x = torch.randn(2, 3, 4, 4).double()
    plain, moved = instance_moments(x), instance_moments(5 * x - 2)
    torch.testing.assert_close(moved.mean, 5 * plain.mean - 2)
    torch.testing.assert_close(moved.var, 25 * plain.var)


@RATIO_CASES
def test_variances_survive_a_large_mean(dtype: torch.dtype, ratio: float) -> None:
    x = (torch.randn(2, 3, 16, 16) + ratio).to(dtype)
    table = instance_moments(x)
    for branch, moments in {"in": table, "ln": pool_moments(table, 1), "bn": pool_moments(table, 0)}.items():
        expected = oracles.statistics(x, branch)
        assert moments.mean.dtype == moments.var.dtype == torch.float32
        assert bool((moments.var >= 0).all())
        torch.testing.assert_close(moments.var.expand(2, 3).double(), expected.var, rtol=1e-2, atol=0)


def test_the_variance_of_a_constant_is_zero_and_never_negative() -> None:
    table = instance_moments(torch.full((2, 3, 7, 7), 1234.567))
    assert table.var.tolist() == [[0.0] * 3] * 2
    assert bool((pool_moments(table, 0).var >= 0).all())


def test_one_position_has_no_variance_instead_of_nan() -> None:
    table = instance_moments(torch.randn(2, 3, 1, 1))
    assert isinstance(table, Moments)
    assert table.var.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_moments_are_accumulated_in_float32_or_wider(dtype: torch.dtype, expected: torch.dtype) -> None:
    x = torch.ones(2, 3, 4, dtype=dtype)
    assert accumulation_dtype(x) == expected
    assert instance_moments(x).mean.dtype == expected


# --- gathered part by part --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [1, 100, 1 << 18])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 5, 2, 3)])
def test_gathered_moments_are_those_of_everything_at_once(
    monkeypatch: pytest.MonkeyPatch, part: int, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr("normswap.layers.backends.reference._CHUNK_ON_CPU", part)
    batches = [torch.randn(n, *shape[1:]) / 2 + 3000 for n in (1, 0, 5, 2)]
    gathered = MomentAccumulator(4)
    for x in batches:
        gathered.add(x)
    flat = torch.cat([x.double().transpose(0, 1).reshape(4, -1) for x in batches], 1)
    assert gathered.count == flat.shape[1]
    torch.testing.assert_close(gathered.mean, flat.mean(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(gathered.var, flat.var(1, correction=0), rtol=1e-11, atol=1e-14)


def test_nothing_gathered_has_no_variance() -> None:
    gathered = MomentAccumulator(2)
    gathered.merge(0, torch.full((2,), float("nan")), torch.full((2,), float("nan")))
    assert (gathered.count, gathered.mean.tolist()) == (0, [0.0, 0.0])
    assert gathered.var.isnan().all()
