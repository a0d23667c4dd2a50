"""Which architecture the weights in a file belong to: their tensors first, then the words that the file has for it.

A word (timm's `arch`, an option of a trainer) only chooses among architectures that the tensors fit. Nothing is built.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from normswap.checkpoints.contents import hinted_architectures
from normswap.checkpoints.identification import Identification, identify
from normswap.checkpoints.prefixes import names_under, prefixes_of
from normswap.layers.adoption import GATE_PARAMETERS


def recognise(weights: Mapping[str, Any], content: Any = None) -> Identification:
    """Return which architectures the tensors in `weights` fit, under any prefix of wrappers.

    Args:
        content: all that the file holds, whose words decide among several.
    """
    tried = []
    for prefix in prefixes_of(weights):
        names = names_under(weights, prefix)
        tensors = {
            name: weights[key]
            for name, key in names.stored.items()
            # Importance weights are what a conversion adds: the architecture is the original's.
            if isinstance(weights[key], Tensor) and name.rpartition(".")[2] not in GATE_PARAMETERS
        }
        found = identify({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        if found.candidates:
            return _narrowed(found, hinted_architectures(content))
        tried.append(found)
    return min(tried, key=lambda found: min((match.misfits for match in found.matches), default=len(weights) + 1))


def state_dict_of(weights: Any) -> Mapping[str, Any]:
    """Return the tensors of what may be a module."""
    return weights.state_dict() if isinstance(weights, nn.Module) else weights


def _narrowed(found: Identification, hints: tuple[str, ...]) -> Identification:
    """The candidates that the file itself names, where it names one of them."""
    for hint in hints:
        # `resnet50.a1_in1k` is a tag of weights on `resnet50`.
        said = hint.rpartition("/")[2].partition(".")[0]
        named = tuple(c for c in found.candidates if c.architecture.partition(":")[2].partition(",")[0] == said)
        if named:
            return replace(found, candidates=named)
    return found
