"""State dicts without a model: find and check the norms in them, plan and insert the gates, survey their contents.

The conversion of a state dict inserts new tensors next to those of each site and leaves all others unchanged. It builds
no model, so it also converts copies of the weights (EMA) and files with an unknown architecture.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.checkpoints.content.entries import find_optimizers, find_weights, format_key_path
from normswap.checkpoints.content.key_prefixes import StoredNames, find_prefixes
from normswap.errors import CheckpointError
from normswap.layers.gating import BRANCHES, BnStatistics, initial_point
from normswap.layers.in_place import GATE_PARAMETERS
from normswap.layers.matching import MATCHING_BUFFERS
from normswap.surgery.module_tree import never_updated
from normswap.surgery.plan import ANY_CLASS, Skip, Swap, SwapPlan, statistics_notes
from normswap.surgery.selection import SiteFilter, first_matching_patterns
from normswap.text import join_fqn

_MEAN, _VAR, _AFFINE = "running_mean", "running_var", ("weight", "bias")
_RUNNING_STATS = (_MEAN, _VAR)
_MAX_LISTED = 3


# --- batch norms and their running statistics


class NormGroup(NamedTuple):
    """The tensors of one batch norm in a state dict, by key; the first of `statistics` is the running mean."""

    fqn: str
    statistics: dict[str, Tensor]
    affine: dict[str, Tensor]


def check_running_stats(state: Mapping[str, Tensor], *, name: str) -> None:
    """Refuse a state dict with batch norms whose running statistics are invalid.

    A batch norm has a `running_mean` and a `running_var` under one prefix, and optionally `weight` and `bias` of one
    dimension. A module with another weight (a convolution that keeps statistics) is none. The weights of other layers
    are not checked for NaN.

    Args:
        state: tensors by key, such as `model.state_dict()`; may be mapped from a file.
        name: the name of the state dict for the error message.

    Raises:
        CheckpointError: the shapes in one norm differ, running statistics have NaN or infinity, or a running variance
            is negative.
    """
    groups = list(find_norm_groups(state))
    shapes = [faults for group in groups for faults in _find_shape_mismatch(group)]
    if shapes:
        raise CheckpointError(
            f"{name}: {_format_faults(shapes)}, expected the shape of the running_mean of the same norm: the file is "
            "damaged or its keys are mixed up, save the state dict again"
        )
    bad = [
        faults
        for group in groups
        for key, tensor in group.statistics.items()
        if (faults := _describe_fault(key, tensor))
    ]
    if bad:
        raise CheckpointError(
            f"{name}: {_format_faults(bad)}, expected finite running statistics and no negative variance: use an "
            "earlier checkpoint, or compute them again in the original model (normswap.update_statistics) and save it"
        )


def find_norm_groups(state: Mapping[str, Tensor]) -> Iterator[NormGroup]:
    """Yield the batch norms in a state dict, as defined by `check_running_stats`, in the order of the state dict."""
    for key, mean in state.items():
        fqn, _, last = key.rpartition(".")
        var_key = join_fqn(fqn, _VAR)
        if last != _MEAN or var_key not in state or not (_has_values(mean) and _has_values(state[var_key])):
            continue
        affine = {full: state[full] for part in _AFFINE if (full := join_fqn(fqn, part)) in state}
        if all(tensor.dim() == 1 for tensor in affine.values()):
            yield NormGroup(fqn, {key: mean, var_key: state[var_key]}, affine)


def _has_values(tensor: Tensor) -> bool:
    return not tensor.is_meta and not tensor.is_quantized and tensor.layout is torch.strided


def _find_shape_mismatch(group: NormGroup) -> list[str]:
    (_, mean), *others = (group.statistics | group.affine).items()
    return [f"{key} ({_format_shape(tensor)})" for key, tensor in others if tensor.shape != mean.shape]


def _describe_fault(key: str, tensor: Tensor) -> str:
    """The key of invalid running statistics with the number of bad values, or `""` if they are valid."""
    values = tensor if tensor.dtype.is_floating_point and tensor.element_size() > 1 else tensor.float()
    bad = ~torch.isfinite(values)
    if key.endswith(_VAR):
        bad |= values < 0
    if not bool(bad.any()):
        return ""
    worst = values[bad].flatten()[0].item()
    return f"{key} ({int(bad.sum())} of {tensor.numel()} values, such as {worst:g})"


def _format_faults(faults: list[str]) -> str:
    more = f", +{len(faults) - _MAX_LISTED} more" if len(faults) > _MAX_LISTED else ""
    return f"{', '.join(faults[:_MAX_LISTED])}{more}"


def _format_shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


# --- conversion by names


def insert_tensors(state: Mapping[str, Tensor], names: StoredNames, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with the tensors of `new`, each after the last tensor of its module.

    Floating-point tensors get the dtype of the other tensors in their module. Keys that `state` has already keep their
    values.

    Args:
        state: the original state dict; it is not changed.
        names: maps the names in the model to the keys in `state`.
        new: the new tensors, by the names in the model.
    """
    last = {key.rpartition(".")[0]: key for key in state}
    insertions: dict[str, dict[str, Tensor]] = {}
    unplaced: dict[str, Tensor] = {}
    for name, tensor in new.items():
        key = names.stored_key(name)
        sibling = last.get(key.rpartition(".")[0])
        if key in state:
            continue
        if sibling is None:
            unplaced[key] = tensor
        else:
            like = state[sibling] if state[sibling].is_floating_point() else _find_floating_sibling(state, key)
            insertions.setdefault(sibling, {})[key] = tensor if like is None else _match_dtype(tensor, like)
    result: dict[str, Tensor] = OrderedDict() if isinstance(state, OrderedDict) else {}
    for key, tensor in state.items():
        result[key] = tensor
        result.update(insertions.get(key, {}))
    result.update(unplaced)
    return result


