"""Weight decay taken off the gates in an optimizer that another library has built by its own rules.

Libraries know norms by torch's classes or by words in names, and gates by neither: they decay them, or leave them out.
"""

import copy
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar

from torch import nn

from normswap.checkpoints.optimizer_state import GATE_GROUP
from normswap.errors import OptimizerError
from normswap.finetune.param_groups import Group, param_groups
from normswap.finetune.watching import stepping_optimizer
from normswap.surgery.gated import gated_modules, trainable_gates

Optimizer = TypeVar("Optimizer")


def exempt_gates(
    model: nn.Module, optimizer: Optimizer, *, affine: bool = False, importance_lr: float | None = None
) -> Optimizer:
    """Take the gates of a converted model out of weight decay, in place, in an optimizer that exists.

    Gates leave the groups that they are in, and form a last group without weight decay; gates that are in no group
    join it. All other options, and the state, stay. Build a scheduler afterwards, since it counts the groups. In an
    optimizer of fastai the gates are marked as it marks the parameters of norms.

        optimizer = normswap.exempt_gates(model, their_library.build_optimizer(model), affine=True)

    Args:
        model: converted, wrapped or not.
        optimizer: of this model: torch's, also as accelerate, Lightning or timm's Lookahead wrap it, or fastai's.
        affine: also take `weight` and `bias` of SN layers out of weight decay, as many libraries do with those of BN.
        importance_lr: learning rate of the gates, as in `param_groups`.

    Returns:
        `optimizer`.

    Raises:
        OptimizerError: no optimizer, one of another model, or one that lacks trainable parameters of the model.
    """
    exempt = _affine_parameters(model) if affine else set()
    if _is_fastai(optimizer):
        _mark(optimizer, exempt | {*trainable_gates(model).values()}, importance_lr)
        return optimizer
    inner = stepping_optimizer(optimizer)
    wanted = param_groups(model, like=inner, importance_lr=importance_lr)
    added = [
        _part(group, exempt) | {"weight_decay": 0.0}
        for group in inner.param_groups
        if group.get("weight_decay") and not exempt.isdisjoint(group["params"])
    ]
    added += wanted[-1:] if wanted[-1].get(GATE_GROUP) is True else []
    moved = {parameter for group in added for parameter in group["params"]}
    for group in list(inner.param_groups):
        if not moved.isdisjoint(group["params"]):
            group |= _part(group, {*group["params"]} - moved)
            if not group["params"]:
                inner.param_groups.remove(group)
    for group in added:
        inner.add_param_group(group)
    return optimizer


def _affine_parameters(model: nn.Module) -> set[nn.Parameter]:
    layers = gated_modules(model).values()
    found = [layer._parameters.get(name) for layer in layers for name in ("weight", "bias")]
    return {parameter for parameter in found if parameter is not None}


def _part(group: Group, parameters: AbstractSet[nn.Parameter]) -> Group:
    """A group with its options and, of its parameters, those named."""
    stays = [parameter in parameters for parameter in group["params"]]
    lists = {name: group[name] for name in ("params", "param_names") if name in group}
    options = {name: copy.deepcopy(value) for name, value in group.items() if name not in lists}
    return options | {
        name: [value for value, stay in zip(values, stays, strict=True) if stay] for name, values in lists.items()
    }


def _is_fastai(optimizer: object) -> bool:
    return all(hasattr(optimizer, name) for name in ("hypers", "param_lists", "state"))


def _mark(optimizer: Any, parameters: AbstractSet[nn.Parameter], importance_lr: float | None) -> None:
    """Set fastai's own mark, by which it leaves a parameter out of weight decay."""
    own = {parameter for group in optimizer.param_lists for parameter in group}
    if importance_lr is not None:
        raise OptimizerError("importance_lr: fastai has one rate for a group of layers: leave it out")
    if not parameters <= own:
        raise OptimizerError(
            f"the optimizer lacks {len(parameters - own)} of the model's gates and norms: build it from the converted "
            "model, learn.create_opt()"
        )
    for parameter in parameters:
        optimizer.state[parameter]["do_wd"] = False
