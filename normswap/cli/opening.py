"""Opening what a command was given: the file, its model, an example input."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normswap.cli.options import InputSpec, example_inputs
from normswap.cli.progress import stage

if TYPE_CHECKING:
    from torch import nn

    from normswap.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class Opened:
    """A file's content, the model in it, the architecture's name where known, and an example input or None."""

    checkpoint: "Checkpoint"
    model: "nn.Module"
    architecture: str | None
    inputs: Any


def read_file(path: Path, *, trust: bool) -> "Checkpoint":
    """Read a file under the eyes of the user.

    Raises:
        CheckpointError: as `normswap.load`.
    """
    with stage(f"reading {path.name}"):
        from normswap.checkpoints.checkpoint import read_checkpoint

        return read_checkpoint(path, trust=trust)


def open_model(checkpoint: "Checkpoint", *, arch: str | None, inputs: Sequence[InputSpec]) -> Opened:
    """Build the model in a file and an example input for it. `arch` wins over what the file says.

    Raises:
        ArchitectureError, PlanError: as `normswap.load`.
    """
    with stage("building the model"):
        from normswap.checkpoints.checkpoint import build_model

        model = build_model(checkpoint, arch)
    architecture = arch or (checkpoint.record.architecture if checkpoint.record else None)
    return Opened(checkpoint, model, architecture, example_inputs(inputs, model, architecture))


def describe_file(opened: Opened) -> str:
    """Return what a file is, for a heading: payload, container, architecture, size."""
    checkpoint = opened.checkpoint
    parts = [checkpoint.payload, checkpoint.container, opened.architecture, describe_size(checkpoint.path)]
    return ", ".join(part for part in parts if part)


def describe_size(path: Path) -> str:
    """Return the size of a file in megabytes (10^6 bytes)."""
    return f"{path.stat().st_size / 1e6:.1f} MB"
