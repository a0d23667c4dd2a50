"""save, and the content of a converted file: written whole or not at all, read back and compared bit for bit.

What becomes of everything that the source holds, `carrying` says.
"""

import os
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

from normswap.checkpoints.architecture.registry import check_architecture, make_folder_relative
from normswap.checkpoints.content.entries import check_has_values, is_state_dict, replace_entries
from normswap.checkpoints.content.hf_trainer import write_sidecar_files
from normswap.checkpoints.content.key_prefixes import StoredNames, names_with_prefix
from normswap.checkpoints.content.state_dict import copy_metadata
from normswap.checkpoints.content.weight_loading import untie_tensors
from normswap.checkpoints.formats.formats import (
    FOLDERS,
    TENSORS_ONLY,
    Container,
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
from normswap.checkpoints.reading import Checkpoint
from normswap.checkpoints.record import OriginalNorm, Record, Step
from normswap.checkpoints.source_copy import SourceFiles
from normswap.errors import CheckpointError, PlanError
from normswap.layers.in_place import GATE_PARAMETERS
from normswap.layers.switch_norm import FunctionalSwitchNorm
from normswap.surgery.arguments import require_module, require_type
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
) -> None:
    """Save a model so that `load` gives the same outputs, bit for bit, in a fresh process.

    The file appears whole or not at all; an existing one is replaced. Names that end in `.safetensors` become that,
    all others are torch files. The tensors stand alone: `model.load_state_dict(torch.load(path), strict=True)` works.

    Args:
        model: converted or not; of a wrapped one the model inside is saved.
        path: the file to write, in an existing folder.
        plan: of a converted model, `Conversion.plan` or `Loaded.plan`.
        architecture: what builds the original model, `"timm:NAME[,key=value...]"`; without it `load` must be told.
        verification: the proof, to travel with the model.
        payload: `"module"` pickles the whole object, which only `load(..., trust=True)` opens.
        history: what was done before, `Loaded.history`; this step is added to it.

    Raises:
        CheckpointError: the folder is missing or not writable, the model cannot be pickled, or what was read back
            differs from what was written.
        ArchitectureError: `architecture` is not such a name.
        PlanError: the plan is missing or not the one that the model was converted with.
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
    require_type(path, str | os.PathLike, "path", "the name of a file")
    if plan is not None:
        require_plan(plan)
    require_type(architecture, str | None, "architecture", "a name such as 'timm:resnet18' or 'path/file.py:function'")
    require_type(verification, Verification | None, "verification", "what verify returned")
    target = Path(path)
    check_suffix(target)
    container: Container = "safetensors" if target.suffix == ".safetensors" else "torch zip"
    _check_plan(model, plan)
    if architecture is not None:
        check_architecture(architecture)
    record = Record(
        payload=payload,
        architecture=architecture,
        plan=plan,
        verification=verification,
        history=(*history, Step.now("saved")),
        originals=originals(model, plan),
    )
    write_content(model if payload == "module" else model.state_dict(), target, container, record)


def update_content(checkpoint: Checkpoint, names: StoredNames, model: nn.Module) -> Any:
    """Return the content of a file with its weights as they are now in the model that was built from it.

    What did not change is the file's own tensor; copies of the weights and optimizer states stay as they were.
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


def next_record(checkpoint: Checkpoint, architecture: str | None, step: Step, container: Container) -> Record:
    """Return the record of a file made from another one by a step that changed the function.

    Plan and history go on; a proof that it is the same function does not.
    """
    architecture = make_folder_relative(architecture, checkpoint.path) if container in FOLDERS else architecture
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


def originals(model: nn.Module | None, plan: SwapPlan | None) -> dict[str, OriginalNorm]:
    """Return what each swapped site of a converted model was, by fqn; nothing where there is no model."""
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
    """Return what becomes `compute_sha256(path)`: the digest leaves Python to others, and other work need not wait for it.

    Nothing waits for it at the end of the process either.
    """
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(compute_sha256(path))
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            future.set_exception(error)

    Thread(target=run, daemon=True, name="normswap-sha256").start()
    return future


