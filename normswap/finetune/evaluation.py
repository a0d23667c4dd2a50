"""Loss and accuracy of a classifier on data that is divided among processes."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import distributed, nn

from normswap.finetune.data import Data
from normswap.modes import training_flags


class Evaluation(NamedTuple):
    """Mean cross-entropy, share of right answers in percent, and of how many images."""

    loss: float
    accuracy: float
    images: int


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, accelerator: Accelerator) -> Evaluation:
    """Return what a model makes of all images, each taken once whatever the number of processes; flags are put back."""
    total = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    with training_flags(list(model.modules()), training=False), accelerator.autocast():
        for images, labels in data:
            labels = labels.to(accelerator.device)
            logits = model(images.to(accelerator.device)).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            right = (logits.argmax(1) == labels).sum()
            total += torch.stack([loss.double(), right.double(), torch.tensor(float(len(labels))).to(loss).double()])
    loss, right, images = accelerator.reduce(total, "sum").tolist()
    return Evaluation(loss / images, 100 * right / images, int(images))


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give every process the running statistics of the first one, which are those that are saved."""
    for buffer in model.buffers():
        distributed.broadcast(buffer, 0)
