"""A converted state dict made from the original one: new tensors beside those of their site, all others untouched.

No model is filled for it, so copies of the weights (EMA) are converted just so, and a file of which nobody knows the
architecture too. Tensors in, tensors out.
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
from normswap.layers.gating import BRANCHES, initial_point
from normswap.layers.in_place import GATE_PARAMETERS
from normswap.surgery.plan import ANY_CLASS, Skip, Swap, SwapPlan
from normswap.surgery.selection import SiteFilter, first_matching_patterns
from normswap.text import join_fqn

# MERGED DOC: Whether the batch norms in a state dict hold numbers that normalize: finite statistics, no negative variance.

# MERGED DOC: What the names and shapes of tensors tell of a file without an architecture: weights, norms, copies, optimizers.


_MEAN, _VAR, _AFFINE = "running_mean", "running_var", ("weight", "bias")
_MAX_LISTED = 3


class NormGroup(NamedTuple):
    """What one batch norm has in a state dict, tensors by key: the mean first among the statistics."""

    fqn: str
    statistics: dict[str, Tensor]
    affine: dict[str, Tensor]


def check_running_stats(state: Mapping[str, Tensor], *, name: str) -> None:
    """Refuse a state dict whose batch norms cannot compute anything.

    A batch norm is a `running_mean` and a `running_var` under one prefix, with `weight` and `bias` of one dimension or
    without. What has a weight of another form (a convolution that keeps statistics) is none. NaN among the weights of
    other layers is not looked for.

    Args:
        state: tensors by key, such as `model.state_dict()`; may be mapped from a file.
        name: what the state dict is called in the error.

    Raises:
        CheckpointError: shapes that differ within one norm, NaN or Inf in running statistics, a negative running
            variance; with the keys, how many they are, and what to do.
    """
    groups = list(find_norm_groups(state))
    shapes = [faults for group in groups for faults in _find_shape_mismatch(group)]
    if shapes:
        raise CheckpointError(
            f"{name}: {_format_faults(shapes)} of another shape than the running_mean beside them: the file is damaged or its "
            "keys are mixed up, save the state dict again"
        )
    bad = [
        faults
        for group in groups
        for key, tensor in group.statistics.items()
        if (faults := _describe_fault(key, tensor))
    ]
    if bad:
        raise CheckpointError(
            f"{name}: {_format_faults(bad)} no statistics: take an earlier checkpoint, or average them anew in the original "
            "model (normswap.update_statistics) and save it again"
        )


def find_norm_groups(state: Mapping[str, Tensor]) -> Iterator[NormGroup]:
    """Yield the batch norms in a state dict, as `check_statistics` knows them, in the order of the state dict."""
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
    """What is wrong with running statistics, or nothing."""
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
    return f"{', '.join(faults[:_MAX_LISTED])}{more} {'is' if len(faults) == 1 else 'are'}"


def _format_shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


_RUNNING_STATS = ("running_mean", "running_var")


def insert_tensors(state: Mapping[str, Tensor], names: StoredNames, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with the tensors of `new`, by the model's own names, each after the last one of its module.

    Floating ones take the dtype of the tensors beside them. Names that the state has already stay as they are.
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
    """Give `state` torch's `_metadata` of `source`, where that has it, and the one of new layers from `converted`.

    Args:
        converted: `_metadata` of the converted model's state dict, by fqn.
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
    state: Mapping[str, Tensor], *, include: Sequence[SiteFilter] = (), exclude: Sequence[SiteFilter] = ()
) -> SwapPlan:
    """Return a plan for the BN groups of keys in `state`.

    A group is a `running_mean` and a `running_var` of one length beside each other. What their module is nobody knows:
    the swaps name no class, and `planning.complete_plan` settles them once there is a model.

    Args:
        include, exclude: as in `plan_swaps`.

    Raises:
        PlanError: a pattern matches no group.
    """
    swaps = _swaps_from_names(state)
    sites = [(swap.fqn,) for swap in swaps]
    included, excluded = first_matching_patterns(include, sites), first_matching_patterns(exclude, sites)
    kept = [swap for swap in swaps if swap.fqn not in excluded and (not include or swap.fqn in included)]
    skips = [
        Skip(swap.fqn, ANY_CLASS, swap.kind, "excluded by a pattern, or matched by none of include")
        for swap in swaps
        if swap not in kept
    ]
    note = "made from the names of tensors alone: what each norm is, the model tells that the file is loaded into"
    return SwapPlan(tuple(kept), tuple(skips), ANY_CLASS, None, (note,))


