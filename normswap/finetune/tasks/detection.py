"""Detection of boxes by torchvision's detectors: their own losses, box AP by torchmetrics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from normswap.errors import DataError, RecipeError
from normswap.finetune.data.detection import open_boxed_images
from normswap.finetune.data.joint_transforms import (
    JointAugmentation,
    TransformedDataset,
    build_transforms,
    find_box_values,
    to_plain,
)
from normswap.finetune.data.loaders import DataSettings, EpochLoader
from normswap.finetune.model_source import StartingModel
from normswap.finetune.tasks.interface import Batches, Evaluation, TaskContext

if TYPE_CHECKING:
    from accelerate import Accelerator

Target = dict[str, Tensor]
Batch = tuple[list[Tensor], list[Target]]


class DetectionTask:
    """The task `"detection"`."""

    own_loop = None

    def __init__(self, context: TaskContext) -> None:
        self._context, self._data = context, context.recipe.data
        self._class_names: tuple[str, ...] = ()

    def open_training(self) -> EpochLoader:
        """Return the shuffled, augmented batches of the training split."""
        return self._context.open_split("training", self._open_training, collate=collate)

    def open_calibration(self, batch_size: int) -> EpochLoader:
        """Return batches of the training split without augmentation."""
        return self._context.open_split("calibration", self._open_training, batch_size=batch_size, collate=collate)

    def open_evaluation(self) -> EpochLoader:
        """Return the batches of the evaluation split, in order, with the boxes of crowds."""
        return self._context.open_split("evaluation", self._open_evaluation, collate=collate)

    def example_inputs(self, training: Batches) -> Batch:
        """Return two images of the training split with their boxes, so that training is verified too."""
        return self.inputs(next(iter(self.open_calibration(2))))

    def adapt_model(self, source: StartingModel, training: Batches, example: Batch) -> StartingModel:
        """Return the model as it is."""
        return source

    def check_model(self, source: StartingModel, training: Batches, example: Batch, *, is_new: bool) -> StartingModel:
        """Return the model as it is; raise DataError if its outputs are not as many as classes and background."""
        outputs, classes = find_num_classes(source.model), len(self._class_names)
        if outputs not in (None, classes + 1):
            raise DataError(
                f"{self._data.source}: has {classes} classes and the background, but the model has {outputs} outputs: "
                f"build it with them, such as model.architecture = 'torchvision:NAME,num_classes={classes + 1}'"
            )
        return source

    def inputs(self, batch: Batch) -> Batch:
        """Return images and targets, the arguments of the detector."""
        return batch

    def compute_loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the sum of the losses of the detector."""
        return sum_losses(network(*batch))

    def make_meter(self, model: nn.Module, device: torch.device) -> "DetectionMeter":
        """Return a meter of box AP."""
        return DetectionMeter(build_average_precision().to(device), torch.zeros(1, device=device))

    def _open_training(self, settings: DataSettings, augmented: bool) -> TransformedDataset:
        dataset, self._class_names = open_boxed_images(settings)
        data = self._data
        changes = JointAugmentation(data.crop_scale, data.flip, data.color_jitter) if augmented else None
        return self._transform(dataset, changes, without_crowds)

    def _open_evaluation(self, settings: DataSettings, augmented: bool) -> TransformedDataset:
        dataset, names = open_boxed_images(settings)
        if names != self._class_names:
            raise DataError(
                f"{settings.source}: expected the classes of the training split, {', '.join(self._class_names)}, got "
                f"{', '.join(names)}"
            )
        return self._transform(dataset, None, to_plain)

    def _transform(
        self, dataset: Any, changes: JointAugmentation | None, finish: Callable[[Any], Target]
    ) -> TransformedDataset:
        size = self._data.image_size
        transforms = build_transforms((size, size) if size else None, changes)
        clean = v2.SanitizeBoundingBoxes(labels_getter=find_box_values)
        return TransformedDataset(dataset, [*transforms, clean], finish)


def collate(samples: list[tuple[Tensor, Target]]) -> Batch:
    """Return the images and the targets of a batch as lists, since images may differ in size."""
    return [image for image, _ in samples], [target for _, target in samples]


def without_crowds(target: Mapping[str, Any]) -> Target:
    """Return the boxes and labels of single objects: a box around a crowd is none to learn."""
    single = target["iscrowd"] == 0
    return {name: to_plain(target[name])[single] for name in ("boxes", "labels")}


# --- the detector -----------------------------------------------------------------------------------------------------

# Where torchvision's detectors have their number of classes, with the background.
_NUM_CLASSES = ("roi_heads.box_predictor.cls_score.out_features", "head.classification_head.num_classes")


def find_num_classes(model: nn.Module) -> int | None:
    """Return the number of classes of a detector, with the background; None if it is none of torchvision's."""
    for place in _NUM_CLASSES:
        try:
            return int(attrgetter(place)(model))
        except AttributeError:
            continue
    return None


def sum_losses(losses: Any) -> Tensor:
    """Return the sum of the losses that a detector returns in training; raises RecipeError if it returns others."""
    if not isinstance(losses, Mapping) or not losses or not all(isinstance(loss, Tensor) for loss in losses.values()):
        raise RecipeError(
            "model: expected a detector as in torchvision, which returns a dict of losses in training, got "
            f'{type(losses).__name__}: train it as a task of your own (task = "own")'
        )
    return torch.stack([loss.float() for loss in losses.values()]).sum()


def build_average_precision() -> Any:
    """Return torchmetrics' box AP; raises RecipeError if the package that computes it is missing."""
    from torchmetrics.detection import MeanAveragePrecision

    try:
        metric: Any = MeanAveragePrecision(box_format="xyxy", iou_type="bbox")
    except ModuleNotFoundError:
        raise RecipeError('task = "detection": box AP needs pycocotools: pip install pycocotools') from None
    metric.warn_on_many_detections = False  # COCO counts the 100 boxes with the highest scores
    return metric


@dataclass
class DetectionMeter:
    """Box AP, and the number of images."""

    metric: Any
    images: Tensor

    def update(self, model: nn.Module, batch: Batch) -> None:
        """Add a batch."""
        images, targets = batch
        found = model(images)
        if not isinstance(found, list) or not all({"boxes", "labels", "scores"} <= {*boxes} for boxes in found):
            raise RecipeError(
                "model: expected a detector as in torchvision, which returns a list of dicts with boxes, labels and "
                f'scores, got {type(found).__name__}: train it as a task of your own (task = "own")'
            )
        self.metric.update([{name: boxes[name] for name in ("boxes", "labels", "scores")} for boxes in found], targets)
        self.images += len(images)

    def compute(self, accelerator: "Accelerator") -> Evaluation:
        """Return AP and AP50 in percent; the metric synchronizes the processes itself."""
        images, found = int(accelerator.reduce(self.images, "sum")), self.metric.compute()
        figures = {"AP": 100 * float(found["map"]), "AP50": 100 * float(found["map_50"])}
        return Evaluation(None, figures, images)
