"""Loads a checkpoint file into a model, converted or not, together with its plan, its history and its other entries.

`reading` reads the file, `saving` writes one.
"""

import copy
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.baking.network_baking import apply_bake_plan
from normswap.checkpoints.architecture.efficientnet_pytorch import describe_names
from normswap.checkpoints.architecture.identification import get_state_dict, identify_state_dict, require_unique
from normswap.checkpoints.architecture.permissions import limit_allocation
from normswap.checkpoints.architecture.registry import (
    build_architecture,
    check_untrusted_name,
    default_input_shape,
    describe_external_source,
    get_key_renaming,
    refers_to_folder,
    with_folder,
)
from normswap.checkpoints.content.entries import drop_entry
from normswap.checkpoints.content.key_prefixes import StoredNames, match_names, match_names_and_copies
from normswap.checkpoints.content.weight_loading import LoadReport, load_weights
from normswap.checkpoints.io.memory import release_mapped_pages
from normswap.checkpoints.reading import Checkpoint, prefix_errors, read_checkpoint, read_header
from normswap.checkpoints.record import Step
from normswap.errors import AmbiguityError, ArchitectureError, ArgumentError, CheckpointError, PlanError
from normswap.surgery.arguments import read_path, require_type
from normswap.surgery.conversion import apply_plan
from normswap.surgery.graphs.exported_program import program_inputs
from normswap.surgery.importance import gated_modules
from normswap.surgery.plan import ANY_CLASS, Swap, SwapPlan
from normswap.surgery.planning import complete_plan
from normswap.text import join_fqn, pluralize, printable_as

Architecture = str | nn.Module | Callable[[], nn.Module]
# Example inputs as `convert` takes them, or a function that makes them for a model.
Inputs = Any
_log = logging.getLogger(__name__)
_MAX_SUGGESTIONS = 2
_VAR = "running_var"
# Random integers are below this: token ids that every vocabulary has, the values of an image, both booleans.
_INTEGER_LIMITS = {torch.uint8: 256, torch.bool: 2}
_INTEGER_LIMIT = 10


# --- load -------------------------------------------------------------------------------------------------------------


@printable_as("loaded")
class Loaded(NamedTuple):
    """The result of `load`: the model, its plan (None if it was not converted), its history, and the other entries.

    Attributes:
        model: the model with the weights of the file.
        plan: the plan of its conversion, None if the model was not converted.
        history: what was done to the model before, a `Step` each.
        rest: the other entries of the file, such as `rest["optimizer"]`.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> torch.save({"model": model.state_dict(), "epoch": 3}, "trained.pt")
        >>> normswap.load("trained.pt", architecture=model)
        Loaded(Sequential, not converted, rest: epoch)
    """

    model: nn.Module
    plan: SwapPlan | None
    history: tuple[Step, ...]
    rest: dict[str, Any]

    def __repr__(self) -> str:
        plan = "not converted" if self.plan is None else pluralize(len(self.plan.swaps), "swap")
        rest = f", rest: {', '.join(map(str, self.rest))}" if self.rest else ""
        return f"Loaded({type(self.model).__name__}, {plan}{rest:.200})"


Loaded.__module__ = "normswap"  # its public path, which pickles contain


