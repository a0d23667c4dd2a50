"""Detection as a task: losses and box AP counted by hand, the layout of COCO, refusals, short runs."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

import normswap
from normswap.errors import DataError, RecipeError
from normswap.finetune.data import shapes
from normswap.finetune.model_source import StartingModel
from normswap.finetune.recipe import Recipe, parse_recipe, read_recipe
from normswap.finetune.tasks import detection
from normswap.finetune.tasks.detection import DetectionTask, sum_losses
from normswap.finetune.tasks.interface import TaskContext
from normswap.finetune.trainer import run_recipe

IMAGES = [torch.zeros(3, 120, 120)] * 2


class Fixed(nn.Module):
    """A detector with fixed outputs."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        return self.outputs


def recipe(**data: Any) -> Recipe:
    keys = {"source": "shapes", "image_size": 32, "batch_size": 2, **data}
    tables = {"model": {"architecture": "timm:resnet18"}, "data": keys, "train": {"steps": 1}}
    return parse_recipe("mine", {"task": "detection", **tables})


def make_task(**data: Any) -> DetectionTask:
    return DetectionTask(TaskContext(recipe(**data), StartingModel(Fixed([]), None, None, ())))


# --- losses and metrics -----------------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_of_the_losses_of_the_detector() -> None:
    losses = {"classification": torch.tensor(0.5), "bbox_regression": torch.tensor(0.25)}
    assert make_task().compute_loss(Fixed(losses), (IMAGES, [{}, {}])).item() == 0.75
    for wrong in ([torch.ones(1)], {}, {"loss": 1.5}):
        with pytest.raises(RecipeError, match="which returns a dict of losses in training, got"):
            sum_losses(wrong)


def boxes(*corners: tuple[float, float, float, float], **more: Any) -> dict[str, Tensor]:
    found = {"boxes": torch.tensor(corners).reshape(-1, 4), "labels": torch.ones(len(corners), dtype=torch.int64)}
    return {**found, **{name: torch.tensor(values) for name, values in more.items()}}


def measure(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> dict[str, float]:
    meter = make_task().make_meter(Fixed(found), torch.device("cpu"))
    meter.update(Fixed(found), (IMAGES, wanted))
    result = meter.compute(Accelerator())
    assert (result.loss, result.images, result.unit) == (None, 2, "%")
    return dict(result.figures)


def test_average_precision_is_that_of_coco() -> None:
    whole, part, other = (0.0, 0.0, 100.0, 100.0), (0.0, 0.0, 100.0, 72.0), (100.0, 100.0, 120.0, 120.0)
    none = {"iscrowd": [0]}
    # IoU 0.72 passes 5 of the 10 thresholds 0.5, 0.55, ..., 0.95.
    found = measure([boxes(part, scores=[0.9]), boxes(whole, scores=[0.8])], [boxes(whole, **none)] * 2)
    # Where only one of the two is found, with precision 1/2 at recall 1/2: 51 of 101 points of the curve.
    assert found == pytest.approx({"AP": (5 * 100 + 5 * 100 * 51 / 101 / 2) / 10, "AP50": 100})
    # One object is found and one is missed; the wrong box has a lower score.
    found = measure([boxes(whole, scores=[0.9]), boxes(other, scores=[0.8])], [boxes(whole, **none)] * 2)
    assert found == pytest.approx({"AP": 100 * 51 / 101, "AP50": 100 * 51 / 101})


def test_boxes_in_a_crowd_are_not_wrong() -> None:
    whole, inside = (0.0, 0.0, 100.0, 100.0), (20.0, 20.0, 60.0, 60.0)
    found = [boxes(whole, scores=[0.5]), boxes(inside, scores=[0.9])]
    assert measure(found, [boxes(whole, iscrowd=[0]), boxes(whole, iscrowd=[1])])["AP"] == pytest.approx(100)
    assert measure(found, [boxes(whole, iscrowd=[0]), boxes(iscrowd=[])])["AP"] == pytest.approx(50)


def test_a_model_that_returns_no_boxes_is_refused() -> None:
    for wrong in ({"boxes": 1}, [{"boxes": torch.ones(1, 4)}]):
        with pytest.raises(RecipeError, match="returns a list of dicts with boxes, labels and scores, got"):
            make_task().make_meter(Fixed(wrong), torch.device("cpu")).update(Fixed(wrong), (IMAGES, []))


def test_box_ap_names_the_package_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_options: Any) -> None:
        raise ModuleNotFoundError("pycocotools")

    monkeypatch.setattr("torchmetrics.detection.MeanAveragePrecision", fail)
    with pytest.raises(RecipeError, match="box AP needs pycocotools: pip install pycocotools"):
        detection.build_average_precision()


