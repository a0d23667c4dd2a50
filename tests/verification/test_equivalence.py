"""`verify` passes correct conversions, fails wrong ones in the right check, and changes no model."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from normswap import Verification, convert, use_backend, verify
from normswap.errors import ModelError
from normswap.layers.gating import BnStatistics
from normswap.surgery.model_outputs import VectorDistance, match_names, max_abs_difference, max_distance, relative_l2
from normswap.verification.equivalence import DEFAULT_TOLERANCE, Check
from normswap.verification.site_watch import SiteError
from tests.helpers import guarantees, zoo

EVALUATION, TRAINING, GRADIENTS, STATISTICS = (
    "outputs in evaluation",
    "outputs in training",
    "gradients",
    "running statistics",
)


class TwoBlocks(nn.Module):
    """Two sites, an activation and a dropout: something for every fault."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act = zoo.conv(), zoo.bn(), nn.ReLU()
        self.block, self.drop, self.head = zoo.FunctionalBlock(8, 8), nn.Dropout(0.3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.act(self.bn1(self.conv1(x))))
        return self.head(self.drop(x.mean((2, 3))))


def two_blocks() -> nn.Module:
    torch.manual_seed(3)
    return zoo.randomise(TwoBlocks())


MODES: tuple[BnStatistics, ...] = ("running", "batch")


def verification_after(fault: Callable[[nn.Module], Any], statistics: BnStatistics = "running") -> Verification:
    original, x = two_blocks(), zoo.IMAGE()
    converted = convert(original, x, bn_statistics=statistics).model
    with torch.no_grad():
        fault(converted)
    return verify(original, converted, [x])


def outcomes(verification: Verification) -> dict[str, bool | None]:
    return {check.name: check.passed for check in verification.checks}


def failed(verification: Verification) -> set[str]:
    return {name for name, passed in outcomes(verification).items() if passed is False}


@pytest.mark.parametrize("statistics", MODES)
def test_a_correct_conversion_passes_with_everything_reported(statistics: BnStatistics) -> None:
    original, inputs = two_blocks(), [zoo.IMAGE(), zoo.image(5, 3, 7, 7)()]
    verification = verify(original, convert(original, inputs[0], bn_statistics=statistics).model, inputs)
    assert verification.passed
    assert list(outcomes(verification).items()) == [
        (name, True) for name in (EVALUATION, TRAINING, GRADIENTS, STATISTICS)
    ]
    assert (verification.tolerance, verification.loosened, verification.inputs) == (
        DEFAULT_TOLERANCE,
        False,
        "3x3x9x9; 5x3x7x7",
    )
    assert 0 < verification.max_rel_error < 1e-13
    assert 0 < verification.max_abs_error < 1e-12
    assert verification.fp32_error is not None
    # In evaluation a site at its vertex is batch normalization bit for bit.
    assert verification.fp32_error == 0
    assert [site.fqn for site in verification.sites] == ["bn1", "block"]
    assert all(site.evaluation == 0 and site.training < 1e-14 for site in verification.sites)  # type: ignore[operator]
    if statistics == "batch":  # whose moments round otherwise than those of torch
        assert all(site.training > 0 for site in verification.sites)  # type: ignore[operator]
    assert {(check.limit, check.own_response, check.note) for check in verification.checks} == {
        (DEFAULT_TOLERANCE, None, "")
    }


def test_a_verification_survives_json() -> None:
    verification = verification_after(lambda model: None)
    assert Verification.from_dict(json.loads(json.dumps(verification.to_dict()))) == verification
    assert isinstance(verification.checks[0], Check)
    assert isinstance(verification.sites[0], SiteError)


