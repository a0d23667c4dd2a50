"""Segmentation: a class per pixel, by networks of torchvision, transformers and segmentation-models-pytorch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from normswap.errors import DataError, RecipeError
from normswap.finetune.data.datasets import complete_settings
from normswap.finetune.data.joint_transforms import JointAugmentation, TransformedDataset, build_transforms
from normswap.finetune.data.loaders import DataSettings, EpochLoader
from normswap.finetune.data.segmentation import open_masked_images
from normswap.finetune.model_source import StartingModel
from normswap.finetune.tasks.interface import Batches, Evaluation, TaskContext, call_in_evaluation

if TYPE_CHECKING:
    from accelerate import Accelerator

_AUXILIARY_WEIGHT = 0.4  # of the auxiliary outputs of torchvision's networks in the loss, as in its own training


class SegmentationTask:
    """The task `"segmentation"`."""

    own_loop = None

    def __init__(self, context: TaskContext) -> None:
        if context.image_size is None:
            raise RecipeError("data.image_size: the model does not record its image size: set it, such as 128")
        self._context, self._data = context, context.recipe.data
        self._classes = 0

    def open_training(self) -> EpochLoader:
        """Return the shuffled, augmented batches of the training split."""
        return self._context.open_split("training", self._open)

    def open_calibration(self, batch_size: int) -> EpochLoader:
        """Return batches of the training split without augmentation."""
        return self._context.open_split("calibration", self._open, batch_size=batch_size)

    def open_evaluation(self) -> EpochLoader:
        """Return the batches of the evaluation split, in order."""
        return self._context.open_split("evaluation", self._open)

    def example_inputs(self, training: Batches) -> Tensor:
        """Return two images of the training split."""
        return self.inputs(next(iter(self.open_calibration(2))))

    def adapt_model(self, source: StartingModel, training: Batches, example: Tensor) -> StartingModel:
        """Return the model as it is."""
        return source

    def check_model(self, source: StartingModel, training: Batches, example: Tensor, *, is_new: bool) -> StartingModel:
        """Return the model as it is; raise DataError if its outputs are not as many as the classes of the data."""
        outputs = count_channels(source.model, example)
        if outputs != self._classes:
            raise DataError(
                f"{self._data.source}: has {self._classes} classes, but the model has {outputs} outputs: build it with "
                f"{self._classes}, such as model.architecture = 'torchvision:NAME,num_classes={self._classes}'"
            )
        return source

    def inputs(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the images."""
        return batch[0]

    def compute_loss(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy over the pixels of a batch that count."""
        images, masks = batch
        outputs = read_logits(network(images))
        loss = self._cross_entropy(outputs.logits, masks)
        if outputs.auxiliary is not None:
            loss = loss + _AUXILIARY_WEIGHT * self._cross_entropy(outputs.auxiliary, masks)
        return loss

    def make_meter(self, model: nn.Module, device: torch.device) -> "SegmentationMeter":
        """Return a meter of loss, mIoU and Dice."""
        from torchmetrics.classification import MulticlassF1Score, MulticlassJaccardIndex

        options: dict[str, Any] = {"average": "macro", "ignore_index": self._data.ignore_index}
        metrics = {
            "mIoU": MulticlassJaccardIndex(self._classes, **options).to(device),
            "Dice": MulticlassF1Score(self._classes, **options).to(device),
        }
        total = torch.zeros(3, dtype=torch.float64, device=device)
        return SegmentationMeter(metrics, total, self._data.ignore_index)

    def _cross_entropy(self, logits: Tensor, masks: Tensor) -> Tensor:
        """The mean over the pixels that count; 0 if none does."""
        logits, ignored = resize_to(logits, masks), self._data.ignore_index
        smoothing = self._data.label_smoothing
        total = F.cross_entropy(logits, masks, ignore_index=ignored, label_smoothing=smoothing, reduction="sum")
        return total / (masks != ignored).sum().clamp(min=1)

    def _open(self, settings: DataSettings, augmented: bool) -> TransformedDataset:
        data, settings = self._data, complete_settings(settings, self._context.source.model)
        found = open_masked_images(settings, classes=data.classes, ignore_index=data.ignore_index)
        self._classes = found.classes
        changes = JointAugmentation(data.crop_scale, data.flip, data.color_jitter) if augmented else None
        transforms = build_transforms(settings.image_size, changes, channels=settings.channels or 3)
        normalize = v2.Normalize(mean=list(settings.mean or ()), std=list(settings.std or ()))
        return TransformedDataset(found.dataset, [*transforms, normalize])


class SegmentationOutputs(NamedTuple):
    """Logits (N, K, h, w), and those of an auxiliary classifier if the network has one and trains."""

    logits: Tensor
    auxiliary: Tensor | None = None


def read_logits(outputs: Any) -> SegmentationOutputs:
    """Return the logits in what a network returns: a tensor, a dict with `out` and `aux`, or an object with `logits`.

    Raises:
        RecipeError: it returns something else.
    """
    found = outputs
    if not isinstance(outputs, Tensor):
        found = outputs.get("out") if isinstance(outputs, Mapping) and "out" in outputs else None
        found = getattr(outputs, "logits", None) if found is None else found
    if not isinstance(found, Tensor) or found.dim() != 4:
        shown = tuple(found.shape) if isinstance(found, Tensor) else type(outputs).__name__
        raise RecipeError(
            'model: expected a network that returns logits (N, classes, H, W), a dict with "out", or an object with '
            f'logits, got {shown}: train it as a task of your own (task = "own")'
        )
    return SegmentationOutputs(found, outputs.get("aux") if isinstance(outputs, Mapping) else None)


def resize_to(logits: Tensor, masks: Tensor) -> Tensor:
    """Return logits in the size of masks (N, H, W), in float32."""
    logits = logits.float()
    if logits.shape[-2:] == masks.shape[-2:]:
        return logits
    return F.interpolate(logits, size=masks.shape[-2:], mode="bilinear", align_corners=False)


def count_channels(model: nn.Module, example: Tensor) -> int:
    """Return the number of logits per pixel; raises RecipeError if the model returns none."""
    return read_logits(call_in_evaluation(model, example)).logits.shape[1]


@dataclass
class SegmentationMeter:
    """The metrics over all pixels that count, and the sums of loss, pixels and images."""

    metrics: Mapping[str, Any]
    total: Tensor
    ignore_index: int

    def update(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        """Add a batch."""
        images, masks = batch
        logits = resize_to(read_logits(model(images)).logits, masks)
        loss = F.cross_entropy(logits, masks, ignore_index=self.ignore_index, reduction="sum").double()
        pixels, count = (masks != self.ignore_index).sum().double(), torch.tensor(float(len(images)))
        self.total += torch.stack([loss, pixels, count.to(loss)])
        for metric in self.metrics.values():
            metric.update(logits.argmax(1), masks)

    def compute(self, accelerator: "Accelerator") -> Evaluation:
        """Return mean cross-entropy, mIoU and Dice in percent; the metrics synchronize the processes themselves."""
        loss, pixels, images = accelerator.reduce(self.total, "sum").tolist()
        figures = {name: 100 * float(metric.compute()) for name, metric in self.metrics.items()}
        return Evaluation(loss / max(pixels, 1), figures, int(images))
