"""Moving averages of a run in progress: the model copies in them, and averages that are lists of tensors.

Libraries keep the average of a model as a copy of it (torch's AveragedModel, timm's ModelEma, trainers of detectors) or
as a list of tensors in the order of the parameters (diffusers, torch_ema).
"""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from normswap.errors import OptimizerError
from normswap.surgery.gated import gate_parameters
from normswap.surgery.wrapping import unwrap

# The attribute under which an average keeps its copy of the model: torch and timm, then YOLO trainers, then others.
_COPIES = ("module", "ema", "ema_model", "average_model")
# Lists of tensors in the order of the parameters, and the list of weak references to these that torch_ema keeps.
_LISTS = ("shadow_params", "collected_params", "temp_stored_params")
_REFERENCES = "_params_refs"


def model_in(average: Any) -> nn.Module | None:
    """Return the copy of the model that an average keeps, or None if it keeps a list of tensors.

    Raises:
        OptimizerError: it keeps neither.
    """
    if isinstance(getattr(average, _LISTS[0], None), list):
        return None
    for name in _COPIES:
        inside = getattr(average, name, None)
        if isinstance(inside, nn.Module):
            return unwrap(inside)
    if isinstance(average, nn.Module):
        return unwrap(average)
    raise OptimizerError(
        f"ema: expected torch's AveragedModel, timm's ModelEma or a copy of the model, got {type(average).__name__}: "
        "pass the copy of the model that it keeps"
    )


def freeze_like_the_rest(copy: nn.Module) -> None:
    """Let the gates of an average take no gradient if none of its other parameters does."""
    gates = gate_parameters(copy)
    known = set(gates.values())
    if not any(parameter.requires_grad for parameter in copy.parameters() if parameter not in known):
        for gate in gates.values():
            gate.requires_grad_(False)


def lists_with_gates(average: Any, model: nn.Module, before: Sequence[nn.Parameter]) -> dict[str, list[Any]]:
    """Return the lists of an average, by attribute, with the gates of a converted model at their places.

    Args:
        before: the parameters that the model had before the conversion, in their order.

    Raises:
        OptimizerError: the lists are in no known order of these parameters.
    """
    lists = {name: held for name in _LISTS if isinstance(held := getattr(average, name, None), list)}
    references = getattr(average, _REFERENCES, None)
    every = [*model.parameters()]
    for chosen in (every, [p for p in every if p.requires_grad]):
        old = {id(p): place for place, p in enumerate(p for p in before if any(p is one for one in chosen))}
        if all(_fits(held, [p for p in before if id(p) in old]) for held in lists.values()):
            filled: dict[str, list[Any]] = {
                name: [held[old[id(p)]] if id(p) in old else p.detach().clone() for p in chosen]
                for name, held in lists.items()
            }
            return filled | ({_REFERENCES: [ref(p) for p in chosen]} if isinstance(references, list) else {})
    raise OptimizerError(
        f"ema: the tensors in {type(average).__name__} are not those of the model's parameters in their order: build "
        "the average from the converted model"
    )


def set_lists(average: Any, lists: Mapping[str, list[Any]]) -> None:
    """Give an average these lists."""
    for name, held in lists.items():
        setattr(average, name, held)


@torch.no_grad()
def copy_gates(source: nn.Module, target: nn.Module) -> None:
    """Give the gates of an average the values that those of the model have."""
    theirs: Mapping[str, Tensor] = gate_parameters(target)
    for name, gate in gate_parameters(source).items():
        if name in theirs:
            theirs[name].copy_(gate)


def _fits(held: Sequence[Any], parameters: Sequence[nn.Parameter]) -> bool:
    tensors = [item for item in held if isinstance(item, Tensor)]
    return len(tensors) == len(held) and [t.shape for t in tensors] == [p.shape for p in parameters]
