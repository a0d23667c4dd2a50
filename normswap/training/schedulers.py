"""Learning rate schedulers of a run in progress: an entry for the group of gates in every list per parameter group.

What is to be changed is computed first and set at once, so that a scheduler that does not fit leaves all as they are.
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

# Where a scheduler keeps others: torch's SequentialLR and ChainedScheduler, timm's PlateauLRScheduler, accelerate.
_NESTED_ATTRIBUTES = ("_schedulers", "lr_scheduler", "scheduler")
# What torch's schedulers call the number below which they do not anneal.
_MIN_LR_ATTRIBUTE = "eta_min"

Group = Mapping[str, Any]


class SchedulerUpdate(NamedTuple):
    """A scheduler and the lists, by attribute, that it is to keep instead of its own."""

    scheduler: Any
    lists: dict[str, list[Any]]

    def set(self) -> None:
        """Give the scheduler these lists."""
        vars(self.scheduler).update(self.lists)


def iter_schedulers(scheduler: Any) -> Iterator[Any]:
    """Yield a scheduler and all that it steps, the outer one first; of several in a list or tuple those of each."""
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
    """Refuse schedulers of another optimizer, and whatever is no scheduler.

    Raises:
        OptimizerError: as said.
    """
    for each in schedulers:
        own = getattr(each, "optimizer", getattr(each, "optimizers", None))
        if own is None:
            raise OptimizerError(
                f"scheduler: expected a scheduler of torch or timm, got {type(each).__name__}: pass scheduler=scheduler"
            )
        optimizers = own if isinstance(own, list | tuple) else [own]
        if not any(unwrap_optimizer(each) is optimizer for each in optimizers):
            raise OptimizerError(
                f"scheduler: {type(each).__name__} steps another optimizer than the one that gets the gates: pass the "
                "schedulers of that optimizer"
            )


def plan_scheduler_updates(schedulers: Sequence[Any], groups: Sequence[Group], gates: Group) -> list[SchedulerUpdate]:
    """Return what the schedulers of an optimizer have to keep once the group of gates is its last one.

    The gates follow the schedule of the last group, at their own learning rate.

    Args:
        schedulers: all of them, nested ones too.
        groups: the optimizer's parameter groups without the gates.
        gates: the group of gates, at its present learning rate.

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
                f"scheduler: {type(each).__name__} was built for another number of parameter groups than the "
                f"{len(groups)} that the optimizer has: build it again before the conversion"
            ) from None
        if "_last_lr" in lists:
            lists["_last_lr"][-1] = copy.deepcopy(gates["lr"])
        found.append(SchedulerUpdate(each, lists))
    return found


def check_group_count(schedulers: Sequence[Any], groups: int) -> None:
    """Refuse own classes of schedulers that keep a list per parameter group which `plan_scheduler_updates` does not know.

    Raises:
        OptimizerError: one computes no rate for the last of so many groups, so that its next step would fail.
    """
    for each in schedulers:
        cls = type(each)
        if not isinstance(each, LRScheduler) or cls.__module__.partition(".")[0] == "torch":
            continue
        each._get_lr_called_within_step = True
        try:
            # On a copy: a class may count its calls.
            complete = len(copy.copy(each).get_lr()) == groups
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            complete = False
        finally:
            each._get_lr_called_within_step = False
        if not complete:
            raise OptimizerError(
                f"scheduler: {cls.__module__}.{cls.__qualname__} computes no learning rate for the {groups} groups "
                "that the optimizer has with the gates: leave it out, and build it again after the conversion"
            )


def current_gate_lr(schedulers: Sequence[Any], last: Group, gates: Group) -> Any:
    """Return the present learning rate of the gates, which stand in their schedule where the last group stands.

    It is a fixed share of their base, unless a scheduler anneals to a floor other than zero.

    Args:
        schedulers: those that are stepped, without nested ones.
    """
    min_lr = next(filter(None, (getattr(_active_scheduler(each), _MIN_LR_ATTRIBUTE, 0.0) for each in schedulers)), 0.0)
    old, new = base_lr(last), base_lr(gates)
    if not min_lr or old == min_lr:
        return gates["lr"]
    return min_lr + (new - min_lr) * (last["lr"] - min_lr) / (old - min_lr)


def _active_scheduler(scheduler: Any) -> Any:
    """The scheduler that sets the rate now: of a sequence the one whose turn it is."""
    milestones = getattr(scheduler, "_milestones", None)
    if milestones is None:
        return scheduler
    return _active_scheduler(scheduler._schedulers[bisect_right(milestones, scheduler.last_epoch)])
