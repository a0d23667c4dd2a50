"""How far two values are apart: relative L2 of tensors and numbers, equal or not for anything else."""

from math import hypot, isfinite
from typing import Any

import torch
from torch import Tensor

Names = tuple[str, ...]

# Elements that are compared at a time: what is in between stays small, whatever the tensors are.
_CHUNK = 1 << 18

# From here on a value that is exactly the same on both sides may be a constant that masks others, such as -1e9: counted
# into the norm of the reference it would hide any difference of the values beside it.
_MASK = 1e4
_WIDE = {float: torch.float64, complex: torch.complex128}


def distance(reference: Any, value: Any) -> float:
    """Return the relative L2 of floating tensors or numbers; for anything else, or another shape or dtype, 0 or inf.

    Where the reference is inf or NaN the value must be the same, else the distance is inf.
    """
    if not (isinstance(reference, Tensor) and isinstance(value, Tensor)):
        if type(reference) is not type(value):
            return float("inf")
        if isinstance(reference, float | complex):
            return distance(*(torch.tensor(number, dtype=_WIDE[type(number)]) for number in (reference, value)))
        return 0.0 if reference == value else float("inf")
    if reference.shape != value.shape or reference.dtype != value.dtype:
        return float("inf")
    if not (reference.is_floating_point() or reference.is_complex()):
        return 0.0 if torch.equal(reference, value) else float("inf")
    return _ratio(*_norms(reference, value))


def _norms(reference: Tensor, value: Tensor) -> tuple[float, float]:
    """The norms of the difference and of the reference, over what is finite in the reference."""
    sides = (torch.split(tensor.reshape(-1), _CHUNK) for tensor in (reference, value))
    norms = [_norms_of_chunk(a, b) for a, b in zip(*sides, strict=True)]
    return hypot(*(difference for difference, _ in norms)), hypot(*(size for _, size in norms))


def _norms_of_chunk(reference: Tensor, value: Tensor) -> tuple[float, float]:
    difference, size = (value - reference).norm().item(), reference.norm().item()
    if isfinite(difference) and isfinite(size) and (size < _MASK or reference.abs().max().item() < _MASK):
        return difference, size
    finite = reference.isfinite()
    odd, other = reference[~finite], value[~finite]
    if not torch.equal(odd.isnan(), other.isnan()) or not torch.equal(odd.nan_to_num(), other.nan_to_num()):
        return float("inf"), size
    counted = finite & ~((reference == value) & (reference.abs() >= _MASK))
    reference, value = reference[counted], value[counted]
    scale = max(reference.abs().max().item(), 1.0) if reference.numel() else 1.0  # or squares could overflow
    return ((value - reference) / scale).norm().item() * scale, (reference / scale).norm().item() * scale


def _ratio(difference: float, size: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / size if size > 0 and isfinite(difference) and isfinite(size) else float("inf")


class VectorDistance:
    """The distance of paired tensors taken as one vector, added pair by pair and kept nowhere."""

    def __init__(self) -> None:
        self._difference = self._size = 0.0

    def add(self, reference: Tensor, value: Tensor) -> None:
        """Take one more pair in; tensors of different shapes or dtypes are infinitely far apart."""
        if reference.shape != value.shape or reference.dtype != value.dtype:
            self._difference = float("inf")
            return
        difference, size = _norms(reference, value)
        self._difference, self._size = hypot(self._difference, difference), hypot(self._size, size)

    def result(self) -> float:
        """Return the distance of all pairs, 0 where there are none."""
        return _ratio(self._difference, self._size)


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


def shared(references: dict[Names, Tensor], values: dict[Names, Tensor]) -> list[tuple[Names, Names]]:
    """Return the keys of tensors that have a name in common: each side may know a tensor by other names as well."""
    by_name = {name: names for names in values for name in names}
    partners = ((names, next((by_name[name] for name in names if name in by_name), None)) for names in references)
    return [(names, partner) for names, partner in partners if partner is not None]
