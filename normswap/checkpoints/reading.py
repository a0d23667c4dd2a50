"""Reads a checkpoint file: its record, its content, and the key paths of the weights in it.

Nothing is built here: `loading` builds the model. All functions read a private copy of the file (see `source_copy`).
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normswap.checkpoints.content.entries import (
    Contents,
    check_has_values,
    drop_entry,
    format_key_path,
    get_entry,
    read_contents,
    replace_entries,
)
from normswap.checkpoints.content.key_prefixes import match_names
from normswap.checkpoints.content.weight_loading import retie_tensors
from normswap.checkpoints.formats.formats import (
    TENSORS_ONLY,
    FileFormat,
    decode,
    detect_format,
    read_record_text,
    read_tied_names,
)
from normswap.checkpoints.formats.pt2_archive import Program, digest_members
from normswap.checkpoints.io.digest import fingerprint
from normswap.checkpoints.record import Payload, Record, check_fingerprint
from normswap.checkpoints.source_copy import SourceFiles, open_source
from normswap.errors import CheckpointError, SwapError
from normswap.layers.gating import importance_weights as normalize_gate
from normswap.layers.in_place import GATE_PARAMETERS
from normswap.surgery.graphs.exported_program import program_module
from normswap.surgery.importance import SiteWeights, importance_weights
from normswap.surgery.plan import SwapPlan
from normswap.text import join_fqn


@dataclass(frozen=True)
class CheckpointHeader:
    """A file whose archive has been checked, and its record; tensors and pickle are not read yet."""

    origin: SourceFiles
    file_format: FileFormat
    text: str | None
    record: Record | None

    @property
    def path(self) -> Path:
        """The file as the user names it."""
        return self.origin.path

    def loads_weights_only(self, architecture: object) -> bool:
        """Return whether only the weights of an exported program are used, since an architecture is given."""
        return self.file_format == "exported program" and architecture is not None


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file, the key paths of the weights in it, and the record if normswap wrote the file.

    The content of a trusted exported program is its module; `program` is the program itself.
    """

    origin: SourceFiles
    file_format: FileFormat
    content: Any
    contents: Contents
    record: Record | None
    program: Program | None = None

    @property
    def path(self) -> Path:
        """The file as the user names it; its bytes are read from `origin.copy`."""
        return self.origin.path

    @property
    def weights(self) -> Mapping[str, Tensor] | nn.Module:
        """The selected state dict or pickled module."""
        return get_entry(self.content, self.contents.weights)  # type: ignore[no-any-return]

    @property
    def payload(self) -> Payload:
        """The kind of object that contains the tensors: a state dict, a module or a program."""
        if self.program is not None:
            return "program"
        return "module" if isinstance(self.weights, nn.Module) else "state dict"

    def refuse_baked(self, verb: str) -> None:
        """Refuse the file of a baked network, whose constants no longer follow the statistics.

        Raises:
            CheckpointError: the network was baked.
        """
        if self.record is not None and self.record.baked is not None:
            raise CheckpointError(f"{self.path}: it was baked: {verb} the converted file, then bake that")

    @property
    def other_entries(self) -> list[str]:
        """The names of all entries except the weights."""
        return sorted(map(str, drop_entry(self.content, self.contents.weights)))

    def describe(self, architecture: str | None) -> str:
        """Return the kind of content, the selected entry, the format, an architecture and the size, for a heading."""
        others = ", ".join(map(format_key_path, self.contents.others))
        parts = [
            self.contents.kind,
            f"entry {format_key_path(self.contents.weights)} (not {others})" if others else None,
            self.file_format,
            architecture,
            describe_size(self.path),
        ]
        return ", ".join(part for part in parts if part)


