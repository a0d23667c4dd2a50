"""What a model's dependence on its batches can be priced by: the share that its `bn` branches have.

A batch of one sample gives IN and BN the same moments in training, so that no gradient tells their gates apart, while
evaluation, on running statistics, does. A small price on the share of BN breaks the tie. This room adds up shares:
it decides no price and touches no gradient.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from normswap.layers.adoption import GATE_PARAMETERS
from normswap.layers.gates import GatedModule
from normswap.layers.importance import importance_weights
from normswap.layers.modules import SwitchNorm
from normswap.surgery.gated import gated_modules
from normswap.surgery.wrapping import unwrap


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
    sites = [site for site in gated_modules(model).values() if "bn" in site.branches and _reads_batches(site)]
    totals = [_shares_of_bn(alike) for alike in _alike(sites)]
    if not totals:
        return torch.zeros((), device=next((p.device for p in unwrap(model).parameters()), None))
    return sum((total.to(totals[0].device) for total in totals[1:]), start=totals[0])


def _reads_batches(site: GatedModule) -> bool:
    untracked = isinstance(site, SwitchNorm) and site.running_mean is None
    return site.bn_statistics != "running" or untracked


def _alike(sites: Iterable[GatedModule]) -> list[list[GatedModule]]:
    """Group the sites whose gate parameters fit into one tensor and mean the same."""
    groups = defaultdict(list)
    for site in sites:
        point = site.mean_weight
        groups[site.gate, site.branches, point.dtype, point.device].append(site)
    return list(groups.values())


def _shares_of_bn(sites: list[GatedModule]) -> Tensor:
    points = torch.stack([getattr(site, name) for site in sites for name in GATE_PARAMETERS])
    return importance_weights(points, sites[0].gate)[:, sites[0].branches.index("bn")].sum()
