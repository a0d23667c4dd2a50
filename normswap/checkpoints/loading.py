"""load: a file read into a model, converted or not, with its plan, its history and all else that it holds.

Reads whatever `containers` decodes, finds the weights in it and builds their model. `saving` writes.
"""

import copy
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from normswap.checkpoints.architecture.identification import get_state_dict, identify_state_dict, require_unique
from normswap.checkpoints.architecture.permissions import limit_allocation
from normswap.checkpoints.architecture.registry import (
    build_architecture,
    check_untrusted_name,
    describe_external_source,
    get_key_renaming,
    refers_to_folder,
    with_folder,
)
from normswap.checkpoints.content.entries import (
    Contents,
    check_has_values,
    drop_entry,
    get_entry,
    read_contents,
    replace_entries,
)
from normswap.checkpoints.content.key_prefixes import StoredNames, match_names, match_names_and_copies
from normswap.checkpoints.content.weight_loading import LoadReport, load_weights, retie_tensors
from normswap.checkpoints.formats.formats import (
    TENSORS_ONLY,
    Container,
    decode,
    detect_format,
    read_record_text,
    read_tied_names,
)
from normswap.checkpoints.formats.pt2_archive import Program, digest_members
from normswap.checkpoints.io.digest import fingerprint
from normswap.checkpoints.io.memory import release_mapped_pages
from normswap.checkpoints.record import Payload, Record, Step, check_fingerprint
from normswap.checkpoints.source_copy import SourceFiles, open_source
from normswap.errors import AmbiguityError, ArchitectureError, ArgumentError, CheckpointError, SwapError
from normswap.layers.gating import importance_weights as normalize_gate
from normswap.layers.in_place import GATE_PARAMETERS
from normswap.surgery.arguments import require_type
from normswap.surgery.conversion import apply_plan
from normswap.surgery.graphs.exported_program import program_module
from normswap.surgery.importance import SiteWeights, gated_modules, importance_weights
from normswap.surgery.plan import ANY_CLASS, SwapPlan
from normswap.surgery.planning import complete_plan
from normswap.text import join_fqn, pluralize, printable_as

Architecture = str | nn.Module | Callable[[], nn.Module]
_MAX_SUGGESTIONS = 2


