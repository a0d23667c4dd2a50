"""Everything that a run needs before its first step: data, model, classifier, conversion, optimizer, number of steps.

`prepare` returns model and data. A model without gates is converted and verified; a classifier is replaced if the
recipe asks for that. Optimizers, moving average, mixup and cutmix are timm's.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.checkpoints.architecture.registry import default_input_shape, parse_architecture, with_keyword
from normswap.checkpoints.file_output import describe_difference
from normswap.checkpoints.record import Step
from normswap.errors import ArchitectureError, DataError, NothingToDo, PlanError, RecipeError
from normswap.finetune.data.datasets import Data, open_data
from normswap.finetune.data.loaders import DataSettings
from normswap.finetune.model_source import StartingModel, load_from_recipe, load_from_state
from normswap.finetune.recipe import ConvertTable, DataTable, Recipe, RunTable, TrainTable, check_warmup
from normswap.layers.in_place import STATISTICS
from normswap.model_state import training_flags
from normswap.running_stats.calibration import calibrate
from normswap.surgery.conversion import convert
from normswap.surgery.importance import gated_modules
from normswap.surgery.module_tree import never_updated
from normswap.surgery.plan import SwapPlan, list_names
from normswap.surgery.selection import SwapOptions
from normswap.text import pluralize
from normswap.training.param_groups import param_groups
from normswap.verification.distance import measure_distance
from normswap.verification.equivalence import verify

# --- from the keys of a recipe to objects of timm ---------------------------------------------------------------------

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


def build_optimizer(model: nn.Module, train: TrainTable) -> torch.optim.Optimizer:
    """Return the optimizer that a recipe names, with the gates in a parameter group of their own.

    Raises:
        RecipeError: timm has no optimizer of that name, or it does not take these options.
    """
    import timm.optim

    package: Any = timm.optim  # only some of its versions are typed
    groups = param_groups(model, lr=train.lr, weight_decay=train.weight_decay, importance_lr=train.importance_lr)
    try:
        optimizer: torch.optim.Optimizer = package.create_optimizer_v2(
            groups, opt=train.optimizer, lr=train.lr, weight_decay=0.0, momentum=train.momentum
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise RecipeError(
            f"train.optimizer = {train.optimizer!r}: {error}: see timm.optim.list_optimizers()"
        ) from error
    return optimizer


def make_lr_lambda(train: TrainTable, steps: int) -> Callable[[int], float]:
    """Return the function from the number of a step to the factor on all learning rates."""
    min_factor = train.min_lr / train.lr if train.lr else 0.0
    warmup = check_warmup(train, steps)

    def lr_lambda(step: int) -> float:
        """The factor of a step."""
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / (steps - warmup))
        decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        return min_factor + (1 - min_factor) * decay[train.schedule]

    return lr_lambda


def build_average(model: nn.Module, decay: float) -> Any:
    """Return timm's moving average of a model, or None if the decay is 0.

    The decay rises to `decay` over the steps: a constant 0.9998 would keep 98 % of the first weights for 100 steps.
    """
    if not decay:
        return None
    import timm.utils

    package: Any = timm.utils
    return package.ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=0.75)


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


@torch.no_grad()
def count_outputs(model: nn.Module, example: Tensor) -> int:
    """Return the number of logits of a classifier.

    Args:
        example: an input (2, C, H, W).

    Raises:
        RecipeError: the model does not return logits (N, classes).
    """
    with training_flags(list(model.modules()), training=False):
        logits = model(example.to(next((p.dtype for p in model.parameters()), torch.float32)))
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise RecipeError(
            f"model: expected a classifier that returns logits (N, classes), got {found}: train it in your own loop"
        )
    return logits.shape[1]


# --- the number of steps ----------------------------------------------------------------------------------------------


def run_length(train: TrainTable, batches: int) -> int:
    """Return the number of steps of a run.

    Args:
        batches: the number of batches per epoch and process.

    Raises:
        RecipeError: the epochs are too short for one step, or warm-up would take all steps.
    """
    if train.steps is not None:
        check_warmup(train, train.steps)
        return train.steps
    epochs = train.epochs or 0
    steps = epochs * batches // train.accumulation
    origin = f"train.epochs = {epochs} of {batches} batches"
    if not steps:
        enough = -(-train.accumulation // batches)
        raise RecipeError(
            f"train.accumulation: a step takes {train.accumulation} batches, and the run has {epochs * batches} "
            f"({origin}): choose a smaller accumulation, or train.epochs = {enough}"
        )
    shared = f", train.accumulation = {train.accumulation}" if train.accumulation > 1 else ""
    check_warmup(train, steps, f" ({origin}{shared})")
    return steps


def describe_rare_events(run: RunTable, steps: int) -> str | None:
    """Return a note on logs, evaluations or states that are due less than once in a run, or None if there are none."""
    default = RunTable()
    effects = {
        "log_every": "the log gets one line of losses",
        "evaluate_every": "the model is evaluated at the start and the end only",
        "save_every": "the state is saved at the end only",
    }
    rare = {key: getattr(run, key) for key in effects if getattr(run, key) > steps}
    rare = {key: value for key, value in rare.items() if value != getattr(default, key)}
    if not rare:
        return None
    keys = ", ".join(f"run.{key} = {value}" for key, value in rare.items())
    return f"{keys}: more than the {steps} steps of the run, so {' and '.join(effects[key] for key in rare)}"


# --- model and data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunSetup:
    """A model ready for training, its data, and the number of steps."""

    source: StartingModel
    training: Data
    evaluation: Data
    classes: int
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
    """Return model and data of a recipe.

    Args:
        state: the saved state of an interrupted run, which replaces `[model]` and `[convert]`.
        trust: allow files to run Python code that they name.
        shard: rank and world size.

    Raises:
        NormswapError: any error of `load`, `convert` and `open_data`; the conversion fails verification; the data do
            not fit the model; the run is too short for the recipe.
    """
    swap_options(recipe.convert)  # refuses wrong values before files are read
    source = load_from_state(recipe, state, trust=trust) if state else load_from_recipe(recipe, trust=trust)
    settings = _make_settings(recipe, source)
    training = open_data(settings(recipe.data.train_split), use="training", model=source.model, shard=shard)
    classes = training.classes
    if classes is None:
        raise DataError(f"{recipe.data.source}: number of classes unknown: use a folder per class")
    steps, example = run_length(recipe.train, len(training)), _make_example_input(training)
    if state is None:
        source, is_new = with_head(source, recipe, classes, example), not gated_modules(source.model)
        source = _convert_model(recipe, source, example)
        source = _prepare_untrained(recipe, source, settings(recipe.data.train_split), shard, is_new=is_new)
        rare = describe_rare_events(recipe.run, steps)
        source = replace(source, notes=(*source.notes, rare)) if rare else source
    outputs = count_outputs(source.model, example)
    if outputs < classes:
        raise DataError(
            f"{recipe.data.source}: has {classes} classes, but the model has {outputs}: set model.new_head = true, or "
            f"build it with num_classes={classes}"
        )
    if outputs > classes and state is None:
        unused = (
            f"the model has {outputs} outputs for {classes} classes: set model.new_head = true for "
            f"a new classifier of {classes}"
        )
        source = replace(source, notes=(*source.notes, unused))
    evaluation = open_data(
        settings(recipe.data.evaluation_split, class_names=training.class_names),
        use="evaluation",
        model=source.model,
        classes=outputs,
        shard=shard,
    )
    return RunSetup(source, training, evaluation, outputs, steps)


def _make_settings(recipe: Recipe, source: StartingModel) -> Callable[..., DataSettings]:
    """A function that returns the settings for a split of the recipe's data."""
    data = recipe.data
    shape = default_input_shape(source.model, source.architecture)
    size = (data.image_size, data.image_size) if data.image_size else shape[2:] if shape else None
    if size is None:
        raise RecipeError("data.image_size: the model does not record its image size: set it, such as 224")

    def build(split: str, class_names: tuple[str, ...] | None = None) -> DataSettings:
        """The settings of a split; the classes of the training split are passed for evaluation."""
        return DataSettings(
            source=data.source,
            split=split,
            root=data.root,
            download=data.download,
            image_size=size,  # type: ignore[arg-type]
            channels=shape[1] if shape else None,
            batch_size=data.batch_size if class_names is None else data.evaluation_batch_size,
            workers=data.workers,
            augmentation=augmentation(data),
            class_names=class_names,
            seed=recipe.train.seed,
        )

    return build


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