def load(
    path: str | Path, *, architecture: Architecture | None = None, entry: str | None = None, trust: bool = False
) -> Loaded:
    """Load a model, converted or not, from any checkpoint: a state dict, a training checkpoint, a folder of shards.

    A model that is built here is returned in evaluation mode; a pickled module keeps its mode. Classification heads
    that the model does not have are dropped. If the file lacks the head of the model, the head keeps its random
    initialization and a warning is issued.

    Args:
        path: the file, or the folder.
        architecture: the model of the tensors; needed if neither the record of the file nor the tensors identify it.
            `"timm:NAME[,key=value...]"`, `"torchvision:NAME[,...]"`, `"hf:FOLDER"`, `"file.py:function"`,
            a module (the weights are loaded into a copy) or a function that returns a module.
        entry: which of several sets of weights to load, such as `"state_dict_ema"`; dots separate nested entries.
        trust: run the code that the file names: pickled objects, or an architecture in a Python file.

    Returns:
        `Loaded(model, plan, history, rest)`; `print` shows it as tables.

    Raises:
        CheckpointError: the file is not a checkpoint, is damaged, was changed after normswap wrote it, or runs code and
            `trust` is not set.
        ArchitectureError: the architecture is unknown, ambiguous or cannot be built, or the tensors do not fit it.
        PlanError: the plan in the file does not fit the architecture.
        ArgumentError: `path` or `architecture` is of a wrong type.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> torch.save({"model": model.state_dict(), "epoch": 3}, "trained.pt")
        >>> normswap.load("trained.pt", architecture=model)
        Loaded(Sequential, not converted, rest: epoch)
    """
    require_type(entry, str | None, "entry", "the name of an entry such as 'state_dict_ema'")
    require_type(trust, bool, "trust", "True or False")
    header = read_header(Path(read_path(path, "path", "the name of a file or a folder")))
    checkpoint = read_checkpoint(header, entry=entry, trust=trust and not header.loads_weights_only(architecture))
    header.origin.check_unchanged()
    header.origin.close()
    built = build_model(checkpoint, architecture, trust=trust)
    if built.fit.heads:
        warnings.warn(
            f"{path}: contains no {', '.join(built.fit.heads[:3])}: this part of the model keeps its random "
            "initialization",
            stacklevel=2,
        )
    history = checkpoint.record.history if checkpoint.record else ()
    return Loaded(built.model, built.plan, history, drop_entry(checkpoint.content, checkpoint.contents.weights))


# --- the model of a checkpoint ----------------------------------------------------------------------------------------


class BuiltModel(NamedTuple):
    """A model with the weights of a file.

    Attributes:
        model: the model.
        names: the names of its tensors in the file.
        architecture: the name that builds it, None if it was not built from a name.
        plan: the plan in the file, completed for this model.
        fit: what only the file or only the model has.
    """

    model: nn.Module
    names: StoredNames
    architecture: str | None
    plan: SwapPlan | None
    fit: LoadReport = LoadReport()


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint, its model, and example inputs for the model (None if their size is unknown)."""

    checkpoint: Checkpoint
    built: BuiltModel
    inputs: Any

    @property
    def model(self) -> nn.Module:
        """The model in the file."""
        return self.built.model

    @property
    def architecture(self) -> str | None:
        """The name that builds the model, None if it was not built from a name."""
        return self.built.architecture

    def notes(self, name: str) -> tuple[str, ...]:
        """Return notes on tensors that only the file or only the model has, and on other names; `name` is the model."""
        return (*self.built.fit.notes(name), *self.name_notes)

    @property
    def name_notes(self) -> tuple[str, ...]:
        """Notes on other names in the file, and on norms in the file that the model does not have."""
        names = self.built.names
        renamed = describe_names(names.rename)
        norms = [key.rpartition(".")[0] for key in names.foreign if key.endswith(f".{_VAR}")]
        outside = (
            f"{norms[0]}: {pluralize(len(norms), 'norm')} outside this model, left unchanged; to convert the whole "
            "network, pass its architecture"
            if norms
            else None
        )
        return tuple(note for note in (renamed, outside) if note)


def open_model(
    checkpoint: Checkpoint, architecture: Architecture | None = None, *, inputs: Inputs = None, trust: bool = False
) -> OpenedModel:
    """Build the model in a checkpoint and example inputs for it.

    Args:
        architecture: overrides the one in the record.
        inputs: example inputs, or a function that takes the model and returns them. Default: those stored in an
            exported program, or random images of the default size that timm's configuration gives.

    Raises:
        ArchitectureError, PlanError: as `load`.
    """
    built = build_model(checkpoint, architecture, trust=trust)
    if inputs is None and checkpoint.program is not None:
        inputs = program_inputs(checkpoint.program.program)
    elif inputs is None:
        inputs = default_inputs(built.model, built.architecture)
    elif callable(inputs) and not isinstance(inputs, Tensor):
        inputs = inputs(built.model)
    return OpenedModel(checkpoint, built, inputs)


def default_inputs(model: nn.Module, architecture: str | None) -> Tensor | None:
    """Return a random batch of the size in timm's configuration of a model, None if that is unknown."""
    shape = default_input_shape(model, architecture)
    return None if shape is None else random_tensor(shape, floating_dtype(model))


