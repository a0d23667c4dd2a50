"""What a recipe starts from: the model, loaded and converted and proved, and the data opened for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.checkpoints.architecture.registry import default_input_shape, parse_architecture, with_keyword
from normswap.checkpoints.record import Step
from normswap.errors import ArchitectureError, DataError, NothingToDo, RecipeError
from normswap.finetune.data.datasets import Data, open_data
from normswap.finetune.data.loaders import DataSettings
from normswap.finetune.model_source import StartingModel, load_from_recipe, load_from_state
from normswap.finetune.recipe import Recipe, describe_rare_events, run_length
from normswap.finetune.recipe_fields import DataTable, TrainTable
from normswap.model_state import training_flags
from normswap.surgery.conversion import convert
from normswap.surgery.importance import gated_modules
from normswap.training.param_groups import param_groups
from normswap.verification.equivalence import verify

# MERGED DOC: Mixing the images of a batch, by timm: mixup and cutmix.

# MERGED DOC: timm's optimizers and moving average for a model with gates.

# MERGED DOC: The classifier of a model and the classes of the data: kept if it fits, replaced if a recipe asks for that.


Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def batch_mixer(data: DataTable, *, classes: int) -> Mix:
    """Return what turns images and labels into images and targets: labels, or shares of the classes (N, classes)."""
    if not (data.mixup or data.cutmix):
        return lambda images, labels: (images, labels)
    import timm.data

    # Labels are smoothed in the loss, with mixing and without it alike.
    package: Any = timm.data  # typed in some of its versions only
    return package.Mixup(data.mixup, data.cutmix, label_smoothing=0.0, num_classes=classes)  # type: ignore[no-any-return]


def build_optimizer(model: nn.Module, train: TrainTable) -> torch.optim.Optimizer:
    """Return the optimizer that a recipe names, with the gates in a group of their own.

    Raises:
        RecipeError: timm has none of that name, or it takes other options.
    """
    import timm.optim

    package: Any = timm.optim  # typed in some of its versions only
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


def build_average(model: nn.Module, decay: float) -> Any:
    """Return timm's moving average of a model, or None if its decay is 0.

    Its decay rises to `decay` with the steps: from the start it would keep 98 % of the first weights over 100 steps.
    """
    if not decay:
        return None
    import timm.utils

    package: Any = timm.utils
    return package.ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=0.75)


def with_head(source: StartingModel, recipe: Recipe, classes: int, example: Tensor) -> StartingModel:
    """Return the model with a classifier for so many classes, as `model.new_head` says, and a note on what was done.

    Args:
        example: an input (2, C, H, W).

    Raises:
        RecipeError: `model.architecture` names another number of classes; the model is no classifier.
        ArchitectureError: the model has no `reset_classifier`.
    """
    num_classes = recipe.model.new_head
    if not num_classes:
        return source
    _check_keyword(recipe, classes)
    old = _count_classes(source.model, example)
    if old == classes and num_classes != "always":
        note = f'model.new_head: the classifier of {old} classes fits the data and is kept; "always" replaces it'
        return replace(source, notes=(*source.notes, note))
    reset = getattr(source.model, "reset_classifier", None)
    if not callable(reset):
        raise ArchitectureError(
            f"model.new_head: {type(source.model).__name__} has no reset_classifier(), which timm's models have: build "
            f"the model with {classes} classes, and leave new_head out"
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
            f"model.new_head: classifier replaced, {old} classes -> {classes}, which start at random",
        ),
    )


def _check_keyword(recipe: Recipe, classes: int) -> None:
    """Refuse a number of classes in the architecture that the data contradict; with a checkpoint it is that one's."""
    num_classes = recipe.model
    if num_classes.checkpoint is not None or num_classes.architecture is None:
        return
    named = parse_architecture(num_classes.architecture).keywords.get("num_classes", classes)
    if named != classes:
        raise RecipeError(
            f"model.architecture: num_classes={named} contradicts the {classes} classes of {recipe.data.source}: leave "
            f"num_classes out, or set model.new_head=false to keep {named} outputs"
        )


def _count_classes(model: nn.Module, example: Tensor) -> int:
    """How many classes a model tells apart; 0 for one of timm's without a classifier."""
    return 0 if getattr(model, "num_classes", None) == 0 else count_outputs(model, example)


