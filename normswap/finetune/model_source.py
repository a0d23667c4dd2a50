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

from normswap.checkpoints.architecture.identification import decide, recognise
from normswap.checkpoints.architecture.permissions import check_keywords
from normswap.checkpoints.architecture.registry import (
    ArchitectureName,
    build_architecture,
    is_foreign_code,
    parse_architecture,
    with_keyword,
)
from normswap.checkpoints.io.atomic_write import check_readable
from normswap.checkpoints.loading import Checkpoint, build_model, read_checkpoint, said_architecture
from normswap.checkpoints.record import Step
from normswap.errors import AmbiguityError, ArchitectureError, CheckpointError, PlanError, RecipeError
from normswap.finetune.recipe import Recipe, read_recipe, shipped_recipes
from normswap.surgery.importance import gated_modules
from normswap.surgery.plan import SwapPlan
from normswap.surgery.selection import first_matches

# MERGED DOC: Fetching with an end: without a network what is cached is used, and what is not fails at once.


_PATIENCE = 4.0  # seconds for a name server and a handshake
_SLOWEST = 10.0  # seconds without an answer, for libraries that would wait without end


class Network(NamedTuple):
    """Whether the hub, or the proxy before it, answers; if not, what is in the way and what to do about it."""

    is_reachable: bool
    obstacle: str = ""


@contextmanager
def bounded_fetching() -> Iterator[Network]:
    """Yield whether the hub can be reached; if not, whatever the block asks of it fails at once if it is not cached."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Network(False, "HF_HUB_OFFLINE forbids fetching them: unset it")
        return
    if _answers(*_address(constants.ENDPOINT)):
        yield Network(True)
        return
    host = urlsplit(constants.ENDPOINT).hostname
    before, patience = constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    _set_offline(constants, True)
    socket.setdefaulttimeout(_SLOWEST)
    try:
        yield Network(False, f"{host} cannot be reached: connect to the network")
    finally:
        _set_offline(constants, before)
        socket.setdefaulttimeout(patience)


def _set_offline(constants: Any, value: bool) -> None:
    import huggingface_hub.utils as utils

    constants.HF_HUB_OFFLINE = value
    # Older versions decide it for a session when that is made.
    getattr(utils, "reset_sessions", lambda: None)()


def _address(url: str) -> tuple[str, int]:
    """The host and port to which a request for `url` connects first: those of a proxy, if one is set for it."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    default = {"http": 80, "https": 443}.get(parts.scheme, 1080)
    return parts.hostname or "", parts.port or default