def floating_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating point parameter of a model, float32 if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return standard normal values; integers 0 to 9 for integer dtypes, 0 to 255 for uint8, both values for bool."""
    generator = torch.Generator().manual_seed(seed)
    if not (dtype.is_floating_point or dtype.is_complex):
        limit = _INTEGER_LIMITS.get(dtype, _INTEGER_LIMIT)
        return torch.randint(0, limit, shape, generator=generator).to(dtype)
    drawn_as = torch.complex64 if dtype.is_complex else torch.float32
    return torch.randn(shape, generator=generator, dtype=drawn_as).to(dtype)


def build_model(checkpoint: Checkpoint, architecture: Architecture | None = None, *, trust: bool = False) -> BuiltModel:
    """Build the model of a checkpoint, convert it by the plan in the file, and load the weights.

    A pickled module is returned as it is.

    Raises:
        ArchitectureError, PlanError: as `load`.
    """
    path, weights, record = checkpoint.path, checkpoint.weights, checkpoint.record
    plan = record.plan if record else None
    if record is not None and record.payload == "program" and checkpoint.program is None:
        raise CheckpointError(
            f"{path}: a converted exported program can only be used with its graph: pass trust=True without an "
            "architecture if you trust the source of the file"
        )
    if isinstance(weights, nn.Module):
        if architecture is not None:
            raise ArchitectureError(f"{path}: a pickled module includes its architecture: leave architecture= out")
        return BuiltModel(weights, match_names([], []), None, plan)
    source = architecture or recorded_architecture(checkpoint, trust=trust)
    if source is None:
        try:
            source = require_unique(identify_state_dict(weights, checkpoint.content, prefix=checkpoint.contents.prefix))
        except (AmbiguityError, CheckpointError) as error:
            raise type(error)(f"{path}: {error}") from None
        _log.info("%s: identified as %s by the names and shapes of its tensors", path, source)
    named = isinstance(source, str) and (architecture is None or source.startswith("hf:"))
    with limit_allocation(path, len(weights)) if named and not trust else nullcontext():
        model = _instantiate(source, trust=trust, initialized=False)
        names = _match_model_names(checkpoint, weights, model)
        if any(name not in names.stored for name, _ in model.named_parameters()):  # such as a head for other classes
            model = _instantiate(source, trust=trust)
    if plan is not None:
        try:
            plan = complete_plan(model, _select_own_sites(plan, names), prefix=names.prefix)
            if not gated_modules(model):
                apply_plan(model, plan)
                if record is not None and record.baked is not None:
                    apply_bake_plan(model, record.baked)
                names = _match_model_names(checkpoint, weights, model)
        except PlanError as error:
            raise _plan_misfit(checkpoint, source, error) from error
    try:
        fit = load_weights(
            model, _rename_for_model(weights, names, model), source if isinstance(source, str) else type(model).__name__
        )
    except ArchitectureError as error:
        raise type(error)(f"{path}: {error}{_suggest_architectures(checkpoint, source)}") from error
    release_mapped_pages(weights.values())
    return BuiltModel(model.eval(), names, source if isinstance(source, str) else None, plan, fit)


def _match_model_names(checkpoint: Checkpoint, weights: Mapping[str, Tensor], model: nn.Module) -> StoredNames:
    """The names of the model's tensors in the file, which may contain copies of the model."""
    with prefix_errors(checkpoint.path):
        return match_names_and_copies(
            weights, model.state_dict(), prefix=checkpoint.contents.prefix, rename=get_key_renaming(model)
        )


def _select_own_sites(plan: SwapPlan, names: StoredNames) -> SwapPlan:
    """A plan made from tensor names without the sites of further copies of the model, and with the model's names.

    Other plans have neither.
    """
    prefixes = tuple(copy.prefix for copy in names.copies)
    kept = tuple(s for s in plan.swaps if s.class_name != ANY_CLASS or not prefixes or not s.fqn.startswith(prefixes))
    return replace(
        plan, swaps=tuple(_rename_site(swap, names) if swap.class_name == ANY_CLASS else swap for swap in kept)
    )


def _rename_site(swap: Swap, names: StoredNames) -> Swap:
    if names.rename is None:
        return swap
    tensor = names.rename(join_fqn(swap.fqn.removeprefix(names.prefix), "weight"))
    return replace(swap, fqn=f"{names.prefix}{tensor.rpartition('.')[0]}")


