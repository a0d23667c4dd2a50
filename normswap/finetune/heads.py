"""The classifier of a model and the classes of the data: kept if it fits, replaced if a recipe asks for that."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from normswap.checkpoints.architecture import parse_architecture, with_keyword
from normswap.errors import ArchitectureError, RecipeError
from normswap.finetune.recipe import Recipe
from normswap.finetune.source import Source
from normswap.modes import training_flags


def with_head(source: Source, recipe: Recipe, classes: int, example: Tensor) -> Source:
    """Return the model with a classifier for so many classes, as `model.new_head` says, and a note on what was done.

    Args:
        example: an input (2, C, H, W).

    Raises:
        RecipeError: `model.architecture` names another number of classes; the model is no classifier.
        ArchitectureError: the model has no `reset_classifier`.
    """
    wanted = recipe.model.new_head
    if not wanted:
        return source
    _check_keyword(recipe, classes)
    old = _classes_of(source.model, example)
    if old == classes and wanted != "always":
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
    wanted = recipe.model
    if wanted.checkpoint is not None or wanted.architecture is None:
        return
    named = parse_architecture(wanted.architecture).keywords.get("num_classes", classes)
    if named != classes:
        raise RecipeError(
            f"model.architecture: num_classes={named} contradicts the {classes} classes of {recipe.data.source}: leave "
            f"num_classes out, or set model.new_head=false to keep {named} outputs"
        )


def _classes_of(model: nn.Module, example: Tensor) -> int:
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
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise RecipeError(f"model: expected a classifier with logits (N, classes), got {got}: use a loop of your own")
    return logits.shape[1]
