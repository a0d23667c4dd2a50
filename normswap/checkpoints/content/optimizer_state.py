"""Gates in stored optimizer and scheduler state dicts: a last parameter group, everything else unchanged.

An optimizer's state dict numbers its parameters in the order of the groups. With a new group after all others, every
old number stays valid, and so does the stored momentum. A scheduler's state dict gets an entry for this group in each
of its lists. All functions work on plain dicts: they need neither a model nor an optimizer.
"""

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor

from normswap.errors import CheckpointError, OptimizerError

# --- optimizers

# An option that marks the group of gates. Optimizers keep options that they do not know.
GATE_GROUP = "gates"
# Options that are learning rates or their bounds; schedulers add all but the first.
_LR_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
# Entries of an optimizer state that have the shape of their parameter (or are scalars).
PARAM_SHAPED_KEYS = {
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_diff", "exp_avg_var", "exp_inf"),
    *("square_avg", "grad_avg", "acc_delta", "sum", "prev", "neg_pre_grad", "grad_sum_sq", "lookahead_slow_buff"),
}
# The step count that some optimizers keep per group. That of the gates starts at zero: with the old count, the bias
# correction would be missing in their first steps.
_STEP_KEYS = ("step",)

# The default learning rate of gates is a multiple of the network's rate, up to a limit, since a simplex has a diameter
# of about 1 whatever the network. Changes of the function add up over the layers, so all gates together may move by one
# diameter in a step.
_GATE_LR_FACTOR = 100.0
_MAX_GATE_STEP = 0.1
# A site has two gates. Under Adam a gate with a noisy gradient moves by about a third of its rate.
_RATE_PER_STEP = 3

StateDict = Mapping[str, Any]
Shape = tuple[int, ...]


def is_optimizer_state(value: object) -> TypeGuard[StateDict]:
    """Return whether `value` has `state`, and `param_groups` with `params`, as an optimizer's state dict does."""
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, list | tuple) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple) for group in groups
    )


def has_gates(optimizer_state: StateDict) -> bool:
    """Return whether an optimizer's state dict has a group of gates from `with_gates` or `param_groups`."""
    return any(group.get(GATE_GROUP) is True for group in optimizer_state["param_groups"])


def check_groups(optimizer_state: object) -> Sequence[Mapping[str, Any]]:
    """Return the parameter groups of an optimizer's state dict.

    Raises:
        CheckpointError: `optimizer_state` is not such a state dict, or damaged.
    """
    if not is_optimizer_state(optimizer_state):
        kind = type(optimizer_state).__name__
        got = f"entries {[*optimizer_state][:6]}" if isinstance(optimizer_state, Mapping) else kind
        raise CheckpointError(
            f"expected an optimizer's state dict with 'state' and 'param_groups', got {got}: pass "
            "optimizer.state_dict()"
        )
    groups: Sequence[Mapping[str, Any]] = optimizer_state["param_groups"]
    problem = _find_problem(groups, optimizer_state["state"])
    if problem:
        raise CheckpointError(f"the optimizer's state dict {problem}: save it again with optimizer.state_dict()")
    return groups


def non_gate_groups(optimizer_state: StateDict) -> list[StateDict]:
    """Return the parameter groups without that of the gates."""
    return [group for group in optimizer_state["param_groups"] if group.get(GATE_GROUP) is not True]


def parameter_shape(entries: Any) -> tuple[int, ...] | None:
    """Return the shape of a parameter by its entries in an optimizer state, or None if they do not show it."""
    if not isinstance(entries, Mapping):
        return None
    tensors = [value for name, value in entries.items() if name in PARAM_SHAPED_KEYS and isinstance(value, Tensor)]
    return next((tuple(tensor.shape) for tensor in tensors if tensor.dim()), None)


