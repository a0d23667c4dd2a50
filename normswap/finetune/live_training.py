"""convert_training: a model converted in the middle of its training, with optimizer, schedulers and averages.

All or nothing: what does not fit is found before anything is changed, and a failure on the way puts everything back.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from normswap.checkpoints.optimizer_state import gate_options
from normswap.display import counted, printed_as
from normswap.errors import OptimizerError, PlanError
from normswap.finetune.live_averages import copy_gates, freeze_like_the_rest, lists_with_gates, model_in, set_lists
from normswap.finetune.live_schedulers import check_lengths, check_schedulers, extensions, present_rate, schedulers_in
from normswap.finetune.param_groups import check_complete, check_owner
from normswap.finetune.watching import stepping_optimizer
from normswap.modes import all_or_nothing
from normswap.surgery.conversion import apply_plan, convert
from normswap.surgery.gated import trainable_gates
from normswap.surgery.norms import KNOWN_NORMS, Norms
from normswap.surgery.plan import SwapPlan
from normswap.surgery.tree import walk_modules
from normswap.surgery.wrapping import unwrap

# Optimizers that cannot take the gates, by class name, and why.
_REFUSED = {
    "LBFGS": "has one group of parameters only",
    "Muon": "updates matrices only, and importance weights are vectors",
    "SparseAdam": "takes sparse gradients only",
}


@printed_as("training")
class TrainingConversion(NamedTuple):
    """What `convert_training` did: the model, the plan and the new layers by fqn as in `Conversion`; the group of gates
    as the optimizer has it (None without an optimizer or trainable gates); the classes of the schedulers that got an
    entry for it, nested ones too, and of the averages that were converted.
    """

    model: nn.Module
    plan: SwapPlan
    replaced: dict[str, nn.Module]
    group: dict[str, Any] | None
    schedulers: tuple[str, ...]
    averages: tuple[str, ...]

    def __repr__(self) -> str:
        swaps, skips = counted(len(self.plan.swaps), "swap"), counted(len(self.plan.skips), "skip")
        extended = ", ".join((*self.schedulers, *self.averages)) or "no scheduler, no average"
        return f"TrainingConversion({type(self.model).__name__}, {swaps}, {skips}, {extended})"


def convert_training(
    model: nn.Module,
    optimizer: Any = None,
    scheduler: Any = None,
    ema: Any = None,
    *,
    example_inputs: Any = None,
    importance_lr: float | None = None,
    norms: Norms = KNOWN_NORMS,
    **choices: Any,
) -> TrainingConversion:
    """Convert a model in the middle of its training, in place, with all that trains it.

    The gates join the optimizer as its last parameter group, without weight decay. Every scheduler gets an entry for
    that group, and the averages of the model are converted by the same plan. Momentum, counts and learning rates of
    everything else stay, and so does a `GradScaler`, which keeps nothing per parameter. All or nothing.

    Args:
        model: as in `convert`; the very module objects change.
        optimizer: the optimizer of the model, or a list of several; the gates join the one that has the parameters of
            the norms. Also as accelerate, Lightning or timm's Lookahead wrap it.
        scheduler: the scheduler of that optimizer, or a list of several, of torch or timm.
        ema: a moving average of the model, or a list of several: torch's `AveragedModel`, timm's `ModelEma`, a copy of
            the model, or what keeps its tensors in a list `shadow_params`.
        example_inputs: a tensor, a tuple or a dict for one forward pass in evaluation, as in `convert`.
        importance_lr: the learning rate of the gates before any schedule, default that of the last group.
        norms: the table of norm classes, as in `convert`.
        choices: the other arguments of `convert`, such as `plan`, `include`, `exclude`, `settings`, `bn_statistics`.

    Returns:
        What was done. If there is nothing to swap, the plan says why and nothing has changed.

    Raises:
        PlanError, ModelError, SwapError: as `convert`; an average is no copy of this model.
        OptimizerError: a scheduler belongs to another optimizer or number of groups, an optimizer cannot take the
            gates or has not all parameters, an average is of no known kind, or `importance_lr` is no learning rate.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)
        >>> done = normswap.convert_training(model, optimizer, scheduler, importance_lr=0.01)
        >>> done.group["lr"], done.schedulers
        (0.01, ('CosineAnnealingLR',))
    """
    if choices.keys() & {"as_graph", "inplace"}:
        raise PlanError("convert_training works in place on the model itself: leave as_graph and inplace out")
    optimizers = [*dict.fromkeys(stepping_optimizer(each) for each in _listed(optimizer))]
    schedulers = _listed(scheduler)
    averages = _listed(ema)
    if schedulers and not optimizers:
        raise OptimizerError("scheduler: expected the optimizer that it steps too, got none: pass optimizer=optimizer")
    inside = unwrap(model)
    copies = [model_in(average) for average in averages]
    before = [*inside.parameters()]
    with _restored_on_failure([inside, *filter(None, copies)], optimizers, schedulers, averages):
        conversion = convert(model, example_inputs, norms=norms, inplace=True, **choices)
        for average, copy in zip(averages, copies, strict=True):
            _convert_average(average, copy, inside, conversion.plan, norms, before)
        group, extended = _extend(inside, optimizers, schedulers, importance_lr)
    names = tuple(type(average).__name__ for average in averages) if conversion.plan.swaps else ()
    return TrainingConversion(*conversion, group, extended, names)


def _convert_average(
    average: Any,
    copy: nn.Module | None,
    model: nn.Module,
    plan: SwapPlan,
    norms: Norms,
    before: Sequence[nn.Parameter],
) -> None:
    if not plan.swaps:
        return
    if copy is None:
        set_lists(average, lists_with_gates(average, model, before))
        return
    if copy is model:
        raise OptimizerError("ema: expected a copy of the model, got the model itself: leave it out")
    try:
        apply_plan(copy, plan, norms=norms)
    except PlanError as error:
        raise PlanError(f"ema: {type(average).__name__} keeps another model: {error}") from error
    copy_gates(model, copy)
    freeze_like_the_rest(copy)


def _extend(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], outer: Sequence[Any], rate: float | None
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Add the gates to the optimizer that they belong to, and to its schedulers, of which `outer` are stepped."""
    every = [each for one in outer for each in schedulers_in(one)]
    if not optimizers:
        return None, ()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    check_owner(model, groups)
    check_complete(model, groups)
    held = {parameter for group in groups for parameter in group["params"]}
    gates = {name: gate for name, gate in trainable_gates(model).items() if gate not in held}
    if not gates:
        return None, ()
    optimizer = _owner(optimizers, model, gates)
    check_schedulers(every, optimizer)
    old = [*optimizer.param_groups]
    added = {**gate_options(old[-1], importance_lr=rate), "params": [*gates.values()]}
    added["lr"] = present_rate(outer, old[-1], added)
    if "param_names" in old[-1]:
        added["params"] = [*gates.items()]
    changes = extensions(every, old, added)
    optimizer.add_param_group(added)
    for change in changes:
        change.set()
    check_lengths(every, len(optimizer.param_groups))
    return optimizer.param_groups[-1], tuple(type(change.scheduler).__name__ for change in changes if change.lists)


