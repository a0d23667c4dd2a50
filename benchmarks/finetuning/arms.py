"""The arms: how each one changes the trained BN network before and after fine-tuning at a small batch size.

Each arm works on a copy of the trained network, so all arms start from the same parameters. If an arm replaces a norm,
the new norm gets the scale and shift of the old one.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import normswap
from normswap.finetune.data.digits import IMAGE_SIZE

# Batch size of re-estimation. It can be large because no gradients are computed.
_REESTIMATION_BATCH = 50


@dataclass(frozen=True)
class Arm:
    """One way to continue the training of a BN network.

    Args:
        title: the name in tables.
        prepare: (trained network, target training pixels) -> the network to fine-tune, a copy.
        freezes_statistics: BN keeps its running statistics during fine-tuning; all parameters are trained.
        reestimates_after: BN statistics are re-estimated on the target training images after fine-tuning.
    """

    title: str
    prepare: Callable[[nn.Module, Tensor], nn.Module]
    freezes_statistics: bool = False
    reestimates_after: bool = False


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """Return the BN layers of a model, in order."""
    return [module for module in model.modules() if type(module) is nn.BatchNorm2d]


@torch.no_grad()
def reestimate_statistics(model: nn.Module, pixels: Tensor) -> None:
    """Replace the running statistics of every BN by their average over `pixels` (N, 3, H, W), in batches of 50."""
    layers = batch_norms(model)
    momenta = [layer.momentum for layer in layers]
    was_training = model.training
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch computes the plain average over the batches
    model.train()
    for batch in pixels.split(_REESTIMATION_BATCH):
        model(batch)
    model.train(was_training)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def replace_batch_norms(model: nn.Module, build: Callable[[nn.BatchNorm2d], nn.Module]) -> nn.Module:
    """Return a copy of `model` with every BN replaced by `build(bn)`, which gets its scale and shift."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                replacement = build(child)
                replacement.load_state_dict({"weight": child.weight, "bias": child.bias})
                setattr(parent, name, replacement)
    return model


def group_norm(bn: nn.BatchNorm2d) -> nn.GroupNorm:
    """Return a GroupNorm of 32 groups, the default of Wu and He, or of gcd(32, channels) groups.

    In these narrow layers fewer groups are far worse: with 16 channels per group the arm does not learn at all.
    """
    return nn.GroupNorm(math.gcd(32, bn.num_features), bn.num_features, eps=bn.eps)


def instance_norm(bn: nn.BatchNorm2d) -> nn.InstanceNorm2d:
    """Return an InstanceNorm without running statistics."""
    return nn.InstanceNorm2d(bn.num_features, eps=bn.eps, affine=True)


def convert(model: nn.Module, *, gate: str = "simplex") -> nn.Module:
    """Return `model` converted by normswap with an example input of the size of the images."""
    example = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    return normswap.convert(model, example, gate=gate).model


def _adapt(model: nn.Module, pixels: Tensor) -> nn.Module:
    model = copy.deepcopy(model)
    reestimate_statistics(model, pixels)
    return model


def _copy(model: nn.Module, _: Tensor) -> nn.Module:
    return copy.deepcopy(model)


ARMS = {
    "bn": Arm("BN in training mode", _copy),
    "bn_then_reestimated": Arm("BN in training mode, statistics re-estimated after", _copy, reestimates_after=True),
    "frozen": Arm("BN frozen", _copy, freezes_statistics=True),
    "adapted": Arm("BN re-estimated on the target, then frozen", _adapt, freezes_statistics=True),
    "group_norm": Arm("GroupNorm swap", lambda model, _: replace_batch_norms(model, group_norm)),
    "instance_norm": Arm("InstanceNorm swap", lambda model, _: replace_batch_norms(model, instance_norm)),
    "uniform": Arm("SN swap, softmax gate, uniform start", lambda model, _: convert(model, gate="softmax")),
    "converted": Arm("converted by normswap", lambda model, _: convert(model)),
}
