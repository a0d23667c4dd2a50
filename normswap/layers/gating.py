"""Gates: importance weights from gate parameters.

A layer has one gate parameter (K,) for the means and one for the variances, for K branches.

- `softmax`: w = softmax(z), eq. 5 of Luo et al., ICLR 2019.
- `simplex`: z is a point of the probability simplex, and w is its Euclidean projection. A one-hot point gives exactly
  one-hot weights, so a layer that starts at `bn` *is* batch normalization. The gradient is that of projected gradient
  descent, the incoming gradient minus its mean; the Jacobian of the projection, with zeros, would stop the training.

This module has a tensor version, which autograd and compilers need, and a version on Python numbers for fused backends.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from normswap.errors import LayerError

# --- options


Branch = Literal["in", "ln", "bn"]
Gate = Literal["simplex", "softmax"]
BnStatistics = Literal["batch", "running", "renorm"]

BRANCHES: tuple[Branch, ...] = get_args(Branch)
GATES: tuple[Gate, ...] = get_args(Gate)
BN_STATISTICS: tuple[BnStatistics, ...] = get_args(BnStatistics)


def check_branches(branches: Sequence[str]) -> tuple[Branch, ...]:
    """Return `branches` as a tuple in canonical order.

    Raises:
        LayerError: for an empty set, an unknown or a repeated branch.
    """
    try:
        is_subset = not isinstance(branches, str) and len(set(branches)) == len(branches) and {*BRANCHES} >= {*branches}
    except TypeError:  # no collection, or items without a hash
        is_subset = False
    if not is_subset or not branches:
        raise LayerError(f"branches: expected a non-empty subset of {BRANCHES}, got {branches!r}")
    return tuple(branch for branch in BRANCHES if branch in branches)


def check_bn_statistics(bn_statistics: str) -> BnStatistics:
    """Return `bn_statistics` if it is one of `BN_STATISTICS`.

    Raises:
        LayerError: otherwise.
    """
    if bn_statistics not in BN_STATISTICS:
        raise LayerError(f"bn_statistics: expected one of {BN_STATISTICS}, got {bn_statistics!r}")
    return bn_statistics


def check_num_groups(num_groups: int, channels: int | None) -> int:
    """Return `num_groups` if it divides the number of channels (None: unknown).

    Raises:
        LayerError: otherwise.
    """
    if not isinstance(num_groups, int) or num_groups < 1 or (channels is not None and channels % num_groups):
        of_channels = "" if channels is None else f" that divides the number of channels, {channels}"
        raise LayerError(f"num_groups: expected a positive integer{of_channels}, got {num_groups!r}")
    return num_groups


def check_gate(gate: str) -> Gate:
    """Return `gate` if it is one of `GATES`.

    Raises:
        LayerError: otherwise.
    """
    if gate not in GATES:
        raise LayerError(f"gate: expected one of {GATES}, got {gate!r}")
    return gate


# --- tensors


def project_to_simplex(point: Tensor) -> Tensor:
    """Return the Euclidean projection of `point` (..., K) to the probability simplex, exact for a one-hot point.

    Wang and Carreira-Perpinan, "Projection onto the probability simplex", arXiv:1309.1541.
    """
    # Adding a constant to all entries does not change the projection. With the largest entry at 0, the 1 below is not
    # lost to rounding.
    point = point - point.amax(dim=-1, keepdim=True)
    # The threshold is the maximum of (sum - 1) / k over the sets of the k largest entries. A set is found by comparing
    # with its smallest entry: compilers handle comparisons better than a sort.
    entries, smallest = point.unsqueeze(-2), point.unsqueeze(-1)
    members = entries >= smallest
    excess = torch.where(members, entries, 0.0).sum(dim=-1) - 1
    threshold = (excess / members.sum(dim=-1)).amax(dim=-1, keepdim=True)
    return (point - threshold).clamp(min=0)


def importance_weights(parameter: Tensor, gate: Gate) -> Tensor:
    """Return importance weights (..., K), non-negative with sum 1, in float32 or wider.

    For `simplex` the value is the projection, and the gradient of `parameter` is g - mean(g).
    """
    point = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    if gate == "softmax":
        return point.softmax(dim=-1)
    centred = point - point.mean(dim=-1, keepdim=True)
    # The difference is exactly 0: it adds the gradient and does not change the value.
    return project_to_simplex(point.detach()) + (centred - centred.detach())


def initial_point(gate: Gate, branches: Sequence[Branch], *, vertex: Branch | None = None) -> Tensor:
    """Return the initial gate parameter (K,).

    Args:
        gate: for `"softmax"` all logits are 1, as in the paper's code, and `vertex` is ignored.
        branches: the mixed branches.
        vertex: the branch with all weight; None: equal weights.

    Raises:
        LayerError: `vertex` is not among `branches`.
    """
    if gate == "softmax":
        return torch.ones(len(branches))
    if vertex is None:
        return torch.full((len(branches),), 1 / len(branches))
    if vertex not in branches:
        raise LayerError(f"branches: expected {vertex!r} among them, where the gate starts, got {tuple(branches)}")
    return torch.tensor([float(branch == vertex) for branch in branches])


# --- Python numbers


@dataclass(frozen=True, slots=True)
class Mixing:
    """The options of a layer that decide how statistics are mixed."""

    gate: Gate
    branches: tuple[Branch, ...]
    eps: float
    num_groups: int = 1


class ImportanceWeights(NamedTuple):
    """Importance weights of the branches `in`, `ln`, `bn`, or their gradients; 0 for a branch that is not mixed."""

    in_: float = 0.0
    ln: float = 0.0
    bn: float = 0.0


def project(point: Sequence[float]) -> list[float]:
    """Return the projection of a point, as `project_to_simplex`."""
    entry_sum = sum(point)
    if entry_sum == 1 and min(point) >= 0:
        return [*point]
    if not math.isfinite(entry_sum):
        return [math.nan] * len(point)
    # Shift as in `project_to_simplex`.
    largest = max(point)
    total = threshold = 0.0
    for rank, value in enumerate(sorted(point, reverse=True), 1):
        total += value - largest
        if rank * (value - largest) > total - 1:
            threshold = (total - 1) / rank
    return [max(value - largest - threshold, 0.0) for value in point]


def is_on_simplex(point: Tensor) -> bool:
    """Return whether a gate parameter (K,) is on the simplex, up to rounding of its dtype."""
    values: list[float] = point.tolist()
    return min(values) >= 0 and abs(sum(values) - 1) <= _dtype_eps(point.dtype)


@cache
def _dtype_eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def project_(point: Tensor) -> None:
    """Project a gate parameter (K,) in place; one on the simplex is not written."""
    if not is_on_simplex(point):
        point.copy_(torch.tensor(project(point.tolist()), dtype=point.dtype))


def read_weights(parameter: Tensor, gate: Gate) -> list[float]:
    """Return the importance weights of a gate parameter (K,)."""
    values: list[float] = parameter.tolist()
    if gate == "softmax":
        largest = max(values)
        powers = [math.exp(value - largest) for value in values]
        total = sum(powers)
        return [power / total for power in powers]
    return project(values)


def read_branch_weights(parameter: Tensor, mixing: Mixing) -> ImportanceWeights:
    """Return the importance weights of a gate parameter (K,) by branch."""
    weights = read_weights(parameter, mixing.gate)
    if mixing.branches == BRANCHES:
        return ImportanceWeights(*weights)
    weight_by_branch = dict(zip(mixing.branches, weights, strict=True))
    return ImportanceWeights(*(weight_by_branch.get(branch, 0.0) for branch in BRANCHES))


def gate_gradient(branch_weights: ImportanceWeights, gradient: ImportanceWeights, mixing: Mixing) -> list[float]:
    """Return the gradient of a gate parameter (K,) from the gradient g of the importance weights w.

    Softmax: w (g - sum w g); simplex: g - mean(g). Adding a constant to g does not change the result.
    """
    indices = [BRANCHES.index(branch) for branch in mixing.branches]
    weights = [branch_weights[i] for i in indices]
    # A weight of 0 ignores statistics that are not finite, so they do not reach its gradient either.
    upstream = [0.0 if branch_weights[i] == 0 and not math.isfinite(gradient[i]) else gradient[i] for i in indices]
    if mixing.gate == "softmax":
        centre = sum(branch_weight * value for branch_weight, value in zip(weights, upstream, strict=True))
        return [branch_weight * (value - centre) for branch_weight, value in zip(weights, upstream, strict=True)]
    centre = sum(upstream) / len(upstream)
    return [value - centre for value in upstream]
