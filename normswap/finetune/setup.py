"""Everything that a run needs before its first step: model, task, data, conversion, number of steps.

`prepare` returns them. A model without gates is converted and verified.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from normswap.checkpoints.architecture.registry import default_input_shape, with_keyword
from normswap.checkpoints.file_output import describe_difference
from normswap.checkpoints.record import Step
from normswap.errors import NothingToDo, PlanError, RecipeError
from normswap.finetune.model_source import StartingModel, find_python_file, load_from_recipe, load_from_state
from normswap.finetune.optimization import describe_rare_events, run_length
from normswap.finetune.recipe import Recipe
from normswap.finetune.tables import ConvertTable
from normswap.finetune.tasks.classification import ClassificationTask
from normswap.finetune.tasks.detection import DetectionTask
from normswap.finetune.tasks.interface import Batches, Task, TaskContext
from normswap.finetune.tasks.own import OwnFile, OwnTask
from normswap.finetune.tasks.segmentation import SegmentationTask
from normswap.layers.in_place import STATISTICS
from normswap.running_stats.calibration import calibrate
from normswap.surgery.conversion import convert
from normswap.surgery.importance import gated_modules
from normswap.surgery.module_tree import never_updated
from normswap.surgery.plan import SwapPlan, list_names
from normswap.surgery.selection import SwapOptions
from normswap.text import pluralize
from normswap.verification.distance import measure_distance
from normswap.verification.equivalence import verify

# --- model and data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunSetup:
    """A model ready for training, its task and data, and the number of steps."""

    source: StartingModel
    task: Task
    training: Batches
    evaluation: Batches
    steps: int

    @property
    def model(self) -> nn.Module:
        """The model to train."""
        return self.source.model

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on the model and the length of the run."""
        return self.source.notes


def prepare(
    recipe: Recipe, *, state: Path | None = None, trust: bool = False, shard: tuple[int, int] = (0, 1)
) -> RunSetup:
    """Return model, task and data of a recipe.

    Args:
        state: the saved state of an interrupted run, which replaces `[model]` and `[convert]`.
        trust: allow files to run Python code that they name.
        shard: rank and world size.

    Raises:
        NormswapError: any error of `load`, `convert` and `open_data`; the conversion fails verification; the data do
            not fit the model; the run is too short for the recipe.
    """
    swap_options(recipe.convert)  # refuses wrong values before files are read
    build_task, recipe = _find_task(recipe, trust=trust)
    source = load_from_state(recipe, state, trust=trust) if state else load_from_recipe(recipe, trust=trust)
    task = build_task(_make_context(recipe, source, shard))
    training = task.open_training()
    steps, example = run_length(recipe.train, len(training)), task.example_inputs(training)
    if state is None:
        source, is_new = task.adapt_model(source, training, example), not gated_modules(source.model)
        source = _convert_model(recipe, source, example)
        source = _prepare_untrained(recipe, source, task, shard, is_new=is_new)
        rare = describe_rare_events(recipe.run, steps)
        source = replace(source, notes=(*source.notes, rare)) if rare else source
    source = task.check_model(source, training, example, is_new=state is None)
    return RunSetup(source, task, training, task.open_evaluation(), steps)


def _find_task(recipe: Recipe, *, trust: bool) -> tuple[Callable[[TaskContext], Task], Recipe]:
    """What makes the task of a recipe, and the recipe, which names the model that the file of an own task builds."""
    if recipe.task != "own":
        return _TASKS[recipe.task], recipe
    path = find_python_file(recipe, "own.file", recipe.own.file or "", trust=trust)
    file = OwnFile.load(path, recipe.own.options)
    if recipe.model.architecture is None and file.find("build_model") is not None:
        architecture = f"{path}:build_model"
        for key, value in file.select_options("build_model").items():
            architecture = with_keyword(architecture, key, value)
        recipe = replace(recipe, model=replace(recipe.model, architecture=architecture))
    elif recipe.model.architecture is None and recipe.model.checkpoint is None:
        raise RecipeError(f"own.file: {path}: expected the function build_model, or model.checkpoint in the recipe")
    return partial(OwnTask, file=file), recipe


_TASKS: Mapping[str, Callable[[TaskContext], Task]] = {
    "classification": ClassificationTask,
    "segmentation": SegmentationTask,
    "detection": DetectionTask,
}


def _make_context(recipe: Recipe, source: StartingModel, shard: tuple[int, int]) -> TaskContext:
    data, shape = recipe.data, default_input_shape(source.model, source.architecture)
    size = (data.image_size, data.image_size) if data.image_size else shape[2:] if shape else None
    return TaskContext(recipe, source, shard, size, shape[1] if shape else None)  # type: ignore[arg-type]


