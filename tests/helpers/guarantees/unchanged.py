"""Guarantee 2: a conversion changes nothing but the sites of its plan."""

from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.surgery.plan import SwapPlan
from tests.helpers.guarantees.walking import CONSTANTS, GATES, STATISTICS, own_tensors, paths


@dataclass
class Record:
    """A model as it was: every path, tensor, flag, hook and attribute, with the identity of each object."""

    modules: dict[str, nn.Module]
    classes: dict[str, type]
    flags: dict[str, bool]
    attributes: dict[str, dict[str, Any]]
    hooks: dict[str, dict[str, list[Any]]]
    tensors: dict[str, Tensor]
    values: dict[str, Tensor]
    gradients: dict[str, bool]
    state: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, *, lasting: bool = True) -> "Record":
        """Without `lasting` the values are the model's own tensors: to be compared before anything changes them."""

        def kept(tensor: Tensor) -> Tensor:
            own = not lasting and tensor.is_contiguous()  # the copy of another one may have other strides
            return tensor.detach() if own else tensor.detach().clone()

        modules, tensors = paths(model), dict(own_tensors(model))
        plain = {path: module for path, module in modules.items() if not isinstance(module, torch.jit.ScriptModule)}
        return cls(
            modules=modules,
            classes={path: type(module) for path, module in modules.items()},
            flags={path: module.training for path, module in modules.items()},
            attributes={path: dict(vars(module)) for path, module in plain.items()},
            hooks={
                path: {
                    n: list(v.values()) for n, v in vars(module).items() if n.endswith("_hooks") and isinstance(v, dict)
                }
                for path, module in plain.items()
            },
            tensors=tensors,
            values={name: kept(tensor) for name, tensor in tensors.items() if not is_lazy(tensor)},
            gradients={name: tensor.requires_grad for name, tensor in tensors.items()},
            state={name: kept(value) for name, value in model.state_dict().items() if not is_lazy(value)},
        )

    def aliases(self) -> set[frozenset[str]]:
        """The groups of names that mean one object."""
        groups: dict[int, set[str]] = {}
        for name, thing in (*self.modules.items(), *self.tensors.items()):
            groups.setdefault(id(thing), set()).add(name)
        return {frozenset(group) for group in groups.values()}


def is_lazy(tensor: Any) -> bool:
    return nn.parameter.is_lazy(tensor)


def identical(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride()) and torch.equal(a, b)


def planned_names(plan: SwapPlan, record: Record) -> set[str]:
    """The names of the gates, statistics and matching constants that a plan brings, under every path of a site."""
    names = set()
    for swap in plan.swaps:
        site = swap.fqn if swap.owner is None else swap.owner
        suffix = "" if swap.owner is None else swap.fqn.removeprefix(swap.owner).removeprefix(".")
        for path, module in record.modules.items():
            if module is record.modules[site]:
                begun = STATISTICS if swap.kind in ("in", "gn1", "gn") and "bn" in swap.branches else ()
                matching = [name for name, branch in CONSTANTS.items() if swap.matched and branch in swap.branches]
                added = (*GATES, *begun, *matching)
                names |= {".".join(part for part in (path, suffix, name) if part) for name in added}
    return names


def nothing_else_changed(before: Record, converted: nn.Module, plan: SwapPlan, *, same_objects: bool) -> None:
    """Guarantee 2. With `same_objects` the model was converted in place, and every object must still be that object."""
    after = Record.of(converted, lasting=False)
    new = planned_names(plan, before)
    assert set(after.tensors) == set(before.tensors) | new, (
        f"guarantee 2: {set(after.tensors) ^ set(before.tensors) ^ new}"
    )
    added = set(after.state) - set(before.state)
    assert set(before.state) <= set(after.state), f"guarantee 2: lost keys {set(before.state) - set(after.state)}"
    assert added <= new, f"guarantee 2: unplanned keys {added - new}"
    for name, value in before.values.items():
        assert identical(value, after.values[name]), f"guarantee 2: {name} is not bit-identical"
        scripted = name.rpartition(".")[0] not in before.attributes  # a copy of TorchScript has no Parameters
        same_class = type(before.tensors[name]) is type(after.tensors[name])
        assert scripted or same_class, f"guarantee 2: {name} changed its class"
        assert before.gradients[name] == after.gradients[name], f"guarantee 2: {name}.requires_grad changed"
    for name, value in before.state.items():
        assert identical(value, after.state[name]), f"guarantee 2: {name} of the state dict is not bit-identical"
    functional = {swap.fqn for swap in plan.swaps if swap.owner is not None}
    _same_modules(before, after, {s.fqn for s in plan.swaps} - functional, {s.owner for s in plan.swaps} - {None})
    old_names = {*before.modules, *before.tensors}
    grouped = {group & old_names for group in after.aliases()} - {frozenset()}
    assert grouped == before.aliases(), f"guarantee 2: aliases {grouped ^ before.aliases()}"
    if same_objects:
        for name, thing in (*before.modules.items(), *before.tensors.items()):
            assert (after.modules | after.tensors)[name] is thing, f"guarantee 2: {name} is another object"


def _same_modules(before: Record, after: Record, swapped: set[str], owners: set[Any]) -> None:
    """Classes, flags, hooks and attributes; a swapped module and an owner may only gain."""
    changed = {id(before.modules[path]) for path in swapped}
    rewritten = {id(before.modules[path]) for path in owners}
    for path, module in before.modules.items():
        cls, now = before.classes[path], after.classes[path]
        if id(module) in changed:
            assert now.__name__.startswith("SwitchNorm"), f"guarantee 2: {path} is a {now.__name__}"
            assert not issubclass(now, nn.modules.batchnorm._NormBase), (
                f"guarantee 2: {path} would be taken for a BatchNorm"
            )
        elif id(module) in rewritten:
            # Every GraphModule has a class of its own, also a copy of one.
            kept = fx.GraphModule if issubclass(cls, fx.GraphModule) else cls
            assert issubclass(now, kept), f"guarantee 2: {path} is no {cls.__name__} any more"
            assert (now.__name__, now.__qualname__, now.__module__) == (cls.__name__, cls.__qualname__, cls.__module__)
        elif module is after.modules[path] or not isinstance(module, fx.GraphModule | torch.jit.ScriptModule):
            assert now is cls, f"guarantee 2: {path} became a {now.__name__}"
        assert before.flags[path] == after.flags[path], f"guarantee 2: {path}.training changed"
        copied = module is not after.modules[path]
        assert _same_hooks(before.hooks.get(path), after.hooks.get(path), copied), (
            f"guarantee 2: hooks of {path} changed"
        )
        lost = set(before.attributes.get(path, ())) - set(after.attributes.get(path, ()))
        assert not lost, f"guarantee 2: {path} lost {lost}"


def _same_hooks(before: Any, after: Any, copied: bool) -> bool:
    """The very same, or in a copy, as `copy.deepcopy` does it, their copies where they are objects or bound methods."""
    if before == after or not copied:
        return before == after
    pairs = [(before[name], after.get(name, [])) for name in before]
    return before.keys() == after.keys() and all(
        len(a) == len(b) and all(x == y or _is_copy(x, y) for x, y in zip(a, b, strict=True)) for a, b in pairs
    )


def _is_copy(hook: Any, other: Any) -> bool:
    plain = isinstance(hook, FunctionType)
    return not plain and type(hook) is type(other) and getattr(hook, "__func__", 0) == getattr(other, "__func__", 0)
