"""Sites forced to one branch: their errors, plans within a budget, and the settings of a plan."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from normswap.surgery.importance import gate_parameters


class Net(nn.Module):
    """Four BN sites, one of them a call, and two other norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.other = nn.Sequential(nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(2, 8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.full((8,), 0.5))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x)))
        x = F.batch_norm(x, self.mean, self.var, training=self.training)
        return self.head((x + self.other(x)).relu().mean((2, 3)))


def network() -> nn.Module:
    torch.manual_seed(0)
    model = Net().train()
    for _ in range(20):
        model(torch.randn(8, 3, 8, 8))
    return model.eval()


X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def mixed(**options: Any) -> nn.Module:
    model = normswap.convert(network(), X[:2], **options).model
    for number, (name, site) in enumerate(normswap.importance_weights(model).items()):
        share = 0.1 * (number + 1) if len(site.mean) > 1 else 0.0
        first, last = next(iter(site.mean)), max(site.mean, key=lambda branch: site.mean[branch])
        other = first if first != last else [*site.mean][-1]
        normswap.set_importance(model, {name: {last: 1 - share, other: share} if share else last})
    return model.eval()


def error(model: nn.Module, branches: dict[str, Any]) -> float:
    """The relative error of the outputs with sites at one branch."""
    with torch.no_grad():
        reference = model(X)
        before = normswap.importance_weights(model)
        normswap.set_importance(model, branches)
        found = float((model(X) - reference).norm() / reference.norm())
        normswap.set_importance(model, before)
    return found


@pytest.mark.parametrize("gate", ["simplex", "softmax"])
def test_each_branch_of_each_site_is_measured_alone(gate: Any) -> None:
    model = mixed(gate=gate)
    analysis = normswap.analyze(model, [X[:6], X[6:]])
    assert len(analysis.converted) == 4
    assert not analysis.batch_norms
    assert analysis.advice == ""
    for site in analysis.converted:
        assert site.single is None
        for branch in site.branches:
            assert branch.relative_error == pytest.approx(error(model, {site.fqn: branch.branch}), rel=1e-3, abs=1e-6)
        assert [each.relative_error for each in site.branches] == sorted(each.relative_error for each in site.branches)
    best = [site.best.relative_error for site in analysis.converted]
    assert best == sorted(best)


def test_a_plan_is_within_its_budget_and_no_site_more_fits() -> None:
    model = mixed()
    everything = normswap.analyze(model, [X]).plan
    assert everything is not None
    assert len(everything.branches) == 4
    sizes = []
    for budget in (0.0, 0.02, 0.05, 10.0):
        analysis = normswap.analyze(model, [X], budget=budget)
        plan = analysis.plan
        assert plan is not None
        assert plan.relative_error <= budget
        assert plan.relative_error == pytest.approx(error(model, dict(plan.branches)), rel=1e-3, abs=1e-6)
        for site in analysis.converted:
            if site.fqn not in plan.branches:
                assert all(error(model, {**plan.branches, site.fqn: b.branch}) > budget for b in site.branches)
        sizes.append(len(plan.branches))
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (0, 4)
    assert 0 < sizes[2] < 4


def test_the_model_keeps_its_gates_also_after_an_error() -> None:
    model = mixed().train()
    before = {name: gate.clone() for name, gate in gate_parameters(model).items()}
    normswap.analyze(model, [X], budget=0.05)
    with pytest.raises(normswap.ModelError):
        normswap.analyze(model, [X, torch.randn(4, 5, 8, 8)])
    assert all(gate.equal(before[name]) for name, gate in gate_parameters(model).items())
    assert model.training


def test_sites_at_one_branch_are_in_every_plan() -> None:
    model = normswap.convert(network(), X[:2]).model
    analysis = normswap.analyze(model, [X], budget=0.0)
    assert analysis.plan is not None
    assert {site.single for site in analysis.converted} == {"bn"}
    assert {*analysis.plan.branches.values()} == {"bn"}


def test_a_network_that_is_partly_converted_has_both() -> None:
    model = normswap.convert(network(), X[:2], include=("first.*",)).model
    analysis = normswap.analyze(model, [X])
    assert [site.fqn for site in analysis.converted] == ["first.1"]
    assert [site.fqn for site in analysis.batch_norms] == ["second.1", "third.1", ""]


@pytest.mark.parametrize(
    "options",
    [{}, {"start": "ln"}, {"start": "gn", "num_groups": 4}, {"start": "uniform"}, {"kinds": ("bn", "in", "gn")}],
)
def test_the_settings_of_a_plan_start_sites_at_its_branches(options: dict[str, Any]) -> None:
    model = mixed(**options)
    plan = normswap.analyze(model, [X]).plan
    assert plan is not None
    kinds = options.get("kinds", ("bn",))
    again = normswap.convert(network(), X[:2], kinds=kinds, settings=plan.settings).model
    normswap.set_importance(model, plan.branches)
    for name in plan.settings:
        site = normswap.importance_weights(again)[name]
        assert site.mean[plan.branches[name]] == site.var[plan.branches[name]] == 1
        assert len(site.mean) == 1 or f"{name}.mean_weight" not in normswap.trainable_gates(again)
    assert {*plan.branches} - {*plan.settings} <= {"other.0", "other.1"}
    if {*plan.branches} == {*plan.settings}:
        assert torch.allclose(again.eval()(X), model(X), atol=1e-4)


def test_a_site_that_cannot_start_at_its_branch_has_no_settings() -> None:
    model = normswap.convert(network(), X[:2], kinds=("in",), branches=("in", "ln")).model
    normswap.set_importance(model, {"other.0": "ln"})
    plan = normswap.analyze(model, [X]).plan
    assert plan is not None
    assert (dict(plan.branches), dict(plan.settings)) == ({"other.0": "ln"}, {})


def test_progress_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    normswap.analyze(mixed(), [X], on_site=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 4) for number in range(5)]


def test_the_result_is_printed_and_becomes_plain_data() -> None:
    analysis = normswap.analyze(mixed(), [X], budget=0.05)
    assert repr(analysis) == "Analysis(0 BN sites, 4 converted sites, batch_size=2, 12 samples)"
    assert "of 4 sites at one branch within 0.05" in str(analysis)
    assert analysis.to_dict()["plan"]["budget"] == 0.05