def _answers(host: str, port: int) -> bool:
    """Say whether a connection comes about in time. In a thread, since name servers keep to no limit."""
    answers: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), _PATIENCE).close()
            answers.append(True)
        except OSError:
            answers.append(False)

    thread = Thread(target=connect, name=f"connection to {host} (process {os.getpid()})", daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return answers == [True]


STATE = "state.pt"
MODEL = "model.pt"
# Architectures of these schemes are comparable by their names; a folder or a file may have been moved.
_NAMED = ("timm", "torchvision")


@dataclass(frozen=True)
class Source:
    """A model as it was found, with what its file says of it; `notes` are for the user."""

    model: nn.Module
    architecture: str | None
    plan: SwapPlan | None
    history: tuple[Step, ...]
    notes: tuple[str, ...] = ()


def source_of_recipe(recipe: Recipe, *, trust: bool) -> Source:
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
        build = _fetched if wanted.pretrained else build_architecture
        return Source(build(architecture, trust=trust), architecture, None, ())
    path = Path(wanted.checkpoint)
    _check_there(path)
    checkpoint = read_checkpoint(path, entry=wanted.entry, trust=trust)
    source = _built(checkpoint, _architecture(recipe, checkpoint, trust=trust), trust=trust)
    _check_conversion(recipe, source)
    return source


def _check_code(recipe: Recipe, *, trust: bool) -> None:
    """Refuse a recipe that names code: recipes are passed on like any other file."""
    own = recipe.model.architecture
    if own is not None and is_foreign_code(own) and not trust:
        raise RecipeError(
            f'model.architecture: "{own}" is Python code, which a recipe does not run unasked: pass trust=True if you '
            "trust it"
        )


def _fetched(architecture: str, *, trust: bool) -> nn.Module:
    """The model of an architecture with its published weights."""
    with bounded_fetching() as network:
        try:
            return build_architecture(architecture, pretrained=True, trust=trust)
        except ArchitectureError as error:
            if network.is_reachable or not isinstance(error.__cause__, OSError):
                raise
            raise ArchitectureError(
                f"{architecture}: its published weights are not cached, and {network.obstacle}, or give weights with "
                "model.checkpoint and set model.pretrained=false"
            ) from error


def source_of_state(recipe: Recipe, state: Path, *, trust: bool) -> Source:
    """Return the model in the saved state of a run; raises as `source_of_recipe`."""
    _check_code(recipe, trust=trust)
    checkpoint = read_checkpoint(state, entry="state_dict", trust=trust)
    own = _own_architecture(recipe)
    said = checkpoint.record.architecture if checkpoint.record else None
    # What the state says of its classes goes first; code and folders that the recipe names too are the user's own.
    same = own and said and _started_alike(own, said)
    return _built(checkpoint, said if same else None, trust=trust)


def _own_architecture(recipe: Recipe) -> str | None:
    """What the recipe names, or the configuration in the folder that it starts from."""
    start = recipe.model.checkpoint
    return recipe.model.architecture or (f"hf:{start}" if start and Path(start).is_dir() else None)


def _started_alike(own: str, said: str) -> bool:
    """Whether two architectures are one but for keywords, which a file may set."""
    mine, other = parse_architecture(own), parse_architecture(said)
    if (mine.scheme, mine.model) != (other.scheme, other.model):
        return False
    check_keywords(said, {key: value for key, value in other.keywords.items() if mine.keywords.get(key) != value})
    return True


def _built(checkpoint: Checkpoint, architecture: str | None, *, trust: bool) -> Source:
    built = build_model(checkpoint, architecture, trust=trust)
    record, heads = checkpoint.record, built.fit.heads
    notes = []
    if heads:
        notes.append(f"{checkpoint.path} has no {', '.join(heads[:3])}: that part of the model starts at random")
    return Source(built.model, built.architecture, built.plan, record.history if record else (), tuple(notes))


# --- which architecture -----------------------------------------------------------------------------------------------


def _architecture(recipe: Recipe, checkpoint: Checkpoint, *, trust: bool) -> str | None:
    """The file's own architecture, completed by what the user wrote; the recipe's default if neither says anything."""
    own = recipe.model.architecture
    is_written = own is not None and recipe.is_written("model.architecture")
    if checkpoint.payload != "state dict":
        if is_written and checkpoint.payload == "module":
            _refuse("model.architecture", repr(own), checkpoint.path, "a pickled module, which brings its own")
        return own if is_written else None
    if own is None:
        return None
    record = checkpoint.record.architecture if checkpoint.record else None
    if is_written and (record is None or _is_place(own) or _is_place(record)):
        return own
    known = said_architecture(checkpoint, trust=trust)
    if known is None:
        return _identified(checkpoint, own)
    return _completed(known, own, checkpoint.path) if is_written else known


def _is_place(architecture: str) -> bool:
    return parse_architecture(architecture).scheme not in _NAMED


def _identified(checkpoint: Checkpoint, default: str) -> str:
    """The architecture that the tensors fit, if there is just one; the default if it is among several, or none fits."""
    found = recognise(checkpoint.weights, checkpoint.content)  # type: ignore[arg-type]
    wanted = _without_tag(parse_architecture(default))
    for candidate in found.candidates:
        name = parse_architecture(candidate.architecture)
        if _without_tag(name) == wanted:
            return _with_keywords(default, name)
    try:
        return decide(found)
    except AmbiguityError:
        return default


def _completed(known: str, own: str, path: Path) -> str:
    """The architecture as the user wrote it, with the keywords that only the file has."""
    there, here = parse_architecture(known), parse_architecture(own)
    if _without_tag(there) != _without_tag(here):
        _refuse("model.architecture", repr(own), path, repr(known))
    for key, value in there.keywords.items():
        if here.keywords.get(key, value) != value:
            _refuse("model.architecture", f"{key}={here.keywords[key]!r}", path, f"{key}={value!r} ({known!r})")
    return _with_keywords(own, there)


def _with_keywords(architecture: str, other: ArchitectureName) -> str:
    for key, value in other.keywords.items():
        architecture = with_keyword(architecture, key, value)
    return architecture


def _without_tag(name: ArchitectureName) -> tuple[str, str]:
    return name.scheme, name.model.partition(".")[0]


# --- which conversion -------------------------------------------------------------------------------------------------


def _check_conversion(recipe: Recipe, source: Source) -> None:
    """Refuse what the user wrote of a conversion if the model is converted already, in another way."""
    layers, path = gated_modules(source.model), Path(recipe.model.checkpoint or "")
    if not layers:
        return
    settings: dict[str, set[Any]] = {
        f"convert.{key}": {getattr(layer, key) for layer in layers.values()}
        for key in ("gate", "bn_statistics", "synchronize")
    }
    wanted = recipe.convert
    for place, found in settings.items():
        value = getattr(wanted, place.partition(".")[2])
        if value is not None and recipe.is_written(place) and value not in found:
            _refuse(place, _toml(value), path, f"a conversion with {' and '.join(sorted(map(_toml, found)))}")
    kinds = {swap.kind for swap in source.plan.swaps} if source.plan else set()
    if recipe.is_written("convert.kinds") and not kinds <= {*wanted.kinds}:
        _refuse("convert.kinds", _toml(wanted.kinds), path, f"a conversion of {_toml(sorted(kinds))}")
    _check_patterns(recipe, [*layers], path)


def _check_patterns(recipe: Recipe, sites: list[str], path: Path) -> None:
    wanted, names = recipe.convert, [(site,) for site in sites]
    if wanted.include and recipe.is_written("convert.include"):
        outside = [site for site in sites if site not in _matched(wanted.include, names)]
        if outside:
            _refuse("convert.include", _toml(wanted.include), path, f"a conversion of {_listed(outside)} too")
    if wanted.exclude and recipe.is_written("convert.exclude"):
        inside = [site for site in sites if site in _matched(wanted.exclude, names)]
        if inside:
            _refuse("convert.exclude", _toml(wanted.exclude), path, f"a conversion of {_listed(inside)} too")


def _matched(patterns: Iterable[str], names: list[tuple[str]]) -> set[str]:
    """The sites that one of the patterns matches; a pattern may match none of the converted ones."""
    found: set[str] = set()
    for pattern in patterns:
        try:
            found |= {*first_matches([pattern], names)}
        except PlanError:
            continue
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", +{len(names) - 3} more" if len(names) > 3 else "")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, list | tuple) else f'"{value}"'


def _refuse(place: str, value: str, path: Path, found: str) -> NoReturn:
    raise RecipeError(
        f"{place}: {value} contradicts the checkpoint {path}, which holds {found}: leave the key out "
        f"(--set {place}=none), or choose another model.checkpoint"
    )


# --- a checkpoint that is not there -----------------------------------------------------------------------------------


def _check_there(path: Path) -> None:
    """Refuse a checkpoint that cannot be read; if a recipe writes it, say which one to run."""
    if path.exists() or path.name != MODEL:
        check_readable(path)
        return
    makers = [name for name in shipped_recipes() if read_recipe(name).output == path.parent]
    maker = makers[0] if makers else None
    if (path.parent / STATE).is_file():
        raise CheckpointError(
            f"{path}: not written yet, the run in {path.parent} has not come to its end: finish it with normswap "
            f"finetune {maker or 'RECIPE'} --resume"
        )
    if maker is not None:
        raise CheckpointError(
            f"{path}: no such file; the recipe {maker} writes it: run normswap finetune {maker} first, in this folder"
        )
    check_readable(path)
