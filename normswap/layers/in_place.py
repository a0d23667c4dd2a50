"""Conversion of a norm module to a Switchable Normalization layer in place, and back.

The module object stays: its class changes and its `__dict__` gets a few entries, so that aliases, lists, closures,
hooks, flags, buffers and `Parameter` objects stay valid. The caller chooses the module, the class and the branches.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from normswap.errors import LayerError, SwapError
from normswap.layers.functional import new_site_name
from normswap.layers.gating import BnStatistics, Branch, Gate, check_num_groups, initial_point
from normswap.layers.matching import MATCHING_BUFFERS, Matching, identity_matching, match_statistics

# Where a layer starts that has no `bn` branch: all weight on `ln` of one group or of several, or equal weights.
Start = Literal["ln", "gn", "uniform"]
GATE_PARAMETERS = ("mean_weight", "var_weight")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# Attribute of a layer with frozen statistics: its previous `bn_statistics`, unless that was "batch".
STATISTICS_BEFORE_FREEZE = "unfrozen_statistics"
# Attribute of a layer whose buffers are frozen parameters: the names of its buffers, in their order.
FROZEN_BUFFERS = "frozen_buffers"


@dataclass(frozen=True)
class Replaced:
    """The norm that a layer was before its conversion.

    Attributes:
        class_name: its class, as `module.QualName`.
        added: names of the attributes that the conversion set.
        displaced: previous values of these attributes.
        created: names of the buffers that the conversion created, each with whether it was registered as None before.
        dropped: names of the statistics that the conversion removed; a layer without them cannot be reverted.
    """

    class_name: str
    added: tuple[str, ...]
    displaced: dict[str, Any] = field(default_factory=dict)
    created: tuple[tuple[str, bool], ...] = ()
    dropped: tuple[str, ...] = ()


def has_frozen_affine(module: nn.Module) -> bool:
    """Return whether the weight of a norm is a buffer, as in torchvision's FrozenBatchNorm2d, and cannot be trained."""
    return "weight" in module._buffers or "weight" in vars(module).get(FROZEN_BUFFERS, ())


