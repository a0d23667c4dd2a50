"""The state of a run as one file: a training checkpoint that `normswap.load` reads, and that the run goes on from.

Written whole or not at all, so that the state before is kept until the new one is there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from normswap.checkpoints.checkpoint import read_checkpoint
from normswap.checkpoints.record import Record, Step
from normswap.checkpoints.saving import originals, write_content
from normswap.documents import jsonable
from normswap.errors import CheckpointError, RecipeError
from normswap.finetune.recipe import Recipe, differing_keys
from normswap.finetune.source import MODEL, STATE, Source

_WEIGHTS, _AVERAGE = "state_dict", "state_dict_ema"
# Keys that may change between the parts of a run without changing what it computes.
_FREE = {"run.output", "run.log_every", "run.save_every", "data.workers", "data.evaluation_batch_size"}


@dataclass(frozen=True)
class RunState:
    """How far a run had come - steps, whole passes through the data, seconds - and the states of all that remembers."""

    step: int
    epoch: int
    seconds: float
    before: Mapping[str, Any]
    average: Mapping[str, Any] | None
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    scaler: Mapping[str, Any] | None


def write_state(folder: Path, recipe: Recipe, source: Source, model: nn.Module, state: RunState) -> None:
    """Write the state of a run over the one before.

    Raises:
        CheckpointError: it cannot be written; the one before is as it was.
    """
    content: dict[str, Any] = {
        "epoch": state.epoch,
        "step": state.step,
        _WEIGHTS: model.state_dict(),
        "optimizer": dict(state.optimizer),
        "lr_scheduler": dict(state.schedule),
        "seconds": state.seconds,
        "before": dict(state.before),
        "recipe": jsonable(recipe.to_dict()),
    }
    if state.average is not None:
        content[_AVERAGE] = state.average  # as it is, with torch's notes on its modules
    if state.scaler is not None:
        content["scaler"] = dict(state.scaler)
    entry = _WEIGHTS if state.average is None else _AVERAGE
    write_content(content, folder / STATE, "torch zip", _record(source, model, recipe, entry=entry))


def write_model(folder: Path, recipe: Recipe, source: Source, model: nn.Module) -> Path:
    """Write the trained weights alone, and return where they are.

    Raises:
        CheckpointError: they cannot be written.
    """
    write_content(model.state_dict(), folder / MODEL, "torch zip", _record(source, model, recipe, entry=None))
    return folder / MODEL


def read_state(folder: Path, recipe: Recipe) -> RunState:
    """Return the state that a run in `folder` was left in.

    Raises:
        CheckpointError: there is none, or it is damaged or no state of a run.
        RecipeError: it is one of another recipe.
    """
    path = folder / STATE
    if not path.is_file():
        raise CheckpointError(f"{path}: no state of a run to go on from: leave resume=True out to start one")
    content = read_checkpoint(path, entry=_WEIGHTS).content
    try:
        found = RunState(
            content["step"],
            content["epoch"],
            content["seconds"],
            content["before"],
            content.get(_AVERAGE),
            content["optimizer"],
            content["lr_scheduler"],
            content.get("scaler"),
        )
        others = [key for key in differing_keys(recipe, content["recipe"]) if key not in _FREE]
    except (KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{path}: not the state of a run: choose the folder of one with run.output") from None
    if others:
        raise RecipeError(f"{path}: is of a run with other {', '.join(others[:5])}: start anew in another run.output")
    return found


def _record(source: Source, model: nn.Module, recipe: Recipe, *, entry: str | None) -> Record:
    """Plan and history go on; the proof of the conversion does not, since training has changed the function."""
    return Record(
        payload="state dict",
        architecture=source.architecture,
        plan=source.plan,
        history=(*source.history, Step.now("finetuned", source=recipe.name)),
        originals=originals(model, source.plan),
        entry=entry,
    )
