"""Parameter groups of a converted model, with its gates in a last group that has no weight decay.

`param_groups` returns groups for a new optimizer, or the groups of an existing one, whose state stays valid.
`exempt_gates` changes an existing optimizer, which another library may have built. A state dict refers to parameters by
number: these are resolved by the orders in which common libraries build their groups.
"""

import copy
import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from normswap.checkpoints.content.key_prefixes import StoredNames, match_names
from normswap.checkpoints.content.optimizer_state import GATE_GROUP, PARAM_SHAPED_KEYS, check_rate, gate_options
from normswap.errors import OptimizerError
from normswap.layers.gated_module import GatedModule
from normswap.surgery.importance import gate_parameters, gated_modules, trainable_gates
from normswap.surgery.module_tree import walk_modules
from normswap.surgery.wrappers import unwrap
from normswap.training.importance_watch import unwrap_optimizer

NamedParameters = dict[str, nn.Parameter]
AnyGroup = Mapping[str, Any]
Group = dict[str, Any]
Optimizer = TypeVar("Optimizer")

_MAX_LISTED = 3

# --- orders of parameters ---------------------------------------------------------------------------------------------

_LIKE_HINT = "pass like=the optimizer that your code builds from the converted model"


class ParamGroupSpec(NamedTuple):
    """The parameters of one group, and whether it has weight decay (None: unknown)."""

    parameters: list[nn.Parameter]
    decays: bool | None


def non_gate_parameters(model: nn.Module) -> NamedParameters:
    """Return all parameters except gates, by name, in the order of `named_parameters()`."""
    gates = set(gate_parameters(model).values())
    return {name: parameter for name, parameter in unwrap(model).named_parameters() if parameter not in gates}


def timm_param_groups(model: nn.Module, members: NamedParameters) -> list[ParamGroupSpec]:
    """Return the groups of `timm.optim.param_groups_weight_decay`, without decay and with it, but no empty one."""
    no_decay_patterns: Iterable[str] = getattr(unwrap(model), "no_weight_decay", set)()

    def decays(name: str, parameter: nn.Parameter) -> bool:
        excluded = parameter.ndim <= 1 or name.endswith(".bias")
        return not excluded and not any(fnmatch.fnmatch(name, pattern) for pattern in no_decay_patterns)

    return _split(members, decays, order=(False, True))


def resolve_parameters(
    model: nn.Module, groups: Sequence[AnyGroup], state: Mapping[Any, Any]
) -> list[list[nn.Parameter]]:
    """Return the parameters of each group of a state dict, in which they are numbers or names.

    Args:
        model: a converted model; its gates are either in one marked group or in none.
        groups: the `param_groups` of an optimizer's state dict.
        state: the `state` of that state dict, or an empty mapping.

    Raises:
        OptimizerError: a name does not belong to the model; no known order fits the numbers, or several do.
    """
    if all("param_names" in group for group in groups):
        return [_resolve_names(model, group["param_names"]) for group in groups]
    if all(isinstance(key, str) for group in groups for key in group["params"]):
        return [_resolve_names(model, group["params"]) for group in groups]
    old = [group for group in groups if group.get(GATE_GROUP) is not True]
    found = _resolve_order(model, old, state)
    gates = list(trainable_gates(model).values())
    for group in groups[len(old) :]:
        if group.get(GATE_GROUP) is not True or len(group["params"]) != len(gates):
            raise OptimizerError(
                f"like: its group of gates has {len(group['params'])} parameters, but the model has {len(gates)} "
                f"trainable gates: {_LIKE_HINT}"
            )
        found.append(gates)
    return found


def match_parameter_names(model: nn.Module, stored: Collection[str]) -> StoredNames:
    """Return how names stored by an optimizer, perhaps of a wrapped model, correspond to those of `model`."""
    return match_names(stored, dict(unwrap(model).named_parameters(remove_duplicate=False)))