def write_content(
    content: Any,
    path: Path,
    container: Container,
    record: Record,
    *,
    template: Path | None = None,
    sidecar_files: Mapping[str, Any] | None = None,
    overwrite: bool = True,
    source: SourceFiles | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a content and its record whole or not at all, read it back and compare every bit.

    Args:
        content: a state dict, a module, or what a training checkpoint holds.
        like: the folder that a new folder takes after.
        beside: further files of a new folder, `Beside.files`.
        source: what the content was read from, which must not have changed when the new file appears.
        notes: what else a safetensors file is to note, `read_notes` its source.

    Raises:
        CheckpointError: it cannot be written, the container cannot hold it, or its source changed; an existing file is
            as it was.
    """
    check_writable(path, replace=overwrite, as_folder=container in FOLDERS)
    if container in FOLDERS and not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: a folder holds tensors by name, not a pickled module: use a name in .pt")
    try:
        check_has_values(content)
        digest = fingerprint(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if container in TENSORS_ONLY:
        if not is_state_dict(content) or not all(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError(
                f"{path}: safetensors holds tensors only, not a pickled module, extra state or a training checkpoint: "
                "use a name in .pt"
            )
        content, tied, channels_last = untie_tensors(content)
        record = replace(record, tied=tied, channels_last=channels_last)
        notes = {**(notes or {}), **tied}  # as safetensors.torch.save_model notes them
    text = record.sealed(digest).to_json()
    writer = atomic_write_folder if container in FOLDERS else atomic_write
    with writer(path, before_commit=_make_source_check(source)) as temporary:
        try:
            encode(temporary, container, content, text, template=template, notes=notes)
            write_sidecar_files(temporary, sidecar_files or {})
        except Exception as error:
            # torch's writer hides the system's own words behind a position in the file.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            hint = ": save it as a state dict" if record.payload == "module" else ""
            raise CheckpointError(f"{path}: cannot be written ({first_line(cause)}){hint}") from error
        if not _reads_back_equal(temporary, container, content, text):
            raise CheckpointError(
                f"{path}: what was read back differs from what was written: nothing was kept, look at the disk"
            )


def stored_as(names: StoredNames, plan: SwapPlan) -> dict[str, str]:
    """Return the names of swapped sites in a file, by fqn, if a library saved the model under other names than its own.

    A prefix before all names counts for nothing.
    """
    stored = {
        swap.fqn: names.stored_key(join_fqn(swap.fqn, GATE_PARAMETERS[0])).rpartition(".")[0] for swap in plan.swaps
    }
    plain = names_with_prefix(stored.values(), names.prefix).stored
    return {fqn: name for fqn, name in stored.items() if plain.get(fqn) != name}


def read_notes(checkpoint: Checkpoint) -> dict[str, str]:
    """Return what a safetensors file notes beside its tensors, such as names of one tensor; nothing of other files."""
    return read_metadata(checkpoint.origin.copy) if checkpoint.container == "safetensors" else {}


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
    """Write a converted program and its record whole or not at all, and return how far what is read back differs from
    the original on `inputs`, as relative L2 of outputs and buffers.

    Args:
        source: what the program was read from, as in `write_content`.

    Raises:
        CheckpointError: it cannot be written, what was read back holds other tensors, or its source changed.
        SwapError: what was read back computes something else; an existing file is as it was.
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
            raise CheckpointError(
                f"{path}: what was read back differs from what was written: nothing was kept, look at the disk"
            )
        return check_equivalent(original, reloaded.program, inputs)


def _make_source_check(source: SourceFiles | None) -> Callable[[], None]:
    return source.check_unchanged if source is not None else lambda: None


def _reads_back_equal(path: Path, container: Container, content: Any, record: str) -> bool:
    """Whether the file just written holds this content and this record, bit for bit."""
    if detect_format(path) != container or (read_record_text(path, container) or "").strip() != record:
        return False
    if container == "safetensors":
        return safetensors_equals(path, content)
    try:
        # Plain tensors are read from where they lie in the file, and let go at once: no second copy in memory.
        reloaded, mmap = decode(path, container, trust=False, mmap=True), container == "torch zip"
    except CheckpointError:
        reloaded, mmap = decode(path, container, trust=True), False
    return contents_equal(content, reloaded, release_pages=mmap)


def _check_plan(model: nn.Module, plan: SwapPlan | None) -> None:
    """Refuse to write a model that could not be built again from its plan."""
    actual = {
        name: (layer.gate, layer.branches)
        for name, layer in gated_modules(model).items()
        if "replaced" in vars(layer) or isinstance(layer, FunctionalSwitchNorm)
    }
    if plan is None and actual:
        raise PlanError(f"the model has {len(actual)} converted sites and no plan: pass plan=conversion.plan")
    planned = {swap.fqn: (swap.gate, swap.branches) for swap in plan.swaps} if plan else {}
    differing = sorted(name for name in actual.keys() | planned.keys() if actual.get(name) != planned.get(name))
    if differing:
        raise PlanError(
            f"the plan is not the one of this model, they differ at {len(differing)} sites "
            f"({', '.join(differing[:3])}): pass the plan that convert returned"
        )
