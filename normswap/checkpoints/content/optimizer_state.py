"""Optimizer state dicts as they lie in files: the group of the gates appended, everything else untouched.

An optimizer's state dict numbers its parameters by their place in the groups. A group behind all others therefore
leaves every number valid, and with it the momentum that the file holds. Works on plain dicts: no model, no optimizer.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor

from normswap.errors import CheckpointError, OptimizerError

# MERGED DOC: Learning rate scheduler state dicts as they lie in files: an entry for the group of the gates in every list.


# An option of the group of gates, by which it is known again. Optimizers carry options that they do not know.
GATE_GROUP = "gates"
# Options that are learning rates or bounds of them; schedulers add all but the first.
_LR_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
# Entries of optimizer states that have the shape of their parameter (or are scalars).
PARAM_SHAPED_KEYS = {
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_diff", "exp_avg_var", "exp_inf"),
    *("square_avg", "grad_avg", "acc_delta", "sum", "prev", "neg_pre_grad", "grad_sum_sq", "lookahead_slow_buff"),
}
# A count of steps that an optimizer keeps per group: the gates' begins anew, or their first steps would be too long.
_STEP_KEYS = ("step",)

StateDict = Mapping[str, Any]


def is_optimizer_state(value: object) -> TypeGuard[StateDict]:
    """Say whether `value` has the structure of an optimizer's state dict: `state`, and `param_groups` with `params`."""
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, list | tuple) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple) for group in groups
    )


def has_gates(optimizer_state: StateDict) -> bool:
    """Say whether a group of gates is in an optimizer's state dict, made by `with_gates` or `param_groups`."""
    return any(group.get(GATE_GROUP) is True for group in optimizer_state["param_groups"])


def check_groups(optimizer_state: object) -> Sequence[Mapping[str, Any]]:
    """Return the parameter groups of an optimizer's state dict.

    Raises:
        CheckpointError: it is no such state dict, or damaged.
    """
    if not is_optimizer_state(optimizer_state):
        kind = type(optimizer_state).__name__
        got = f"entries {[*optimizer_state][:6]}" if isinstance(optimizer_state, Mapping) else kind
        raise CheckpointError(
            f"expected an optimizer's state dict, 'state' and 'param_groups', got {got}: pass optimizer.state_dict()"
        )
    groups: Sequence[Mapping[str, Any]] = optimizer_state["param_groups"]
    problem = _find_problem(groups, optimizer_state["state"])
    if problem:
        raise CheckpointError(f"the optimizer's state dict {problem}: save it again with optimizer.state_dict()")
    return groups


def non_gate_groups(optimizer_state: StateDict) -> list[StateDict]:
    """Return the parameter groups but that of the gates."""
    return [group for group in optimizer_state["param_groups"] if group.get(GATE_GROUP) is not True]


def parameter_shape(entries: Any) -> tuple[int, ...] | None:
    """Return the shape of a parameter as its state in an optimizer tells it, or None if that does not."""
    if not isinstance(entries, Mapping):
        return None
    tensors = [value for name, value in entries.items() if name in PARAM_SHAPED_KEYS and isinstance(value, Tensor)]
    return next((tuple(tensor.shape) for tensor in tensors if tensor.dim()), None)


def with_gates(
    optimizer_state: StateDict, *, gates: Sequence[str], importance_lr: float | None = None
) -> dict[str, Any]:
    """Return the state dict of the optimizer of a converted model: that of the original with the gates in a last group.

    `optimizer.load_state_dict` takes it where the optimizer was built from `param_groups(converted, like=...)`. The
    state, the old groups and all other entries are shared with `optimizer_state`, not copied.

    Args:
        optimizer_state: the state dict of the optimizer of the model before its conversion.
        gates: names of the trainable gates in the order of `surgery.gated.trainable_gates`; none adds no group.
        importance_lr: their learning rate, as in `gate_options`.

    Raises:
        CheckpointError: not such a state dict, damaged, or with gates already.
        OptimizerError: `importance_lr` is no learning rate.
    """
    groups = check_groups(optimizer_state)
    if has_gates(optimizer_state):
        raise CheckpointError("the optimizer's state dict has a group of gates already: load it as it is")
    if not gates:
        return dict(optimizer_state)
    used_keys = [key for group in groups for key in group["params"]]
    added = gate_options(groups[-1], importance_lr=importance_lr)
    if "param_names" in groups[-1]:
        added["param_names"] = list(gates)
    added["params"] = _new_keys(used_keys, optimizer_state["state"], gates)
    return {**optimizer_state, "param_groups": [*optimizer_state["param_groups"], added]}