def qualified_name(cls: type) -> str:
    """Return `module.QualName` of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


# For each branch: the norm that it computes, as named in messages, and the tensors that this norm has (or has as None).
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
    """Check that `target`, which runs the child modules `children`, can compute the function of a norm.

    Args:
        module: the norm.
        target: the class of the layer that replaces it.
        children: names of the child modules that `target` runs.
        vertex, eps: as in `convert_module`.

    Raises:
        LayerError: `module` is not the norm that `vertex` computes (for `bn` a BatchNorm or a frozen BatchNorm), is a
            lazy module that has not run, or has other child modules.
    """
    kind = type(module).__name__
    tensors = module._parameters | module._buffers
    expected, names = _EXPECTED[vertex]
    if not {*GATE_PARAMETERS}.isdisjoint(tensors):
        raise LayerError(f"expected {expected} module, got {kind}, which already is a SwitchNorm layer")
    if (
        (eps is None and not hasattr(module, "eps"))
        or not names <= {*tensors}
        or isinstance(module, nn.modules.instancenorm._InstanceNorm) != (vertex == "in")
    ):
        raise LayerError(f"expected {expected} module, got {kind}")
    if any(isinstance(tensor, torch.Tensor) and is_lazy(tensor) for tensor in tensors.values()):
        raise LayerError(
            f"expected a module with initialized tensors, got an uninitialized {kind}: run one batch through it first"
        )
    if children != {*module._modules}:
        then = tuple(module._modules)
        entry = f'norms=KNOWN_NORMS | {{"{qualified_name(type(module))}": partial(read_norm_act, then={then})}}'
        use = f"pass {entry}" if then else "use a SwitchNorm class without them"
        raise LayerError(
            f"{target.__name__} runs the child modules {sorted(children)}, but {kind} has {sorted(then)}: "
            f"{use}{', with the modules in the order in which its forward runs them after the norm' * bool(then)}"
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
    matched: bool = False,
    num_groups: int = 1,
    start: Start | None = None,
) -> None:
    """Turn `module`, a norm, into an instance of `target`; with a simplex gate it computes the same function.

    A norm other than BatchNorm that gets a `bn` branch gets running statistics: mean 0, variance 1, then the average of
    all batches.

    Args:
        module: a BatchNorm, or a frozen BatchNorm, whose tensors (C,) are buffers with torch's names; for another
            `vertex` an InstanceNorm without running statistics or a GroupNorm with one group.
        target: the SwitchNorm class.
        gate, branches, bn_statistics: options of the layer.
        train_gates: the gate parameters require a gradient.
        vertex: the branch that computes the norm; a simplex gate starts there.
        synchronize: the layer uses the batch of all processes, or of the process group of `module` if it has one.
        eps: for a class without the attribute eps, because its forward has a constant.
        then: names of the modules that the forward of `module` runs after the norm, in order; (): those of `target`.
        like: gives dtype and device if `module` has no tensors.
        fqn: name of `module` in the model, for warnings.
        matched: match the branches `ln` and `in` to the running statistics of `module`; without usable statistics the
            constants are the identity.
        num_groups: number of groups of the `ln` branch; a GroupNorm keeps its own.
        start: the layer has no `bn` branch and drops the running statistics; it starts at `ln`, or with equal weights.
            It computes another function.

    Raises:
        LayerError: `num_groups` does not divide the number of channels, or `start` leaves no branch.
    """
    own = (getattr(module, name, None) for name in ("weight", "running_mean", "bias"))
    tensors = [tensor for tensor in own if isinstance(tensor, torch.Tensor)]
    like = tensors[0] if tensors else torch.empty(0) if like is None else like
    channels: Any = tensors[0].shape[0] if tensors else getattr(module, "num_channels", None)
    if start is not None:
        branches = tuple(branch for branch in branches if branch != "bn")
        vertex = vertex if start == "uniform" else "ln"
        if not branches:
            raise LayerError(f"branches: expected `in` or `ln` among them for start={start!r}, got ('bn',)")
    if vertex == "ln" and start is None:
        num_groups = module.__dict__.get("num_groups", num_groups)
    num_groups = check_num_groups(num_groups, channels)
    gates = {
        name: nn.Parameter(
            initial_point(gate, branches, vertex=None if start == "uniform" else vertex).to(like),
            requires_grad=train_gates,
        )
        for name in GATE_PARAMETERS
    }
    settings: dict[str, Any] = {
        "gate": gate,
        "branches": branches,
        "bn_statistics": bn_statistics,
        "vertex": vertex,
        "num_groups": num_groups,
        "synchronize": synchronize,
        "site": new_site_name(fqn or f"a {target.__name__} of {channels} channels"),
    }
    defaults = {"num_features": channels, "momentum": 0.0, "affine": True, "track_running_stats": "bn" in branches}
    if then:
        settings["then"] = then
    if not synchronize or "process_group" not in module.__dict__:
        settings["process_group"] = None
    settings |= {name: value for name, value in defaults.items() if value is not None and name not in module.__dict__}
    settings["normalising_eps"] = getattr(module, "eps", eps)  # the property `eps` of the layer reads it
    statistics: dict[str, torch.Tensor] = {}
    if vertex != "bn" and "bn" in branches:
        settings |= {"momentum": None, "track_running_stats": True}
        statistics = _initial_running_stats(module.__dict__.get("num_features", channels), like)
    constants = Matching()
    if matched:
        constants = _matching_of(module, settings["normalising_eps"], num_groups, channels, like)
    dropped = tuple(name for name in STATISTICS if start is not None and module._buffers.get(name) is not None)
    if dropped:
        settings["track_running_stats"] = False
    buffers: dict[str, torch.Tensor | None] = {
        **statistics,
        **{
            name: constant if branch in branches else None
            for (name, branch), constant in zip(MATCHING_BUFFERS.items(), constants, strict=True)
        },
    }
    settings |= {name: None for name in STATISTICS if name not in module._buffers | statistics}
    displaced = {name: module.__dict__[name] for name in (*settings, "replaced") if name in module.__dict__}
    created = tuple((name, name in module._buffers) for name in buffers)
    settings["replaced"] = Replaced(qualified_name(type(module)), tuple(settings), displaced, created, dropped)

    module.__class__ = target
    module.__dict__.update(settings)
    module._parameters.update(gates)
    module._buffers.update(buffers)
    module._buffers.update(dict.fromkeys(dropped))


def _initial_running_stats(channels: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the running statistics of a new BatchNorm."""
    mean = torch.zeros(channels, dtype=like.dtype, device=like.device)
    count = torch.tensor(0, dtype=torch.long, device=like.device)
    return dict(zip(STATISTICS, (mean, torch.ones_like(mean), count), strict=True))


