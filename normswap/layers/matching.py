"""Matched branches: constants that bring the statistics of `ln` and `in` to the running statistics of `bn`.

A trained network expects at each norm what BN computes there. With the running mean rm and variance rv, (C,) each, and
the moments of all their channels, gm = mean(rm) and gv = mean(rv) + mean((rm - gm)^2), the branches use

    mean_ln'       = mean_ln + d sqrt(var_ln + eps),    d = (rm - gm) / sqrt(gv + eps)
    var_ln' + eps  = (var_ln + eps) r,                  r = (rv + eps) / (gv + eps)
    var_in' + eps  = (var_in + eps) s,                  s = (rv + eps) / (E[var_in] + eps)

A sample whose own moments are gm and gv has the same output at any mix of `ln` and `bn`, and a sample with another gain
or offset is normalized as by `ln`: d is multiplied by the deviation of the sample. With several groups of channels, gm
and gv are those of a group. The constants d = 0, r = 1, s = 1 leave the branches as they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from normswap.layers.gating import Branch

# Names of the buffers of a layer, in the order of `Matching`, and the branch that needs each.
MATCHING_BUFFERS: dict[str, Branch] = {"ln_mean_shift": "ln", "ln_var_scale": "ln", "in_var_scale": "in"}


class Matching(NamedTuple):
    """The constants (C,) of matched branches; None for a branch that is not matched.

    `layer.matching` returns those of a layer, `normswap.switch_norm(matching=)` uses them.

    Attributes:
        ln_mean_shift: d, the shift of the mean of `ln` in units of its deviation.
        ln_var_scale: r, the factor of the variance of `ln` plus eps.
        in_var_scale: s, the factor of the variance of `in` plus eps.

    Examples:
        >>> import torch, normswap
        >>> bn = torch.nn.BatchNorm2d(2).eval()
        >>> bn.running_mean.copy_(torch.tensor([1.0, 3.0]))
        tensor([1., 3.])
        >>> normswap.SwitchNorm2d.from_batch_norm(bn).matching.ln_mean_shift
        tensor([-0.7071,  0.7071])
        >>> identity = normswap.Matching(torch.zeros(3), torch.ones(3), torch.ones(3))
        >>> x, gate = torch.randn(8, 3, 16, 16), torch.ones(3)
        >>> matched = normswap.switch_norm(x, gate, gate, training=True, matching=identity)
        >>> torch.allclose(matched, normswap.switch_norm(x, gate, gate, training=True))
        True
    """

    ln_mean_shift: Tensor | None = None
    ln_var_scale: Tensor | None = None
    in_var_scale: Tensor | None = None


Matching.__module__ = "normswap"  # not in the body, which a NamedTuple keeps for its fields


def identity_matching(like: Tensor, channels: int) -> Matching:
    """Return constants that change nothing, with the dtype and the device of `like`."""
    ones = torch.ones(channels, dtype=like.dtype, device=like.device)
    return Matching(torch.zeros_like(ones), ones, ones.clone())


def match_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    num_groups: int = 1,
    *,
    instance_var: Tensor | None = None,
) -> Matching:
    """Return the constants that match the branches to running statistics (C,).

    Args:
        running_mean, running_var: (C,); they are used in float64.
        eps: that of the layer.
        num_groups: number of groups of channels that `ln` pools over.
        instance_var: expected variance (C,) of one sample and channel over its positions, measured on data; without
            it the variance of `in` is not scaled.

    Returns:
        Constants in the dtype of `running_mean`. A channel gets the identity if its statistics are not finite or a
        scale would not be positive, and all channels of a group if gv + eps is not positive and finite.
    """
    mean, var = _as_double(running_mean), _as_double(running_var)
    grouped_mean, grouped_var = (each.reshape(num_groups, -1) for each in (mean, var))
    centre = grouped_mean.mean(1, keepdim=True)
    deviation = grouped_mean - centre
    pooled = (grouped_var.mean(1, keepdim=True) + deviation.square().mean(1, keepdim=True) + eps).expand_as(deviation)
    shift, scale = (deviation * pooled.rsqrt()).flatten(), ((grouped_var + eps) / pooled).flatten()
    pooled = pooled.flatten()
    ln_is_usable = _is_positive(pooled) & _is_positive(scale) & shift.isfinite()
    in_scale = torch.ones_like(var) if instance_var is None else (var + eps) / (_as_double(instance_var) + eps)
    constants = (
        torch.where(ln_is_usable, shift, 0.0),
        torch.where(ln_is_usable, scale, 1.0),
        torch.where(_is_positive(in_scale), in_scale, 1.0),
    )
    return Matching(*(each.to(running_mean) for each in constants))


def _as_double(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)  # MPS has no float64


def _is_positive(tensor: Tensor) -> Tensor:
    return tensor.isfinite() & (tensor > 0)


def matching_for(matching: Matching | None, branches: tuple[Branch, ...], dtype: torch.dtype) -> Matching | None:
    """Return contiguous constants of the mixed branches in a dtype, float32 or wider; None if there are none."""
    if matching is None:
        return None
    shift, ln_scale, in_scale = matching
    if "ln" not in branches:
        shift = ln_scale = None
    if "in" not in branches:
        in_scale = None
    if shift is None and in_scale is None:
        return None
    for constant in matching:
        # Usually no constant changes. A copy would take as long as a pass over a small table.
        if constant is not None and (constant.dtype != dtype or constant.requires_grad or not constant.is_contiguous()):
            shift = _in_dtype(shift, dtype)
            ln_scale, in_scale = (_in_dtype(scale, dtype, is_scale=True) for scale in (ln_scale, in_scale))
            break
    return Matching(shift, ln_scale, in_scale)


def _in_dtype(constant: Tensor | None, dtype: torch.dtype, *, is_scale: bool = False) -> Tensor | None:
    if constant is None:
        return None
    constant = constant.detach()
    if is_scale and constant.dtype == torch.float16:
        # A small scale, that of a channel without variance, is 0 in float16; the scaled variance must not be 0.
        return constant.to(dtype).clamp_(min=2.0**-25)
    return constant.to(dtype).contiguous()