def with_gates(
    optimizer_state: StateDict, *, gates: Sequence[str], importance_lr: float | None = None
) -> dict[str, Any]:
    """Return the optimizer's state dict of a model before its conversion with the gates as a last parameter group.

    The result fits an optimizer that was built from `normswap.param_groups(converted, like=...)`: the momentum of all
    old parameters is kept. The gates get the options of the last group without weight decay, and an empty state.

    Args:
        optimizer_state: the state dict of the optimizer of the model before its conversion; it is not changed.
        gates: the names of the trainable gates, in the order of `normswap.trainable_gates(converted)`; if empty, no
            group is added.
        importance_lr: the learning rate of the gates before any schedule; default: 100 times that of the last group, at
            most 1.5 / sites and 0.1.

    Returns:
        A new state dict, which shares the state, the old groups and all other entries with `optimizer_state`.

    Raises:
        CheckpointError: `optimizer_state` is not such a state dict, damaged, or has gates already.
        OptimizerError: `importance_lr` is negative or not finite.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        >>> stored = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict()
        >>> converted = normswap.convert(model).model
        >>> extended = normswap.with_gates(stored, gates=list(normswap.trainable_gates(converted)))
        >>> [len(group["params"]) for group in extended["param_groups"]]
        [4, 2]
        >>> groups = normswap.param_groups(converted, like=stored)
        >>> torch.optim.SGD(groups, lr=0.1, momentum=0.9).load_state_dict(extended)
    """
    groups = check_groups(optimizer_state)
    if has_gates(optimizer_state):
        raise CheckpointError("the optimizer's state dict has a group of gates already: load it without with_gates")
    if not gates:
        return dict(optimizer_state)
    used_keys = [key for group in groups for key in group["params"]]
    added = gate_options(groups[-1], gates=len(gates), importance_lr=importance_lr)
    if "param_names" in groups[-1]:
        added["param_names"] = list(gates)
    added["params"] = _new_keys(used_keys, optimizer_state["state"], gates)
    return {**optimizer_state, "param_groups": [*optimizer_state["param_groups"], added]}


def with_additional_gates(optimizer_state: StateDict, *, gates: Sequence[str], gate_offset: int) -> dict[str, Any]:
    """Return an optimizer's state dict with further gates in its group of gates.

    Args:
        optimizer_state: a state dict with a group of gates.
        gates: the names of the further gates.
        gate_offset: the number of gates in the group in front of the new ones.
    """
    groups = [dict(group) for group in optimizer_state["param_groups"]]
    group = next(group for group in groups if group.get(GATE_GROUP) is True)
    used_keys = [key for each in groups for key in each["params"]]
    keys = _new_keys(used_keys, optimizer_state["state"], gates)
    for name, added in (("params", keys), ("param_names", list(gates))):
        if name in group:
            group[name] = [*group[name][:gate_offset], *added, *group[name][gate_offset:]]
    return {**optimizer_state, "param_groups": groups}


def insert_gates(
    tensors: Sequence[Tensor], parameters: Mapping[str, Shape], gates: Mapping[str, Tensor], trainable: Collection[str]
) -> list[Tensor] | None:
    """Return a list of tensors, one per parameter as in a weight average, with the gates inserted.

    Args:
        tensors: one per parameter of the model before its conversion.
        parameters: name -> shape of the parameters of the converted model, in their order.
        gates: name -> initial value of the gates.
        trainable: the names of the gates that train; the others are not inserted.

    Returns:
        The list in the order of `parameters`, or None if `tensors` have other shapes or another order.
    """
    old = [shape for name, shape in parameters.items() if name not in gates]
    if [tuple(tensor.shape) for tensor in tensors] != old:
        return None
    rest = iter(tensors)
    all_tensors = [gates[name].clone() if name in gates else next(rest) for name in parameters]
    frozen = {name for name in gates if name not in trainable}
    return (
        all_tensors
        if not frozen
        else [t for name, t in zip(parameters, all_tensors, strict=True) if name not in frozen]
    )


def default_gate_step(gates: int) -> float:
    """Return how far a gate may move in a step, by the number of gates: 0.5 / sites, at most 0.1.

    Examples:
        >>> default_gate_step(8), default_gate_step(100)
        (0.1, 0.01)
    """
    return min(_MAX_GATE_STEP, 1 / max(gates, 1))


def default_gate_lr(lr: Any, gates: int) -> float:
    """Return the default learning rate of gates by the learning rate of the network and the number of gates.

    Examples:
        >>> default_gate_lr(1e-4, gates=100), default_gate_lr(0.1, gates=100)
        (0.01, 0.03)
    """
    return min(_GATE_LR_FACTOR * float(lr), _RATE_PER_STEP * default_gate_step(gates), _MAX_GATE_STEP)


