"""`watch_importance` for Lightning: a callback for its Trainer.

The one room that imports Lightning, by the name that the program uses: `lightning.pytorch` or `pytorch_lightning`,
whose classes are not each other's. What it does with gates and statistics is said in `watching`.
"""

import importlib
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

from normswap.errors import WatchError
from normswap.layers.gating import BnStatistics
from normswap.training.importance_watch import ImportanceLog, StatisticsSwitch

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:

    def _callback_class() -> type:
        names = ("lightning.pytorch", "pytorch_lightning")
        imported = [name for name in names if name in sys.modules]
        installed = [name for name in names if find_spec(name.partition(".")[0]) is not None]
        for name in (*imported, *installed):
            return importlib.import_module(name).Callback
        raise ImportError("expected lightning or pytorch_lightning, found neither: pip install lightning")

    Callback = _callback_class()


Unit = Literal["step", "epoch"]


class ImportanceCallback(Callback):
    """Logs importance weights to the loggers of a Trainer, and switches `bn_statistics`, as training goes on.

    It adds nothing to a checkpoint: a run that is resumed takes step and epoch from the Trainer, and sets at its start
    what holds there.

    Args:
        every: how many steps of the optimizer lie between two writings, default the Trainer's `log_every_n_steps`.
        per_site: also log the weights of every site; else averages over all of them.
        bn_statistics: what `bn` branches are to use in training, by the step or epoch from which on.
        unit: whether the keys of `bn_statistics` count steps of the optimizer or epochs.

    Raises:
        WatchError: `unit` is neither; and when training starts, as `normswap.watch_importance`.
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        per_site: bool = False,
        bn_statistics: Mapping[int, BnStatistics] | None = None,
        unit: Unit = "step",
    ) -> None:
        if unit not in get_args(Unit):
            raise WatchError(f"unit: expected 'step' or 'epoch', got {unit!r}")
        self._every, self._per_site = every, per_site
        self._modes, self._unit = bn_statistics, unit
        self._log: ImportanceLog | None = None
        self._switch: StatisticsSwitch | None = None

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Look for the sites, and do what is due before the first step."""

        def write(values: dict[str, float], step: int) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(values, step)

        # A Trainer that logs nothing says 0.
        every = self._every if self._every is not None else max(1, int(getattr(trainer, "log_every_n_steps", 1)))
        start_step = trainer.global_step
        self._switch = StatisticsSwitch(pl_module, self._modes) if self._modes else None
        self._log = ImportanceLog(pl_module, write, every=every, per_site=self._per_site, start_step=start_step)
        self._on_step(trainer)

    def on_train_epoch_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Switch what is to be switched with this epoch."""
        self._on_step(trainer)

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Do what is due after this step; batches that are accumulated make no step."""
        self._on_step(trainer)

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Let go of the model."""
        self._log = self._switch = None

    def _on_step(self, trainer: "Trainer") -> None:
        if self._switch is not None:
            self._switch.on_step(trainer.global_step if self._unit == "step" else trainer.current_epoch)
        if self._log is not None:
            self._log.on_step(trainer.global_step)
