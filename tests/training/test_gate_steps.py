"""The limit on the steps of gates, and the watch for outputs that died."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from normswap import convert, limit_gate_steps, param_groups, watch_importance
from normswap.errors import OptimizerError, WatchError
from normswap.layers.in_place import GATE_PARAMETERS
from normswap.surgery.importance import gate_parameters
from normswap.training.output_watch import OutputWatch
from tests.helpers import zoo

X, LABELS = zoo.image(4, 3, 9, 9)(), torch.tensor([0, 1, 2, 3])
ROUNDING = 1e-6


def network(**options: Any) -> Any:
    torch.manual_seed(0)
    layers = [zoo.conv(), zoo.bn(), nn.ReLU(), zoo.conv(8, 8), nn.BatchNorm2d(8), nn.ReLU()]
    pooled = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return convert(pooled, X, **options).model.train()


def points(model: nn.Module) -> dict[str, Tensor]:
    return {name: gate.detach().clone() for name, gate in gate_parameters(model).items()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Take steps; return the largest change of an importance weight in each of them."""
    changes = []
    for _ in range(steps):
        before = points(model)
        optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        optimizer.step()
        changes.append(max(float((value - before[name]).abs().max()) for name, value in points(model).items()))
    return changes


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW, foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
}


# --- the limit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_no_importance_weight_moves_farther_than_the_limit(build: Any) -> None:
    model = network()
    optimizer = build(param_groups(model, lr=1e-3, importance_lr=5.0))
    limit = limit_gate_steps(model, optimizer, max_step=0.05, warmup_steps=0)
    changes = train(model, optimizer, 5)
    assert max(changes) <= 0.05 + ROUNDING
    assert max(changes) > 0.04
    for point in points(model).values():
        assert float(point.sum()) == pytest.approx(1)
        assert bool((point >= 0).all())
    limit.remove()
    assert max(train(model, optimizer, 1)) > 0.05


def test_the_limit_rises_in_the_first_steps_and_goes_on_after_a_resume() -> None:
    model = network()
    optimizer = torch.optim.Adam(param_groups(model, lr=1e-3, importance_lr=1.0))
    limit = limit_gate_steps(model, optimizer, max_step=0.04, warmup_steps=4)
    assert train(model, optimizer, 5) == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.04], abs=ROUNDING)
    assert limit.step == 5
    model = network()
    optimizer = torch.optim.Adam(param_groups(model, lr=1e-3, importance_lr=1.0))
    limit_gate_steps(model, optimizer, max_step=0.04, warmup_steps=4, step=2)
    assert train(model, optimizer, 1) == pytest.approx([0.03], abs=ROUNDING)


@pytest.mark.parametrize(
    ("sites", "rate", "step"), [(1, 0.1, 0.1), (10, 0.1, 0.05), (20, 0.075, 0.025), (50, 0.03, 0.01)]
)
def test_all_gates_together_move_by_one_diameter(sites: int, rate: float, step: float) -> None:
    model = convert(nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(sites))), torch.randn(2, 4, 3, 3)).model
    groups = param_groups(model, lr=0.01)
    assert float(groups[-1]["lr"]) == pytest.approx(rate)
    assert float(param_groups(model, lr=1e-5)[-1]["lr"]) == pytest.approx(1e-3)
    assert limit_gate_steps(model, torch.optim.Adam(groups)).max_step == pytest.approx(step)


def test_steps_within_the_limit_and_all_other_parameters_are_unchanged() -> None:
    model, free = network(), network()
    optimizers = [torch.optim.SGD(param_groups(each, lr=1e-3, importance_lr=1e-3)) for each in (model, free)]
    limit_gate_steps(model, optimizers[0], warmup_steps=0)
    for each, optimizer in zip((model, free), optimizers, strict=True):
        train(each, optimizer, 3)
    free(X)  # which projects the points
    for (name, value), expected in zip(model.state_dict().items(), free.state_dict().values(), strict=True):
        assert torch.allclose(value, expected, atol=ROUNDING), name