def _matching_of(module: nn.Module, eps: float, num_groups: int, channels: int, like: torch.Tensor) -> Matching:
    mean, var = (module._buffers.get(name) for name in ("running_mean", "running_var"))
    if mean is None or var is None:
        return identity_matching(like, module.__dict__.get("num_features", channels))
    return match_statistics(mean, var, eps, num_groups)


def original_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class that `layer` had before its conversion. This imports no module.

    Raises:
        SwapError: the layer was not converted, or the module of its old class is not imported.
    """
    replaced = layer.__dict__.get("replaced")
    if not isinstance(replaced, Replaced):
        raise SwapError(
            f"expected a layer made by normswap.convert, got a {type(layer).__name__} that replaced no norm"
        )
    path = replaced.class_name.split(".")
    for cut in range(len(path) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(path[:cut]))
        for name in path[cut:]:
            found = getattr(found, name, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    raise SwapError(
        f"cannot put back {replaced.class_name}, whose module is not imported: import it, then revert again"
    )


def revert_module(layer: nn.Module) -> None:
    """Undo `convert_module`: restore the class and the attributes, keep the current tensors and eps.

    Raises:
        SwapError: as `original_class`; or the layer has no `bn` branch and dropped the statistics of its old norm.
    """
    cls = original_class(layer)
    restore_buffers(layer)
    if layer.__dict__["replaced"].dropped:
        raise SwapError(
            f"cannot put back {cls.__name__}: the layer started without `bn` and has no running statistics. Load the "
            "original model instead, or bake the layers"
        )
    eps = layer.normalising_eps
    replaced: Replaced = layer.__dict__.pop("replaced")
    for name in replaced.added:
        if name not in replaced.displaced:  # `update` below keeps the order of the others
            layer.__dict__.pop(name, None)
    layer.__dict__.pop(STATISTICS_BEFORE_FREEZE, None)
    layer.__dict__.update(replaced.displaced)
    if "eps" in layer.__dict__:
        layer.__dict__["eps"] = eps  # the layer's eps can be another one by now
    for name in GATE_PARAMETERS:
        layer._parameters.pop(name)
    for name, registered in replaced.created:
        layer._buffers[name] = None
        if not registered:
            del layer._buffers[name]
    layer.__class__ = cls


def freeze_buffers(layer: nn.Module) -> bool:
    """Turn the buffers of a layer into frozen parameters with the same names, for libraries that refuse buffers.

    A buffer of integers, which `torch.func.grad` refuses among parameters, becomes an attribute; the layer stores it in
    its state dict.

    Returns:
        Whether the layer had a buffer.
    """
    buffers = layer._buffers
    names, found = (*buffers,), {name: buffer for name, buffer in buffers.items() if buffer is not None}
    for name, buffer in found.items():
        del buffers[name]
        if buffer.is_floating_point():
            layer._parameters[name] = nn.Parameter(buffer, requires_grad=False)
        else:
            vars(layer)[name] = buffer
    if found:
        vars(layer)[FROZEN_BUFFERS] = names
    return bool(found)


def restore_buffers(layer: nn.Module) -> bool:
    """Undo `freeze_buffers`; return whether there was something to undo."""
    names = vars(layer).pop(FROZEN_BUFFERS, None)
    if names is None:
        return False
    parameters = {name: layer._parameters.pop(name).detach() for name in names if name in layer._parameters}  # type: ignore[union-attr]
    device = next((each.device for each in parameters.values()), None)
    integers = {name: vars(layer).pop(name).to(device) for name in names if name in vars(layer)}
    found = {**layer._buffers, **parameters, **integers}
    layer._buffers.clear()
    layer._buffers.update({name: found[name] for name in names})
    return True


def has_frozen_buffers(module: nn.Module) -> bool:
    """Return whether `freeze_buffers` changed the module."""
    return FROZEN_BUFFERS in vars(module)


def shallow_copy(module: nn.Module) -> nn.Module:
    """Return a second module with the same tensors and children, and registries of its own."""
    module_copy: nn.Module = module.__new__(type(module))
    module_copy.__dict__ = {k: v.copy() if isinstance(v, dict | set) else v for k, v in module.__dict__.items()}
    return module_copy
