"""The converted content of a file: everything in it that a conversion concerns, and what becomes of the rest.

Copies of the weights are converted by the same plan, the optimizer of the network gets its gates as a last group, its
scheduler an entry for that group. All else passes through untouched; what may no longer fit is named in a note.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from normswap.checkpoints.content.entries import (
    Contents,
    Place,
    at,
    average_lists,
    looks_like_training,
    master_copies,
    name_of,
    replaced,
    unknown_states,
    with_gates_between,
)
from normswap.checkpoints.content.key_prefixes import StoredNames, names_with_copies
from normswap.checkpoints.content.optimizer_ownership import Network, extended_by_owner
from normswap.checkpoints.content.optimizer_state import StateDict, could_step, scheduler_with_gates
from normswap.checkpoints.content.state_dict import with_metadata, with_tensors
from normswap.checkpoints.loading import Checkpoint
from normswap.errors import CheckpointError, PlanError, SwapError
from normswap.layers.in_place import GATE_PARAMETERS
from normswap.surgery.conversion import apply_plan
from normswap.surgery.importance import gate_parameters, trainable_gates
from normswap.surgery.plan import SwapPlan

Shape = tuple[int, ...]

# What names of optimizers and schedulers have in common, longer words first.
_WORDS = (
    "optimizers",
    "optimizer",
    "optim",
    "opt",
    "schedulers",
    "scheduler",
    "sched",
    "states",
    "state",
    "dict",
    "lr",
)
# Where an average that is pickled keeps its copy of the model.
_AVERAGES = ("module", "ema", "ema_model")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class New:
    """What a conversion adds to a state dict: tensors by the model's own names, torch's notes on the new layers, and
    the names of those gates that train; the shapes of all parameters by name in the order of the converted model, or
    None where nobody has the model.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]
    trainable: tuple[str, ...]
    parameters: Mapping[str, Shape] | None = None


class Carried(NamedTuple):
    """A converted content, and in words what was done to the rest of the file."""

    content: Any
    notes: tuple[str, ...]


class _Stepped(NamedTuple):
    """An optimizer in a file: its state before, the state after or None if it was left, and whose it is."""

    place: Place
    before: StateDict
    after: StateDict | None


def new_of(original: Mapping[str, Any], converted: nn.Module) -> New:
    """Return what `converted` has beyond the names in `original`."""
    state: Any = converted.state_dict()
    tensors = {name: tensor for name, tensor in state.items() if name not in original}
    trainable = tuple(name for name in trainable_gates(converted) if name in tensors)
    shapes = {name: tuple(parameter.shape) for name, parameter in converted.named_parameters()}
    return New(tensors, state._metadata, trainable, shapes)


def converted_content(
    checkpoint: Checkpoint, names: StoredNames, new: New, *, module: nn.Module | None = None, plan: SwapPlan
) -> Carried:
    """Return the content of a file with everything in it converted that `new` fits, and the rest as it was.

    Args:
        names: how the file names the tensors of the model, and those of further copies beside it.
        module: the converted module, where the file holds a pickled one.
        plan: carried out on further pickled modules of the same kind.
    """
    content, where = checkpoint.content, checkpoint.contents
    values: dict[Place, Any] = {where.weights: module or _converted_state(checkpoint.weights, names, new)}
    notes = [f"{each.prefix}*: converted too" for each in names.copies]
    alike: dict[Place, bool] = {}
    for place in where.others:
        if looks_like_training(place):
            continue
        copied, note = _converted_copy(at(content, place), checkpoint, names, new, plan)
        alike[place] = copied is not None
        values |= {} if copied is None else {place: copied}
        notes.append(f"{name_of(place)}: {note}")
    networks = networks_in(checkpoint, names, new, alike)
    stepped, told = _optimizers(content, where, networks)
    scheduled = _schedulers(content, where, stepped)
    averages = _averages(content, where, names, new)
    for place, value, note in (*told, *scheduled, *averages):
        values |= {} if value is None else {place: value}
        notes.append(f"{name_of(place)}: {note}")
    known = {*where.optimizers, *where.schedulers, *alike, where.weights, *(place for place, _, _ in averages)}
    notes += unknown_states(content, known, set(_shapes(names, new, checkpoint.weights).values()))
    return Carried(replaced(content, values), tuple(notes))


