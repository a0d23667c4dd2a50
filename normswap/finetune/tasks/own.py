"""Tasks that a Python file of the user defines: data, loss, metrics, and possibly model and training loop.

The page on recipes lists the functions of such a file.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normswap.checkpoints.architecture.registry import import_python_file
from normswap.errors import RecipeError
from normswap.finetune.data.loaders import USAGE_SPECS, EpochLoader, Use
from normswap.finetune.model_source import StartingModel
from normswap.finetune.tasks.interface import Batches, Evaluation, OwnLoop, TaskContext

if TYPE_CHECKING:
    from accelerate import Accelerator

_REQUIRED = ("open_data", "compute_loss", "build_metrics", "update_metrics")


@dataclass(frozen=True)
class OwnFile:
    """The functions of a Python file, which get the options of the recipe that they name."""

    path: Path
    module: ModuleType
    options: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path, options: Mapping[str, Any]) -> "OwnFile":
        """Run a file; raises RecipeError if a package or a function is missing, or if no function takes an option."""
        try:
            module = import_python_file(path)
        except ModuleNotFoundError as error:
            raise RecipeError(
                f"own.file: {path} imports {error.name}, which is not installed: pip install 'normswap[recipes]' if "
                "the file comes with normswap, else install that package"
            ) from error
        found = cls(path, module, options)
        missing = [name for name in _REQUIRED if found.find(name) is None]
        if missing:
            raise RecipeError(
                f"own.file: {path}: expected the functions {', '.join(_REQUIRED)}, has no {', '.join(missing)}"
            )
        functions = [found.find(name) for name in (*_REQUIRED, "build_model")]
        if found.find("train_model") is None:  # which gets all options
            unknown = [key for key in options if not any(f is not None and _takes(f, key) for f in functions)]
            if unknown:
                raise RecipeError(f"own.options: no function of {path} takes {', '.join(unknown)}")
        return found

    def find(self, name: str) -> Callable[..., Any] | None:
        """Return a function of the file, or None."""
        function = getattr(self.module, name, None)
        return function if callable(function) else None

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the file with arguments and the options that it names."""
        function = getattr(self.module, name)
        return function(*args, **self.select_options(name))

    def select_options(self, name: str) -> dict[str, Any]:
        """Return the options that a function of the file names."""
        function = getattr(self.module, name)
        return {key: value for key, value in self.options.items() if _takes(function, key)}


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.kind is p.VAR_KEYWORD or (p.name == name and p.kind is not p.POSITIONAL_ONLY) for p in parameters)


class OwnTask:
    """The task `"own"`."""

    def __init__(self, context: TaskContext, file: OwnFile) -> None:
        self._context, self._file = context, file
        self._samples = 0

    @property
    def own_loop(self) -> OwnLoop | None:
        """The function `train_model` of the file."""
        return self._file.find("train_model")

    def open_training(self) -> EpochLoader:
        """Return the shuffled batches of the training split."""
        return self._open("training")

    def open_calibration(self, batch_size: int) -> EpochLoader:
        """Return batches of the training split without random changes by epoch."""
        return self._open("calibration", batch_size)

    def open_evaluation(self) -> EpochLoader:
        """Return the batches of the evaluation split."""
        loader = self._open("evaluation")
        self._samples = loader.num_samples
        return loader

    def example_inputs(self, training: Batches) -> Any:
        """Return the inputs of the first training batch."""
        return self.inputs(next(iter(training)))

    def adapt_model(self, source: StartingModel, training: Batches, example: Any) -> StartingModel:
        """Return the model as it is; raises RecipeError if the recipe asks for a classifier."""
        if self._context.recipe.model.new_head:
            raise RecipeError('model.new_head: replaces classifiers only: with task = "own" the file builds the model')
        return source

    def check_model(self, source: StartingModel, training: Batches, example: Any, *, is_new: bool) -> StartingModel:
        """Return the model as it is: only the file knows what fits the data."""
        return source

    def inputs(self, batch: Any) -> Any:
        """Return what `example_inputs` of the file returns, or else the first tensor of the batch."""
        if self._file.find("example_inputs") is not None:
            return self._file.call("example_inputs", batch)
        found = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)
        if found is None:
            raise RecipeError(
                f"own.file: {self._file.path}: a batch has no tensor: define example_inputs(batch), which returns the "
                "inputs of the model"
            )
        return found

    def compute_loss(self, network: nn.Module, batch: Any) -> Tensor:
        """Return the loss of the file; raises RecipeError if it is not a scalar tensor."""
        loss = self._file.call("compute_loss", network, batch)
        if not isinstance(loss, Tensor) or loss.dim():
            found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise RecipeError(f"own.file: {self._file.path}: compute_loss: expected a scalar tensor, got {found}")
        return loss

    def make_meter(self, model: nn.Module, device: torch.device) -> "OwnMeter":
        """Return a meter of the metrics of the file."""
        metrics = self._file.call("build_metrics")
        if not isinstance(metrics, Mapping) or not metrics:
            raise RecipeError(
                f"own.file: {self._file.path}: build_metrics: expected a dict of metrics by name, got {metrics!r:.80}"
            )
        return OwnMeter(self._file, {name: metric.to(device) for name, metric in metrics.items()}, self._samples)

    def _open(self, use: Use, batch_size: int | None = None) -> EpochLoader:
        settings = self._context.settings(use, batch_size=batch_size)
        dataset = self._file.call("open_data", settings.split)
        settings = replace(settings, source=f"{self._file.path}, split {settings.split}")
        return EpochLoader(dataset, settings, USAGE_SPECS[use], self._context.shard, collate=self._file.find("collate"))


@dataclass
class OwnMeter:
    """The metrics of a file, and the number of samples of this process."""

    file: OwnFile
    metrics: Mapping[str, Any]
    samples: int

    def update(self, model: nn.Module, batch: Any) -> None:
        """Add a batch."""
        self.file.call("update_metrics", self.metrics, model, batch)

    def compute(self, accelerator: "Accelerator") -> Evaluation:
        """Return the values of the metrics, which synchronize the processes themselves."""
        samples = accelerator.reduce(torch.tensor(float(self.samples), device=accelerator.device), "sum")
        figures = {name: float(metric.compute()) for name, metric in self.metrics.items()}
        return Evaluation(None, figures, int(samples), unit="")