def swap_options(table: ConvertTable) -> SwapOptions:
    """Return the options for the keys of [convert].

    Raises:
        RecipeError: a value is unknown.
    """
    values = {f.name: getattr(table, f.name) for f in fields(table) if f.name not in ("enabled", "verify")}
    if table.untrained == "calibrate":
        values["untrained"] = "keep"
    try:
        return SwapOptions(**{name: value for name, value in values.items() if value is not None})
    except PlanError as error:
        raise RecipeError(f"convert.{error}") from None


def _convert_model(recipe: Recipe, source: StartingModel, example: Any) -> StartingModel:
    """The model, converted and verified unless it has gates already or the recipe disables conversion."""
    wanted, converted = recipe.convert, gated_modules(source.model)
    if converted:
        note = f"{recipe.model.checkpoint} is converted already ({len(converted)} sites): [convert] is not applied"
        return replace(source, notes=(*source.notes, note))
    if not wanted.enabled:
        return source
    model, plan, _ = convert(source.model, example, options=swap_options(wanted))
    if not plan.swaps:
        raise NothingToDo("the model has no norm to convert: set convert.enabled = false to train it unchanged")
    notes: tuple[str, ...] = ()
    if any(swap.start for swap in plan.swaps):
        notes = (_describe_distance(source.model, model, example),)
    elif wanted.verify:
        _verify_conversion(source.model, model, plan, example)
    history = (*source.history, Step.now("converted", detail=None if wanted.verify else "not verified"))
    return replace(source, model=model, plan=plan, history=history, notes=(*source.notes, *notes))


def _verify_conversion(original: nn.Module, model: nn.Module, plan: SwapPlan, example: Any) -> None:
    verification = verify(original, model, [example])
    if not verification.passed:
        difference = describe_difference(
            plan, verification, simplex='convert.gate = "simplex"', exclude="convert.exclude"
        )
        raise NothingToDo(f"nothing trained: {difference}, or set convert.verify = false to train it anyway")


def _describe_distance(original: nn.Module, model: nn.Module, example: Any) -> str:
    distance = measure_distance(original, model, [example])
    return (
        "sites that start without bn compute another function than the original; relative error of the outputs on "
        f"random inputs: {distance.relative_error:.2g}"
    )


# --- sites that were never trained ------------------------------------------------------------------------------------

_CALIBRATION_BATCH, _CALIBRATION_BATCHES = 32, 8


def _prepare_untrained(
    recipe: Recipe, source: StartingModel, task: Task, shard: tuple[int, int], *, is_new: bool
) -> StartingModel:
    """The converted model, with running statistics at the sites that were never trained, and a note on these sites.

    Args:
        is_new: the model was converted just now; otherwise sites may have been trained since their conversion.
    """
    plan, layers, choice = source.plan, gated_modules(source.model), recipe.convert.untrained
    untrained = [] if plan is None else [name for name in plan.untrained if is_new or _is_untrained(layers[name])]
    constant = [name for name in untrained if "bn" in layers[name].branches and layers[name].bn_statistics == "running"]
    if constant and choice == "calibrate":
        images = _calibrate_sites(source.model, constant, task, shard)
        what = f"their running statistics were computed on {images} training images"
    elif untrained and choice == "uniform" and is_new:
        what = "they start at equal weights of in and ln, without bn"
    elif constant:
        what = "they are kept as they are"
    else:
        return source
    if plan is not None and len(constant) == len(plan.swaps):
        what += '; for training from scratch set convert.bn_statistics = "batch"'
    sites = f"{pluralize(len(untrained), 'site')} never trained ({list_names(untrained)})"
    return replace(source, notes=(*source.notes, f"convert.untrained: {sites}; {what}"))


def _is_untrained(layer: nn.Module) -> bool:
    return never_updated(*(layer._buffers.get(name) for name in STATISTICS))


def _calibrate_sites(model: nn.Module, names: list[str], task: Task, shard: tuple[int, int]) -> int:
    """Calibrate sites on some training images without augmentation; return the number of images."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def cast(leaf: Any) -> Any:
        """Cast a leaf of the inputs to the precision of the model."""
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    data = task.open_calibration(_CALIBRATION_BATCH)
    batches = [tree_map(cast, task.inputs(batch)) for batch in islice(data, _CALIBRATION_BATCHES)]
    calibrate(model, batches, only=lambda _, fqn: fqn in names, match=True)
    return sum(map(_count_samples, batches)) * shard[1]


def _count_samples(inputs: Any) -> int:
    """The number of samples in the inputs of a model: the length of their first tensor or list."""
    while isinstance(inputs, tuple | dict):
        inputs = next(iter(inputs.values() if isinstance(inputs, dict) else inputs))
    return len(inputs)
