"""Converts the content of a file: the weights, and all other entries that a conversion affects.

Copies of the weights are converted by the same plan. The optimizer of the network gets the gates as a last parameter
group, and its scheduler an entry for that group. All other entries are copied; a note names those that may no longer
fit.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from normswap.checkpoints.content.entries import (
    Contents,
    KeyPath,
    describe_unknown_states,
    find_average_lists,
    find_master_weights,
    format_key_path,
    get_entry,
    is_training_key_path,
    read_contents,
    replace_entries,
)
from normswap.checkpoints.content.key_prefixes import StoredNames, match_names_and_copies
from normswap.checkpoints.content.optimizer_ownership import Network, add_owned_gates
from normswap.checkpoints.content.optimizer_state import StateDict, insert_gates, matches_groups, scheduler_with_gates
from normswap.checkpoints.content.state_dict import copy_metadata, insert_tensors
from normswap.checkpoints.reading import Checkpoint
from normswap.checkpoints.record import OriginalNorm
from normswap.errors import CheckpointError, PlanError, SwapError
from normswap.layers.in_place import GATE_PARAMETERS
from normswap.layers.matching import MATCHING_BUFFERS, match_statistics
from normswap.layers.switch_norm import SwitchNorm
from normswap.surgery.conversion import apply_plan
from normswap.surgery.importance import gate_parameters, gated_modules, trainable_gates
from normswap.surgery.plan import SwapPlan
from normswap.text import join_fqn
from normswap.verification.distance import Distance
from normswap.verification.equivalence import Verification

Shape = tuple[int, ...]

# Words in the names of optimizers and schedulers, longer words first.
_ROLE_WORDS = (
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
# The attributes with the model in the classes of weight averages.
_AVERAGE_ATTRIBUTES = ("module", "ema", "ema_model")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", *MATCHING_BUFFERS)


@dataclass(frozen=True)
class AddedState:
    """What a conversion adds to a state dict, and removes from it.

    Attributes:
        tensors: the new tensors, by the model's own names.
        metadata: torch's metadata of the new layers.
        trainable: the names of the gates that are trained.
        parameters: the shapes of all parameters of the converted model, in its order; None without a model.
        removed: the names of the running statistics that layers without `bn` do not have.
        matched: eps and the number of groups of each matched module site, by its fqn.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]
    trainable: tuple[str, ...]
    parameters: Mapping[str, Shape] | None = None
    removed: tuple[str, ...] = ()
    matched: Mapping[str, tuple[float, int]] = field(default_factory=dict)


class ConvertedContent(NamedTuple):
    """A converted content, and a note on each other entry of the file."""

    content: Any
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ConvertedWeights:
    """The converted weights of one network, ready to be written.

    Attributes:
        plan: the plan that was applied.
        names: the names of the network's tensors in the file.
        new: what the conversion adds to the state dict.
        architecture: the name that builds the network.
        module: the converted module, if the file stores a module or a program.
        originals: the replaced norms, by site.
        verification: None if nothing was measured.
        distance: the distance from the original, if the network starts without `bn`.
        inputs: the example inputs.
        notes: the differences between the tensors of the file and of the model.
    """

    plan: SwapPlan
    names: StoredNames
    new: AddedState
    architecture: str | None = None
    module: nn.Module | None = None
    originals: Mapping[str, OriginalNorm] = field(default_factory=dict)
    verification: Verification | None = None
    distance: Distance | None = None
    inputs: Any = None
    notes: tuple[str, ...] = ()


class _OptimizerUpdate(NamedTuple):
    """An optimizer in a file, with its state before the conversion, and after it (None if it was not changed)."""

    key_path: KeyPath
    before: StateDict
    after: StateDict | None


def collect_added_state(original: Mapping[str, Any], converted: nn.Module) -> AddedState:
    """Return how the state dict of `converted` differs from the names in `original`."""
    state: Any = converted.state_dict()
    tensors = {name: tensor for name, tensor in state.items() if name not in original}
    trainable = tuple(name for name in trainable_gates(converted) if name in tensors)
    shapes = {name: tuple(parameter.shape) for name, parameter in converted.named_parameters()}
    removed = tuple(name for name in original if name not in state)
    matched = {
        name: (layer.normalising_eps, layer.num_groups)
        for name, layer in gated_modules(converted).items()
        if isinstance(layer, SwitchNorm) and layer.matched
    }
    return AddedState(tensors, state._metadata, trainable, shapes, removed, matched)