@torch.no_grad()
def count_outputs(model: nn.Module, example: Tensor) -> int:
    """Return the number of logits of a classifier.

    Raises:
        RecipeError: it returns anything but logits (N, classes).
    """
    with training_flags(list(model.modules()), training=False):
        logits = model(example.to(next((p.dtype for p in model.parameters()), torch.float32)))
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        num_outputs = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise RecipeError(
            f"model: expected a classifier with logits (N, classes), got {num_outputs}: use a loop of your own"
        )
    return logits.shape[1]


@dataclass(frozen=True)
class RunSetup:
    """A model ready to be trained, the data for it, and how long it trains."""

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
        """What the user should know of the model and the length of the run."""
        return self.source.notes


def prepare(
    recipe: Recipe, *, state: Path | None = None, trust: bool = False, shard: tuple[int, int] = (0, 1)
) -> RunSetup:
    """Return model and data of a recipe.

    Args:
        state: the saved state of an interrupted run, which then takes the place of `[model]` and `[convert]`.
        trust: run the code that files name.
        shard: the rank of this process, of how many.

    Raises:
        NormswapError: what `load`, `convert` and `open_data` raise; the proof failed; the data do not fit the model, or
            the run is too short for the recipe.
    """
    source = load_from_state(recipe, state, trust=trust) if state else load_from_recipe(recipe, trust=trust)
    settings = _make_settings(recipe, source)
    training = open_data(settings(recipe.data.train_split), use="training", model=source.model, shard=shard)
    classes = training.classes
    if classes is None:
        raise DataError(f"{recipe.data.source}: does not tell its classes: use a folder per class")
    steps = run_length(recipe.train, len(training))
    if state is None:
        source = with_head(source, recipe, classes, _make_example_input(training))
        source = _convert_model(recipe, source, _make_example_input(training))
        rare = describe_rare_events(recipe.run, steps)
        source = replace(source, notes=(*source.notes, rare)) if rare else source
    outputs = count_outputs(source.model, _make_example_input(training))
    if outputs < classes:
        raise DataError(
            f"{recipe.data.source}: has {classes} classes, the model {outputs}: set model.new_head = true, or build "
            f"it with num_classes={classes}"
        )
    evaluation = open_data(
        settings(recipe.data.evaluation_split, class_names=training.class_names),
        use="evaluation",
        model=source.model,
        classes=outputs,
        shard=shard,
    )
    return RunSetup(source, training, evaluation, outputs, steps)


def _make_settings(recipe: Recipe, source: StartingModel) -> Any:
    """What makes settings for a split of the recipe's data."""
    data = recipe.data
    shape = default_input_shape(source.model, source.architecture)
    size = (data.image_size, data.image_size) if data.image_size else shape[2:] if shape else None

    def build(split: str, class_names: tuple[str, ...] | None = None) -> DataSettings:
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
    """Return what the recipe's keys are called by `timm.data.create_transform`."""
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


def _convert_model(recipe: Recipe, source: StartingModel, example: Tensor) -> StartingModel:
    """The model converted and proved, unless it is already, or is not to be."""
    wanted, converted = recipe.convert, gated_modules(source.model)
    if converted:
        note = f"{recipe.model.checkpoint} is converted already ({len(converted)} sites): [convert] is not applied"
        return replace(source, notes=(*source.notes, note))
    if not wanted.enabled:
        return source
    options = {} if wanted.gate is None else {"gate": wanted.gate}
    model, plan, _ = convert(
        source.model,
        example,
        include=wanted.include,
        exclude=wanted.exclude,
        kinds=wanted.kinds,
        bn_statistics=wanted.bn_statistics,  # type: ignore[arg-type]
        synchronize=wanted.synchronize,
        **options,  # type: ignore[arg-type]
    )
    if not plan.swaps:
        raise NothingToDo("the model has no norm to convert: set convert.enabled = false to train it as it is")
    verification = verify(source.model, model, [example])
    if not verification.passed and wanted.gate != "softmax":
        raise NothingToDo("the converted model does not compute the same function: see normswap verify")
    history = (*source.history, Step.now("converted"))
    return replace(source, model=model, plan=plan, history=history)