# (what goes wrong, the checks that must fail with batch statistics; all others must pass)
FAULTS: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "a gate moved": (
        lambda m: m.bn1.mean_weight.copy_(torch.tensor([0.1, 0.0, 0.9])),
        {EVALUATION, TRAINING, GRADIENTS, STATISTICS},
    ),
    "a functional gate moved": (
        lambda m: m.block.batch_norm.var_weight.copy_(torch.tensor([0.1, 0.0, 0.9])),
        {EVALUATION, TRAINING, GRADIENTS},
    ),
    "eps changed": (lambda m: setattr(m.bn1, "eps", 1e-3), {EVALUATION, TRAINING, GRADIENTS, STATISTICS}),
    "a running mean changed": (lambda m: m.bn1.running_mean.add_(0.1), {EVALUATION, STATISTICS}),
    "an activation dropped": (
        lambda m: setattr(m, "act", nn.Identity()),
        {EVALUATION, TRAINING, GRADIENTS, STATISTICS},
    ),
    "wrong momentum": (lambda m: setattr(m.bn1, "momentum", 0.2), {STATISTICS}),
    "a parameter changed": (lambda m: m.head.weight.mul_(1 + 1e-6), {EVALUATION, TRAINING, GRADIENTS}),
    "a parameter frozen": (lambda m: m.head.requires_grad_(False), {GRADIENTS}),
    "a dropout that forgot its mode": (lambda m: setattr(m, "drop", nn.Identity()), {TRAINING, GRADIENTS}),
    "counted no batch": (lambda m: setattr(m.bn1, "num_batches_tracked", m.bn1.num_batches_tracked + 1), {STATISTICS}),
    "another number of outputs": (
        lambda m: m.register_forward_hook(lambda *args: (args[2], args[2])),
        {EVALUATION, TRAINING, GRADIENTS},
    ),
    "another dtype": (
        lambda m: m.register_forward_hook(lambda *args: args[2].float()),
        {EVALUATION, TRAINING, GRADIENTS},
    ),
    "NaN": (lambda m: m.head.bias[0].fill_(float("nan")), {EVALUATION, TRAINING}),
}


# The checks that must fail with running statistics, where these are other ones: a layer updates none of them.
FAILS_WITH_RUNNING: dict[str, set[str]] = {
    "a gate moved": {EVALUATION, TRAINING, GRADIENTS},
    "eps changed": {EVALUATION, TRAINING, GRADIENTS},
    "a running mean changed": {EVALUATION, TRAINING, GRADIENTS, STATISTICS},
    "an activation dropped": {EVALUATION, TRAINING, GRADIENTS},
    "wrong momentum": set(),
}


@pytest.mark.parametrize("statistics", MODES)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_fails_the_right_check(name: str, statistics: BnStatistics) -> None:
    fault, fails = FAULTS[name]
    fails = FAILS_WITH_RUNNING.get(name, fails) if statistics == "running" else fails
    verification = verification_after(fault, statistics)
    assert verification.passed == (not fails)
    assert failed(verification) == fails
    for check in verification.checks:
        assert (check.error is not None and check.error > check.limit) == (check.name in fails)


def test_the_site_with_the_fault_is_named() -> None:
    verification = verification_after(lambda m: m.block.batch_norm.mean_weight.copy_(torch.tensor([0.5, 0.0, 0.5])))
    errors = {site.fqn: max(site.evaluation or 0, site.training or 0) for site in verification.sites}
    assert errors["block"] > 1e-3
    assert errors["bn1"] < 1e-14


def test_a_site_that_raises_is_infinitely_far() -> None:
    verification = verification_after(lambda m: setattr(m.bn1, "branches", ("in", "bn")), "batch")
    assert failed(verification) == {EVALUATION, TRAINING, GRADIENTS, STATISTICS}
    assert {check.note for check in verification.checks} == {
        "the converted model raises: expected gate parameters of shape (2,), got (3,)"
    }
    assert verification.sites[0] == SiteError("bn1", float("inf"), float("inf"), statistics=float("inf"))
    assert verification.max_abs_error == verification.max_rel_error == float("inf")


def test_a_site_that_did_not_run_has_no_error() -> None:
    model = zoo.BY_NAME["never called"].model()
    verification = verify(model, convert(model).model, [zoo.IMAGE()])
    assert verification.passed
    assert verification.sites[1] == SiteError("unused", None, None)


def test_a_wider_tolerance_is_reported_as_such() -> None:
    original, x = two_blocks(), zoo.IMAGE()
    converted = convert(original, x).model
    with torch.no_grad():
        converted.head.weight.mul_(1 + 1e-6)
    verification = verify(original, converted, [x], tolerance=1e-4)
    assert verification.passed
    assert verification.loosened
    assert {check.limit for check in verification.checks} == {1e-4}
    assert not verify(original, converted, [x], tolerance=1e-12).loosened


def test_checks_in_training_are_skipped_if_the_original_raises() -> None:
    original = zoo.BY_NAME["one position"].model()
    converted = convert(original, zoo.IMAGE(), bn_statistics="batch").model
    one = zoo.image(1, 3, 9, 9)()
    verification = verify(original, converted, [one])
    assert verification.passed
    assert outcomes(verification) == {EVALUATION: True, TRAINING: None, GRADIENTS: None, STATISTICS: None}
    notes = {check.note for check in verification.checks if check.name != EVALUATION}
    assert len(notes) == 1
    assert re.match(
        "skipped: the original model raises in training: Expected more than 1 value per channel", notes.pop()
    )
    # One batch that it can train on is enough to have an answer, in any order.
    for batches in ([one, zoo.IMAGE()], [zoo.IMAGE(), one]):
        both = verify(original, converted, batches)
        assert outcomes(both) == dict.fromkeys(outcomes(both), True)
        assert "raises in training" in both.checks[1].note