def convert_content(
    checkpoint: Checkpoint, names: StoredNames, new: AddedState, *, module: nn.Module | None = None, plan: SwapPlan
) -> ConvertedContent:
    """Return the content of a file with all entries converted that `new` fits, and the others unchanged.

    Args:
        names: the names of the model's tensors in the file, and those of further copies.
        module: the converted module, if the file contains a pickled one.
        plan: applied to further pickled modules of the same kind.
    """
    content, contents = checkpoint.content, checkpoint.contents
    values: dict[KeyPath, Any] = {contents.weights: module or _convert_state(checkpoint.weights, names, new)}
    notes = [f"{each.prefix}*: converted too" for each in names.copies]
    is_copy: dict[KeyPath, bool] = {}
    for key_path in contents.others:
        if is_training_key_path(key_path):
            continue
        copied, note = _convert_copy(get_entry(content, key_path), checkpoint, names, new, plan)
        is_copy[key_path] = copied is not None
        values |= {} if copied is None else {key_path: copied}
        notes.append(f"{format_key_path(key_path)}: {note}")
    networks = find_networks(checkpoint, names, new, is_copy)
    optimizer_updates, updates = _update_optimizers(content, contents, networks)
    scheduler_updates = _update_schedulers(content, contents, optimizer_updates)
    averages = _update_averages(content, contents, names, new)
    for key_path, value, note in (*updates, *scheduler_updates, *averages):
        values |= {} if value is None else {key_path: value}
        notes.append(f"{format_key_path(key_path)}: {note}")
    known = {
        *contents.optimizers,
        *contents.schedulers,
        *is_copy,
        contents.weights,
        *(key_path for key_path, _, _ in averages),
    }
    notes += describe_unknown_states(content, known, set(_parameter_shapes(names, new, checkpoint.weights).values()))
    return ConvertedContent(replace_entries(content, values), tuple(notes))


def convert_file_content(checkpoint: Checkpoint, weights: ConvertedWeights, *, weights_only: bool) -> ConvertedContent:
    """Return the content of a file with a network and everything that belongs to it converted.

    Args:
        weights_only: drop all other entries of the file.
    """
    arguments: Any = {"module": weights.module, "plan": weights.plan}
    if not weights_only:
        return convert_content(checkpoint, weights.names, weights.new, **arguments)
    alone = replace(checkpoint, content=checkpoint.weights, contents=read_contents(checkpoint.weights))
    content = convert_content(alone, weights.names, weights.new, **arguments).content
    return ConvertedContent(
        content, tuple(f"{name}: left out (weights_only=True)" for name in checkpoint.other_entries)
    )


def merge_notes(earlier_notes: Sequence[str], notes: Sequence[str], entries: Sequence[str | None]) -> tuple[str, ...]:
    """Return the notes on a file after one more of its networks was converted.

    A note "left as it is" does not replace an earlier note on the same entry: an earlier network owns the entry.

    Args:
        entries: the networks that are converted, which need no note.
    """
    merged = dict(note.split(": ", 1) for note in earlier_notes)
    for name, what in (note.split(": ", 1) for note in notes):
        if name not in merged or not what.startswith("left as it is"):
            merged[name] = what
    return tuple(f"{name}: {what}" for name, what in merged.items() if name not in entries)


def _convert_state(state: Any, names: StoredNames, new: AddedState) -> dict[str, Tensor]:
    result = copy_metadata(insert_tensors(state, names, new.tensors), state, names, new.metadata)
    for each in names.copies:
        tied = _shares_tensors(state, names, each)
        tensors = new.tensors if tied else tensors_of_copy(state, each, new)
        result = copy_metadata(insert_tensors(result, each, tensors), result, each, new.metadata)
    for each in (names, *names.copies):
        for name in new.removed:
            result.pop(each.stored.get(name, ""), None)
    return result


def tensors_of_copy(state: Mapping[str, Any], names: StoredNames, new: AddedState) -> dict[str, Tensor]:
    """Return the new tensors of a copy of the model in `state`, whose branches are matched to its own statistics."""
    has_buffers = any(_is_buffer(name) for name in names.stored)  # an average of the parameters alone gets none
    tensors = {name: tensor.clone() for name, tensor in new.tensors.items() if has_buffers or not _is_buffer(name)}
    for fqn, (eps, num_groups) in new.matched.items():
        mean, var = (state.get(names.stored.get(join_fqn(fqn, name), "")) for name in _BUFFERS[:2])
        if not (isinstance(mean, Tensor) and isinstance(var, Tensor)):
            continue
        found = match_statistics(mean, var, eps, num_groups)
        own = {join_fqn(fqn, name): found[index] for index, name in enumerate(MATCHING_BUFFERS) if name[:2] == "ln"}
        tensors |= {name: tensor for name, tensor in own.items() if name in tensors and tensor is not None}
    return tensors


def _count_other_norms(names: StoredNames, wanted: Collection[str]) -> int:
    """The number of norms with running statistics in a file that a model with the tensors `wanted` does not have."""
    return sum(name.endswith("running_var") for name in names.stored if name not in wanted)