# --- data -------------------------------------------------------------------------------------------------------------


def write_coco(folder: Path, split: str, *, categories: dict[int, str]) -> None:
    """Three images: two boxes, a crowd and a box without area; a crowd; none. In category numbers that have gaps."""
    first, second = sorted(categories)[:2]
    rows = [(0, [2, 4, 10, 8], second, 0), (0, [0, 0, 30, 20], first, 1), (0, [5, 5, 0, 3], first, 0)]
    rows += [(0, [20, 10, 8, 6], first, 0), (1, [0, 0, 40, 30], second, 1)]
    data = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 30} for n in range(3)],
        "annotations": [
            {"id": n, "image_id": image, "bbox": box, "category_id": kind, "iscrowd": crowd, "area": box[2] * box[3]}
            for n, (image, box, kind, crowd) in enumerate(rows, 1)
        ],
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    }
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
    for n in range(3):
        Image.new("RGB", (40, 30), (n, 0, 0)).save(folder / split / f"{n}.png")


def batch(loader: Any) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    return next(iter(loader))


def test_coco_has_labels_without_gaps_and_crowds_only_in_evaluation(tmp_path: Path, capsys: Any) -> None:
    write_coco(tmp_path, "train", categories={7: "cat", 3: "dog"})
    write_coco(tmp_path, "val", categories={3: "dog", 7: "cat"})
    task = make_task(source=f"coco:{tmp_path}", image_size=None, batch_size=3, evaluation_batch_size=3)
    task.open_training()
    images, targets = batch(task.open_calibration(3))
    order = [round(float(image[0, 0, 0]) * 255) for image in images]  # which the files have as their red
    found = dict(zip(order, targets, strict=True))
    assert [image.shape for image in images] == [(3, 30, 40)] * 3
    assert {*found[0]} == {"boxes", "labels"}
    assert found[0]["boxes"].tolist() == [[2, 4, 12, 12], [20, 10, 28, 16]]
    assert found[0]["labels"].tolist() == [2, 1]
    assert [found[n]["boxes"].shape for n in (1, 2)] == [(0, 4)] * 2
    _, evaluated = batch(task.open_evaluation())
    assert [target["iscrowd"].tolist() for target in evaluated] == [[0, 1, 0], [1], []]
    assert capsys.readouterr().out == ""


def test_boxes_are_resized_and_flipped_with_their_image(tmp_path: Path) -> None:
    write_coco(tmp_path, "train", categories={1: "dog", 2: "cat"})
    task = make_task(source=f"coco:{tmp_path}", image_size=60, batch_size=3, flip=1.0)
    images, targets = batch(task.open_training())
    found = next(target for target in targets if len(target["boxes"]))
    assert images[0].shape == (3, 60, 60)
    assert found["boxes"].tolist() == [[42, 8, 57, 24], [18, 20, 30, 32]]
    cropped = make_task(source=f"coco:{tmp_path}", image_size=60, batch_size=1, crop_scale=[0.2, 0.9])
    counts = [len(targets[0]["labels"]) for n in range(10) for _, targets in cropped.open_training().epoch(n)]
    assert (min(counts), max(counts)) == (0, 2)  # a crop removes boxes with their labels


