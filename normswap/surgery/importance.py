"""The gates of a converted model: its gated layers, their parameters and importance weights, and batch dependence.

Batch dependence, the sum of the importance weights of `bn`, can be added to a loss as a penalty.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.errors import PlanError
from normswap.layers.gated_module import GatedModule
from normswap.layers.gating import BRANCHES, Gate
from normswap.layers.gating import importance_weights as weights_of_points
from normswap.layers.in_place import GATE_PARAMETERS
from normswap.layers.switch_norm import SwitchNorm
from normswap.schema import nearest
from normswap.surgery.arguments import require_type
from normswap.surgery.module_tree import walk_modules
from normswap.surgery.wrappers import unwrap
from normswap.text import join_fqn, pluralize, printable_as

# The logit of a branch with a weight of 0: its exponential is 0 in every dtype, and float16 can store it.
_EXCLUDED_LOGIT = -1e4
_SUM_TOLERANCE = 1e-3


class SiteWeights(NamedTuple):
    """The importance weights of one site by branch, for means and for variances."""

    mean: dict[str, float]
    var: dict[str, float]


def decided_branch(weights: SiteWeights, tolerance: float) -> str | None:
    """Return the branch whose importance is at least 1 - tolerance for means and for variances; None for a mix."""
    return next(
        (branch for branch in BRANCHES if all(side.get(branch, 0.0) >= 1 - tolerance for side in weights)), None
    )


@printable_as("importance")
class SiteImportance(dict[str, SiteWeights]):
    """The importance weights of each site by fqn: a dict that `print` shows as a table."""

    def __repr__(self) -> str:
        return f"SiteImportance({pluralize(len(self), 'site')})"


def gated_modules(model: nn.Module) -> dict[str, GatedModule]:
    """Return every layer with gates by its first name."""
    entries = walk_modules(unwrap(model))
    return {entry.names[0]: entry.module for entry in entries if isinstance(entry.module, GatedModule)}


def gate_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of all gates by name, also those of modules that are in no registry."""
    return {
        join_fqn(name, gate): parameter
        for name, layer in gated_modules(model).items()
        for gate in GATE_PARAMETERS
        if (parameter := layer._parameters.get(gate)) is not None
    }


def trainable_gates(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the gate parameters that require a gradient, by name.

    Args:
        model: a converted model, with or without wrappers.

    Returns:
        A dict in the order of `named_parameters()` of the model inside its wrappers.

    Raises:
        ArgumentError: `model` is not a module.

    Examples:
        >>> import torch, normswap
        >>> model = normswap.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))).model
        >>> [*normswap.trainable_gates(model)]
        ['1.mean_weight', '1.var_weight']
    """
    gates = set(gate_parameters(model).values())
    named = unwrap(model).named_parameters()
    return {name: parameter for name, parameter in named if parameter in gates and parameter.requires_grad}


def importance_weights(model: nn.Module) -> SiteImportance:
    """Return the importance weights of every site, by branch, for means and for variances (paper, section 3.1).

    Args:
        model: a converted model, with or without wrappers; for any other model the result is empty.

    Returns:
        A dict by fqn; `weights["layer1.0.bn1"].mean["bn"]` is a number from 0 to 1, and the branches of one site sum to
        1. `print(weights)` shows a table.

    Raises:
        ArgumentError: `model` is not a module.

    Examples:
        >>> import torch, normswap
        >>> model = normswap.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))).model
        >>> normswap.importance_weights(model)["1"].mean
        {'in': 0.0, 'ln': 0.0, 'bn': 1.0}
    """
    result = SiteImportance()
    for name, layer in gated_modules(model).items():
        mean, var = (dict(zip(layer.branches, w.tolist(), strict=True)) for w in layer.importance_weights())
        result[name] = SiteWeights(mean, var)
    return result


def set_importance(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Set the importance weights of some sites, in place; nothing is changed if one value is wrong.

    With one branch per site, those sites compute that norm alone, as `analyze` measures it. A softmax gate gets the
    logarithm of the weights, and a large negative logit for a weight of 0, so that it is exact.

    Args:
        model: a converted model, with or without wrappers.
        weights: by fqn a branch, such as `"ln"`, which gets all weight; or weights by branch, non-negative with sum 1,
            for means and variances alike; or a pair of these, as `importance_weights` returns.

    Raises:
        PlanError: a name is not that of a site, or a value does not fit its branches.
        ArgumentError: `model` is not a module.

    Examples:
        >>> import torch, normswap
        >>> model = normswap.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))).model
        >>> normswap.set_importance(model, {"1": {"ln": 0.25, "bn": 0.75}})
        >>> normswap.importance_weights(model)["1"].var
        {'in': 0.0, 'ln': 0.25, 'bn': 0.75}
        >>> normswap.set_importance(model, {"1": "bn"})
        >>> normswap.importance_weights(model)["1"].mean
        {'in': 0.0, 'ln': 0.0, 'bn': 1.0}
    """
    require_type(weights, Mapping, "weights", "a dict such as {'layer1.0.bn1': 'ln'}")
    layers = gated_modules(model)
    for name in weights:
        if name not in layers:
            near = nearest(name, layers)
            hint = (
                f"did you mean {near!r}?" if near else f"the first of {pluralize(len(layers), 'site')}: {[*layers][:3]}"
            )
            raise PlanError(f"weights: {name!r} is not a site of the model; {hint}")
    points = {name: _read_points(name, layers[name], value) for name, value in weights.items()}
    with torch.no_grad():
        for name, pair in points.items():
            for gate, point in zip(GATE_PARAMETERS, pair, strict=True):
                parameter: Tensor = getattr(layers[name], gate)
                parameter.copy_(gate_point(point, layers[name].gate))