def _shares_tensors(state: Mapping[str, Any], names: StoredNames, other: StoredNames) -> bool:
    """Whether two copies of a model share their tensors."""
    pairs = [(state[key], state[other.stored[name]]) for name, key in names.stored.items() if name in other.stored]
    return all(a.data_ptr() == b.data_ptr() for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor))


def _is_buffer(name: str) -> bool:
    return name.rpartition(".")[2] in _BUFFERS


def _convert_copy(
    value: Any, checkpoint: Checkpoint, names: StoredNames, new: AddedState, plan: SwapPlan
) -> tuple[Any | None, str]:
    """A further copy of the model, such as its moving average, converted; None if it is another model."""
    if isinstance(value, nn.Module):
        converted_copy = _convert_module(value, plan)
        return converted_copy, "left as it is, not the same model" if converted_copy is None else "converted too"
    weights: Any = checkpoint.weights
    stored = weights.state_dict() if isinstance(weights, nn.Module) else weights
    wanted = {name: tuple(stored[key].shape) for name, key in names.stored.items() if isinstance(stored[key], Tensor)}
    if isinstance(weights, nn.Module):
        wanted = {name: tuple(tensor.shape) for name, tensor in stored.items() if name not in new.tensors}
    try:
        own = match_names_and_copies(value, wanted, rename=names.rename)
    except CheckpointError:
        return None, "left as it is, not the same model"
    if any(own.stored_key(name) in value for name in new.tensors):
        return None, "left as it is, converted already"
    shapes = {name: tuple(value[key].shape) for name, key in own.stored.items() if isinstance(value[key], Tensor)}
    # An average may contain only the parameters.
    required = [name for name in new.parameters or () if name in wanted]
    if any(shapes.get(name) != wanted[name] for name in (required or wanted)) or any(
        shapes.get(name, shape) != shape for name, shape in wanted.items()
    ):
        return None, "left as it is, not the same model"
    if _count_other_norms(own, wanted) > _count_other_norms(names, wanted):
        return None, "left as it is, not the same model"
    return _convert_state(value, own, replace(new, tensors=tensors_of_copy(value, own, new))), "converted too"


def _convert_module(value: nn.Module, plan: SwapPlan) -> nn.Module | None:
    """A converted copy of a pickled module, or of an average with the model inside; None if it is another model."""
    for inside in (None, *_AVERAGE_ATTRIBUTES):
        converted_copy = copy.deepcopy(value)
        model = converted_copy if inside is None else getattr(converted_copy, inside, None)
        try:
            if isinstance(model, nn.Module):
                apply_plan(model, plan)
                return converted_copy
        except (PlanError, SwapError):
            continue
    return None


def find_networks(
    checkpoint: Checkpoint, names: StoredNames, new: AddedState, is_copy: Mapping[KeyPath, bool] | None = None
) -> list[Network]:
    """Return the networks in a file: the converted one, other tensors of its state dict, those of other entries.

    Args:
        is_copy: for every further set of weights, whether it is a copy that is converted too.
    """
    shapes = _parameter_shapes(names, new, checkpoint.weights)
    own = {name: shape for name, shape in shapes.items() if name not in new.tensors}
    entry = checkpoint.contents.entry or "the model"
    found = [Network(entry, own, new.trainable, certain=new.parameters is not None)]
    weights = checkpoint.weights
    if isinstance(weights, Mapping):
        own_keys = {names.stored[name] for name in own if name in names.stored}
        copied = {key for each in names.copies for key in each.stored.values()}
        other_keys = [key for key in weights if key not in own_keys and key not in copied]
        found += _network_from_tensors("other tensors next to it", {key: weights[key] for key in other_keys})
    for key_path, same in (is_copy or {}).items():
        value = get_entry(checkpoint.content, key_path)
        if same:
            found.append(found[0]._replace(name=format_key_path(key_path)))
        elif isinstance(value, nn.Module):
            known = set(gate_parameters(value))
            parameters = {n: tuple(p.shape) for n, p in value.named_parameters() if n not in known}
            found.append(Network(format_key_path(key_path), parameters, num_existing_gates=len(trainable_gates(value))))
        else:
            found += _network_from_tensors(format_key_path(key_path), value)
    return found


def _parameter_shapes(names: StoredNames, new: AddedState, weights: Any) -> Mapping[str, Shape]:
    """The shapes of the network's parameters in the converted file, by its own names."""
    if new.parameters is None:
        inside = {name: weights[key] for name, key in names.stored.items()}
        return {
            name: shape for network in _network_from_tensors("", inside) for name, shape in network.parameters.items()
        }
    if isinstance(weights, nn.Module):
        return new.parameters
    return {name: shape for name, shape in new.parameters.items() if name in names.stored or name in new.tensors}


