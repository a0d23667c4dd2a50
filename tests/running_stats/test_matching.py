"""Calibration of single layers, and of the `in` branches by data."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap import calibrate, convert, freeze_statistics
from normswap.errors import DataError, NothingToDo, PlanError
from normswap.layers.matching import match_statistics
from normswap.running_stats.matching import match_instance_variance
from tests.helpers import guarantees, zoo

BATCHES = [zoo.image(n, 3, 9, 9)().double() * n + n for n in (4, 2, 3)]
EVERYTHING = torch.cat(BATCHES)
LIMIT = 1e-12
MATCHED = ("ln_mean_shift", "ln_var_scale", "in_var_scale")


def chain() -> Any:
    torch.manual_seed(5)
    layers = [zoo.conv(), zoo.bn(), nn.ReLU(), nn.BatchNorm2d(8, eps=1e-3)]
    return zoo.randomise(nn.Sequential(*layers)).double().eval()


def converted(model: nn.Module | None = None, **options: Any) -> Any:
    return convert(chain() if model is None else model, BATCHES[0], **options).model.eval()


def moved_to(model: Any, branch: str) -> Any:
    for layer in (model[1], model[3]):
        for gate in (layer.mean_weight, layer.var_weight):
            gate.data.copy_(torch.tensor([float(each == branch) for each in layer.branches]))
    return model


def instance_variance(x: Tensor) -> Tensor:
    return x.var((2, 3), correction=0).mean(0)


def assert_matched(layer: Any, x: Tensor | None) -> None:
    """The constants are those of the layer's statistics and of its inputs x."""
    measured = None if x is None else instance_variance(x)
    expected = match_statistics(
        layer.running_mean, layer.running_var, layer.normalising_eps, layer.num_groups, instance_var=measured
    )
    for name, value in zip(MATCHED, expected, strict=True):
        assert guarantees.distance(value, getattr(layer, name)) <= LIMIT, name


# --- the constants follow the statistics ------------------------------------------------------------------------------


def test_constants_follow_new_statistics() -> None:
    model = converted()
    calibrate(model, BATCHES)
    for layer in (model[1], model[3]):
        assert_matched(layer, None)
        assert bool((layer.in_var_scale == 1).all())


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_in_is_matched_by_the_variance_of_samples_in_evaluation(layer_by_layer: bool) -> None:
    model = converted()
    result = calibrate(model, BATCHES, match=True, layer_by_layer=layer_by_layer)
    assert_matched(model[1], model[0](EVERYTHING))
    assert_matched(model[3], model[:3](EVERYTHING))
    assert result.passes == 3 if layer_by_layer else 2


def test_constants_of_a_layer_that_has_left_bn_change_on_request_only() -> None:
    model = moved_to(converted(), "ln")
    before = copy.deepcopy(model.state_dict())
    calibrate(model, BATCHES)
    assert all(model.state_dict()[f"{i}.{name}"].equal(before[f"{i}.{name}"]) for i in (1, 3) for name in MATCHED)
    calibrate(model, BATCHES, match=True)
    assert_matched(model[1], model[0](EVERYTHING))


def test_a_later_calibration_keeps_the_measured_variance() -> None:
    model = converted()
    calibrate(model, BATCHES, match=True)
    inputs = model[0](EVERYTHING)
    calibrate(model, [5 * x for x in BATCHES], only="1")
    assert_matched(model[1], inputs)


def test_only_in_is_matched_without_calibration() -> None:
    model = converted()
    before = copy.deepcopy(model.state_dict())
    assert match_instance_variance(model, [(x, "label") for x in BATCHES]) == ["1", "3"]
    assert_matched(model[1], model[0](EVERYTHING))
    assert_matched(model[3], model[:3](EVERYTHING))
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"1.in_var_scale", "3.in_var_scale"}


def test_positions_and_branches_without_in_are_left_out() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)).double()
    options: dict[str, Any] = {"branches": ("in", "ln", "bn"), "settings": {"2": {"branches": ("ln", "bn")}}}
    assert match_instance_variance(convert(model, **options).model, BATCHES) == []


def test_functional_sites_are_matched() -> None:
    torch.manual_seed(5)
    model: Any = convert(zoo.randomise(zoo.FunctionalBlock()).double(), BATCHES[0]).model
    calibrate(model, BATCHES, match=True)
    (site,) = [module for module in model.modules() if hasattr(module, "in_var_scale")]
    assert not bool((site.in_var_scale == 1).any())
    assert match_instance_variance(model, BATCHES) == ["batch_norm"]


@pytest.mark.parametrize("match", [calibrate, match_instance_variance])
def test_batches_are_needed(match: Any) -> None:
    with pytest.raises(DataError, match="batches: expected at least one batch, got none"):
        match(converted(), [])


def test_several_passes_need_batches_that_can_be_read_again() -> None:
    with pytest.raises(DataError, match=r"match needs an iterable for several passes.*or drop match"):
        calibrate(converted(), iter(BATCHES), match=True)


# --- single layers ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_other_layers_than_the_chosen_ones_run_as_in_evaluation() -> None:
    model, reference = converted(), chain()
    result = calibrate(model, BATCHES, only=["re:3"])
    inputs = reference[:3](EVERYTHING)
    assert guarantees.distance(inputs.mean((0, 2, 3)), model[3].running_mean) <= LIMIT
    assert model[1].running_mean.equal(reference[1].running_mean)
    assert [layer.fqn for layer in result.layers] == ["3"]
    assert [(left.fqn, left.reason) for left in result.skipped] == [("1", "not selected")]


def test_filters_are_those_of_conversions() -> None:
    chosen = calibrate(converted(), BATCHES, only=lambda module, _: module.normalising_eps == 1e-3).layers
    assert [layer.fqn for layer in chosen] == ["3"]
    with pytest.raises(PlanError, match="the pattern '4' matches none of the 2 norms"):
        calibrate(converted(), BATCHES, only="4")


def test_a_frozen_layer_is_not_chosen_by_name_alone() -> None:
    model = converted()
    freeze_statistics(model)
    with pytest.raises(NothingToDo, match=r"nothing to calibrate.*1: frozen"):
        calibrate(model, BATCHES, only="1")
    assert len(calibrate(model, BATCHES, only="1", include_frozen=True).layers) == 1


def test_everything_is_restored_after_an_error() -> None:
    model = converted()
    before = copy.deepcopy(model.state_dict())

    class Failing(list[Tensor]):
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            if self.passes > 1:
                raise OSError("the disk is full")
            return super().__iter__()

    batches = Failing(BATCHES)
    batches.passes -= 1  # the check of the argument reads it once
    with pytest.raises(OSError, match="the disk is full"):
        calibrate(model, batches, match=True)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
