"""The data and the training behind the demo and the evidence: the same for every arm, and the same every time."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.finetuning import demo
from benchmarks.finetuning.arms import ARMS, batch_norms, reestimate_statistics
from benchmarks.finetuning.evidence_records import choose
from benchmarks.finetuning.protocol import (
    ALL_ARMS,
    DEMO_ARMS,
    DEMO_RATE,
    DEMO_SEED,
    FINE_TUNING,
    MAIN,
    OTHERS,
    TARGET_LEAD_OVER,
    FineTuning,
    SourceTraining,
)
from benchmarks.finetuning.training import (
    Outcome,
    batch_order,
    build_network,
    build_optimizer,
    finetune,
    relative_output_error,
    split_parameters,
    train_source,
)
from normswap.finetune.data.digits import SPLIT, load_ink, prepare_digits, render_target, split_indices
from normswap.surgery.importance import gated_modules, sites_with_changed_weights

SHORT = FineTuning(steps=3)
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """An untrained network whose BN statistics are those of shifted digits."""
    model = build_network(seed=0)
    reestimate_statistics(model, prepare_digits(seed=0).target.train.pixels[:50])
    return model.eval()


def test_the_six_sets_share_no_image() -> None:
    index = split_indices(1797, seed=3)
    assert {key: len(i) for key, i in index.items()} == SPLIT
    everything = torch.cat(list(index.values()))
    assert len(everything.unique()) == len(everything) == 1797


def test_data_follow_from_the_seed() -> None:
    first, again, other = (prepare_digits(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.target.test.pixels, again.target.test.pixels)
    assert torch.equal(first.source.train.pixels, again.source.train.pixels)
    assert not torch.equal(first.target.test.pixels, other.target.test.pixels)


def test_labels_stay_with_their_images() -> None:
    ink, labels = load_ink()
    index = split_indices(len(labels), seed=0)
    digits = prepare_digits(seed=0)
    for name, domain in (("source", digits.source), ("target", digits.target)):
        for part in ("train", "validation", "test"):
            chosen = index[name, part]
            images = getattr(domain, part)
            assert torch.equal(images.labels, labels[chosen])
            shrunk = nn.functional.adaptive_avg_pool2d(images.pixels.mean(1, keepdim=True), 8)
            assert _correlation(shrunk, ink[chosen]).quantile(0.01) > 0.7


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = (t.flatten(1) - t.flatten(1).mean(1, keepdim=True) for t in (a, b))
    return nn.functional.cosine_similarity(a, b)


def test_shifted_pixels_stay_in_range_and_differ_in_contrast() -> None:
    pixels = render_target(load_ink()[0][:200], seed=0)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    deviation = pixels.flatten(1).std(1)
    assert deviation.max() > 3 * deviation.min()


def test_batches_are_whole_passes_in_a_fixed_order() -> None:
    order = batch_order(10, steps=8, batch_size=3, seed=5)
    assert torch.equal(order, batch_order(10, steps=8, batch_size=3, seed=5))
    assert order.shape == (8, 3)
    assert len(order[:3].unique()) == len(order[3:6].unique()) == 9


def test_every_arm_gets_the_same_steps_and_batches_and_leaves_the_network_alone(network: nn.Module) -> None:
    images = prepare_digits(seed=0).target.train
    before = copy.deepcopy(network.state_dict())
    seen: dict[str, list[Tensor]] = {}
    for name, arm in ARMS.items():
        model = arm.prepare(network, images.pixels[:50])
        inputs: list[Tensor] = []
        model.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        losses = finetune(model, images, rate=0.01, settings=SHORT, seed=0, freezes_statistics=arm.freezes_statistics)
        assert len(losses) == len(inputs) == SHORT.steps
        seen[name] = inputs
    for inputs in seen.values():
        assert all(torch.equal(got, expected) for got, expected in zip(inputs, seen["bn"], strict=True))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_fine_tuning_repeats_itself(network: nn.Module) -> None:
    images = prepare_digits(seed=0).target.train
    runs = [
        finetune(ARMS["converted"].prepare(network, images.pixels), images, rate=0.01, settings=SHORT, seed=0)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_only_the_converted_arm_starts_from_the_same_function_with_other_norms(network: nn.Module) -> None:
    pixels = prepare_digits(seed=0).target.test.pixels[:20]
    error = {name: relative_output_error(network, ARMS[name].prepare(network, pixels), pixels) for name in ARMS}
    assert error["converted"] < 1e-5
    assert min(error[name] for name in ("group_norm", "instance_norm", "uniform")) > 1e-2


@pytest.mark.parametrize("name", ["frozen", "adapted"])
def test_frozen_statistics_stay_as_prepared(network: nn.Module, name: str) -> None:
    images = prepare_digits(seed=0).target.train
    model = ARMS[name].prepare(network, images.pixels[:100])
    prepared = [layer.running_var.clone() for layer in batch_norms(model)]
    finetune(model, images, rate=0.01, settings=SHORT, seed=0, freezes_statistics=ARMS[name].freezes_statistics)
    assert all(torch.equal(layer.running_var, p) for layer, p in zip(batch_norms(model), prepared, strict=True))


def test_reestimation_averages_over_batches_and_restores_momentum_and_mode() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3)).eval()
    pixels = torch.randn(100, 3, 4, 4, dtype=torch.float64) * 2 + 1
    model.double()
    reestimate_statistics(model, pixels)
    halves = torch.stack([half.transpose(0, 1).flatten(1).var(1) for half in (pixels[:50], pixels[50:])])
    torch.testing.assert_close(model[0].running_var, halves.mean(0))
    assert model[0].momentum == 0.3
    assert not model.training


def test_gates_form_a_group_without_weight_decay(network: nn.Module) -> None:
    model = ARMS["converted"].prepare(network, torch.empty(0))
    own, gates = split_parameters(model)
    assert len(gates) == 2 * len(batch_norms(network))
    assert len(own) == len(list(network.parameters()))
    optimizer = build_optimizer(own, gates, rate=0.1, settings=FineTuning(gate_rate=5.0))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [FINE_TUNING.weight_decay, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


def test_the_rate_is_chosen_on_validation_images_and_the_smaller_of_equals() -> None:
    def outcome(rate: float, validation: float, target: float) -> Outcome:
        return Outcome("bn", 0, rate, 0.0, 0.0, validation, target, 0.0, True, 0.0)

    assert choose([outcome(0.1, 80, 99), outcome(0.03, 90, 50), outcome(0.01, 90, 40)]).rate == 0.01


def test_every_arm_that_is_named_exists() -> None:
    named = {*ALL_ARMS, *DEMO_ARMS, *TARGET_LEAD_OVER, *(arm for setting in (MAIN, *OTHERS) for arm in setting.arms)}
    assert named == set(ARMS)


def test_a_source_network_that_did_not_learn_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"reached \d+\.\d % on the validation images, expected at least 90.0 %"):
        train_source(prepare_digits(seed=0), seed=0, training=SourceTraining(epochs=1, rate=1e-6))


def test_the_demo_refuses_unequal_accuracies(network: nn.Module) -> None:
    digits = prepare_digits(seed=0)
    with pytest.raises(
        RuntimeError, match=r"expected equal accuracies after conversion, got \(name, original, converted\): \["
    ):
        demo.check_same(network, ARMS["group_norm"].prepare(network, torch.empty(0)), digits)
    assert "relative output error in float32 0.0e+00" in demo.check_same(network, network, digits)


def test_at_least_half_of_the_sites_of_the_demo_leave_the_vertex_within_50_steps() -> None:
    digits = prepare_digits(seed=DEMO_SEED)
    trained = train_source(digits, seed=DEMO_SEED)
    model = ARMS["converted"].prepare(trained, digits.target.train.pixels)
    assert sites_with_changed_weights(model) == []
    finetune(model, digits.target.train, rate=DEMO_RATE, settings=FineTuning(steps=50), seed=DEMO_SEED)
    assert len(sites_with_changed_weights(model)) >= len(gated_modules(model)) / 2
