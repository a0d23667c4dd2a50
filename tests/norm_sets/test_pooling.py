"""Pooled statistics of clients are those of all their data."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap import calibrate, convert, norm_state, pool_statistics
from normswap.errors import ArchitectureError, ArgumentError, DataError, PlanError
from tests.helpers import guarantees, zoo

SIZES = ((4, 2), (3,), (5, 2, 2))  # images per batch, of three clients
CLIENTS = [[zoo.image(n, 3, 9, 9)().double() * (n + i) + i for n in sizes] for i, sizes in enumerate(SIZES)]
X = CLIENTS[0][0]
LIMIT = 1e-9


def network() -> nn.Module:
    """Two maps of different sizes, a call of `F.batch_norm`, and a LayerNorm without statistics."""
    torch.manual_seed(5)
    layers = (zoo.conv(), zoo.bn(), nn.AvgPool2d(3), zoo.FunctionalBlock(8, 8), nn.LayerNorm(3))
    return zoo.randomise(nn.Sequential(*layers)).double()


def gates_off_bn(model: nn.Module) -> Any:
    changed: Any = convert(model, X).model
    changed[1].mean_weight.data.copy_(torch.tensor([0.25, 0.25, 0.5]))
    return changed


MAKES: dict[str, Callable[[], Any]] = {
    "SN": lambda: convert(network(), X).model,
    "SN, mixed": lambda: gates_off_bn(network()),
    "BN": lambda: nn.Sequential(*network()[:3]),  # type: ignore[index]
    "a shared BN": lambda: zoo.randomise(zoo.TwoNames()).double(),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_pooled_statistics_are_those_of_a_calibration_on_all_data(make: Callable[[], Any]) -> None:
    model = make()
    clients = [copy.deepcopy(model) for _ in CLIENTS]
    counts = [calibrate(client, batches) for client, batches in zip(clients, CLIENTS, strict=True)]
    pooled = pool_statistics(model, [norm_state(client) for client in clients], counts)
    expected = copy.deepcopy(model)
    calibrate(expected, [batch for batches in CLIENTS for batch in batches])
    changed = {key for key in expected.state_dict() if key.endswith(("running_mean", "running_var", "tracked"))}
    assert {*pooled} == changed
    for key, value in pooled.items():
        assert value.dtype == model.state_dict()[key].dtype
        assert guarantees.distance(expected.state_dict()[key].double(), value.double()) <= LIMIT, key


def moments(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    flat = torch.cat([x.transpose(0, 1).flatten(1) for x in values], 1)
    return flat.mean(1), flat.var(1, correction=1)


def stored(values: list[Tensor]) -> dict[str, Tensor]:
    mean, var = moments(values)
    return norm_state(nn.BatchNorm2d(3).double()) | {"running_mean": mean, "running_var": var}


def test_numbers_of_values_as_one_number_or_by_layer_with_0_for_clients_without_data() -> None:
    model, states = nn.BatchNorm2d(3).double(), [stored(batches) for batches in CLIENTS]
    values = [sum(sizes) * 81 for sizes in SIZES]
    expected = moments([batch for batches in CLIENTS[:2] for batch in batches])
    for counts in ([*values[:2], 0], [{"": values[0]}, {"": values[1]}, {}]):
        pooled = pool_statistics(model, states, counts)
        assert guarantees.distance(expected[0], pooled["running_mean"]) <= LIMIT
        assert guarantees.distance(expected[1], pooled["running_var"]) <= LIMIT
    assert pool_statistics(model, states, [0, 0, 0]) == {}
    assert torch.equal(model.running_var, torch.ones(3).double())  # the model is left as it was


def test_averages_of_instance_norm_are_left_out() -> None:
    model = nn.InstanceNorm2d(3, track_running_stats=True)
    assert pool_statistics(model, [norm_state(model)] * 2, [3, 4]) == {}


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([3], ArgumentError, r"counts: expected numbers of values, .*, got 1 for 2 states"),
        ([3, "4"], ArgumentError, r"counts\[1\]: expected numbers of values, .*, got a str"),
        ([3, -4], ArgumentError, r"counts\[1\]: expected numbers of values, .*, got -4 for '0'"),
        ([{"0": 1.5}, 4], ArgumentError, r"counts\[0\]: expected numbers of values, .*, got 1\.5 for '0'"),
        ([3, {"00": 4}], PlanError, r"counts\[1\]: '00' is not a layer .* with running statistics; did you mean '0'\?"),
        ([1, 0], DataError, r"layer '0' has a single value per channel, which has no variance: count all values"),
    ],
)
def test_counts_that_do_not_fit_are_refused(counts: Any, error: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(error, match=message):
        pool_statistics(model, [norm_state(model)] * 2, counts)


def test_states_of_another_network_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(ArchitectureError, match=r"states\[1\]: .* \(5 missing: 0\.weight, .*, 0 unexpected\)"):
        pool_statistics(model, [norm_state(model), {}], [3, 4])
