"""What a recipe adds to the loss for the gates."""

from torch import Tensor, nn

from normswap.finetune.recipe import TrainTable
from normswap.surgery.importance import batch_dependence, gate_impurity

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
