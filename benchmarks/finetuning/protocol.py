"""The constants of the demo and of the fine-tuning evidence: network, training, learning rates.

Both programs use the same constants, and the evidence copies them into its page. The data are drawn by
`normswap.finetune.data.digits`.
"""

from dataclasses import dataclass
from typing import Literal

NETWORK = (
    "test_resnet"  # the smallest ResNet of timm: basic and bottleneck blocks, 15 BN sites, 0.37 million parameters
)
# With an output stride of 8 the last stage has 4 x 4 positions; by default it would have 1 x 1.
NETWORK_OPTIONS = {"in_chans": 3, "num_classes": 10, "output_stride": 8}


@dataclass(frozen=True)
class SourceTraining:
    """Training of the BN network on clean digits, by SGD with a one-cycle schedule."""

    epochs: int = 20
    batch_size: int = 64
    rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    least_validation_accuracy: float = 90.0


@dataclass(frozen=True)
class FineTuning:
    """Fine-tuning of every arm on the target domain. The learning rate falls linearly to 0.

    Args:
        steps, batch_size: the same for all arms, as are the batches and their order.
        rates: the grid of learning rates. Each arm gets the best one on the validation images of the target.
        momentum: of SGD. AdamW has the default betas of torch.
        clip: largest gradient norm of the parameters other than gates. Gates are not clipped: they stay on the
            simplex, and together with large gradients of the network they would hardly move.
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
    """A fine-tuning configuration and the arms that run with it."""

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

# Other settings run only the strongest arms, with the rates that are useful for them.
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

# Target: after fine-tuning, the converted network leads the best arm of TARGET_LEAD_OVER by so many points.
TARGET_LEAD = 20.0
TARGET_LEAD_OVER = ("bn", "frozen", "adapted")
# Target: largest relative output error after conversion, in float32.
TARGET_ERROR = 1e-5


def architecture() -> str:
    """Return the network as a value for `normswap --arch`."""
    return ",".join([f"timm:{NETWORK}", *(f"{key}={value}" for key, value in NETWORK_OPTIONS.items())])
