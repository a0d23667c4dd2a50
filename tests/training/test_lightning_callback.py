"""The callback in a real Trainer of Lightning: what it logs and switches, also where a run is resumed."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as lightning
import torch
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from normswap import convert, param_groups
from normswap.errors import WatchError
from normswap.training import lightning_callback as callback_module
from normswap.training.lightning_callback import ImportanceCallback
from tests.helpers import zoo

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning",  # pytorch-lightning 2.6 with torch 2.14
    "ignore::UserWarning:pytorch_lightning",  # its advice on workers and loaders
    "ignore:.*weights_only:UserWarning",
)
DATA = [zoo.image(2, 3, 9, 9)() for _ in range(4)]


class Kept(Logger):
    """A logger that records importance weights."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, float]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if "importance/var/bn" in metrics:
            self.logged.append((step, metrics["importance/var/bn"]))

    def log_hyperparams(self, *args: Any, **options: Any) -> None:
        pass


class Module(lightning.LightningModule):
    """A network of one site; it records the mode of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.network: Any = convert(
            zoo.randomise(nn.Sequential(zoo.conv(), zoo.bn())), DATA[0], bn_statistics="batch"
        ).model
        self.modes: list[str] = []

    def training_step(self, batch: Tensor, _index: int) -> Tensor:
        self.modes.append(self.network[1].bn_statistics)
        loss: Tensor = self.network(batch).square().mul(torch.arange(8.0)[:, None, None]).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(param_groups(self, lr=0.01, importance_lr=0.5))


def fit(
    callback: ImportanceCallback, steps: int, *, resumed: Path | None = None, **options: Any
) -> tuple[lightning.Trainer, list[str], list[tuple[int | None, float]]]:
    module, logger = Module(), Kept()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=logger, callbacks=[callback], **quiet | options
    )
    trainer.fit(module, DataLoader(DATA, batch_size=None), ckpt_path=resumed)  # type: ignore[arg-type]
    return trainer, module.modes, logger.logged


def test_weights_are_logged_and_statistics_switched_by_steps() -> None:
    callback = ImportanceCallback(every=2, bn_statistics={0: "batch", 3: "renorm"})
    _, modes, logged = fit(callback, 4)
    assert modes == ["batch"] * 3 + ["renorm"]
    assert [step for step, _ in logged] == [0, 2, 4]
    assert logged[0][1] == 1 > logged[1][1]


def test_a_run_resumes_at_its_last_step(tmp_path: Path) -> None:
    modes = {0: "batch", 2: "renorm", 5: "running"}
    trainer, _, _ = fit(ImportanceCallback(every=2, bn_statistics=modes), 3)  # type: ignore[arg-type]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert not torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    _, found, logged = fit(
        ImportanceCallback(every=2, bn_statistics=modes),  # type: ignore[arg-type]
        6,
        resumed=tmp_path / "last.ckpt",
    )
    assert found == ["renorm", "renorm", "running"]
    assert [step for step, _ in logged] == [4, 6]


def test_epochs_are_counted_where_they_are_asked_for_and_batches_never() -> None:
    callback = ImportanceCallback(bn_statistics={1: "running"}, unit="epoch")
    _, modes, logged = fit(callback, 4, accumulate_grad_batches=2, log_every_n_steps=3)
    assert modes == ["batch"] * 4 + ["running"] * 4
    assert [step for step, _ in logged] == [0, 3]


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(WatchError, match="unit: expected 'step' or 'epoch', got 'batch'"):
        ImportanceCallback(unit="batch")  # type: ignore[arg-type]


def test_the_lightning_that_a_program_has_imported_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Any = callback_module._callback_class  # type: ignore[attr-defined]
    assert issubclass(ImportanceCallback, lightning.Callback)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", SimpleNamespace(Callback=int))
    assert find() is int
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(callback_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="neither lightning nor pytorch_lightning is installed: pip install"):
        find()
