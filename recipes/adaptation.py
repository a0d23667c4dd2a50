"""Test-time adaptation: entropy minimization on a stream of single images without labels.

The stream is the evaluation split. The prediction for an image is that of the forward pass whose gradient adapts the
network, so it was adapted to earlier images only. Images with a high entropy are left out, as in EATA and SAR. The log
has the accuracy of each pass over the stream.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

import normswap
from normswap.finetune.data.digits import CLASSES, Shift, load_ink, render_target, split_indices

# How the images of the stream differ from those on which the network was trained.
STREAM = Shift(stroke=(0.8, 1.0), background=(0.0, 0.1), contrast=(0.6, 1.0), brightness=0.1, noise=0.25)


def open_data(split: str, seed: int = 0) -> TensorDataset:
    """Return shifted digits and their labels, which only the metrics use."""
    ink, labels = load_ink()
    index = split_indices(len(labels), seed=seed)["target", split]
    return TensorDataset(render_target(ink[index], seed=1000 * seed + len(split), shift=STREAM), labels[index])


def compute_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Return the mean entropy of the predicted probabilities."""
    return entropy(model(batch[0]))


def entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of softmax(logits), logits (N, classes)."""
    log_probabilities = logits.log_softmax(1)
    return -(log_probabilities.exp() * log_probabilities).sum(1).mean()


def build_metrics() -> dict[str, Metric]:
    """Return the accuracy of the network in evaluation mode, without further adaptation."""
    return {"accuracy": MulticlassAccuracy(CLASSES, average="micro")}


def update_metrics(metrics: Mapping[str, Metric], model: nn.Module, batch: Sequence[Tensor]) -> None:
    """Classify a batch."""
    metrics["accuracy"].update(model(batch[0]), batch[1])


def train_model(model: nn.Module, run: Any) -> None:
    """Adapt the norms to the stream, `epochs` times."""
    options = {"gates": False, "max_entropy": 0.4, **run.options}
    margin = options["max_entropy"] * math.log(CLASSES)
    model.requires_grad_(False)
    for parameter in normswap.adaptation_parameters(model, gates=options["gates"]).parameters:
        parameter.requires_grad_(True)
    optimizer = run.build_optimizer(model)
    stream = [[tensor.to(run.device) for tensor in batch] for batch in run.evaluation]
    order = torch.randperm(len(stream), generator=torch.Generator().manual_seed(run.recipe.train.seed))
    for number in range(run.recipe.train.epochs):
        predictions = torch.cat([adapt(model, optimizer, stream[index], margin) for index in order])
        labels = torch.cat([stream[index][1] for index in order])
        accuracy = float((predictions == labels).float().mean())
        most_common = float(predictions.bincount().max() / len(predictions))
        run.log({"step": number + 1, "accuracy of the pass": accuracy, "share of one class": most_common})


def adapt(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Sequence[Tensor], margin: float) -> Tensor:
    """Return the predictions for a batch, and take a step if their entropy is below `margin`."""
    logits = model(batch[0])
    loss = entropy(logits)
    if float(loss.detach()) < margin:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.argmax(1)