def copy_metadata(
    state: dict[str, Tensor], source: Mapping[str, Tensor], names: StoredNames, converted: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Set the `_metadata` of torch on `state`: that of `source`, if any, and the entries of new layers.

    Args:
        state: the converted state dict, which is changed and returned.
        source: the original state dict.
        names: maps the names in the model to the keys in `state`.
        converted: the `_metadata` of the converted model's state dict, by fqn.
    """
    own = getattr(source, "_metadata", None)
    if isinstance(own, Mapping) and isinstance(state, OrderedDict):
        metadata = OrderedDict(own)
        for fqn, note in converted.items():
            if "gate" in note:
                metadata[names.stored_key(join_fqn(fqn, GATE_PARAMETERS[0])).rpartition(".")[0]] = dict(note)
        state._metadata = metadata  # type: ignore[attr-defined]
    return state


def plan_from_names(
    state: Mapping[str, Tensor],
    *,
    include: Sequence[SiteFilter] = (),
    exclude: Sequence[SiteFilter] = (),
    bn_statistics: BnStatistics = "running",
    match: bool = True,
) -> SwapPlan:
    """Return a plan for the batch norms in `state`, found by the names of their tensors.

    The classes of the norms are unknown, so the swaps name none; `planning.complete_plan` adds the classes when the
    file is loaded into a model. Their eps is unknown too, so matched branches get their constants then.

    Args:
        state: tensors by key.
        include, exclude: patterns as in `plan_swaps`.
        bn_statistics, match: as in `plan_swaps`, for all norms.

    Raises:
        PlanError: a pattern matches no batch norm.
    """
    swaps = _swaps_from_names(state, bn_statistics, match=match)
    sites = [(swap.fqn,) for swap in swaps]
    included, excluded = first_matching_patterns(include, sites), first_matching_patterns(exclude, sites)
    kept = [swap for swap in swaps if swap.fqn not in excluded and (not include or swap.fqn in included)]
    skips = [
        Skip(swap.fqn, ANY_CLASS, swap.kind, "excluded by a pattern, or not matched by include")
        for swap in swaps
        if swap not in kept
    ]
    note = "Planned from tensor names only; each norm's class is determined when the file is loaded into a model."
    notes = (note, *statistics_notes(kept, {swap.fqn for swap in kept}))
    return SwapPlan(tuple(kept), tuple(skips), ANY_CLASS, None, notes)


def _swaps_from_names(state: Mapping[str, Tensor], bn_statistics: BnStatistics, *, match: bool) -> list[Swap]:
    swaps = []
    for fqn, statistics, _ in find_norm_groups(state):
        mean, var = statistics.values()
        if mean.dim() != 1 or var.shape != mean.shape or join_fqn(fqn, GATE_PARAMETERS[0]) in state:
            continue
        branches = BRANCHES if mean.numel() > 1 else tuple(branch for branch in BRANCHES if branch != "ln")
        untrained = never_updated(mean, var, state.get(join_fqn(fqn, "num_batches_tracked")))
        options: Any = {"train_gates": True, "matched": match, "untrained": untrained}
        swaps.append(Swap(fqn, ANY_CLASS, mean.numel(), "simplex", branches, bn_statistics, **options))
    return swaps


def initial_gates(plan: SwapPlan) -> dict[str, Tensor]:
    """Return the initial gates of the sites in a plan, by name: float32, shape `(branches,)`."""
    return {
        join_fqn(swap.fqn, name): initial_point(swap.gate, swap.branches, vertex=swap.vertex)
        for swap in plan.swaps
        for name in GATE_PARAMETERS
    }


def _find_floating_sibling(state: Mapping[str, Tensor], key: str) -> Tensor | None:
    owner = key.rpartition(".")[0]
    sibling = (state.get(join_fqn(owner, name)) for name in (*_RUNNING_STATS, "weight", "bias"))
    return next((tensor for tensor in sibling if tensor is not None and tensor.is_floating_point()), None)


def _match_dtype(tensor: Tensor, like: Tensor) -> Tensor:
    wanted = tensor.is_floating_point() and like.is_floating_point() and tensor.dtype != like.dtype
    return tensor.to(like.dtype) if wanted else tensor


# --- survey of a file with an unknown architecture

_AFFINE_NAMES = ({"weight"}, {"weight", "bias"})


@dataclass(frozen=True)
class NormTensors:
    """One norm in a state dict.

    Attributes:
        fqn: the name of its module in the file.
        channels: its number of channels.
        statistics: whether it has running statistics, as batch norms do.
        converted: whether it has importance weights already.
    """

    fqn: str
    channels: int
    statistics: bool
    converted: bool


@dataclass(frozen=True)
class WeightsSurvey:
    """One state dict in a file.

    Attributes:
        entry: its key path, `""` for the whole content.
        prefix: the prefix of wrappers in front of all names.
        tensors: the number of tensors.
        parameters: the number of floating-point values without running statistics.
        bytes: the size of all tensors.
        norms: its norms.
    """

    entry: str
    prefix: str
    tensors: int
    parameters: int
    bytes: int
    norms: tuple[NormTensors, ...]

    @property
    def batch_norms(self) -> tuple[NormTensors, ...]:
        """The norms that a conversion without an architecture (`--arch none`) converts."""
        return tuple(norm for norm in self.norms if norm.statistics and not norm.converted)

    def groups(self) -> dict[str, tuple[NormTensors, ...]]:
        """Return the norms by the outermost module around them, without the prefix; `""` for top-level norms."""
        found: dict[str, list[NormTensors]] = {}
        for norm in self.norms:
            outer, dot, _ = norm.fqn.removeprefix(self.prefix).partition(".")
            found.setdefault(outer if dot else "", []).append(norm)
        return {name: tuple(norms) for name, norms in found.items()}


@dataclass(frozen=True)
class Survey:
    """All state dicts in a file, and the entries of optimizer states."""

    weights: tuple[WeightsSurvey, ...]
    optimizers: tuple[str, ...]


def survey(content: Any) -> Survey:
    """Return a survey of the tensors in a file's content, by their names and shapes."""
    weights = tuple(_survey_weights(format_key_path(place), value) for place, value in find_weights(content).items())
    return Survey(weights, tuple(map(format_key_path, find_optimizers(content))))


def _survey_weights(entry: str, value: Any) -> WeightsSurvey:
    state: Mapping[str, Any] = value.state_dict() if isinstance(value, nn.Module) else value
    tensors = {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    trained = (t for key, t in tensors.items() if t.is_floating_point() and not key.endswith(_RUNNING_STATS))
    return WeightsSurvey(
        entry=entry,
        prefix=max((prefix for prefix in find_prefixes(tensors) if _all_have_prefix(tensors, prefix)), key=len),
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in trained),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        norms=_find_norms(tensors),
    )


def _all_have_prefix(keys: Mapping[str, Any], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in keys)


def _find_norms(tensors: Mapping[str, Tensor]) -> tuple[NormTensors, ...]:
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, name = key.rpartition(".")
        modules.setdefault(owner, {})[name] = tensor
    batch = {group.fqn for group in find_norm_groups(tensors)}
    found = []
    for fqn, own in modules.items():
        own_names = {*own} - {*GATE_PARAMETERS, *MATCHING_BUFFERS}
        vectors = {tuple(own[name].shape) for name in own_names}
        affine = own_names in _AFFINE_NAMES and len(vectors) == 1 and len(next(iter(vectors))) == 1
        if fqn in batch or affine:
            channels = (own[_RUNNING_STATS[0]] if fqn in batch else own["weight"]).numel()
            found.append(NormTensors(fqn, channels, fqn in batch, join_fqn(fqn, GATE_PARAMETERS[0]) in tensors))
    return tuple(found)