def with_additional_gates(optimizer_state: StateDict, *, gates: Sequence[str], gate_offset: int) -> dict[str, Any]:
    """Return an optimizer's state dict with further gates in the group of gates that it has.

    Args:
        gates: their names.
        place: how many gates of that group stand before them.
    """
    groups = [dict(group) for group in optimizer_state["param_groups"]]
    group = next(group for group in groups if group.get(GATE_GROUP) is True)
    used_keys = [key for each in groups for key in each["params"]]
    keys = _new_keys(used_keys, optimizer_state["state"], gates)
    for name, added in (("params", keys), ("param_names", list(gates))):
        if name in group:
            group[name] = [*group[name][:gate_offset], *added, *group[name][gate_offset:]]
    return {**optimizer_state, "param_groups": groups}


def gate_options(template: Mapping[str, Any], *, importance_lr: float | None = None) -> dict[str, Any]:
    """Return the options of a group of gates: those of `template`, but no weight decay and a learning rate of its own.

    Args:
        template: a group, whose parameters are left aside.
        importance_lr: the learning rate before any schedule (of OneCycleLR the highest), default that of `template`.
            Where a scheduler has left an `initial_lr`, the present rate is the same share of it as in `template`.

    Raises:
        OptimizerError: `importance_lr` is negative or not finite.
    """
    check_rate("importance_lr", importance_lr)
    excluded = ("params", "param_names", *_STEP_KEYS)
    options = {name: copy.deepcopy(value) for name, value in template.items() if name not in excluded}
    options |= {"weight_decay": 0.0, GATE_GROUP: True}
    if importance_lr is not None:
        base = base_lr(template)
        present = {name: options[name] for name in _LR_KEYS if options.get(name) is not None} or {"lr": base}
        options |= {name: rescale(rate, old=base, new=importance_lr) for name, rate in present.items()}
    return options


def base_lr(group: Mapping[str, Any]) -> Any:
    """Return the learning rate of a group before any schedule, of OneCycleLR the highest; None if it has none."""
    return next((group[name] for name in ("max_lr", "initial_lr", "lr") if group.get(name) is not None), None)


def rescale(rate: Any, *, old: Any, new: Any) -> Any:
    """Return `rate`, a number or a tensor, as it would be with the base `new` in place of `old`."""
    return new * (rate / old) if old else new


def check_rate(name: str, value: float | None) -> None:
    """Refuse a learning rate or weight decay that is negative or not finite.

    Raises:
        OptimizerError: as said.
    """
    if value is not None and not (hasattr(value, "__float__") and math.isfinite(value) and value >= 0):
        raise OptimizerError(f"{name}: expected a finite number >= 0, got {value!r}")


def _new_keys(used_keys: Sequence[Any], state: Mapping[Any, Any], gates: Sequence[str]) -> list[Any]:
    """What stands for further parameters: numbers that are free, or their names where others have names."""
    if used_keys and isinstance(used_keys[0], str):  # some libraries name parameters where torch numbers them
        return list(gates)
    first = max((key for key in (*used_keys, *state) if isinstance(key, int)), default=-1) + 1
    return list(range(first, first + len(gates)))


