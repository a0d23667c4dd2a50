"""The arms: how each one changes the trained BN network before, during and after fine-tuning.

Each arm works on a copy of the trained network. Sites whose statistics were never trained (a new decoder) are
calibrated on training inputs where BN's running statistics are used as constants.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

import normswap
from benchmarks.finetuning.evidence.norms import (
    BatchRenorm,
    batch_norms,
    chunks,
    group_norm,
    is_untrained,
    matched_group_norm,
    reestimate,
    replace,
)
from benchmarks.finetuning.evidence.settings.task import Task
from normswap.surgery.importance import gate_parameters, gated_modules

Prepare = Callable[[nn.Module, Task], nn.Module]


@dataclass(frozen=True)
class Arm:
    """One way to continue the training of a BN network.

    Args:
        title: the name in tables.
        prepare: (trained network, task) -> the network to fine-tune, a copy.
        description: one sentence for the page.
        freezes_statistics: BN layers use their running statistics in training and do not update them.
        trained: what is trained: "all", all but the affine parameters of BN ("no affine"), or norms and head ("norms").
        reestimates_after: BN statistics are re-estimated after training if that is better on validation inputs.
        gate_rate: the learning rate of the gates, where it is not selected.
        penalty: on batch dependence.
        momentum: of running statistics that are tracked although they are constants in training.
    """

    title: str
    prepare: Prepare
    description: str
    freezes_statistics: bool = False
    trained: str = "all"
    reestimates_after: bool = False
    gate_rate: float | None = None
    penalty: float = 0.0
    momentum: float = 0.0


def _copy(network: nn.Module, _: Task) -> nn.Module:
    return copy.deepcopy(network)


def calibrated(network: nn.Module, task: Task, *, everywhere: bool = False) -> nn.Module:
    """Return a copy with re-estimated statistics: of the sites that were never trained, or of all."""
    network = copy.deepcopy(network)
    layers = [bn for bn in batch_norms(network) if everywhere or is_untrained(bn)]
    reestimate(network, layers, chunks(task.train.inputs, task.to_input))
    return network


def convert(network: nn.Module, task: Task, **options: Any) -> nn.Module:
    """Return the network converted by normswap, as its recipes do it: sites that were never trained are calibrated."""
    example = task.example().to(next(network.parameters()).dtype)
    model, plan, _ = normswap.convert(network, example, **options)
    layers = gated_modules(model)
    constant = {name for name in plan.untrained if layers[name].bn_statistics == "running"}
    if constant and not options.get("start"):
        batches = [*chunks(task.train.inputs, task.to_input)]
        normswap.calibrate(model, batches, only=lambda _, name: name in constant, match=True)
    return model


def _uniform(network: nn.Module, task: Task) -> nn.Module:
    example = task.example().to(next(network.parameters()).dtype)
    return normswap.convert(network, example, gate="softmax", bn_statistics="batch").model


def _frozen_gates(network: nn.Module, task: Task) -> nn.Module:
    model = convert(network, task)
    for gate in gate_parameters(model).values():
        gate.requires_grad_(False)
    return model


def _replaced(build: Callable[..., nn.Module], **options: Any) -> Prepare:
    return lambda network, _: replace(network, partial(build, **options))


ARMS = {
    "bn": Arm(
        "BN in training",
        _copy,
        "batch statistics; evaluated with its running statistics, or with statistics re-estimated after training "
        "(PreciseBN) if these are better on the validation inputs",
        reestimates_after=True,
    ),
    "frozen": Arm(
        "BN frozen",
        calibrated,
        "the statistics of the source, as constants; its scale and shift are trained",
        freezes_statistics=True,
    ),
    "reestimated": Arm(
        "BN re-estimated, then frozen",
        partial(calibrated, everywhere=True),
        "all statistics are re-estimated on training inputs of the target, then constant",
        freezes_statistics=True,
    ),
    "gn_carried": Arm("GN carried over", _replaced(group_norm), "GroupNorm with BN's scale and shift"),
    "gn_matched": Arm(
        "GN matched",
        _replaced(matched_group_norm),
        "GroupNorm whose scale and shift make it equal to BN where the moments of a group are the running ones",
    ),
    "ln_matched": Arm("LN matched", _replaced(matched_group_norm, groups=1), "the same with a single group"),
    "renorm": Arm(
        "Batch Renorm",
        _replaced(BatchRenorm),
        "Batch Renormalization with limits 3 and 5 from the first step, and a momentum of 0.01",
    ),
    "uniform": Arm(
        "SN uniform",
        _uniform,
        '`normswap.convert(model, x, gate="softmax", bn_statistics="batch")`: the layer as published',
    ),
    "default": Arm("normswap", convert, "`normswap.convert(model, x)` with default arguments"),
}
# In the tables, but not one of the nine.
REPORTED = {
    "fully_frozen": Arm(
        "BN frozen, affine too",
        calibrated,
        "as *BN frozen*, and its scale and shift are constants too",
        freezes_statistics=True,
        trained="no affine",
    ),
}
ABLATIONS = {
    "price": Arm(
        "batch statistics, penalty 0.03",
        partial(convert, bn_statistics="batch"),
        "the default of normswap before this method",
        penalty=0.03,
    ),
    "raw": Arm("branches not matched", partial(convert, match=False), "`match=False`"),
    "frozen_gates": Arm("gates frozen", _frozen_gates, "all gates stay at `bn`"),
    "without_bn": Arm("`in` and `ln` without `bn`", partial(convert, start="ln"), '`start="ln"`'),
    "norms_only": Arm("norms only", convert, "only gates, scales, shifts and the head are trained", trained="norms"),
    "tracked": Arm(
        "statistics tracked slowly",
        convert,
        "the running statistics follow the inputs with momentum 0.01",
        momentum=0.01,
    ),
    "gates_3e-3": Arm("gate rate 3e-3", convert, "a rate of the gates of its own", gate_rate=3e-3),
    "gates_1e-2": Arm("gate rate 1e-2", convert, "a rate of the gates of its own", gate_rate=1e-2),
    "gates_3e-2": Arm("gate rate 3e-2", convert, "a rate of the gates of its own", gate_rate=3e-2),
}
ALL = ARMS | REPORTED | ABLATIONS


def norm_layers(model: nn.Module) -> list[nn.Module]:
    """Return all norm layers: BN, GroupNorm, Batch Renorm and those of normswap."""
    gated = list(gated_modules(model).values())
    plain = [module for module in model.modules() if isinstance(module, nn.GroupNorm | BatchRenorm)]
    return [*batch_norms(model), *plain, *gated]
