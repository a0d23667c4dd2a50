"""Images as batches: what a split holds, that an epoch follows from seed and number, and what is refused."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import IterableImageDataset
from torch import nn

from normswap.errors import DataError
from normswap.finetune.data.datasets import complete_settings, open_data
from normswap.finetune.data.digits import prepare_digits
from normswap.finetune.data.loaders import DataSettings

# timm opens a file per image and leaves it to the garbage collector to close it.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

DIGITS = DataSettings("digits", image_size=(8, 8), channels=1, mean=(0.0,), std=(1.0,), batch_size=100)


def image_folder(root: Path, *, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3, size: int = 12) -> Path:
    """A folder per class with images, each of one colour that tells its class and its number."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(each):
            Image.new("RGB", (size, size), (40 * label, 10 * number, 200)).save(root / name / f"{number}.png")
    return root


def settings_for(root: Path, **options: Any) -> DataSettings:
    plain = {"image_size": (12, 12), "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0, "batch_size": 2}
    return DataSettings(f"folder:{root}", **plain | options)


def numbers(data: Any, epoch: int = 0) -> list[tuple[int, int]]:
    """The (class, number) of every image of an epoch, as their colours tell."""
    pixels = torch.cat([images[:, :, 0, 0] for images, _ in data.epoch(epoch)]) * 255
    return [(round(float(red) / 40), round(float(green) / 10)) for red, green, _ in pixels]


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_are_the_scans_split_once_for_all() -> None:
    splits = {
        name: list(open_data(DataSettings(**vars(DIGITS) | {"split": name}))) for name in ("train", "val", "test")
    }
    images = torch.cat([x for batches in splits.values() for x, _ in batches])
    labels = torch.cat([y for batches in splits.values() for _, y in batches])
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:1000]
    truth = torch.tensor(load_digits().images, dtype=torch.float32)[order] / 16
    assert (images[:, 0] - truth).abs().max() < 1 / 255
    assert labels.equal(torch.tensor(load_digits().target)[order])
    assert [sum(len(x) for x, _ in batches) for batches in splits.values()] == [700, 100, 200]


def test_shifted_digits_are_others_and_in_colour() -> None:
    shifted = {"source": "digits:shifted", "image_size": (32, 32), "channels": 3, "split": "test"}
    images, labels = next(iter(open_data(DataSettings(**vars(DIGITS) | shifted | {"mean": (0.5,), "std": (0.5,)}))))
    drawn = prepare_digits(seed=0).target.test
    assert (images - drawn.pixels[:100]).abs().max() < 1 / 100
    assert labels.equal(drawn.labels[:100])


@pytest.mark.slow
def test_digits_take_the_form_that_a_model_asks_for() -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    data = open_data(DataSettings("digits", split="test"), model=model, classes=10)
    images, labels = next(iter(data))
    assert (images.shape, labels.shape, len(data), data.images, data.classes) == ((32, 3, 160, 160), (32,), 7, 200, 10)
    assert (data.settings.mean, data.settings.interpolation) == (model.pretrained_cfg["mean"], "bilinear")
    grey = complete_settings(DataSettings("digits", channels=1, mean=(0.1, 0.2, 0.6)), model)
    assert grey.mean == pytest.approx((0.3,))


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_order_for_evaluation(tmp_path: Path) -> None:
    data = open_data(settings_for(image_folder(tmp_path / "images")), classes=2)
    assert numbers(data) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [y.tolist() for _, y in data] == [[0, 0], [0, 1], [1, 1]]
    assert (len(data), data.images, data.classes, data.class_names) == (3, 6, 2, ("cat", "dog"))


def test_the_folder_of_a_split_is_found_by_any_of_its_names(tmp_path: Path) -> None:
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "val", classes=("dog",))
    train = open_data(settings_for(tmp_path, split="train"))
    held_out = open_data(settings_for(tmp_path, split="validation", class_names=train.class_names))
    assert [y.tolist() for _, y in held_out] == [[1, 1], [1]]
    with pytest.raises(DataError, match="has no split 'test': choose one of train, val"):
        open_data(settings_for(tmp_path, split="test"))


