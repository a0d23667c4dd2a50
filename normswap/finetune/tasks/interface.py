"""What the engine asks of a task: data, the inputs of the model, loss, metrics.

The engine knows neither labels nor boxes. It moves batches to the device, passes them to the task, and logs what the
task measures.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from normswap.finetune.data.loaders import USAGE_SPECS, DataSettings, EpochLoader, Use
from normswap.finetune.model_source import StartingModel
from normswap.finetune.recipe import Recipe
from normswap.model_state import training_flags

if TYPE_CHECKING:
    from accelerate import Accelerator

NO_FIGURES = ("loss", "images", "unit")


@dataclass(frozen=True)
class Evaluation:
    """What a model reached on the evaluation split.

    Attributes:
        loss: the mean loss; None if the task has none in evaluation.
        figures: the metrics by name, the leading one first.
        images: the number of samples.
        unit: the unit of the figures: `"%"`, or `""` for plain numbers.
    """

    loss: float | None
    figures: Mapping[str, float]
    images: int
    unit: str = "%"

    @property
    def accuracy(self) -> float:
        """The accuracy of a classifier in percent; NaN for other tasks."""
        return self.figures.get("accuracy", float("nan"))

    @property
    def leading(self) -> float:
        """The value of the leading metric."""
        return next(iter(self.figures.values()))

    def label(self, name: str) -> str:
        """Return the name of a metric with its unit, such as `accuracy, %`."""
        return f"{name}, {self.unit}" if self.unit else name

    def format(self, name: str) -> str:
        """Return the value of a metric as a text: percent with one decimal, plain numbers with three digits."""
        value = self.figures.get(name, float("nan"))
        return f"{value:.1f}" if self.unit == "%" else f"{value:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """Return the values as plain data, as they stand in the log."""
        found = {"loss": self.loss, **self.figures, "images": self.images, "unit": self.unit}
        return {key: value for key, value in found.items() if value is not None and (key, value) != ("unit", "%")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the evaluation in the data of `to_dict`."""
        figures = {name: float(value) for name, value in values.items() if name not in NO_FIGURES}
        return cls(values.get("loss"), figures, int(values["images"]), values.get("unit", "%"))


class Batches(Protocol):
    """The batches of a data set, epoch by epoch. Iterating yields those of epoch 0."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...

    def epoch(self, number: int, *, first: int = 0) -> Iterator[Any]:
        """Yield the batches of an epoch from batch number `first` on."""


class Meter(Protocol):
    """Measures a model over the batches of an evaluation."""

    def update(self, model: nn.Module, batch: Any) -> None:
        """Add a batch, without gradients and with the model in evaluation mode."""

    def compute(self, accelerator: "Accelerator") -> Evaluation:
        """Return the result over the batches of all processes."""


@dataclass(frozen=True)
class OwnLoopRun:
    """What a function that replaces the training loop gets besides the model.

    Attributes:
        recipe: the recipe.
        training, evaluation: the batches of the two splits.
        options: `own.options` of the recipe.
        device: the device of the model.
        log: writes a record, a mapping with the key `step`, to the log of the run.
        build_optimizer: returns the optimizer of the recipe for a model, with a group and a step limit for its gates.
    """

    recipe: Recipe
    training: Batches
    evaluation: Batches
    options: Mapping[str, Any]
    device: torch.device
    log: Callable[[Mapping[str, Any]], None]
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]


OwnLoop = Callable[[nn.Module, OwnLoopRun], None]


class Task(Protocol):
    """A task of the engine, made from a recipe, its model and the share of a process."""

    @property
    def own_loop(self) -> OwnLoop | None:
        """The function that replaces the training loop, if the task has one."""

    def open_training(self) -> Batches:
        """Return the shuffled, augmented batches of the training split."""

    def open_calibration(self, batch_size: int) -> Batches:
        """Return batches of the training split without augmentation."""

    def open_evaluation(self) -> Batches:
        """Return the batches of the evaluation split, in order."""

    def example_inputs(self, training: Batches) -> Any:
        """Return inputs of the model, for conversion and verification."""

    def adapt_model(self, source: StartingModel, training: Batches, example: Any) -> StartingModel:
        """Return the model with outputs for the classes of the data, if the recipe asks for that."""

    def check_model(self, source: StartingModel, training: Batches, example: Any, *, is_new: bool) -> StartingModel:
        """Return the model with notes on how it fits the data; raise if it does not."""

    def inputs(self, batch: Any) -> Any:
        """Return the inputs of the model in a batch."""

    def compute_loss(self, network: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a batch, a scalar with gradients."""

    def make_meter(self, model: nn.Module, device: torch.device) -> Meter:
        """Return a meter for one evaluation of a model."""


@torch.no_grad()
def call_in_evaluation(model: nn.Module, example: Tensor) -> Any:
    """Return the outputs of a model in evaluation mode for images in its precision; its flags are restored."""
    with training_flags(list(model.modules()), training=False):
        return model(example.to(next((p.dtype for p in model.parameters()), torch.float32)))


@dataclass(frozen=True)
class TaskContext:
    """What a task is made from.

    Attributes:
        recipe: the recipe.
        source: the model before training.
        shard: rank and world size.
        image_size: height and width of the images, if recipe or model know them.
        channels: the number of channels of the images, if the model knows it.
    """

    recipe: Recipe
    source: StartingModel
    shard: tuple[int, int] = (0, 1)
    image_size: tuple[int, int] | None = None
    channels: int | None = None

    def settings(self, use: Use, *, batch_size: int | None = None) -> DataSettings:
        """Return the settings of the split that a use reads; `batch_size` None takes that of the recipe."""
        data = self.recipe.data
        split, own_size = (
            (data.evaluation_split, data.evaluation_batch_size)
            if use == "evaluation"
            else (data.train_split, data.batch_size)
        )
        return DataSettings(
            source=data.source,
            split=split,
            root=data.root,
            download=data.download,
            image_size=self.image_size,
            channels=self.channels,
            batch_size=batch_size or own_size,
            workers=data.workers,
            seed=self.recipe.train.seed,
        )

    def open_split(
        self,
        use: Use,
        open_dataset: Callable[[DataSettings, bool], Any],
        *,
        batch_size: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> EpochLoader:
        """Return the batches of the split that a use reads.

        Args:
            open_dataset: returns a data set of torch for the settings, augmented or not.
            batch_size: as in `settings`.
            collate: as in `EpochLoader`.
        """
        usage, settings = USAGE_SPECS[use], self.settings(use, batch_size=batch_size)
        return EpochLoader(open_dataset(settings, usage.augmented), settings, usage, self.shard, collate=collate)
