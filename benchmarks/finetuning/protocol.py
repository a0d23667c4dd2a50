"""Every number of the demo and of the fine-tuning evidence: network, training, learning rates.

Holds constants only; the data are drawn by `normswap.finetune.data.digits`. The demo and the evidence read the same ones;
the evidence copies them into its report.
"""

from dataclasses import dataclass
from typing import Literal

NETWORK = (
    "test_resnet"  # the smallest ResNet of timm: basic and bottleneck blocks, 15 BN sites, 0.37 million parameters
)
# Stride 8 leaves 4 x 4 positions at the last stage, where the smallest images would otherwise end at 1 x 1.
NETWORK_OPTIONS = {"in_chans": 3, "num_classes": 10, "output_stride": 8}


@dataclass(frozen=True)
class SourceTraining:
    """How the BN network is trained on clean digits, by SGD under a one-cycle schedule."""

    epochs: int = 20
    batch_size: int = 64
    rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    least_validation_accuracy: float = 90.0


@dataclass(frozen=True)
class FineTuning:
    """How every arm is fine-tuned on the target domain; the rate falls linearly to 0.

    Args:
        steps, batch_size: the same for all arms, as are the batches and their order.
        rates: the grid that each arm's learning rate is chosen from, on the target's validation images.
        momentum: of SGD; AdamW keeps torch's own betas.
        clip: largest norm of the gradient of the network's own parameters. Gates are left out: they cannot run
            away from the simplex, and beside large gradients of the network they would hardly move.
        gate_rate: learning rate of the gates, in units of the network's.
    """

    steps: int = 400
    batch_size: int = 2
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 1.0
    gate_rate: float = 1.0


@dataclass(frozen=True)
class Setting:
    """One way of fine-tuning, and the arms that are put through it."""

    title: str
    tuning: FineTuning
    arms: tuple[str, ...]


SOURCE_TRAINING = SourceTraining()
FINE_TUNING = FineTuning()
ALL_ARMS = (
    "bn",
    "frozen",
    "adapted",
    "bn_then_reestimated",
    "group_norm",
    "instance_norm",
    "uniform",
    "converted",
)
MAIN = Setting("The comparison", FINE_TUNING, ALL_ARMS)

# Other settings are run with the strongest rivals only, and with the rates that can matter to them.
_STRONGEST = ("adapted", "bn_then_reestimated", "group_norm", "converted")
_ADAMW_RATES = (0.0003, 0.001, 0.003)
OTHERS = (
    Setting("Twice the steps", FineTuning(steps=800, rates=(0.01, 0.03, 0.1)), _STRONGEST),
    Setting("AdamW", FineTuning(optimizer="adamw", rates=_ADAMW_RATES), _STRONGEST),
    Setting(
        "AdamW, gates at 5 times the rate",
        FineTuning(optimizer="adamw", rates=_ADAMW_RATES, gate_rate=5.0),
        ("converted",),
    ),
)

DEMO_SEED = 0
DEMO_RATE = 0.01
DEMO_ARMS = ("bn", "frozen", "group_norm", "converted")

# Points of accuracy by which the converted network is to lead the best arm of WANTED_LEAD_OVER after fine-tuning.
WANTED_LEAD = 20.0
WANTED_LEAD_OVER = ("bn", "frozen", "adapted")
# Largest relative output error right after the swap, in float32.
WANTED_ERROR = 1e-5


def architecture() -> str:
    """Return the network as `normswap --arch` takes it."""
    return ",".join([f"timm:{NETWORK}", *(f"{key}={value}" for key, value in NETWORK_OPTIONS.items())])