def test_training_shuffles_by_seed_and_epoch_and_takes_whole_batches(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", each=7)
    plain = {"augmentation": {"no_aug": True}, "batch_size": 4}
    data = open_data(settings_for(root, **plain), use="training")
    first, second = numbers(data, 0), numbers(data, 1)
    assert len(data) == 3
    assert len({*first}) == len({*second}) == 12
    assert first != second
    assert first == numbers(open_data(settings_for(root, **plain), use="training"), 0)
    assert first != numbers(open_data(settings_for(root, **plain, seed=1), use="training"), 0)
    everything = numbers(open_data(settings_for(root, batch_size=4), use="calibration"), 0)
    assert sorted(everything) == [(label, number) for label in (0, 1) for number in range(7)]
    assert everything != sorted(everything)


def test_augmentation_follows_from_seed_and_epoch_with_any_number_of_workers() -> None:
    def epoch(number: int, **options: Any) -> torch.Tensor:
        torch.rand(options.get("workers", 0) + 1)  # whatever the caller drew before
        settings = DataSettings(**vars(DIGITS) | {"augmentation": {"auto_augment": "rand-m9"}} | options)
        return next(open_data(settings, use="training").epoch(number))[0]

    assert epoch(0).equal(epoch(0, workers=1))
    assert not epoch(0).equal(epoch(1))
    state = torch.get_rng_state()
    epoch_twice = [epoch(0) for _ in range(2)]
    torch.set_rng_state(state)
    assert epoch_twice[0].equal(epoch_twice[1])


def test_an_epoch_draws_nothing_from_the_caller() -> None:
    data = open_data(DIGITS, use="training")
    state = torch.get_rng_state()
    for _ in zip(range(2), data, strict=False):
        assert torch.get_rng_state().equal(state)


def test_processes_share_the_images(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", each=4)
    shares = [numbers(open_data(settings_for(root), use="calibration", shard=(rank, 3))) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 2]
    assert len({number for share in shares for number in share}) == 8
    steps = [len(open_data(settings_for(root, batch_size=1), use="training", shard=(rank, 3))) for rank in range(3)]
    assert steps == [2, 2, 2]


# --- timm's other data sets -------------------------------------------------------------------------------------------


class Reader:
    """What a streaming reader of timm's is to its data set."""

    def __init__(self) -> None:
        self.number = -1

    def set_epoch(self, number: int) -> None:
        self.number = number

    def set_loader_cfg(self, num_workers: int | None = None) -> None:
        self.workers = num_workers

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for label in range(5):
            yield Image.new("RGB", (12, 12), (self.number, 0, 0)), label

    def __len__(self) -> int:
        return 5


def test_a_stream_is_read_epoch_by_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def create_dataset(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        return IterableImageDataset("", reader=Reader())

    monkeypatch.setattr(timm.data, "create_dataset", create_dataset)
    settings = settings_for(Path(), batch_size=2)
    data = open_data(DataSettings(**vars(settings) | {"source": "wds/somewhere", "root": "shards"}), classes=5)
    assert (asked["name"], asked["root"], asked["split"]) == ("wds/somewhere", "shards", "train")
    assert [y.tolist() for _, y in data] == [[0, 1], [2, 3], [4]]
    assert (data.images, data.classes, len(data)) == (None, None, 3)
    assert round(float(next(data.epoch(7))[0][0, 0, 0, 0]) * 255) == 7


def test_a_data_set_of_torchvision_is_opened_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cifar:
        classes = ("plane", "car")
        transform: Any = None

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return self.transform(Image.fromarray(np.full((12, 12, 3), index, np.uint8))), index % 2

    monkeypatch.setattr(timm.data, "create_dataset", lambda name, **_: Cifar())
    settings = settings_for(Path(), batch_size=3)
    data = open_data(DataSettings(**vars(settings) | {"source": "torch/cifar10"}), classes=2)
    assert [y.tolist() for _, y in data] == [[0, 1, 0], [1]]
    assert data.class_names == ("plane", "car")


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_of_torchvision_get_the_channels_of_the_model(
    monkeypatch: pytest.MonkeyPatch, channels: int
) -> None:
    class Clothes:
        classes = ("shirt", "coat")
        transform: Any = None

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return self.transform(Image.fromarray(np.full((12, 12), 51 * index, np.uint8))), index

    monkeypatch.setattr(timm.data, "create_dataset", lambda name, **_: Clothes())
    plain = {"channels": channels, "mean": (0.0,) * channels, "std": (1.0,) * channels}
    settings = DataSettings(**vars(settings_for(Path())) | {"source": "torch/fashion_mnist"} | plain)
    images, _ = next(iter(open_data(settings)))
    assert images.shape[1] == channels
    torch.testing.assert_close(images[1], torch.full_like(images[1], 0.2))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "use", "message"),
    [
        (
            {"source": "folder:{}/none"},
            "evaluation",
            "none: no such folder: expected one with a folder of images per class",
        ),
        ({"source": "folder:{}/empty"}, "evaluation", "empty: has no images"),
        ({"source": "folder:{}/one"}, "training", "expected several classes to train on, got cat"),
        (
            {"source": "folder:{}/three"},
            "training",
            "has 3 classes, but the model has 2: build the model with num_classes=3",
        ),
        ({"class_names": ("cat",)}, "evaluation", "1 folders do not name one of the 1 classes: dog"),
        (
            {"source": "images"},
            "evaluation",
            "data 'images': expected folder:PATH, digits, digits:shifted, or a name such as torch/NAME",
        ),
        ({"source": "digits", "split": "all"}, "evaluation", "no split 'all': choose one of train, validation, test"),
        ({"source": "torch/nothing"}, "evaluation", "data 'torch/nothing': cannot be opened: .*Unknown torchvision"),
        ({"image_size": None}, "evaluation", "image size unknown: pass image_size="),
        ({"channels": 4}, "evaluation", "expected a model for images of 1 or 3 channels, got 4"),
        ({"batch_size": 7}, "training", r"6 images \(1 processes\) are fewer than one batch of 7"),
        ({"augmentation": {"blur": 1}}, "training", "augmentation {'blur': 1}: .*: see timm.data.create_transform"),
        ({"augmentation": {"auto_augment": "much"}}, "training", "augmentation {'auto_augment': 'much'}: "),
    ],
)
def test_what_is_refused(tmp_path: Path, options: dict[str, Any], use: Any, message: str) -> None:
    root = image_folder(tmp_path / "images")
    image_folder(tmp_path / "one", classes=("cat",))
    image_folder(tmp_path / "three", classes=("cat", "dog", "eel"))
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    settings = vars(settings_for(root)) | options
    settings["source"] = settings["source"].format(tmp_path)
    with pytest.raises(DataError, match=message):
        open_data(DataSettings(**settings), use=use, classes=2)


def test_labels_beyond_the_classes_of_the_model_are_refused() -> None:
    model = nn.Identity()
    data = open_data(DIGITS, model=model)
    narrow = type(data)(**vars(data) | {"checked_classes": 9})
    with pytest.raises(DataError, match=re.escape("labels from 0 to 8, since the model has 9 classes, got 9")):
        list(narrow)


def test_a_folder_without_a_readable_image_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = image_folder(tmp_path / "images", each=1)
    for path in root.rglob("*.png"):
        path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"Failed to load .* consecutive samples: expected image files"):
        list(open_data(settings_for(root)))
    assert "Skipped sample" in caplog.text


def test_scikit_learn_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="scikit-learn is not installed: pip install scikit-learn"):
        open_data(DIGITS)