def test_frozen_gates_and_softmax_gates_are_left_alone() -> None:
    model = network(settings={"4": {"gate": "softmax"}})
    for name in GATE_PARAMETERS:
        getattr(model[1], name).requires_grad_(False)
    optimizer = torch.optim.Adam(param_groups(model, lr=1e-3, importance_lr=1.0))
    limit_gate_steps(model, optimizer)
    assert max(train(model, optimizer, 1)) > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_step": 0.0}, "max_step: expected a number > 0, got 0.0"),
        ({"warmup_steps": -1}, "warmup_steps: expected a number of steps >= 0, got -1"),
        ({"step": 0.5}, "step: expected a number of steps >= 0, got 0.5"),
    ],
)
def test_bad_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(OptimizerError, match=message):
        limit_gate_steps(model, torch.optim.SGD(param_groups(model, lr=0.1)), **options)


# --- outputs that died ------------------------------------------------------------------------------------------------


def watched(model: nn.Module, **options: Any) -> tuple[OutputWatch, list[str]]:
    reports: list[str] = []
    watch = OutputWatch(model, X, reports.append, every=10, **options)
    watch.on_step(0)
    return watch, reports


def test_outputs_that_are_the_same_for_all_samples_are_reported_once() -> None:
    model = network()
    watch, reports = watched(model)
    nn.init.zeros_(model[4].weight)
    watch.on_step(9)
    assert reports == []
    for step in (10, 20, 30):
        watch.on_step(step)
    assert reports == [
        "step 10: the outputs of 4 (and 1 more) are the same for all samples, from which training seldom recovers: "
        "start again with a lower importance_lr or lr"
    ]


def test_outputs_that_are_not_finite_are_reported() -> None:
    model = network()
    model[1].bias.data[0] = float("nan")
    _, reports = watched(model)
    assert len(reports) == 1
    assert reports[0].startswith("step 0: the outputs of 1 (and 2 more) are NaN or infinite, from which")


def test_a_layer_that_starts_constant_and_one_that_learns_are_not_reported() -> None:
    model = network()
    nn.init.zeros_(model[4].weight)
    watch, reports = watched(model)
    nn.init.ones_(model[4].weight)
    watch.on_step(10)
    watch.on_step(20)
    assert reports == []
    nn.init.zeros_(model[4].weight)
    watch.on_step(30)
    assert len(reports) == 1


def test_a_measurement_leaves_the_model_as_it_was() -> None:
    model = network(bn_statistics="batch")
    model.insert(0, nn.Dropout(0.5))
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    watched(model)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert torch.get_rng_state().equal(generator)
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_a_loop_watches_by_the_hook_of_its_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = torch.optim.SGD(param_groups(model, lr=1e-3))
    reports: list[str] = []
    watch_importance(model, optimizer, inputs=X, report=reports.append)
    watch_importance(model, optimizer, inputs=X)
    nn.init.zeros_(model[1].weight)
    model[1].weight.requires_grad_(False)
    train(model, optimizer, 101)
    assert len(reports) == 1
    assert reports[0].startswith("step 100: the outputs of 1 (and 2 more) are the same")
    assert reports[0] in caplog.text


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(WatchError, match="inputs: expected at least two samples, whose outputs can be compared, got o"):
        OutputWatch(network(), X[:1], print)


def test_the_default_rate_of_gates_is_a_multiple_of_the_networks_up_to_a_limit() -> None:
    model = network()
    for lr, expected in ((1e-4, 1e-2), (1e-3, 0.1), (0.1, 0.1), (0.0, 0.0)):
        assert normswap.param_groups(model, lr=lr)[-1]["lr"] == pytest.approx(expected)
    optimizer = torch.optim.SGD(param_groups(model, lr=1e-4, importance_lr=0.5))
    assert param_groups(model, like=optimizer)[-1]["lr"] == 0.5
    assert "lr" not in param_groups(model)[-1]
