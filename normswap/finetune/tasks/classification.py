"""Classification of images, with timm's data sets, transforms, mixup and cutmix."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.checkpoints.architecture.registry import parse_architecture, with_keyword
from normswap.errors import ArchitectureError, DataError, RecipeError
from normswap.finetune.data.datasets import Data, open_data
from normswap.finetune.data.loaders import DataSettings, Use
from normswap.finetune.model_source import StartingModel
from normswap.finetune.recipe import Recipe
from normswap.finetune.tables import DataTable
from normswap.finetune.tasks.interface import Batches, Evaluation, TaskContext, call_in_evaluation

if TYPE_CHECKING:
    from accelerate import Accelerator


class ClassificationTask:
    """The task `"classification"`."""

    own_loop = None

    def __init__(self, context: TaskContext) -> None:
        if context.image_size is None:
            raise RecipeError("data.image_size: the model does not record its image size: set it, such as 224")
        self._context, self._recipe = context, context.recipe
        self._training: Data | None = None
        self._outputs = 0
        self._mix: Mix | None = None

    def open_training(self) -> Data:
        """Return the batches of the training split; raises DataError if their number of classes is unknown."""
        self._training = self._open("training")
        if self._training.classes is None:
            raise DataError(f"{self._recipe.data.source}: number of classes unknown: use a folder per class")
        return self._training

    def open_calibration(self, batch_size: int) -> Data:
        """Return batches of the training split without augmentation."""
        return self._open("calibration", batch_size)

    def open_evaluation(self) -> Data:
        """Return the batches of the evaluation split, whose labels are checked against the outputs of the model."""
        names = None if self._training is None else self._training.class_names
        return self._open("evaluation", class_names=names, classes=self._outputs)

    def example_inputs(self, training: Batches) -> Tensor:
        """Return two random images."""
        settings = self._training.settings if self._training else DataSettings("")
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, settings.channels or 3, *(settings.image_size or ()), generator=generator)

    def adapt_model(self, source: StartingModel, training: Batches, example: Tensor) -> StartingModel:
        """Return the model with a classifier for the classes of the data, if `model.new_head` asks for it."""
        return with_head(source, self._recipe, self._classes, example)

    def check_model(self, source: StartingModel, training: Batches, example: Tensor, *, is_new: bool) -> StartingModel:
        """Return the model, with a note on outputs that no class uses; raise DataError if it has too few."""
        outputs, classes = count_outputs(source.model, example), self._classes
        self._outputs = outputs
        self._mix = batch_mixer(self._recipe.data, classes=outputs)
        if outputs < classes:
            raise DataError(
                f"{self._recipe.data.source}: has {classes} classes, but the model has {outputs}: set model.new_head = "
                f"true, or build it with num_classes={classes}"
            )
        if outputs == classes or not is_new:
            return source
        unused = (
            f"the model has {outputs} outputs for {classes} classes: set model.new_head = true for "
            f"a new classifier of {classes}"
        )
        return replace(source, notes=(*source.notes, unused))

    def inputs(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the images."""
        return batch[0]

    def compute_loss(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy of a batch, whose images are mixed if the recipe says so."""
        images, targets = batch if self._mix is None else self._mix(*batch)
        return F.cross_entropy(network(images), targets, label_smoothing=self._recipe.data.label_smoothing)

    def make_meter(self, model: nn.Module, device: torch.device) -> "ClassificationMeter":
        """Return a meter of loss and accuracy."""
        return ClassificationMeter(torch.zeros(3, dtype=torch.float64, device=device))

    @property
    def _classes(self) -> int:
        return (self._training.classes if self._training else None) or 0

    def _open(
        self,
        use: Use,
        batch_size: int | None = None,
        *,
        class_names: tuple[str, ...] | None = None,
        classes: int | None = None,
    ) -> Data:
        settings = replace(
            self._context.settings(use, batch_size=batch_size),
            augmentation=augmentation(self._recipe.data),
            class_names=class_names,
        )
        return open_data(
            settings, use=use, model=self._context.source.model, classes=classes, shard=self._context.shard
        )


@dataclass
class ClassificationMeter:
    """The sums of loss, correct predictions and images."""

    total: Tensor

    def update(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        """Add a batch."""
        images, labels = batch
        logits = model(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum").double()
        right = (logits.argmax(1) == labels).sum().double()
        self.total += torch.stack([loss, right, torch.tensor(float(len(labels))).to(loss)])

    def compute(self, accelerator: "Accelerator") -> Evaluation:
        """Return mean cross-entropy and accuracy in percent on all images of all processes."""
        loss, right, images = accelerator.reduce(self.total, "sum").tolist()
        return Evaluation(loss / images, {"accuracy": 100 * right / images}, int(images))


def augmentation(data: DataTable) -> Mapping[str, Any]:
    """Return the options of `timm.data.create_transform` for the keys of the recipe."""
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    return {
        **(whole if data.crop_scale is None else {"scale": data.crop_scale}),
        "hflip": data.flip,
        "color_jitter": data.color_jitter or None,
        "auto_augment": data.auto_augment,
        "re_prob": data.random_erase,
    }


Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def batch_mixer(data: DataTable, *, classes: int) -> Mix:
    """Return the function from images and labels to mixed images and targets.

    Targets are labels (N,), or class probabilities (N, classes) if the recipe sets mixup or cutmix.
    """
    if not (data.mixup or data.cutmix):
        return lambda images, labels: (images, labels)
    import timm.data

    # The loss smooths labels, whether images are mixed or not.
    package: Any = timm.data  # only some of its versions are typed
    return package.Mixup(data.mixup, data.cutmix, label_smoothing=0.0, num_classes=classes)  # type: ignore[no-any-return]


# --- the classifier ---------------------------------------------------------------------------------------------------


def with_head(source: StartingModel, recipe: Recipe, classes: int, example: Tensor) -> StartingModel:
    """Return the model with a classifier of `classes` classes if `model.new_head` asks for it, and a note on it.

    Args:
        example: an input (2, C, H, W).

    Raises:
        RecipeError: `model.architecture` names another number of classes; the model is not a classifier.
        ArchitectureError: the model has no `reset_classifier`.
    """
    new_head = recipe.model.new_head
    if not new_head:
        return source
    _check_num_classes(recipe, classes)
    old = _count_classes(source.model, example)
    if old == classes and new_head != "always":
        note = f'model.new_head: the classifier of {old} classes fits the data and is kept; "always" replaces it'
        return replace(source, notes=(*source.notes, note))
    reset = getattr(source.model, "reset_classifier", None)
    if not callable(reset):
        raise ArchitectureError(
            f"model.new_head: expected a timm model, but {type(source.model).__name__} has no reset_classifier(): "
            f"build the model with {classes} classes, and remove model.new_head"
        )
    torch.manual_seed(recipe.train.seed)
    kept = {*source.model.parameters()}
    dtype = next((parameter.dtype for parameter in kept if parameter.is_floating_point()), torch.float32)
    reset(classes)
    for parameter in {*source.model.parameters()} - kept:
        parameter.data = parameter.data.to(dtype)
    recorded = source.architecture
    return replace(
        source,
        architecture=recorded and with_keyword(recorded, "num_classes", classes),
        notes=(
            *source.notes,
            f"model.new_head: classifier of {old} classes replaced by one of {classes}, initialized at random",
        ),
    )


def _check_num_classes(recipe: Recipe, classes: int) -> None:
    """Refuse a number of classes in the architecture that contradicts the data; a checkpoint may have its own."""
    model = recipe.model
    if model.checkpoint is not None or model.architecture is None:
        return
    named = parse_architecture(model.architecture).keywords.get("num_classes", classes)
    if named != classes:
        raise RecipeError(
            f"model.architecture: num_classes={named} contradicts the {classes} classes of {recipe.data.source}: "
            f"remove num_classes, or set model.new_head=false to keep {named} outputs"
        )


def _count_classes(model: nn.Module, example: Tensor) -> int:
    """The number of classes of a classifier; 0 for a timm model without one."""
    return 0 if getattr(model, "num_classes", None) == 0 else count_outputs(model, example)


def count_outputs(model: nn.Module, example: Tensor) -> int:
    """Return the number of logits of a classifier.

    Args:
        example: an input (2, C, H, W).

    Raises:
        RecipeError: the model does not return logits (N, classes).
    """
    logits = call_in_evaluation(model, example)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise RecipeError(
            f"model: expected a classifier that returns logits (N, classes), got {found}: train it in your own loop"
        )
    return logits.shape[1]
