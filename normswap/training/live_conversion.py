"""`convert_training`: convert a model during its training, with optimizer, schedulers and moving averages.

Everything is checked before the first change, and a failure on the way restores model, optimizer, schedulers and
averages. A moving average keeps either a copy of the model or lists of tensors; both are supported.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from normswap.checkpoints.content.optimizer_state import gate_options
from normswap.errors import OptimizerError, PlanError
from normswap.model_state import rollback_on_error
from normswap.surgery.conversion import apply_plan, convert
from normswap.surgery.importance import gate_parameters, trainable_gates
from normswap.surgery.module_tree import walk_modules
from normswap.surgery.norms.classes import KNOWN_NORMS, NormTable
from normswap.surgery.plan import SwapPlan
from normswap.surgery.wrappers import unwrap
from normswap.text import pluralize, printable_as
from normswap.training.importance_watch import unwrap_optimizer
from normswap.training.param_groups import check_complete, check_same_model
from normswap.training.schedulers import (
    check_group_count,
    check_schedulers,
    current_gate_lr,
    iter_schedulers,
    plan_scheduler_updates,
)

# --- moving averages --------------------------------------------------------------------------------------------------

# The attribute in which an average keeps its copy of the model: torch and timm, then YOLO trainers, then others.
_COPY_ATTRIBUTES = ("module", "ema", "ema_model", "average_model")
# Lists of tensors in the order of the parameters, and torch_ema's list of weak references to the parameters.
_LIST_ATTRIBUTES = ("shadow_params", "collected_params", "temp_stored_params")
_REFERENCES_ATTRIBUTE = "_params_refs"


def find_model_copy(average: Any) -> nn.Module | None:
    """Return the copy of the model in an average, or None if the average keeps lists of tensors.

    Raises:
        OptimizerError: the average keeps neither.
    """
    if isinstance(getattr(average, _LIST_ATTRIBUTES[0], None), list):
        return None
    for name in _COPY_ATTRIBUTES:
        wrapped = getattr(average, name, None)
        if isinstance(wrapped, nn.Module):
            return unwrap(wrapped)
    if isinstance(average, nn.Module):
        return unwrap(average)
    raise OptimizerError(
        f"ema: expected torch's AveragedModel, timm's ModelEma or a copy of the model, got {type(average).__name__}: "
        "pass the copy of the model in it"
    )


def match_requires_grad(copy: nn.Module) -> None:
    """Set requires_grad=False on the gates of an average if all its other parameters have it too."""
    gates = gate_parameters(copy)
    known = set(gates.values())
    if not any(parameter.requires_grad for parameter in copy.parameters() if parameter not in known):
        for gate in gates.values():
            gate.requires_grad_(False)


def extend_average_lists(average: Any, model: nn.Module, before: Sequence[nn.Parameter]) -> dict[str, list[Any]]:
    """Return the lists of an average, by attribute, extended by the gates at their positions among the parameters.

    Args:
        average: the average of the model before its conversion.
        model: the converted model.
        before: the parameters of the model before its conversion, in their order.

    Raises:
        OptimizerError: the lists are not in the order of all parameters, nor of the trainable ones.
    """
    lists = {
        name: stored_list for name in _LIST_ATTRIBUTES if isinstance(stored_list := getattr(average, name, None), list)
    }
    references = getattr(average, _REFERENCES_ATTRIBUTE, None)
    all_parameters = [*model.parameters()]
    for chosen in (all_parameters, [p for p in all_parameters if p.requires_grad]):
        old = {id(p): index for index, p in enumerate(p for p in before if any(p is one for one in chosen))}
        if all(_matches_shapes(stored_list, [p for p in before if id(p) in old]) for stored_list in lists.values()):
            extended: dict[str, list[Any]] = {
                name: [stored_list[old[id(p)]] if id(p) in old else p.detach().clone() for p in chosen]
                for name, stored_list in lists.items()
            }
            return extended | (
                {_REFERENCES_ATTRIBUTE: [ref(p) for p in chosen]} if isinstance(references, list) else {}
            )
    raise OptimizerError(
        f"ema: expected the tensors in {type(average).__name__} in the order of the model's parameters, found another "
        "order or other shapes: build the average from the converted model"
    )


def set_lists(average: Any, lists: Mapping[str, list[Any]]) -> None:
    """Replace the lists of an average."""
    for name, stored_list in lists.items():
        setattr(average, name, stored_list)


@torch.no_grad()
def copy_gates(source: nn.Module, target: nn.Module) -> None:
    """Copy the values of the gates of one model to those of the same names in another."""
    target_gates: Mapping[str, Tensor] = gate_parameters(target)
    for name, gate in gate_parameters(source).items():
        if name in target_gates:
            target_gates[name].copy_(gate)


def _matches_shapes(stored_list: Sequence[Any], parameters: Sequence[nn.Parameter]) -> bool:
    tensors = [item for item in stored_list if isinstance(item, Tensor)]
    return len(tensors) == len(stored_list) and [t.shape for t in tensors] == [p.shape for p in parameters]


# --- the conversion ---------------------------------------------------------------------------------------------------

# Optimizers that cannot train the gates, by class name, and the reason.
_UNSUPPORTED_OPTIMIZERS = {
    "LBFGS": "supports one parameter group only",
    "Muon": "updates matrices only, and gates are vectors",
    "SparseAdam": "supports sparse gradients only",
}


@printable_as("training")
class TrainingConversion(NamedTuple):
    """The result of `normswap.convert_training`; `print` shows it as a table.

    Attributes:
        model, plan, replaced: the model, the plan and the new layers by fqn, as in `normswap.Conversion`.
        group: the parameter group of the gates in the optimizer; None without an optimizer or trainable gates.
        schedulers: the classes of the schedulers that were extended by this group, including nested ones.
        averages: the classes of the moving averages that were converted.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> done = normswap.convert_training(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> done
        TrainingConversion(Sequential, 1 swap, 0 skips, no scheduler, no average)
        >>> list(done.replaced), len(done.group["params"])
        (['1'], 2)
    """

    model: nn.Module
    plan: SwapPlan
    replaced: dict[str, nn.Module]
    group: dict[str, Any] | None
    schedulers: tuple[str, ...]
    averages: tuple[str, ...]

    def __repr__(self) -> str:
        swaps, skips = pluralize(len(self.plan.swaps), "swap"), pluralize(len(self.plan.skips), "skip")
        extended = ", ".join((*self.schedulers, *self.averages)) or "no scheduler, no average"
        return f"TrainingConversion({type(self.model).__name__}, {swaps}, {skips}, {extended})"


TrainingConversion.__module__ = "normswap"  # its public path, which pickles then contain


def convert_training(
    model: nn.Module,
    optimizer: Any = None,
    scheduler: Any = None,
    ema: Any = None,
    *,
    example_inputs: Any = None,
    importance_lr: float | None = None,
    norms: NormTable = KNOWN_NORMS,
    **choices: Any,
) -> TrainingConversion:
    """Convert a model in place during its training, together with its optimizer, schedulers and moving averages.

    The gates become the last parameter group of the optimizer, without weight decay. Every scheduler is extended by
    that group, and the averages are converted by the same plan. The state and the learning rates of all other
    parameters stay; a `GradScaler` has no state per parameter and needs no change. An error changes nothing.

    Args:
        model: as in `normswap.convert`; the modules themselves change.
        optimizer: the optimizer of the model, or a list of several; the one with the parameters of the norms gets the
            gates. It may be wrapped by accelerate, Lightning or timm's Lookahead.
        scheduler: the scheduler of that optimizer, or a list of several, of torch or timm.
        ema: a moving average of the model, or a list of several: torch's `AveragedModel`, timm's `ModelEma`, a copy of
            the model, or an object with the tensors in a list `shadow_params`.
        example_inputs: a tensor, a tuple or a dict for one forward pass in evaluation mode, as in `normswap.convert`.
        importance_lr: the learning rate of the gates before any schedule; default: 100 times that of the last group, at
            most 1.5 / sites and 0.1.
        norms: the table of norm classes, as in `normswap.convert`.
        choices: the other arguments of `normswap.convert`, such as `plan`, `include`, `settings`, `bn_statistics`.

    Returns:
        The conversion. If there is nothing to swap, the plan gives the reasons and nothing has changed.

    Raises:
        PlanError, ModelError, SwapError: as `normswap.convert`; an average is not a copy of this model.
        OptimizerError: a scheduler belongs to another optimizer or number of groups; an optimizer cannot train the
            gates or lacks parameters of the model; the kind of an average is unknown; `importance_lr` is not a rate.

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
        raise PlanError("convert_training always converts in place, and not as a graph: remove as_graph and inplace")
    optimizers = [*dict.fromkeys(unwrap_optimizer(each) for each in _as_list(optimizer))]
    schedulers = _as_list(scheduler)
    averages = _as_list(ema)
    if schedulers and not optimizers:
        raise OptimizerError("scheduler: expected its optimizer too, got none: pass optimizer=optimizer")
    unwrapped = unwrap(model)
    copies = [find_model_copy(average) for average in averages]
    old_parameters = [*unwrapped.parameters()]
    with _rollback_on_failure([unwrapped, *filter(None, copies)], optimizers, schedulers, averages):
        conversion = convert(model, example_inputs, norms=norms, inplace=True, **choices)
        for average, copy in zip(averages, copies, strict=True):
            _convert_average(average, copy, unwrapped, conversion.plan, norms, old_parameters)
        group, extended = _add_gates(unwrapped, optimizers, schedulers, importance_lr)
    names = tuple(type(average).__name__ for average in averages) if conversion.plan.swaps else ()
    return TrainingConversion(*conversion, group, extended, names)


def _convert_average(
    average: Any,
    copy: nn.Module | None,
    model: nn.Module,
    plan: SwapPlan,
    norms: NormTable,
    old_parameters: Sequence[nn.Parameter],
) -> None:
    if not plan.swaps:
        return
    if copy is None:
        set_lists(average, extend_average_lists(average, model, old_parameters))
        return
    if copy is model:
        raise OptimizerError("ema: expected a copy of the model, got the model itself: remove ema")
    try:
        apply_plan(copy, plan, norms=norms)
    except PlanError as error:
        raise PlanError(f"ema: {type(average).__name__} is the average of another model: {error}") from error
    copy_gates(model, copy)
    match_requires_grad(copy)


def _add_gates(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], stepped_schedulers: Sequence[Any], rate: float | None
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Add the gates to the optimizer with the norms and to its schedulers; return the group and the schedulers."""
    all_schedulers = [each for scheduler in stepped_schedulers for each in iter_schedulers(scheduler)]
    if not optimizers:
        return None, ()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    check_same_model(model, groups, argument="optimizer")
    check_complete(model, groups, argument="optimizer")
    grouped = {parameter for group in groups for parameter in group["params"]}
    gates = {name: gate for name, gate in trainable_gates(model).items() if gate not in grouped}
    if not gates:
        return None, ()
    optimizer = _find_owner(optimizers, model, gates)
    check_schedulers(all_schedulers, optimizer)
    old = [*optimizer.param_groups]
    added = {**gate_options(old[-1], gates=len(gates), importance_lr=rate), "params": [*gates.values()]}
    added["lr"] = current_gate_lr(stepped_schedulers, old[-1], added)
    if "param_names" in old[-1]:
        added["params"] = [*gates.items()]
    changes = plan_scheduler_updates(all_schedulers, old, added)
    optimizer.add_param_group(added)
    for change in changes:
        change.set()
    check_group_count(all_schedulers, len(optimizer.param_groups))
    return optimizer.param_groups[-1], tuple(type(change.scheduler).__name__ for change in changes if change.lists)


def _find_owner(
    optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, gates: dict[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer with the parameters of the norms that now have gates."""
    sites = {name.rpartition(".")[0] for name in gates}
    known = set(gates.values())
    named = dict(model.named_parameters(remove_duplicate=False))
    norms = {p for name, p in named.items() if name.rpartition(".")[0] in sites and p not in known}
    counts = [len(norms.intersection(p for g in each.param_groups for p in g["params"])) for each in optimizers]
    owners = [each for each, count in zip(optimizers, counts, strict=True) if count] or [*optimizers]
    if len(owners) != 1:
        kinds = ", ".join(type(each).__name__ for each in owners)
        raise OptimizerError(
            f"optimizer: expected one with parameters of norms, got {len(owners)} ({kinds}): convert without "
            "optimizer, then add the gates to one: optimizer.add_param_group(normswap.param_groups(model)[-1])"
        )
    found = owners[0]
    name = type(found).__name__
    if name in _UNSUPPORTED_OPTIMIZERS:
        raise OptimizerError(
            f"optimizer: {name} {_UNSUPPORTED_OPTIMIZERS[name]}: call normswap.convert(model, inplace=True), and train "
            "the gates with a second optimizer, such as "
            'torch.optim.SGD(normswap.param_groups(model)[-1]["params"], lr=0.01)'
        )
    return found


@contextmanager
def _rollback_on_failure(
    models: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    schedulers: Sequence[Any],
    averages: Sequence[Any],
) -> Iterator[None]:
    """Restore models, parameter groups, schedulers and averages if the block raises."""
    groups = [(optimizer, [*optimizer.param_groups]) for optimizer in optimizers]
    all_schedulers = [each for scheduler in schedulers for each in iter_schedulers(scheduler)]
    attributes = [(each, dict(vars(each))) for each in (*all_schedulers, *averages) if hasattr(each, "__dict__")]
    attributes = [(each, values) for each, values in attributes if not isinstance(each, nn.Module)]
    modules = {entry.module: None for model in models for entry in walk_modules(model)}
    try:
        with rollback_on_error(modules):
            yield
    except BaseException:
        for optimizer, old in groups:
            optimizer.param_groups[:] = old
        for each, values in attributes:
            vars(each).clear()
            vars(each).update(values)
        raise


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else [*value] if isinstance(value, list | tuple) else [value]
