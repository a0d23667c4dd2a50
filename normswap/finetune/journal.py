"""What a run tells of itself: one JSON document a line, and the same numbers for TensorBoard where it is installed."""

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from normswap.documents import jsonable
from normswap.errors import TrainingError

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
        self._board = _open_board(folder, after)
        for record in kept:
            self._append(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, and see it through to the disk.

        Raises:
            TrainingError: the disk refuses.
        """
        self._append(record)
        if self._board is not None:
            for name, value in _scalars("", record):
                self._board.add_scalar(name, value, record["step"])

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


def _open_board(folder: Path, after: int) -> Any:
    if find_spec("tensorboard") is None:
        return None
    # It would otherwise look for TensorFlow, which takes seconds and prints much.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1 if after else None)


def _scalars(place: str, value: Any) -> list[tuple[str, float]]:
    """Every number in a record with its place, `importance/layer1.0.bn1/mean/bn`."""
    if isinstance(value, Mapping):
        inside = [_scalars(f"{place}/{key}" if place else str(key), item) for key, item in value.items()]
        return [scalar for scalars in inside for scalar in scalars]
    return [(place, float(value))] if isinstance(value, int | float) and place != "step" else []
