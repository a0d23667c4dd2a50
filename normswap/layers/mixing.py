"""How a site mixes its statistics, on Python numbers: importance weights and their gradients for fused backends.

What `importance.py` defines on tensors costs some thirty operators a layer. Where the gate parameters can be read
at no cost, three numbers are projected in a microsecond. Refuses nothing: options are checked before they get here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from normswap.layers.importance import BRANCHES, Branch, Gate


@dataclass(frozen=True, slots=True)
class Mixing:
    """What of a site's options decides how statistics are mixed."""

    gate: Gate
    branches: tuple[Branch, ...]
    eps: float


class Shares(NamedTuple):
    """Importance weights of the branches `in`, `ln`, `bn`, or their gradients; 0 for a branch that is not in use."""

    in_: float = 0.0
    ln: float = 0.0
    bn: float = 0.0


def project(point: Sequence[float]) -> list[float]:
    """Return the Euclidean projection of a point on the probability simplex; a vertex is returned bit for bit."""
    whole = sum(point)
    if whole == 1 and min(point) >= 0:
        return [*point]
    if not math.isfinite(whole):
        return [math.nan] * len(point)
    # A common shift changes no projection; with the largest entry at 0, no size of it can swallow the 1 below.
    top = max(point)
    total = threshold = 0.0
    for rank, value in enumerate(sorted(point, reverse=True), 1):
        total += value - top
        if rank * (value - top) > total - 1:
            threshold = (total - 1) / rank
    return [max(value - top - threshold, 0.0) for value in point]


def lies_on_simplex(point: Tensor) -> bool:
    """Say whether a gate parameter (K,) is a point of the simplex, to the rounding of its dtype."""
    values: list[float] = point.tolist()
    return min(values) >= 0 and abs(sum(values) - 1) <= _rounding(point.dtype)


@cache
def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def put_on_simplex(point: Tensor) -> None:
    """Replace a gate parameter (K,) by its projection, unless it lies on the simplex; only for one that can be read."""
    if not lies_on_simplex(point):
        point.copy_(torch.tensor(project(point.tolist()), dtype=point.dtype))


def read_weights(parameter: Tensor, gate: Gate) -> list[float]:
    """Return the importance weights (K,) of a gate parameter, by reading it."""
    values: list[float] = parameter.tolist()
    if gate == "softmax":
        top = max(values)
        powers = [math.exp(value - top) for value in values]
        total = sum(powers)
        return [power / total for power in powers]
    return project(values)


def read_shares(parameter: Tensor, mixing: Mixing) -> Shares:
    """Return the importance weights of a gate parameter (K,) by branch."""
    weights = read_weights(parameter, mixing.gate)
    if mixing.branches == BRANCHES:
        return Shares(*weights)
    named = dict(zip(mixing.branches, weights, strict=True))
    return Shares(*(named.get(branch, 0.0) for branch in BRANCHES))


def gate_gradient(shares: Shares, gradient: Shares, mixing: Mixing) -> list[float]:
    """Return the gradient of a gate parameter (K,) from that of the importance weights, up to a common shift of them.

    Softmax: w (g - sum w g); simplex: g - mean(g), as in `importance.importance_weights`.
    """
    indices = [BRANCHES.index(branch) for branch in mixing.branches]
    weights = [shares[i] for i in indices]
    # A weight of zero silences statistics that are not finite, and with them what they say of that weight.
    upstream = [0.0 if shares[i] == 0 and not math.isfinite(gradient[i]) else gradient[i] for i in indices]
    if mixing.gate == "softmax":
        centre = sum(share * value for share, value in zip(weights, upstream, strict=True))
        return [share * (value - centre) for share, value in zip(weights, upstream, strict=True)]
    centre = sum(upstream) / len(upstream)
    return [value - centre for value in upstream]