def _converted_state(state: Any, names: StoredNames, new: New) -> dict[str, Tensor]:
    result = with_metadata(with_tensors(state, names, new.tensors), state, names, new.metadata)
    for each in names.copies:
        tied = _is_tied(state, names, each)
        tensors = new.tensors if tied else {name: tensor.clone() for name, tensor in new.tensors.items()}
        result = with_metadata(with_tensors(result, each, tensors), result, each, new.metadata)
    return result


def _is_tied(state: Mapping[str, Any], names: StoredNames, other: StoredNames) -> bool:
    """Whether two copies of a model share their tensors."""
    pairs = [(state[key], state[other.stored[name]]) for name, key in names.stored.items() if name in other.stored]
    return all(a.data_ptr() == b.data_ptr() for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor))


def _converted_copy(
    value: Any, checkpoint: Checkpoint, names: StoredNames, new: New, plan: SwapPlan
) -> tuple[Any | None, str]:
    """A further copy of the model, such as its moving average, converted alike; None if it is another model."""
    if isinstance(value, nn.Module):
        twin = _converted_module(value, plan)
        return twin, "left as it is, not the same model" if twin is None else "converted too"
    weights: Any = checkpoint.weights
    stored = weights.state_dict() if isinstance(weights, nn.Module) else weights
    wanted = {name: tuple(stored[key].shape) for name, key in names.stored.items() if isinstance(stored[key], Tensor)}
    if isinstance(weights, nn.Module):
        wanted = {name: tuple(tensor.shape) for name, tensor in stored.items() if name not in new.tensors}
    try:
        own = names_with_copies(value, wanted, rename=names.rename)
    except CheckpointError:
        return None, "left as it is, not the same model"
    if any(own.to_store(name) in value for name in new.tensors):
        return None, "left as it is, converted already"
    shapes = {name: tuple(value[key].shape) for name, key in own.stored.items() if isinstance(value[key], Tensor)}
    # An average may hold the parameters alone.
    least = [name for name in new.parameters or () if name in wanted]
    if any(shapes.get(name) != wanted[name] for name in (least or wanted)) or any(
        shapes.get(name, shape) != shape for name, shape in wanted.items()
    ):
        return None, "left as it is, not the same model"
    return _converted_state(value, own, new), "converted too"


def _converted_module(value: nn.Module, plan: SwapPlan) -> nn.Module | None:
    """A converted copy of a pickled module, or of an average with the model inside; None if it is another model."""
    for inside in (None, *_AVERAGES):
        twin = copy.deepcopy(value)
        model = twin if inside is None else getattr(twin, inside, None)
        try:
            if isinstance(model, nn.Module):
                apply_plan(model, plan)
                return twin
        except (PlanError, SwapError):
            continue
    return None


def networks_in(
    checkpoint: Checkpoint, names: StoredNames, new: New, alike: Mapping[Place, bool] | None = None
) -> list[Network]:
    """Return the networks in a file: the one that is converted, what lies beside it under other names, and others.

    Args:
        alike: the further weights in the file by their place, and whether they are copies that are converted alike.
    """
    shapes = _shapes(names, new, checkpoint.weights)
    own = {name: shape for name, shape in shapes.items() if name not in new.tensors}
    entry = checkpoint.contents.entry or "the model"
    found = [Network(entry, own, new.trainable, certain=new.parameters is not None)]
    weights = checkpoint.weights
    if isinstance(weights, Mapping):
        mine = {names.stored[name] for name in own if name in names.stored}
        copied = {key for each in names.copies for key in each.stored.values()}
        beside = [key for key in weights if key not in mine and key not in copied]
        found += _unbuilt("what lies beside it", {key: weights[key] for key in beside})
    for place, same in (alike or {}).items():
        value = at(checkpoint.content, place)
        if same:
            found.append(found[0]._replace(name=name_of(place)))
        elif isinstance(value, nn.Module):
            known = set(gate_parameters(value))
            parameters = {n: tuple(p.shape) for n, p in value.named_parameters() if n not in known}
            found.append(Network(name_of(place), parameters, earlier=len(trainable_gates(value))))
        else:
            found += _unbuilt(name_of(place), value)
    return found


def _shapes(names: StoredNames, new: New, weights: Any) -> Mapping[str, Shape]:
    """The shapes of the parameters that the network has in the file and gets, by its own names."""
    if new.parameters is None:
        inside = {name: weights[key] for name, key in names.stored.items()}
        return {name: shape for network in _unbuilt("", inside) for name, shape in network.parameters.items()}
    if isinstance(weights, nn.Module):
        return new.parameters
    return {name: shape for name, shape in new.parameters.items() if name in names.stored or name in new.tensors}


