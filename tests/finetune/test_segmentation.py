"""Segmentation as a task: losses and metrics counted by hand, the formats of the data, refusals, short runs."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

import normswap
from normswap.errors import DataError, RecipeError
from normswap.finetune.data import shapes
from normswap.finetune.data.joint_transforms import JointAugmentation, TransformedDataset, build_transforms
from normswap.finetune.data.loaders import DataSettings, derive_seed
from normswap.finetune.data.segmentation import open_masked_images
from normswap.finetune.data.shapes import COUNTS, STYLES, ShapeScenes, draw_scene
from normswap.finetune.model_source import StartingModel
from normswap.finetune.recipe import Recipe, parse_recipe, read_recipe
from normswap.finetune.tasks.interface import TaskContext
from normswap.finetune.tasks.segmentation import SegmentationTask
from normswap.finetune.trainer import run_recipe

LOGITS = torch.tensor([[2.0, -1.0], [0.5, 0.0], [-1.0, 1.5]])[None, :, None, :].expand(1, 3, 2, 2)
MASKS = torch.tensor([[[0, 2], [1, 255]]])


class Fixed(nn.Module):
    """A network with fixed outputs, and one parameter."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs, self.weight = outputs, nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Any:
        return self.outputs


def recipe(**data: Any) -> Recipe:
    keys = {"source": "shapes", "image_size": 32, "batch_size": 2, **data}
    tables = {"model": {"architecture": "timm:resnet18"}, "data": keys, "train": {"steps": 1}}
    return parse_recipe("mine", {"task": "segmentation", **tables})


def make_task(model: nn.Module | None = None, **data: Any) -> SegmentationTask:
    source = StartingModel(model or Fixed(LOGITS), None, None, ())
    return SegmentationTask(TaskContext(recipe(**data), source, image_size=(32, 32)))


# --- losses and metrics -----------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, masks: Tensor, *, ignored: int) -> float:
    """The mean over the pixels that count, pixel by pixel."""
    found = []
    for n, row, column in np.ndindex(*masks.shape):
        label = int(masks[n, row, column])
        if label != ignored:
            scores = [math.exp(value) for value in logits[n, :, row, column].tolist()]
            found.append(-math.log(scores[label] / sum(scores)))
    return sum(found) / len(found)


def test_the_loss_is_the_cross_entropy_of_the_pixels_that_count() -> None:
    wanted, batch = cross_entropy(LOGITS, MASKS, ignored=255), (torch.zeros(1, 3, 2, 2), MASKS)
    task = make_task()
    for outputs in (LOGITS, {"out": LOGITS}, SimpleNamespace(logits=LOGITS)):
        assert task.compute_loss(Fixed(outputs), batch).item() == pytest.approx(wanted)
    with_auxiliary = task.compute_loss(Fixed({"out": LOGITS, "aux": 2 * LOGITS}), batch)
    assert with_auxiliary.item() == pytest.approx(wanted + 0.4 * cross_entropy(2 * LOGITS, MASKS, ignored=255))
    other = make_task(ignore_index=2).compute_loss(Fixed(LOGITS), (batch[0], MASKS.clamp(max=2)))
    assert other.item() == pytest.approx(cross_entropy(LOGITS, MASKS.clamp(max=2), ignored=2))


def test_smaller_logits_are_resized_and_masks_without_a_pixel_that_counts_cost_nothing() -> None:
    small = torch.tensor([1.0, 3.0, 0.0])[None, :, None, None]
    loss = make_task().compute_loss(Fixed(SimpleNamespace(logits=small)), (torch.zeros(1, 3, 2, 2), MASKS))
    assert loss.item() == pytest.approx(cross_entropy(small.expand(1, 3, 2, 2), MASKS, ignored=255))
    assert make_task().compute_loss(Fixed(small), (torch.zeros(1, 3, 2, 2), torch.full_like(MASKS, 255))).item() == 0