def file_size(path: Path) -> int:
    """Return the number of bytes in a file, or in all files of a folder."""
    files = [entry for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def describe_size(path: Path) -> str:
    """Return the size of a file or folder in megabytes (10^6 bytes)."""
    return f"{file_size(path) / 1e6:.1f} MB"


def read_header(path: Path, *, folder: Path | None = None) -> CheckpointHeader:
    """Check the archive of a file and read its record, but neither its tensors nor its pickle.

    Args:
        folder: where the private copy of the file is created; None keeps it in memory.

    Raises:
        CheckpointError: the file is not a checkpoint, or it or its record is damaged.
    """
    origin = open_source(path, folder=folder)
    with origin.reading():
        file_format = detect_format(origin.copy)
        text = read_record_text(origin.copy, file_format)
    try:
        return CheckpointHeader(origin, file_format, text, None if text is None else Record.from_json(text))
    except CheckpointError as error:
        raise CheckpointError(f"{origin.path}: {error}") from error


def read_record(path: Path) -> Record | None:
    """Return the record in a file, or None if it has none; raises as `read_header`."""
    return read_header(path).record


def read_checkpoint(
    source: Path | CheckpointHeader, *, entry: str | None = None, trust: bool = False, mmap: bool = False
) -> Checkpoint:
    """Return the content of a file, the key paths of the weights in it, and its record.

    Args:
        source: the file, or its header, which is not read again; then the caller has to check at the end that the file
            is the same (`origin.check_unchanged()`).
        entry: which of several sets of weights to use.
        trust: unpickle objects that run code.
        mmap: map the tensors from the private copy instead of reading them, which needs less memory if the copy is on
            a disk.

    Raises:
        CheckpointError: as `load`.
    """
    if isinstance(source, Path):
        header = read_header(source)
        checkpoint = read_checkpoint(header, entry=entry, trust=trust, mmap=mmap)
        header.origin.check_unchanged()
        header.origin.close()
        return checkpoint
    origin, record = source.origin, source.record
    content = read_content(source, trust=trust, mmap=mmap)
    program = content if isinstance(content, Program) else None
    with prefix_errors(origin.path):
        if program is not None:
            content = program_module(program.program)
        return _checkpoint(origin, source.file_format, content, record, entry, program)


def read_content(header: CheckpointHeader, *, trust: bool = False, mmap: bool = False) -> Any:
    """Return the object in a file, of any kind, after comparing it with the fingerprint in the record.

    Args:
        trust, mmap: as for `read_checkpoint`.

    Raises:
        CheckpointError: as `load`.
    """
    origin, file_format, record = header.origin, header.file_format, header.record
    with origin.reading():
        content = decode(origin.copy, file_format, trust=trust, mmap=mmap)
        ties = {} if record is not None else read_tied_names(origin.copy, file_format)
    if file_format in TENSORS_ONLY:
        tied, channels_last = (ties, ()) if record is None else (record.tied, record.channels_last)
        content = {**content, **retie_tensors(content, tied, channels_last)}
    if header.text is not None:
        is_program = file_format == "exported program"
        with prefix_errors(origin.path):
            check_fingerprint(header.text, digest_members(origin.copy) if is_program else fingerprint(content))
    return content


@contextmanager
def prefix_errors(path: Path) -> Iterator[None]:
    """Put the name of the file before the message of an error about its content."""
    try:
        yield
    except (CheckpointError, SwapError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def select_entry(checkpoint: Checkpoint, content: Any, record: Record, entry: str) -> Checkpoint:
    """Return a checkpoint with changed content and record, and with the weights at `entry` selected.

    Raises:
        CheckpointError: there are no weights at `entry`.
    """
    with prefix_errors(checkpoint.path):
        return _checkpoint(checkpoint.origin, checkpoint.file_format, content, record, entry, None)


def _checkpoint(
    origin: SourceFiles,
    file_format: FileFormat,
    content: Any,
    record: Record | None,
    entry: str | None,
    program: Program | None,
) -> Checkpoint:
    if record is not None and entry is None:
        if len(record.entries) > 1:
            raise CheckpointError(
                f"contains several converted models ({', '.join(map(repr, record.entries))}): choose one, such as "
                f"entry={record.entries[0]!r}"
            )
        entry = record.entry
    contents = read_contents(content, entry=entry)
    weights = get_entry(content, contents.weights)
    if not isinstance(weights, nn.Module):
        content = replace_entries(content, {contents.weights: _to_ordered_state_dict(weights)})
    if record is not None:
        record = _select_record(record, contents, weights)
    return Checkpoint(origin, file_format, content, contents, record, program)


def _select_record(record: Record, contents: Contents, weights: Any) -> Record:
    """The part of a record about the selected weights: a listed network, a copy of one, or neither."""
    if contents.entry in record.entries or (record.plan is None and not record.networks):
        return record.for_entry(contents.entry) if contents.entry in record.entries else record
    for entry in record.entries:
        seen = record.for_entry(entry)
        if seen.plan is not None and _has_planned_gates(seen.plan, weights, contents.prefix):
            return seen
    return record.for_entry(contents.entry)


def _has_planned_gates(plan: SwapPlan, weights: Any, prefix: str) -> bool:
    """Whether weights contain the gates of a plan and norms of its sizes, as far as a state dict shows."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    wanted = {join_fqn(swap.fqn, GATE_PARAMETERS[0]): swap for swap in plan.swaps if "[" not in swap.fqn}
    names = match_names(state, wanted, prefix=prefix)
    for name, swap in wanted.items():
        key = names.stored.get(name)
        if key is None or tuple(state[key].shape) != (len(swap.branches),):
            return False
        siblings = (state.get(f"{key.rpartition('.')[0]}.{last}") for last in ("weight", "running_mean"))
        if any(tensor is not None and tensor.numel() != swap.num_features for tensor in siblings):
            return False
    return True


def _to_ordered_state_dict(weights: Mapping[str, Tensor]) -> "OrderedDict[str, Tensor]":
    """The weights as an `OrderedDict` with torch's `_metadata`; tensors without values are refused."""
    check_has_values(weights)
    state = OrderedDict(weights)
    if hasattr(weights, "_metadata"):
        state._metadata = weights._metadata  # type: ignore[attr-defined]
    return state


def stored_importance_weights(checkpoint: Checkpoint) -> dict[str, SiteWeights]:
    """Return the importance weights in a checkpoint by fqn, without building the model; empty if not converted.

    Raises:
        CheckpointError: their shapes do not fit the plan in the file.
    """
    weights, record = checkpoint.weights, checkpoint.record
    if checkpoint.payload == "module":
        return importance_weights(weights)  # type: ignore[arg-type]
    if isinstance(weights, nn.Module):  # of an exported program, whose gates are ordinary parameters
        weights = weights.state_dict()
    swaps = record.plan.swaps if record and record.plan else ()
    wanted = [join_fqn(swap.fqn, name) for swap in swaps for name in GATE_PARAMETERS]
    names = match_names(weights, wanted, prefix=checkpoint.contents.prefix)
    found = {}
    for swap in swaps:
        module = record.stored_as.get(swap.fqn) if record else None
        keys = [
            join_fqn(module, name) if module else names.stored.get(join_fqn(swap.fqn, name)) for name in GATE_PARAMETERS
        ]
        points = [weights[key] for key in keys if key is not None and key in weights]
        if points:  # a site in a plain Python list is in no state dict
            if [tuple(point.shape) for point in points] != [(len(swap.branches),)] * len(GATE_PARAMETERS):
                raise CheckpointError(f"{checkpoint.path}: the importance weights of {swap.fqn!r} do not fit its plan")
            mean, var = (
                dict(zip(swap.branches, normalize_gate(point, swap.gate).tolist(), strict=True)) for point in points
            )
            found[swap.fqn] = SiteWeights(mean, var)
    return found