def _owner(
    optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, gates: dict[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer that has the parameters of the norms whose gates are to be trained."""
    sites = {name.rpartition(".")[0] for name in gates}
    known = set(gates.values())
    named = dict(model.named_parameters(remove_duplicate=False))
    norms = {p for name, p in named.items() if name.rpartition(".")[0] in sites and p not in known}
    shares = [len(norms.intersection(p for g in each.param_groups for p in g["params"])) for each in optimizers]
    owning = [each for each, share in zip(optimizers, shares, strict=True) if share] or [*optimizers]
    if len(owning) != 1:
        kinds = ", ".join(type(each).__name__ for each in owning)
        raise OptimizerError(
            f"optimizer: {len(owning)} of them ({kinds}) could take the gates, since each has parameters of norms: "
            "pass one, and add param_groups(model, like=optimizer)[-1] to it yourself"
        )
    found = owning[0]
    name = type(found).__name__
    if name in _REFUSED:
        raise OptimizerError(
            f"optimizer: {name} {_REFUSED[name]}: keep the gates in a second optimizer, such as "
            'torch.optim.SGD(normswap.param_groups(model)[-1]["params"], lr=0.01), after '
            "normswap.convert(model, inplace=True)"
        )
    return found


@contextmanager
def _restored_on_failure(
    models: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    schedulers: Sequence[Any],
    averages: Sequence[Any],
) -> Iterator[None]:
    groups = [(optimizer, [*optimizer.param_groups]) for optimizer in optimizers]
    every = [each for one in schedulers for each in schedulers_in(one)]
    attributes = [(each, dict(vars(each))) for each in (*every, *averages) if hasattr(each, "__dict__")]
    attributes = [(each, values) for each, values in attributes if not isinstance(each, nn.Module)]
    modules = {place.module: None for model in models for place in walk_modules(model)}
    try:
        with all_or_nothing(modules):
            yield
    except BaseException:
        for optimizer, old in groups:
            optimizer.param_groups[:] = old
        for each, values in attributes:
            vars(each).clear()
            vars(each).update(values)
        raise


def _listed(value: Any) -> list[Any]:
    return [] if value is None else [*value] if isinstance(value, list | tuple) else [value]