def test_the_metrics_are_those_of_all_pixels_of_the_split() -> None:
    predicted = torch.randint(5, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    masks = torch.randint(5, (2, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    masks[0, 0, :4] = 255
    task = make_task()
    task.open_training()
    meter = task.make_meter(Fixed(LOGITS), torch.device("cpu"))
    for prediction, mask in zip(predicted, masks, strict=True):
        meter.update(Fixed(10 * nn.functional.one_hot(prediction, 5).permute(0, 3, 1, 2).float()), (mask, mask))
    found = meter.compute(Accelerator())
    overlaps, dice = [], []
    for label in range(5):
        one, other = (predicted == label)[masks != 255], (masks == label)[masks != 255]
        both = (one & other).sum().item()
        overlaps.append(both / (one | other).sum().item())
        dice.append(2 * both / (one.sum() + other.sum()).item())
    assert [*found.figures] == ["mIoU", "Dice"]
    assert found.figures["mIoU"] == pytest.approx(100 * sum(overlaps) / 5)
    assert found.figures["Dice"] == pytest.approx(100 * sum(dice) / 5)
    right = (predicted == masks)[masks != 255].double().mean().item()
    wrong_cost = math.log(math.exp(10) + 4)  # of logits 10, 0, 0, 0, 0
    assert found.loss == pytest.approx(wrong_cost - 10 * right)
    assert (found.images, found.unit) == (6, "%")


# --- generated shapes -------------------------------------------------------------------------------------------------


def test_scenes_follow_from_seed_split_and_index() -> None:
    one, other = (ShapeScenes("shapes", "train", size=48, seed=3) for _ in range(2))
    later = one[7]
    assert all(torch.equal(a, b) for a, b in zip(later, other[7], strict=True))
    different = [ShapeScenes("shapes", "train", size=48, seed=4)[7], ShapeScenes("shapes", "test", size=48, seed=3)[7]]
    different += [ShapeScenes("shapes:shifted", "train", size=48, seed=3)[7], one[8]]
    assert not any(torch.equal(later.image, scene.image) for scene in different)
    assert [len(ShapeScenes("shapes", split, size=48, seed=0)) for split in COUNTS] == [2000, 200, 400]


def test_boxes_and_classes_of_a_scene_agree() -> None:
    for number in range(30):
        scene = draw_scene(64, STYLES["shapes"], seed=derive_seed(number))
        assert scene.image.dtype == torch.uint8
        assert 1 <= len(scene.boxes) == len(scene.labels) <= 3
        for (left, top, right, bottom), label in zip(scene.boxes.int().tolist(), scene.labels, strict=True):
            inside = scene.classes[top:bottom, left:right] == label
            edges = inside[0], inside[-1], inside[:, 0], inside[:, -1]
            assert all(edge.any() for edge in edges)  # the box is tight
    classes = [draw_scene(64, STYLES["shapes"], seed=n).classes.unique() for n in range(30)]
    assert torch.cat(classes).unique().tolist() == [0, 1, 2, 3, 4]


# --- joint transforms -------------------------------------------------------------------------------------------------


def test_image_and_mask_change_together() -> None:
    settings = DataSettings("shapes", image_size=(32, 32))
    plain = open_masked_images(settings, classes=None, ignore_index=255)
    image, mask = plain.dataset[0]
    flipped = TransformedDataset(plain.dataset, build_transforms((32, 32), JointAugmentation(flip=1.0)))[0]
    assert torch.allclose(flipped[0], image.flip(-1).float() / 255)
    assert torch.equal(flipped[1], mask.flip(-1))
    torch.manual_seed(0)
    cropped = TransformedDataset(plain.dataset, build_transforms((16, 16), JointAugmentation((0.2, 0.4))))[0]
    assert (cropped[0].shape, cropped[1].shape) == ((3, 16, 16), (16, 16))
    jittered = TransformedDataset(plain.dataset, build_transforms(None, JointAugmentation(color_jitter=0.4)))[0]
    assert not torch.allclose(jittered[0], image.float() / 255)
    assert torch.equal(jittered[1], mask)
    assert build_transforms((32, 32), None, channels=1)[0](image).shape == (1, 32, 32)


# --- files ------------------------------------------------------------------------------------------------------------


def write_pair(folder: Path, name: str, mask: Image.Image, size: tuple[int, int] = (20, 10)) -> None:
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(folder / "images" / f"{name}.png")
    mask.save(folder / "masks" / f"{name}.png")


def grey(*values: int, size: tuple[int, int] = (20, 10)) -> Image.Image:
    pixels = np.zeros(size[::-1], dtype=np.uint8)
    pixels.flat[: len(values)] = values
    return Image.fromarray(pixels)


def open_folder(folder: Path, split: str = "train", classes: int | None = 3, **options: Any) -> Any:
    settings = DataSettings(f"folder:{folder}", split=split, image_size=(10, 20))
    return open_masked_images(settings, classes=classes, **{"ignore_index": 255, **options})


def test_a_folder_has_masks_of_class_indices(tmp_path: Path) -> None:
    write_pair(tmp_path / "train", "a", grey(0, 1, 2, 255))
    palette = grey(2, 1)
    palette.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250])
    write_pair(tmp_path / "val", "b", palette)
    found = open_folder(tmp_path)
    image, mask = found.dataset[0]
    assert (found.classes, len(found.dataset), image.shape, mask.shape) == (3, 1, (3, 10, 20), (10, 20))
    assert mask.flatten()[:5].tolist() == [0, 1, 2, 255, 0]
    assert image[:, 0, 0].tolist() == [10, 200, 30]
    assert open_folder(tmp_path, "validation").dataset[0][1].flatten()[:3].tolist() == [2, 1, 0]


def test_voc_is_read_from_its_folder(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(root / "JPEGImages" / "x.jpg")
    grey(0, 20, 255, size=(8, 6)).save(root / "SegmentationClass" / "x.png")
    (root / "ImageSets/Segmentation" / "val.txt").write_text("x\n")
    settings = DataSettings("torch/voc", split="validation", root=str(tmp_path), image_size=(6, 8))
    found = open_masked_images(settings, classes=None, ignore_index=255)
    image, mask = found.dataset[0]
    assert (found.classes, len(found.dataset), image.shape) == (21, 1, (3, 6, 8))
    assert mask.flatten()[:4].tolist() == [0, 20, 255, 0]
    for changed, text in (({"root": None}, "expected data.root"), ({"split": "train"}, "cannot be opened")):
        with pytest.raises(DataError, match=text):
            open_masked_images(replace(settings, **changed), classes=None, ignore_index=255)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (grey(3), "expected classes from 0 to 2, or 255 for pixels that do not count, got 3"),
        (Image.new("RGB", (20, 10)), "expected the index of a class per pixel, got a picture in RGB"),
        (grey(1, size=(10, 10)), "expected 20x10 pixels as a.png, got 10x10"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(tmp_path: Path, mask: Image.Image, text: str) -> None:
    write_pair(tmp_path / "train", "a", mask)
    with pytest.raises(DataError, match=rf"a\.png: {re.escape(text)}"):
        open_folder(tmp_path).dataset[0]


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="has no folder images: expected the folders images and masks"):
        open_folder(tmp_path)
    (tmp_path / "train" / "images").mkdir()
    (tmp_path / "train" / "masks").mkdir()
    with pytest.raises(DataError, match="images: has no images: expected files"):
        open_folder(tmp_path)
    write_pair(tmp_path / "train", "a", grey(1))
    (tmp_path / "train" / "masks" / "a.png").write_text("no image")
    with pytest.raises(DataError, match=r"a\.png: cannot be read: .* expected an image file"):
        open_folder(tmp_path).dataset[0]
    (tmp_path / "train" / "masks" / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png: no such file: 1 of 1 images have no mask"):
        open_folder(tmp_path)
    with pytest.raises(DataError, match=r"number of classes unknown: set data\.classes, such as 3"):
        open_folder(tmp_path, classes=None)
    with pytest.raises(DataError, match="no such folder: expected one with the folders images and masks"):
        open_folder(tmp_path / "nowhere")


@pytest.mark.multiprocess
def test_the_error_of_a_worker_has_one_line(tmp_path: Path) -> None:
    write_pair(tmp_path / "train", "a", grey(9))
    task = make_task(source=f"folder:{tmp_path}", classes=3, batch_size=1, workers=1)
    with pytest.raises(DataError) as caught:
        next(iter(task.open_training()))
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_sources_without_masks_are_refused() -> None:
    with pytest.raises(DataError, match="'digits': expected data with masks: folder:PATH, shapes, shapes:shifted"):
        make_task(source="digits").open_training()
    with pytest.raises(DataError, match=r"data\.classes: shapes has 5 classes, got 4: remove the key"):
        make_task(classes=4).open_training()
    with pytest.raises(DataError, match="has no split 'dev': choose one of train, validation, test"):
        make_task(train_split="dev").open_training()


# --- refusals of recipes and models -----------------------------------------------------------------------------------


def test_keys_of_other_tasks_are_refused() -> None:
    for key, value in {"mixup": 0.1, "cutmix": 1.0, "auto_augment": "rand-m9", "random_erase": 0.1}.items():
        with pytest.raises(RecipeError, match=rf'data\.{key}: not used with task = "segmentation": remove 1 key'):
            recipe(**{key: value})
    with pytest.raises(RecipeError, match=r"data\.mixup, data\.cutmix: .* remove 2 keys"):
        recipe(mixup=0.1, cutmix=0.1)
    tables = {"model": {"architecture": "timm:resnet18"}, "data": {"classes": 3}, "train": {"steps": 1}}
    with pytest.raises(RecipeError, match=r'data\.classes: not used with task = "classification"'):
        parse_recipe("mine", tables)
    tables = {"model": {"architecture": "timm:resnet18", "new_head": True}, "train": {"steps": 1}}
    with pytest.raises(RecipeError, match=r"model\.new_head: replaces classifiers only"):
        parse_recipe("mine", {"task": "segmentation", **tables})


def test_a_model_that_does_not_fit_is_refused() -> None:
    task = make_task()
    training, images = task.open_training(), torch.zeros(2, 3, 2, 2)
    text = "shapes: has 5 classes, but the model has 3 outputs: build it with 5"
    with pytest.raises(DataError, match=text):
        task.check_model(StartingModel(Fixed(LOGITS), None, None, ()), training, images, is_new=True)
    for outputs, shown in ((torch.zeros(2, 5), r"\(2, 5\)"), ([LOGITS], "list"), ({"logit": LOGITS}, "dict")):
        with pytest.raises(RecipeError, match=rf"expected a network that returns logits .*got {shown}: train it as"):
            task.check_model(StartingModel(Fixed(outputs), None, None, ()), training, images, is_new=True)
    with pytest.raises(RecipeError, match=r"data\.image_size: the model does not record its image size"):
        SegmentationTask(TaskContext(recipe(), StartingModel(Fixed(LOGITS), None, None, ())))


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("network", ["deeplabv3", "unet"])
def test_a_short_form_of_the_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str) -> None:
    for split in COUNTS:
        monkeypatch.setitem(shapes.COUNTS, split, 8)
    keys = [
        f"model.architecture=segmentation.py:build_model,network={network},classes=5,imagenet=False",
        f"run.output={tmp_path / 'run'}",
        "data.image_size=32",
        "train.steps=2",
        "train.warmup_share=0",
        f"convert.verify={str(network == 'deeplabv3').lower()}",
    ]
    outcome = run_recipe(read_recipe("segmentation", keys))
    assert outcome.after.images == 8
    assert [*outcome.after.figures] == ["mIoU", "Dice"]
    assert outcome.after.loss != outcome.before.loss
    assert any("running statistics were computed on 8 training images" in note for note in outcome.notes)
    loaded = normswap.load(outcome.model, trust=True).model
    assert len(normswap.importance_weights(loaded)) > 50
