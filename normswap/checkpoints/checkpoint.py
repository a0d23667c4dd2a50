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

from normswap.checkpoints.architecture import (
    at_folder,
    build_architecture,
    check_named_by_file,
    is_of_folder,
    place_elsewhere,
    renaming_of,
)
from normswap.checkpoints.build_limits import limited_build
from normswap.checkpoints.containers import TENSORS_ONLY, Container, decode, read_record_text, read_ties, sniff
from normswap.checkpoints.contents import Contents, at, check_has_values, read_contents, replaced, without
from normswap.checkpoints.fingerprint import fingerprint
from normswap.checkpoints.fit import Fit, fill
from normswap.checkpoints.identification import decide
from normswap.checkpoints.layout import rejoin
from normswap.checkpoints.pages import let_go
from normswap.checkpoints.prefixes import StoredNames, names_for, names_with_copies
from normswap.checkpoints.programs import Program, digest_of_members
from normswap.checkpoints.recognition import recognise, state_dict_of
from normswap.checkpoints.record import Payload, Record, Step, check_seal
from normswap.checkpoints.sources import Source, open_source
from normswap.display import counted, printed_as
from normswap.errors import AmbiguityError, ArchitectureError, ArgumentError, CheckpointError, SwapError
from normswap.layers.adoption import GATE_PARAMETERS
from normswap.layers.importance import importance_weights as shares_of
from normswap.surgery.arguments import require_type
from normswap.surgery.conversion import apply_plan
from normswap.surgery.gated import ImportanceWeights, gated_modules, importance_weights
from normswap.surgery.plan import ANY_CLASS, SwapPlan
from normswap.surgery.planning import complete_plan
from normswap.surgery.programs import module_of
from normswap.surgery.tree import join

Architecture = str | nn.Module | Callable[[], nn.Module]
_MOST_FITTING = 2


