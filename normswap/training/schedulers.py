"""Learning rate schedulers during a run: extend every list per parameter group by an entry for the gates.

All changes are computed before the first one is applied, so that an error leaves all schedulers unchanged.
"""

import copy
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LRScheduler

from normswap.checkpoints.content.optimizer_state import base_lr, extend_group_lists
from normswap.errors import CheckpointError, OptimizerError
from normswap.training.importance_watch import unwrap_optimizer

# Attributes with nested schedulers: torch's SequentialLR and ChainedScheduler, timm's PlateauLRScheduler, accelerate.
_NESTED_ATTRIBUTES = ("_schedulers", "lr_scheduler", "scheduler")
# The attribute of torch's schedulers with the smallest learning rate.
_MIN_LR_ATTRIBUTE = "eta_min"

Group = Mapping[str, Any]


class SchedulerUpdate(NamedTuple):
    """A scheduler and the new values of its lists, by attribute."""

    scheduler: Any
    lists: dict[str, list[Any]]

    def set(self) -> None:
        """Apply the update."""
        vars(self.scheduler).update(self.lists)


def iter_schedulers(scheduler: Any) -> Iterator[Any]:
    """Yield a scheduler, or every one in a list or tuple, each followed by its nested schedulers."""
    if isinstance(scheduler, list | tuple):
        for each in scheduler:
            yield from iter_schedulers(each)
        return
    yield scheduler
    for name in _NESTED_ATTRIBUTES:
        inner = getattr(scheduler, "__dict__", {}).get(name)
        if inner is not None:
            yield from iter_schedulers(inner)


def check_schedulers(schedulers: Sequence[Any], optimizer: torch.optim.Optimizer) -> None:
    """Check that each object is a scheduler of this optimizer.

    Raises:
        OptimizerError: one is not a scheduler, or steps another optimizer.
    """
    for each in schedulers:
        own = getattr(each, "optimizer", getattr(each, "optimizers", None))
        if own is None:
            raise OptimizerError(f"scheduler: expected a scheduler of torch or timm, got {type(each).__name__}")
        optimizers = own if isinstance(own, list | tuple) else [own]
        if not any(unwrap_optimizer(each) is optimizer for each in optimizers):
            raise OptimizerError(
                f"scheduler: expected schedulers of the optimizer that gets the gates, but {type(each).__name__} steps "
                "another optimizer: pass the schedulers of the one with the norms"
            )


def plan_scheduler_updates(schedulers: Sequence[Any], groups: Sequence[Group], gates: Group) -> list[SchedulerUpdate]:
    """Return the updates for schedulers of an optimizer that gets the gates as its last group.

    The gates follow the schedule of the group before them, with their own learning rate.

    Args:
        schedulers: all schedulers, including nested ones.
        groups: the optimizer's parameter groups without the gates.
        gates: the group of the gates, with its present learning rate.

    Raises:
        OptimizerError: a scheduler has lists for another number of groups.
    """
    old, new = base_lr(groups[-1]), base_lr(gates)
    found = []
    for each in schedulers:
        try:
            lists = extend_group_lists(vars(each), len(groups), old, new)
        except CheckpointError:
            raise OptimizerError(
                f"scheduler: {type(each).__name__} was built for another number of parameter groups; expected "
                f"{len(groups)}, as in the optimizer: build it again before the conversion"
            ) from None
        if "_last_lr" in lists:
            lists["_last_lr"][-1] = copy.deepcopy(gates["lr"])
        found.append(SchedulerUpdate(each, lists))
    return found


def check_group_count(schedulers: Sequence[Any], groups: int) -> None:
    """Check that custom schedulers return a learning rate for every group, including that of the gates.

    A custom class may keep a list per group in an attribute that `plan_scheduler_updates` does not know.

    Raises:
        OptimizerError: a scheduler returns another number of rates, so that its next step would fail.
    """
    for each in schedulers:
        cls = type(each)
        if not isinstance(each, LRScheduler) or cls.__module__.partition(".")[0] == "torch":
            continue
        each._get_lr_called_within_step = True
        try:
            # A copy, since a class may count its calls.
            complete = len(copy.copy(each).get_lr()) == groups
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            complete = False
        finally:
            each._get_lr_called_within_step = False
        if not complete:
            raise OptimizerError(
                f"scheduler: {cls.__module__}.{cls.__qualname__} does not return {groups} learning rates, one for each "
                "group and the gates: convert without it, and build it again after the conversion"
            )


def current_gate_lr(schedulers: Sequence[Any], last: Group, gates: Group) -> Any:
    """Return the present learning rate of the gates, at the point of the schedule that the last group has reached.

    It is the same fraction of the initial rate as that of the last group, unless a scheduler anneals to a minimum.

    Args:
        schedulers: the schedulers that the loop steps, without nested ones.
        last: the last parameter group before that of the gates.
        gates: the group of the gates.
    """
    min_lr = next(filter(None, (getattr(_active_scheduler(each), _MIN_LR_ATTRIBUTE, 0.0) for each in schedulers)), 0.0)
    old, new = base_lr(last), base_lr(gates)
    if not min_lr or old == min_lr:
        return gates["lr"]
    return min_lr + (new - min_lr) * (last["lr"] - min_lr) / (old - min_lr)


def _active_scheduler(scheduler: Any) -> Any:
    """The scheduler that sets the present rate: in a `SequentialLR` the one of the present phase."""
    milestones = getattr(scheduler, "_milestones", None)
    if milestones is None:
        return scheduler
    return _active_scheduler(scheduler._schedulers[bisect_right(milestones, scheduler.last_epoch)])