def gate_options(template: Mapping[str, Any], *, gates: int, importance_lr: float | None = None) -> dict[str, Any]:
    """Return the options of a group of gates: those of `template` without weight decay, with their own learning rate.

    Args:
        template: a parameter group; its parameters are ignored.
        gates: the number of gates.
        importance_lr: the learning rate before any schedule (the maximum of OneCycleLR). Default: that of `template` if
            it is a group of gates, else `default_gate_lr` of it. If a scheduler has set `initial_lr`, the current rate
            has the same ratio to it as in `template`.

    Raises:
        OptimizerError: `importance_lr` is negative or not finite.
    """
    check_rate("importance_lr", importance_lr)
    excluded = ("params", "param_names", *_STEP_KEYS)
    options = {name: copy.deepcopy(value) for name, value in template.items() if name not in excluded}
    options |= {"weight_decay": 0.0, GATE_GROUP: True}
    base = base_lr(template)
    if importance_lr is None and base is not None and template.get(GATE_GROUP) is not True:
        importance_lr = default_gate_lr(base, gates)
    if importance_lr is not None:
        present = {name: options[name] for name in _LR_KEYS if options.get(name) is not None} or {"lr": base}
        options |= {name: rescale(rate, old=base, new=importance_lr) for name, rate in present.items()}
    return options


def base_lr(group: Mapping[str, Any]) -> Any:
    """Return the learning rate of a group before any schedule (the maximum of OneCycleLR); None if it has none."""
    return next((group[name] for name in ("max_lr", "initial_lr", "lr") if group.get(name) is not None), None)


def rescale(rate: Any, *, old: Any, new: Any) -> Any:
    """Return `rate`, a number or a tensor, for the base rate `new` instead of `old`."""
    return new * (rate / old) if old else new


def check_rate(name: str, value: float | None) -> None:
    """Refuse a learning rate or weight decay that is negative or not finite.

    Raises:
        OptimizerError: the value is such a number, or not a number.
    """
    if value is not None and not (hasattr(value, "__float__") and math.isfinite(value) and value >= 0):
        raise OptimizerError(f"{name}: expected a finite number >= 0, got {value!r}")


def _new_keys(used_keys: Sequence[Any], state: Mapping[Any, Any], gates: Sequence[str]) -> list[Any]:
    """The keys of further parameters: the next free numbers, or their names if the other parameters have names."""
    if used_keys and isinstance(used_keys[0], str):  # some libraries use names, torch uses numbers
        return list(gates)
    first = max((key for key in (*used_keys, *state) if isinstance(key, int)), default=-1) + 1
    return list(range(first, first + len(gates)))


