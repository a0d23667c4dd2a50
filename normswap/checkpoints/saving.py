"""Writes models and converted contents: atomically, then read back and compared bit for bit.

`converted_content` decides what a converted file contains.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from hashlib import file_digest, sha256
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normswap.baking.bake_plan import BakePlan
from normswap.checkpoints.architecture.registry import check_architecture, make_folder_relative
from normswap.checkpoints.content.entries import check_has_values, format_key_path, is_state_dict, replace_entries
from normswap.checkpoints.content.hf_trainer import trainer_files, write_sidecar_files
from normswap.checkpoints.content.key_prefixes import StoredNames, names_with_prefix
from normswap.checkpoints.content.state_dict import copy_metadata
from normswap.checkpoints.content.weight_loading import untie_tensors
from normswap.checkpoints.formats.formats import (
    FOLDERS,
    TENSORS_ONLY,
    FileFormat,
    add_record,
    check_suffix,
    decode,
    detect_format,
    encode,
    read_metadata,
    read_record_text,
)
from normswap.checkpoints.formats.pt2_archive import Program, digest_members, load_program, save_program
from normswap.checkpoints.io.atomic_files import atomic_write, atomic_write_folder, check_writable
from normswap.checkpoints.io.digest import contents_equal, fingerprint, safetensors_equals
from normswap.checkpoints.loading import BuiltModel
from normswap.checkpoints.reading import Checkpoint
from normswap.checkpoints.record import OriginalNorm, Record, Step
from normswap.checkpoints.source_copy import SourceFiles
from normswap.errors import CheckpointError, PlanError
from normswap.layers.gated_module import FunctionalSwitchNorm
from normswap.layers.in_place import GATE_PARAMETERS
from normswap.surgery.arguments import read_path, require_module, require_type
from normswap.surgery.graphs.exported_program import check_equivalent
from normswap.surgery.importance import gated_modules
from normswap.surgery.plan import SwapPlan, require_plan
from normswap.surgery.wrappers import unwrap
from normswap.text import first_line, join_fqn
from normswap.verification.equivalence import Verification


def save(
    model: nn.Module,
    path: str | Path,
    *,
    plan: SwapPlan | None = None,
    architecture: str | None = None,
    verification: Verification | None = None,
    payload: Literal["state dict", "module"] = "state dict",
    history: Sequence[Step] = (),
    baked: BakePlan | None = None,
) -> None:
    """Save a model so that `load` gives the same outputs, bit for bit, in a fresh process.

    The write is atomic, and replaces an existing file. A name that ends in `.safetensors` becomes a file of that
    format, any other name a torch file. The file contains a plain state dict, so
    `model.load_state_dict(torch.load(path), strict=True)` works.

    Args:
        model: any model, converted or not; of a wrapped model (DataParallel, ...) the model inside is saved.
        path: the file to write, in an existing folder.
        plan: the plan of a converted model: `Conversion.plan` or `Loaded.plan`.
        architecture: the name that builds the original model, `"timm:NAME[,key=value...]"`; without it `load` needs
            `architecture=`.
        verification: the result of `verify`, to be recorded in the file.
        payload: `"module"` pickles the whole object, which needs `load(..., trust=True)`.
        history: the earlier steps, `Loaded.history`; this step is added.
        baked: the bake plan of a model that was baked after the conversion: `Baked.plan`.

    Raises:
        CheckpointError: the folder is missing or not writable, the model cannot be pickled, or the file does not read
            back the same.
        ArchitectureError: `architecture` is not a valid name.
        PlanError: the plan is missing, or is not the plan of this model.
        ArgumentError: an argument is of a wrong type.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> conversion = normswap.convert(model)
        >>> normswap.save(conversion.model, "converted.pt", plan=conversion.plan)
        >>> normswap.load("converted.pt", architecture=model)
        Loaded(Sequential, 1 swap)
    """
    model = unwrap(require_module(model))
    target = Path(read_path(path, "path", "the name of a file"))
    if plan is not None:
        require_plan(plan)
    require_type(architecture, str | None, "architecture", "a name such as 'timm:resnet18' or 'path/file.py:function'")
    require_type(verification, Verification | None, "verification", "what verify returned")
    require_type(baked, BakePlan | None, "baked", "the plan that bake returned")
    check_suffix(target)
    file_format: FileFormat = "safetensors" if target.suffix == ".safetensors" else "torch zip"
    _check_plan(model, plan, baked)
    if architecture is not None:
        check_architecture(architecture)
    record = Record(
        payload=payload,
        architecture=architecture,
        plan=plan,
        verification=verification,
        history=(*history, Step.now("saved")),
        originals=originals(model, plan),
        baked=baked,
    )
    write_content(model if payload == "module" else model.state_dict(), target, file_format, record)


def update_content(checkpoint: Checkpoint, names: StoredNames, model: nn.Module) -> Any:
    """Return the content of a file with the current weights of the model that was built from it.

    Unchanged tensors are those of the file; copies of the weights and optimizer states are not changed.
    """
    stored = checkpoint.weights
    if isinstance(stored, nn.Module):
        return checkpoint.content
    state = stored.copy()  # type: ignore[attr-defined]
    for name, tensor in model.state_dict().items():
        key = names.stored.get(name)
        if key is not None and not torch.equal(stored[key], tensor.cpu()):
            state[key] = tensor.detach().cpu()
    copy_metadata(state, stored, names, {})
    return replace_entries(checkpoint.content, {checkpoint.contents.weights: state})


def next_record(checkpoint: Checkpoint, architecture: str | None, step: Step, file_format: FileFormat) -> Record:
    """Return the record of a file that was made from another one by a step that changed the function.

    Plan and history are kept; the verification is dropped, since it is about the earlier function.
    """
    architecture = make_folder_relative(architecture, checkpoint.path) if file_format in FOLDERS else architecture
    old = checkpoint.record or Record(
        payload=checkpoint.payload,
        architecture=architecture,
        entry=checkpoint.contents.entry or None,
    )
    return replace(
        old,
        architecture=old.architecture or architecture,
        verification=None,
        history=(*old.history, step),
        tied={},
        channels_last=(),
        fingerprint=None,
        normswap=step.normswap,
        torch=str(torch.__version__),
    )


def write_calibrated(
    checkpoint: Checkpoint, built: BuiltModel, path: Path, file_format: FileFormat, *, detail: str
) -> None:
    """Write a file again with the calibrated model that was built from it; all other entries are copied.

    Args:
        detail: the data of the calibration, for the history.

    Raises:
        CheckpointError: as `write_content`.
    """
    origin = checkpoint.origin
    step = Step.now("calibrated", source=checkpoint.path.name, sha256=compute_sha256(origin.copy), detail=detail)
    write_content(
        update_content(checkpoint, built.names, built.model),
        path,
        file_format,
        next_record(checkpoint, built.architecture, step, file_format),
        template=origin.copy if origin.copy.is_dir() else None,
        sidecar_files=trainer_files(origin.copy) if file_format in FOLDERS else {},
        source=origin,
        notes=read_notes(checkpoint),
    )


def calibration_notes(checkpoint: Checkpoint) -> list[str]:
    """Return what `write_calibrated` does with the other entries of a file, a line each."""
    entries = map(format_key_path, checkpoint.contents.others)
    notes = [f"{entry}: left as it is, calibrate it with entry={entry!r}" for entry in entries]
    if checkpoint.record is not None and checkpoint.record.verification is not None:
        notes.append("verification of the conversion: left out, the function in evaluation has changed")
    return notes


def originals(model: nn.Module | None, plan: SwapPlan | None) -> dict[str, OriginalNorm]:
    """Return the replaced norm of every swapped site of a converted model, by fqn; empty without a model."""
    layers = {} if model is None else gated_modules(model)
    return {
        swap.fqn: OriginalNorm(
            swap.class_name,
            vars(layers[swap.fqn]).get("eps"),
            vars(layers[swap.fqn]).get("momentum"),
            swap.kind == "frozen bn",
        )
        for swap in (plan.swaps if plan else ())
        if swap.fqn in layers
    }


def compute_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits; of a folder, that of its files' names and digests."""
    if not path.is_dir():
        with open(path, "rb") as file:
            return file_digest(file, "sha256").hexdigest()
    inside = sorted(entry for entry in path.rglob("*") if entry.is_file())
    lines = "".join(f"{entry.relative_to(path)} {compute_sha256(entry)}\n" for entry in inside)
    return sha256(lines.encode()).hexdigest()


