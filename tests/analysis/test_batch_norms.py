"""Distances at Batch Normalizations, against those computed from outputs, and the advice that follows."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import normswap
from normswap.analysis.advice import NOISE_LIMIT, SHIFT_LIMIT, choose_advice
from normswap.errors import ArgumentError, DataError, ModelError, NothingToDo
from tests.helpers.files import scrambled


def trained(bn: nn.Module) -> nn.Module:
    """A norm with random affine parameters and statistics."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        bn.weight.copy_(0.5 + torch.rand(bn.weight.shape, generator=generator))
        bn.bias.copy_(torch.randn(bn.bias.shape, generator=generator))
    bn.running_mean.copy_(0.3 * torch.randn(bn.running_mean.shape, generator=generator))
    bn.running_var.copy_(0.5 + torch.rand(bn.running_var.shape, generator=generator))
    bn.num_batches_tracked.fill_(3)
    return bn.eval()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def expected(bn: Any, x: Tensor, batch_size: int) -> tuple[float, float, float]:
    """Gap, noise and shift from the outputs without bias."""
    x = x.double()
    weight = bn.weight.detach().double()

    def outputs(mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, weight, None, False, 0, bn.eps)

    dims = [0, *range(2, x.dim())]
    data = outputs(x.mean(dims), x.var(dims, correction=0))
    running = outputs(bn.running_mean.double(), bn.running_var.double())
    batch = torch.cat([F.batch_norm(each, None, None, weight, None, True, 0, bn.eps) for each in x.split(batch_size)])
    return distance(batch, running), distance(batch, data), distance(data, running)


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(5), (12, 5)),
    "sequences": (lambda: nn.BatchNorm1d(5), (12, 5, 7)),
    "2d": (lambda: nn.BatchNorm2d(5), (12, 5, 4, 6)),
    "3d": (lambda: nn.BatchNorm3d(5), (12, 5, 3, 4, 2)),
    "synchronized": (lambda: nn.SyncBatchNorm(5), (12, 5, 4, 6)),
    "with activation": (lambda: BatchNormAct2d(5), (12, 5, 4, 6)),
}


@pytest.mark.parametrize("batch_size", [2, 3, 4])
@pytest.mark.parametrize("name", NORMS)
def test_distances_are_those_of_the_outputs(name: str, batch_size: int) -> None:
    build, shape = NORMS[name]
    model, x = nn.Sequential(trained(build())), 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    (site,) = normswap.analyze(model, [x], batch_size=batch_size).batch_norms
    assert (site.gap, site.noise, site.shift) == pytest.approx(expected(model[0], x, batch_size), rel=1e-4)
    assert (site.fqn, site.frozen, site.untrained) == ("0", False, False)


def test_statistics_are_compared_in_deviations() -> None:
    bn = nn.BatchNorm2d(2).eval()
    bn.running_mean.fill_(3)
    x = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True, correction=0) * 2
    (site,) = normswap.analyze(nn.Sequential(bn), [x]).batch_norms
    assert site.mean_distance == pytest.approx(3, rel=1e-3)
    assert site.deviation_ratio == pytest.approx(2, rel=1e-3)


def test_training_of_the_network_is_that_of_torch() -> None:
    model = scrambled(timm.create_model("test_resnet", num_classes=7)).eval()
    x = torch.randn(8, 3, 32, 32)
    analysis = normswap.analyze(model, [x[:4], x[4:]], batch_size=4)
    with torch.no_grad():
        evaluated = model(x)
        model.train()
        trained_outputs = torch.cat([model(each) for each in x.split(4)])
    assert analysis.training_error == pytest.approx(distance(trained_outputs, evaluated), rel=1e-3)
    assert analysis.training_agreement == float((trained_outputs.argmax(1) == evaluated.argmax(1)).float().mean())


