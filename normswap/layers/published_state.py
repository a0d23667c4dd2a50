"""State dicts of the paper's authors: their shapes, and the gates of the sparse version.

Their layers have weights (1, C, 1, 1), running statistics (1, C, 1) and logits of the branches in the order `in`, `ln`,
`bn`; without `bn` only two, and over (N, C), with weights (1, C), those of `ln` and `bn`. The sparse version (SSN) adds
`mean_fixed`, `var_fixed` and `radius`, each one number. Its importance weights are the sparsestmax of the logits, or,
once fixed, the stored one-hot weights.

Sources: Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", ICLR 2019; Shao et al., "SSN:
Learning Sparse Switchable Normalization via SparsestMax", CVPR 2019, algorithm 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normswap.layers.gating import BRANCHES, Branch, importance_weights, project_to_simplex

# The logit of a weight of 0: the softmax is exactly 0 in float32.
ZERO_LOGIT = -200.0
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_GATES = {"mean_weight": "mean_fixed", "var_weight": "var_fixed"}
_RADIUS = "radius"


def published_branches(num_logits: int, *, per_sample: bool) -> tuple[Branch, ...]:
    """Return the branches of published logits; `per_sample`: those of a layer over (N, C)."""
    if num_logits == len(BRANCHES):
        return BRANCHES
    return ("ln", "bn") if per_sample else ("in", "ln")


def read_published_state(
    state_dict: dict[str, Any], prefix: str, branches: Sequence[Branch]
) -> dict[str, Tensor] | None:
    """Flatten the tensors of a published layer in place, and take the entries of the sparse version out.

    Args:
        state_dict: a state dict.
        prefix: the name of the layer with a dot.
        branches: those of the layer that is loaded.

    Returns:
        The importance weights (K,) of each gate by name, in the order of `branches`; without a gate that does not fit.
        None if the layer is not in the published layout.
    """
    stored = {name: state_dict.get(prefix + name) for name in _TENSORS}
    shapes = {name: value.dim() for name, value in stored.items() if isinstance(value, Tensor) and _is_row(value)}
    if not shapes:
        return None
    for name in shapes:
        state_dict[prefix + name] = state_dict[prefix + name].flatten()
    radius = state_dict.pop(prefix + _RADIUS, None)
    fixed = {gate: state_dict.pop(prefix + name, None) for gate, name in _GATES.items()}
    found = {}
    for gate in _GATES:
        value = state_dict.get(prefix + gate)
        if isinstance(value, Tensor) and value.dim() == 1:
            weights = _weights(value.detach(), radius, fixed[gate])
            own = published_branches(len(value), per_sample=shapes.get("weight") == 2)
            selected = _select(weights, own if len(own) == len(value) else (), branches)
            if selected is not None:
                found[gate] = selected.to(value.dtype)
    return found


def _is_row(value: Tensor) -> bool:
    return value.dim() > 1 and value.numel() == value.shape[1]


def _weights(value: Tensor, radius: Any, fixed: Any) -> Tensor:
    """The importance weights of a stored gate: of SN without `radius`, of the sparse version with it."""
    if not isinstance(radius, Tensor):
        return importance_weights(value, "softmax")
    if isinstance(fixed, Tensor) and bool(fixed.reshape(-1)[0]):
        return value
    return sparsest_max(value, float(radius.reshape(-1)[0]))


def _select(weights: Tensor, own: Sequence[Branch], branches: Sequence[Branch]) -> Tensor | None:
    """The weights of `branches`; None if another branch has weight, or one of them is not in the file."""
    if tuple(own) == tuple(branches):
        return weights
    left_out = [float(weights[own.index(branch)]) for branch in own if branch not in branches]
    if not {*branches} <= {*own} or any(left_out):
        return None
    return torch.stack([weights[own.index(branch)] for branch in branches])


def sparsest_max(logits: Tensor, radius: float) -> Tensor:
    """Return the point (K,) of the simplex next to the logits that is at least `radius` away from equal weights.

    With radius 0 it is the Euclidean projection (sparsemax), with the radius of the circle around the simplex one-hot.
    """
    point = project_to_simplex(logits)
    active = torch.ones_like(point, dtype=torch.bool)
    while int(active.sum()) > 1:
        centre = active.to(point.dtype) / active.sum()
        offset = point - centre
        distance = float(offset.norm())
        if distance >= radius or distance == 0:
            return point
        point = centre + offset * (radius / distance)
        if bool((point >= 0).all()):
            return point
        # The circle leaves the simplex: it is searched on the face where the negative entries are 0.
        face = active & (point > 0)
        moved = float((centre - face.to(point.dtype) / face.sum()).square().sum())
        radius = max(radius**2 - moved, 0.0) ** 0.5
        point, active = project_to_simplex(point), face
    return active.to(point.dtype)
