"""Per-sample gradients of SN layers, for Opacus' modes `hooks` and `ghost`.

The gate parameters are given to every sample of the batch separately, as importance weights (K, N, 1), and one
backward pass through the plain formula gives the gradients of all samples. `functorch` needs no code for a layer.
"""

from typing import Any

import torch
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn

from normswap.errors import ModelError
from normswap.layers.backends.custom_ops import read_running
from normswap.layers.backends.reference import accumulation_dtype, switch_norm_reference
from normswap.layers.functional import redistribute_instance_weight
from normswap.layers.gating import Branch, Gate, Mixing, importance_weights
from normswap.layers.in_place import GATE_PARAMETERS
from normswap.layers.matching import matching_for
from normswap.layers.switch_norm import SwitchNorm, SwitchNormAct, apply_layer
from normswap.privacy.validation import LAYER_CLASSES, describe_shared_statistics

SampleGradients = dict[nn.Parameter, Tensor]


@register_grad_sampler(LAYER_CLASSES)  # type: ignore[untyped-decorator]
def compute_sample_gradients(layer: Any, activations: list[Tensor], backprops: Tensor) -> SampleGradients:
    """Return the gradients (N, *shape) of the trainable parameters of a layer itself.

    Args:
        layer: an SN layer.
        activations: its input (N, C, *spatial), in a list.
        backprops: the gradient of its output, multiplied by the batch size if the loss is a mean.

    Raises:
        ModelError: samples of the batch share statistics.
    """
    if problem := describe_shared_statistics(layer):
        raise ModelError(problem)
    x, own = activations[0], {name: each for name, each in layer._parameters.items() if each is not None}
    trainable = {name: parameter for name, parameter in own.items() if parameter.requires_grad}
    if not x.numel():  # Poisson sampling draws empty batches
        return {each: each.new_zeros((0, *each.shape)) for each in trainable.values()}
    dtype = accumulation_dtype(x)
    dy = _behind_following_modules(layer, x, backprops).to(dtype)
    found = _compute(layer, x.to(dtype), dy, with_gates=not trainable.keys().isdisjoint(GATE_PARAMETERS))
    return {parameter: found[name].to(parameter.dtype) for name, parameter in trainable.items()}


def _behind_following_modules(layer: SwitchNorm, x: Tensor, backprops: Tensor) -> Tensor:
    """The gradient of the normalized input, from that of the output of the modules that follow in the same layer."""
    if not isinstance(layer, SwitchNormAct):
        return backprops
    with torch.no_grad():
        normalized = apply_layer(layer, x)
    with torch.enable_grad():
        normalized.requires_grad_()
        y = normalized.clone()  # an activation may work in place
        for name in layer.then:
            y = getattr(layer, name)(y)
        return torch.autograd.grad(y, normalized, backprops.to(y.dtype))[0]


def _compute(layer: SwitchNorm, x: Tensor, dy: Tensor, *, with_gates: bool) -> dict[str, Tensor]:
    """The gradients of weight and bias, and of the gates if asked for, by name."""
    gates = [getattr(layer, name).detach().to(x.dtype).requires_grad_(with_gates) for name in GATE_PARAMETERS]
    with torch.set_grad_enabled(with_gates):
        weights, branches = _weights_at(layer, x, *gates)
        # (K, N, 1): a weight for each sample, so that autograd does not add up the samples.
        by_sample = [each.detach()[:, None, None].repeat(1, len(x), 1).requires_grad_(with_gates) for each in weights]
        normalized = _normalize(layer, x, branches, *by_sample)
    found = {"weight": torch.einsum("nc...,nc...->nc", dy, normalized.detach()), "bias": torch.einsum("nc...->nc", dy)}
    if with_gates:
        if layer.weight is not None:
            dy = dy * layer.weight.detach().to(dy.dtype).reshape(-1, *[1] * (x.dim() - 2))
        of_weights = torch.autograd.grad(normalized, by_sample, dy)
        for name, gate, each, gradient in zip(GATE_PARAMETERS, gates, weights, of_weights, strict=True):
            rows = gradient.squeeze(-1).T  # (N, K)
            (found[name],) = torch.autograd.grad(each, gate, rows, retain_graph=True, is_grads_batched=True)
    return found


def _weights_at(
    layer: SwitchNorm, x: Tensor, mean_gate: Tensor, var_gate: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Branch, ...]]:
    """The importance weights of means and of variances that the layer uses for x, (K,) each, and their branches."""
    gate: Gate = layer.gate
    branches = layer.branches
    if x[0, 0].numel() == 1 and "in" in branches:
        mean_gate, var_gate, branches = redistribute_instance_weight(x, mean_gate, var_gate, gate, branches, None)
        gate = "simplex"
    return importance_weights(torch.stack((mean_gate, var_gate)), gate).unbind(), branches


def _normalize(layer: SwitchNorm, x: Tensor, branches: tuple[Branch, ...], means: Tensor, variances: Tensor) -> Tensor:
    """Return x normalized by importance weights (K, N, 1), without weight and bias of the layer."""
    mean, var = layer.running_mean, layer.running_var
    constants = None if mean is None or var is None else read_running(mean, var, x.dtype, copy=False)
    mixing = Mixing(layer.gate, branches, layer.normalising_eps, layer.num_groups)
    matching = matching_for(layer.matching, branches, x.dtype)
    return switch_norm_reference(x, means, variances, None, None, constants, mixing=mixing, matching=matching)
