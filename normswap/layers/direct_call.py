"""The short way of a layer to the C extension, for eager calls on CPU whose `bn` branch has constant moments.

On a small map the checks of `switch_norm` take longer than the passes. Here the extension checks what it gets. Every
other call, and each one that the extension refuses, takes the way of `switch_norm`, which explains what is wrong.
"""

from functools import cache

import torch
from torch import Tensor

from normswap.layers.backends import cpu
from normswap.layers.backends.cpu import NATIVE
from normswap.layers.backends.custom_ops import read_running
from normswap.layers.backends.interface import Inputs, switch_norm_fused
from normswap.layers.backends.reference import accumulation_dtype, batch_norm
from normswap.layers.backends.selection import fused_backend, is_eager
from normswap.layers.gated_module import GatedModule
from normswap.layers.gating import BRANCHES, Mixing, check_bn_statistics, check_branches, check_gate
from normswap.layers.matching import matching_for


def normalise_directly(layer: GatedModule, x: Tensor, eps: float, ranks: tuple[int, ...]) -> Tensor | None:
    """Return the normalized x, or None if the call has to take the way of `switch_norm`.

    `ranks` are those that x can have; empty: any from 2. Trained points are projected in place, as by
    `GatedModule.project_gates`.

    Raises:
        LayerError: an option of the layer is unknown.
    """
    if not (is_eager(x) and x.is_cpu and fused_backend(x) is NATIVE):
        return None
    parameters, buffers, training = layer._parameters, layer._buffers, layer.training
    mean_gate, var_gate = parameters.get("mean_weight"), parameters.get("var_weight")
    running_mean, running_var = buffers.get("running_mean"), buffers.get("running_var")
    if (
        mean_gate is None
        or var_gate is None
        or running_mean is None
        or running_var is None
        or "weight" not in parameters  # frozen or parametrized
        or "bias" not in parameters
        or layer.fixed_moments is not None
        or (training and layer.bn_statistics != "running")
        or (x.dim() not in ranks if ranks else x.dim() < 2)
        or x.numel() <= x.shape[0] * x.shape[1]
    ):
        return None
    check_gate(layer.gate)
    check_bn_statistics(layer.bn_statistics)
    if layer.branches != BRANCHES:
        check_branches(layer.branches)
    weight, bias, matching = parameters["weight"], parameters["bias"], layer.matching
    if not cpu.accepts_directly((mean_gate, var_gate, weight, bias, running_mean, running_var, *(matching or ()))):
        return None
    try:
        mixing = _mixing(layer.gate, tuple(layer.branches), eps, layer.num_groups)
        gates = cpu.read_gates(mean_gate, var_gate, mixing)
        if training and layer.gate == "simplex" and not (gates.is_mean_on_simplex and gates.is_var_on_simplex):
            layer.project_gates()
        has_gradients = torch.is_grad_enabled()
        constants = read_running(running_mean, running_var, accumulation_dtype(x), copy=has_gradients)
        if gates.is_batch_norm and not (has_gradients and (mean_gate.requires_grad or var_gate.requires_grad)):
            return batch_norm(x, weight, bias, constants, mixing.eps)
        matching = matching_for(matching, mixing.branches, accumulation_dtype(x))
        inputs = Inputs(x, mean_gate, var_gate, weight, bias, constants, mixing, None, matching)
        return switch_norm_fused(NATIVE, inputs)
    except (ValueError, RuntimeError):
        return None


_mixing = cache(Mixing)
