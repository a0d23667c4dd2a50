"""Checkpoints in every layout that people have, each made by the library whose layout it is, with one small network."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
import timm.models
import timm.optim
import timm.utils
import torch
from torch import nn
from torch.distributed import checkpoint as distributed

from tests.helpers import files


@dataclass(frozen=True)
class Trained:
    """The network after one step, with what a trainer keeps beside it."""

    model: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any


def trained() -> Trained:
    """Return the small network after a step with momentum, and its moving average, which differs from it."""
    model = files.small_model().train()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=1e-4, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    model(torch.randn(files.SHAPE)).square().mean().backward()
    optimizer.step()
    scheduler.step()
    average.update_parameters(model)
    return Trained(model, average, optimizer, scheduler)


def _bare(t: Trained, folder: Path) -> Path:
    torch.save(t.model.state_dict(), folder / "model.pt")
    return folder / "model.pt"


def _legacy(t: Trained, folder: Path) -> Path:
    torch.save(t.model.state_dict(), folder / "model.pth", _use_new_zipfile_serialization=False)
    return folder / "model.pth"


def _safetensors(t: Trained, folder: Path) -> Path:
    safetensors.torch.save_model(t.model, str(folder / "model.safetensors"))
    return folder / "model.safetensors"


def _wrapped(t: Trained, folder: Path) -> Path:
    torch.save(nn.DataParallel(torch.compile(t.model)).state_dict(), folder / "model.pt")
    return folder / "model.pt"


def _timm(t: Trained, folder: Path) -> Path:
    saver = timm.utils.CheckpointSaver(
        t.model,
        t.optimizer,
        args=argparse.Namespace(model="test_resnet", num_classes=7, opt="sgd", lr=0.1),
        model_ema=timm.utils.ModelEmaV3(t.average.module),
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
    )
    saver.save_checkpoint(3, metric=71.2)
    return folder / "checkpoint-3.pth.tar"


def _torchvision(t: Trained, folder: Path) -> Path:
    content = {
        "model": t.model.state_dict(),
        "optimizer": t.optimizer.state_dict(),
        "lr_scheduler": t.scheduler.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(model="resnet18", output_dir=Path("out"), device="cuda"),
        "model_ema": t.average.state_dict(),
    }
    torch.save(content, folder / "model_3.pth")
    return folder / "model_3.pth"


def _lightning(t: Trained, folder: Path) -> Path:
    import pytorch_lightning as lightning

    class Classifier(lightning.LightningModule):
        def __init__(self, model: nn.Module, width: int) -> None:
            super().__init__()
            self.save_hyperparameters("width")
            self.model = model
            self.loss = nn.CrossEntropyLoss(weight=torch.ones(7))

        def training_step(self, batch: Any, _index: int) -> torch.Tensor:
            return self.loss(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return {"optimizer": t.optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(t.optimizer, 3)}

    data = torch.utils.data.TensorDataset(torch.randn(files.SHAPE), torch.tensor([0, 1]))
    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Classifier(t.model, 3), torch.utils.data.DataLoader(data, batch_size=2))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def _mmengine(t: Trained, folder: Path) -> Path:
    content = {
        "meta": {"epoch": 3, "iter": 30, "cfg": "model = dict(type='ResNet')", "experiment_name": "a"},
        "state_dict": {f"backbone.{key}": value for key, value in t.model.state_dict().items()},
        "message_hub": {"log_scalars": {}, "runtime_info": {"epoch": 2}},
        "optimizer": t.optimizer.state_dict(),
        "param_schedulers": [
            {"param_name": "lr", "base_values": [1e-4, 1e-4], "last_step": 1, "_last_value": [1e-4, 1e-4]}
        ],
    }
    torch.save(content, folder / "epoch_3.pth")
    return folder / "epoch_3.pth"


def _hf_timm(t: Trained, folder: Path) -> Path:
    path = folder / "repository"
    t.model.pretrained_cfg = {**t.model.pretrained_cfg, "architecture": "test_resnet"}
    timm.models.save_for_hf(t.model, path, safe_serialization=True)
    return path


def _hf_shards(t: Trained, folder: Path, *, safe: bool) -> Path:
    path = folder / "sharded"
    path.mkdir()
    huggingface_hub.save_torch_state_dict(t.model.state_dict(), path, max_shard_size="400KB", safe_serialization=safe)
    (path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 7}))
    return path


def _distributed(t: Trained, folder: Path) -> Path:
    content = {"model": t.model.state_dict(), "optimizer": t.optimizer.state_dict(), "epoch": 3}
    distributed.save(content, checkpoint_id=folder / "step-30", no_dist=True)
    return folder / "step-30"


def _module(t: Trained, folder: Path) -> Path:
    torch.save(t.model, folder / "module.pt")
    return folder / "module.pt"


def _modules(t: Trained, folder: Path) -> Path:
    torch.save({"model": t.model, "ema": t.average.module, "epoch": 3}, folder / "last.pt")
    return folder / "last.pt"


def _exported(t: Trained, folder: Path) -> Path:
    torch.export.save(torch.export.export(t.model, (torch.randn(files.SHAPE),)), folder / "model.pt2")
    return folder / "model.pt2"


@dataclass(frozen=True)
class Layout:
    """A layout: how a file of it is made, which kind of content and container it is, and what it carries.

    `ema` is where the moving average lies, `optimizer` the optimizer's state; `tells` whether it says its architecture
    itself, `rest` names values that must come back.
    """

    make: Callable[[Trained, Path], Path]
    kind: str
    container: str
    written: str | None = None
    ema: str | None = None
    optimizer: str | None = None
    trust: bool = False
    tells: bool = False
    rest: tuple[str, ...] = ()


LAYOUTS: dict[str, Layout] = {
    "state dict": Layout(_bare, "state dict", "torch zip"),
    "state dict from before torch 1.6": Layout(_legacy, "state dict", "legacy pickle", written="torch zip"),
    "safetensors": Layout(_safetensors, "state dict", "safetensors"),
    "state dict of a wrapped model": Layout(_wrapped, "state dict", "torch zip"),
    "timm `CheckpointSaver`": Layout(
        _timm,
        "timm training checkpoint",
        "torch zip",
        ema="state_dict_ema",
        optimizer="optimizer",
        rest=("epoch", "arch", "args", "metric"),
    ),
    "torchvision references": Layout(
        _torchvision,
        "torchvision training checkpoint",
        "torch zip",
        ema="model_ema",
        optimizer="optimizer",
        rest=("epoch", "args"),
    ),
    "Lightning `Trainer.save_checkpoint`": Layout(
        _lightning,
        "Lightning checkpoint",
        "torch zip",
        optimizer="optimizer_states.0",
        rest=("epoch", "global_step", "hyper_parameters", "loops"),
    ),
    "mmengine": Layout(
        _mmengine, "mmengine checkpoint", "torch zip", optimizer="optimizer", rest=("meta", "message_hub")
    ),
    "timm `save_for_hf`": Layout(_hf_timm, "state dict", "safetensors folder", tells=True),
    "Hugging Face shards, safetensors": Layout(
        lambda t, folder: _hf_shards(t, folder, safe=True), "state dict", "safetensors folder", tells=True
    ),
    "Hugging Face shards, torch": Layout(
        lambda t, folder: _hf_shards(t, folder, safe=False), "state dict", "torch folder", tells=True
    ),
    "`torch.distributed.checkpoint`": Layout(
        _distributed, "training checkpoint", "distributed folder", optimizer="optimizer", rest=("epoch",)
    ),
    "`torch.export.save` (`.pt2`)": Layout(_exported, "state dict", "exported program", written="torch zip"),
    "pickled module": Layout(_module, "module", "torch zip", trust=True),
    "pickled modules in a dict": Layout(
        _modules, "training checkpoint", "torch zip", ema="ema", trust=True, rest=("epoch",)
    ),
}