def _network_from_tensors(name: str, state: Mapping[str, Any]) -> list[Network]:
    """A network known only by its tensors: floating point tensors without a buffer's name may be parameters."""
    parameters: dict[str, Shape] = {}
    seen: set[tuple[int, int]] = set()
    num_existing_gates = 0
    for key, tensor in state.items():
        last = key.rpartition(".")[2]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or last in _BUFFERS:
            continue
        storage = (tensor.data_ptr(), tensor.numel()) if tensor.numel() and not tensor.is_meta else (0, len(seen))
        num_existing_gates += last in GATE_PARAMETERS
        if last not in GATE_PARAMETERS and storage not in seen:
            parameters[key] = tuple(tensor.shape)
        seen.add(storage)
    return [Network(name, parameters, num_existing_gates=num_existing_gates, certain=False)] if parameters else []


EntryUpdate = tuple[KeyPath, Any, str]


def _update_optimizers(
    content: Any, contents: Contents, networks: Sequence[Network]
) -> tuple[list[_OptimizerUpdate], list[EntryUpdate]]:
    optimizer_updates, updates = [], []
    for key_path in contents.optimizers:
        state = get_entry(content, key_path)
        masters = find_master_weights(content, key_path, contents.optimizers)
        after: Any = None
        if masters:
            note = f"left as it is, {masters[0]} next to it contains copies of the parameters: create a new optimizer"
        else:
            after, note = _add_gates(state, networks, is_only_optimizer=len(contents.optimizers) == 1)
        optimizer_updates.append(_OptimizerUpdate(key_path, state, after))
        updates.append((key_path, after, note))
    return optimizer_updates, updates


def _add_gates(state: StateDict, networks: Sequence[Network], *, is_only_optimizer: bool) -> tuple[Any, str]:
    """An optimizer's state with the gates of its networks, and a note."""
    if not any(network.gates for network in networks):
        return None, "left as it is, no gate trains"
    extended, note = add_owned_gates(state, networks, is_only_optimizer=is_only_optimizer)
    return extended, note if extended is not None else f"left as it is, {note}"


def _update_schedulers(
    content: Any, contents: Contents, optimizer_updates: Sequence[_OptimizerUpdate]
) -> list[EntryUpdate]:
    return [
        (key_path, *_update_scheduler(key_path, get_entry(content, key_path), optimizer_updates))
        for key_path in contents.schedulers
    ]


def _update_scheduler(
    key_path: KeyPath, state: StateDict, optimizer_updates: Sequence[_OptimizerUpdate]
) -> tuple[Any, str]:
    """A scheduler's state for its optimizer, which is found by the number of groups and their initial rates."""
    fitting = [each for each in optimizer_updates if matches_groups(state, each.before["param_groups"])]
    found = (
        fitting
        if _have_same_update(fitting)
        else [each for each in fitting if _strip_role_words(each.key_path) == _strip_role_words(key_path)]
    )
    if not found or not _have_same_update(found):
        names = " and ".join(format_key_path(each.key_path) for each in fitting)
        reason = f"it fits {names}" if fitting else "it fits no optimizer in this file"
        return None, (f"left as it is, {reason}: add the gates with normswap.scheduler_with_gates")
    optimizer = found[0].after
    if optimizer is None or len(optimizer["param_groups"]) == len(found[0].before["param_groups"]):
        return None, "left as it is, the groups of its optimizer are as they were"
    return scheduler_with_gates(state, optimizer_state=optimizer), "gates follow the last group's schedule"


def _have_same_update(optimizer_updates: Sequence[_OptimizerUpdate]) -> bool:
    """Whether a scheduler of any of these optimizers has to be changed in the same way."""
    outcomes = {(each.after is None, len((each.after or each.before)["param_groups"])) for each in optimizer_updates}
    return len(outcomes) == 1


def _strip_role_words(key_path: KeyPath) -> str:
    """A name without the words for optimizers and schedulers: `g` for `g_optim` and for `sched_g`."""
    name = format_key_path(key_path).lower()
    for word in _ROLE_WORDS:
        name = name.replace(word, "")
    return name.strip("._")


def _update_averages(content: Any, contents: Contents, names: StoredNames, new: AddedState) -> list[EntryUpdate]:
    """Averages stored as lists of tensors in the order of the parameters, with the gates inserted."""
    if new.parameters is None:
        return []
    known = {*contents.optimizers, *contents.schedulers, contents.weights, *contents.others}
    shapes = new.parameters
    gates = {name: tensor for name, tensor in new.tensors.items() if name in shapes}
    updates: list[EntryUpdate] = []
    for key_path in find_average_lists(content, known):
        averaged = get_entry(content, key_path)
        extended_list = insert_gates(averaged, shapes, gates, new.trainable)
        if extended_list is not None:
            updates.append(
                (key_path, type(averaged)(extended_list), "gates inserted at their positions between the parameters")
            )
    return updates
