"""Turning a norm module into a Switchable Normalization layer in place, and back.

The module object stays: its class changes and a few entries join its `__dict__`, so every alias, Python list,
closure, hook, flag, buffer and `Parameter` object that pointed at it still does. This room decides nothing: which
module, which class and which branches come from the caller.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from normswap.errors import LayerError, SwapError
from normswap.layers.functional import new_site_name
from normswap.layers.gating import BnStatistics, Branch, Gate, initial_point

GATE_PARAMETERS = ("mean_weight", "var_weight")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# Where a layer whose statistics are frozen keeps what its `bn` branch used before, if not those of the batch.
STATISTICS_BEFORE_FREEZE = "unfrozen_statistics"


@dataclass(frozen=True)
class Replaced:
    """What a layer was before: its class by name, the attributes that adoption set, and what these names held.

    `created` names the buffers that adoption made, each with whether the registry held the name (and None) before.
    """

    class_name: str
    added: tuple[str, ...]
    displaced: dict[str, Any] = field(default_factory=dict)
    created: tuple[tuple[str, bool], ...] = ()


def qualified_name(cls: type) -> str:
    """Return `module.QualName` of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


# By the branch that computes a norm: what to call the norm, and the tensors that it must have a name for.
_EXPECTED: Mapping[Branch, tuple[str, frozenset[str]]] = {
    "in": ("an InstanceNorm", frozenset({"weight", "bias"})),
    "ln": ("a GroupNorm", frozenset({"weight", "bias"})),
    "bn": ("a BatchNorm", frozenset({"weight", "bias", "running_mean", "running_var"})),
}


def check_replaceable(
    module: nn.Module,
    target: type[nn.Module],
    children: frozenset[str],
    *,
    vertex: Branch = "bn",
    eps: float | None = None,
) -> None:
    """Refuse a module whose function `target`, which runs just these `children`, would not compute.

    Args:
        vertex, eps: as in `adopt`.

    Raises:
        LayerError: `module` is not the norm that `vertex` computes (for `bn` a BatchNorm or a frozen form of it), is
            a lazy one that has not run, or has other child modules than `target` runs.
    """
    kind = type(module).__name__
    tensors = module._parameters | module._buffers
    expected, names = _EXPECTED[vertex]
    if not {*GATE_PARAMETERS}.isdisjoint(tensors):
        raise LayerError(f"expected {expected} module, got {kind}, which is a SwitchNorm layer already")
    if (
        (eps is None and not hasattr(module, "eps"))
        or not names <= {*tensors}
        or isinstance(module, nn.modules.instancenorm._InstanceNorm) != (vertex == "in")
    ):
        raise LayerError(f"expected {expected} module, got {kind}")
    if any(isinstance(tensor, torch.Tensor) and is_lazy(tensor) for tensor in tensors.values()):
        raise LayerError(
            f"expected tensors of known size, got {kind} that has seen no input: run one batch through it first"
        )
    if children != {*module._modules}:
        then = tuple(module._modules)
        entry = f'norms=KNOWN_NORMS | {{"{qualified_name(type(module))}": partial(read_norm_act, then={then})}}'
        use = f"pass {entry}" if then else "use a SwitchNorm class without them"
        raise LayerError(
            f"{target.__name__} runs the child modules {sorted(children)}, but {kind} has {sorted(then)}: "
            f"{use}{', its modules in the order in which its forward runs them after the norm' * bool(then)}"
        )


