"""Fine-tuning of a converted network by SGD with a penalty on its batch dependence."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.finetuning.training import batch_order
from normswap import batch_dependence, param_groups, trainable_gates
from normswap.finetune.data.digits import Images


@dataclass(frozen=True)
class FineTuning:
    """The conditions of a run. The learning rate falls linearly to 0.

    Args:
        clip: largest gradient norm of the parameters other than gates.
        gate_rate: learning rate of the gates, in units of the network's.
    """

    steps: int = 400
    batch_size: int = 2
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 1.0
    gate_rate: float = 1.0


def finetune(
    model: nn.Module, images: Images, *, rate: float, settings: FineTuning, seed: int, penalty: float = 0.0
) -> list[float]:
    """Fine-tune `model` in place. Return the loss of every step, without the penalty on batch dependence."""
    model.train()
    optimizer = build_optimizer(model, rate=rate, settings=settings)
    gates = set(trainable_gates(model).values())
    network = [parameter for parameter in model.parameters() if parameter not in gates]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    losses = []
    for batch in batch_order(len(images.labels), steps=settings.steps, batch_size=settings.batch_size, seed=seed):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.pixels[batch]), images.labels[batch])
        (loss + penalty * batch_dependence(model) if penalty else loss).backward()
        nn.utils.clip_grad_norm_(network, settings.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def build_optimizer(model: nn.Module, *, rate: float, settings: FineTuning) -> torch.optim.SGD:
    """Return SGD. Gates have no weight decay, which would change the function without any data."""
    *groups, gates = param_groups(model, lr=rate, importance_lr=rate * settings.gate_rate)
    return torch.optim.SGD(
        [*({**group, "weight_decay": settings.weight_decay} for group in groups), gates], rate, settings.momentum
    )
