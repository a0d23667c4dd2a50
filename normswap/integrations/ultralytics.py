"""The conversion inside the training of Ultralytics YOLO models. This module does not import Ultralytics.

A trainer builds the model from its YAML description also if it starts from a checkpoint or resumes, loads the weights,
and builds optimizer and moving average afterwards, in each process. A conversion at another time would miss one of
these, so `switch_norm_trainer` overrides the two methods that build model and optimizer.
"""

import copy
from functools import partial
from typing import Any

from torch import nn

from normswap.errors import ArgumentError
from normswap.layers.switch_norm import SwitchNorm
from normswap.surgery.conversion import convert
from normswap.surgery.importance import gated_modules
from normswap.training.gate_steps import limit_gate_steps
from normswap.training.param_groups import exempt_gates

_NO_WEIGHT_DECAY = "bn"  # the trainer's name of the groups that it never gives a weight decay


def switch_norm_trainer(yolo: Any, *, importance_lr: float | None = None, **choices: Any) -> type:
    """Return the trainer of a YOLO model's task, with SN: `yolo.train(trainer=switch_norm_trainer(yolo), ...)`.

    The network is converted before optimizer, moving average and scaler are built. The gates are the last parameter
    group, and neither they nor weight and bias of SN layers have weight decay. Steps of gates are limited
    (`normswap.limit_gate_steps`). Checkpoints load in Ultralytics if normswap is installed, and pass on their SN
    layers to a new run and to `resume=True`, for which the same trainer must be passed again. Before a prediction
    Ultralytics folds norms into convolutions: it does so while all gates are at `bn`, and leaves out this step later.

    Args:
        yolo: an `ultralytics.YOLO`, or another model of it that names its trainers in `task_map`.
        importance_lr: the learning rate of the gates, as in `normswap.param_groups`.
        choices: arguments of `normswap.convert`. A network that starts without weights has
            `bn_statistics="batch"` unless these differ.

    Returns:
        A class derived from the trainer of the task.

    Raises:
        ArgumentError: `yolo` names no trainer for its task.
    """
    base = getattr(yolo, "task_map", {}).get(getattr(yolo, "task", None), {}).get("trainer")
    if base is None:
        raise ArgumentError(f"yolo: expected a model such as YOLO('yolo11n.pt'), got {type(yolo).__name__}")

    class SwitchNormTrainer(base):  # type: ignore[misc, valid-type]
        """The trainer of the task, which converts what it builds."""

        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
            """Build and convert the network."""
            return convert_yolo(super().get_model(cfg=cfg, weights=weights, verbose=verbose), weights, **choices)

        def build_optimizer(self, model: nn.Module, *args: Any, **options: Any) -> Any:
            """Build the optimizer, with a group for the gates."""
            return regroup(model, super().build_optimizer(model, *args, **options), importance_lr)

    return SwitchNormTrainer


def convert_yolo(model: nn.Module, weights: nn.Module | None, **choices: Any) -> nn.Module:
    """Convert a network in place; SN layers of the network whose weights it has are copied.

    Args:
        model: a network of Ultralytics with the weights of `weights`.
        weights: the network that these come from, converted or not; None if `model` starts without.
        choices: arguments of `normswap.convert`.
    """
    modules = dict(model.named_modules())
    for fqn, layer in gated_modules(weights).items() if isinstance(weights, nn.Module) else ():
        old = modules.get(fqn)
        if isinstance(layer, SwitchNorm) and getattr(old, "num_features", None) == layer.num_features:
            model.set_submodule(fqn, copy.deepcopy(layer).float().requires_grad_())
    start = {"bn_statistics": "batch"} if weights is None else {}
    convert(model, inplace=True, **{**start, **choices})
    vars(model)["fuse"] = partial(fold_while_exact, model)
    return model


def fold_while_exact(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
    """Fold norms into convolutions as the class of the model does, or return it unchanged if gates have left `bn`.

    Networks refer to this function by name in checkpoints.
    """
    if not all(layer.is_at("bn") for layer in gated_modules(model).values()):
        return model
    folded: nn.Module = type(model).fuse(model, *args, **options)  # type: ignore[attr-defined]
    return folded


def regroup(model: nn.Module, optimizer: Any, importance_lr: float | None) -> Any:
    """Give gates and affine parameters of SN groups without weight decay, and limit the steps of the gates."""
    known = list(optimizer.param_groups)
    exempt_gates(model, optimizer, affine=True, importance_lr=importance_lr)
    for group in optimizer.param_groups:
        if not any(group is each for each in known):
            group["param_group"] = _NO_WEIGHT_DECAY
            if "use_muon" in group:
                group["use_muon"] = False  # gates are vectors
    limit_gate_steps(model, optimizer)
    return optimizer
