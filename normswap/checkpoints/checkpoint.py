"""load and save: a file and a model with its plan, its proof and its history.

Reads state dicts (torch, safetensors) and, if trusted, pickled modules. Writes them whole or not at all, reads them
back and compares every bit. Training checkpoints that hold more than the model are refused with the way out.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.checkpoints.architecture import build_architecture, check_architecture
from normswap.checkpoints.atomic import check_writable, written_whole
from normswap.checkpoints.containers import Container, decode, encode, read_record_text, sniff
from normswap.checkpoints.fit import fill
from normswap.checkpoints.layout import rejoin, separate
from normswap.checkpoints.record import Payload, Record, Step
from normswap.errors import ArchitectureError, CheckpointError, PlanError
from normswap.layers.adoption import GATE_PARAMETERS
from normswap.layers.importance import importance_weights as shares_of
from normswap.layers.modules import FunctionalSwitchNorm
from normswap.surgery.conversion import apply_plan
from normswap.surgery.gated import ImportanceWeights, gated_modules, importance_weights
from normswap.surgery.plan import SwapPlan
from normswap.surgery.tracing import first_line
from normswap.surgery.tree import join
from normswap.surgery.wrapping import unwrap
from normswap.verification import Verification

Architecture = str | nn.Module | Callable[[], nn.Module]


class Loaded(NamedTuple):
    """What `load` found in a file: the model, the plan it was converted with (None if it was not), what was done to
    it so far, and what else the file holds.
    """

    model: nn.Module
    plan: SwapPlan | None
    history: tuple[Step, ...]
    rest: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A file's content: tensors by key or a pickled module, and its record if normswap wrote it."""

    path: Path
    container: Container
    content: OrderedDict[str, Tensor] | nn.Module
    record: Record | None

    @property
    def payload(self) -> Payload:
        """What the tensors are held in."""
        return "module" if isinstance(self.content, nn.Module) else "state dict"


def load(path: str | Path, *, architecture: Architecture | None = None, trust: bool = False) -> Loaded:
    """Load a model, converted or not, from a state dict (torch, safetensors) or a pickled module.

    A model built here is set to evaluation; a pickled module keeps its flags.

    Args:
        path: the file.
        architecture: what the tensors belong to, where the file does not say it or says it wrong:
            `"timm:NAME[,key=value...]"`, `"torchvision:NAME[,...]"`, a module (a copy of it is filled) or a function
            that returns one.
        trust: run the code that a pickled module names.

    Raises:
        CheckpointError: not such a file, damaged, or pickled and not trusted.
        ArchitectureError: no architecture is known, it cannot be built, or the tensors do not fit it.
        PlanError: the file's plan does not fit the architecture.
    """
    checkpoint = read_checkpoint(Path(path), trust=trust)
    model = build_model(checkpoint, architecture)
    record = checkpoint.record
    return Loaded(model, record.plan if record else None, record.history if record else (), {})


def save(
    model: nn.Module,
    path: str | Path,
    *,
    plan: SwapPlan | None = None,
    architecture: str | None = None,
    verification: Verification | None = None,
    payload: Payload = "state dict",
    history: Sequence[Step] = (),
) -> None:
    """Save a model so that `load` gives the same outputs, bit for bit, in a fresh process.

    The file appears whole or not at all; an existing one is replaced. Names that end in `.safetensors` become that,
    all others are torch files. The tensors stand alone: `model.load_state_dict(torch.load(path), strict=True)` works.

    Args:
        model: converted or not; of a wrapped one the model inside is saved.
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
    """
    target = Path(path)
    container: Container = "safetensors" if target.suffix == ".safetensors" else "torch zip"
    record = Record(
        payload=payload,
        architecture=architecture,
        plan=plan,
        verification=verification,
        history=(*history, Step.now("saved")),
    )
    write_checkpoint(unwrap(model), target, container, record)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def read_record(path: Path) -> Record | None:
    """Return the record in a file without reading its tensors or its pickle, or None if it has none.

    Raises:
        CheckpointError: no checkpoint, damaged, or the record is.
    """
    return _record(path, sniff(path))


def read_checkpoint(path: Path, *, trust: bool = False) -> Checkpoint:
    """Return the content of a file and its record.

    Raises:
        CheckpointError: as `load`.
    """
    container = sniff(path)
    record = _record(path, container)
    content = decode(path, container, trust=trust)
    if isinstance(content, nn.Module):
        return Checkpoint(path, container, content, record)
    state = _only_tensors(path, content)
    if record is not None:
        state.update(rejoin(state, record.tied, record.channels_last))
    return Checkpoint(path, container, state, record)


def build_model(checkpoint: Checkpoint, architecture: Architecture | None = None) -> nn.Module:
    """Return the model in a checkpoint: built, converted by the file's plan, filled; the pickled module itself.

    Raises:
        ArchitectureError, PlanError: as `load`.
    """
    path, content, record = checkpoint.path, checkpoint.content, checkpoint.record
    if isinstance(content, nn.Module):
        if architecture is not None:
            raise ArchitectureError(
                f"{path}: a pickled module brings its own architecture: leave --arch (architecture=) out"
            )
        return content
    source = architecture or (record.architecture if record else None)
    if source is None:
        raise ArchitectureError(
            f"{path}: a state dict does not say what it belongs to: name it with --arch timm:NAME "
            '(architecture="timm:NAME", or a function that builds the model)'
        )
    model = _built(source)
    if record is not None and record.plan is not None:
        if not gated_modules(model):
            apply_plan(model, record.plan)
        if not hasattr(content, "_metadata"):
            # safetensors has no place for the kind of gate: the plan says it, and the model was built by the plan.
            content._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    fill(model, content, source if isinstance(source, str) else type(model).__name__)
    return model.eval()