def _resolve_names(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    own_parameters = dict(unwrap(model).named_parameters(remove_duplicate=False))
    own = {stored: name for name, stored in match_parameter_names(model, names).stored.items()}
    resolved = [name if name in own_parameters else own.get(name, name) for name in names]
    unknown = [name for name in resolved if name not in own_parameters]
    if unknown:
        raise OptimizerError(
            f"like: {len(unknown)} of its names are not the model's ({', '.join(unknown[:_MAX_LISTED])}): {_LIKE_HINT}"
        )
    return [own_parameters[name] for name in resolved]


def _resolve_order(model: nn.Module, groups: Sequence[AnyGroup], state: Mapping[Any, Any]) -> list[list[nn.Parameter]]:
    all_parameters = non_gate_parameters(model)
    trainable = {name: parameter for name, parameter in all_parameters.items() if parameter.requires_grad}
    fitting = {}
    for members in (all_parameters, trainable):
        for make_specs in _PARAM_ORDERS.values():
            parts = make_specs(model, members)
            if _matches_groups(groups, parts, state):
                fitting[tuple(tuple(map(id, part.parameters)) for part in parts)] = parts
    if len(fitting) != 1:
        what = "fit more than one known order" if fitting else f"fit no known order ({', '.join(_PARAM_ORDERS)})"
        sizes = " and ".join(str(len(group["params"])) for group in groups)
        raise OptimizerError(
            f"like: its parameters are numbers, and its groups of {sizes} of the model's {len(all_parameters)} "
            f"parameters {what}: {_LIKE_HINT}"
        )
    return [part.parameters for part in fitting.popitem()[1]]


def _matches_groups(groups: Sequence[AnyGroup], parts: Sequence[ParamGroupSpec], state: Mapping[Any, Any]) -> bool:
    return len(groups) == len(parts) and all(
        len(group["params"]) == len(part.parameters)
        and part.decays in (None, bool(group.get("weight_decay", 0)))
        and all(map(_matches_shape, map(state.get, group["params"]), part.parameters))
        for group, part in zip(groups, parts, strict=True)
    )


def _matches_shape(entries: Any, parameter: nn.Parameter) -> bool:
    if not isinstance(entries, Mapping):
        return True
    tensors = [value for name, value in entries.items() if name in PARAM_SHAPED_KEYS and isinstance(value, Tensor)]
    return all(tensor.shape == parameter.shape for tensor in tensors if tensor.dim())


def _split(
    members: NamedParameters, decays: Callable[[str, nn.Parameter], bool], *, order: tuple[bool, bool]
) -> list[ParamGroupSpec]:
    parts = [ParamGroupSpec([p for name, p in members.items() if decays(name, p) == which], which) for which in order]
    return [part for part in parts if part.parameters]


def _norms_last(model: nn.Module, members: NamedParameters) -> list[ParamGroupSpec]:
    """The groups of torchvision's references: parameters of norms last, each group with its own weight decay."""
    classes = (GatedModule, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    norms = [module for module in unwrap(model).modules() if isinstance(module, classes)]
    own_parameters = {parameter for module in norms for parameter in module.parameters(recurse=False)}
    parts = _split(members, lambda _, parameter: parameter not in own_parameters, order=(True, False))
    return [part._replace(decays=None) for part in parts]


_PARAM_ORDERS: Mapping[str, Callable[[nn.Module, NamedParameters], list[ParamGroupSpec]]] = {
    "model.parameters()": lambda _, members: [ParamGroupSpec(list(members.values()), None)],
    "timm's factory": timm_param_groups,
    "decayed, then 1-D": lambda _, members: _split(members, lambda __, p: p.ndim > 1, order=(True, False)),
    "all others, then norms": _norms_last,
}


# --- param_groups -----------------------------------------------------------------------------------------------------


def param_groups(
    model: nn.Module,
    *,
    like: Any = None,
    lr: float | None = None,
    weight_decay: float = 0.0,
    importance_lr: float | None = None,
) -> list[Group]:
    """Return parameter groups for an optimizer, with the gates in a last group that has no weight decay.

    Without `like` the groups are those of timm: first 1-D parameters, biases and those that `model.no_weight_decay()`
    names, without weight decay, then the rest; a single group if `weight_decay` is 0. Frozen parameters are left out.

    With `like` the old groups keep their order and options, but lose their gates; a group that contains only gates is
    dropped. An existing optimizer then needs `add_param_group(groups[-1])` only; a new one takes over its state with
    `load_state_dict`.

    Args:
        model: a converted model, wrapped or not. Without trainable gates there is no group of gates.
        like: an optimizer of this model, or its `param_groups`, with or without gates; or the state dict of an
            optimizer, or the `param_groups` in it, in which parameters are numbers: these are resolved by
            `param_names`, or else by the orders that torch, timm and torchvision use.
        lr: the learning rate of all groups; default: the optimizer's own. Not with `like`.
        weight_decay: the weight decay of the groups that have it. Not with `like`.
        importance_lr: the learning rate of the gates before any schedule. Default: the rate that they have in `like`,
            else 100 times that of the last other group, at most 1.5 / sites and 0.1; without any rate, the optimizer's
            own. If a scheduler has set `initial_lr`, the present rate of the gates is scaled like that of the last old
            group.

    Returns:
        The groups, each with `params` and its options; the group of the gates has the option `gates=True`.

    Raises:
        ArgumentError: `model` is not a module.
        OptimizerError: a rate is negative or not finite; a trainable parameter is in no group; `like` is of another
            type, has parameters of another model, or numbers in an unknown order.

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
        raise OptimizerError("like= keeps the lr and weight_decay of the old groups: remove lr and weight_decay")
    groups = _old_groups(model, like)
    check_same_model(model, groups)
    kept, template = _without_gates(model, groups)
    check_complete(model, kept)
    gates = _collect_gates(model, groups)
    if not gates:
        return kept
    added = {**gate_options(template, gates=len(gates), importance_lr=importance_lr), "params": list(gates.values())}
    if "param_names" in template:
        names = match_parameter_names(model, [name for group in groups for name in group["param_names"]])
        added["param_names"] = [names.stored_key(name) for name in gates]
    return [*kept, added]


def _new_groups(model: nn.Module, lr: float | None, weight_decay: float, importance_lr: float | None) -> list[Group]:
    members = {name: parameter for name, parameter in non_gate_parameters(model).items() if parameter.requires_grad}
    rate = {} if lr is None else {"lr": lr}
    parts = (
        timm_param_groups(model, members) if weight_decay else [ParamGroupSpec(list(members.values()), decays=False)]
    )
    groups: list[Group] = [
        {"params": part.parameters, "weight_decay": weight_decay if part.decays else 0.0, **rate}
        for part in parts
        if part.parameters
    ]
    if gates := trainable_gates(model):
        groups.append(
            {"params": list(gates.values()), **gate_options(rate, gates=len(gates), importance_lr=importance_lr)}
        )
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
            f"like: expected an optimizer, its param_groups or its state dict, got {kind}: pass like=optimizer"
        )
    groups = [_copy_group(group) for group in found]
    if not all(isinstance(key, Tensor) for group in groups for key in group["params"]):
        parameters = resolve_parameters(model, groups, state if isinstance(state, Mapping) else {})
        groups = [{**group, "params": params} for group, params in zip(groups, parameters, strict=True)]
    return groups


def _is_group(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("params"), Iterable)


def _copy_group(group: Mapping[str, Any]) -> Group:
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    options = {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
    if params and all(isinstance(item, tuple) and len(item) == 2 for item in params):
        options["param_names"], params = [name for name, _ in params], [parameter for _, parameter in params]
    return {**options, "params": params}


def check_same_model(model: nn.Module, groups: Iterable[Group], *, argument: str = "like") -> None:
    """Raise OptimizerError if groups have parameters of another model; `argument` names them in the message."""
    own = {p for entry in walk_modules(unwrap(model)) for p in entry.module._parameters.values()}
    foreign = [p for group in groups for p in group["params"] if p not in own]
    if foreign:
        shapes = ", ".join("x".join(map(str, p.shape)) or "scalar" for p in foreign[:_MAX_LISTED])
        raise OptimizerError(
            f"{argument}: {len(foreign)} of its parameters are not the model's ({shapes}): build the optimizer from "
            "the converted model, or convert with inplace=True, or pass like=optimizer.state_dict()"
        )


def _without_gates(model: nn.Module, groups: list[Group]) -> tuple[list[Group], Group]:
    """The groups without gates, and the group whose options the gates get: their own one, or else the last."""
    gates = set(gate_parameters(model).values())
    kept, template = [], None
    for group in groups:
        keep_mask = [parameter not in gates for parameter in group["params"]]
        if keep_mask and not any(keep_mask):
            template = {**group, GATE_GROUP: True}  # so that the gates keep their rate
            continue
        lists = {name: group[name] for name in ("params", "param_names") if name in group}
        kept.append(
            group | {name: [v for v, keep in zip(x, keep_mask, strict=True) if keep] for name, x in lists.items()}
        )
    return kept, template or kept[-1]


def check_complete(model: nn.Module, groups: Iterable[Group], *, argument: str = "like") -> None:
    """Raise OptimizerError if a trainable parameter is in no group; `argument` names the groups in the message."""
    grouped = {parameter for group in groups for parameter in group["params"]}
    ungrouped = [name for name, p in non_gate_parameters(model).items() if p.requires_grad and p not in grouped]
    if ungrouped:
        more = f", +{len(ungrouped) - _MAX_LISTED} more" if len(ungrouped) > _MAX_LISTED else ""
        raise OptimizerError(
            f"{argument}: {len(ungrouped)} trainable parameters are in no group "
            f"({', '.join(ungrouped[:_MAX_LISTED])}{more}): add them, or freeze them with requires_grad_(False)"
        )


def _collect_gates(model: nn.Module, groups: Iterable[Group]) -> NamedParameters:
    """The trainable gates; also gates of unregistered modules if the groups have them."""
    gates = trainable_gates(model)
    grouped = {parameter for group in groups for parameter in group["params"]}
    unregistered = grouped - set(gates.values())
    return gates | {n: p for n, p in gate_parameters(model).items() if p in unregistered and p.requires_grad}


# --- exempt_gates -----------------------------------------------------------------------------------------------------


def exempt_gates(
    model: nn.Module, optimizer: Optimizer, *, affine: bool = False, importance_lr: float | None = None
) -> Optimizer:
    """Remove weight decay from the gates of a converted model, in place, in an existing optimizer.

    All gates, also those in no group, are moved to a last group without weight decay. All other options and the state
    stay. Build schedulers afterwards, since they count the groups. In a fastai optimizer the gates get the mark that
    fastai sets on parameters of norms.

    Args:
        model: a converted model, wrapped or not.
        optimizer: an optimizer of this model: of torch, perhaps wrapped by accelerate, Lightning or timm's Lookahead,
            or of fastai.
        affine: also remove weight decay from `weight` and `bias` of SN layers, as many libraries do for BN.
        importance_lr: the learning rate of the gates, as in `normswap.param_groups`.

    Returns:
        The same optimizer.

    Raises:
        OptimizerError: `optimizer` is not an optimizer, belongs to another model, or lacks trainable parameters.

    Examples:
        >>> import torch, normswap
        >>> model = normswap.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))).model
        >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)  # as another library builds it
        >>> optimizer = normswap.exempt_gates(model, optimizer, affine=True)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(2, 0.05), (2, 0.0), (2, 0.0)]
    """
    exempt = _affine_parameters(model) if affine else set()
    if _is_fastai(optimizer):
        _exempt_fastai(optimizer, exempt | {*trainable_gates(model).values()}, importance_lr)
        return optimizer
    inner = unwrap_optimizer(optimizer)
    regrouped = param_groups(model, like=inner, importance_lr=importance_lr)
    added = [
        _select_parameters(group, exempt) | {"weight_decay": 0.0}
        for group in inner.param_groups
        if group.get("weight_decay") and not exempt.isdisjoint(group["params"])
    ]
    added += regrouped[-1:] if regrouped[-1].get(GATE_GROUP) is True else []
    moved = {parameter for group in added for parameter in group["params"]}
    for group in list(inner.param_groups):
        if not moved.isdisjoint(group["params"]):
            group |= _select_parameters(group, {*group["params"]} - moved)
            if not group["params"]:
                inner.param_groups.remove(group)
    for group in added:
        inner.add_param_group(group)
    return optimizer


def _affine_parameters(model: nn.Module) -> set[nn.Parameter]:
    layers = gated_modules(model).values()
    found = [layer._parameters.get(name) for layer in layers for name in ("weight", "bias")]
    return {parameter for parameter in found if parameter is not None}


def _select_parameters(group: Group, parameters: AbstractSet[nn.Parameter]) -> Group:
    """A group with all options, but only these of its parameters."""
    keep_mask = [parameter in parameters for parameter in group["params"]]
    lists = {name: group[name] for name in ("params", "param_names") if name in group}
    options = {name: copy.deepcopy(value) for name, value in group.items() if name not in lists}
    return options | {
        name: [value for value, keep in zip(values, keep_mask, strict=True) if keep] for name, values in lists.items()
    }


def _is_fastai(optimizer: object) -> bool:
    return all(hasattr(optimizer, name) for name in ("hypers", "param_lists", "state"))


def _exempt_fastai(optimizer: Any, parameters: AbstractSet[nn.Parameter], importance_lr: float | None) -> None:
    """Set fastai's own mark for a parameter without weight decay."""
    own = {parameter for group in optimizer.param_lists for parameter in group}
    if importance_lr is not None:
        raise OptimizerError("importance_lr: fastai has one learning rate per group of layers: remove importance_lr")
    if not parameters <= own:
        raise OptimizerError(
            f"optimizer: lacks {len(parameters - own)} parameters of the model's gates and norms: build it from the "
            "converted model with learn.create_opt()"
        )
    for parameter in parameters:
        optimizer.state[parameter]["do_wd"] = False
