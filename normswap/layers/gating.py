"""Gates: how importance weights follow from their parameters.

Tensors in, tensors out. A layer has one parameter for the means and one for the variances, each of shape (K,)
for K branches. This room knows no module and refuses unknown gates and branches.

- `softmax`: the published gate, w = softmax(z) (Luo et al., ICLR 2019, eq. 5).
- `simplex`: z is itself a point of the probability simplex and w its Euclidean projection. At a vertex the
  weights are exactly one-hot, so a layer that starts at `bn` *is* Batch Normalization, and its gate is alive
  all the same: the backward pass is linear, the incoming gradient with its mean removed (projected gradient
  descent), never the zero-or-one Jacobian of the projection.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from normswap.errors import LayerError

# MERGED DOC: How a site mixes its statistics, on Python numbers: importance weights and their gradients for fused backends.


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
    if isinstance(branches, str) or not branches or len(set(branches)) != len(branches) or set(branches) - {*BRANCHES}:
        raise LayerError(f"branches: expected a non-empty subset of {BRANCHES}, got {branches!r}")
    return tuple(branch for branch in BRANCHES if branch in branches)


def check_bn_statistics(bn_statistics: str) -> BnStatistics:
    """Return `bn_statistics` if it names what the `bn` branch may use in training.

    Raises:
        LayerError: otherwise.
    """
    if bn_statistics not in BN_STATISTICS:
        raise LayerError(f"bn_statistics: expected one of {BN_STATISTICS}, got {bn_statistics!r}")
    return bn_statistics


def check_gate(gate: str) -> Gate:
    """Return `gate` if it names a gate.

    Raises:
        LayerError: otherwise.
    """
    if gate not in GATES:
        raise LayerError(f"gate: expected one of {GATES}, got {gate!r}")
    return gate


def project_to_simplex(point: Tensor) -> Tensor:
    """Return the Euclidean projection of `point` (..., K) on the probability simplex.

    Exact at vertices: projecting a one-hot vector returns it bit for bit.
    """
    # A common shift changes no projection; with the largest entry at 0, no size of it can swallow the 1 below.
    point = point - point.amax(dim=-1, keepdim=True)
    # The threshold is the largest (sum - 1) / count over the sets of the k largest entries. Each set is told by its
    # smallest entry: compilers take comparisons better than they take a sort.
    entries, smallest = point.unsqueeze(-2), point.unsqueeze(-1)
    members = entries >= smallest
    excess = torch.where(members, entries, 0.0).sum(dim=-1) - 1
    threshold = (excess / members.sum(dim=-1)).amax(dim=-1, keepdim=True)
    return (point - threshold).clamp(min=0)


def importance_weights(parameter: Tensor, gate: Gate) -> Tensor:
    """Return the importance weights (..., K), non-negative and of sum 1, in float32 or wider.

    For `simplex` the value is the projection and the gradient to `parameter` is g - mean(g).
    """
    point = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    if gate == "softmax":
        return point.softmax(dim=-1)
    centred = point - point.mean(dim=-1, keepdim=True)
    # The difference is exactly zero: it adds the gradient and leaves the value as projected.
    return project_to_simplex(point.detach()) + (centred - centred.detach())


def initial_point(gate: Gate, branches: Sequence[Branch], *, vertex: Branch | None = None) -> Tensor:
    """Return the initial gate parameter (K,).

    Softmax logits are 1 as published. A simplex point is the given vertex, or the uniform mix without one.

    Raises:
        LayerError: the vertex of a simplex point is not among `branches`.
    """
    if gate == "softmax":
        return torch.ones(len(branches))
    if vertex is None:
        return torch.full((len(branches),), 1 / len(branches))
    if vertex not in branches:
        raise LayerError(f"branches: expected {vertex!r} among them to start from it, got {tuple(branches)}")
    return torch.tensor([float(branch == vertex) for branch in branches])


@dataclass(frozen=True, slots=True)
class Mixing:
    """What of a site's options decides how statistics are mixed."""

    gate: Gate
    branches: tuple[Branch, ...]
    eps: float


class ImportanceWeights(NamedTuple):
    """Importance weights of the branches `in`, `ln`, `bn`, or their gradients; 0 for a branch that is not in use."""

    in_: float = 0.0
    ln: float = 0.0
    bn: float = 0.0


def project(point: Sequence[float]) -> list[float]:
    """Return the Euclidean projection of a point on the probability simplex; a vertex is returned bit for bit."""
    entry_sum = sum(point)
    if entry_sum == 1 and min(point) >= 0:
        return [*point]
    if not math.isfinite(entry_sum):
        return [math.nan] * len(point)
    # A common shift changes no projection; with the largest entry at 0, no size of it can swallow the 1 below.
    largest = max(point)
    total = threshold = 0.0
    for rank, value in enumerate(sorted(point, reverse=True), 1):
        total += value - largest
        if rank * (value - largest) > total - 1:
            threshold = (total - 1) / rank
    return [max(value - largest - threshold, 0.0) for value in point]


def is_on_simplex(point: Tensor) -> bool:
    """Say whether a gate parameter (K,) is a point of the simplex, to the rounding of its dtype."""
    values: list[float] = point.tolist()
    return min(values) >= 0 and abs(sum(values) - 1) <= _dtype_eps(point.dtype)


@cache
def _dtype_eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def project_(point: Tensor) -> None:
    """Replace a gate parameter (K,) by its projection, unless it lies on the simplex; only for one that can be read."""
    if not is_on_simplex(point):
        point.copy_(torch.tensor(project(point.tolist()), dtype=point.dtype))


def read_weights(parameter: Tensor, gate: Gate) -> list[float]:
    """Return the importance weights (K,) of a gate parameter, by reading it."""
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
    """Return the gradient of a gate parameter (K,) from that of the importance weights, up to a common shift of them.

    Softmax: w (g - sum w g); simplex: g - mean(g), as in `importance.importance_weights`.
    """
    indices = [BRANCHES.index(branch) for branch in mixing.branches]
    weights = [branch_weights[i] for i in indices]
    # A weight of zero silences statistics that are not finite, and with them what they say of that weight.
    upstream = [0.0 if branch_weights[i] == 0 and not math.isfinite(gradient[i]) else gradient[i] for i in indices]
    if mixing.gate == "softmax":
        centre = sum(branch_weight * value for branch_weight, value in zip(weights, upstream, strict=True))
        return [branch_weight * (value - centre) for branch_weight, value in zip(weights, upstream, strict=True)]
    centre = sum(upstream) / len(upstream)
    return [value - centre for value in upstream]
