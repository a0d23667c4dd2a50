"""The model that a recipe starts from, as its file describes it.

A file that normswap wrote knows its architecture and its conversion. What the user wrote of either may add to that; a
contradiction is an error that names the key. What a shipped recipe says is a default for files that do not know.
"""

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

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
from normswap.errors import AmbiguityError, ArchitectureError, CheckpointError, PlanError, RecipeError
from normswap.finetune.recipe import Recipe, read_recipe, shipped_recipes
from normswap.surgery.importance import gated_modules
from normswap.surgery.plan import SwapPlan
from normswap.surgery.selection import first_matching_patterns

# MERGED DOC: Fetching with an end: without a network what is cached is used, and what is not fails at once.


_CONNECT_TIMEOUT = 4.0  # seconds for a name server and a handshake
_READ_TIMEOUT = 10.0  # seconds without an answer, for libraries that would wait without end


class HubStatus(NamedTuple):
    """Whether the hub, or the proxy before it, answers; if not, what is in the way and what to do about it."""

    is_reachable: bool
    reason: str = ""


@contextmanager
def limit_hub_wait() -> Iterator[HubStatus]:
    """Yield whether the hub can be reached; if not, whatever the block asks of it fails at once if it is not cached."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield HubStatus(False, "HF_HUB_OFFLINE forbids fetching them: unset it")
        return
    if _can_connect(*_resolve_address(constants.ENDPOINT)):
        yield HubStatus(True)
        return
    host = urlsplit(constants.ENDPOINT).hostname
    was_offline, old_timeout = constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    _set_offline(constants, True)
    socket.setdefaulttimeout(_READ_TIMEOUT)
    try:
        yield HubStatus(False, f"{host} cannot be reached: connect to the network")
    finally:
        _set_offline(constants, was_offline)
        socket.setdefaulttimeout(old_timeout)


def _set_offline(constants: Any, value: bool) -> None:
    import huggingface_hub.utils as utils

    constants.HF_HUB_OFFLINE = value
    # Older versions decide it for a session when that is made.
    getattr(utils, "reset_sessions", lambda: None)()


def _resolve_address(url: str) -> tuple[str, int]:
    """The host and port to which a request for `url` connects first: those of a proxy, if one is set for it."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    default = {"http": 80, "https": 443}.get(parts.scheme, 1080)
    return parts.hostname or "", parts.port or default


def _can_connect(host: str, port: int) -> bool:
    """Say whether a connection comes about in time. In a thread, since name servers keep to no limit."""
    results: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), _CONNECT_TIMEOUT).close()
            results.append(True)
        except OSError:
            results.append(False)

    thread = Thread(target=connect, name=f"connection to {host} (process {os.getpid()})", daemon=True)
    thread.start()
    thread.join(_CONNECT_TIMEOUT)
    return results == [True]


STATE = "state.pt"
MODEL = "model.pt"
# Architectures of these schemes are comparable by their names; a folder or a file may have been moved.
_ZOO_SCHEMES = ("timm", "torchvision")


@dataclass(frozen=True)
class StartingModel:
    """A model as it was found, with what its file says of it; `notes` are for the user."""

    model: nn.Module
    architecture: str | None
    plan: SwapPlan | None
    history: tuple[Step, ...]
    notes: tuple[str, ...] = ()


def load_from_recipe(recipe: Recipe, *, trust: bool) -> StartingModel:
    """Return the model in the recipe's checkpoint, or the one of its architecture.

    Raises:
        RecipeError: the checkpoint contradicts what the user wrote.
        CheckpointError: it cannot be read; if a recipe writes that file, the error names the recipe.
        ArchitectureError: the architecture cannot be built, or does not fit the tensors.
    """
    _check_code(recipe, trust=trust)
    wanted = recipe.model
    if wanted.checkpoint is None:
        torch.manual_seed(recipe.train.seed)
        architecture = wanted.architecture or ""
        build = _fetch_pretrained if wanted.pretrained else build_architecture
        return StartingModel(build(architecture, trust=trust), architecture, None, ())
    path = Path(wanted.checkpoint)
    _check_exists(path)
    checkpoint = read_checkpoint(path, entry=wanted.entry, trust=trust)
    source = _build_model_source(checkpoint, _select_architecture(recipe, checkpoint, trust=trust), trust=trust)
    _check_conversion(recipe, source)
    return source


def _check_code(recipe: Recipe, *, trust: bool) -> None:
    """Refuse a recipe that names code: recipes are passed on like any other file."""
    own = recipe.model.architecture
    if own is not None and runs_python_file(own) and not trust:
        raise RecipeError(
            f'model.architecture: "{own}" is Python code, which a recipe does not run unasked: pass trust=True if you '
            "trust it"
        )


def _fetch_pretrained(architecture: str, *, trust: bool) -> nn.Module:
    """The model of an architecture with its published weights."""
    with limit_hub_wait() as network:
        try:
            return build_architecture(architecture, pretrained=True, trust=trust)
        except ArchitectureError as error:
            if network.is_reachable or not isinstance(error.__cause__, OSError):
                raise
            raise ArchitectureError(
                f"{architecture}: its published weights are not cached, and {network.reason}, or give weights with "
                "model.checkpoint and set model.pretrained=false"
            ) from error


