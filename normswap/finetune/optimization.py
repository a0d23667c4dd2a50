"""How a recipe optimizes: the optimizer, its schedule, the average of the weights, penalties, the number of steps.

Optimizers and the moving average are timm's.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import RecipeError
from normswap.finetune.recipe import check_warmup
from normswap.finetune.tables import RunTable, TrainTable
from normswap.surgery.importance import batch_dependence, gate_impurity
from normswap.training.gate_steps import limit_gate_steps
from normswap.training.param_groups import param_groups

# --- optimizer, schedule, average -------------------------------------------------------------------------------------


def build_optimizer(model: nn.Module, train: TrainTable) -> torch.optim.Optimizer:
    """Return the optimizer that a recipe names, with the gates in a parameter group of their own.

    Raises:
        RecipeError: timm has no optimizer of that name, or it does not take these options.
    """
    import timm.optim

    package: Any = timm.optim  # only some of its versions are typed
    groups = param_groups(model, lr=train.lr, weight_decay=train.weight_decay, importance_lr=train.importance_lr)
    try:
        optimizer: torch.optim.Optimizer = package.create_optimizer_v2(
            groups, opt=train.optimizer, lr=train.lr, weight_decay=0.0, momentum=train.momentum
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise RecipeError(
            f"train.optimizer = {train.optimizer!r}: {error}: see timm.optim.list_optimizers()"
        ) from error
    return optimizer


def limit_steps(model: nn.Module, optimizer: torch.optim.Optimizer, train: TrainTable, *, step: int = 0) -> None:
    """Limit the steps of the gates as the recipe says, from step number `step` on."""
    if train.gate_max_step != 0:
        limit_gate_steps(
            model, optimizer, max_step=train.gate_max_step, warmup_steps=train.gate_warmup_steps, step=step
        )


def make_lr_lambda(train: TrainTable, steps: int) -> Callable[[int], float]:
    """Return the function from the number of a step to the factor on all learning rates."""
    min_factor = train.min_lr / train.lr if train.lr else 0.0
    warmup = check_warmup(train, steps)

    def lr_lambda(step: int) -> float:
        """The factor of a step."""
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / (steps - warmup))
        decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        return min_factor + (1 - min_factor) * decay[train.schedule]

    return lr_lambda


def build_average(model: nn.Module, decay: float) -> Any:
    """Return timm's moving average of a model, or None if the decay is 0.

    The decay rises to `decay` over the steps: a constant 0.9998 would keep 98 % of the first weights for 100 steps.
    """
    if not decay:
        return None
    import timm.utils

    package: Any = timm.utils
    return package.ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=0.75)


# --- penalties on gates -----------------------------------------------------------------------------------------------

# The share of a run before the gates are pulled to single branches: from the start, none would leave its branch.
_ONE_HOT_AFTER = 0.5


def gate_penalty(model: nn.Module, train: TrainTable, share: float) -> Tensor | float:
    """Return the penalties on the gates of a model.

    Args:
        share: the share of the run that is done, from 0 to 1.
    """
    penalty: Tensor | float = 0.0
    if train.batch_penalty:
        penalty = penalty + train.batch_penalty * batch_dependence(model)
    if train.one_hot_penalty and share >= _ONE_HOT_AFTER:
        penalty = penalty + train.one_hot_penalty * gate_impurity(model)
    return penalty


# --- the number of steps ----------------------------------------------------------------------------------------------


def run_length(train: TrainTable, batches: int) -> int:
    """Return the number of steps of a run.

    Args:
        batches: the number of batches per epoch and process.

    Raises:
        RecipeError: the epochs are too short for one step, or warm-up would take all steps.
    """
    if train.steps is not None:
        check_warmup(train, train.steps)
        return train.steps
    epochs = train.epochs or 0
    steps = epochs * batches // train.accumulation
    origin = f"train.epochs = {epochs} of {batches} batches"
    if not steps:
        enough = -(-train.accumulation // batches)
        raise RecipeError(
            f"train.accumulation: a step takes {train.accumulation} batches, and the run has {epochs * batches} "
            f"({origin}): choose a smaller accumulation, or train.epochs = {enough}"
        )
    shared = f", train.accumulation = {train.accumulation}" if train.accumulation > 1 else ""
    check_warmup(train, steps, f" ({origin}{shared})")
    return steps


def describe_rare_events(run: RunTable, steps: int) -> str | None:
    """Return a note on logs, evaluations or states that are due less than once in a run, or None if there are none."""
    default = RunTable()
    effects = {
        "log_every": "the log gets one line of losses",
        "evaluate_every": "the model is evaluated at the start and the end only",
        "save_every": "the state is saved at the end only",
    }
    rare = {key: getattr(run, key) for key in effects if getattr(run, key) > steps}
    rare = {key: value for key, value in rare.items() if value != getattr(default, key)}
    if not rare:
        return None
    keys = ", ".join(f"run.{key} = {value}" for key, value in rare.items())
    return f"{keys}: more than the {steps} steps of the run, so {' and '.join(effects[key] for key in rare)}"
