"""An own task: the sign of a wave, with a network whose BN has (N, C, L) inputs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy


def build_model(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, width, 5),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(width, 2),
    )


def open_data(split: str, length: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed({"train": 0, "validation": 1}[split])
    waves = torch.randn(24, 1, length, generator=generator)
    return TensorDataset(waves, (waves[:, 0].mean(1) > 0).long())


def compute_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def build_metrics() -> dict[str, Metric]:
    return {"accuracy of classes": MulticlassAccuracy(2, average="micro"), "accuracy of signs": BinaryAccuracy()}


def update_metrics(metrics: dict[str, Metric], model: nn.Module, batch: list[Tensor]) -> None:
    predictions = model(batch[0]).argmax(1)
    for metric in metrics.values():
        metric.update(predictions, batch[1])
