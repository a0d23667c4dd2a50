"""What a recipe starts from: the model, loaded and converted and proved, and the data opened for it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.checkpoints.architecture import default_input_shape
from normswap.checkpoints.record import Step
from normswap.errors import DataError, NothingToDo
from normswap.finetune.data import Data, open_data
from normswap.finetune.heads import count_outputs, with_head
from normswap.finetune.image_source import DataSettings
from normswap.finetune.recipe import Recipe
from normswap.finetune.recipe_tables import DataTable
from normswap.finetune.run_length import rare_events, run_length
from normswap.finetune.source import Source, source_of_recipe, source_of_state
from normswap.surgery.conversion import convert
from normswap.surgery.gated import gated_modules
from normswap.verification import verify


@dataclass(frozen=True)
class Prepared:
    """A model ready to be trained, the data for it, and how long it trains."""

    source: Source
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
) -> Prepared:
    """Return model and data of a recipe.

    Args:
        state: the saved state of an interrupted run, which then takes the place of `[model]` and `[convert]`.
        trust: run the code that files name.
        shard: the rank of this process, of how many.

    Raises:
        NormswapError: what `load`, `convert` and `open_data` raise; the proof failed; the data do not fit the model, or
            the run is too short for the recipe.
    """
    source = source_of_state(recipe, state, trust=trust) if state else source_of_recipe(recipe, trust=trust)
    settings = _settings(recipe, source)
    training = open_data(settings(recipe.data.train_split), use="training", model=source.model, shard=shard)
    classes = training.classes
    if classes is None:
        raise DataError(f"{recipe.data.source}: does not tell its classes: use a folder per class")
    steps = run_length(recipe.train, len(training))
    if state is None:
        source = with_head(source, recipe, classes, _example(training))
        source = _converted(recipe, source, _example(training))
        rare = rare_events(recipe.run, steps)
        source = replace(source, notes=(*source.notes, rare)) if rare else source
    outputs = count_outputs(source.model, _example(training))
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
    return Prepared(source, training, evaluation, outputs, steps)


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


def _converted(recipe: Recipe, source: Source, example: Tensor) -> Source:
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
    proof = verify(source.model, model, [example])
    if not proof.passed and wanted.gate != "softmax":
        raise NothingToDo("the converted model does not compute the same function: see normswap verify")
    history = (*source.history, Step.now("converted"))
    return replace(source, model=model, plan=plan, history=history)
