"""Importance weights that are set, and the penalty that drives them to one branch."""

from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap import SwitchNorm2d, gate_impurity, importance_weights, set_importance
from normswap.errors import ArgumentError, PlanError


def layers(**options: Any) -> nn.Module:
    return nn.Sequential(SwitchNorm2d(4, **options), SwitchNorm2d(4, branches=("ln", "bn"), **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gate", ["simplex", "softmax"])
def test_a_branch_gets_exactly_all_weight(gate: Any, dtype: torch.dtype) -> None:
    model = layers(gate=gate).to(dtype)
    set_importance(model, {"0": "in", "1": "bn"})
    assert model[0].is_at("in")
    assert model[1].is_at("bn")


@pytest.mark.parametrize("gate", ["simplex", "softmax"])
def test_what_is_read_can_be_set(gate: Any) -> None:
    model, other = layers(gate=gate), layers(gate=gate)
    set_importance(model, {"0": ({"in": 0.5, "bn": 0.5}, {"ln": 0.25, "bn": 0.75}), "1": {"ln": 1}})
    set_importance(nn.DataParallel(other), importance_weights(model))
    for name, site in importance_weights(model).items():
        for mine, theirs in zip(site, importance_weights(other)[name], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-6)
    assert importance_weights(other)["0"].var == pytest.approx({"in": 0, "ln": 0.25, "bn": 0.75})


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"0": "bn", "5": "ln"}, PlanError, "weights: '5' is not a site of the model; "),
        (
            {"0": "bn", "1": "in"},
            PlanError,
            "weights['1']: expected one of ('ln', 'bn'), or weights of these with sum 1",
        ),
        ({"0": {"ln": 0.5}}, PlanError, "weights['0']: expected one of ('in', 'ln', 'bn'), or weights"),
        ({"0": {"ln": 2, "bn": -1}}, PlanError, "got {'ln': 2, 'bn': -1}"),
        ({"0": {"ln": float("nan"), "bn": 1}}, PlanError, "weights['0']: expected"),
        ({"0": 3}, PlanError, "got 3"),
        (["0"], ArgumentError, "weights: expected a dict such as {'layer1.0.bn1': 'ln'}, got a list"),
    ],
)
def test_a_wrong_value_changes_nothing(weights: Any, error: type[Exception], message: str) -> None:
    model = layers()
    before = importance_weights(model)
    with pytest.raises(error) as raised:
        set_importance(model, weights)
    assert message in str(raised.value)
    assert importance_weights(model) == before


def test_the_nearest_site_is_named() -> None:
    model = nn.Sequential()
    model.add_module("layer", SwitchNorm2d(4))
    with pytest.raises(PlanError, match=r"'laier' is not a site of the model; did you mean 'layer'\?"):
        set_importance(model, {"laier": "bn"})


@pytest.mark.parametrize("gate", ["simplex", "softmax"])
def test_impurity_is_one_minus_the_sum_of_squares(gate: Any) -> None:
    model = layers(gate=gate)
    set_importance(model, {"0": {"in": 0.5, "bn": 0.5}, "1": {"ln": 0.25, "bn": 0.75}})
    assert gate_impurity(model).item() == pytest.approx(2 * 0.5 + 2 * (1 - 0.0625 - 0.5625), abs=1e-6)
    model[0].mean_weight.requires_grad_(False)
    assert gate_impurity(model).item() == pytest.approx(2 * (1 - 0.0625 - 0.5625), abs=1e-6)
    assert gate_impurity(nn.Linear(2, 2)).item() == 0


def test_its_descent_ends_at_the_branch_with_most_weight() -> None:
    model = layers(gate="simplex")
    set_importance(model, {"0": {"in": 0.5, "ln": 0.3, "bn": 0.2}, "1": {"ln": 0.4, "bn": 0.6}})
    optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.1, importance_lr=0.1))
    for _ in range(30):
        optimizer.zero_grad()
        gate_impurity(model).backward()
        optimizer.step()
        for layer in model:
            layer.project_gates()  # type: ignore[operator]
    assert model[0].is_at("in")
    assert model[1].is_at("bn")