@printable_as("loaded")
class Loaded(NamedTuple):
    """What `load` found in a file: the model, the plan it was converted with (None if it was not), what was done to
    it so far, and what else the file holds.
    """

    model: nn.Module
    plan: SwapPlan | None
    history: tuple[Step, ...]
    rest: dict[str, Any]

    def __repr__(self) -> str:
        plan = "not converted" if self.plan is None else pluralize(len(self.plan.swaps), "swap")
        rest = f", rest: {', '.join(map(str, self.rest))}" if self.rest else ""
        return f"Loaded({type(self.model).__name__}, {plan}{rest:.200})"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, where the weights lie in it, and its record if normswap wrote it.

    Of an exported program that is trusted the content is its module, and `program` what that was made of.
    """

    origin: SourceFiles
    container: Container
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
        """The state dict or the pickled module that is meant."""
        return get_entry(self.content, self.contents.weights)  # type: ignore[no-any-return]

    @property
    def payload(self) -> Payload:
        """What the tensors are held in."""
        if self.program is not None:
            return "program"
        return "module" if isinstance(self.weights, nn.Module) else "state dict"


class BuiltModel(NamedTuple):
    """A model with a file's weights in it, how the file names them, and what builds it, where a name says so.

    `plan` is the file's, settled for this model; `fit` tells what file and model do not share.
    """

    model: nn.Module
    names: StoredNames
    architecture: str | None
    plan: SwapPlan | None
    fit: LoadReport = LoadReport()


def load(
    path: str | Path, *, architecture: Architecture | None = None, entry: str | None = None, trust: bool = False
) -> Loaded:
    """Load a model, converted or not, from any checkpoint: a state dict, a training checkpoint, a folder of shards.

    A model built here is set to evaluation; a pickled module keeps its flags. Heads that the model does not have are
    left out; where the file lacks the model's own head, that stays at random and a warning says so.

    Args:
        path: the file, or the folder.
        architecture: what the tensors belong to, where neither the file nor the tensors themselves say it:
            `"timm:NAME[,key=value...]"`, `"torchvision:NAME[,...]"`, `"hf:FOLDER"`, `"file.py:function"`, a module (a
            copy of it is filled) or a function that returns one.
        entry: which weights of several are meant, such as `"state_dict_ema"`; dots between nested entries.
        trust: run the code that the file names: pickled objects, or an architecture in a Python file.

    Returns:
        `Loaded(model, plan, history, rest)`: the model, the plan it was converted with (None if it was not), what was
        done to it, and what else the file holds, such as `rest["optimizer"]`. `print` shows it as tables.

    Raises:
        CheckpointError: not a checkpoint, damaged, changed since normswap wrote it, or with code and not trusted.
        ArchitectureError: the tensors fit no or several known architectures, it cannot be built, or they do not fit it.
        PlanError: the file's plan does not fit the architecture.
        ArgumentError: `path` or `architecture` is of a wrong type.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> torch.save({"model": model.state_dict(), "epoch": 3}, "trained.pt")
        >>> normswap.load("trained.pt", architecture=model)
        Loaded(Sequential, not converted, rest: epoch)
    """
    require_type(path, str | os.PathLike, "path", "the name of a file or a folder")
    header = read_header(Path(path))
    checkpoint = read_checkpoint(header, entry=entry, trust=trust and not header.loads_weights_only(architecture))
    header.origin.check_unchanged()
    header.origin.close()
    built = build_model(checkpoint, architecture, trust=trust)
    if built.fit.heads:
        warnings.warn(
            f"{path}: holds no {', '.join(built.fit.heads[:3])}: that part of the model is as it was built, at random",
            stacklevel=2,
        )
    history = checkpoint.record.history if checkpoint.record else ()
    return Loaded(built.model, built.plan, history, drop_entry(checkpoint.content, checkpoint.contents.weights))


@dataclass(frozen=True)
class CheckpointHeader:
    """A file whose archive has been checked, and the record in it, read without its tensors or its pickle."""

    origin: SourceFiles
    container: Container
    text: str | None
    record: Record | None

    @property
    def path(self) -> Path:
        """The file as the user names it."""
        return self.origin.path

    def loads_weights_only(self, architecture: Architecture | None) -> bool:
        """Say whether it is an exported program of which an architecture takes the weights alone."""
        return self.container == "exported program" and architecture is not None


def read_header(path: Path, *, folder: Path | None = None) -> CheckpointHeader:
    """Return what can be known of a file without reading its tensors or its pickle.

    Args:
        folder: where a private copy of the file goes, which all is read from; None for memory.

    Raises:
        CheckpointError: no checkpoint, damaged, or the record is.
    """
    origin = open_source(path, folder=folder)
    with origin.reading():
        container = detect_format(origin.copy)
        text = read_record_text(origin.copy, container)
    try:
        return CheckpointHeader(origin, container, text, None if text is None else Record.from_json(text))
    except CheckpointError as error:
        raise CheckpointError(f"{origin.path}: {error}") from error


def read_record(path: Path) -> Record | None:
    """Return the record in a file or None if it has none; raises as `read_header`."""
    return read_header(path).record


def read_checkpoint(
    source: Path | CheckpointHeader, *, entry: str | None = None, trust: bool = False, mmap: bool = False
) -> Checkpoint:
    """Return the content of a file, where things lie in it, and its record.

    Args:
        source: the file, or its header, which is then not read and checked again; the caller of a header looks in the
            end whether the file is `origin.check_unchanged()`.
        mapped: leave tensors in the private copy of the file and read them as they are used: less memory, if the copy
            is on a disk.

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
    with _prefix_errors(origin.path):
        if program is not None:
            content = program_module(program.program)
        return _checkpoint(origin, source.container, content, record, entry, program)


