"""Opening what a command was given: the file, its model, an example input."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

from normswap.cli.options import InputSpec, example_inputs
from normswap.cli.progress import stage

if TYPE_CHECKING:
    from torch import nn

    from normswap.checkpoints.loading import BuiltModel, Checkpoint, CheckpointHeader


@dataclass(frozen=True)
class OpenedModel:
    """A file's content, the model built for it, and an example input or None."""

    checkpoint: "Checkpoint"
    built: "BuiltModel"
    inputs: Any

    @property
    def model(self) -> "nn.Module":
        """The model in the file."""
        return self.built.model

    @property
    def architecture(self) -> str | None:
        """What builds the model, where a name says so."""
        return self.built.architecture


def read_header(path: Path, *, output: Path | None = None) -> "CheckpointHeader":
    """Read the record in a file, and nothing else of it, under the eyes of the user.

    Args:
        output: what will be written: the private copy that the file is read from goes beside it, where there must be
            room for as much; without an output it goes to the folder for temporary files (TMPDIR).

    Raises:
        CheckpointError: no checkpoint, or damaged.
    """
    with stage("starting"):
        from normswap.checkpoints import loading

        return loading.read_header(path, folder=Path(gettempdir()) if output is None else output.absolute().parent)


def read_file(
    source: "Path | CheckpointHeader", *, trust: bool, entry: str | None = None, arch: str | None = None
) -> "Checkpoint":
    """Read a file, whose header may be known, under the eyes of the user, its tensors as they are used.

    Args:
        arch: what the user says that the tensors belong to; of an exported program it takes the weights alone.

    Raises:
        CheckpointError: as `normswap.load`.
    """
    header = read_header(source) if isinstance(source, Path) else source
    with stage(f"reading {header.path.name}"):
        from normswap.checkpoints.loading import read_checkpoint

        trust = trust and not header.loads_weights_only(arch)
        return read_checkpoint(header, trust=trust, entry=entry, mmap=True)


def open_model(checkpoint: "Checkpoint", *, arch: str | None, inputs: Sequence[InputSpec], trust: bool) -> OpenedModel:
    """Build the model in a file and an example input for it. `arch` wins over what the file says.

    Raises:
        ArchitectureError, PlanError: as `normswap.load`.
    """
    with stage("building the model"):
        from normswap.checkpoints.loading import build_model

        built = build_model(checkpoint, arch, trust=trust)
    return OpenedModel(checkpoint, built, _make_inputs(checkpoint, built, inputs))


def _make_inputs(checkpoint: "Checkpoint", built: "BuiltModel", specs: Sequence[InputSpec]) -> Any:
    """What the user asked for, what an exported program carries, or what the architecture tells."""
    if checkpoint.program is not None and not specs:
        from normswap.surgery.graphs.exported_program import program_inputs

        return program_inputs(checkpoint.program.program)
    return example_inputs(specs, built.model, built.architecture)


def describe_content(checkpoint: "Checkpoint", architecture: str | None) -> str:
    """Return what a content is: kind, container, architecture, size."""
    parts = [
        checkpoint.contents.kind,
        _describe_entry(checkpoint),
        checkpoint.container,
        architecture,
        describe_size(checkpoint.path),
    ]
    return ", ".join(part for part in parts if part)


def _describe_entry(checkpoint: "Checkpoint") -> str | None:
    """Which weights are meant, if the file holds several."""
    from normswap.checkpoints.content.entries import format_key_path

    contents = checkpoint.contents
    if not contents.others:
        return None
    return f"entry {format_key_path(contents.weights)} (not {', '.join(map(format_key_path, contents.others))})"


def describe_size(path: Path) -> str:
    """Return the size of a file, or of all in a folder, in megabytes (10^6 bytes)."""
    return f"{get_size(path) / 1e6:.1f} MB"


def get_size(path: Path) -> int:
    """Return the bytes in a file, or in all files of a folder."""
    files = [entry for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
