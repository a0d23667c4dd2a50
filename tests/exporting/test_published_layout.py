"""The published layout of SN: written and read back as the same function, and what it cannot contain."""

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import SwapError
from normswap.layers.published_state import ZERO_LOGIT, sparsest_max
from tests.exporting import networks


def test_a_network_is_read_back_as_the_same_function(tmp_path: Path) -> None:
    model, x, path = networks.moved((0.5, 0.0, 0.5), match=False), networks.example(), tmp_path / "sn.pth"
    result = normswap.export(model, path, to="published-layout", example_inputs=x)
    assert result.cases[0].relative_error < 1e-6
    assert any("4 importance weights of 0 became the logit -200" in note for note in result.notes)
    state = torch.load(path)["state_dict"]
    assert state["norm.weight"].shape == (1, 8, 1, 1)
    assert state["norm.running_var"].shape == (1, 8, 1)
    assert state["norm.mean_weight"][1] == ZERO_LOGIT
    assert torch.softmax(state["norm.mean_weight"], 0).tolist() == [0.5, 0.0, 0.5]
    assert not [name for name in state if "num_batches" in name or "ln_" in name]


@pytest.mark.parametrize("gate", ["simplex", "softmax"])
def test_branches_that_a_layer_lacks_have_weight_0(gate: Any, tmp_path: Path) -> None:
    layer = normswap.SwitchNorm2d(4, gate=gate, branches=("in", "bn"), eps=1e-3).eval()
    model, x = nn.Sequential(layer), torch.randn(2, 4, 5, 5)
    result = normswap.export(model, tmp_path / "a.pt", to="published-layout", example_inputs=x)
    assert result.cases[0].relative_error < 1e-6
    assert any("Build the published layers with eps 0.001 (theirs: 1e-05)." in note for note in result.notes)
    assert torch.load(tmp_path / "a.pt")["state_dict"]["0.mean_weight"].shape == (3,)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (normswap.SwitchNorm1d(4, branches=("ln", "bn")), torch.randn(3, 4)),
        (normswap.SwitchNorm2d(4, branches=("in", "ln")), torch.randn(3, 4, 5, 5)),
        (normswap.SwitchNorm3d(4), torch.randn(3, 4, 2, 3, 4)),
    ],
)
def test_other_ranks_and_branches(layer: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(layer).eval()
    result = normswap.export(model, tmp_path / "a.pt", to="published-layout", example_inputs=x)
    assert result.cases[0].relative_error < 1e-6
    weight = torch.load(tmp_path / "a.pt")["state_dict"]["0.weight"]
    assert weight.dim() == x.dim()


REFUSED = {
    "no SN layer": (nn.BatchNorm2d(4), "the network has none: convert it first"),
    "groups": (normswap.SwitchNorm2d(4, num_groups=2), "has no groups of channels, and this layer has 2"),
    "no affine": (normswap.SwitchNorm2d(4, affine=False), "has no layers without weight and bias"),
    "in over samples": (normswap.SwitchNorm1d(4, branches=("in", "ln")), None),
}


@pytest.mark.parametrize(("layer", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_published_code_cannot_compute(layer: nn.Module, message: str | None, tmp_path: Path) -> None:
    if message is None:
        normswap.export(nn.Sequential(layer), tmp_path / "a.pt", to="published-layout")
        return
    with pytest.raises(SwapError, match=message):
        normswap.export(nn.Sequential(layer), tmp_path / "a.pt", to="published-layout")
    assert not list(tmp_path.iterdir())


def test_matched_branches_with_weight_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SwapError, match=r"norm: the published code of SN has no matching constants, and `ln` is matched"
    ):
        normswap.export(networks.moved(), tmp_path / "a.pt", to="published-layout")
    normswap.export(networks.converted(), tmp_path / "a.pt", to="published-layout")  # at BN they have no effect


# --- the sparse version


def sparse_state(*, fixed: bool, radius: float) -> "OrderedDict[str, torch.Tensor]":
    state = OrderedDict(weight=torch.rand(1, 4, 1, 1), bias=torch.rand(1, 4, 1, 1))
    gate = torch.tensor([0.0, 1.0, 0.0]) if fixed else torch.tensor([0.3, 0.5, 0.1])
    state |= {"mean_weight": gate, "var_weight": gate.clone(), "running_mean": torch.zeros(1, 4, 1)}
    state |= {"running_var": torch.ones(1, 4, 1), "radius": torch.tensor([radius])}
    return state | {name: torch.tensor([float(fixed)]) for name in ("mean_fixed", "var_fixed")}


@pytest.mark.parametrize("gate", ["simplex", "softmax"])
def test_files_of_the_sparse_version_load(gate: Any) -> None:
    layer = normswap.SwitchNorm2d(4, gate=gate)
    layer.load_state_dict(sparse_state(fixed=True, radius=0.8), strict=True)
    assert layer.importance_weights()[0].tolist() == [0.0, 1.0, 0.0]
    layer.load_state_dict(sparse_state(fixed=False, radius=0.5), strict=True)
    expected = sparsest_max(torch.tensor([0.3, 0.5, 0.1]), 0.5)
    assert torch.allclose(layer.importance_weights()[1], expected, atol=1e-6)


@pytest.mark.parametrize("radius", [0.0, 0.2, 0.5, 0.7, 0.8])
def test_sparsestmax_is_the_nearest_allowed_point(radius: float) -> None:
    grid = torch.tensor([(i, j, 200 - i - j) for i in range(201) for j in range(201 - i)], dtype=torch.float64) / 200
    allowed = grid[(grid - 1 / 3).norm(dim=1) >= radius - 1e-9]
    for logits in torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
        point = sparsest_max(logits, radius)
        assert abs(float(point.sum()) - 1) < 1e-9
        assert float(point.min()) >= 0
        assert float((point - 1 / 3).norm()) >= radius - 1e-6
        nearest = float((allowed - logits).norm(dim=1).min())
        assert float((point - logits).norm()) <= nearest + 1e-2


def test_sparsestmax_at_the_largest_radius_is_one_hot() -> None:
    assert sparsest_max(torch.tensor([0.3, 0.5, 0.1]), math.sqrt(2 / 3)).tolist() == pytest.approx([0, 1, 0], abs=1e-3)