@printed_as("loaded")
class Loaded(NamedTuple):
    """What `load` found in a file: the model, the plan it was converted with (None if it was not), what was done to
    it so far, and what else the file holds.
    """

    model: nn.Module
    plan: SwapPlan | None
    history: tuple[Step, ...]
    rest: dict[str, Any]

    def __repr__(self) -> str:
        plan = "not converted" if self.plan is None else counted(len(self.plan.swaps), "swap")
        rest = f", rest: {', '.join(map(str, self.rest))}" if self.rest else ""
        return f"Loaded({type(self.model).__name__}, {plan}{rest:.200})"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, where the weights lie in it, and its record if normswap wrote it.

    Of an exported program that is trusted the content is its module, and `program` what that was made of.
    """

    origin: Source
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
        return at(self.content, self.contents.weights)  # type: ignore[no-any-return]

    @property
    def payload(self) -> Payload:
        """What the tensors are held in."""
        if self.program is not None:
            return "program"
        return "module" if isinstance(self.weights, nn.Module) else "state dict"


class Built(NamedTuple):
    """A model with a file's weights in it, how the file names them, and what builds it, where a name says so.

    `plan` is the file's, settled for this model; `fit` tells what file and model do not share.
    """

    model: nn.Module
    names: StoredNames
    architecture: str | None
    plan: SwapPlan | None
    fit: Fit = Fit()


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
    checkpoint = read_checkpoint(header, entry=entry, trust=trust and not header.gives_weights(architecture))
    header.origin.check_unchanged()
    header.origin.close()
    built = build_model(checkpoint, architecture, trust=trust)
    if built.fit.heads:
        warnings.warn(
            f"{path}: holds no {', '.join(built.fit.heads[:3])}: that part of the model is as it was built, at random",
            stacklevel=2,
        )
    history = checkpoint.record.history if checkpoint.record else ()
    return Loaded(built.model, built.plan, history, without(checkpoint.content, checkpoint.contents.weights))


@dataclass(frozen=True)
class Header:
    """A file whose archive has been checked, and the record in it, read without its tensors or its pickle."""

    origin: Source
    container: Container
    text: str | None
    record: Record | None

    @property
    def path(self) -> Path:
        """The file as the user names it."""
        return self.origin.path

    def gives_weights(self, architecture: Architecture | None) -> bool:
        """Say whether it is an exported program of which an architecture takes the weights alone."""
        return self.container == "exported program" and architecture is not None


def read_header(path: Path, *, folder: Path | None = None) -> Header:
    """Return what can be known of a file without reading its tensors or its pickle.

    Args:
        folder: where a private copy of the file goes, which all is read from; None for memory.

    Raises:
        CheckpointError: no checkpoint, damaged, or the record is.
    """
    origin = open_source(path, folder=folder)
    with origin.reading():
        container = sniff(origin.copy)
        text = read_record_text(origin.copy, container)
    try:
        return Header(origin, container, text, None if text is None else Record.from_json(text))
    except CheckpointError as error:
        raise CheckpointError(f"{origin.path}: {error}") from error


def read_record(path: Path) -> Record | None:
    """Return the record in a file or None if it has none; raises as `read_header`."""
    return read_header(path).record


def read_checkpoint(
    source: Path | Header, *, entry: str | None = None, trust: bool = False, mapped: bool = False
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
        checkpoint = read_checkpoint(header, entry=entry, trust=trust, mapped=mapped)
        header.origin.check_unchanged()
        header.origin.close()
        return checkpoint
    origin, record = source.origin, source.record
    content = read_content(source, trust=trust, mapped=mapped)
    program = content if isinstance(content, Program) else None
    with _named(origin.path):
        if program is not None:
            content = module_of(program.program)
        return _checkpoint(origin, source.container, content, record, entry, program)


def read_content(header: Header, *, trust: bool = False, mapped: bool = False) -> Any:
    """Return the object in a file, as its record seals it, whatever it holds; arguments as of `read_checkpoint`.

    Raises:
        CheckpointError: as `load`.
    """
    origin, container, record = header.origin, header.container, header.record
    with origin.reading():
        content = decode(origin.copy, container, trust=trust, mapped=mapped)
        ties = {} if record is not None else read_ties(origin.copy, container)
    if container in TENSORS_ONLY:
        tied, channels_last = (ties, ()) if record is None else (record.tied, record.channels_last)
        content = {**content, **rejoin(content, tied, channels_last)}
    if header.text is not None:
        is_program = container == "exported program"
        with _named(origin.path):
            check_seal(header.text, digest_of_members(origin.copy) if is_program else fingerprint(content))
    return content


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let errors about a content name its file."""
    try:
        yield
    except (CheckpointError, SwapError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def at_entry(checkpoint: Checkpoint, content: Any, record: Record, entry: str) -> Checkpoint:
    """Return a file as it stands at another one of its networks, once its content and its record have changed.

    Raises:
        CheckpointError: there are no weights at `entry`.
    """
    with _named(checkpoint.path):
        return _checkpoint(checkpoint.origin, checkpoint.container, content, record, entry, None)


def _checkpoint(
    origin: Source,
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
    weights = at(content, contents.weights)
    if not isinstance(weights, nn.Module):
        content = replaced(content, {contents.weights: _readable(weights)})
    if record is not None:
        record = _record_of(record, contents, weights)
    return Checkpoint(origin, container, content, contents, record, program)


def _record_of(record: Record, contents: Contents, weights: Any) -> Record:
    """What a record says of the weights that are meant: they are listed, a copy of such a network, or not converted."""
    if contents.entry in record.entries or (record.plan is None and not record.networks):
        return record.about(contents.entry) if contents.entry in record.entries else record
    for entry in record.entries:
        seen = record.about(entry)
        if seen.plan is not None and _has_gates_of(seen.plan, weights, contents.prefix):
            return seen
    return record.about(contents.entry)


def _has_gates_of(plan: SwapPlan, weights: Any, prefix: str) -> bool:
    """Whether weights hold the gates of a plan beside norms of its sizes, as far as a state dict can show."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    wanted = {join(swap.fqn, GATE_PARAMETERS[0]): swap for swap in plan.swaps if "[" not in swap.fqn}
    names = names_for(state, wanted, prefix=prefix)
    for name, swap in wanted.items():
        key = names.stored.get(name)
        if key is None or tuple(state[key].shape) != (len(swap.branches),):
            return False
        beside = (state.get(f"{key.rpartition('.')[0]}.{last}") for last in ("weight", "running_mean"))
        if any(tensor is not None and tensor.numel() != swap.num_features for tensor in beside):
            return False
    return True


def build_model(checkpoint: Checkpoint, architecture: Architecture | None = None, *, trust: bool = False) -> Built:
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
        return Built(weights, names_for([], []), None, plan)
    source = architecture or said_architecture(checkpoint, trust=trust)
    if source is None:
        try:
            source = decide(recognise(weights, checkpoint.content, prefix=checkpoint.contents.prefix))
        except (AmbiguityError, CheckpointError) as error:
            raise type(error)(f"{path}: {error}") from None
    named = isinstance(source, str) and (architecture is None or source.startswith("hf:"))
    with limited_build(path, len(weights)) if named and not trust else nullcontext():
        model = _built(source, trust=trust)
    names = _names(checkpoint, weights, model)
    if plan is not None:
        plan = complete_plan(model, _without_copies(plan, names), prefix=names.prefix)
        if not gated_modules(model):
            apply_plan(model, plan)
            names = _names(checkpoint, weights, model)
    try:
        fit = fill(
            model, _for_model(weights, names, model), source if isinstance(source, str) else type(model).__name__
        )
    except ArchitectureError as error:
        raise type(error)(f"{path}: {error}{_what_fits(checkpoint, source)}") from error
    let_go(weights.values())
    return Built(model.eval(), names, source if isinstance(source, str) else None, plan, fit)


def _names(checkpoint: Checkpoint, weights: Mapping[str, Tensor], model: nn.Module) -> StoredNames:
    """How a file names the tensors of a model, of which it may hold copies."""
    with _named(checkpoint.path):
        return names_with_copies(
            weights, model.state_dict(), prefix=checkpoint.contents.prefix, rename=renaming_of(model)
        )


def _without_copies(plan: SwapPlan, names: StoredNames) -> SwapPlan:
    """A plan made from names alone without the sites of further copies of the model; any other plan has none."""
    prefixes = tuple(copy.prefix for copy in names.copies)
    kept = tuple(s for s in plan.swaps if s.class_name != ANY_CLASS or not prefixes or not s.fqn.startswith(prefixes))
    return replace(plan, swaps=kept)


def _what_fits(checkpoint: Checkpoint, tried: Architecture) -> str:
    """The architectures that the tensors of a file fit, to be added to why they do not fit the one that was tried."""
    try:
        found = recognise(state_dict_of(checkpoint.weights), checkpoint.content, prefix=checkpoint.contents.prefix)
    except CheckpointError:  # which holds several models
        return ""
    fitting = [f"architecture={group[0].architecture!r}" for group in found.functions]
    if not fitting or any(tried == candidate.architecture for candidate in found.candidates):
        return ""
    more = f" or {len(fitting) - _MOST_FITTING} others" if len(fitting) > _MOST_FITTING else ""
    return f"; the tensors fit {' or '.join(fitting[:_MOST_FITTING])}{more}"


def stored_importance_weights(checkpoint: Checkpoint) -> dict[str, ImportanceWeights]:
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
    wanted = [join(swap.fqn, name) for swap in swaps for name in GATE_PARAMETERS]
    names = names_for(weights, wanted, prefix=checkpoint.contents.prefix)
    found = {}
    for swap in swaps:
        module = record.stored_as.get(swap.fqn) if record else None
        keys = [join(module, name) if module else names.stored.get(join(swap.fqn, name)) for name in GATE_PARAMETERS]
        points = [weights[key] for key in keys if key is not None and key in weights]
        if points:  # a site outside every registry is in no state dict
            if [tuple(point.shape) for point in points] != [(len(swap.branches),)] * len(GATE_PARAMETERS):
                raise CheckpointError(f"{checkpoint.path}: the importance weights of {swap.fqn!r} do not fit its plan")
            mean, var = (
                dict(zip(swap.branches, shares_of(point, swap.gate).tolist(), strict=True)) for point in points
            )
            found[swap.fqn] = ImportanceWeights(mean, var)
    return found


def _readable(weights: Mapping[str, Tensor]) -> "OrderedDict[str, Tensor]":
    """Return a state dict with torch's `_metadata`, or refuse tensors that have no values to read."""
    check_has_values(weights)
    state = OrderedDict(weights)
    if hasattr(weights, "_metadata"):
        state._metadata = weights._metadata  # type: ignore[attr-defined]
    return state


def said_architecture(checkpoint: Checkpoint, *, trust: bool) -> str | None:
    """Return the architecture that the file itself tells, or None.

    Raises:
        ArchitectureError: it is not one that a file may name (see `named_architectures`), and the file is not trusted.
    """
    said = checkpoint.record.architecture if checkpoint.record else None
    path = checkpoint.path
    if said is None:
        return f"hf:{path}" if (path / "config.json").is_file() else None
    try:
        beside = path.is_dir() and is_of_folder(said, path)
        said = at_folder(said, path) if beside else said
        elsewhere = None if beside else place_elsewhere(said)
        if not trust and elsewhere is None:
            check_named_by_file(said, folder=path)
    except ArchitectureError as error:
        raise ArchitectureError(
            f"{path}: names the architecture {said!r:.100}: {error}: name it with architecture=, or pass trust=True if "
            "you trust where the file comes from"
        ) from None
    if elsewhere is not None and not trust:
        raise ArchitectureError(f"{path}: {elsewhere}, or trust=True")
    return said


def is_named_by_itself(checkpoint: Checkpoint) -> bool:
    """Say whether the record of a file names an architecture that is built without trust."""
    try:
        named = checkpoint.record is not None and checkpoint.record.architecture is not None
        return named and said_architecture(checkpoint, trust=False) is not None
    except ArchitectureError:
        return False


def _for_model(weights: Mapping[str, Tensor], names: StoredNames, model: nn.Module) -> "OrderedDict[str, Tensor]":
    """The tensors under the model's own names, with what torch notes of its modules."""
    state = OrderedDict((name, weights[key]) for name, key in names.stored.items())
    # Containers without a place for the kind of gate: the plan says it, and the model was built by the plan.
    own = getattr(weights, "_metadata", None)
    wanted: Any = model.state_dict()._metadata  # type: ignore[attr-defined]
    if isinstance(own, Mapping):
        stored = {fqn: own.get(_stored_module(names, fqn)) for fqn in wanted}
        wanted = OrderedDict((fqn, note if note is not None else {}) for fqn, note in stored.items())
    state._metadata = wanted  # type: ignore[attr-defined]
    return state


def _stored_module(names: StoredNames, fqn: str) -> str:
    return names.to_store(join(fqn, "_")).rpartition(".")[0]


def _built(source: Architecture, *, trust: bool) -> nn.Module:
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