def _make_example_input(data: Data) -> Tensor:
    settings = data.settings
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, settings.channels or 3, *(settings.image_size or ()), generator=generator)


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


def _convert_model(recipe: Recipe, source: StartingModel, example: Tensor) -> StartingModel:
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


def _verify_conversion(original: nn.Module, model: nn.Module, plan: SwapPlan, example: Tensor) -> None:
    verification = verify(original, model, [example])
    if not verification.passed:
        difference = describe_difference(
            plan, verification, simplex='convert.gate = "simplex"', exclude="convert.exclude"
        )
        raise NothingToDo(f"nothing trained: {difference}, or set convert.verify = false to train it anyway")


def _describe_distance(original: nn.Module, model: nn.Module, example: Tensor) -> str:
    distance = measure_distance(original, model, [example])
    return (
        "sites that start without bn compute another function than the original; relative error of the outputs on "
        f"random inputs: {distance.relative_error:.2g}"
    )


# --- sites that were never trained ------------------------------------------------------------------------------------

_CALIBRATION_BATCH, _CALIBRATION_BATCHES = 32, 8


def _prepare_untrained(
    recipe: Recipe, source: StartingModel, settings: DataSettings, shard: tuple[int, int], *, is_new: bool
) -> StartingModel:
    """The converted model, with running statistics at the sites that were never trained, and a note on these sites.

    Args:
        is_new: the model was converted just now; otherwise sites may have been trained since their conversion.
    """
    plan, layers, choice = source.plan, gated_modules(source.model), recipe.convert.untrained
    untrained = [] if plan is None else [name for name in plan.untrained if is_new or _is_untrained(layers[name])]
    constant = [name for name in untrained if "bn" in layers[name].branches and layers[name].bn_statistics == "running"]
    if constant and choice == "calibrate":
        images = _calibrate_sites(source.model, constant, settings, shard)
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


def _calibrate_sites(model: nn.Module, names: list[str], settings: DataSettings, shard: tuple[int, int]) -> int:
    """Calibrate sites on some training images without augmentation; return the number of images."""
    data = open_data(replace(settings, batch_size=_CALIBRATION_BATCH), use="calibration", model=model, shard=shard)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    batches = [images.to(dtype) for images, _ in islice(data, _CALIBRATION_BATCHES)]
    calibrate(model, batches, only=lambda _, fqn: fqn in names, match=True)
    return sum(map(len, batches)) * shard[1]
