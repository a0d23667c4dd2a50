"""`watch_importance` for Lightning: a callback for its Trainer.

Only this module imports Lightning. The packages `lightning.pytorch` and `pytorch_lightning` have separate classes; the
callback is derived from the class of the package that the program has imported.
"""

import importlib
import logging
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

from normswap.errors import WatchError
from normswap.layers.gating import BnStatistics
from normswap.running_stats.accumulation import move_to_device
from normswap.training.importance_watch import ImportanceLog, StatisticsSwitch
from normswap.training.output_watch import OutputWatch

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:

    def _callback_class() -> type:
        names = ("lightning.pytorch", "pytorch_lightning")
        imported = [name for name in names if name in sys.modules]
        installed = [name for name in names if find_spec(name.partition(".")[0]) is not None]
        for name in (*imported, *installed):
            return importlib.import_module(name).Callback
        raise ImportError("neither lightning nor pytorch_lightning is installed: pip install lightning")

    Callback = _callback_class()


Unit = Literal["step", "epoch"]


class ImportanceCallback(Callback):
    """A Lightning callback that logs importance weights to the Trainer's loggers, and switches `bn_statistics`.

    With `inputs` it also warns if outputs of layers died, as `normswap.watch_importance` does.

    It adds nothing to checkpoints: in a resumed run it takes step and epoch from the Trainer, and sets their mode.

    Args:
        every: the number of optimizer steps between two logs; default: the Trainer's `log_every_n_steps`.
        per_site: also log the weights of every site; otherwise averages over all sites.
        bn_statistics: the statistics of `bn` branches in training, by the step or epoch at which they start.
        unit: the unit of the keys of `bn_statistics`: `"step"` (of the optimizer) or `"epoch"`.
        inputs: one input of the Lightning module with a few different samples; it is moved to the module's device.

    Raises:
        WatchError: `unit` is unknown; at the start of training, as `normswap.watch_importance`.

    Examples:
        >>> import normswap
        >>> callback = normswap.ImportanceCallback(every=50, bn_statistics={0: "batch", 20: "running"}, unit="epoch")
        >>> import pytorch_lightning
        >>> trainer = pytorch_lightning.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
        >>> callback in trainer.callbacks
        True
    """

    __module__ = "normswap"

    def __init__(
        self,
        *,
        every: int | None = None,
        per_site: bool = False,
        bn_statistics: Mapping[int, BnStatistics] | None = None,
        unit: Unit = "step",
        inputs: Any = None,
    ) -> None:
        if unit not in get_args(Unit):
            raise WatchError(f"unit: expected 'step' or 'epoch', got {unit!r}")
        self._every, self._per_site = every, per_site
        self._modes, self._unit, self._inputs = bn_statistics, unit, inputs
        self._log: ImportanceLog | None = None
        self._switch: StatisticsSwitch | None = None
        self._outputs: OutputWatch | None = None

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Find the SN layers, and log and switch what is due before the first step."""

        def write(values: dict[str, float], step: int) -> None:
            for each in trainer.loggers:
                each.log_metrics(values, step)

        # A Trainer that logs nothing has 0.
        every = self._every if self._every is not None else max(1, int(getattr(trainer, "log_every_n_steps", 1)))
        start_step = trainer.global_step
        self._switch = StatisticsSwitch(pl_module, self._modes) if self._modes else None
        self._log = ImportanceLog(pl_module, write, every=every, per_site=self._per_site, start_step=start_step)
        if self._inputs is not None and trainer.is_global_zero:
            self._outputs = OutputWatch(pl_module, move_to_device(self._inputs, pl_module.device), logger.warning)
        self._on_step(trainer)

    def on_train_epoch_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Switch `bn_statistics` if that is due at this epoch."""
        self._on_step(trainer)

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log and switch what is due after this step; accumulated batches are not steps."""
        self._on_step(trainer)

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Release the model."""
        self._log = self._switch = self._outputs = None

    def _on_step(self, trainer: "Trainer") -> None:
        if self._switch is not None:
            self._switch.on_step(trainer.global_step if self._unit == "step" else trainer.current_epoch)
        if self._log is not None:
            self._log.on_step(trainer.global_step)
        if self._outputs is not None:
            self._outputs.on_step(trainer.global_step)
