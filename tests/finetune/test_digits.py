"""The data and the source network of the digits: the same every time."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.finetuning.evidence.arms import ARMS
from benchmarks.finetuning.evidence.settings.task import Examples, Task
from benchmarks.finetuning.evidence.training import finetune
from benchmarks.finetuning.training import SourceTraining, batch_order, train_source
from normswap.finetune.data.digits import SPLIT, load_ink, prepare_digits, render_target, split_indices
from normswap.surgery.importance import gated_modules, sites_with_changed_weights

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def test_a_source_network_that_did_not_learn_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"reached \d+\.\d % on the validation images, expected at least 90.0 %"):
        train_source(prepare_digits(seed=0), seed=0, training=SourceTraining(epochs=1, rate=1e-6))


def test_at_least_half_of_the_sites_leave_the_vertex_within_50_steps_which_repeat_themselves() -> None:
    digits = prepare_digits(seed=0)
    target = digits.target
    task = Task(train_source(digits, seed=0), Examples(*target.train), Examples(*target.test), Examples(*target.test))
    runs = []
    for _ in range(2):
        model = ARMS["default"].prepare(task.network, task)
        assert sites_with_changed_weights(model) == []
        runs.append(finetune(ARMS["default"], model, task, rate=1e-3, steps=50, batch=2, seed=0))
        assert len(sites_with_changed_weights(model)) >= len(gated_modules(model)) / 2
    assert runs[0] == runs[1]
