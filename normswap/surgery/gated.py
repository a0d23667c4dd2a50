"""Looking over the gates of a converted model."""

from typing import NamedTuple

from torch import nn

from normswap.layers.gates import GatedModule
from normswap.surgery.tree import walk_modules


class ImportanceWeights(NamedTuple):
    """The share of each branch in the means and in the variances of one site."""

    mean: dict[str, float]
    var: dict[str, float]


def gated_modules(model: nn.Module) -> dict[str, GatedModule]:
    """Return every module with gates by its first name."""
    return {place.names[0]: place.module for place in walk_modules(model) if isinstance(place.module, GatedModule)}


def importance_weights(model: nn.Module) -> dict[str, ImportanceWeights]:
    """Return the importance weights of every site by fqn: per branch, for means and for variances."""
    result = {}
    for name, layer in gated_modules(model).items():
        mean, var = (dict(zip(layer.branches, w.tolist(), strict=True)) for w in layer.importance_weights())
        result[name] = ImportanceWeights(mean, var)
    return result


def moved_sites(model: nn.Module) -> list[str]:
    """Return the sites whose importance weights have left their vertex, where the layer is the original norm."""
    return [name for name, layer in gated_modules(model).items() if not layer.is_at(layer.vertex)]