def read_content(header: CheckpointHeader, *, trust: bool = False, mmap: bool = False) -> Any:
    """Return the object in a file, as its record seals it, whatever it holds; arguments as of `read_checkpoint`.

    Raises:
        CheckpointError: as `load`.
    """
    origin, container, record = header.origin, header.container, header.record
    with origin.reading():
        content = decode(origin.copy, container, trust=trust, mmap=mmap)
        ties = {} if record is not None else read_tied_names(origin.copy, container)
    if container in TENSORS_ONLY:
        tied, channels_last = (ties, ()) if record is None else (record.tied, record.channels_last)
        content = {**content, **retie_tensors(content, tied, channels_last)}
    if header.text is not None:
        is_program = container == "exported program"
        with _prefix_errors(origin.path):
            check_fingerprint(header.text, digest_members(origin.copy) if is_program else fingerprint(content))
    return content


@contextmanager
def _prefix_errors(path: Path) -> Iterator[None]:
    """Let errors about a content name its file."""
    try:
        yield
    except (CheckpointError, SwapError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def select_entry(checkpoint: Checkpoint, content: Any, record: Record, entry: str) -> Checkpoint:
    """Return a file as it stands at another one of its networks, once its content and its record have changed.

    Raises:
        CheckpointError: there are no weights at `entry`.
    """
    with _prefix_errors(checkpoint.path):
        return _checkpoint(checkpoint.origin, checkpoint.container, content, record, entry, None)


def _checkpoint(
    origin: SourceFiles,
    container: Container,
    content: Any,
    record: Record | None,
    entry: str | None,
    program: Program | None,
) -> Checkpoint:
    if record is not None and entry is None:
        if len(record.entries) > 1:
            raise CheckpointError(
                f"holds several converted models ({', '.join(map(repr, record.entries))}): say which, such as "
                f"entry={record.entries[0]!r}"
            )
        entry = record.entry
    contents = read_contents(content, entry=entry)
    weights = get_entry(content, contents.weights)
    if not isinstance(weights, nn.Module):
        content = replace_entries(content, {contents.weights: _to_ordered_state_dict(weights)})
    if record is not None:
        record = _select_record(record, contents, weights)
    return Checkpoint(origin, container, content, contents, record, program)


def _select_record(record: Record, contents: Contents, weights: Any) -> Record:
    """What a record says of the weights that are meant: they are listed, a copy of such a network, or not converted."""
    if contents.entry in record.entries or (record.plan is None and not record.networks):
        return record.for_entry(contents.entry) if contents.entry in record.entries else record
    for entry in record.entries:
        seen = record.for_entry(entry)
        if seen.plan is not None and _has_planned_gates(seen.plan, weights, contents.prefix):
            return seen
    return record.for_entry(contents.entry)


def _has_planned_gates(plan: SwapPlan, weights: Any, prefix: str) -> bool:
    """Whether weights hold the gates of a plan beside norms of its sizes, as far as a state dict can show."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    wanted = {join_fqn(swap.fqn, GATE_PARAMETERS[0]): swap for swap in plan.swaps if "[" not in swap.fqn}
    names = match_names(state, wanted, prefix=prefix)
    for name, swap in wanted.items():
        key = names.stored.get(name)
        if key is None or tuple(state[key].shape) != (len(swap.branches),):
            return False
        beside = (state.get(f"{key.rpartition('.')[0]}.{last}") for last in ("weight", "running_mean"))
        if any(tensor is not None and tensor.numel() != swap.num_features for tensor in beside):
            return False
    return True


def build_model(checkpoint: Checkpoint, architecture: Architecture | None = None, *, trust: bool = False) -> BuiltModel:
    """Return the model in a checkpoint: built, converted by the file's plan, filled; the pickled module itself.

    Raises:
        ArchitectureError, PlanError: as `load`.
    """
    path, weights, record = checkpoint.path, checkpoint.weights, checkpoint.record
    plan = record.plan if record else None
    if record is not None and record.payload == "program" and checkpoint.program is None:
        raise CheckpointError(
            f"{path}: a converted program, whose graph alone knows what its weights mean: pass trust=True, "
            "without an architecture, if you trust where it comes from"
        )
    if isinstance(weights, nn.Module):
        if architecture is not None:
            raise ArchitectureError(f"{path}: a pickled module brings its own architecture: leave architecture= out")
        return BuiltModel(weights, match_names([], []), None, plan)
    source = architecture or recorded_architecture(checkpoint, trust=trust)
    if source is None:
        try:
            source = require_unique(identify_state_dict(weights, checkpoint.content, prefix=checkpoint.contents.prefix))
        except (AmbiguityError, CheckpointError) as error:
            raise type(error)(f"{path}: {error}") from None
    named = isinstance(source, str) and (architecture is None or source.startswith("hf:"))
    with limit_allocation(path, len(weights)) if named and not trust else nullcontext():
        model = _instantiate(source, trust=trust)
    names = _match_model_names(checkpoint, weights, model)
    if plan is not None:
        plan = complete_plan(model, _drop_copy_sites(plan, names), prefix=names.prefix)
        if not gated_modules(model):
            apply_plan(model, plan)
            names = _match_model_names(checkpoint, weights, model)
    try:
        fit = load_weights(
            model, _rename_for_model(weights, names, model), source if isinstance(source, str) else type(model).__name__
        )
    except ArchitectureError as error:
        raise type(error)(f"{path}: {error}{_suggest_architectures(checkpoint, source)}") from error
    release_mapped_pages(weights.values())
    return BuiltModel(model.eval(), names, source if isinstance(source, str) else None, plan, fit)


def _match_model_names(checkpoint: Checkpoint, weights: Mapping[str, Tensor], model: nn.Module) -> StoredNames:
    """How a file names the tensors of a model, of which it may hold copies."""
    with _prefix_errors(checkpoint.path):
        return match_names_and_copies(
            weights, model.state_dict(), prefix=checkpoint.contents.prefix, rename=get_key_renaming(model)
        )


def _drop_copy_sites(plan: SwapPlan, names: StoredNames) -> SwapPlan:
    """A plan made from names alone without the sites of further copies of the model; any other plan has none."""
    prefixes = tuple(copy.prefix for copy in names.copies)
    kept = tuple(s for s in plan.swaps if s.class_name != ANY_CLASS or not prefixes or not s.fqn.startswith(prefixes))
    return replace(plan, swaps=kept)


def _suggest_architectures(checkpoint: Checkpoint, architecture_tried: Architecture) -> str:
    """The architectures that the tensors of a file fit, to be added to why they do not fit the one that was tried."""
    try:
        found = identify_state_dict(
            get_state_dict(checkpoint.weights), checkpoint.content, prefix=checkpoint.contents.prefix
        )
    except CheckpointError:  # which holds several models
        return ""
    fitting = [f"architecture={group[0].architecture!r}" for group in found.functions]
    if not fitting or any(architecture_tried == candidate.architecture for candidate in found.candidates):
        return ""
    more = f" or {len(fitting) - _MAX_SUGGESTIONS} others" if len(fitting) > _MAX_SUGGESTIONS else ""
    return f"; the tensors fit {' or '.join(fitting[:_MAX_SUGGESTIONS])}{more}"


def stored_importance_weights(checkpoint: Checkpoint) -> dict[str, SiteWeights]:
    """Return the importance weights in a checkpoint by fqn, without building the model; empty if not converted.

    Raises:
        CheckpointError: they do not fit the plan in the file.
    """
    weights, record = checkpoint.weights, checkpoint.record
    if checkpoint.payload == "module":
        return importance_weights(weights)  # type: ignore[arg-type]
    if isinstance(weights, nn.Module):  # of a program, whose gates are parameters like any other
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
        if points:  # a site outside every registry is in no state dict
            if [tuple(point.shape) for point in points] != [(len(swap.branches),)] * len(GATE_PARAMETERS):
                raise CheckpointError(f"{checkpoint.path}: the importance weights of {swap.fqn!r} do not fit its plan")
            mean, var = (
                dict(zip(swap.branches, normalize_gate(point, swap.gate).tolist(), strict=True)) for point in points
            )
            found[swap.fqn] = SiteWeights(mean, var)
    return found


def _to_ordered_state_dict(weights: Mapping[str, Tensor]) -> "OrderedDict[str, Tensor]":
    """Return a state dict with torch's `_metadata`, or refuse tensors that have no values to read."""
    check_has_values(weights)
    state = OrderedDict(weights)
    if hasattr(weights, "_metadata"):
        state._metadata = weights._metadata  # type: ignore[attr-defined]
    return state


def recorded_architecture(checkpoint: Checkpoint, *, trust: bool) -> str | None:
    """Return the architecture that the file itself tells, or None.

    Raises:
        ArchitectureError: it is not one that a file may name (see `named_architectures`), and the file is not trusted.
    """
    recorded = checkpoint.record.architecture if checkpoint.record else None
    path = checkpoint.path
    if recorded is None:
        return f"hf:{path}" if (path / "config.json").is_file() else None
    try:
        beside = path.is_dir() and refers_to_folder(recorded, path)
        recorded = with_folder(recorded, path) if beside else recorded
        external = None if beside else describe_external_source(recorded)
        if not trust and external is None:
            check_untrusted_name(recorded, folder=path)
    except ArchitectureError as error:
        raise ArchitectureError(
            f"{path}: names the architecture {recorded!r:.100}: {error}: name it with architecture=, or pass trust=True if "
            "you trust where the file comes from"
        ) from None
    if external is not None and not trust:
        raise ArchitectureError(f"{path}: {external}, or trust=True")
    return recorded


def builds_without_trust(checkpoint: Checkpoint) -> bool:
    """Say whether the record of a file names an architecture that is built without trust."""
    try:
        named = checkpoint.record is not None and checkpoint.record.architecture is not None
        return named and recorded_architecture(checkpoint, trust=False) is not None
    except ArchitectureError:
        return False


def _rename_for_model(
    weights: Mapping[str, Tensor], names: StoredNames, model: nn.Module
) -> "OrderedDict[str, Tensor]":
    """The tensors under the model's own names, with what torch notes of its modules."""
    state = OrderedDict((name, weights[key]) for name, key in names.stored.items())
    # Containers without a place for the kind of gate: the plan says it, and the model was built by the plan.
    own = getattr(weights, "_metadata", None)
    wanted: Any = model.state_dict()._metadata  # type: ignore[attr-defined]
    if isinstance(own, Mapping):
        stored = {fqn: own.get(_stored_module_name(names, fqn)) for fqn in wanted}
        wanted = OrderedDict((fqn, note if note is not None else {}) for fqn, note in stored.items())
    state._metadata = wanted  # type: ignore[attr-defined]
    return state


def _stored_module_name(names: StoredNames, fqn: str) -> str:
    return names.stored_key(join_fqn(fqn, "_")).rpartition(".")[0]


def _instantiate(source: Architecture, *, trust: bool) -> nn.Module:
    if isinstance(source, str):
        return build_architecture(source, trust=trust)
    if isinstance(source, nn.Module):
        return copy.deepcopy(source)
    builder: object = source
    if not callable(builder):
        named = "'timm:NAME', 'path/file.py:function', a module, or a function that returns one"
        raise ArgumentError(f"architecture: expected {named}, got {type(source).__name__}")
    model: object = builder()
    if not isinstance(model, nn.Module):
        raise ArchitectureError(f"architecture: expected a function that returns a module, got {type(model).__name__}")
    return model
