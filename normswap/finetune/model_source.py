"""The model before training: that of a checkpoint, of an architecture, or of the saved state of a run.

A file that normswap wrote records its architecture and its conversion. Keys that the user set may add to the record; a
key that contradicts it is refused. Keys of a recipe that comes with normswap are defaults for files without a record.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from normswap.checkpoints.architecture.identification import identify_state_dict, require_unique
from normswap.checkpoints.architecture.permissions import check_keywords
from normswap.checkpoints.architecture.registry import (
    ArchitectureName,
    build_architecture,
    parse_architecture,
    runs_python_file,
    with_keyword,
)
from normswap.checkpoints.io.atomic_files import check_readable
from normswap.checkpoints.loading import build_model, recorded_architecture
from normswap.checkpoints.reading import Checkpoint, read_checkpoint
from normswap.checkpoints.record import Step
from normswap.errors import AmbiguityError, CheckpointError, PlanError, RecipeError
from normswap.finetune.pretrained import build_pretrained
from normswap.finetune.recipe import Recipe, is_shipped, read_recipe, shipped_recipes
from normswap.surgery.importance import gated_modules
from normswap.surgery.plan import SwapPlan
from normswap.surgery.selection import first_matching_patterns

logger = logging.getLogger(__name__)

STATE = "state.pt"
MODEL = "model.pt"
# Architectures that can be compared by name. Others name a folder or a file, which may have been moved.
_ZOO_SCHEMES = ("timm", "torchvision")


@dataclass(frozen=True)
class StartingModel:
    """The model before training: its architecture, plan and history if they are known, and notes for the user."""

    model: nn.Module
    architecture: str | None
    plan: SwapPlan | None
    history: tuple[Step, ...]
    notes: tuple[str, ...] = ()


def load_from_recipe(recipe: Recipe, *, trust: bool) -> StartingModel:
    """Return the model in the recipe's checkpoint, or a new one of its architecture.

    Raises:
        RecipeError: the checkpoint contradicts a key that the user set, or the recipe names code without `trust`.
        CheckpointError: the checkpoint cannot be read; if a recipe writes that file, the error names the recipe.
        ArchitectureError: the architecture cannot be built, or does not fit the tensors.
    """
    recipe = _resolve_code(recipe, trust=trust)
    wanted = recipe.model
    if wanted.checkpoint is None:
        torch.manual_seed(recipe.train.seed)
        architecture = wanted.architecture or ""
        build = build_pretrained if wanted.pretrained else build_architecture
        return StartingModel(build(architecture, trust=trust), architecture, None, ())
    path = Path(wanted.checkpoint)
    _check_exists(path)
    checkpoint = read_checkpoint(path, entry=wanted.entry, trust=trust)
    source = _build_starting_model(checkpoint, _select_architecture(recipe, checkpoint, trust=trust), trust=trust)
    _check_conversion(recipe, source)
    return source


def find_python_file(recipe: Recipe, key: str, path: str, *, trust: bool, shown: str | None = None) -> Path:
    """Return where a Python file is that a recipe names.

    Args:
        key, shown: the key that names it, and its value if that is more than the path, for the error.

    Raises:
        RecipeError: the file does not come with normswap, and `trust` is false: recipes are shared like other files.
    """
    found = recipe.find_file(path)
    if not trust and not is_shipped(found):
        raise RecipeError(
            f'{key}: "{shown or path}" is Python code, which a recipe does not run by default: pass trust=True if '
            "you trust it"
        )
    return found


def _resolve_code(recipe: Recipe, *, trust: bool) -> Recipe:
    """The recipe with the place of the Python file that builds its model, which counts as a choice of the user."""
    own = recipe.model.architecture
    if own is None or not runs_python_file(own):
        return recipe
    path, colon, function = own.partition(".py:")
    found = find_python_file(recipe, "model.architecture", f"{path}.py", trust=trust, shown=own)
    model = replace(recipe.model, architecture=f"{found}{colon.removeprefix('.py')}{function}")
    written = recipe.written and recipe.written | {"model.architecture"}
    return replace(recipe, model=model, written=written)


def load_from_state(recipe: Recipe, state: Path, *, trust: bool) -> StartingModel:
    """Return the model in the saved state of a run; raises as `load_from_recipe`."""
    recipe = _resolve_code(recipe, trust=trust)
    checkpoint = read_checkpoint(state, entry="state_dict", trust=trust)
    own = _recipe_architecture(recipe)
    recorded = checkpoint.record.architecture if checkpoint.record else None
    # The recorded number of classes may differ from the recipe's (model.new_head), so the record is used. If the recipe
    # names the same code or folder, the user has chosen it, and building it needs no further consent.
    same = own and recorded and _is_same_architecture(own, recorded)
    return _build_starting_model(checkpoint, recorded if same else None, trust=trust)


def _recipe_architecture(recipe: Recipe) -> str | None:
    """The architecture that the recipe names, or the configuration in the folder that is its checkpoint."""
    checkpoint_path = recipe.model.checkpoint
    return recipe.model.architecture or (
        f"hf:{checkpoint_path}" if checkpoint_path and Path(checkpoint_path).is_dir() else None
    )


def _is_same_architecture(own: str, recorded: str) -> bool:
    """Whether two architectures differ at most in keywords that a file is allowed to set."""
    own_name, other = parse_architecture(own), parse_architecture(recorded)
    if (own_name.scheme, own_name.model) != (other.scheme, other.model):
        return False
    check_keywords(
        recorded, {key: value for key, value in other.keywords.items() if own_name.keywords.get(key) != value}
    )
    return True


def _build_starting_model(checkpoint: Checkpoint, architecture: str | None, *, trust: bool) -> StartingModel:
    checkpoint.refuse_baked("fine-tune")
    built = build_model(checkpoint, architecture, trust=trust)
    record, heads = checkpoint.record, built.fit.heads
    notes = []
    if heads:
        notes.append(f"{checkpoint.path} has no {_list_names(heads)}: these weights are initialized at random")
    return StartingModel(built.model, built.architecture, built.plan, record.history if record else (), tuple(notes))


# --- the architecture of the checkpoint -------------------------------------------------------------------------------


def _select_architecture(recipe: Recipe, checkpoint: Checkpoint, *, trust: bool) -> str | None:
    """The recorded or identified architecture, with keywords that the user set; else that of the recipe."""
    own = recipe.model.architecture
    is_set_by_user = own is not None and recipe.is_set_by_user("model.architecture")
    if checkpoint.payload != "state dict":
        if is_set_by_user and checkpoint.payload == "module":
            _raise_contradiction("model.architecture", repr(own), checkpoint.path, "a pickled module with its own")
        return own if is_set_by_user else None
    if own is None:
        return None
    record = checkpoint.record.architecture if checkpoint.record else None
    if is_set_by_user and (record is None or _is_path(own) or _is_path(record)):
        return own
    known = recorded_architecture(checkpoint, trust=trust)
    if known is None:
        return _identify(checkpoint, own)
    return _merge_architectures(known, own, checkpoint.path) if is_set_by_user else known


def _is_path(architecture: str) -> bool:
    return parse_architecture(architecture).scheme not in _ZOO_SCHEMES


def _identify(checkpoint: Checkpoint, default: str) -> str:
    """The architecture that the tensors fit; the default if it is one of several, or if none fits."""
    found = identify_state_dict(checkpoint.weights, checkpoint.content)  # type: ignore[arg-type]
    wanted = _without_tag(parse_architecture(default))
    for candidate in found.candidates:
        name = parse_architecture(candidate.architecture)
        if _without_tag(name) == wanted:
            return _with_keywords(default, name)
    try:
        return require_unique(found)
    except AmbiguityError as error:
        logger.info("%s: %s; using the recipe's %s", checkpoint.path, error, default)
        return default


def _merge_architectures(known: str, own: str, path: Path) -> str:
    """The architecture that the user named, with the keywords that only the file has."""
    recorded_name, own_name = parse_architecture(known), parse_architecture(own)
    if _without_tag(recorded_name) != _without_tag(own_name):
        _raise_contradiction("model.architecture", repr(own), path, repr(known))
    for key, value in recorded_name.keywords.items():
        if own_name.keywords.get(key, value) != value:
            _raise_contradiction(
                "model.architecture", f"{key}={own_name.keywords[key]!r}", path, f"{key}={value!r} ({known!r})"
            )
    return _with_keywords(own, recorded_name)


def _with_keywords(architecture: str, other: ArchitectureName) -> str:
    for key, value in other.keywords.items():
        architecture = with_keyword(architecture, key, value)
    return architecture


def _without_tag(name: ArchitectureName) -> tuple[str, str]:
    return name.scheme, name.model.partition(".")[0]


# --- the conversion of the checkpoint ---------------------------------------------------------------------------------


def _check_conversion(recipe: Recipe, source: StartingModel) -> None:
    """Refuse keys of [convert] that the user set, if the model is converted already with other values."""
    layers, path = gated_modules(source.model), Path(recipe.model.checkpoint or "")
    if not layers:
        return
    settings: dict[str, set[Any]] = {
        f"convert.{key}": {getattr(layer, key) for layer in layers.values()}
        for key in ("gate", "bn_statistics", "synchronize")
    }
    wanted = recipe.convert
    for dotted_key, found in settings.items():
        value = getattr(wanted, dotted_key.partition(".")[2])
        if value is not None and recipe.is_set_by_user(dotted_key) and value not in found:
            _raise_contradiction(
                dotted_key,
                _format_toml(value),
                path,
                f"a conversion with {' and '.join(sorted(map(_format_toml, found)))}",
            )
    swaps = source.plan.swaps if source.plan else ()
    starts = {swap.start for swap in swaps if not swap.untrained}
    if swaps and recipe.is_set_by_user("convert.start") and wanted.start not in starts:
        found_starts = " and ".join(sorted(_format_toml(start) for start in starts if start)) or "at the old norms"
        _raise_contradiction(
            "convert.start", _format_toml(wanted.start), path, f"a conversion that starts {found_starts}"
        )
    kinds = {swap.kind for swap in source.plan.swaps} if source.plan else set()
    if recipe.is_set_by_user("convert.kinds") and not kinds <= {*wanted.kinds}:
        _raise_contradiction(
            "convert.kinds", _format_toml(wanted.kinds), path, f"a conversion of {_format_toml(sorted(kinds))}"
        )
    _check_patterns(recipe, [*layers], path)


def _check_patterns(recipe: Recipe, sites: list[str], path: Path) -> None:
    wanted, names = recipe.convert, [(site,) for site in sites]
    if wanted.include and recipe.is_set_by_user("convert.include"):
        not_included = [site for site in sites if site not in _match_sites(wanted.include, names)]
        if not_included:
            _raise_contradiction(
                "convert.include",
                _format_toml(wanted.include),
                path,
                f"a conversion of {_list_names(not_included)} too",
            )
    if wanted.exclude and recipe.is_set_by_user("convert.exclude"):
        excluded = [site for site in sites if site in _match_sites(wanted.exclude, names)]
        if excluded:
            _raise_contradiction(
                "convert.exclude", _format_toml(wanted.exclude), path, f"a conversion of {_list_names(excluded)} too"
            )


def _match_sites(patterns: Iterable[str], names: list[tuple[str]]) -> set[str]:
    """The converted sites that one of the patterns matches; a pattern may match none."""
    found: set[str] = set()
    for pattern in patterns:
        try:
            found |= {*first_matching_patterns([pattern], names)}
        except PlanError:
            continue
    return found


def _list_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", +{len(names) - 3} more" if len(names) > 3 else "")


def _format_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(_format_toml, value))}]" if isinstance(value, list | tuple) else f'"{value}"'


def _raise_contradiction(dotted_key: str, value: str, path: Path, found: str) -> NoReturn:
    raise RecipeError(
        f"{dotted_key}: {value} contradicts the checkpoint {path}, which contains {found}: remove the key "
        f"(--set {dotted_key}=none), or choose another model.checkpoint"
    )


# --- a missing checkpoint ---------------------------------------------------------------------------------------------


def _check_exists(path: Path) -> None:
    """Refuse a checkpoint that cannot be read; if a recipe writes it, name the command that runs this recipe."""
    if path.exists() or path.name != MODEL:
        check_readable(path)
        return
    recipe_names = [name for name in shipped_recipes() if read_recipe(name).output == path.parent]
    recipe_name = recipe_names[0] if recipe_names else None
    if (path.parent / STATE).is_file():
        raise CheckpointError(
            f"{path}: not written yet, since the run in {path.parent} was interrupted: finish it with normswap "
            f"finetune {recipe_name or 'RECIPE'} --resume"
        )
    if recipe_name is not None:
        raise CheckpointError(
            f"{path}: no such file; the recipe {recipe_name} writes it: run normswap finetune {recipe_name} first, in "
            "this folder"
        )
    check_readable(path)
