"""Where a command writes a changed file, and as what."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from normswap.checkpoints.io.atomic_files import resolve_checkpoint_path
from normswap.errors import CheckpointError

if TYPE_CHECKING:
    from normswap.checkpoints.formats.formats import Container
    from normswap.checkpoints.loading import Checkpoint

# Endings that name a file rather than a folder.
_FILE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors", ".pt2"}
_PROGRAM_SUFFIX = ".pt2"


def output_path(file: Path, output: Path | None, tag: str, *, as_program: bool = False) -> Path:
    """Return where a changed `file` goes: `model.WORD.pt` beside `model.pt` unless `output` says otherwise.

    Args:
        as_program: whether what is made of an exported program is one again, or its weights.
    """
    if output is not None:
        return output
    source = resolve_checkpoint_path(file)
    ending = (
        ".pth.tar" if source.name.endswith(".pth.tar") else source.suffix if source.suffix in _FILE_SUFFIXES else ""
    )
    written = ".pt" if ending == _PROGRAM_SUFFIX and not as_program else ending
    return source.with_name(f"{source.name.removesuffix(ending)}.{tag}{written}")


def is_folder_for(file: Path, target: Path) -> bool:
    """Say whether what is made of `file` at `target` is a folder too."""
    return resolve_checkpoint_path(file).is_dir() and target.suffix not in _FILE_SUFFIXES


def select_format(target: Path, source: "Checkpoint", *, named: bool, weights_only: bool | None = None) -> "Container":
    """Return the kind of the output: what its name says if it was `named`, else the input's own.

    Args:
        weights_only: whether all but the weights is left out; None for a command that has no such option.

    Raises:
        CheckpointError: that kind cannot hold what the file holds.
    """
    from normswap.checkpoints.formats.formats import FOLDERS, check_suffix

    check_suffix(target)
    if source.container == "exported program":
        _check_program(target, source)
    if source.program is not None:
        return "exported program"
    if target.suffix == ".safetensors":
        _check_safetensors(target, source, weights_only)
        return "safetensors"
    if source.container in FOLDERS and target.suffix not in _FILE_SUFFIXES:
        return source.container
    return "safetensors" if not named and source.container == "safetensors" else "torch zip"


def _check_program(target: Path, source: "Checkpoint") -> None:
    if source.program is not None and target.suffix != _PROGRAM_SUFFIX:
        raise CheckpointError(
            f"{target}: an exported program becomes one again: choose -o NAME{_PROGRAM_SUFFIX}, or take its weights alone "
            "with --arch"
        )
    if source.program is None and target.suffix == _PROGRAM_SUFFIX:
        raise CheckpointError(
            f"{target}: the weights alone are no exported program: choose -o NAME.pt, or convert the program with "
            "--trust and without --arch, if you trust where it comes from"
        )


def _check_safetensors(target: Path, source: "Checkpoint", weights_only: bool | None) -> None:
    if source.payload == "module":
        raise CheckpointError(f"{target}: safetensors holds no pickled module: choose -o NAME.pt")
    dropped = dropped_entries(source)
    if dropped and not weights_only:
        hint = "" if weights_only is None else ", or drop them with --weights-only"
        raise CheckpointError(
            f"{target}: safetensors holds tensors only, and this file holds {', '.join(dropped)} too: choose "
            f"-o NAME.pt{hint}"
        )


def dropped_entries(source: "Checkpoint") -> list[str]:
    """Return what a file holds beside its weights, by name."""
    from normswap.checkpoints.content.entries import drop_entry

    return sorted(map(str, drop_entry(source.content, source.contents.weights)))


def merge_notes(earlier_notes: Sequence[str], notes: Sequence[str], entries: Sequence[str | None]) -> list[str]:
    """Return the notes on the rest of a file after one more of its networks was converted.

    What was left at an earlier network and concerned a later one is said of that one only.

    Args:
        entries: the networks that are converted, about which there is nothing to note.
    """
    merged = dict(note.split(": ", 1) for note in earlier_notes)
    for name, what in (note.split(": ", 1) for note in notes):
        if name not in merged or not what.startswith("left as it is"):
            merged[name] = what
    return [f"{name}: {what}" for name, what in merged.items() if name not in entries]
