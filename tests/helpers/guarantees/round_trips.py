"""Guarantee 5: reverting, plans as JSON, and converting twice."""

from typing import Any

from torch import fx, nn

import normswap
from normswap.surgery.plan import SwapPlan
from tests.helpers.guarantees.unchanged import Record, identical, nothing_else_changed

GENERATED = ("_graph", "_code", "_lineno_map", "_prologue_start", "_in_spec")


def reverts(model: nn.Module, inputs: Any, **options: Any) -> None:
    """Guarantee 5: revert after convert, in place, is the identity, down to classes, attributes and objects."""
    before = Record.of(model)
    normswap.convert(model, inputs, inplace=True, **options)
    assert normswap.revert(model) is model
    after = Record.of(model, lasting=False)
    assert after.classes == before.classes, "guarantee 5: classes"
    assert after.flags == before.flags, "guarantee 5: flags"
    assert after.hooks == before.hooks, "guarantee 5: hooks"
    for path, attributes in before.attributes.items():
        now = after.attributes[path]
        assert list(now) == list(attributes), f"guarantee 5: attributes of {path}: {set(now) ^ set(attributes)}"
        graph = isinstance(before.modules[path], fx.GraphModule)  # its code is generated again
        same = [name for name, value in attributes.items() if now[name] is value or (graph and name in GENERATED)]
        assert len(same) == len(attributes), f"guarantee 5: attributes of {path}: {set(attributes) - set(same)}"
    for name, thing in (*before.modules.items(), *before.tensors.items()):
        assert (after.modules | after.tensors)[name] is thing, f"guarantee 5: {name} is another object"
    assert after.tensors.keys() == before.tensors.keys(), "guarantee 5: tensors"
    assert list(after.state) == list(before.state), "guarantee 5: state-dict keys"
    for name, value in before.values.items():
        assert identical(value, after.values[name]), f"guarantee 5: {name} is not bit-identical"


def plan_survives_json(plan: SwapPlan) -> SwapPlan:
    """Guarantee 5: plan -> JSON -> plan is equal."""
    again = SwapPlan.from_json(plan.to_json())
    assert again == plan, "guarantee 5: the plan changed on its way through JSON"
    return again


def converting_twice_changes_nothing(converted: nn.Module, plan: SwapPlan, inputs: Any, **options: Any) -> None:
    """Guarantee 5: the second conversion swaps nothing, says so for each site, and leaves model and objects alone."""
    before = Record.of(converted)
    again = normswap.convert(converted, inputs, inplace=True, **options)
    assert again.plan.swaps == (), f"guarantee 5: swapped again {again.plan.swaps}"
    assert again.replaced == {}, "guarantee 5: replaced something again"
    said = {skip.fqn for skip in again.plan.skips if "already" in skip.reason}
    assert said == {swap.fqn for swap in plan.swaps}, f"guarantee 5: {said} are said to be converted already"
    nothing_else_changed(before, converted, again.plan, same_objects=True)
