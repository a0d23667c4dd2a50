"""Learning rate scheduler state dicts as they lie in files: an entry for the group of the gates in every list.

Schedulers keep lists with one entry per parameter group of their optimizer. Loaded as they are beside an optimizer
with one more group, some raise at the next step (torch's LambdaLR, CosineAnnealingWarmRestarts, CyclicLR, a
ReduceLROnPlateau with its own bounds) and some leave the last group's learning rate where it was (timm's).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from normswap.checkpoints.optimizer_state import StateDict, base_rate, has_gates, rescaled
from normswap.errors import CheckpointError

Entry = Callable[[StateDict, Any, Callable[[Any], Any]], Any]


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


def could_step(scheduler_state: StateDict, groups: Sequence[StateDict]) -> bool:
    """Say whether a scheduler's lists have as many entries as an optimizer has groups, and their initial rates."""
    inner = scheduler_state.get("_schedulers")
    if isinstance(inner, list):
        return all(could_step(each, groups) for each in inner)
    lists = [values for name in _ENTRIES if isinstance(values := scheduler_state.get(name), list)]
    if any(len(values) != len(groups) for values in lists):
        return False
    rates = scheduler_state.get("base_lrs", scheduler_state.get("base_values"))
    initial = [group.get(f"initial_{scheduler_state.get('param_group_field', 'lr')}") for group in groups]
    pairs = zip(rates if isinstance(rates, list) else [], initial, strict=False)
    return all(first is None or _is_same(first, rate) for rate, first in pairs)


def _is_same(first: Any, rate: Any) -> bool:
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
    return _extended(scheduler_state, len(old), base_rate(old[-1]), base_rate(gates))


def lists_with_gates(state: StateDict, groups: int, old: Any, new: Any) -> dict[str, list[Any]]:
    """Return those lists per group in a scheduler's state, each with an entry for the gates at its end.

    Args:
        state: a scheduler's state dict, or the attributes of a scheduler; nested schedulers are left aside.
        groups: how many parameter groups the optimizer has without that of the gates.
        old: the learning rate of the last of them before any schedule.
        new: that of the gates; None keeps what the last group has.

    Raises:
        CheckpointError: a list has another length.
    """

    def own(rate: Any) -> Any:
        # One that schedules something else than the learning rate treats the gates as the group before them.
        of_rate = "lr" in (state.get("param_group_field"), state.get("param_name")) or not (
            state.keys() & {"param_group_field", "param_name"}
        )
        return rescaled(rate, old=old, new=new) if of_rate and new is not None else copy.deepcopy(rate)

    extended = {}
    for name, entry in _ENTRIES.items():
        values = state.get(name)
        if not isinstance(values, list):
            continue
        if len(values) != groups:
            raise CheckpointError(
                f"the scheduler's state dict has {len(values)} entries in {name!r}, the optimizer has {groups} groups: "
                "take both from one file"
            )
        extended[name] = [*values, entry(state, values[-1], own)]
    return extended


def _extended(state: StateDict, groups: int, old: Any, new: Any) -> dict[str, Any]:
    extended = dict(state)
    if isinstance(state.get("_schedulers"), list):
        extended["_schedulers"] = [_extended(inner, groups, old, new) for inner in state["_schedulers"]]
    return extended | lists_with_gates(state, groups, old, new)


def _same(_state: StateDict, last: Any, _own: Callable[[Any], Any]) -> Any:
    """A function is shared, as a scheduler shares the one that it was given for all groups; its state is copied."""
    return last if callable(last) else copy.deepcopy(last)


def _warmup_step(state: StateDict, last: Any, own: Callable[[Any], Any]) -> Any:
    """timm's step per epoch from the rate at which warming up begins, which is the same for all groups."""
    length, begin = state.get("warmup_t"), state.get("warmup_lr_init")
    return (own(begin + last * length) - begin) / length if length and begin is not None else last


# By the name of a list: what its entry for the gates is, given the state, the entry of the last old group, and what
# turns a rate of that group into the gates'.
_ENTRIES: Mapping[str, Entry] = {
    **dict.fromkeys(
        ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_values", "_last_value"), lambda _, last, own: own(last)
    ),
    **dict.fromkeys(("lr_lambdas", "base_momentums", "max_momentums"), _same),
    "warmup_steps": _warmup_step,
}
