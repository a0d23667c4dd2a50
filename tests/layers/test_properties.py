"""Properties of `switch_norm` on generated layers: it equals the float64 oracle in every backend, dtype and layout.

The examples are derived from the code of each test, so that every run takes the same ones.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import normswap
from normswap.layers.backends import cpu
from normswap.layers.functional import switch_norm
from normswap.layers.gating import BRANCHES, GATES
from tests.helpers import oracles

settings.register_profile("tests", derandomize=True, database=None, deadline=None, max_examples=30)
PROFILE = settings.get_profile("tests")

# Relative to the size of the summed terms.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
BACKENDS = [
    pytest.param("reference", True, id="reference"),
    pytest.param("native", True, id="C", marks=pytest.mark.skipif(not cpu.AVAILABLE, reason="needs the extension")),
    pytest.param("native", False, id="without C"),
]


def channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else x


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def every_second(x: Tensor) -> Tensor:
    """Return the same values with gaps in memory."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


GATE_NAMES = ("mean_weight", "var_weight")
LAYOUTS: list[Callable[[Tensor], Tensor]] = [torch.clone, channels_last, transposed, every_second]


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    """One call of a layer: its tensors and its options."""
    # At one position per channel another branch takes the weight of `in`: test_single_position.py.
    spatial = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda sizes: max(sizes) > 1))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 5)), *spatial)
    dtype = draw(st.sampled_from(list(LIMITS)))
    chosen = draw(st.sets(st.sampled_from(BRANCHES), min_size=1))
    branches = tuple(branch for branch in BRANCHES if branch in chosen)
    points = st.lists(st.floats(-2, 2, width=32), min_size=len(branches), max_size=len(branches))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lay_out = draw(st.sampled_from(LAYOUTS))
    rows = torch.rand(4, shape[1], generator=generator, dtype=wide) + 0.5
    return {
        "leaves": {
            "x": lay_out((torch.randn(shape, generator=generator) * 1.5 + 0.7).to(dtype)),
            "mean_weight": torch.tensor(draw(points), dtype=wide),
            "var_weight": torch.tensor(draw(points), dtype=wide),
            "weight": rows[0],
            "bias": rows[1] - 1,
        },
        "dy": lay_out(torch.randn(shape, generator=generator).to(dtype)),
        "running": oracles.Constants(rows[2] - 1, rows[3]),
        "training": draw(st.booleans()),
        "options": {"gate": draw(st.sampled_from(GATES)), "branches": branches, "eps": 1e-2},
    }


def sizes(dy: Tensor, leaves: dict[str, Tensor], eps: float) -> dict[str, float]:
    """Return an upper bound of the summed terms of each result, to which rounding errors are relative."""
    x, weight = leaves["x"].double(), leaves["weight"].double()
    y = 1 + x.norm().item() / eps**0.5
    gradient = dy.double().norm().item() * weight.max().item() / eps**0.5
    gates = gradient * (1 + x.abs().max().item()) ** 2
    return {"y": y, "x": gradient, "weight": gates, "bias": gates, "mean_weight": gates, "var_weight": gates}


@pytest.mark.parametrize(("backend", "by_c"), BACKENDS)
def test_values_and_gradients_are_those_of_the_oracle(backend: str, by_c: bool) -> None:
    @settings(PROFILE)
    @given(layers())
    def holds(layer: dict[str, Any]) -> None:
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in layer["leaves"].items()}
        dy, options, training = layer["dy"], layer["options"], layer["training"]
        mean, var = layer["running"].mean.clone(), layer["running"].var.clone()
        with normswap.use_backend(backend):
            y = switch_norm(**leaves, running_mean=mean, running_var=var, training=training, momentum=0.3, **options)
            gradients = torch.autograd.grad(y, list(leaves.values()), dy)

        wide = {name: leaf.detach().double() for name, leaf in leaves.items()}
        constants = None if training else oracles.Constants(*(t.double() for t in vars(layer["running"]).values()))
        expected_y, expected = oracles.switch_norm(dy=dy, constants=constants, **wide, **options)
        found = {"y": y, **dict(zip(leaves, gradients, strict=True))}
        assert (y.dtype, y.shape) == (leaves["x"].dtype, leaves["x"].shape)
        limit = LIMITS[y.dtype]
        for name, size in sizes(dy, leaves, options["eps"]).items():
            value = expected_y if name == "y" else getattr(expected, name)
            error = (found[name].double() - value).norm().item()
            assert error <= limit * min(size, 10 * value.norm().item() + 1), f"{name} is {error:.1e} off"

        after = layer["running"]
        if training and "bn" in options["branches"]:
            after = oracles.updated_running(after, leaves["x"].detach(), 0.3)
        for name, value in (("mean", mean), ("var", var)):
            assert oracles.relative_error(value, getattr(after, name)) <= 10 * limit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "AVAILABLE", by_c)
        holds()


@settings(PROFILE)
@given(layers(), st.permutations(range(4)))
def test_the_order_of_samples_does_not_matter(layer: dict[str, Any], order: list[int]) -> None:
    leaves = {name: leaf.double() for name, leaf in layer["leaves"].items()}
    order = [index for index in order if index < len(leaves["x"])]
    y = switch_norm(**leaves, training=True, **layer["options"])
    moved = switch_norm(**leaves | {"x": leaves["x"][order]}, training=True, **layer["options"])
    torch.testing.assert_close(moved, y[order], rtol=1e-10, atol=1e-10)


@settings(PROFILE)
@given(layers(), st.floats(0.1, 10), st.floats(-10, 10))
def test_batch_statistics_cancel_scale_and_shift(layer: dict[str, Any], scale: float, shift: float) -> None:
    """Scaling and shifting x changes nothing if eps is scaled too and the weights sum to 1."""
    leaves = {name: leaf.double() for name, leaf in layer["leaves"].items()}
    options = layer["options"]
    y = switch_norm(**leaves, training=True, **options)
    moved = leaves | {"x": leaves["x"] * scale + shift}
    same = switch_norm(**moved, training=True, **options | {"eps": options["eps"] * scale**2})
    torch.testing.assert_close(same, y, rtol=1e-8, atol=1e-8)


@settings(PROFILE)
@given(st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3), st.floats(0.01, 2))
def test_a_simplex_gate_is_on_the_simplex_after_every_step(gradient: list[float], rate: float) -> None:
    layer = normswap.SwitchNorm2d(4, gate="simplex")
    optimizer = torch.optim.SGD([layer.mean_weight, layer.var_weight], rate)
    layer.mean_weight.grad, layer.var_weight.grad = torch.tensor(gradient), -torch.tensor(gradient)
    optimizer.step()
    expected = {name: oracles.project_by_enumeration(getattr(layer, name).detach()) for name in GATE_NAMES}
    layer.train()(torch.randn(2, 4, 3, 3))
    for name in GATE_NAMES:
        point = getattr(layer, name).detach()
        assert point.min() >= 0
        assert abs(point.double().sum().item() - 1) < 1e-6
        torch.testing.assert_close(point.double(), expected[name], rtol=0, atol=1e-6)