def test_a_detector_trains_on_an_image_without_boxes() -> None:
    from torchvision.models.detection import retinanet_resnet50_fpn

    torch.manual_seed(0)
    model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5, min_size=32, max_size=32)
    empty = detection.without_crowds({**boxes(iscrowd=[]), "iscrowd": torch.zeros(0)})
    loss = make_task().compute_loss(model.train(), ([torch.rand(3, 32, 32)] * 2, [empty] * 2))
    assert math.isfinite(loss.item())
    training = (task := make_task()).open_training()
    assert task.check_model(StartingModel(model, None, None, ()), training, None, is_new=True).model is model
    model.head.classification_head.num_classes = 91
    text = "shapes: has 4 classes and the background, but the model has 91 outputs: build it with them"
    with pytest.raises(DataError, match=text):
        task.check_model(StartingModel(model, None, None, ()), training, None, is_new=True)


def test_data_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = f"coco:{tmp_path}"
    with pytest.raises(DataError, match=r"instances_train\.json: no such file: expected the annotations of COCO"):
        make_task(source=source).open_training()
    write_coco(tmp_path, "train", categories={1: "dog", 2: "cat"})
    write_coco(tmp_path, "val", categories={1: "dog", 2: "cow"})
    task = make_task(source=source)
    task.open_training()
    with pytest.raises(DataError, match="expected the classes of the training split, dog, cat, got dog, cow"):
        task.open_evaluation()
    annotations = tmp_path / "annotations" / "instances_train.json"
    for text, expected in (("[1]", "cannot be read"), ('{"images": []}', "expected categories and boxes, got none")):
        annotations.write_text(text)
        with pytest.raises(DataError, match=re.escape(f"{annotations}: {expected}")):
            make_task(source=source).open_training()
    (tmp_path / "annotations" / "instances_test.json").write_text("{}")
    with pytest.raises(DataError, match=r"test: no such folder: expected the images of instances_test\.json"):
        make_task(source=source, train_split="test").open_training()
    (tmp_path / "val" / "0.png").unlink()
    lost = make_task(source=source, train_split="val")
    with pytest.raises(DataError, match="val: an image cannot be read"):
        list(lost.open_training())
    with pytest.raises(DataError, match="'digits': expected data with boxes: coco:PATH, shapes, shapes:shifted"):
        make_task(source="digits").open_training()


def test_generated_boxes_have_the_default_size() -> None:
    images, targets = batch(make_task(image_size=None).open_training())
    assert [image.shape for image in images] == [(3, 128, 128)] * 2
    assert all(1 <= label <= 4 for target in targets for label in target["labels"].tolist())


def test_keys_of_other_tasks_are_refused() -> None:
    values = {"mixup": 0.1, "random_erase": 0.1, "label_smoothing": 0.1, "classes": 3, "ignore_index": 0}
    for key, value in values.items():
        with pytest.raises(RecipeError, match=rf'data\.{key}: not used with task = "detection": remove 1 key'):
            recipe(**{key: value})


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("network", ["faster_rcnn", "retinanet"])
def test_a_short_form_of_the_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str) -> None:
    for split in shapes.COUNTS:
        monkeypatch.setitem(shapes.COUNTS, split, 8)
    keys = [
        f"model.architecture=detection.py:build_model,network={network},classes=5,size=64,width=16,imagenet=False",
        f"run.output={tmp_path / 'run'}",
        "data.image_size=64",
        "train.steps=2",
        "train.warmup_share=0",
        f"convert.verify={str(network == 'faster_rcnn').lower()}",
    ]
    outcome = run_recipe(read_recipe("detection", keys))
    assert (outcome.after.images, [*outcome.after.figures]) == (8, ["AP", "AP50"])
    assert all(0 <= value <= 100 for value in outcome.after.figures.values())
    assert any("running statistics were computed on 8 training images" in note for note in outcome.notes)
    loaded = normswap.load(outcome.model, trust=True).model
    assert len(normswap.importance_weights(loaded)) > 40
