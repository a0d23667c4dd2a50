"""save, and the content of a converted file: written whole or not at all, read back and compared bit for bit.

Everything that the source holds is carried: copies of the weights are converted by the same plan, optimizer states get
the gates as a last group, all else passes through untouched.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from hashlib import file_digest, sha256
from pathlib import Path
from threading import Thread
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from normswap.checkpoints.architecture import check_architecture
from normswap.checkpoints.atomic import check_writable, written_whole, written_whole_folder
from normswap.checkpoints.checkpoint import BESIDE, Checkpoint
from normswap.checkpoints.containers import (
    FOLDERS,
    TENSORS_ONLY,
    Container,
    add_record,
    check_ending,
    decode,
    encode,
    read_record_text,
    sniff,
)
from normswap.checkpoints.contents import Place, at, check_has_values, is_state_dict, name_of, replaced
from normswap.checkpoints.fingerprint import fingerprint, holds_the_same, safetensors_holds
from normswap.checkpoints.layout import separate
from normswap.checkpoints.optimizer_state import with_gates
from normswap.checkpoints.prefixes import StoredNames, names_for
from normswap.checkpoints.programs import Program, digest_of_members, load_program, save_program
from normswap.checkpoints.record import Original, Record, Step
from normswap.checkpoints.scheduler_state import scheduler_with_gates
from normswap.checkpoints.state_surgery import with_metadata, with_tensors
from normswap.checkpoints.trainer_state import write_beside
from normswap.errors import CheckpointError, PlanError, SwapError
from normswap.layers.modules import FunctionalSwitchNorm
from normswap.surgery.arguments import require_module, require_type
from normswap.surgery.conversion import apply_plan
from normswap.surgery.gated import gated_modules, trainable_gates
from normswap.surgery.plan import SwapPlan, require_plan
from normswap.surgery.programs import check_same
from normswap.surgery.tracing import first_line
from normswap.surgery.wrapping import unwrap
from normswap.verification import Verification


@dataclass(frozen=True)
class New:
    """What a conversion adds to a state dict: tensors by the model's own names, torch's notes on the new layers, and
    the names of those gates that train.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]
    trainable: tuple[str, ...]


class Carried(NamedTuple):
    """A converted content, and in words what was done to the rest of the file."""

    content: Any
    notes: tuple[str, ...]


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

    Example:
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
    check_ending(target)
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


def new_of(original: Mapping[str, Any], converted: nn.Module) -> New:
    """Return what `converted` has beyond the names in `original`."""
    state: Any = converted.state_dict()
    tensors = {name: tensor for name, tensor in state.items() if name not in original}
    return New(tensors, state._metadata, tuple(name for name in trainable_gates(converted) if name in tensors))


def converted_content(
    checkpoint: Checkpoint, names: StoredNames, new: New, *, module: nn.Module | None = None, plan: SwapPlan
) -> Carried:
    """Return the content of a file with everything in it converted that `new` fits, and the rest as it was.

    Args:
        names: how the file names the tensors of the model.
        module: the converted module, where the file holds a pickled one.
        plan: carried out on further pickled modules of the same kind.
    """
    content, where = checkpoint.content, checkpoint.contents
    values: dict[Place, Any] = {where.weights: module or _converted_state(checkpoint.weights, names, new)}
    notes: list[str] = []
    for place in where.others:
        copied = _converted_copy(at(content, place), names, new, plan)
        values |= {} if copied is None else {place: copied}
        verdict = "left as it is, not the same model" if copied is None else "converted too"
        notes.append(f"{name_of(place)}: {verdict}")
    for place in where.optimizers:
        extended, note = _extended(at(content, place), checkpoint.weights, new, alone=len(where.optimizers) == 1)
        values |= {} if extended is None else {place: extended}
        notes.append(f"{name_of(place)}: {note}")
    optimizer = next((values[place] for place in where.optimizers if place in values), None)
    for place in where.schedulers if optimizer else ():
        scheduled, note = _rescheduled(at(content, place), optimizer)
        values |= {} if scheduled is None else {place: scheduled}
        notes.append(f"{name_of(place)}: {note}")
    return Carried(replaced(content, values), tuple(notes))


def updated_content(checkpoint: Checkpoint, names: StoredNames, model: nn.Module) -> Any:
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
    with_metadata(state, stored, names, {})
    return replaced(checkpoint.content, {checkpoint.contents.weights: state})