def load_from_state(recipe: Recipe, state: Path, *, trust: bool) -> StartingModel:
    """Return the model in the saved state of a run; raises as `source_of_recipe`."""
    _check_code(recipe, trust=trust)
    checkpoint = read_checkpoint(state, entry="state_dict", trust=trust)
    own = _recipe_architecture(recipe)
    recorded = checkpoint.record.architecture if checkpoint.record else None
    # What the state says of its classes goes first; code and folders that the recipe names too are the user's own.
    same = own and recorded and _is_same_architecture(own, recorded)
    return _build_model_source(checkpoint, recorded if same else None, trust=trust)


def _recipe_architecture(recipe: Recipe) -> str | None:
    """What the recipe names, or the configuration in the folder that it starts from."""
    checkpoint_path = recipe.model.checkpoint
    return recipe.model.architecture or (
        f"hf:{checkpoint_path}" if checkpoint_path and Path(checkpoint_path).is_dir() else None
    )


def _is_same_architecture(own: str, recorded: str) -> bool:
    """Whether two architectures are one but for keywords, which a file may set."""
    own_name, other = parse_architecture(own), parse_architecture(recorded)
    if (own_name.scheme, own_name.model) != (other.scheme, other.model):
        return False
    check_keywords(
        recorded, {key: value for key, value in other.keywords.items() if own_name.keywords.get(key) != value}
    )
    return True


def _build_model_source(checkpoint: Checkpoint, architecture: str | None, *, trust: bool) -> StartingModel:
    built = build_model(checkpoint, architecture, trust=trust)
    record, heads = checkpoint.record, built.fit.heads
    notes = []
    if heads:
        notes.append(f"{checkpoint.path} has no {', '.join(heads[:3])}: that part of the model starts at random")
    return StartingModel(built.model, built.architecture, built.plan, record.history if record else (), tuple(notes))


# --- which architecture -----------------------------------------------------------------------------------------------


def _select_architecture(recipe: Recipe, checkpoint: Checkpoint, *, trust: bool) -> str | None:
    """The file's own architecture, completed by what the user wrote; the recipe's default if neither says anything."""
    own = recipe.model.architecture
    is_set_by_user = own is not None and recipe.is_set_by_user("model.architecture")
    if checkpoint.payload != "state dict":
        if is_set_by_user and checkpoint.payload == "module":
            _raise_contradiction(
                "model.architecture", repr(own), checkpoint.path, "a pickled module, which brings its own"
            )
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
    """The architecture that the tensors fit, if there is just one; the default if it is among several, or none fits."""
    found = identify_state_dict(checkpoint.weights, checkpoint.content)  # type: ignore[arg-type]
    wanted = _without_tag(parse_architecture(default))
    for candidate in found.candidates:
        name = parse_architecture(candidate.architecture)
        if _without_tag(name) == wanted:
            return _with_keywords(default, name)
    try:
        return require_unique(found)
    except AmbiguityError:
        return default


def _merge_architectures(known: str, own: str, path: Path) -> str:
    """The architecture as the user wrote it, with the keywords that only the file has."""
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


# --- which conversion -------------------------------------------------------------------------------------------------


def _check_conversion(recipe: Recipe, source: StartingModel) -> None:
    """Refuse what the user wrote of a conversion if the model is converted already, in another way."""
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
                f"a conversion of {_format_names(not_included)} too",
            )
    if wanted.exclude and recipe.is_set_by_user("convert.exclude"):
        excluded = [site for site in sites if site in _match_sites(wanted.exclude, names)]
        if excluded:
            _raise_contradiction(
                "convert.exclude", _format_toml(wanted.exclude), path, f"a conversion of {_format_names(excluded)} too"
            )


def _match_sites(patterns: Iterable[str], names: list[tuple[str]]) -> set[str]:
    """The sites that one of the patterns matches; a pattern may match none of the converted ones."""
    found: set[str] = set()
    for pattern in patterns:
        try:
            found |= {*first_matching_patterns([pattern], names)}
        except PlanError:
            continue
    return found


def _format_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", +{len(names) - 3} more" if len(names) > 3 else "")


def _format_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(_format_toml, value))}]" if isinstance(value, list | tuple) else f'"{value}"'


def _raise_contradiction(dotted_key: str, value: str, path: Path, found: str) -> NoReturn:
    raise RecipeError(
        f"{dotted_key}: {value} contradicts the checkpoint {path}, which holds {found}: leave the key out "
        f"(--set {dotted_key}=none), or choose another model.checkpoint"
    )


# --- a checkpoint that is not there -----------------------------------------------------------------------------------


def _check_exists(path: Path) -> None:
    """Refuse a checkpoint that cannot be read; if a recipe writes it, say which one to run."""
    if path.exists() or path.name != MODEL:
        check_readable(path)
        return
    recipe_names = [name for name in shipped_recipes() if read_recipe(name).output == path.parent]
    recipe_name = recipe_names[0] if recipe_names else None
    if (path.parent / STATE).is_file():
        raise CheckpointError(
            f"{path}: not written yet, the run in {path.parent} has not come to its end: finish it with normswap "
            f"finetune {recipe_name or 'RECIPE'} --resume"
        )
    if recipe_name is not None:
        raise CheckpointError(
            f"{path}: no such file; the recipe {recipe_name} writes it: run normswap finetune {recipe_name} first, in this folder"
        )
    check_readable(path)