def test_renorm_skips_the_checks_in_training() -> None:
    original, x = two_blocks(), zoo.IMAGE()  # of which one site is functional
    verification = verify(original, convert(original, x, bn_statistics="renorm").model, [x])
    assert verification.passed
    assert outcomes(verification) == {EVALUATION: True, TRAINING: None, GRADIENTS: None, STATISTICS: None}
    note = "skipped: 2 sites with bn_statistics='renorm', whose function in training the original model does not have"
    assert {check.note for check in verification.checks[1:]} == {note}
    assert verification.sites[0].training is None
    assert "not judged by the whole model: outputs in training, gradients, running statistics" in verification.summary


def test_sites_that_were_frozen_before_skip_no_check() -> None:
    model = zoo.BY_NAME["torchvision FrozenBatchNorm2d"].model()
    verification = verify(model, convert(model, zoo.IMAGE()).model, [zoo.IMAGE()])
    assert outcomes(verification) == dict.fromkeys(outcomes(verification), True)


def test_an_original_without_a_finite_output_does_not_pass() -> None:
    original, x = two_blocks(), zoo.IMAGE()
    with torch.no_grad():
        original.head.bias.fill_(float("nan"))
    verification = verify(original, convert(original, x).model, [x])
    assert not verification.passed
    assert outcomes(verification) == {EVALUATION: None, TRAINING: None, GRADIENTS: None, STATISTICS: None}
    assert {check.note for check in verification.checks} == {"no output of the original model is finite"}