def next_record(checkpoint: Checkpoint, architecture: str | None, step: Step, container: Container) -> Record:
    """Return the record of a file made from another one by a step that changed the function.

    Plan and history go on; a proof that it is the same function does not.
    """
    told_beside = container in FOLDERS and architecture == f"hf:{checkpoint.path}"
    old = checkpoint.record or Record(
        payload=checkpoint.payload,
        architecture=BESIDE if told_beside else architecture,
        entry=name_of(checkpoint.contents.weights) or None,
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


def originals(model: nn.Module | None, plan: SwapPlan | None) -> dict[str, Original]:
    """Return what each swapped site of a converted model was, by fqn; nothing where there is no model."""
    layers = {} if model is None else gated_modules(model)
    return {
        swap.fqn: Original(
            swap.class_name,
            vars(layers[swap.fqn]).get("eps"),
            vars(layers[swap.fqn]).get("momentum"),
            swap.kind == "frozen bn",
        )
        for swap in (plan.swaps if plan else ())
        if swap.fqn in layers
    }


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits; of a folder, that of its files' names and digests."""
    if not path.is_dir():
        with open(path, "rb") as file:
            return file_digest(file, "sha256").hexdigest()
    inside = sorted(entry for entry in path.rglob("*") if entry.is_file())
    lines = "".join(f"{entry.relative_to(path)} {sha256_of(entry)}\n" for entry in inside)
    return sha256(lines.encode()).hexdigest()


def sha256_in_background(path: Path) -> "Future[str]":
    """Return what becomes `sha256_of(path)`: the digest leaves Python to others, and other work need not wait for it.

    Nothing waits for it at the end of the process either.
    """
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(sha256_of(path))
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
    like: Path | None = None,
    beside: Mapping[str, Any] | None = None,
    replace_old: bool = True,
) -> None:
    """Write a content and its record whole or not at all, read it back and compare every bit.

    Args:
        content: a state dict, a module, or what a training checkpoint holds.
        like: the folder that a new folder takes after.
        beside: further files of a new folder, `Beside.files`.

    Raises:
        CheckpointError: it cannot be written, or the container cannot hold it; an existing file is as it was.
    """
    check_writable(path, replace=replace_old, as_folder=container in FOLDERS)
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
        content, tied, channels_last = separate(content)
        record = replace(record, tied=tied, channels_last=channels_last)
    text = record.sealed(digest).to_json()
    writer = written_whole_folder if container in FOLDERS else written_whole
    with writer(path) as temporary:
        try:
            encode(temporary, container, content, text, like=like)
            write_beside(temporary, beside or {})
        except Exception as error:
            # torch's writer hides the system's own words behind a position in the file.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            hint = ": save it as a state dict" if record.payload == "module" else ""
            raise CheckpointError(f"{path}: cannot be written ({first_line(cause)}){hint}") from error
        if not _is_written(temporary, container, content, text):
            raise CheckpointError(
                f"{path}: what was read back differs from what was written: nothing was kept, look at the disk"
            )


def write_program(
    program: Program, original: ExportedProgram, path: Path, record: Record, *, inputs: Any, replace_old: bool = True
) -> float:
    """Write a converted program and its record whole or not at all, and return how far what is read back differs from
    the original on `inputs`, as relative L2 of outputs and buffers.

    Raises:
        CheckpointError: it cannot be written, or what was read back holds other tensors.
        SwapError: what was read back computes something else; an existing file is as it was.
    """
    check_writable(path, replace=replace_old)
    with written_whole(path) as temporary:
        try:
            save_program(temporary, program)
        except Exception as error:
            raise CheckpointError(f"{path}: cannot be written ({first_line(error)})") from error
        sealed = record.sealed(digest_of_members(temporary)).to_json()
        add_record(temporary, "exported program", sealed)
        back = load_program(temporary)
        kept = read_record_text(temporary, sniff(temporary)) == sealed and back.extra_files == program.extra_files
        if not kept or not holds_the_same(program.program.state_dict, back.program.state_dict):
            raise CheckpointError(
                f"{path}: what was read back differs from what was written: nothing was kept, look at the disk"
            )
        return check_same(original, back.program, inputs)


def _is_written(path: Path, container: Container, content: Any, record: str) -> bool:
    """Whether the file just written holds this content and this record, bit for bit."""
    if sniff(path) != container or (read_record_text(path, container) or "").strip() != record:
        return False
    if container == "safetensors":
        return safetensors_holds(path, content)
    try:
        # Plain tensors are read from where they lie in the file, and let go at once: no second copy in memory.
        back, mapped = decode(path, container, trust=False, mapped=True), container == "torch zip"
    except CheckpointError:
        back, mapped = decode(path, container, trust=True), False
    return holds_the_same(content, back, forget=mapped)


def _converted_state(state: Any, names: StoredNames, new: New) -> dict[str, Tensor]:
    return with_metadata(with_tensors(state, names, new.tensors), state, names, new.metadata)


def _converted_copy(value: Any, names: StoredNames, new: New, plan: SwapPlan) -> Any:
    """A further copy of the model, such as its moving average, converted alike; None if it is another model."""
    if isinstance(value, nn.Module):
        try:
            twin = copy.deepcopy(value)
            apply_plan(twin, plan)
        except (PlanError, SwapError):
            return None
        return twin
    own = names_for(value, names.stored)
    return _converted_state(value, own, new) if own.stored.keys() >= names.stored.keys() else None


def _extended(state: Any, weights: Any, new: New, *, alone: bool) -> tuple[Any, str]:
    """An optimizer state with the gates as its last group, where it is that of this model."""
    numbered = sum(len(group["params"]) for group in state["param_groups"])
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    if not new.trainable:
        return None, "left as it is, no gate trains"
    if not alone and numbered > len(tensors):
        return None, "left as it is, not of this model"
    return with_gates(state, gates=new.trainable), f"{len(new.trainable)} gates appended as a last group"


def _rescheduled(state: Any, optimizer: Any) -> tuple[Any, str]:
    try:
        return scheduler_with_gates(state, optimizer_state=optimizer), "gates follow the last group's schedule"
    except CheckpointError:
        return None, "left as it is, of another optimizer"


def _check_plan(model: nn.Module, plan: SwapPlan | None) -> None:
    """Refuse to write a model that could not be built again from its plan."""
    made = {
        name: (layer.gate, layer.branches)
        for name, layer in gated_modules(model).items()
        if "replaced" in vars(layer) or isinstance(layer, FunctionalSwitchNorm)
    }
    if plan is None and made:
        raise PlanError(f"the model has {len(made)} converted sites and no plan: pass plan=conversion.plan")
    planned = {swap.fqn: (swap.gate, swap.branches) for swap in plan.swaps} if plan else {}
    differing = sorted(name for name in made.keys() | planned.keys() if made.get(name) != planned.get(name))
    if differing:
        raise PlanError(
            f"the plan is not the one of this model, they differ at {len(differing)} sites "
            f"({', '.join(differing[:3])}): pass the plan that convert returned"
        )
