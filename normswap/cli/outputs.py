"""Where a command writes a changed file, and as what."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from normswap.checkpoints.io.atomic_write import located
from normswap.errors import CheckpointError

if TYPE_CHECKING:
    from normswap.checkpoints.formats.formats import Container
    from normswap.checkpoints.loading import Checkpoint

# Endings that name a file rather than a folder.
_FILES = {".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors", ".pt2"}
_PROGRAM = ".pt2"


def target_of(file: Path, output: Path | None, word: str, *, as_program: bool = False) -> Path:
    """Return where a changed `file` goes: `model.WORD.pt` beside `model.pt` unless `output` says otherwise.

    Args:
        as_program: whether what is made of an exported program is one again, or its weights.
    """
    if output is not None:
        return output
    source = located(file)
    ending = ".pth.tar" if source.name.endswith(".pth.tar") else source.suffix if source.suffix in _FILES else ""
    written = ".pt" if ending == _PROGRAM and not as_program else ending
    return source.with_name(f"{source.name.removesuffix(ending)}.{word}{written}")


def is_folder_for(file: Path, target: Path) -> bool:
    """Say whether what is made of `file` at `target` is a folder too."""
    return located(file).is_dir() and target.suffix not in _FILES


def container_of(target: Path, source: "Checkpoint", *, named: bool, weights_only: bool | None = None) -> "Container":
    """Return the kind of the output: what its name says if it was `named`, else the input's own.

    Args:
        weights_only: whether all but the weights is left out; None for a command that has no such option.

    Raises:
        CheckpointError: that kind cannot hold what the file holds.
    """
    from normswap.checkpoints.formats.formats import FOLDERS, check_ending

    check_ending(target)
    if source.container == "exported program":
        _check_program(target, source)
    if source.program is not None:
        return "exported program"
    if target.suffix == ".safetensors":
        _check_safetensors(target, source, weights_only)
        return "safetensors"
    if source.container in FOLDERS and target.suffix not in _FILES:
        return source.container
    return "safetensors" if not named and source.container == "safetensors" else "torch zip"


def _check_program(target: Path, source: "Checkpoint") -> None:
    if source.program is not None and target.suffix != _PROGRAM:
        raise CheckpointError(
            f"{target}: an exported program becomes one again: choose -o NAME{_PROGRAM}, or take its weights alone "
            "with --arch"
        )
    if source.program is None and target.suffix == _PROGRAM:
        raise CheckpointError(
            f"{target}: the weights alone are no exported program: choose -o NAME.pt, or convert the program with "
            "--trust and without --arch, if you trust where it comes from"
        )


def _check_safetensors(target: Path, source: "Checkpoint", weights_only: bool | None) -> None:
    if source.payload == "module":
        raise CheckpointError(f"{target}: safetensors holds no pickled module: choose -o NAME.pt")
    dropped = dropped_entries(source)
    if dropped and not weights_only:
        way_out = "" if weights_only is None else ", or drop them with --weights-only"
        raise CheckpointError(
            f"{target}: safetensors holds tensors only, and this file holds {', '.join(dropped)} too: choose "
            f"-o NAME.pt{way_out}"
        )


def dropped_entries(source: "Checkpoint") -> list[str]:
    """Return what a file holds beside its weights, by name."""
    from normswap.checkpoints.content.entries import without

    return sorted(map(str, without(source.content, source.contents.weights)))


def merged_notes(before: Sequence[str], notes: Sequence[str], entries: Sequence[str | None]) -> list[str]:
    """Return the notes on the rest of a file after one more of its networks was converted.

    What was left at an earlier network and concerned a later one is said of that one only.

    Args:
        entries: the networks that are converted, about which there is nothing to note.
    """
    said = dict(note.split(": ", 1) for note in before)
    for name, what in (note.split(": ", 1) for note in notes):
        if name not in said or not what.startswith("left as it is"):
            said[name] = what
    return [f"{name}: {what}" for name, what in said.items() if name not in entries]
