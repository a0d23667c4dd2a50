"""The files in the folder of a run: the log, the saved state, the trained model.

`log.jsonl` has one JSON document per line; TensorBoard gets the same numbers if it is installed. `state.pt` is a
training checkpoint that `normswap.load` reads and from which the run resumes. It is replaced in one step, so that a
failed write keeps the previous state. Signals are handled here too: a run stops at a step whose state is saved.
"""

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from torch import nn

from normswap.checkpoints.reading import read_checkpoint
from normswap.checkpoints.record import Record, Step
from normswap.checkpoints.saving import originals, write_content
from normswap.errors import CheckpointError, RecipeError, TrainingError
from normswap.finetune.model_source import MODEL, STATE, StartingModel
from normswap.finetune.recipe import TABLES, Recipe, rename_keys
from normswap.finetune.tasks.interface import Evaluation
from normswap.surgery.importance import SiteWeights
from normswap.text import jsonable

logger = logging.getLogger(__name__)

# --- the log ----------------------------------------------------------------------------------------------------------

NAME = "log.jsonl"


class Journal:
    """Appends records to `log.jsonl` in a folder; each has the `step` after which it was made.

    Args:
        folder: an existing folder.
        after: the step from which the run resumes; later records of the interrupted run are dropped.

    Raises:
        TrainingError: the file cannot be written.
    """

    def __init__(self, folder: Path, *, after: int = 0) -> None:
        self._path = folder / NAME
        kept = [record for record in read_journal(folder) if record["step"] <= after] if after else []
        try:
            # Unbuffered: after a failed write, closing would try to write the buffer again and fail again.
            self._file = open(self._path, "wb", buffering=0)  # noqa: SIM115 - closed on exit
        except OSError as error:
            raise TrainingError(f"{self._path}: cannot be written ({error.strerror})") from error
        self._tensorboard = _open_tensorboard(folder, after)
        for record in kept:
            self._append(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record and write it to the disk at once.

        Raises:
            TrainingError: it cannot be written.
        """
        self._append(record)
        if self._tensorboard is not None:
            for name, value in _flatten_scalars("", record):
                self._tensorboard.add_scalar(name, value, record["step"])

    def _append(self, record: Mapping[str, Any]) -> None:
        try:
            line = json.dumps(jsonable(record)).encode() + b"\n"
            while line:  # a disk that is nearly full accepts a part first, and then fails
                line = line[self._file.write(line) :]
        except OSError as error:
            raise TrainingError(f"{self._path}: cannot be written ({error.strerror}): free some space") from error


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run; an incomplete last line, left by a killed process, is dropped."""
    try:
        lines = (folder / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            logger.info("%s: dropped line %d, which is incomplete", folder / NAME, len(records) + 1)
            break
    return records


def _open_tensorboard(folder: Path, after: int) -> Any:
    if find_spec("tensorboard") is None:
        logger.info("tensorboard is not installed: %s gets no folder for it", folder)
        return None
    with _quiet_tensorflow():
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1 if after else None)


@contextmanager
def _quiet_tensorflow() -> Iterator[None]:
    """TensorBoard imports TensorFlow if it is installed, which prints many lines while it is loaded."""
    name = "TF_CPP_MIN_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = before or "3"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _flatten_scalars(tag: str, value: Any) -> list[tuple[str, float]]:
    """Every number in a record with its path, such as `importance/layer1.0.bn1/mean/bn`."""
    if isinstance(value, Mapping):
        nested = [_flatten_scalars(f"{tag}/{key}" if tag else str(key), item) for key, item in value.items()]
        return [scalar for scalars in nested for scalar in scalars]
    return [(tag, float(value))] if isinstance(value, int | float) and tag != "step" else []


# --- the result -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The result of `normswap.run_recipe`.

    Attributes:
        output, model: the folder of the run, and the file with the trained weights in it.
        steps, seconds: the number of steps, and the time that they took, without evaluations.
        before, after: loss, metrics and number of images, before the first and after the last step.
        importance: the learned importance weights of every site, as `normswap.importance_weights` returns them.
        notes: notes for the user on the model and the length of the run.

    Examples:
        >>> import normswap
        >>> overrides = ["train.steps=2", "train.warmup_steps=0", "run.output=short_run"]
        >>> outcome = normswap.run_recipe(normswap.read_recipe("digits_source", overrides))
        >>> outcome.after.images, list(outcome.after.figures), outcome.after.unit
        (200, ['accuracy'], '%')
        >>> str(outcome.model), str(outcome.log)
        ('short_run/model.pt', 'short_run/log.jsonl')
    """

    __module__ = "normswap"

    output: Path
    model: Path
    steps: int
    seconds: float
    before: Evaluation
    after: Evaluation
    importance: Mapping[str, SiteWeights]
    notes: tuple[str, ...] = ()

    @property
    def log(self) -> Path:
        """The log of the run, with one JSON document per line."""
        return self.output / NAME


# --- signals ----------------------------------------------------------------------------------------------------------

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """The number of the signal that asked the run to stop, or None."""

    number: int | None = None


@contextmanager
def handle_stop_signals() -> Iterator[StopRequest]:
    """Record SIGINT and SIGTERM while the block runs; a second one of the same kind acts as it does without the block.

    Only the main thread may set handlers: in another thread, signals act as they do without the block.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        logger.info("not in the main thread: a signal ends the run without a saved state")
        yield request
        return
    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}

    def note(number: int, _frame: FrameType | None) -> None:
        request.number = number
        signal.signal(number, before[signal.Signals(number)])

    for number in _STOP_SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- state and model --------------------------------------------------------------------------------------------------

