"""timm's optimizers and moving average for a model with gates."""

from typing import Any

import torch
from torch import nn

from normswap.errors import RecipeError
from normswap.finetune.param_groups import param_groups
from normswap.finetune.recipe_tables import TrainTable


def build_optimizer(model: nn.Module, train: TrainTable) -> torch.optim.Optimizer:
    """Return the optimizer that a recipe names, with the gates in a group of their own.

    Raises:
        RecipeError: timm has none of that name, or it takes other options.
    """
    import timm.optim

    package: Any = timm.optim  # typed in some of its versions only
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


def build_average(model: nn.Module, decay: float) -> Any:
    """Return timm's moving average of a model, or None if its decay is 0.

    Its decay rises to `decay` with the steps: from the start it would keep 98 % of the first weights over 100 steps.
    """
    if not decay:
        return None
    import timm.utils

    package: Any = timm.utils
    return package.ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=0.75)