def gate_point(weights: Tensor, gate: Gate) -> Tensor:
    """Return the gate parameter (K,) of importance weights (K,)."""
    return weights.log().clamp_min(_EXCLUDED_LOGIT) if gate == "softmax" else weights


def _read_points(name: str, layer: GatedModule, value: Any) -> tuple[Tensor, Tensor]:
    """The importance weights of means and variances that a value of `set_importance` describes."""
    mean, var = value if isinstance(value, tuple) and len(value) == 2 else (value, value)
    return _read_weights(name, layer, mean), _read_weights(name, layer, var)


def _read_weights(name: str, layer: GatedModule, value: Any) -> Tensor:
    by_branch = {value: 1.0} if isinstance(value, str) else value
    is_valid = isinstance(by_branch, Mapping) and by_branch.keys() <= {*layer.branches}
    if is_valid:
        numbers = [by_branch.get(branch, 0.0) for branch in layer.branches]
        is_valid = all(isinstance(number, int | float) and number >= 0 for number in numbers)
        is_valid = is_valid and abs(sum(numbers) - 1) <= _SUM_TOLERANCE
    if not is_valid:
        raise PlanError(
            f"weights[{name!r}]: expected one of {layer.branches}, or weights of these with sum 1, got {value!r:.80}"
        )
    return torch.tensor(numbers)


def sites_with_changed_weights(model: nn.Module) -> list[str]:
    """Return the sites whose importance weights differ from weight 1 at the branch of the old norm."""
    return [name for name, layer in gated_modules(model).items() if not layer.is_at(layer.vertex)]


def batch_dependence(model: nn.Module) -> Tensor:
    """Return the importance weights of `bn`, for means and variances, summed over the sites that use batch statistics.

    Add it to a loss with a small factor as a penalty. Its gradient flows to the gate parameters only. A site counts if
    its `bn` branch depends on the batch: not with `bn_statistics="running"`, the default of a conversion, but with
    `"batch"` and `"renorm"`. A module that is used twice counts once. Sites with the same kind of gate are computed
    together, without synchronization of the device.

    Args:
        model: a model with or without wrappers.

    Returns:
        A scalar in float32 or wider, from 0 to twice the number of sites. If no site counts, it is 0 without a
        gradient, so one training script works before and after a conversion.

    Raises:
        ArgumentError: `model` is not a module.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> model = normswap.convert(model, bn_statistics="batch").model
        >>> loss = model(torch.randn(2, 3, 8, 8)).square().mean() + 0.03 * normswap.batch_dependence(model)
        >>> normswap.batch_dependence(model).item()
        2.0
    """
    sites = [site for site in gated_modules(model).values() if "bn" in site.branches and _uses_batch_statistics(site)]
    return _sum_totals(model, [_sum_bn_importance(group) for group in _group_sites(sites)])


def gate_impurity(model: nn.Module) -> Tensor:
    """Return the Gini impurity of the importance weights, 1 - sum of squares, summed over sites, means and variances.

    Add it to a loss with a small factor, such as 0.1, in the second half of a run: gates then move to a single branch.
    From the first step it would keep all gates where they start. Only gates that are trained count.

    Args:
        model: a converted model, with or without wrappers; for any other model the result is 0.

    Returns:
        A scalar in float32 or wider, 0 if every site has all weight on one branch. Its gradient flows to the gate
        parameters only.

    Raises:
        ArgumentError: `model` is not a module.

    Examples:
        >>> import torch, normswap
        >>> model = normswap.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))).model
        >>> normswap.gate_impurity(model).item()
        0.0
        >>> normswap.set_importance(model, {"1": {"ln": 0.5, "bn": 0.5}})
        >>> normswap.gate_impurity(model).item()
        1.0
    """
    sites = [site for site in gated_modules(model).values() if all(gate.requires_grad for gate in _gates(site))]
    totals = [2 * len(group) - _weights_of_group(group).square().sum() for group in _group_sites(sites)]
    return _sum_totals(model, totals)


def _gates(site: GatedModule) -> list[Tensor]:
    return [getattr(site, name) for name in GATE_PARAMETERS]


def _sum_totals(model: nn.Module, totals: list[Tensor]) -> Tensor:
    if not totals:
        return torch.zeros((), device=next((p.device for p in unwrap(model).parameters()), None))
    return sum((total.to(totals[0].device) for total in totals[1:]), start=totals[0])


def _uses_batch_statistics(site: GatedModule) -> bool:
    has_no_running_stats = isinstance(site, SwitchNorm) and site.running_mean is None
    return site.bn_statistics != "running" or has_no_running_stats


def _group_sites(sites: Iterable[GatedModule]) -> list[list[GatedModule]]:
    """Group the sites whose gate parameters can be stacked: same gate, branches, dtype and device."""
    groups = defaultdict(list)
    for site in sites:
        point = site.mean_weight
        groups[site.gate, site.branches, point.dtype, point.device].append(site)
    return list(groups.values())


def _weights_of_group(sites: list[GatedModule]) -> Tensor:
    """The importance weights (2 len(sites), K) of the sites of one group, for means and variances."""
    points = torch.stack([gate for site in sites for gate in _gates(site)])
    return weights_of_points(points, sites[0].gate)


def _sum_bn_importance(sites: list[GatedModule]) -> Tensor:
    return _weights_of_group(sites)[:, sites[0].branches.index("bn")].sum()
