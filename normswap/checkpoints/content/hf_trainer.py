"""The files of a transformers Trainer next to the weights in its folder, for the folder with the converted weights.

If the optimizer belongs to the converted network, its state and that of the scheduler get the gates as a last parameter
group. All other files (random generators, scaler, arguments) are copied byte by byte and never opened. An optimizer or
scheduler state that cannot be extended is copied too, and a note gives the reason.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from normswap.checkpoints.content.optimizer_ownership import Network, add_owned_gates
from normswap.checkpoints.content.optimizer_state import check_groups, scheduler_with_gates
from normswap.checkpoints.formats.formats import decode, detect_format
from normswap.checkpoints.io.digest import contents_equal
from normswap.errors import CheckpointError

_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"
_COPIED = ("rng_state*.pth", "scaler.pt", "training_args.bin")


class SidecarFiles(NamedTuple):
    """Files for a folder by name, each a state to save or the path of a file to copy, and notes about them."""

    files: Mapping[str, Any]
    notes: tuple[str, ...]


def trainer_state(folder: Path, networks: Sequence[Network]) -> SidecarFiles:
    """Return the files for the folder with the converted weights; none if no Trainer has written to `folder`.

    Args:
        networks: the networks in the weights of the folder; the optimizer may belong to some of them.
    """
    files: dict[str, Any] = {path.name: path for pattern in _COPIED for path in sorted(folder.glob(pattern))}
    notes = []
    steps: tuple[tuple[str, Callable[[Any], tuple[Any, str]]], ...] = (
        (_OPTIMIZER, lambda state: _add_optimizer_gates(state, networks)),
        (_SCHEDULER, lambda state: _add_scheduler_gates(state, files.get(_OPTIMIZER))),
    )
    for name, extend in steps if any(network.gates for network in networks) else ():
        if (folder / name).is_file():
            files[name], note = _extend_file(folder / name, extend)
            notes.append(f"{name}: {note}")
    return SidecarFiles(files, tuple(notes))


def trainer_files(folder: Path) -> dict[str, Path]:
    """Return the paths of the files that a Trainer writes next to the weights of `folder`, by name."""
    patterns = (_OPTIMIZER, _SCHEDULER, *_COPIED)
    return {path.name: path for pattern in patterns for path in sorted(folder.glob(pattern))}


def write_sidecar_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Write the files of `SidecarFiles` into a folder, read them back and compare.

    Raises:
        CheckpointError: a file differs when it is read back.
    """
    for name, value in files.items():
        target = folder / name
        if isinstance(value, Path):
            shutil.copyfile(value, target)
            same = target.read_bytes() == value.read_bytes()
        else:
            torch.save(value, target)
            same = contents_equal(value, decode(target, detect_format(target), trust=False, mmap=True))
        if not same:
            raise CheckpointError(f"{name} differs from the written data when it is read back: check the disk")


def _extend_file(path: Path, extend: Callable[[Any], tuple[Any, str]]) -> tuple[Any, str]:
    try:
        return extend(decode(path, detect_format(path), trust=False, mmap=True))
    except CheckpointError as error:
        return path, f"copied unchanged ({error})"


def _add_optimizer_gates(state: Any, networks: Sequence[Network]) -> tuple[Any, str]:
    check_groups(state)
    extended, note = add_owned_gates(state, networks)
    if extended is None:
        raise CheckpointError(note)
    return extended, note


def _add_scheduler_gates(state: Any, optimizer: Any) -> tuple[Any, str]:
    if not isinstance(optimizer, Mapping):
        raise CheckpointError(f"there is no {_OPTIMIZER} with gates in the folder")
    return scheduler_with_gates(state, optimizer_state=optimizer), "gates follow the last group's schedule"
