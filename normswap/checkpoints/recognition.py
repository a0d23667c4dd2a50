"""Which architecture the weights in a file belong to: their tensors first, then the words that the file has for it.

A word (timm's `arch`, an option of a trainer) only chooses among architectures that the tensors fit. Nothing is built.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from normswap.checkpoints.contents import hinted_architectures
from normswap.checkpoints.identification import Identification, identify
from normswap.checkpoints.prefixes import leading_parts, names_under, prefixes_of
from normswap.errors import CheckpointError
from normswap.layers.adoption import GATE_PARAMETERS


def recognise(weights: Mapping[str, Any], content: Any = None, *, prefix: str = "") -> Identification:
    """Return which architectures the tensors in `weights` fit, under any prefix of wrappers.

    Args:
        content: all that the file holds, whose words decide among several.
        prefix: what the prefix has to begin with.

    Raises:
        CheckpointError: under two prefixes lie two architectures.
    """
    tried: dict[str, Identification] = {}
    fitting: dict[str, Identification] = {}
    for each in dict.fromkeys([prefix, *prefixes_of(weights), *_copies_alike(weights)]):
        # Inside what fits, or around it, is no other model.
        if not each.startswith(prefix) or any(each.startswith(p) or p.startswith(each) for p in fitting):
            continue
        tried[each] = identify(_shapes_under(weights, each))
        if tried[each].candidates:
            fitting[each] = _narrowed(tried[each], hinted_architectures(content))
    names = {p: found.candidates[0].architecture for p, found in fitting.items()}
    if len({*names.values()}) > 1:
        listed = " and ".join(f"{p!r} ({name})" for p, name in names.items())
        raise CheckpointError(
            f"holds several models, under {listed}: say which, such as entry={next(iter(names)).rstrip('.')!r}"
        )
    if fitting:
        return next(iter(fitting.values()))
    return min(
        tried.values(), key=lambda found: min((match.misfits for match in found.matches), default=len(weights) + 1)
    )


def _shapes_under(weights: Mapping[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    stored = names_under(weights, prefix).stored
    return {
        name: tuple(weights[key].shape)
        for name, key in stored.items()
        # Importance weights are what a conversion adds: the architecture is the original's.
        if isinstance(weights[key], Tensor) and name.rpartition(".")[2] not in GATE_PARAMETERS
    }


def _copies_alike(weights: Mapping[str, Any]) -> list[str]:
    """The first parts of all names, where each of them stands before the same tensors: copies of one model."""
    parts = leading_parts(weights)
    inside = {frozenset(_shapes_under(weights, part).items()) for part in parts}
    return parts if len(inside) == 1 else []


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
