"""How far two values are apart: relative L2 of tensors, equal or not for anything else. Values in, numbers out."""

from math import hypot, isfinite
from typing import Any

import torch
from torch import Tensor

Names = tuple[str, ...]


def distance(reference: Any, value: Any) -> float:
    """Return the relative L2 of floating tensors; for anything else, or another shape or dtype, 0 or inf.

    Where the reference is inf or NaN the value must be the same, else the distance is inf.
    """
    if not (isinstance(reference, Tensor) and isinstance(value, Tensor)):
        return 0.0 if type(reference) is type(value) and reference == value else float("inf")
    if reference.shape != value.shape or reference.dtype != value.dtype:
        return float("inf")
    if not (reference.is_floating_point() or reference.is_complex()):
        return 0.0 if torch.equal(reference, value) else float("inf")
    difference, size = (value - reference).norm().item(), reference.norm().item()
    if not (isfinite(difference) and isfinite(size)):  # something is not finite, or too large to be squared
        finite = reference.isfinite()
        odd, other = reference[~finite], value[~finite]
        if not torch.equal(odd.isnan(), other.isnan()) or not torch.equal(odd.nan_to_num(), other.nan_to_num()):
            return float("inf")
        difference, size = (value - reference)[finite].norm().item(), reference[finite].norm().item()
    if difference == 0.0:
        return 0.0
    return difference / size if size > 0 and isfinite(difference) else float("inf")


def absolute(reference: Any, value: Any) -> float:
    """Return the largest absolute difference of two floating tensors where the reference is finite, else 0."""
    tensors = isinstance(reference, Tensor) and isinstance(value, Tensor)
    if not tensors or not reference.is_floating_point() or reference.shape != value.shape:
        return 0.0
    difference = (value - reference).abs()
    largest = difference.max().item() if difference.numel() else 0.0
    if isfinite(largest):
        return largest
    difference = difference[reference.isfinite()]
    return difference.max().item() if difference.numel() else 0.0


def worst(references: list[Any], values: list[Any]) -> float:
    """Return the largest distance of paired values, inf if there are more of the one than of the other."""
    if len(references) != len(values):
        return float("inf")
    return max((distance(a, b) for a, b in zip(references, values, strict=True)), default=0.0)


def vector_distance(references: list[Tensor], values: list[Tensor]) -> float:
    """Return the distance of paired tensors taken as one vector, 0 where there are none."""
    if not references:
        return 0.0
    pairs = list(zip(references, values, strict=True))
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return float("inf")
    size, difference = hypot(*(a.norm().item() for a, _ in pairs)), hypot(*((b - a).norm().item() for a, b in pairs))
    if isfinite(size) and isfinite(difference) and size > 0:
        return difference / size
    first, second = (torch.cat([tensor.flatten() for tensor in side]) for side in (references, values))
    return distance(first, second)


def shared(references: dict[Names, Tensor], values: dict[Names, Tensor]) -> list[tuple[Names, Names]]:
    """Return the keys of tensors that have a name in common: each side may know a tensor by other names as well."""
    by_name = {name: names for names in values for name in names}
    partners = ((names, next((by_name[name] for name in names if name in by_name), None)) for names in references)
    return [(names, partner) for names, partner in partners if partner is not None]


def common(references: dict[Names, Tensor], values: dict[Names, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that have a name in common, in pairs: a graph drops the buffers of what never runs."""
    keys = shared(references, values)
    return [references[names] for names, _ in keys], [values[names] for _, names in keys]


def zero_filled(references: dict[Names, Tensor], values: dict[Names, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return all tensors in pairs, where a missing one, on either side, counts as zeros: no gradient is none."""
    keys = shared(references, values)
    first, second = common(references, values)
    for names in references.keys() - {names for names, _ in keys}:
        first.append(references[names])
        second.append(torch.zeros_like(references[names]))
    for names in values.keys() - {names for _, names in keys}:
        first.append(torch.zeros_like(values[names]))
        second.append(values[names])
    return first, second