class Calls(nn.Module):
    """A module that calls F.batch_norm, and uses one norm twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = trained(nn.BatchNorm2d(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.full((3,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.norm(x))
        return F.batch_norm(x, self.mean, self.var, training=self.training)


def test_functional_calls_and_norms_that_are_used_twice_are_measured() -> None:
    for model in (Calls(), nn.DataParallel(Calls()), torch.fx.symbolic_trace(Calls().eval())):
        names = [site.fqn for site in normswap.analyze(model, [torch.randn(4, 3, 4, 4)]).batch_norms]
        assert names == ["norm", ""]


class FrozenBatchNorm(nn.Module):
    """A frozen norm that calls F.batch_norm, as in detectron2."""

    eps = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.2), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def test_frozen_norms_have_no_gap() -> None:
    x = torch.randn(8, 4, 6, 6)
    frozen = nn.Sequential(trained(nn.BatchNorm2d(4)))
    normswap.freeze_statistics(frozen)
    other = nn.Sequential(FrozenBatchNorm(4))
    for model in (frozen, other):
        analysis = normswap.analyze(model, [x])
        (site,) = analysis.batch_norms
        assert (site.frozen, site.gap, analysis.training_error) == (True, 0.0, 0.0)
        assert site.noise > 0


def test_half_precision_is_measured() -> None:
    model, x = nn.Sequential(trained(nn.BatchNorm2d(4))), torch.randn(8, 4, 6, 6)
    exact = normswap.analyze(model, [x]).batch_norms[0]
    (half,) = normswap.analyze(
        model.bfloat16(), [x.bfloat16().contiguous(memory_format=torch.channels_last)]
    ).batch_norms
    assert (half.gap, half.noise, half.shift) == pytest.approx((exact.gap, exact.noise, exact.shift), rel=0.03)


def test_a_single_value_per_channel_is_its_own_mean() -> None:
    analysis = normswap.analyze(nn.Sequential(trained(nn.BatchNorm1d(4))), [torch.randn(8, 4)], batch_size=1)
    assert analysis.batch_norms[0].noise == pytest.approx(1)


def test_channels_that_are_scaled_by_zero_do_not_count() -> None:
    bn = trained(nn.BatchNorm2d(4))
    nn.init.zeros_(bn.weight)  # type: ignore[arg-type]
    (site,) = normswap.analyze(nn.Sequential(bn), [torch.randn(4, 4, 4, 4)]).batch_norms
    assert (site.gap, site.noise, site.shift) == (0, 0, 0)


def test_samples_that_fill_no_batch_are_left_out() -> None:
    model, x = nn.Sequential(trained(nn.BatchNorm2d(4))), torch.randn(7, 4, 4, 4)
    found = normswap.analyze(model, [x, torch.randn(1, 4, 4, 4)], batch_size=3)
    assert found.batch_norms == normswap.analyze(model, [x[:6]], batch_size=3).batch_norms
    assert found.samples == 7


def test_labels_are_dropped_and_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Dropout(0.5), trained(nn.BatchNorm2d(4))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 4, 4, 4)
    normswap.analyze(model, [(x, torch.zeros(4))])
    assert (model.training, model[0].training) == (True, True)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


# --- advice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "shift", "frozen", "advice"),
    [
        (0.0, 0.0, False, "leave"),
        (NOISE_LIMIT, 0.0, False, "freeze"),
        (NOISE_LIMIT, SHIFT_LIMIT, False, "convert"),
        (0.0, SHIFT_LIMIT, False, "calibrate"),
        (NOISE_LIMIT, 0.0, True, "leave"),
        (0.0, SHIFT_LIMIT, True, "convert"),
    ],
)
def test_advice_follows_from_noise_and_shift(noise: float, shift: float, frozen: bool, advice: str) -> None:
    assert choose_advice(noise, shift, frozen=frozen) == advice


def fitted(x: Tensor, *, untrained: bool = False) -> nn.Module:
    """A network whose first norm fits `x`."""
    model = nn.Sequential(nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, momentum=None)).train()
    model(x)
    if untrained:
        model[1].reset_running_stats()
    return model.eval()


def test_the_advice_names_the_call() -> None:
    x = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    small = torch.randn(64, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    advice = {
        "fits": normswap.analyze(fitted(x), [x], batch_size=16).advice,
        "noisy": normswap.analyze(fitted(small), [small], batch_size=2).advice,
        "shifted": normswap.analyze(fitted(x), [3 * x + 1], batch_size=16).advice,
        "both": normswap.analyze(fitted(small), [3 * small + 1], batch_size=2).advice,
        "untrained": normswap.analyze(fitted(x, untrained=True), [x], batch_size=16).advice,
        "all untrained": normswap.analyze(nn.Sequential(nn.BatchNorm2d(4)), [x]).advice,
    }
    enough, few = "batches of 16 are large enough", "batches of 2 are too small"
    assert advice == {
        "fits": f"Leave it: {enough} for batch statistics, and the running statistics fit this data.",
        "noisy": f"Freeze it: {few} for batch statistics, and the running statistics fit this data: "
        "normswap.freeze_statistics(model).",
        "shifted": f"Train it as it is, or calibrate it to use it without training: {enough} for batch statistics, and "
        "the running statistics do not fit this data: normswap.calibrate(model, batches).",
        "both": f"Convert it: {few} for batch statistics, and the running statistics do not fit this data: "
        "normswap.convert(model, x).",
        "untrained": "Calibrate 1 site whose statistics were never updated: normswap.calibrate(model, batches, "
        f"only=['1']). Leave it: {enough} for batch statistics, and the running statistics fit this data.",
        "all untrained": "Calibrate 1 site whose statistics were never updated: normswap.calibrate(model, batches).",
    }


def test_frozen_norms_that_do_not_fit_are_to_be_converted() -> None:
    x = torch.randn(64, 4, 8, 8)
    model = fitted(x)
    normswap.freeze_statistics(model)
    assert normswap.analyze(model, [3 * x + 1]).advice == (
        "Convert it: its norms are frozen, and the running statistics do not fit this data: normswap.convert(model, x)."
    )


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ArgumentError, "batch_size: expected a number of samples >= 1, got 0"),
        ({"batch_size": 2.0}, ArgumentError, "batch_size: expected a number of samples >= 1, got 2.0"),
        ({"budget": -1}, ArgumentError, "budget: expected a relative error such as 0.1, got -1"),
        ({"budget": "0.1"}, ArgumentError, "budget: expected a relative error such as 0.1, got '0.1'"),
        ({"budget": float("nan")}, ArgumentError, "budget: expected a relative error such as 0.1, got nan"),
        (
            {"batch_size": 5},
            DataError,
            "data: expected inputs of at least batch_size=5 samples, got at most 4: pass larger",
        ),
        ({"data": []}, DataError, "data: expected at least one input, got none"),
        ({"data": torch.randn(4, 4, 4, 4)}, DataError, "data: expected a list of inputs, got one Tensor: pass [x]"),
        ({"data": [torch.tensor(1.0)]}, DataError, "data: expected inputs with samples in their first dimension, got "),
        ({"data": [torch.randn(4, 3, 4, 4)]}, ModelError, "the model fails on an input of 4x3x4x4: "),
        ({"model": nn.Conv2d(4, 4, 1)}, NothingToDo, "nothing to analyze: no Batch Normalization with running"),
        ({"model": "model.pt"}, ArgumentError, "model: expected a torch.nn.Module, got the path 'model.pt'"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    values: dict[str, Any] = {"model": nn.Sequential(nn.BatchNorm2d(4)), "data": [torch.randn(4, 4, 4, 4)], **options}
    with pytest.raises(error) as raised:
        normswap.analyze(values.pop("model"), values.pop("data"), **values)
    assert message in str(raised.value)