def _unbuilt(name: str, state: Mapping[str, Any]) -> list[Network]:
    """A network of which there are tensors alone: those that float and are no buffers by name may be parameters."""
    parameters: dict[str, Shape] = {}
    seen: set[tuple[int, int]] = set()
    earlier = 0
    for key, tensor in state.items():
        last = key.rpartition(".")[2]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or last in _BUFFERS:
            continue
        place = (tensor.data_ptr(), tensor.numel()) if tensor.numel() and not tensor.is_meta else (0, len(seen))
        earlier += last in GATE_PARAMETERS
        if last not in GATE_PARAMETERS and place not in seen:
            parameters[key] = tuple(tensor.shape)
        seen.add(place)
    return [Network(name, parameters, earlier=earlier, certain=False)] if parameters else []


Told = tuple[Place, Any, str]


def _optimizers(content: Any, where: Contents, networks: Sequence[Network]) -> tuple[list[_Stepped], list[Told]]:
    stepped, told = [], []
    for place in where.optimizers:
        state = at(content, place)
        masters = master_copies(content, place, where.optimizers)
        after: Any = None
        if masters:
            note = f"left as it is, {masters[0]} beside it holds copies of the parameters: begin the optimizer again"
        else:
            after, note = _extended(state, networks, alone=len(where.optimizers) == 1)
        stepped.append(_Stepped(place, state, after))
        told.append((place, after, note))
    return stepped, told


def _extended(state: StateDict, networks: Sequence[Network], *, alone: bool) -> tuple[Any, str]:
    """An optimizer's state with the gates of the networks that it has, and what was done."""
    if not any(network.gates for network in networks):
        return None, "left as it is, no gate trains"
    extended, note = extended_by_owner(state, networks, alone=alone)
    return extended, note if extended is not None else f"left as it is, {note}"


def _schedulers(content: Any, where: Contents, stepped: Sequence[_Stepped]) -> list[Told]:
    return [(place, *_rescheduled(place, at(content, place), stepped)) for place in where.schedulers]


def _rescheduled(place: Place, state: StateDict, stepped: Sequence[_Stepped]) -> tuple[Any, str]:
    """A scheduler's state for the optimizer that it steps, known by its number of groups and their first rates."""
    fitting = [each for each in stepped if could_step(state, each.before["param_groups"])]
    found = fitting if _same_fate(fitting) else [each for each in fitting if _stem(each.place) == _stem(place)]
    if not found or not _same_fate(found):
        names = " and ".join(name_of(each.place) for each in fitting)
        reason = f"it fits {names}" if fitting else "it fits no optimizer in this file"
        return None, (
            f"left as it is, {reason}: normswap.checkpoints.content.optimizer_state.scheduler_with_gates puts the gates in"
        )
    optimizer = found[0].after
    if optimizer is None or len(optimizer["param_groups"]) == len(found[0].before["param_groups"]):
        return None, "left as it is, the groups of its optimizer are as they were"
    return scheduler_with_gates(state, optimizer_state=optimizer), "gates follow the last group's schedule"


def _same_fate(stepped: Sequence[_Stepped]) -> bool:
    """Whether it makes no difference which of these optimizers is meant."""
    fates = {(each.after is None, len((each.after or each.before)["param_groups"])) for each in stepped}
    return len(fates) == 1


def _stem(place: Place) -> str:
    """What is left of a name without the words for optimizers and schedulers: `g` of `g_optim` and of `sched_g`."""
    name = name_of(place).lower()
    for word in _WORDS:
        name = name.replace(word, "")
    return name.strip("._")


def _averages(content: Any, where: Contents, names: StoredNames, new: New) -> list[Told]:
    """Averages that are lists of tensors, with the gates between where the order is that of the parameters."""
    if new.parameters is None:
        return []
    known = {*where.optimizers, *where.schedulers, where.weights, *where.others}
    shapes = new.parameters
    gates = {name: tensor for name, tensor in new.tensors.items() if name in shapes}
    told: list[Told] = []
    for place in average_lists(content, known):
        held = at(content, place)
        filled = with_gates_between(held, shapes, gates, new.trainable)
        if filled is not None:
            told.append((place, type(held)(filled), "gates put at their places between the parameters"))
    return told