def _plan_misfit(checkpoint: Checkpoint, architecture_tried: Architecture, error: PlanError) -> PlanError:
    """The error for a plan in a file that does not fit an architecture, which may contradict the record."""
    recorded = checkpoint.record.architecture if checkpoint.record else None
    if recorded is None or architecture_tried == recorded:
        return PlanError(f"{checkpoint.path}: {error}")
    tried = architecture_tried if isinstance(architecture_tried, str) else "the given architecture"
    return PlanError(
        f"{checkpoint.path}: was converted as {recorded}, and its plan does not fit {tried}: leave architecture= out "
        f"({error})"
    )


def _suggest_architectures(checkpoint: Checkpoint, architecture_tried: Architecture) -> str:
    """The architectures that the tensors fit, for the message that they do not fit the one that was tried."""
    try:
        found = identify_state_dict(
            get_state_dict(checkpoint.weights), checkpoint.content, prefix=checkpoint.contents.prefix
        )
    except CheckpointError:  # the file contains several models
        return ""
    fitting = [f"architecture={group[0].architecture!r}" for group in found.functions]
    if not fitting or any(architecture_tried == candidate.architecture for candidate in found.candidates):
        return ""
    more = f" or {len(fitting) - _MAX_SUGGESTIONS} others" if len(fitting) > _MAX_SUGGESTIONS else ""
    return f"; the tensors fit {' or '.join(fitting[:_MAX_SUGGESTIONS])}{more}"


def recorded_architecture(checkpoint: Checkpoint, *, trust: bool) -> str | None:
    """Return the architecture that the record or the folder of a file names, None if neither does.

    Raises:
        ArchitectureError: building it could run code (see `permissions`), and the file is not trusted.
    """
    recorded = checkpoint.record.architecture if checkpoint.record else None
    path = checkpoint.path
    if recorded is None:
        return f"hf:{path}" if (path / "config.json").is_file() else None
    try:
        in_folder = path.is_dir() and refers_to_folder(recorded, path)
        recorded = with_folder(recorded, path) if in_folder else recorded
        external = None if in_folder else describe_external_source(recorded)
        if not trust and external is None:
            check_untrusted_name(recorded, folder=path)
    except ArchitectureError as error:
        raise ArchitectureError(
            f"{path}: names the architecture {recorded!r:.100}: {error}: pass it as architecture=, or pass trust=True "
            "if you trust the source of the file"
        ) from None
    if external is not None and not trust:
        raise ArchitectureError(f"{path}: {external}, or trust=True")
    return recorded


def select_architectures(
    checkpoints: Sequence[Checkpoint], architecture: str | None, *, trust: bool
) -> list[str | None]:
    """Return the architecture of each of several files with the same model; None for files that need none.

    The architecture in a file's own record goes first: `architecture` may be that of another file. If it is None, the
    architecture that one file records is used for the files that record none.
    """
    if architecture is None:
        recorded = [recorded_architecture(each, trust=trust) for each in checkpoints]
        architecture = next(filter(None, recorded), None)
    return [None if each.payload == "module" or _builds_without_trust(each) else architecture for each in checkpoints]


def _builds_without_trust(checkpoint: Checkpoint) -> bool:
    """Return whether the record of a file names an architecture that can be built without trust."""
    try:
        named = checkpoint.record is not None and checkpoint.record.architecture is not None
        return named and recorded_architecture(checkpoint, trust=False) is not None
    except ArchitectureError:
        return False


def _rename_for_model(
    weights: Mapping[str, Tensor], names: StoredNames, model: nn.Module
) -> "OrderedDict[str, Tensor]":
    """The tensors under the model's own names, with torch's metadata of its modules."""
    state = OrderedDict((name, weights[key]) for name, key in names.stored.items())
    # Some formats do not store torch's metadata, which has the kind of gate; the model was built by the plan.
    own = getattr(weights, "_metadata", None)
    wanted: Any = model.state_dict()._metadata  # type: ignore[attr-defined]
    if isinstance(own, Mapping):
        stored = {fqn: own.get(_stored_module_name(names, fqn)) for fqn in wanted}
        wanted = OrderedDict((fqn, note if note is not None else {}) for fqn, note in stored.items())
    state._metadata = wanted  # type: ignore[attr-defined]
    return state


def _stored_module_name(names: StoredNames, fqn: str) -> str:
    return names.stored_key(join_fqn(fqn, "_")).rpartition(".")[0]


def _instantiate(source: Architecture, *, trust: bool, initialized: bool = True) -> nn.Module:
    if isinstance(source, str):
        return build_architecture(source, trust=trust, initialized=initialized)
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
