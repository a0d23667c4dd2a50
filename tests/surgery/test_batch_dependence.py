"""Batch dependence: value and gradient against the oracle, and which sites count."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from normswap import SwitchNorm2d, batch_dependence, convert, freeze_statistics
from normswap.surgery.importance import gated_modules
from tests.helpers import oracles, zoo

X = zoo.image(2, 3, 9, 9)()
SITES: dict[str, dict[str, Any]] = {
    "points": {"gate": "simplex"},
    "more points": {"gate": "simplex", "dtype": torch.float64},
    "points of two": {"gate": "simplex", "branches": ("ln", "bn")},
    "logits": {"gate": "softmax", "dtype": torch.float64},
    "half": {"gate": "softmax", "dtype": torch.bfloat16},
}


def layers(*names: str, **options: Any) -> nn.Sequential:
    """Layers with gates that training has moved, some off the simplex."""
    torch.manual_seed(3)
    model = nn.Sequential(*(SwitchNorm2d(4, **SITES[name] | options) for name in names))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("mean_weight", "var_weight")):
                parameter.copy_(torch.rand_like(parameter) * 1.5 - 0.3)
    return model


def expected(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    """The sum of the shares of `bn`, and its gradient by gate parameter, in float64."""
    total, gradients = 0.0, {}
    for name, layer in gated_modules(model).items():
        chosen = torch.tensor([float(branch == "bn") for branch in layer.branches]).double()
        for kind in ("mean_weight", "var_weight"):
            point = getattr(layer, kind).detach()
            total += float(oracles.shares_of(point, layer.gate) @ chosen)
            gradients[f"{name}.{kind}"] = oracles.gate_gradient(point, layer.gate, chosen)
    return total, gradients


def penalty(model: nn.Module) -> float:
    return float(batch_dependence(model).detach())


def test_value_and_gradient_are_those_of_the_shares_of_bn() -> None:
    model = layers(*SITES, *SITES)
    total, gradients = expected(model)
    found = batch_dependence(model)
    found.backward()
    assert found.shape == ()
    assert float(found.detach()) == pytest.approx(total, rel=1e-6)
    for name, gradient in gradients.items():
        own = model.get_parameter(name).grad
        assert own is not None
        limit = 5e-3 if own.dtype == torch.bfloat16 else 1e-6
        assert oracles.relative_error(own, gradient) <= limit, name
    assert all(p.grad is None for name, p in model.named_parameters() if name not in gradients)


def test_the_gradient_of_logits_is_the_difference_quotient() -> None:
    model, step = layers("logits"), 1e-6
    batch_dependence(model).backward()
    logits = model[0].mean_weight
    for index in range(3):
        values = []
        for shift in (step, -2 * step):
            with torch.no_grad():
                logits[index] += shift
            values.append(penalty(model))
        with torch.no_grad():
            logits[index] += step
        assert logits.grad[index] == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def test_a_converted_model_starts_at_twice_its_sites() -> None:
    network = zoo.Chain(zoo.bn(), zoo.FunctionalBlock(inputs=8))
    assert penalty(convert(network, X).model) == 0  # its statistics are constants
    model = convert(network, X, bn_statistics="batch").model
    assert len(gated_modules(model)) == 2
    assert penalty(model) == 4


def test_a_site_with_two_names_counts_once() -> None:
    layer = layers("points")[0]
    assert penalty(nn.ModuleDict({"first": layer, "second": layer})) == penalty(layer)


def test_sites_that_read_no_batch_count_nothing() -> None:
    constant, without = layers("points", bn_statistics="running"), layers("points", branches=("in", "ln"))
    live = layers("points")
    assert penalty(nn.Sequential(constant, without, live)) == penalty(live) > 0
    untracked = layers("points", bn_statistics="running", track_running_stats=False)
    assert penalty(untracked) == penalty(live) == penalty(layers("points", bn_statistics="renorm"))
    freeze_statistics(live)
    frozen = batch_dependence(live)
    assert (float(frozen), frozen.requires_grad) == (0, False)


def test_gates_that_do_not_learn_count_without_a_gradient() -> None:
    model = layers("points")
    learning = batch_dependence(model)
    fixed = batch_dependence(model.requires_grad_(False))
    assert (float(fixed), fixed.requires_grad) == (float(learning.detach()), False)


def test_a_model_before_conversion_has_no_penalty() -> None:
    loss = nn.BatchNorm2d(3)(X).square().mean()
    assert (loss + batch_dependence(nn.BatchNorm2d(3))).equal(loss)
    assert batch_dependence(nn.Linear(2, 2, device="meta")).device.type == "meta"


@pytest.fixture
def group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_wrapped_models_have_the_penalty_of_what_is_inside(group: None) -> None:
    model = layers("points")
    total, gradients = expected(model)
    for wrapper in (DistributedDataParallel(model), torch.compile(model, backend="eager")):
        model.zero_grad()
        loss = wrapper(torch.randn(2, 4, 5, 5)).sum() * 0 + batch_dependence(wrapper)
        loss.backward()
        assert penalty(wrapper) == pytest.approx(total, rel=1e-6)
        for name, gradient in gradients.items():
            assert oracles.relative_error(model.get_parameter(name).grad, gradient) <= 1e-5, name


def test_with_one_sample_only_the_penalty_distinguishes_bn_from_in() -> None:
    """With one sample `in` and `bn` have the same moments, so their gates get one gradient, unless BN has a penalty."""
    model = layers("points")
    gate = model[0].mean_weight
    y = model(torch.randn(1, 4, 5, 5))
    (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), gate)
    assert gradient[0] == pytest.approx(float(gradient[2]), rel=1e-4)
    (penalized,) = torch.autograd.grad(batch_dependence(model), gate)
    assert penalized[2] > 0 > penalized[0]
