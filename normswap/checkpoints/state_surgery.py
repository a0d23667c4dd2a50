"""A converted state dict made from the original one: new tensors beside those of their site, all others untouched.

No model is filled for it, so copies of the weights (EMA) are converted just so, and a file of which nobody knows the
architecture too. Tensors in, tensors out.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from normswap.checkpoints.norm_values import norm_groups
from normswap.checkpoints.prefixes import StoredNames
from normswap.layers.adoption import GATE_PARAMETERS
from normswap.layers.importance import BRANCHES, initial_point
from normswap.surgery.patterns import first_matches
from normswap.surgery.plan import ANY_CLASS, Skip, Swap, SwapPlan
from normswap.surgery.tree import join

_GROUP = ("running_mean", "running_var")


def with_tensors(state: Mapping[str, Tensor], names: StoredNames, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with the tensors of `new`, by the model's own names, each after the last one of its module.

    Floating ones take the dtype of the tensors beside them. Names that the state has already stay as they are.
    """
    last = {key.rpartition(".")[0]: key for key in state}
    after: dict[str, dict[str, Tensor]] = {}
    loose: dict[str, Tensor] = {}
    for name, tensor in new.items():
        key = names.to_store(name)
        beside = last.get(key.rpartition(".")[0])
        if key in state:
            continue
        if beside is None:
            loose[key] = tensor
        else:
            like = state[beside] if state[beside].is_floating_point() else _floating_beside(state, key)
            after.setdefault(beside, {})[key] = tensor if like is None else _of_type(tensor, like)
    result: dict[str, Tensor] = OrderedDict() if isinstance(state, OrderedDict) else {}
    for key, tensor in state.items():
        result[key] = tensor
        result.update(after.get(key, {}))
    result.update(loose)
    return result


def with_metadata(
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
                metadata[names.to_store(join(fqn, GATE_PARAMETERS[0])).rpartition(".")[0]] = dict(note)
        state._metadata = metadata  # type: ignore[attr-defined]
    return state


def plan_from_names(
    state: Mapping[str, Tensor], *, include: Sequence[str] = (), exclude: Sequence[str] = ()
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
    included, excluded = first_matches(include, sites), first_matches(exclude, sites)
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
    for fqn, statistics, _ in norm_groups(state):
        mean, var = statistics.values()
        if mean.dim() != 1 or var.shape != mean.shape or join(fqn, GATE_PARAMETERS[0]) in state:
            continue
        branches = BRANCHES if mean.numel() > 1 else tuple(branch for branch in BRANCHES if branch != "ln")
        swaps.append(Swap(fqn, ANY_CLASS, mean.numel(), "simplex", branches, "batch", train_gates=True))
    return swaps


def gates_of(plan: SwapPlan) -> dict[str, Tensor]:
    """Return the importance weights with which the sites of a plan start, by name: float32, shape (branches,)."""
    return {
        join(swap.fqn, name): initial_point(swap.gate, swap.branches, vertex=swap.vertex)
        for swap in plan.swaps
        for name in GATE_PARAMETERS
    }


def _floating_beside(state: Mapping[str, Tensor], key: str) -> Tensor | None:
    owner = key.rpartition(".")[0]
    beside = (state.get(join(owner, name)) for name in (*_GROUP, "weight", "bias"))
    return next((tensor for tensor in beside if tensor is not None and tensor.is_floating_point()), None)


def _of_type(tensor: Tensor, like: Tensor) -> Tensor:
    wanted = tensor.is_floating_point() and like.is_floating_point() and tensor.dtype != like.dtype
    return tensor.to(like.dtype) if wanted else tensor