def sha256_in_background(path: Path) -> "Future[str]":
    """Return a future of `compute_sha256(path)`, which is computed in a daemon thread.

    hashlib releases the GIL, so other work goes on; the process does not wait for the thread at its end.
    """
    future: Future[str] = Future()

    def run() -> None:
        """Compute the digest."""
        try:
            future.set_result(compute_sha256(path))
        except BaseException as error:  # noqa: BLE001 - raised by `future.result()`
            future.set_exception(error)

    Thread(target=run, daemon=True, name="normswap-sha256").start()
    return future


def write_content(
    content: Any,
    path: Path,
    file_format: FileFormat,
    record: Record,
    *,
    template: Path | None = None,
    sidecar_files: Mapping[str, Any] | None = None,
    overwrite: bool = True,
    source: SourceFiles | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a content and its record atomically, read them back and compare every bit.

    Args:
        content: a state dict, a module, or the dict of a training checkpoint.
        template: the folder whose other files (config, tokenizer) a new folder gets.
        sidecar_files: further files of a new folder, `SidecarFiles.files`.
        overwrite: replace an existing file.
        source: the file that the content was read from; it must not have changed when the new file appears.
        notes: further metadata of a safetensors file, from `read_notes`.

    Raises:
        CheckpointError: it cannot be written, the format cannot store it, or its source changed; an existing file is
            left unchanged.
    """
    check_writable(path, replace=overwrite, as_folder=file_format in FOLDERS)
    if file_format in FOLDERS and not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: a folder stores tensors by name, not a pickled module: use a name that ends in .pt"
        )
    try:
        check_has_values(content)
        digest = fingerprint(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if file_format in TENSORS_ONLY:
        if not is_state_dict(content) or not all(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError(
                f"{path}: safetensors stores tensors only, no pickled module, extra state or training checkpoint: use "
                "a name that ends in .pt"
            )
        content, tied, channels_last = untie_tensors(content)
        record = replace(record, tied=tied, channels_last=channels_last)
        notes = {**(notes or {}), **tied}  # as safetensors.torch.save_model stores them
    text = record.sealed(digest).to_json()
    writer = atomic_write_folder if file_format in FOLDERS else atomic_write
    with writer(path, before_commit=_make_source_check(source)) as temporary:
        try:
            encode(temporary, file_format, content, text, template=template, notes=notes)
            write_sidecar_files(temporary, sidecar_files or {})
        except Exception as error:
            # torch's writer replaces the message of the system by a position in the file.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            hint = ": save it as a state dict" if record.payload == "module" else ""
            raise CheckpointError(f"{path}: cannot be written ({first_line(cause)}){hint}") from error
        if not _reads_back_equal(temporary, file_format, content, text):
            raise CheckpointError(f"{path}: the new file does not read back the same: it was removed, check the disk")


def stored_as(names: StoredNames, plan: SwapPlan) -> dict[str, str]:
    """Return the names of swapped sites in a file, by fqn, if a library saved the model under other names.

    A common prefix of all names does not count as another name.
    """
    stored = {
        swap.fqn: names.stored_key(join_fqn(swap.fqn, GATE_PARAMETERS[0])).rpartition(".")[0] for swap in plan.swaps
    }
    plain = names_with_prefix(stored.values(), names.prefix).stored
    return {fqn: name for fqn, name in stored.items() if plain.get(fqn) != name}


def read_notes(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the metadata of a safetensors file, such as the names of shared tensors; empty for other formats."""
    return read_metadata(checkpoint.origin.copy) if checkpoint.file_format == "safetensors" else {}


def write_program(
    program: Program,
    original: ExportedProgram,
    path: Path,
    record: Record,
    *,
    inputs: Any,
    overwrite: bool = True,
    source: SourceFiles | None = None,
) -> float:
    """Write a converted program and its record atomically, read them back and compare with the original.

    Args:
        program: the converted program.
        original: the program that was converted.
        inputs: the example inputs for the comparison.
        overwrite, source: as for `write_content`.

    Returns:
        The relative L2 difference of outputs and buffers between the original and the program that was read back.

    Raises:
        CheckpointError: it cannot be written, its tensors do not read back the same, or its source changed.
        SwapError: the program that was read back computes another function; an existing file is left unchanged.
    """
    check_writable(path, replace=overwrite)
    with atomic_write(path, before_commit=_make_source_check(source)) as temporary:
        try:
            save_program(temporary, program)
        except Exception as error:
            raise CheckpointError(f"{path}: cannot be written ({first_line(error)})") from error
        sealed = record.sealed(digest_members(temporary)).to_json()
        add_record(temporary, "exported program", sealed)
        reloaded = load_program(temporary)
        kept = (
            read_record_text(temporary, detect_format(temporary)) == sealed
            and reloaded.extra_files == program.extra_files
        )
        if not kept or not contents_equal(program.program.state_dict, reloaded.program.state_dict):
            raise CheckpointError(f"{path}: the new file does not read back the same: it was removed, check the disk")
        return check_equivalent(original, reloaded.program, inputs)


def _make_source_check(source: SourceFiles | None) -> Callable[[], None]:
    return source.check_unchanged if source is not None else lambda: None


def _reads_back_equal(path: Path, file_format: FileFormat, content: Any, record: str) -> bool:
    """Whether the new file contains this content and this record, bit for bit."""
    if detect_format(path) != file_format or (read_record_text(path, file_format) or "").strip() != record:
        return False
    if file_format == "safetensors":
        return safetensors_equals(path, content)
    try:
        # Plain tensors are mapped from the file and released one by one: no second copy in memory.
        reloaded, mmap = decode(path, file_format, trust=False, mmap=True), file_format == "torch zip"
    except CheckpointError:
        reloaded, mmap = decode(path, file_format, trust=True), False
    return contents_equal(content, reloaded, release_pages=mmap)


def _check_plan(model: nn.Module, plan: SwapPlan | None, baked: BakePlan | None) -> None:
    """Refuse to write a model that cannot be built again from its plan."""
    actual = {
        name: (layer.gate, layer.branches)
        for name, layer in gated_modules(model).items()
        if "replaced" in vars(layer) or isinstance(layer, FunctionalSwitchNorm)
    }
    if plan is None and actual:
        raise PlanError(f"the model has {len(actual)} converted sites and no plan: pass plan=conversion.plan")
    if baked is not None and plan is None:
        raise PlanError("the model was baked after a conversion, whose plan is missing: pass plan=conversion.plan")
    replaced = {site.fqn for site in baked.sites if site.result != "kept"} if baked else set()
    planned = {s.fqn: (s.gate, s.branches) for s in plan.swaps if s.fqn not in replaced} if plan else {}
    differing = sorted(name for name in actual.keys() | planned.keys() if actual.get(name) != planned.get(name))
    if differing:
        raise PlanError(
            f"the plan is that of another model, they differ at {len(differing)} sites "
            f"({', '.join(differing[:3])}): pass the plan that convert returned"
        )
