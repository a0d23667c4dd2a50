"""revert_file: a converted file with the old norms, whose tensors are those of the original bit for bit."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from normswap.checkpoints.content.entries import (
    Contents,
    find_average_lists,
    format_key_path,
    get_entry,
    replace_entries,
)
from normswap.checkpoints.content.gate_removal import (
    SwapFinder,
    changed_gates,
    optimizers_with_gates,
    remove_gates_from_optimizer,
    remove_gates_from_scheduler,
    remove_gates_from_state,
    schedules_groups,
)
from normswap.checkpoints.content.hf_trainer import trainer_files
from normswap.checkpoints.derived.baked_file import Progress, refuse_program_name
from normswap.checkpoints.file_output import check_output, copy_folder, output_path, select_format
from normswap.checkpoints.formats.formats import FOLDERS
from normswap.checkpoints.io.atomic_files import check_readable
from normswap.checkpoints.loading import Architecture, open_model
from normswap.checkpoints.reading import Checkpoint, file_size, read_checkpoint, read_header
from normswap.checkpoints.record import Record, Step
from normswap.checkpoints.saving import compute_sha256, read_notes, write_content
from normswap.errors import ArchitectureError, CheckpointError, NothingToDo
from normswap.surgery.arguments import read_path
from normswap.surgery.conversion import revert
from normswap.surgery.importance import sites_with_changed_weights
from normswap.surgery.module_tree import copy_model
from normswap.surgery.plan import Swap, list_names
from normswap.text import pluralize, printable_as
from normswap.verification.distance import measure_distance


@printable_as("reverted_file")
@dataclass(frozen=True)
class RevertedFile:
    """The result of `revert_file`.

    Attributes:
        file: the file that was read.
        output: the file that was written.
        sites: the number of sites that have their old norm again.
        changed: the sites whose importance weights differed from the old norm, so that the function has changed.
        relative_error: the relative L2 error of the outputs against the converted network; 0 if no weights differed,
            None if it could not be measured.
        notes: what happened to the other entries of the file, a line each.
        bytes: the size of the output.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> conversion = normswap.convert(model)
        >>> normswap.save(conversion.model, "sn.pt", plan=conversion.plan)
        >>> result = normswap.revert_file("sn.pt", "bn.pt")
        >>> result.sites, result.changed, result.relative_error
        (1, (), 0.0)
    """

    file: Path
    output: Path
    sites: int
    changed: tuple[str, ...]
    relative_error: float | None
    notes: tuple[str, ...]
    bytes: int

    __module__ = "normswap"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, the JSON of `normswap revert`."""
        return {**asdict(self), "file": str(self.file), "output": str(self.output)}


def revert_file(
    path: str | Path,
    output: str | Path | None = None,
    *,
    architecture: Architecture | None = None,
    example_inputs: Any = None,
    discard: bool = False,
    trust: bool = False,
    overwrite: bool = False,
    progress: Progress = nullcontext,
) -> RevertedFile:
    """Write a converted file with the old norms, as the command `normswap revert` does.

    While no gate has moved, the tensors of the new file are those of the original, bit for bit. Copies such as EMA
    weights lose their gates too, optimizers their group of gates, and schedulers its entry.

    Args:
        path: a converted file.
        output: the file to write. Default: `model.reverted.pt` next to `model.pt`, in the format of the source.
        architecture, trust: as for `load`; the network is built only to measure an error.
        example_inputs: as for `bake_file`, for this measurement.
        discard: revert also if gates have moved, which changes the function.
        overwrite: replace an existing output file.
        progress: called with the name of each stage; returns a context manager for the stage.

    Returns:
        `RevertedFile`: the output path, the sites that changed, and the error of the outputs.

    Raises:
        NothingToDo: the file is not converted, or gates have moved and `discard` is not set.
        CheckpointError: the file cannot be read or reverted, or the output cannot be written.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> conversion = normswap.convert(model)
        >>> normswap.save(conversion.model, "sn.pt", plan=conversion.plan)
        >>> normswap.revert_file("sn.pt").output.name
        'sn.reverted.pt'
        >>> [*torch.load("sn.reverted.pt")] == [*model.state_dict()]
        True
    """
    file = Path(read_path(path, "path", "the name of a file or a folder"))
    named = None if output is None else read_path(output, "output", "the name of a file")
    target = output_path(file, named, "reverted")
    check_readable(file)
    check_output(file, target, overwrite=overwrite)
    refuse_program_name(target)
    with progress(f"reading {file.name}"):
        header = read_header(file, folder=copy_folder(target))
        swaps = _swaps_of(header.path, header.record)
        entry = min(header.record.entries) if header.record and len(header.record.entries) > 1 else None
        checkpoint = read_checkpoint(header, entry=entry, trust=trust)
    finder = SwapFinder(swaps, _stored_names(header.record))
    file_format = select_format(target, checkpoint, named=output is not None)
    changed = _changed_sites(checkpoint, finder)
    error: float | None = 0.0
    if changed:
        with progress("measuring the change of the outputs"):
            error = _measure_error(checkpoint, architecture, example_inputs, trust=trust)
        if not discard:
            size = "" if error is None else f" (the outputs by {error:.1e}, relative L2)"
            raise NothingToDo(
                f"{file}: the importance weights of {pluralize(len(changed), 'site')} differ from the old norm "
                f"({list_names(changed)}): reverting changes the function{size}: pass discard=True to revert anyway"
            )
    content, notes = _revert_content(checkpoint, finder)
    with progress(f"writing {target.name}"):
        write_content(
            content,
            target,
            file_format,
            _reverted_record(checkpoint),
            template=checkpoint.origin.copy if checkpoint.origin.copy.is_dir() else None,
            sidecar_files=trainer_files(checkpoint.origin.copy) if file_format in FOLDERS else {},
            overwrite=overwrite,
            source=checkpoint.origin,
            notes=read_notes(checkpoint),
        )
    return RevertedFile(file, target, len(swaps), tuple(changed), error, tuple(notes), file_size(target))


