"""Checks of all guarantees on one conversion."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import normswap
from tests.helpers.guarantees.accounting import accounted_for
from tests.helpers.guarantees.equivalence import same_function
from tests.helpers.guarantees.gate_gradients import alive
from tests.helpers.guarantees.round_trips import converting_twice_changes_nothing, plan_survives_json, reverts
from tests.helpers.guarantees.unchanged import Record, identical, nothing_else_changed
from tests.helpers.guarantees.walking import MODES, NO_SWAPS, own_tensors


@dataclass(frozen=True)
class Checked:
    """A conversion that passed all checks, its errors by mode, and the number of gates compared with the oracle."""

    conversion: normswap.Conversion
    errors: dict[str, float | None]
    gates: int


def check_all(make: Callable[[], nn.Module], inputs: Any, *, modes: tuple[str, ...] = MODES, **options: Any) -> Checked:
    """Check all guarantees on one conversion, on a copy and in place, in these modes."""
    original = make()
    before = Record.of(original)
    conversion = normswap.convert(original, inputs, **options)
    model, plan = conversion.model, conversion.plan
    nothing_else_changed(before, original, NO_SWAPS, same_objects=True)
    nothing_else_changed(before, model, plan, same_objects=False)
    shared = {id(t) for _, t in own_tensors(model)} & {id(t) for _, t in own_tensors(original)}
    assert not shared, "the copy shares tensors with the original"

    inplace = make()
    record = Record.of(inplace)
    optimizer_owns = [p for group in _optimizer_groups(inplace) for p in group]
    norms = _only(options, "norms")
    second = normswap.convert(inplace, inputs, inplace=True, plan=plan_survives_json(plan), **norms)
    assert second.model is inplace, "another model came back"
    nothing_else_changed(record, inplace, plan, same_objects=True)
    assert {id(p) for p in optimizer_owns} <= {id(p) for p in inplace.parameters()}, (
        "guarantee 2: the optimizer is stale"
    )
    for (name, a), (other, b) in itertools.zip_longest(own_tensors(model), own_tensors(inplace)):
        assert name == other, f"{name} is {other} in place"
        assert identical(a, b), f"{name} differs between copy and in place"

    errors = {} if inputs is None else same_function(original, model, inputs, modes)
    gates = 0 if inputs is None else alive(model, list(conversion.replaced), inputs)
    accounted_for(original, plan, inputs, options.get("norms"))
    reverts(make(), inputs, plan=plan, **norms)
    converting_twice_changes_nothing(model, plan, inputs, **_only(options, "norms", "kinds"))
    return Checked(conversion, errors, gates)


def _only(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}


def _optimizer_groups(model: nn.Module) -> list[list[nn.Parameter]]:
    parameters = list(model.parameters())
    if not parameters:
        return []
    return [group["params"] for group in torch.optim.SGD(parameters, lr=0.1).param_groups]
