"""The parameters that test-time adaptation trains: the affine parameters of all norms, and the gates if wanted.

Methods such as Tent, EATA and SAR collect them by the classes of torch's norms, which a converted layer does not have.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from normswap.errors import ModelError
from normswap.norm_sets.norm_layers import norm_layers
from normswap.surgery.selection import SiteFilter, first_matching_patterns


class AdaptationParameters(NamedTuple):
    """Parameters for an optimizer and their names, in the order in which `collect_params` of Tent returns them.

    Examples:
        >>> import torch, normswap
        >>> parameters, names = normswap.adaptation_parameters(torch.nn.Sequential(torch.nn.BatchNorm2d(8)))
        >>> names
        ['0.weight', '0.bias']
    """

    parameters: list[nn.Parameter]
    names: list[str]


AdaptationParameters.__module__ = "normswap"  # not in the body, which a NamedTuple keeps for its fields


def adaptation_parameters(
    model: nn.Module,
    *,
    gates: bool = False,
    include: SiteFilter | Iterable[SiteFilter] = (),
    exclude: SiteFilter | Iterable[SiteFilter] = (),
) -> AdaptationParameters:
    """Return weights and biases of all norms: SN layers, converted calls, and norms that were not converted.

    It replaces the `collect_params` functions of test-time adaptation (Wang et al., ICLR 2021, "Tent: Fully Test-Time
    Adaptation by Entropy Minimization", section 3.2), which look for torch's classes. The model does not change: set
    `requires_grad` yourself.

    Args:
        model: a model, converted or not, wrapped or not.
        gates: also return the gate parameters.
        include: the norms to adapt: glob patterns on names, regular expressions after `re:`, or functions
            `(module, fqn) -> bool`. Default: all.
        exclude: the norms to leave out, by filters as in `include`, such as `"layer4.*"`.

    Returns:
        An `AdaptationParameters`; a shared parameter counts once.

    Raises:
        ModelError: there is no such parameter, or a norm has no sizes yet.
        PlanError: a pattern matches no norm.
        ArgumentError: `model` is not a module.
        SwapError: a module with converted calls cannot be traced any more.

    Examples:
        >>> import torch, normswap
        >>> model = normswap.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))).model
        >>> normswap.adaptation_parameters(model, gates=True).names
        ['1.weight', '1.bias', '1.mean_weight', '1.var_weight']
    """
    layers = norm_layers(model)
    names = [layer.names for layer in layers.values()]
    modules = {name: layer.module for name, layer in layers.items()}
    included = first_matching_patterns(include, names, "norms", modules=modules)
    excluded = first_matching_patterns(exclude, names, "norms", modules=modules, argument="exclude")
    found: dict[nn.Parameter, str] = {}
    for name, layer in layers.items():
        if name in excluded or (included and name not in included):
            continue
        for key, parameter in (layer.affine() | (layer.gates() if gates else {})).items():
            found.setdefault(parameter, key)
    if not found:
        raise ModelError(
            "the model has no weight or bias of a norm that can be trained: choose other norms, or pass gates=True "
            "for a converted model"
        )
    return AdaptationParameters([*found], [*found.values()])