def _swaps_of(path: Path, record: Record | None) -> tuple[Swap, ...]:
    """The swaps of all networks in a file, if they can be undone."""
    if record is not None and record.baked is not None:
        raise CheckpointError(f"{path}: it was baked, which cannot be undone: revert the converted file")
    plans = [] if record is None else [record.plan, *(network.plan for network in record.networks.values())]
    swaps = tuple(swap for plan in plans if plan is not None for swap in plan.swaps)
    if not swaps:
        raise NothingToDo(f"{path}: nothing to revert, it is not converted")
    started = [swap.fqn for swap in swaps if swap.start is not None]
    if started:
        raise CheckpointError(
            f"{path}: {pluralize(len(started), 'site')} ({list_names(started)}) started without `bn` and kept no "
            "running statistics, so Batch Normalization cannot be put back: use the original file"
        )
    if record is not None and record.payload == "program":
        raise CheckpointError(f"{path}: an exported program cannot be reverted: use the original program")
    return swaps


def _stored_names(record: Record | None) -> dict[str, str]:
    parts = [] if record is None else [record.stored_as, *(each.stored_as for each in record.networks.values())]
    return {fqn: name for part in parts for fqn, name in part.items()}


def _changed_sites(checkpoint: Checkpoint, finder: SwapFinder) -> list[str]:
    """The sites whose importance weights differ from the old norm, in the weights or in a copy of them."""
    contents = checkpoint.contents
    changed: dict[str, None] = {}
    for key_path in (contents.weights, *contents.others):
        value = get_entry(checkpoint.content, key_path)
        found = sites_with_changed_weights(value) if isinstance(value, nn.Module) else changed_gates(value, finder.find)
        changed |= dict.fromkeys(found)
    return [*changed]


def _measure_error(
    checkpoint: Checkpoint, architecture: Architecture | None, example_inputs: Any, *, trust: bool
) -> float | None:
    """The relative error of the reverted network, None if the network or the size of its input is unknown."""
    try:
        opened = open_model(checkpoint, architecture, inputs=example_inputs, trust=trust)
    except ArchitectureError:
        return None
    if opened.inputs is None:
        return None
    reverted = revert(copy_model(opened.model), discard=True)
    return measure_distance(opened.model, reverted, [opened.inputs]).relative_error


def _revert_content(checkpoint: Checkpoint, finder: SwapFinder) -> tuple[Any, list[str]]:
    """The content without gates, and a note on each other entry that changed or may no longer fit."""
    content, contents = checkpoint.content, checkpoint.contents
    values: dict[Any, Any] = {}
    notes = []
    for key_path in (contents.weights, *contents.others):
        value = get_entry(content, key_path)
        if isinstance(value, nn.Module):
            values[key_path] = revert(copy_model(value), discard=True)
        else:
            values[key_path] = remove_gates_from_state(value, finder.find)
            if key_path != contents.weights and len(values[key_path]) != len(value):
                notes.append(f"{format_key_path(key_path)}: reverted too")
    for key_path in optimizers_with_gates(content, contents.optimizers, get_entry):
        groups = get_entry(content, key_path)["param_groups"]
        values[key_path] = remove_gates_from_optimizer(get_entry(content, key_path))
        notes.append(f"{format_key_path(key_path)}: gates removed, the state of all other parameters is kept")
        for scheduler in contents.schedulers:
            state = get_entry(content, scheduler)
            if scheduler not in values and schedules_groups(state, groups):
                values[scheduler] = remove_gates_from_scheduler(state, groups)
                notes.append(f"{format_key_path(scheduler)}: the entry of the gates removed")
    return replace_entries(content, values), notes + _unknown_notes(content, contents)


def _unknown_notes(content: Any, contents: Contents) -> list[str]:
    known = {*contents.optimizers, *contents.schedulers, contents.weights, *contents.others}
    return [
        f"{format_key_path(key_path)}: left as it is, it may contain gates: create it again from the weights"
        for key_path in find_average_lists(content, known)
    ]


def _reverted_record(checkpoint: Checkpoint) -> Record:
    old = checkpoint.record
    assert isinstance(old, Record)
    step = Step.now("reverted", source=checkpoint.path.name, sha256=compute_sha256(checkpoint.origin.copy))
    return Record(
        payload=checkpoint.payload, architecture=old.architecture, entry=old.entry, history=(*old.history, step)
    )
