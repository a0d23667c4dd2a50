"""Looking over the gates of a converted model."""

from typing import NamedTuple

from torch import nn

from normswap.display import counted, printed_as
from normswap.layers.adoption import GATE_PARAMETERS
from normswap.layers.gates import GatedModule
from normswap.surgery.tree import join, walk_modules
from normswap.surgery.wrapping import unwrap


class ImportanceWeights(NamedTuple):
    """The share of each branch in the means and in the variances of one site."""

    mean: dict[str, float]
    var: dict[str, float]


@printed_as("importance")
class SiteImportance(dict[str, ImportanceWeights]):
    """Importance weights by the fqn of each site: a dict that prints as a table."""

    def __repr__(self) -> str:
        return f"SiteImportance({counted(len(self), 'site')})"


def gated_modules(model: nn.Module) -> dict[str, GatedModule]:
    """Return every module with gates by its first name."""
    places = walk_modules(unwrap(model))
    return {place.names[0]: place.module for place in places if isinstance(place.module, GatedModule)}


def gate_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of all gates by name, also those of modules that no registry knows."""
    return {
        join(name, gate): parameter
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
        result[name] = ImportanceWeights(mean, var)
    return result


def moved_sites(model: nn.Module) -> list[str]:
    """Return the sites whose importance weights have left their vertex, where the layer is the original norm."""
    return [name for name, layer in gated_modules(model).items() if not layer.is_at(layer.vertex)]
