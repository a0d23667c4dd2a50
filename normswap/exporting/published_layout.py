"""Weights in the layout of the checkpoints that the authors of Switchable Normalization published.

Per layer: `weight` and `bias` (1, C, 1, 1), `running_mean` and `running_var` (1, C, 1), and logits of the importance
weights in `mean_weight` and `var_weight`, (3,) for `in`, `ln` and `bn` or (2,) without `bn`. Layers over (N, C) have
tensors (1, C) and logits (2,) for `ln` and `bn`. The file is a dict with the entry `state_dict`.

Source: Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", ICLR 2019, eq. 5.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from normswap.errors import SwapError
from normswap.layers.gated_module import FunctionalSwitchNorm
from normswap.layers.gating import Branch
from normswap.layers.published_state import ZERO_LOGIT, published_branches
from normswap.layers.switch_norm import SwitchNorm
from normswap.surgery.importance import gated_modules
from normswap.text import pluralize

_EPS = 1e-5
_TENSORS = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var")
_IDENTITY = {"ln_mean_shift": 0.0, "ln_var_scale": 1.0, "in_var_scale": 1.0}


class PublishedWeights(NamedTuple):
    """Weights in the published layout.

    Attributes:
        state: the tensors by name.
        notes: what is lost, and what the published code computes differently.
    """

    state: "OrderedDict[str, Tensor]"
    notes: tuple[str, ...]


def published_weights(model: nn.Module) -> PublishedWeights:
    """Return the weights of a converted network in the published layout.

    Raises:
        SwapError: there is no SN layer, or one that the published code cannot compute.
    """
    layers = gated_modules(model)
    if not layers:
        raise SwapError("the published layout is that of SN layers, and the network has none: convert it first")
    state = OrderedDict(model.state_dict())
    loss, num_zeros = 0.0, 0
    for name, layer in layers.items():
        reason = _unsupported(layer)
        if reason:
            raise SwapError(f"{name}: the published code of SN has no {reason}: use to='onnx' or to='pt2'")
        assert isinstance(layer, SwitchNorm)
        rank = _rank(layer)
        _reshape(state, f"{name}." if name else "", rank)
        for gate, weights in zip(("mean_weight", "var_weight"), layer.importance_weights(), strict=True):
            logits = _logits(dict(zip(layer.branches, weights.double().tolist(), strict=True)), rank)
            wanted = _by_branch(dict(zip(layer.branches, weights.double().tolist(), strict=True)), rank)
            loss = max(loss, float((torch.softmax(logits, 0).double() - wanted).abs().max()))
            num_zeros += int((wanted == 0).sum())
            state[f"{name}.{gate}" if name else gate] = logits.to(weights.dtype)
    return PublishedWeights(state, _notes(layers, loss, num_zeros))


def _unsupported(layer: nn.Module) -> str | None:
    """Return what a layer has that the published code lacks, None if it has all."""
    if isinstance(layer, FunctionalSwitchNorm):
        return "functional sites, and this is one"
    assert isinstance(layer, SwitchNorm)
    if layer.num_groups != 1:
        return f"groups of channels, and this layer has {layer.num_groups}"
    if layer.weight is None or layer.bias is None:
        return "layers without weight and bias"
    weights = [dict(zip(layer.branches, each.tolist(), strict=True)) for each in layer.importance_weights()]
    for name, neutral in _IDENTITY.items():
        constant, branch = getattr(layer, name, None), "in" if name.startswith("in") else "ln"
        uses = any(each.get(branch, 0) for each in weights)
        if uses and constant is not None and bool((constant != neutral).any()):
            return f"matching constants, and `{branch}` is matched here (convert with match=False)"
    if _rank(layer) == 2 and any(each.get("in", 0) for each in weights):
        return "`in` branch for (N, C)"
    return None


def _rank(layer: SwitchNorm) -> int:
    """The number of dimensions of the layer's inputs: that of its class, 4 if that accepts several."""
    ranks = layer._ranks
    if ranks == (2, 3):
        return 3 if "in" in layer.branches else 2
    return ranks[0] if ranks else 4


def _reshape(state: "OrderedDict[str, Tensor]", prefix: str, rank: int) -> None:
    """Give the tensors of a layer the published shapes, and remove what the published code does not have."""
    for name in _TENSORS:
        state[prefix + name] = state[prefix + name].reshape(1, -1, *(1,) * (rank - 2))
    for name in _STATISTICS:
        if prefix + name in state:
            state[prefix + name] = state[prefix + name].reshape((1, -1) if rank == 2 else (1, -1, 1))
    for name in ("num_batches_tracked", *_IDENTITY):
        state.pop(prefix + name, None)


def _by_branch(weights: Mapping[Branch, float], rank: int) -> Tensor:
    """The importance weights (K,) in the published order, with 0 for branches that the layer does not mix."""
    names = published_branches(2 if rank == 2 or "bn" not in weights else 3, per_sample=rank == 2)
    return torch.tensor([weights.get(name, 0.0) for name in names], dtype=torch.float64)


def _logits(weights: Mapping[Branch, float], rank: int) -> Tensor:
    """Logits (K,) in float32 whose softmax is the importance weights."""
    wanted = _by_branch(weights, rank)
    return torch.where(wanted > 0, wanted.clamp(min=1e-300).log(), ZERO_LOGIT).float()


def _notes(layers: Mapping[str, nn.Module], loss: float, num_zeros: int) -> tuple[str, ...]:
    notes = []
    if loss:
        notes.append(f"Importance weights change by at most {loss:.1e}, since the layout stores logits of a softmax.")
    if num_zeros:
        notes.append(
            f"{pluralize(num_zeros, 'importance weight')} of 0 became the logit {ZERO_LOGIT:g}: the softmax is 0 "
            "again, and its gradient too, so further training cannot move them."
        )
    notes.append(
        "The published code divides the variance of one sample by its number of positions minus 1: on small maps its "
        "`in` and `ln` branches differ from normswap's."
    )
    others = sorted({layer.normalising_eps for layer in layers.values() if isinstance(layer, SwitchNorm)} - {_EPS})
    if others:
        notes.append(
            f"Build the published layers with eps {', '.join(f'{eps:g}' for eps in others)} (theirs: {_EPS:g})."
        )
    return tuple(notes)
