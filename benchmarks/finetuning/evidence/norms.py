"""The norms that replace BN in the arms, and what is done to BN layers: re-estimation, freezing, slow tracking."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.surgery.module_tree import never_updated

BatchNorm = nn.modules.batchnorm._BatchNorm
# A group count of Wu and He (2018), or the largest divisor of the channels that it contains.
GROUPS = 32
# Limits of Ioffe (2017). His ramp from BN to these limits is for training from scratch: trained statistics need none.
R_MAX, D_MAX, MOMENTUM = 3.0, 5.0, 0.01
_STATISTICS_INPUTS, _STATISTICS_BATCH = 400, 50


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """Return the BN layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def is_untrained(bn: BatchNorm) -> bool:
    """Return whether the running statistics were never updated. A count of 0 proves nothing: files may lack it."""
    return never_updated(bn.running_mean, bn.running_var)


@torch.no_grad()
def reestimate(model: nn.Module, layers: Iterable[BatchNorm], batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of `layers` by their plain average over `batches`, in place."""
    layers = list(layers)
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch computes the plain average over the batches
        layer.training = True
    for batch in batches:
        model(batch)
    for module, mode in modes.items():
        module.training = mode
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def replace(model: nn.Module, build: Callable[[BatchNorm], nn.Module]) -> nn.Module:
    """Return a copy of `model` with every BN replaced by `build(bn)`; an activation inside timm's layers stays."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BatchNorm):
                inner = [part for part in child.children() if not isinstance(part, nn.Identity)]
                new = build(child).train(child.training)
                setattr(parent, name, nn.Sequential(new, *inner) if inner else new)
    return model


def group_norm(bn: BatchNorm, groups: int = GROUPS) -> nn.GroupNorm:
    """Return a GroupNorm with the scale and shift of a BN."""
    norm = nn.GroupNorm(math.gcd(groups, bn.num_features), bn.num_features, eps=bn.eps, dtype=bn.weight.dtype)
    norm.load_state_dict({"weight": bn.weight, "bias": bn.bias})
    return norm


@torch.no_grad()
def matched_group_norm(bn: BatchNorm, groups: int = GROUPS) -> nn.GroupNorm:
    """Return the GroupNorm that equals a BN on inputs whose pooled moments are the running ones.

    The moments of a group follow from the running statistics by the law of total variance.
    """
    norm = group_norm(bn, groups)
    mean, var = (tensor.double().reshape(norm.num_groups, -1) for tensor in (bn.running_mean, bn.running_var))
    pooled_mean = mean.mean(1, keepdim=True)
    pooled_var = var.mean(1, keepdim=True) + (mean - pooled_mean).square().mean(1, keepdim=True)
    scale = ((pooled_var + bn.eps) / (var + bn.eps)).sqrt().flatten()
    shift = ((mean - pooled_mean) / (var + bn.eps).sqrt()).flatten()
    norm.bias.sub_(norm.weight * shift)
    norm.weight.mul_(scale)
    return norm


class BatchRenorm(nn.Module):
    """Batch Renormalization (Ioffe, 2017) on (N, C, ...), started from a trained BN.

    In training it normalizes with the moments of the batch, corrected by r and d towards the running ones; r and d are
    limited, and no gradient passes through them. In evaluation it computes what the BN computes.

    Args:
        bn: the BN, whose parameters and statistics are copied.
    """

    def __init__(self, bn: BatchNorm) -> None:
        super().__init__()
        self.eps = bn.eps
        self.weight = nn.Parameter(bn.weight.detach().clone())
        self.bias = nn.Parameter(bn.bias.detach().clone())
        self.register_buffer("running_mean", bn.running_mean.clone())
        self.register_buffer("running_std", (bn.running_var + bn.eps).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input."""
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_std.square() - self.eps, self.weight, self.bias, False, 0.0, self.eps
            )
        with torch.no_grad():
            axes = [0, *range(2, x.dim())]
            var, mean = torch.var_mean(x, axes, correction=0)
            std = (var + self.eps).sqrt()
            r = (std / self.running_std).clamp(1 / R_MAX, R_MAX)
            d = ((mean - self.running_mean) / self.running_std).clamp(-D_MAX, D_MAX)
            self.running_mean.lerp_(mean, MOMENTUM)
            self.running_std.lerp_(std, MOMENTUM)
        # weight * (r * normalized + d) + bias, with the gradient of a BN with weight * r and bias + weight * d
        return F.batch_norm(x, None, None, self.weight * r, self.bias + self.weight * d, True, 0.0, self.eps)


class SlowTracking:
    """Move the running statistics of layers slowly towards the moments of their inputs, after each step.

    Args:
        layers: modules with `running_mean` and `running_var`, which use these as constants in training.
        momentum: the share of a batch's moments.
    """

    def __init__(self, layers: Iterable[nn.Module], momentum: float) -> None:
        self._momentum = momentum
        self._seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._handles = [layer.register_forward_hook(self._observe) for layer in layers]

    @torch.no_grad()
    def _observe(self, layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        x = inputs[0]
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        self._seen[layer] = (mean, var)

    @torch.no_grad()
    def step(self) -> None:
        """Update the statistics: after the backward pass, which needs the old ones."""
        for layer, (mean, var) in self._seen.items():
            layer.running_mean.lerp_(mean, self._momentum)  # type: ignore[operator, union-attr]
            layer.running_var.lerp_(var, self._momentum)  # type: ignore[operator, union-attr]

    def remove(self) -> None:
        """Stop observing."""
        for handle in self._handles:
            handle.remove()


def chunks(
    inputs: Tensor, to_input: Callable[[Tensor], Tensor], *, limit: int = 400, size: int = 50
) -> Iterator[Tensor]:
    """Yield at most `limit` inputs in batches, for statistics: no labels are read."""
    for chunk in inputs[:limit].split(size):
        yield to_input(chunk)
