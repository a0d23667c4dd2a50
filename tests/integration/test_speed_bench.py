"""What `make bench` stands on: that its rival computes the same, that it counts what it says, that its page renders."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.speed.competitors import EagerSwitchNorm
from benchmarks.speed.memory import saved_bytes
from benchmarks.speed.records import BASE, COPY, EAGER, Conditions, Measurements, Memory, Race, ours
from benchmarks.speed.report import document
from benchmarks.speed.timing import Entrant, race, ratios
from normswap import switch_norm


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 3, 2, 3, 4)])
def test_the_eager_layer_is_switchable_normalization(shape: tuple[int, ...], training: bool) -> None:
    layer = EagerSwitchNorm(shape[1]).double().train(training)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    statistics = layer.running_mean.clone(), layer.running_var.clone()
    gates = layer.mean_weight, layer.var_weight
    results = layer(x), switch_norm(x, *gates, *statistics, layer.weight, layer.bias, training)
    torch.testing.assert_close(*results)
    torch.testing.assert_close(layer.running_mean, statistics[0])
    dy = torch.randn_like(x)
    found, expected = (torch.autograd.grad(y, [x, *layer.parameters()], dy) for y in results)
    torch.testing.assert_close(found, expected)


class _Saving(nn.Module):
    """exp keeps its result, sin its input; both meet a parameter, which does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        return x.exp() * x.view(2, 5).sin().view(10) * self.weight


def test_saved_bytes_are_those_of_distinct_storages_without_parameters() -> None:
    x = torch.randn(10, requires_grad=True)
    # x, exp(x), sin(x) and their product, each of 40 bytes
    assert saved_bytes(_Saving(), x) == 4 * 40
    assert saved_bytes(nn.Linear(10, 3), x) == 40
    assert saved_bytes(nn.Identity(), x) == 0


def test_the_eager_layer_keeps_three_activations_and_ours_one() -> None:
    x = torch.randn(2, 4, 32, 32, requires_grad=True)
    size = x.untyped_storage().nbytes()
    assert 3 * size <= saved_bytes(EagerSwitchNorm(4), x) < 3.1 * size
    assert size <= saved_bytes(nn.BatchNorm2d(4), x) < 1.1 * size


def test_a_ratio_is_that_of_one_round_and_slow_entrants_sit_out_every_second() -> None:
    now = 0.0
    durations = {"base": 1.0, "twice": 2.0, "slow": 5.0}
    order: list[str] = []

    def clock(work: object) -> float:
        nonlocal now
        name = str(work())  # type: ignore[operator]
        order.append(name)
        now += 1.0  # the machine grows slower, for all alike
        return durations[name] * (1 + now // 1000)

    entrants = {name: Entrant(lambda name=name: name, lambda: None) for name in durations}  # type: ignore[misc]
    found = race(entrants, clock, 60.0)
    assert ratios(found, "base") == {"base": 1, "twice": 2, "slow": 5}
    assert [*found["slow"]] == [turn for turn in found["base"] if turn % 2 == 0]
    raced = order[-len(found["base"]) * 2 - len(found["slow"]) :]
    assert raced[:5] == ["base", "twice", "slow", "twice", "base"]


def _measurements() -> Measurements:
    ratio = {BASE: 1.0, ours("native"): 1.25, ours("native", mixed=True): 1.5, EAGER: 6.0, COPY: 0.2}
    seconds = {name: 0.004 * value for name, value in ratio.items()}
    settings = [(layout, mode) for layout in ("contiguous", "channels_last") for mode in ("train", "eval")]
    layers = [
        Race(shape, layout, "fp32", 1, mode, 9, seconds, ratio)
        for layout, mode in settings
        for shape in ("8x64x112x112", "32x64x112x112")
    ]
    forms = {"original": 1.0, "converted": 1.1875}
    networks = [Race("resnet50", layout, "fp32", 2, mode, 5, forms, forms) for layout, mode in settings]
    conditions = Conditions("Measured on a day on a machine.", "cpu", "wall", 2, (0.1, 1.2), "native", False)
    memory = Memory("resnet50", 8, 3, (1_000_000, 1_005_000), (2_000_000, 2_100_000))
    return Measurements(conditions, layers, networks, "8x256x56x56", {BASE: 1.0, EAGER: 3.0}, memory)


def test_the_page_says_what_is_met_and_what_is_not() -> None:
    page = document(_measurements())
    assert "| fp32 | 1 | contiguous | native | 1.25 met | 1.25 met (8x64x112x112) | 1.25 met | 4.80 met |" in page
    assert "| **1.50 not met** | 1.50 met (8x64x112x112) | 1.50 met | 4.00 met | **4.00 not met** |" in page
    assert "| resnet50 | fp32 | 2 | contiguous | train | 1000 | 1188 | **1.19 not met** |" in page
    assert "| resnet50 | fp32 | 2 | contiguous | eval | 1000 | 1188 | 1.19 met |" in page
    assert "| saved for backward | 1.0 | 1.0 | 1.0050 met |" in page
    assert "| peak of a training step | 2.0 | 2.1 | **1.0500 not met** |" in page
    assert "not measured" in page
    assert "Quick mode" not in page


def test_the_page_says_that_the_machine_was_busy() -> None:
    measurements = _measurements()
    busy = replace(measurements, conditions=replace(measurements.conditions, load=(5.0, 5.0), is_quick=True))
    assert "busy with other work" in document(busy)
    assert "Quick mode" in document(busy)


def test_the_page_of_a_gpu_contains_bandwidths() -> None:
    measurements = _measurements()
    page = document(replace(measurements, conditions=replace(measurements.conditions, clock="cuda")))
    # 8 activations over 1.25 units of time, against 2 over 0.2
    assert "| 32x64x112x112 | fp32 | contiguous | train | 257 | 80% | **0.64 not met** |" in page


def test_records_survive_json(tmp_path: Path) -> None:
    measurements = _measurements()
    measurements.write(tmp_path / "speed.json")
    read = Measurements.read(tmp_path / "speed.json")
    assert document(read) == document(measurements)