def _swaps_from_names(state: Mapping[str, Tensor]) -> list[Swap]:
    swaps = []
    for fqn, statistics, _ in find_norm_groups(state):
        mean, var = statistics.values()
        if mean.dim() != 1 or var.shape != mean.shape or join_fqn(fqn, GATE_PARAMETERS[0]) in state:
            continue
        branches = BRANCHES if mean.numel() > 1 else tuple(branch for branch in BRANCHES if branch != "ln")
        swaps.append(Swap(fqn, ANY_CLASS, mean.numel(), "simplex", branches, "batch", train_gates=True))
    return swaps


def initial_gates(plan: SwapPlan) -> dict[str, Tensor]:
    """Return the importance weights with which the sites of a plan start, by name: float32, shape (branches,)."""
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


_STATISTICS = ("running_mean", "running_var")
_AFFINE_NAMES = ({"weight"}, {"weight", "bias"})


@dataclass(frozen=True)
class NormTensors:
    """The tensors of one norm: the name of its module in the file, its channels, and what they show of it.

    `statistics` says whether it is a batch norm, `converted` whether it has importance weights already.
    """

    fqn: str
    channels: int
    statistics: bool
    converted: bool


@dataclass(frozen=True)
class WeightsSurvey:
    """One set of weights in a file: its entry ("" if the file is nothing else), and what its tensors show.

    `parameters` counts the floating values without running statistics, `prefix` is what wrappers put before all names.
    """

    entry: str
    prefix: str
    tensors: int
    parameters: int
    bytes: int
    norms: tuple[NormTensors, ...]

    @property
    def batch_norms(self) -> tuple[NormTensors, ...]:
        """The norms that `--arch none` converts."""
        return tuple(norm for norm in self.norms if norm.statistics and not norm.converted)

    def groups(self) -> dict[str, tuple[NormTensors, ...]]:
        """Return the norms by the outermost module around them, without the prefix; "" for a norm on its own."""
        found: dict[str, list[NormTensors]] = {}
        for norm in self.norms:
            outer, dot, _ = norm.fqn.removeprefix(self.prefix).partition(".")
            found.setdefault(outer if dot else "", []).append(norm)
        return {name: tuple(norms) for name, norms in found.items()}


@dataclass(frozen=True)
class Survey:
    """All weights in a file, and the entries that are states of optimizers."""

    weights: tuple[WeightsSurvey, ...]
    optimizers: tuple[str, ...]


def survey(content: Any) -> Survey:
    """Return what the names and shapes in a file's content tell."""
    weights = tuple(_survey_weights(format_key_path(place), value) for place, value in find_weights(content).items())
    return Survey(weights, tuple(map(format_key_path, find_optimizers(content))))


def _survey_weights(entry: str, value: Any) -> WeightsSurvey:
    state: Mapping[str, Any] = value.state_dict() if isinstance(value, nn.Module) else value
    tensors = {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    trained = (t for key, t in tensors.items() if t.is_floating_point() and not key.endswith(_STATISTICS))
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
        own_names = {*own} - {*GATE_PARAMETERS}
        vectors = {tuple(own[name].shape) for name in own_names}
        affine = own_names in _AFFINE_NAMES and len(vectors) == 1 and len(next(iter(vectors))) == 1
        if fqn in batch or affine:
            channels = (own[_STATISTICS[0]] if fqn in batch else own["weight"]).numel()
            found.append(NormTensors(fqn, channels, fqn in batch, join_fqn(fqn, GATE_PARAMETERS[0]) in tensors))
    return tuple(found)
