"""The state of a run as one file: a training checkpoint that `normswap.load` reads, and that the run goes on from.

Written whole or not at all, so that the state before is kept until the new one is there.
"""

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
from normswap.finetune.recipe import Recipe, differing_keys
from normswap.text import jsonable

# MERGED DOC: What a run tells of itself: one JSON document a line, and the same numbers for TensorBoard where it is installed.

# MERGED DOC: SIGINT and SIGTERM as requests that a run answers where it can: after the step, once its state is saved.


NAME = "log.jsonl"


class Journal:
    """Appends records to `log.jsonl` in a folder; each has the `step` after which it was true.

    Args:
        folder: exists already.
        after: the step that the run goes on from; what an interrupted run has told beyond it is forgotten.

    Raises:
        TrainingError: the file cannot be written.
    """

    def __init__(self, folder: Path, *, after: int = 0) -> None:
        self._path = folder / NAME
        kept = [record for record in read_journal(folder) if record["step"] <= after] if after else []
        try:
            # Without a buffer, which would be written again, and refused again, on closing.
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
        """Append one record, and see it through to the disk.

        Raises:
            TrainingError: the disk refuses.
        """
        self._append(record)
        if self._tensorboard is not None:
            for name, value in _flatten_scalars("", record):
                self._tensorboard.add_scalar(name, value, record["step"])

    def _append(self, record: Mapping[str, Any]) -> None:
        try:
            line = json.dumps(jsonable(record)).encode() + b"\n"
            while line:  # a disk that fills up takes a part first, and refuses the rest
                line = line[self._file.write(line) :]
        except OSError as error:
            raise TrainingError(f"{self._path}: cannot be written ({error.strerror}): free some space") from error


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run; a last line that was cut off by the end of its process is left out."""
    try:
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _open_tensorboard(folder: Path, after: int) -> Any:
    if find_spec("tensorboard") is None:
        return None
    # It would otherwise look for TensorFlow, which takes seconds and prints much.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1 if after else None)


def _flatten_scalars(tag: str, value: Any) -> list[tuple[str, float]]:
    """Every number in a record with its place, `importance/layer1.0.bn1/mean/bn`."""
    if isinstance(value, Mapping):
        nested = [_flatten_scalars(f"{tag}/{key}" if tag else str(key), item) for key, item in value.items()]
        return [scalar for scalars in nested for scalar in scalars]
    return [(tag, float(value))] if isinstance(value, int | float) and tag != "step" else []


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """Whether the run was asked to stop, and by which signal."""

    number: int | None = None


@contextmanager
def handle_stop_signals() -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM while the block runs; the second one of a kind acts as it would have without the block.

    In a thread other than the main one, which may set no handlers, nothing is noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
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


def write_state(folder: Path, recipe: Recipe, source: StartingModel, model: nn.Module, state: RunState) -> None:
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
    write_content(content, folder / STATE, "torch zip", _make_record(source, model, recipe, entry=entry))


def write_model(folder: Path, recipe: Recipe, source: StartingModel, model: nn.Module) -> Path:
    """Write the trained weights alone, and return where they are.

    Raises:
        CheckpointError: they cannot be written.
    """
    write_content(model.state_dict(), folder / MODEL, "torch zip", _make_record(source, model, recipe, entry=None))
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


def _make_record(source: StartingModel, model: nn.Module, recipe: Recipe, *, entry: str | None) -> Record:
    """Plan and history go on; the proof of the conversion does not, since training has changed the function."""
    return Record(
        payload="state dict",
        architecture=source.architecture,
        plan=source.plan,
        history=(*source.history, Step.now("finetuned", source=recipe.name)),
        originals=originals(model, source.plan),
        entry=entry,
    )