def convert_module(
    module: nn.Module,
    target: type[nn.Module],
    *,
    gate: Gate,
    branches: tuple[Branch, ...],
    bn_statistics: BnStatistics,
    train_gates: bool,
    vertex: Branch = "bn",
    synchronize: bool = False,
    eps: float | None = None,
    then: tuple[str, ...] = (),
    like: torch.Tensor | None = None,
    fqn: str = "",
) -> None:
    """Make `module`, a norm, an instance of `target` that computes the same function.

    The gate parameters are created beside the module's own tensors, at `vertex` for `simplex`. A norm that is not BN
    and gets a `bn` branch gets running statistics too: mean 0, variance 1, to be averaged over the batches to come.

    Args:
        module: BatchNorm, or a frozen form of it that keeps (C,) tensors under torch's names as buffers; for another
            `vertex` an InstanceNorm without running statistics or a GroupNorm of one group.
        target: the SwitchNorm class to become.
        train_gates: whether the new gate parameters require a gradient.
        vertex: the branch that computes what `module` computes.
        synchronize: whether the layer takes the batch of all processes; the group of `module`, if it has one, stays.
        eps: of a class that has none as an attribute, since it is a constant in its forward.
        then: the names of the modules that the forward of `module` runs after the norm, in order; () is what `target`
            has by itself.
        like: gives dtype and device where the module has no tensor of its own.
        fqn: its name in the model, for warnings.
    """
    own = (getattr(module, name, None) for name in ("weight", "running_mean", "bias"))
    tensors = [tensor for tensor in own if isinstance(tensor, torch.Tensor)]
    like = tensors[0] if tensors else torch.empty(0) if like is None else like
    channels: Any = tensors[0].shape[0] if tensors else getattr(module, "num_channels", None)
    gates = {
        name: nn.Parameter(initial_point(gate, branches, vertex=vertex).to(like), requires_grad=train_gates)
        for name in GATE_PARAMETERS
    }
    settings: dict[str, Any] = {
        "gate": gate,
        "branches": branches,
        "bn_statistics": bn_statistics,
        "vertex": vertex,
        "synchronize": synchronize,
        "site": new_site_name(fqn or f"a {target.__name__} of {channels} channels"),
    }
    defaults = {"num_features": channels, "eps": eps, "momentum": 0.0, "affine": True}
    defaults |= {"track_running_stats": "bn" in branches}
    if then:
        settings["then"] = then
    if not synchronize or "process_group" not in module.__dict__:
        settings["process_group"] = None
    settings |= {name: value for name, value in defaults.items() if value is not None and name not in module.__dict__}
    settings["normalising_eps"] = module.__dict__.get("eps", eps)
    statistics: dict[str, torch.Tensor] = {}
    if vertex != "bn" and "bn" in branches:
        settings |= {"momentum": None, "track_running_stats": True}
        statistics = _initial_running_stats(module.__dict__.get("num_features", channels), like)
    settings |= {name: None for name in STATISTICS if name not in module._buffers | statistics}
    displaced = {name: module.__dict__[name] for name in (*settings, "replaced") if name in module.__dict__}
    created = tuple((name, name in module._buffers) for name in statistics)
    settings["replaced"] = Replaced(qualified_name(type(module)), tuple(settings), displaced, created)

    module.__class__ = target
    module.__dict__.update(settings)
    module._parameters.update(gates)
    module._buffers.update(statistics)


def _initial_running_stats(channels: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Running statistics before the first batch, as a BatchNorm is born with."""
    mean = torch.zeros(channels, dtype=like.dtype, device=like.device)
    count = torch.tensor(0, dtype=torch.long, device=like.device)
    return dict(zip(STATISTICS, (mean, torch.ones_like(mean), count), strict=True))


def original_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class that `layer` had before it was adopted, from the modules that are imported already.

    Raises:
        SwapError: the layer was built as it is, or its old class is not imported.
    """
    replaced = layer.__dict__.get("replaced")
    if not isinstance(replaced, Replaced):
        raise SwapError(
            f"expected a layer made by normswap.convert, got a {type(layer).__name__} that replaced nothing"
        )
    path = replaced.class_name.split(".")
    for cut in range(len(path) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(path[:cut]))
        for name in path[cut:]:
            found = getattr(found, name, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    raise SwapError(f"cannot put back {replaced.class_name}: import its module first, then revert again")


def revert_module(layer: nn.Module) -> None:
    """Undo `adopt`: the class and the `__dict__` are again what they were, with the tensors as they are now.

    Raises:
        SwapError: as `original_class`.
    """
    cls = original_class(layer)
    replaced: Replaced = layer.__dict__.pop("replaced")
    for name in replaced.added:
        if name not in replaced.displaced:  # those keep their place in the `__dict__`
            layer.__dict__.pop(name, None)
    layer.__dict__.pop(STATISTICS_BEFORE_FREEZE, None)
    layer.__dict__.update(replaced.displaced)
    for name in GATE_PARAMETERS:
        layer._parameters.pop(name)
    for name, registered in replaced.created:
        layer._buffers[name] = None
        if not registered:
            del layer._buffers[name]
    layer.__class__ = cls


def shallow_copy(module: nn.Module) -> nn.Module:
    """Return a second module with the same tensors and children, whose registries can change on their own."""
    module_copy: nn.Module = module.__new__(type(module))
    module_copy.__dict__ = {k: v.copy() if isinstance(v, dict | set) else v for k, v in module.__dict__.items()}
    return module_copy
