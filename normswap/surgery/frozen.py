"""Frozen Batch Normalization under any class name, recognised by what it holds and by what it computes.

Every detection family ships its own copy of it: four buffers (C,) named as torch names them, no parameter, no child,
an eps that may be an attribute or a constant inside the forward. Structure alone proves nothing, so the affine map
is measured on a probe in float64 and must be BN's for one eps.
"""

import copy

import torch
from torch import Tensor, nn

from normswap.layers.adoption import shallow_twin
from normswap.modes import seeded

_STATE = ("weight", "bias", "running_mean", "running_var")

# What people write; a measured eps this close to one of them is it.
_USUAL_EPS = (0.0, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12)
_CLOSE = 1e-6


def has_frozen_structure(module: nn.Module) -> bool:
    """Say whether `module` holds just what a frozen BN holds: four buffers (C,) under torch's names."""
    if module._parameters or module._modules or {*module._buffers.keys()} != {*_STATE}:
        return False
    buffers = [buffer for buffer in module._buffers.values() if isinstance(buffer, Tensor)]
    return len(buffers) == len(_STATE) and len({buffer.shape for buffer in buffers}) == 1 and buffers[0].dim() == 1


def frozen_eps(module: nn.Module) -> float | None:
    """Return the eps of a frozen BN over (N, C, H, W), or None where `module` is none; its tensors do not matter."""
    return _measured_eps(module) if has_frozen_structure(module) else None


def _without_hooks(module: nn.Module) -> nn.Module:
    """Hooks of a copy may still write to the user's own objects."""
    twin = shallow_twin(module)
    twin._forward_hooks.clear()
    twin._forward_pre_hooks.clear()
    return twin


@torch.no_grad()
def _measured_eps(module: nn.Module) -> float | None:
    try:
        # Tensors of its own, so that every channel tells, also where a weight is 0, and on meta.
        probe = copy.deepcopy(_without_hooks(module)).to_empty(device="cpu").double().train()
        channels = len(probe.get_buffer("weight"))
        generator = torch.Generator().manual_seed(0)
        for name in _STATE:
            value = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
            getattr(probe, name).copy_(value * 1e-3 if name == "running_var" else value)
        x = torch.randn(2, channels, 2, 3, generator=generator, dtype=torch.float64)
        with seeded(0):
            y = probe(x)
            scale = (probe(x + 1) - y)[0, :, 0, 0]
        eps = ((probe.weight / scale) ** 2 - probe.running_var).median().item()
        said = getattr(module, "eps", None)
        known = (said, *_USUAL_EPS) if isinstance(said, float) else _USUAL_EPS
        eps = next((usual for usual in known if abs(eps - usual) <= _CLOSE * max(usual, 1e-9)), eps)
        w, b, mean, var = (getattr(probe, name).reshape(1, -1, 1, 1) for name in _STATE)
        expected = (x - mean) * (var + eps).rsqrt() * w + b
    except Exception:  # noqa: BLE001 - the probe runs foreign code: whatever it raises, this is no frozen BN
        return None
    same = isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, expected, rtol=1e-9, atol=1e-9)
    return eps if same and eps >= 0 else None