def _find_problem(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> str | None:
    """What is wrong with the groups, as a predicate for an error message, or None."""
    keys = [key for group in groups for key in group["params"]]
    if not groups:
        return "has no parameter group"
    if not (all(type(key) is int for key in keys) or all(isinstance(key, str) for key in keys)):
        return "is damaged, it mixes parameters by number and by name"
    if len({"param_names" in group for group in groups}) > 1:
        return "is damaged, only some of its groups have param_names"
    for index, group in enumerate(groups):
        if "param_names" in group and len(group["param_names"]) != len(group["params"]):
            return (
                f"is damaged, group {index} has {len(group['params'])} parameters and {len(group['param_names'])} names"
            )
    # An entry that is not a mapping belongs to no parameter.
    stateful = {key for key, value in state.items() if isinstance(key, int | str) and isinstance(value, Mapping)}
    orphaned = sorted(map(str, stateful - set(keys)))
    return f"is damaged, parameter {orphaned[0]} has a state and is in no group" if orphaned else None


# --- learning rate schedulers

EntryFunction = Callable[[StateDict, Any, Callable[[Any], Any]], Any]


def is_scheduler_state(value: object) -> TypeGuard[StateDict]:
    """Return whether `value` has the structure of a scheduler's state dict of torch, timm or mmengine.

    The result is False for a state dict without lists per parameter group, which fits any number of groups.
    """
    if not isinstance(value, Mapping):
        return False
    inner = value.get("_schedulers")
    if isinstance(inner, list):
        return all(map(is_scheduler_state, inner))
    return any(isinstance(value.get(name), list) for name in ("base_lrs", "base_values", "min_lrs"))


def matches_groups(scheduler_state: StateDict, groups: Sequence[StateDict]) -> bool:
    """Return whether a scheduler's lists fit an optimizer's groups: their number, and their initial learning rates."""
    inner = scheduler_state.get("_schedulers")
    if isinstance(inner, list):
        return all(matches_groups(each, groups) for each in inner)
    lists = [values for name in GROUP_LISTS if isinstance(values := scheduler_state.get(name), list)]
    if any(len(values) != len(groups) for values in lists):
        return False
    rates = scheduler_state.get("base_lrs", scheduler_state.get("base_values"))
    initial = [group.get(f"initial_{scheduler_state.get('param_group_field', 'lr')}") for group in groups]
    pairs = zip(rates if isinstance(rates, list) else [], initial, strict=False)
    return all(first is None or _is_same_rate(first, rate) for rate, first in pairs)


def _is_same_rate(first: Any, rate: Any) -> bool:
    try:
        return float(first) == float(rate)
    except (TypeError, ValueError, RuntimeError):  # a file may have any objects here
        return False


def scheduler_with_gates(scheduler_state: StateDict, *, optimizer_state: StateDict) -> dict[str, Any]:
    """Return a scheduler's state dict with entries for the group of gates that `with_gates` has added.

    The gates follow the schedule of the last old group, scaled to their own learning rate.

    Args:
        scheduler_state: the state dict of the scheduler (of torch, timm or mmengine) without gates; it is not changed.
        optimizer_state: the result of `normswap.with_gates`.

    Returns:
        A new state dict for the scheduler of the converted model's optimizer.

    Raises:
        CheckpointError: `scheduler_state` is not such a state dict or belongs to another optimizer, or
            `optimizer_state` has no gates.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        >>> gates = list(normswap.trainable_gates(normswap.convert(model).model))
        >>> extended = normswap.with_gates(optimizer.state_dict(), gates=gates, importance_lr=0.01)
        >>> normswap.scheduler_with_gates(scheduler.state_dict(), optimizer_state=extended)["base_lrs"]
        [0.1, 0.01]
    """
    if not is_scheduler_state(scheduler_state):
        raise CheckpointError("expected a scheduler's state dict with lists per group: pass scheduler.state_dict()")
    if not has_gates(optimizer_state) or len(optimizer_state["param_groups"]) < 2:
        raise CheckpointError(
            "expected an optimizer's state dict with a last group of gates: pass the result of normswap.with_gates"
        )
    *old, gates = optimizer_state["param_groups"]
    return _extend_state(scheduler_state, len(old), base_lr(old[-1]), base_lr(gates))


def extend_group_lists(state: StateDict, groups: int, old: Any, new: Any) -> dict[str, list[Any]]:
    """Return the lists per parameter group in a scheduler's state, each with a last entry for the gates.

    Args:
        state: a scheduler's state dict, or the attributes of a scheduler; nested schedulers are ignored.
        groups: the number of parameter groups without that of the gates.
        old: the learning rate of the last of these groups before any schedule.
        new: the learning rate of the gates; None for that of the last group.

    Raises:
        CheckpointError: a list has another length than `groups`.
    """

    def scale_rate(rate: Any) -> Any:
        """The rate of the gates; schedulers of other options than the learning rate treat them as the last group."""
        is_lr = "lr" in (state.get("param_group_field"), state.get("param_name")) or not (
            state.keys() & {"param_group_field", "param_name"}
        )
        return rescale(rate, old=old, new=new) if is_lr and new is not None else copy.deepcopy(rate)

    extended = {}
    for name, entry in GROUP_LISTS.items():
        values = state.get(name)
        if not isinstance(values, list):
            continue
        if len(values) != groups:
            raise CheckpointError(
                f"the scheduler's state dict has {len(values)} entries in {name!r}, expected {groups}, one for each "
                "group of the optimizer: take both from one file"
            )
        extended[name] = [*values, entry(state, values[-1], scale_rate)]
    return extended


def _extend_state(state: StateDict, groups: int, old: Any, new: Any) -> dict[str, Any]:
    extended = dict(state)
    if isinstance(state.get("_schedulers"), list):
        extended["_schedulers"] = [_extend_state(inner, groups, old, new) for inner in state["_schedulers"]]
    return extended | extend_group_lists(state, groups, old, new)


def _copy_entry(_state: StateDict, last: Any, _scale_rate: Callable[[Any], Any]) -> Any:
    """The last entry: a function is shared, as schedulers do with one for all groups; other objects are copied."""
    return last if callable(last) else copy.deepcopy(last)


def _warmup_step(state: StateDict, last: Any, scale_rate: Callable[[Any], Any]) -> Any:
    """The step per epoch of timm's warm-up, which starts at the same rate for all groups."""
    length, begin = state.get("warmup_t"), state.get("warmup_lr_init")
    return (scale_rate(begin + last * length) - begin) / length if length and begin is not None else last


# Name of a list -> function for the entry of the gates, of the state, the entry of the last old group, and a function
# that scales a rate of that group to the gates.
GROUP_LISTS: Mapping[str, EntryFunction] = {
    **dict.fromkeys(
        ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_values", "_last_value"),
        lambda _, last, scale_rate: scale_rate(last),
    ),
    **dict.fromkeys(("lr_lambdas", "base_momentums", "max_momentums"), _copy_entry),
    "warmup_steps": _warmup_step,
}