class Chaotic(nn.Module):
    """A site, then a map that stretches every difference by 2^32: rounding alone breaks any fixed bound."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = zoo.conv(), zoo.bn()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.bn(self.conv(x)))
        for _ in range(32):
            x = (2 * x).frac()
        return x


def test_a_chaotic_model_is_judged_by_its_own_response() -> None:
    torch.manual_seed(0)
    original, x = zoo.randomise(Chaotic()), zoo.IMAGE()
    with use_backend("reference"):  # rounds otherwise than batch normalization
        verification = verify(original, convert(original, x).model, [x])
    outputs = verification.checks[0]
    assert verification.passed
    assert outputs.error is not None
    assert outputs.own_response is not None
    assert outputs.error > DEFAULT_TOLERANCE
    assert outputs.limit == 10 * outputs.own_response
    # A fault is still distinguished from amplified rounding.
    faulty = convert(original, x).model
    faulty.bn.eps = 0.1
    assert not verify(original, faulty, [x]).passed


@pytest.mark.parametrize(
    "name", ["dict input", "keyword input", "bfloat16", "float16", "volumes", "TorchScript inside", "dropout beside it"]
)
def test_any_inputs_outputs_and_dtypes_are_compared(name: str) -> None:
    trap = zoo.BY_NAME[name]
    model = trap.model()
    verification = verify(model, convert(model, trap.inputs()).model, [trap.inputs()])
    assert verification.passed
    assert outcomes(verification) == dict.fromkeys(outcomes(verification), True)
    assert (verification.fp32_error is None) == (name in ("bfloat16", "float16"))


def test_numbers_and_strings_among_the_outputs_must_be_equal() -> None:
    original = zoo.BY_NAME["dict input"].model()
    converted, inputs = convert(original).model, zoo.BY_NAME["dict input"].inputs()
    converted.register_forward_hook(lambda _module, _args, output: {**output, "count": 3})
    verification = verify(original, converted, [inputs])
    assert {EVALUATION, TRAINING} <= failed(verification)


def test_both_models_are_left_as_they_were() -> None:
    original, x = two_blocks(), zoo.IMAGE()
    original.bn1.eval()
    original.conv1.requires_grad_(False)
    converted = convert(original, x).model
    for model in (original, converted):
        model(x).sum().backward()
    before = [guarantees.Record.of(model) for model in (original, converted)]
    gradients = [[p.grad.clone() for p in m.parameters() if p.grad is not None] for m in (original, converted)]
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    verify(original, converted, [x])
    verify(original, converted, [zoo.image(1, 3, 1, 1)()])
    for model, record, kept in zip((original, converted), before, gradients, strict=True):
        guarantees.nothing_else_changed(record, model, guarantees.NO_SWAPS, same_objects=True)
        now = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(now) == len(kept)
        assert all(map(torch.equal, now, kept))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())
    assert torch.equal(x, zoo.IMAGE())


def test_a_forward_that_keeps_things_keeps_nothing_of_the_verification() -> None:
    for name in ("attribute written in forward", "list filled in forward"):
        model = zoo.BY_NAME[name].model()
        before = guarantees.Record.of(model)
        assert verify(model, model, [zoo.IMAGE()]).passed
        guarantees.nothing_else_changed(before, model, guarantees.NO_SWAPS, same_objects=True)
    assert model.seen == []


def test_python_random_numbers_are_drawn_alike() -> None:
    model = zoo.BY_NAME["number drawn in forward"].model()
    assert verify(model, convert(model, zoo.IMAGE()).model, [zoo.IMAGE()]).passed


def test_a_single_input_must_be_in_a_list() -> None:
    with pytest.raises(ModelError, match=re.escape("batches: expected a list of inputs, got one Tensor: pass [x]")):
        verify(two_blocks(), two_blocks(), zoo.IMAGE())
    with pytest.raises(ModelError, match=re.escape("got one dict: pass [x]")):
        verify(two_blocks(), two_blocks(), {"x": zoo.IMAGE()})  # type: ignore[arg-type]


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ModelError, match="batches: expected at least one input, got none"):
        verify(two_blocks(), two_blocks(), [])


def test_an_original_that_fails_is_an_error() -> None:
    with pytest.raises(ModelError, match="the original model fails on an input of 2x5x9x9: Given groups=1"):
        verify(two_blocks(), two_blocks(), [zoo.image(2, 5, 9, 9)()])


# --- how far two values are apart -------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
PAIRS: dict[str, tuple[Any, Any, float]] = {
    "equal": ([1.0, 2.0], [1.0, 2.0], 0.0),
    "relative to the reference": ([3.0, 4.0], [3.0, 4.5], 0.1),
    "both zero": ([0.0], [0.0], 0.0),
    "something where there is nothing": ([0.0], [1e-30], INF),
    "both empty": ([], [], 0.0),
    "NaN in both": ([NAN, 2.0], [NAN, 3.0], 0.5),
    "NaN in one": ([1.0], [NAN], INF),
    "NaN only in the reference": ([NAN, 1.0], [5.0, 1.0], INF),
    "inf in both": ([INF, -INF], [INF, -INF], 0.0),
    "inf of another sign": ([INF], [-INF], INF),
    "inf in one": ([1.0], [INF], INF),
    "another shape": ([1.0], [1.0, 1.0], INF),
}


@pytest.mark.parametrize(("a", "b", "expected"), PAIRS.values(), ids=PAIRS)
def test_distance_of_floating_tensors(a: list[float], b: list[float], expected: float) -> None:
    assert relative_l2(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)


def test_distance_of_anything_else() -> None:
    one = torch.tensor([1])
    assert relative_l2(one, torch.tensor([1])) == 0.0
    assert relative_l2(one, torch.tensor([2])) == INF
    assert relative_l2(one, torch.tensor([1.0])) == INF
    assert relative_l2(one, 1) == relative_l2(1, one) == relative_l2(1, True) == relative_l2("a", "b") == INF
    assert relative_l2("a", "a") == relative_l2(None, None) == 0.0
    assert relative_l2(torch.tensor([3 + 4j]), torch.tensor([3 + 3.5j])) == pytest.approx(0.1)


def test_the_worst_of_pairs() -> None:
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    assert max_distance([one, two], [one, one]) == pytest.approx(0.5)
    assert max_distance([one], [one, one]) == INF
    assert max_distance([], []) == 0.0
    assert max_abs_difference(torch.tensor([INF, 1.0]), torch.tensor([0.0, 1.5])) == 0.5
    assert max_abs_difference(one, 1.0) == max_abs_difference(torch.tensor([]), torch.tensor([])) == 0.0


def test_tensors_are_paired_by_any_common_name() -> None:
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    first, second = {("a", "b"): one, ("c",): two}, {("b",): two, ("d",): one}
    assert match_names(first, second) == [(("a", "b"), ("b",))]


def test_a_vector_is_as_far_as_all_its_pairs_together() -> None:
    vector = VectorDistance()
    assert vector.result() == 0.0
    for a, b in (([0.0, 3.0], [0.0, 3.0]), ([4.0], [4.5])):
        vector.add(torch.tensor(a), torch.tensor(b))
    assert vector.result() == pytest.approx(0.1)
    vector.add(torch.tensor([NAN, 0.0]), torch.tensor([NAN, 0.0]))
    assert vector.result() == pytest.approx(0.1)
    vector.add(torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64))
    assert vector.result() == INF
