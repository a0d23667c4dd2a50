"""Parameter groups of a converted model: its gates in a last group of their own.

`param_groups` groups anew, or keeps the groups of an optimizer that exists, whose state then stays valid. What it
returns is a list of dicts that every optimizer of torch takes, and timm's factory.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from normswap.checkpoints.optimizer_state import check_rate, gate_options
from normswap.errors import OptimizerError
from normswap.finetune.layouts import Named, Part, names_in, ordinary_parameters, parameters_of, timm_parts
from normswap.surgery.gated import gate_parameters, trainable_gates
from normswap.surgery.tree import walk_modules
from normswap.surgery.wrapping import unwrap

Group = dict[str, Any]

_MOST = 3


def param_groups(
    model: nn.Module,
    *,
    like: Any = None,
    lr: float | None = None,
    weight_decay: float = 0.0,
    importance_lr: float | None = None,
) -> list[Group]:
    """Return parameter groups for an optimizer, with the gates in a last group that has no weight decay.

    Without `like` the groups are timm's (parameters of one dimension, biases and what `model.no_weight_decay()` names
    without decay, then the rest; all in one where there is none) and the gates'. Parameters that do not train are left
    out.

    With `like` the old groups keep their order and options; gates are taken out of wherever they are, and a group that
    held nothing else goes. An optimizer that lives on needs only `add_param_group` with the last group; a new one takes
    over the state of the old by `load_state_dict`.

    Args:
        model: converted, wrapped or not. Without trainable gates there is no group of gates.
        like: an optimizer of this model or its groups, with gates in any of them or in none; or an optimizer's state
            dict or its groups, where parameters are numbers: these are known by `param_names`, else by a known order.
        lr: of all groups, default the optimizer's own. Not with `like`.
        weight_decay: of the groups that have any. Not with `like`.
        importance_lr: the learning rate of the gates, default that of the last old group. It is meant before any
            schedule: where a scheduler has left an `initial_lr`, the gates' present rate is the same share of it as
            that of the last old group.

    Returns:
        The groups, each with `params` and its options; that of the gates has the option `gates=True`.

    Raises:
        ArgumentError: `model` is no module.
        OptimizerError: a rate is negative or not finite; a trainable parameter is in no group; `like` is no such thing,
            holds parameters of another model, or numbers that no known order explains.

    Examples:
        >>> import torch, normswap
        >>> model = normswap.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))).model
        >>> groups = normswap.param_groups(model, lr=0.1, weight_decay=5e-4, importance_lr=0.01)
        >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
        [(3, 0.1, 0.0), (1, 0.1, 0.0005), (2, 0.01, 0.0)]
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("importance_lr", importance_lr)):
        check_rate(name, value)
    if like is None:
        return _new_groups(model, lr, weight_decay, importance_lr)
    if lr is not None or weight_decay:
        raise OptimizerError("like= keeps the lr and weight_decay of the old groups: leave lr and weight_decay out")
    groups = _old_groups(model, like)
    check_owner(model, groups)
    kept, template = _without_gates(model, groups)
    check_complete(model, kept)
    gates = _gates(model, groups)
    if not gates:
        return kept
    added = {**gate_options(template, importance_lr=importance_lr), "params": list(gates.values())}
    if "param_names" in template:
        names = names_in(model, [name for group in groups for name in group["param_names"]])
        added["param_names"] = [names.to_store(name) for name in gates]
    return [*kept, added]


def _new_groups(model: nn.Module, lr: float | None, weight_decay: float, importance_lr: float | None) -> list[Group]:
    members = {name: parameter for name, parameter in ordinary_parameters(model).items() if parameter.requires_grad}
    rate = {} if lr is None else {"lr": lr}
    parts = timm_parts(model, members) if weight_decay else [Part(list(members.values()), decays=False)]
    groups: list[Group] = [
        {"params": part.parameters, "weight_decay": weight_decay if part.decays else 0.0, **rate}
        for part in parts
        if part.parameters
    ]
    if gates := trainable_gates(model):
        groups.append({"params": list(gates.values()), **gate_options(rate, importance_lr=importance_lr)})
    return groups


def _old_groups(model: nn.Module, like: Any) -> list[Group]:
    """The groups in `like` as copies whose `params` are lists of parameters."""
    state: Any = None
    found = getattr(like, "param_groups", like)
    if isinstance(like, Mapping):
        found, state = like.get("param_groups"), like.get("state")
    if not isinstance(found, list | tuple) or not found or not all(_is_group(group) for group in found):
        kind = type(like).__name__
        raise OptimizerError(
            f"like: expected an optimizer, its param_groups or its state dict, got {kind}: pass optimizer"
        )
    groups = [_copied(group) for group in found]
    if not all(isinstance(key, Tensor) for group in groups for key in group["params"]):
        parameters = parameters_of(model, groups, state if isinstance(state, Mapping) else {})
        groups = [{**group, "params": params} for group, params in zip(groups, parameters, strict=True)]
    return groups


def _is_group(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("params"), Iterable)


def _copied(group: Mapping[str, Any]) -> Group:
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    options = {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
    if params and all(isinstance(item, tuple) and len(item) == 2 for item in params):
        options["param_names"], params = [name for name, _ in params], [parameter for _, parameter in params]
    return {**options, "params": params}


def check_owner(model: nn.Module, groups: Iterable[Group]) -> None:
    own = {p for place in walk_modules(unwrap(model)) for p in place.module._parameters.values()}
    foreign = [p for group in groups for p in group["params"] if p not in own]
    if foreign:
        shapes = ", ".join("x".join(map(str, p.shape)) or "scalar" for p in foreign[:_MOST])
        raise OptimizerError(
            f"like: {len(foreign)} of its parameters are not the model's ({shapes}): build the optimizer from the "
            "converted model, or convert with inplace=True, or pass its state_dict()"
        )


def _without_gates(model: nn.Module, groups: list[Group]) -> tuple[list[Group], Group]:
    """The groups without gates, and the one whose options are the gates': theirs if they had one, else the last."""
    gates = set(gate_parameters(model).values())
    kept, template = [], None
    for group in groups:
        stays = [parameter not in gates for parameter in group["params"]]
        if stays and not any(stays):
            template = group
            continue
        lists = {name: group[name] for name in ("params", "param_names") if name in group}
        kept.append(group | {name: [v for v, stay in zip(x, stays, strict=True) if stay] for name, x in lists.items()})
    return kept, template or kept[-1]


def check_complete(model: nn.Module, groups: Iterable[Group]) -> None:
    held = {parameter for group in groups for parameter in group["params"]}
    left = [name for name, p in ordinary_parameters(model).items() if p.requires_grad and p not in held]
    if left:
        more = f", +{len(left) - _MOST} more" if len(left) > _MOST else ""
        raise OptimizerError(
            f"like: {len(left)} trainable parameters are in no group ({', '.join(left[:_MOST])}{more}): add them, "
            "or freeze them with requires_grad_(False)"
        )


def _gates(model: nn.Module, groups: Iterable[Group]) -> Named:
    """The gates that learn; of modules that no registry knows, those that the groups hold."""
    gates = trainable_gates(model)
    held = {parameter for group in groups for parameter in group["params"]}
    hidden = held - set(gates.values())
    return gates | {n: p for n, p in gate_parameters(model).items() if p in hidden and p.requires_grad}
