"""A large conversion is compared in float32, and its sites alone in float64: that finds what float64 finds."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.layers.switch_norm import SwitchNorm
from normswap.surgery.planning import plan_and_observe
from normswap.surgery.selection import SwapOptions
from normswap.verification import fast_comparison
from normswap.verification.fast_comparison import verify_fast
from tests.helpers import files

X = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_networks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_comparison, "MIN_ELEMENTS", 0)


def trained_model() -> nn.Module:
    """A residual network whose statistics and weights look trained."""
    model = files.small_model()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=generator) * 0.1
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
            module.num_batches_tracked = torch.tensor(100)
    return model.eval()


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    model = trained_model()
    return model, normswap.convert(model, X, **options).model


def layers(model: nn.Module) -> list[SwitchNorm]:
    return [module for module in model.modules() if isinstance(module, SwitchNorm)]


@pytest.mark.parametrize("bn_statistics", ["running", "batch"])
def test_a_conversion_passes_in_float32_with_its_sites_in_float64(bn_statistics: Any) -> None:
    model, converted = pair(bn_statistics=bn_statistics)
    before = {name: tensor.clone() for name, tensor in converted.state_dict().items()}
    found = verify_fast(model, converted, X)
    assert found is not None
    assert (found.passed, found.precision, found.inputs) == (True, "float32", "2x3x160x160")
    assert [check.passed for check in found.checks] == [True] * 4
    assert found.training_reference == ("frozen" if bn_statistics == "running" else "original")
    assert len(found.sites) == len(layers(converted))
    for site in found.sites:
        errors = (site.evaluation, site.training, site.gradients, site.statistics)
        assert all(error is not None and error <= 1e-9 for error in errors)
    assert any("crop of 2x3x64x64" in note for note in found.notes), found.notes
    assert all(torch.equal(tensor, before[name]) for name, tensor in converted.state_dict().items())
    assert {tensor.dtype for tensor in converted.parameters()} == {torch.float32}
    assert normswap.verify(model, converted, [X]).passed


def test_the_observed_pass_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model, converted = pair()
    _, observation = plan_and_observe(model, X, SwapOptions())
    monkeypatch.setattr(fast_comparison, "observe_forward", None)
    assert verify_fast(model, converted, X, observation=observation) is not None


# --- planted errors ---------------------------------------------------------------------------------------------------


def change_variance(layer: SwitchNorm) -> None:
    layer.running_var[0] *= 1 + 1e-5


def change_eps(layer: SwitchNorm) -> None:
    layer.eps = 1.1e-5


def change_bias(layer: SwitchNorm) -> None:
    layer.bias = nn.Parameter(layer.bias.detach().clone())
    layer.bias.data[0] += 1e-4


def change_weight(layer: SwitchNorm) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * (1 + 1e-6))


def swap_gate(layer: SwitchNorm) -> None:
    layer.mean_weight.data.copy_(torch.tensor([1.0, 0.0, 0.0][: len(layer.mean_weight)]))


def use_batch_statistics(layer: SwitchNorm) -> None:
    layer.bn_statistics = "batch"


def freeze_weight(layer: SwitchNorm) -> None:
    layer.weight.requires_grad_(False)


class StaleGradient(torch.autograd.Function):
    """Return the gradient of the step before: a factor of 1 + 1e-6."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 + 1e-6)


def make_gradient_stale(layer: SwitchNorm) -> None:
    forward = type(layer).forward
    layer.forward = lambda x: StaleGradient.apply(forward(layer, x))


ERRORS: tuple[Callable[[SwitchNorm], None], ...] = (
    change_variance,
    change_eps,
    change_bias,
    change_weight,
    swap_gate,
    use_batch_statistics,
    freeze_weight,
    make_gradient_stale,
)