def _find_problem(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> str | None:
    """What is wrong with groups of parameters by number or name, in words that follow the subject."""
    keys = [key for group in groups for key in group["params"]]
    if not groups:
        return "has no parameter group"
    if not (all(type(key) is int for key in keys) or all(isinstance(key, str) for key in keys)):
        return "is damaged, it gives parameters neither all by number nor all by name"
    if len({"param_names" in group for group in groups}) > 1:
        return "is damaged, some of its groups name their parameters and some do not"
    for index, group in enumerate(groups):
        if "param_names" in group and len(group["param_names"]) != len(group["params"]):
            return (
                f"is damaged, group {index} has {len(group['params'])} parameters and {len(group['param_names'])} names"
            )
    # Whatever is no mapping under a number belongs to no parameter.
    stateful = {key for key, value in state.items() if isinstance(key, int | str) and isinstance(value, Mapping)}
    orphaned = sorted(map(str, stateful - set(keys)))
    return f"is damaged, parameter {orphaned[0]} has a state and is in no group" if orphaned else None


EntryFunction = Callable[[StateDict, Any, Callable[[Any], Any]], Any]


def is_scheduler_state(value: object) -> TypeGuard[StateDict]:
    """Say whether `value` has the structure of a scheduler's state dict of torch, timm or mmengine.

    A state dict without any list per group is none here: it fits any number of groups.
    """
    if not isinstance(value, Mapping):
        return False
    inner = value.get("_schedulers")
    if isinstance(inner, list):
        return all(map(is_scheduler_state, inner))
    return any(isinstance(value.get(name), list) for name in ("base_lrs", "base_values", "min_lrs"))


def matches_groups(scheduler_state: StateDict, groups: Sequence[StateDict]) -> bool:
    """Say whether a scheduler's lists have as many entries as an optimizer has groups, and their initial rates."""
    inner = scheduler_state.get("_schedulers")
    if isinstance(inner, list):
        return all(matches_groups(each, groups) for each in inner)
    lists = [values for name in _GROUP_LISTS if isinstance(values := scheduler_state.get(name), list)]
    if any(len(values) != len(groups) for values in lists):
        return False
    rates = scheduler_state.get("base_lrs", scheduler_state.get("base_values"))
    initial = [group.get(f"initial_{scheduler_state.get('param_group_field', 'lr')}") for group in groups]
    pairs = zip(rates if isinstance(rates, list) else [], initial, strict=False)
    return all(first is None or _is_same_rate(first, rate) for rate, first in pairs)


def _is_same_rate(first: Any, rate: Any) -> bool:
    try:
        return float(first) == float(rate)
    except (TypeError, ValueError, RuntimeError):  # whatever a file may hold: nothing is known of it
        return False


def scheduler_with_gates(scheduler_state: StateDict, *, optimizer_state: StateDict) -> dict[str, Any]:
    """Return the state dict of the scheduler of an optimizer whose last group is that of the gates.

    The gates follow the schedule of the last old group, at their own learning rate.

    Args:
        scheduler_state: the state dict of the scheduler of the optimizer without gates.
        optimizer_state: what `with_gates` returned.

    Raises:
        CheckpointError: `scheduler_state` is no such state dict or belongs to another optimizer, or `optimizer_state`
            has no gates.
    """
    if not is_scheduler_state(scheduler_state):
        raise CheckpointError("expected a scheduler's state dict with lists per group: pass scheduler.state_dict()")
    if not has_gates(optimizer_state) or len(optimizer_state["param_groups"]) < 2:
        raise CheckpointError(
            "expected an optimizer's state dict with a last group of gates: pass it through with_gates"
        )
    *old, gates = optimizer_state["param_groups"]
    return _extend_state(scheduler_state, len(old), base_lr(old[-1]), base_lr(gates))


def extend_group_lists(state: StateDict, groups: int, old: Any, new: Any) -> dict[str, list[Any]]:
    """Return those lists per group in a scheduler's state, each with an entry for the gates at its end.

    Args:
        state: a scheduler's state dict, or the attributes of a scheduler; nested schedulers are left aside.
        groups: how many parameter groups the optimizer has without that of the gates.
        old: the learning rate of the last of them before any schedule.
        new: that of the gates; None keeps what the last group has.

    Raises:
        CheckpointError: a list has another length.
    """

    def scale_rate(rate: Any) -> Any:
        # One that schedules something else than the learning rate treats the gates as the group before them.
        is_lr = "lr" in (state.get("param_group_field"), state.get("param_name")) or not (
            state.keys() & {"param_group_field", "param_name"}
        )
        return rescale(rate, old=old, new=new) if is_lr and new is not None else copy.deepcopy(rate)

    extended = {}
    for name, entry in _GROUP_LISTS.items():
        values = state.get(name)
        if not isinstance(values, list):
            continue
        if len(values) != groups:
            raise CheckpointError(
                f"the scheduler's state dict has {len(values)} entries in {name!r}, the optimizer has {groups} groups: "
                "take both from one file"
            )
        extended[name] = [*values, entry(state, values[-1], scale_rate)]
    return extended


def _extend_state(state: StateDict, groups: int, old: Any, new: Any) -> dict[str, Any]:
    extended = dict(state)
    if isinstance(state.get("_schedulers"), list):
        extended["_schedulers"] = [_extend_state(inner, groups, old, new) for inner in state["_schedulers"]]
    return extended | extend_group_lists(state, groups, old, new)


def _copy_entry(_state: StateDict, last: Any, _scale_rate: Callable[[Any], Any]) -> Any:
    """A function is shared, as a scheduler shares the one that it was given for all groups; its state is copied."""
    return last if callable(last) else copy.deepcopy(last)


def _warmup_step(state: StateDict, last: Any, scale_rate: Callable[[Any], Any]) -> Any:
    """timm's step per epoch from the rate at which warming up begins, which is the same for all groups."""
    length, begin = state.get("warmup_t"), state.get("warmup_lr_init")
    return (scale_rate(begin + last * length) - begin) / length if length and begin is not None else last


# By the name of a list: what its entry for the gates is, given the state, the entry of the last old group, and what
# turns a rate of that group into the gates'.
_GROUP_LISTS: Mapping[str, EntryFunction] = {
    **dict.fromkeys(
        ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_values", "_last_value"),
        lambda _, last, scale_rate: scale_rate(last),
    ),
    **dict.fromkeys(("lr_lambdas", "base_momentums", "max_momentums"), _copy_entry),
    "warmup_steps": _warmup_step,
}