def stored_importance_weights(checkpoint: Checkpoint) -> dict[str, ImportanceWeights]:
    """Return the importance weights in a checkpoint by fqn, without building the model; empty if not converted.

    Raises:
        CheckpointError: they do not fit the plan in the file.
    """
    content, record = checkpoint.content, checkpoint.record
    if isinstance(content, nn.Module):
        return importance_weights(content)
    found = {}
    for swap in record.plan.swaps if record and record.plan else ():
        points = [content[key] for name in GATE_PARAMETERS if (key := join(swap.fqn, name)) in content]
        if points:  # a site outside every registry is in no state dict
            if [tuple(point.shape) for point in points] != [(len(swap.branches),)] * len(GATE_PARAMETERS):
                raise CheckpointError(f"{checkpoint.path}: the importance weights of {swap.fqn!r} do not fit its plan")
            mean, var = (
                dict(zip(swap.branches, shares_of(point, swap.gate).tolist(), strict=True)) for point in points
            )
            found[swap.fqn] = ImportanceWeights(mean, var)
    return found


def write_checkpoint(model: nn.Module, path: Path, container: Container, record: Record) -> None:
    """Write a model and its record whole or not at all, read it back and compare every bit.

    Raises:
        CheckpointError, ArchitectureError, PlanError: as `save`; an existing file is as it was.
    """
    check_writable(path, replace=True)
    _check_plan(model, record.plan)
    if record.architecture is not None:
        check_architecture(record.architecture)
    content: Any = model
    if record.payload == "state dict":
        content = _only_tensors(path, model.state_dict())
    if container == "safetensors":
        if content is model:
            raise CheckpointError(f"{path}: safetensors holds tensors only, not a pickled module: use a name in .pt")
        content, tied, channels_last = separate(content)
        record = replace(record, tied=tied, channels_last=channels_last)
    with written_whole(path) as temporary:
        try:
            encode(temporary, container, content, record.to_json())
        except Exception as error:
            # torch's writer hides the system's own words behind a position in the file.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            hint = ": save it as a state dict" if record.payload == "module" else ""
            raise CheckpointError(f"{path}: cannot be written ({first_line(cause)}){hint}") from error
        _compare(path, model, record, read_checkpoint(temporary, trust=True))


def _record(path: Path, container: Container) -> Record | None:
    text = read_record_text(path, container)
    try:
        return None if text is None else Record.from_json(text)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _built(source: Architecture) -> nn.Module:
    if isinstance(source, str):
        return build_architecture(source)
    if isinstance(source, nn.Module):
        return copy.deepcopy(source)
    model: object = source()
    if not isinstance(model, nn.Module):
        raise ArchitectureError(f"architecture: expected a function that returns a module, got {type(model).__name__}")
    return model


def _only_tensors(path: Path, content: Any) -> "OrderedDict[str, Tensor]":
    """Return a state dict as it is, with torch's `_metadata`, or refuse what is none."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a state dict or a pickled module, got {type(content).__name__}")
    if not content:
        raise CheckpointError(f"{path}: expected a state dict, got an empty one")
    inner = next((key for key, value in content.items() if isinstance(value, Mapping | nn.Module)), None)
    if inner is not None:
        keys = ", ".join(map(str, list(content)[:6]))
        name = next((key for key in ("state_dict", "model_state_dict", "model") if key in content), inner)
        raise CheckpointError(
            f"{path}: expected a state dict alone, got a training checkpoint with the entries {keys}: pass one of "
            f'them, torch.save(torch.load("{path.name}")[{name!r}], "model.pt")'
        )
    for key, value in content.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            kind = type(value).__name__
            raise CheckpointError(f"{path}: expected tensors by name only, got the entry {key!r} of type {kind}")
        if value.is_meta:
            raise CheckpointError(f"{path}: the tensor {key!r} is on the meta device and has no values: load it first")
    state = OrderedDict(content)
    if hasattr(content, "_metadata"):
        state._metadata = content._metadata  # type: ignore[attr-defined]
    return state


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


def _compare(path: Path, model: nn.Module, record: Record, found: Checkpoint) -> None:
    written, back = _tensors(model), _tensors(found.content)
    wrong = [key for key in written.keys() | back.keys() if not _same_bits(written.get(key), back.get(key))]
    if wrong or found.record is None or found.record.to_json() != record.to_json():
        raise CheckpointError(
            f"{path}: what was read back differs from what was written ({len(wrong)} tensors): nothing was kept, "
            "look at the disk"
        )


def _tensors(content: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = content.state_dict() if isinstance(content, nn.Module) else content
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    # As bytes, since NaN differs from itself and -0 does not differ from 0.
    first, second = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)