@pytest.mark.parametrize("place", [0, 7, -1])
@pytest.mark.parametrize("plant", ERRORS, ids=lambda plant: plant.__name__)
def test_an_error_at_a_site_is_found_as_in_float64(plant: Callable[[SwitchNorm], None], place: int) -> None:
    model = trained_model()
    converted = normswap.convert(model, X).model
    plan = dict.fromkeys(normswap.importance_weights(converted), "running")
    plant(layers(converted)[place])
    with torch.no_grad():
        assert verify_fast(model, converted, X, bn_statistics=plan) is None
    assert not normswap.verify(model, converted, [X], bn_statistics=plan).passed


def test_an_eps_that_float32_rounds_away_is_found_at_the_site() -> None:
    model = trained_model()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var *= 100  # a change of eps by 1e-6 is a relative 1e-8 of the sum
    converted = normswap.convert(model, X).model
    assert verify_fast(model, converted, X) is not None
    layers(converted)[0].eps = 1.1e-5
    assert verify_fast(model, converted, X) is None
    assert not normswap.verify(model, converted, [X]).passed


def test_an_error_outside_the_sites_is_found() -> None:
    model = trained_model()
    for change in ("weight", "missing site", "hook"):
        converted = normswap.convert(model, X).model
        if change == "weight":
            convolution = next(module for module in converted.modules() if isinstance(module, nn.Conv2d))
            convolution.weight = nn.Parameter(convolution.weight.detach() * (1 + 1e-7))
        elif change == "missing site":
            owner = next(m for m in converted.modules() if isinstance(getattr(m, "bn2", None), SwitchNorm))
            owner.bn2 = nn.Identity()
        else:
            converted.register_forward_hook(lambda module, args, output: output * (1 + 1e-7))
        assert verify_fast(model, converted, X) is None, change


# --- what falls back --------------------------------------------------------------------------------------------------


def test_what_does_not_meet_the_conditions_is_left_to_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    model, converted = pair()
    assert verify_fast(copy.deepcopy(model).double(), copy.deepcopy(converted).double(), X.double()) is None
    assert verify_fast(model, converted, (X,)) is None
    assert verify_fast(model, converted, X[..., :32, :32]) is None  # no smaller crop keeps several positions
    assert verify_fast(*pair(bn_statistics="renorm"), X) is None
    monkeypatch.setattr(fast_comparison, "MIN_ELEMENTS", 1 << 40)
    assert verify_fast(model, converted, X) is None


def test_a_network_of_fixed_size_is_left_to_float64() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 80 * 80, 2)).eval()
    converted = normswap.convert(model, X).model
    assert verify_fast(model, converted, X) is None
    assert normswap.verify(model, converted, [X]).passed


def test_a_crop_that_is_too_small_for_a_site_is_doubled() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 31, 2), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    found = verify_fast(model, normswap.convert(model, X).model, X)
    assert found is not None
    (note,) = [note for note in found.notes if "crop" in note]
    assert "crop of 2x3x48x48" in note or "crop of 2x3x96x96" in note, note


# --- progress ---------------------------------------------------------------------------------------------------------

CHECKS = ["outputs in evaluation", "outputs in training", "gradients", "running statistics"]


def test_progress_names_the_checks_of_the_result() -> None:
    model, converted = pair()
    seen: list[str] = []
    found = normswap.verify(model, converted, [X], progress=seen.append)
    assert seen == ["outputs in float32", *CHECKS]
    assert [check.name for check in found.checks] == CHECKS
    seen.clear()
    assert verify_fast(model, converted, X, progress=seen.append) is not None
    assert seen == [*CHECKS[:1] * 1, *CHECKS[1:], "each site alone"]


def test_progress_may_return_a_context_for_each_check() -> None:
    from contextlib import contextmanager

    model, converted = pair()
    running: list[str] = []
    most = 0

    @contextmanager
    def context(name: str) -> Any:
        nonlocal most
        running.append(name)
        most = max(most, len(running))
        yield
        running.remove(name)

    normswap.verify(model, converted, [X], progress=context)
    assert (running, most) == ([], 1)
    with pytest.raises(normswap.ArgumentError, match="progress: expected a function of the name of a check, got 'bar'"):
        normswap.verify(model, converted, [X], progress="bar")  # type: ignore[arg-type]
