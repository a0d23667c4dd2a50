"""Looking over the gates of a converted model."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from normswap.layers.gated_module import GatedModule
from normswap.layers.gating import importance_weights as weights_of_points
from normswap.layers.in_place import GATE_PARAMETERS
from normswap.layers.switch_norm import SwitchNorm
from normswap.surgery.module_tree import walk_modules
from normswap.surgery.wrappers import unwrap
from normswap.text import join_fqn, pluralize, printable_as

# MERGED DOC: What a model's dependence on its batches can be priced by: the share that its `bn` branches have.


class SiteWeights(NamedTuple):
    """The share of each branch in the means and in the variances of one site."""

    mean: dict[str, float]
    var: dict[str, float]


@printable_as("importance")
class SiteImportance(dict[str, SiteWeights]):
    """Importance weights by the fqn of each site: a dict that prints as a table."""

    def __repr__(self) -> str:
        return f"SiteImportance({pluralize(len(self), 'site')})"


def gated_modules(model: nn.Module) -> dict[str, GatedModule]:
    """Return every module with gates by its first name."""
    entries = walk_modules(unwrap(model))
    return {entry.names[0]: entry.module for entry in entries if isinstance(entry.module, GatedModule)}


def gate_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of all gates by name, also those of modules that no registry knows."""
    return {
        join_fqn(name, gate): parameter
        for name, layer in gated_modules(model).items()
        for gate in GATE_PARAMETERS
        if (parameter := layer._parameters.get(gate)) is not None
    }


def trainable_gates(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the gates that learn by name, in the order of `named_parameters()` of the model inside its wrappers."""
    gates = set(gate_parameters(model).values())
    named = unwrap(model).named_parameters()
    return {name: parameter for name, parameter in named if parameter in gates and parameter.requires_grad}


def importance_weights(model: nn.Module) -> SiteImportance:
    """Return the importance weights of every site by fqn: per branch, for means and for variances.

    Args:
        model: converted, wrapped or not; of another model the result is empty.

    Returns:
        A dict; `weights["layer1.0.bn1"].mean["bn"]` is a number from 0 to 1, and the branches of one site sum to 1.
        `print(weights)` shows a table.

    Raises:
        ArgumentError: `model` is no module.

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


def sites_with_changed_weights(model: nn.Module) -> list[str]:
    """Return the sites whose importance weights have left their vertex, where the layer is the original norm."""
    return [name for name, layer in gated_modules(model).items() if not layer.is_at(layer.vertex)]


def batch_dependence(model: nn.Module) -> Tensor:
    """Return the importance weights of `bn`, those of means and of variances, summed over the sites that read batches.

    To be added to a loss with a small factor, `loss + 0.03 * normswap.batch_dependence(model)`. Its gradient goes to
    the gates by their own rule (for `simplex` the centred one) and to nothing else.

    A site whose `bn` branch takes running statistics as constants (`bn_statistics="running"`, frozen ones) reads no
    batch and counts 0, as does one without the branch; with `"renorm"` gradients go through the batch, and it counts.
    A module that is used twice counts once. Sites of one kind of gate are read together, so the cost does not grow with
    depth, and nothing waits for a device.

    Args:
        model: wrapped or not.

    Returns:
        A scalar in float32 or wider, from 0 to twice the number of sites; 0 without a gradient where no site counts, so
        that one training script serves models before and after conversion.
    """
    sites = [site for site in gated_modules(model).values() if "bn" in site.branches and _uses_batch_statistics(site)]
    totals = [_sum_bn_importance(group) for group in _group_sites(sites)]
    if not totals:
        return torch.zeros((), device=next((p.device for p in unwrap(model).parameters()), None))
    return sum((total.to(totals[0].device) for total in totals[1:]), start=totals[0])


def _uses_batch_statistics(site: GatedModule) -> bool:
    has_no_running_stats = isinstance(site, SwitchNorm) and site.running_mean is None
    return site.bn_statistics != "running" or has_no_running_stats


def _group_sites(sites: Iterable[GatedModule]) -> list[list[GatedModule]]:
    """Group the sites whose gate parameters fit into one tensor and mean the same."""
    groups = defaultdict(list)
    for site in sites:
        point = site.mean_weight
        groups[site.gate, site.branches, point.dtype, point.device].append(site)
    return list(groups.values())


def _sum_bn_importance(sites: list[GatedModule]) -> Tensor:
    points = torch.stack([getattr(site, name) for site in sites for name in GATE_PARAMETERS])
    return weights_of_points(points, sites[0].gate)[:, sites[0].branches.index("bn")].sum()
