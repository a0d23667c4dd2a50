"""Which parameter of a model is meant by a number in an optimizer's state dict.

A state dict numbers parameters by their place in the groups that the optimizer was built from. Names, where it has
them, say which is which; else the orders in which groups are commonly built are tried, and held against the number
and weight decay of the groups and the shapes of the state. What fits none of them, or two, is refused.
"""

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from normswap.checkpoints.optimizer_state import GATE_GROUP, SHAPED
from normswap.checkpoints.prefixes import StoredNames, names_for
from normswap.errors import OptimizerError
from normswap.layers.gates import GatedModule
from normswap.surgery.gated import gate_parameters, trainable_gates
from normswap.surgery.wrapping import unwrap

Named = dict[str, nn.Parameter]
Group = Mapping[str, Any]

_MOST = 3
_OTHERWISE = "pass like=the optimizer that your code builds from the converted model"


class Part(NamedTuple):
    """The parameters of one group, and whether they get weight decay (None: either)."""

    parameters: list[nn.Parameter]
    decays: bool | None


def ordinary_parameters(model: nn.Module) -> Named:
    """Return the parameters that are no gates, by name, in the order of `named_parameters()`."""
    gates = set(gate_parameters(model).values())
    return {name: parameter for name, parameter in unwrap(model).named_parameters() if parameter not in gates}


def timm_parts(model: nn.Module, members: Named) -> list[Part]:
    """Return the parts of `timm.optim.param_groups_weight_decay`: without decay, then with; none is empty."""
    listed: Iterable[str] = getattr(unwrap(model), "no_weight_decay", set)()

    def decays(name: str, parameter: nn.Parameter) -> bool:
        excluded = parameter.ndim <= 1 or name.endswith(".bias")
        return not excluded and not any(fnmatch.fnmatch(name, pattern) for pattern in listed)

    return _split(members, decays, order=(False, True))


def parameters_of(model: nn.Module, groups: Sequence[Group], state: Mapping[Any, Any]) -> list[list[nn.Parameter]]:
    """Return the parameters of each group, which gives them by number or by name.

    Args:
        model: converted; the groups hold its gates in one marked group or not at all.
        groups: the `param_groups` of an optimizer's state dict.
        state: its `state`, or an empty mapping.

    Raises:
        OptimizerError: a name is not the model's, or no known order, or more than one, explains the numbers.
    """
    if all("param_names" in group for group in groups):
        return [_by_name(model, group["param_names"]) for group in groups]
    if all(isinstance(key, str) for group in groups for key in group["params"]):
        return [_by_name(model, group["params"]) for group in groups]
    old = [group for group in groups if group.get(GATE_GROUP) is not True]
    found = _by_layout(model, old, state)
    gates = list(trainable_gates(model).values())
    for group in groups[len(old) :]:
        if group.get(GATE_GROUP) is not True or len(group["params"]) != len(gates):
            raise OptimizerError(
                f"like: its group of gates has {len(group['params'])} parameters, the model has {len(gates)} trainable "
                f"gates: {_OTHERWISE}"
            )
        found.append(gates)
    return found


def names_in(model: nn.Module, stored: Collection[str]) -> StoredNames:
    """Return how names that an optimizer has stored, perhaps of a wrapped model, stand for those of `model`."""
    return names_for(stored, dict(unwrap(model).named_parameters(remove_duplicate=False)))


def _by_name(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    inside = dict(unwrap(model).named_parameters(remove_duplicate=False))
    own = {stored: name for name, stored in names_in(model, names).stored.items()}
    bare = [name if name in inside else own.get(name, name) for name in names]
    unknown = [name for name in bare if name not in inside]
    if unknown:
        raise OptimizerError(
            f"like: {len(unknown)} of its names are not the model's ({', '.join(unknown[:_MOST])}): {_OTHERWISE}"
        )
    return [inside[name] for name in bare]


def _by_layout(model: nn.Module, groups: Sequence[Group], state: Mapping[Any, Any]) -> list[list[nn.Parameter]]:
    every = ordinary_parameters(model)
    training = {name: parameter for name, parameter in every.items() if parameter.requires_grad}
    fitting = {}
    for members in (every, training):
        for parts_of in _LAYOUTS.values():
            parts = parts_of(model, members)
            if _fits(groups, parts, state):
                fitting[tuple(tuple(map(id, part.parameters)) for part in parts)] = parts
    if len(fitting) != 1:
        what = "fit more than one known order" if fitting else f"fit no known order ({', '.join(_LAYOUTS)})"
        sizes = " and ".join(str(len(group["params"])) for group in groups)
        raise OptimizerError(
            f"like: it gives parameters by number, and its groups of {sizes} of the {len(every)} in the model {what}: "
            f"{_OTHERWISE}"
        )
    return [part.parameters for part in fitting.popitem()[1]]


def _fits(groups: Sequence[Group], parts: Sequence[Part], state: Mapping[Any, Any]) -> bool:
    return len(groups) == len(parts) and all(
        len(group["params"]) == len(part.parameters)
        and part.decays in (None, bool(group.get("weight_decay", 0)))
        and all(map(_has_its_shape, map(state.get, group["params"]), part.parameters))
        for group, part in zip(groups, parts, strict=True)
    )


def _has_its_shape(entries: Any, parameter: nn.Parameter) -> bool:
    if not isinstance(entries, Mapping):
        return True
    tensors = [value for name, value in entries.items() if name in SHAPED and isinstance(value, Tensor)]
    return all(tensor.shape == parameter.shape for tensor in tensors if tensor.dim())


def _split(members: Named, decays: Callable[[str, nn.Parameter], bool], *, order: tuple[bool, bool]) -> list[Part]:
    parts = [Part([p for name, p in members.items() if decays(name, p) == which], which) for which in order]
    return [part for part in parts if part.parameters]


def _norms_last(model: nn.Module, members: Named) -> list[Part]:
    """As torchvision's references: all others, then the parameters of norms, each with a decay of its own."""
    classes = (GatedModule, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    norms = [module for module in unwrap(model).modules() if isinstance(module, classes)]
    inside = {parameter for module in norms for parameter in module.parameters(recurse=False)}
    parts = _split(members, lambda _, parameter: parameter not in inside, order=(True, False))
    return [part._replace(decays=None) for part in parts]


_LAYOUTS: Mapping[str, Callable[[nn.Module, Named], list[Part]]] = {
    "model.parameters()": lambda _, members: [Part(list(members.values()), None)],
    "timm's factory": timm_parts,
    "decayed, then 1-D": lambda _, members: _split(members, lambda __, p: p.ndim > 1, order=(True, False)),
    "all others, then norms": _norms_last,
}
