"""What a recipe starts from: the model, loaded and converted and proved, and the data opened for it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.checkpoints.architecture import build_architecture, default_input_shape, parse_architecture, with_keyword
from normswap.checkpoints.atomic import check_readable
from normswap.checkpoints.checkpoint import Checkpoint, build_model, read_checkpoint
from normswap.checkpoints.named_architectures import check_keywords
from normswap.checkpoints.record import Step
from normswap.errors import ArchitectureError, DataError, NothingToDo, RecipeError
from normswap.finetune.data import Data, open_data
from normswap.finetune.image_source import DataSettings
from normswap.finetune.recipe import Recipe
from normswap.finetune.recipe_tables import DataTable
from normswap.modes import training_flags
from normswap.surgery.conversion import convert
from normswap.surgery.gated import gated_modules
from normswap.surgery.plan import SwapPlan
from normswap.verification import verify


@dataclass(frozen=True)
class Source:
    """A model as it was found, with what its file says of it."""

    model: nn.Module
    architecture: str | None
    plan: SwapPlan | None
    history: tuple[Step, ...]


@dataclass(frozen=True)
class Prepared:
    """A model ready to be trained, and the data for it."""

    source: Source
    training: Data
    evaluation: Data
    classes: int

    @property
    def model(self) -> nn.Module:
        """The model to train."""
        return self.source.model


def prepare(
    recipe: Recipe, *, state: Path | None = None, trust: bool = False, shard: tuple[int, int] = (0, 1)
) -> Prepared:
    """Return model and data of a recipe.

    Args:
        state: the saved state of an interrupted run, which then takes the place of `[model]` and `[convert]`.
        trust: run the code that files name.
        shard: the rank of this process, of how many.

    Raises:
        NormswapError: what `load`, `convert` and `open_data` raise; the proof failed; the data do not fit the model.
    """
    source = _from_state(recipe, state, trust=trust) if state else _from_recipe(recipe, trust=trust)
    settings = _settings(recipe, source)
    training = open_data(settings(recipe.data.train_split), use="training", model=source.model, shard=shard)
    classes = training.classes
    if classes is None:
        raise DataError(f"{recipe.data.source}: does not tell its classes: use a folder per class")
    if state is None:
        if recipe.model.new_head:
            source = _with_new_head(source, classes)
        source = _converted(recipe, source, _example(training))
    outputs = _outputs(source.model, _example(training))
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
    return Prepared(source, training, evaluation, outputs)


def _from_recipe(recipe: Recipe, *, trust: bool) -> Source:
    wanted = recipe.model
    if wanted.checkpoint is None:
        torch.manual_seed(recipe.train.seed)
        architecture = wanted.architecture or ""
        model = build_architecture(architecture, pretrained=wanted.pretrained, trust=trust)
        return Source(model, architecture, None, ())
    check_readable(Path(wanted.checkpoint))
    checkpoint = read_checkpoint(Path(wanted.checkpoint), entry=wanted.entry, trust=trust)
    return _built(checkpoint, wanted.architecture, trust=trust)


def _from_state(recipe: Recipe, state: Path, *, trust: bool) -> Source:
    checkpoint = read_checkpoint(state, entry="state_dict", trust=trust)
    own = _own_architecture(recipe)
    said = checkpoint.record.architecture if checkpoint.record else None
    # What the state says of its classes goes first; code and folders that the recipe names too are the user's own.
    same = own and said and _started_alike(own, said)
    return _built(checkpoint, said if same else None, trust=trust)


def _own_architecture(recipe: Recipe) -> str | None:
    """What the recipe names, or the configuration in the folder that it starts from."""
    start = recipe.model.checkpoint
    return recipe.model.architecture or (f"hf:{start}" if start and Path(start).is_dir() else None)


def _started_alike(own: str, said: str) -> bool:
    """Whether two architectures are one but for keywords, which a file may set."""
    mine, other = parse_architecture(own), parse_architecture(said)
    if (mine.scheme, mine.model) != (other.scheme, other.model):
        return False
    check_keywords(said, {key: value for key, value in other.keywords.items() if mine.keywords.get(key) != value})
    return True


def _built(checkpoint: Checkpoint, architecture: str | None, *, trust: bool) -> Source:
    built = build_model(checkpoint, architecture, trust=trust)
    record = checkpoint.record
    return Source(
        built.model,
        built.architecture,
        built.plan,
        record.history if record else (),
    )


def _settings(recipe: Recipe, source: Source) -> Any:
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


def _example(data: Data) -> Tensor:
    settings = data.settings
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, settings.channels or 3, *(settings.image_size or ()), generator=generator)


def _with_new_head(source: Source, classes: int) -> Source:
    reset = getattr(source.model, "reset_classifier", None)
    if not callable(reset):
        raise ArchitectureError(
            f"model.new_head: {type(source.model).__name__} has no reset_classifier(), which timm's models have: build "
            f"the model with {classes} classes, and leave new_head out"
        )
    reset(classes)
    said = source.architecture
    return replace(source, architecture=said and with_keyword(said, "num_classes", classes))


def _converted(recipe: Recipe, source: Source, example: Tensor) -> Source:
    """The model converted and proved, unless it is already, or is not to be."""
    wanted = recipe.convert
    if not wanted.enabled or gated_modules(source.model):
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
    proof = verify(source.model, model, [example])
    if not proof.passed and wanted.gate != "softmax":
        raise NothingToDo("the converted model does not compute the same function: see normswap verify")
    history = (*source.history, Step.now("converted"))
    return replace(source, model=model, plan=plan, history=history)


@torch.no_grad()
def _outputs(model: nn.Module, example: Tensor) -> int:
    """How many classes the model tells apart."""
    with training_flags(list(model.modules()), training=False):
        logits = model(example.to(next((p.dtype for p in model.parameters()), torch.float32)))
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise RecipeError(f"model: expected a classifier with logits (N, classes), got {got}: use a loop of your own")
    return logits.shape[1]
