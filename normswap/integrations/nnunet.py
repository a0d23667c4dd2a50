"""A trainer of nnU-Net whose network has SN layers. Importing this module imports nnU-Net.

nnU-Net finds trainers by the name of their class in a folder: write a file there with the line
`from normswap.integrations.nnunet import nnUNetTrainerSwitchNorm`, and set `nnUNet_extTrainer` to the folder.
"""

from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from normswap.checkpoints.content.optimizer_state import GATE_GROUP
from normswap.layers.gating import BRANCHES
from normswap.surgery.conversion import convert
from normswap.training.gate_steps import limit_gate_steps
from normswap.training.param_groups import exempt_gates


class nnUNetTrainerSwitchNorm(nnUNetTrainer):  # type: ignore[misc] # noqa: N801 - nnU-Net finds classes by such names
    """nnU-Net's default trainer with SN in place of InstanceNorm (or BatchNorm), in training and in inference.

    At its start the network computes the function of nnU-Net's own. Layers that were InstanceNorm get the branches
    `ln` and `bn` in addition; `bn` uses the statistics of the batch. Gates have no weight decay, a learning rate of
    their own that follows the schedule, and limited steps.
    """

    @staticmethod
    def build_network_architecture(plans_manager: Any, *args: Any, **options: Any) -> nn.Module:
        """Build the network of the plans and convert it; nnU-Net looks for the name of the first argument."""
        network = nnUNetTrainer.build_network_architecture(plans_manager, *args, **options)
        settings: Any = {"*": {"branches": BRANCHES, "bn_statistics": "batch"}}
        return convert(network, kinds=("bn", "in"), settings=settings, inplace=True).model

    def configure_optimizers(self) -> tuple[Any, Any]:
        """Give the gates of nnU-Net's optimizer a group of their own."""
        optimizer, scheduler = super().configure_optimizers()
        exempt_gates(self.network, optimizer)
        keep_rate_of_gates(optimizer)
        limit_gate_steps(self.network, optimizer)
        return optimizer, scheduler


def keep_rate_of_gates(optimizer: torch.optim.Optimizer) -> None:
    """Keep the ratio of the rates of gates and network in each step, since nnU-Net's schedule sets one rate for all."""
    rates = {bool(group.get(GATE_GROUP)): group["lr"] for group in optimizer.param_groups}
    ratio = rates.get(True, 0.0) / rates[False]

    def before_step(optimizer: torch.optim.Optimizer, args: Any, options: Any) -> None:
        scheduled = next(group["lr"] for group in optimizer.param_groups if not group.get(GATE_GROUP))
        for group in optimizer.param_groups:
            if group.get(GATE_GROUP):
                group["lr"] = scheduled * ratio

    optimizer.register_step_pre_hook(before_step)