_WEIGHTS, _AVERAGE = "state_dict", "state_dict_ema"
# Keys that may differ when a run resumes, since they do not change what it computes.
_FREE_KEYS = {
    "train.sharding",
    "run.output",
    "run.log_every",
    "run.save_every",
    "data.workers",
    "data.evaluation_batch_size",
}


@dataclass(frozen=True)
class RunState:
    """The progress of a run (steps, complete epochs, seconds, first evaluation) and the states of its parts."""

    step: int
    epoch: int
    seconds: float
    before: Mapping[str, Any]
    average: Mapping[str, Any] | None
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    scaler: Mapping[str, Any] | None


def write_state(folder: Path, recipe: Recipe, source: StartingModel, model: nn.Module, state: RunState) -> None:
    """Replace the saved state of a run.

    Raises:
        CheckpointError: it cannot be written; the previous state is kept.
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
        content[_AVERAGE] = state.average  # not a copy: it carries torch's metadata of the modules
    if state.scaler is not None:
        content["scaler"] = dict(state.scaler)
    entry = _WEIGHTS if state.average is None else _AVERAGE
    write_content(content, folder / STATE, "torch zip", _make_record(source, model, recipe, entry=entry))


def write_model(folder: Path, recipe: Recipe, source: StartingModel, model: nn.Module) -> Path:
    """Write the trained weights, and return their path.

    Raises:
        CheckpointError: they cannot be written.
    """
    write_content(model.state_dict(), folder / MODEL, "torch zip", _make_record(source, model, recipe, entry=None))
    return folder / MODEL


# Up to 0.1.0, gates had the learning rate of the network (None) and no limit, and untrained sites were kept.
_OLD_DEFAULTS: Mapping[str, Any] = {
    "convert.bn_statistics": "batch",
    "convert.untrained": "keep",
    "train.batch_penalty": 0.03,
    "train.gate_max_step": 0.0,
}


def read_state(folder: Path, recipe: Recipe) -> tuple[Recipe, RunState]:
    """Return the recipe to resume with and the saved state of the run in a folder.

    If an older version saved the state, keys that the user did not set have the values that they had there.

    Raises:
        CheckpointError: there is none, or it is damaged or not the state of a run.
        RecipeError: it is the state of another recipe.
    """
    path = folder / STATE
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file: there is no run to resume; start one without resume=True")
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
        saved = rename_keys(content["recipe"])
        if "gate_max_step" not in saved["train"]:
            recipe = _with_old_defaults(recipe, saved)
        others = [key for key in differing_keys(recipe, saved) if key not in _FREE_KEYS]
    except (KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{path}: not the state of a run: name the folder of a run with run.output") from None
    if others:
        raise RecipeError(
            f"{path}: its recipe has other values of {', '.join(others[:5])}: use those values, or start a run in "
            "another run.output"
        )
    return recipe, found


def _with_old_defaults(recipe: Recipe, saved: dict[str, Any]) -> Recipe:
    """The recipe of a run that an older version saved; keys that are missing in `saved` are added there."""
    for dotted_key, value in _OLD_DEFAULTS.items():
        table, _, key = dotted_key.partition(".")
        saved[table].setdefault(key, value)
    rate = saved["train"]["importance_lr"]
    saved["train"]["importance_lr"] = saved["train"]["lr"] if rate is None else rate
    tables = {}
    for table in TABLES:
        keys = saved.setdefault(table, {})
        dotted = {key: f"{table}.{key}" for key in keys}
        unset = [key for key in keys if dotted[key] not in _FREE_KEYS and not recipe.is_set_by_user(dotted[key])]
        values = {key: tuple(keys[key]) if isinstance(keys[key], list) else keys[key] for key in unset}
        tables[table] = replace(getattr(recipe, table), **values)
    return replace(recipe, **tables)


def differing_keys(recipe: Recipe, other: Mapping[str, Any]) -> list[str]:
    """Return the keys, as `table.key`, whose values differ between a recipe and the `to_dict()` of another one.

    A key that the other lacks, since an older version wrote it, has its default there.
    """
    defaults = {table: asdict(build()) for table, build in TABLES.items()}
    own, others = recipe.to_dict(), rename_keys(other)
    differing = [
        f"{table}.{key}"
        for table in TABLES
        for key, value in own[table].items()
        if jsonable(value) != jsonable(others.get(table, {}).get(key, defaults[table][key]))
    ]
    return differing if own["task"] == others.get("task", "classification") else ["task", *differing]


def _make_record(source: StartingModel, model: nn.Module, recipe: Recipe, *, entry: str | None) -> Record:
    """The record keeps plan and history, but no verification: training has changed the function."""
    return Record(
        payload="state dict",
        architecture=source.architecture,
        plan=source.plan,
        history=(*source.history, Step.now("finetuned", source=recipe.name)),
        originals=originals(model, source.plan),
        entry=entry,
    )
