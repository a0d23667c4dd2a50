"""convert, apply_plan and revert: to the letter, all or nothing, and refused in words where they cannot."""

import copy
import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap import KNOWN_NORMS, SwitchNorm2d, apply_plan, convert, plan_swaps, read_batch_norm, revert
from normswap.errors import PlanError, SwapError
from normswap.layers.gated_module import FunctionalSwitchNorm
from normswap.surgery import conversion
from normswap.surgery.plan import SwapPlan
from tests.helpers import guarantees, zoo

NOTHING = SwapPlan((), (), "")


def unchanged(record: guarantees.Record, model: nn.Module) -> None:
    guarantees.nothing_else_changed(record, model, NOTHING, same_objects=True)


# --- what comes back --------------------------------------------------------------------------------------------------


def test_the_new_layers_come_by_name() -> None:
    model, plan, replaced = convert(zoo.Generator())
    assert list(replaced) == [swap.fqn for swap in plan.swaps]
    assert [type(layer) for layer in replaced.values()] == [FunctionalSwitchNorm, FunctionalSwitchNorm, SwitchNorm2d]
    assert all(model.get_submodule(name) is layer for name, layer in replaced.items())


def test_a_copy_by_default_and_the_model_itself_on_request() -> None:
    model = zoo.BY_NAME["functional"].model()
    record = guarantees.Record.of(model)
    assert convert(model).model is not model
    unchanged(record, model)
    assert convert(model, inplace=True).model is model


def test_with_nothing_to_swap_the_plan_says_why() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    result = convert(model)
    assert (result.plan.swaps, result.replaced) == ((), {})
    assert [skip.fqn for skip in result.plan.skips] == ["1"]
    assert convert(nn.Linear(2, 2)).plan == SwapPlan((), (), "torch.nn.modules.linear.Linear", None, result.plan.notes)


def test_an_optimizer_built_before_trains_the_converted_model() -> None:
    model = zoo.BY_NAME["half-frozen"].model()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    convert(model, inplace=True)
    before = [parameter.detach().clone() for parameter in trainable]
    model(zoo.IMAGE()).square().sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, before, trainable))


def test_gates_follow_dtype_device_and_mode_of_their_site() -> None:
    for model in (zoo.Chain(zoo.bn()).to(torch.bfloat16).eval(), zoo.FunctionalBlock().to(torch.bfloat16).eval()):
        for layer in convert(model).replaced.values():
            assert (layer.mean_weight.dtype, layer.training) == (torch.bfloat16, False)
    meta = convert(nn.Sequential(zoo.FunctionalBlock(), zoo.bn()).to("meta"))
    assert {layer.var_weight.device.type for layer in meta.replaced.values()} == {"meta"}


def test_references_outside_the_model_stay_right_in_place() -> None:
    model = zoo.BY_NAME["two names"].model()
    seen: list[Tensor] = []
    held = {"mine": model.bn}
    closure: Callable[[], nn.Module] = lambda: held["mine"]  # noqa: E731
    model.bn.register_forward_hook(lambda *args: seen.append(args[2]))
    convert(model, inplace=True)
    assert closure() is model.bn is model.alias
    assert isinstance(closure(), SwitchNorm2d)
    model(zoo.IMAGE())
    assert len(seen) == 2


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_is_carried_out_to_the_letter() -> None:
    model = zoo.Chain(zoo.bn(), zoo.bn())
    plan = plan_swaps(model, zoo.IMAGE())
    first = replace(plan.swaps[0], branches=("ln", "bn"), gate="softmax", bn_statistics="running", train_gates=False)
    edited = replace(plan, swaps=(first,))
    result = convert(model, plan=edited)
    layer = result.model[1]
    assert (layer.branches, layer.gate, layer.bn_statistics) == (("ln", "bn"), "softmax", "running")
    assert not layer.mean_weight.requires_grad
    assert type(result.model[2]) is nn.BatchNorm2d
    assert result.plan is edited
    assert list(apply_plan(model, edited)) == ["1"]


@pytest.mark.parametrize(
    "options",
    [
        {"include": ["1"]},
        {"exclude": ["1"]},
        {"branches": ("ln", "bn")},
        {"gate": "softmax"},
        {"bn_statistics": "batch"},
        {"train_frozen_gates": True},
        {"start": "ln"},
        {"match": False},
        {"untrained": "uniform"},
        {"kinds": ["in"]},
        {"settings": {"1": {"gate": "softmax"}}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_plan_excludes_the_deciding_arguments(options: dict[str, Any]) -> None:
    model = zoo.Chain(zoo.bn())
    with pytest.raises(PlanError, match="got plan= together with options for a plan"):
        convert(model, plan=plan_swaps(model), **options)


def swap(plan: SwapPlan, **changes: Any) -> SwapPlan:
    return replace(plan, swaps=(replace(plan.swaps[0], **changes), *plan.swaps[1:]))


def other(**changes: Any) -> Callable[[SwapPlan], SwapPlan]:
    return lambda plan: swap(plan, **changes)


MISFITS: dict[str, tuple[Callable[[], nn.Module], Callable[[SwapPlan], SwapPlan], str]] = {
    "a name": (zoo.TwoNames, other(fqn="bn9"), "bn9: not in this model"),
    "an owner": (zoo.FunctionalBlock, other(owner="block"), "batch_norm: not in this model"),
    "a class": (
        zoo.TwoNames,
        other(class_name="torch.nn.modules.batchnorm.BatchNorm1d"),
        "bn: expected torch.nn.modules.batchnorm.BatchNorm1d, got torch.nn.modules.batchnorm.BatchNorm2d",
    ),
    "no norm": (zoo.TwoNames, other(fqn="conv"), "conv: expected .*BatchNorm2d, got .*Conv2d"),
    "channels": (zoo.TwoNames, other(num_features=9), "bn: expected 9 channels, got 8"),
    "twice": (zoo.TwoNames, lambda plan: replace(plan, swaps=plan.swaps * 2), "bn: planned twice, also as bn"),
    "by an alias": (
        zoo.TwoNames,
        lambda plan: replace(plan, swaps=(*plan.swaps, replace(plan.swaps[0], fqn="alias"))),
        "alias: planned twice, also as bn",
    ),
    "a call twice": (
        zoo.FunctionalBlock,
        lambda plan: replace(plan, swaps=plan.swaps * 2),
        "batch_norm: planned twice, also as batch_norm",
    ),
}


@pytest.mark.parametrize(("make", "edit", "message"), MISFITS.values(), ids=MISFITS)
def test_a_plan_for_another_model_is_refused(
    make: Callable[[], nn.Module], edit: Callable[[SwapPlan], SwapPlan], message: str
) -> None:
    model = make()
    record, plan = guarantees.Record.of(model), edit(plan_swaps(model))
    with pytest.raises(
        PlanError, match=rf"the plan was made for another model \([\w.]*\.zoo\.[\w.]+\): {message}; make a plan"
    ):
        apply_plan(model, plan)
    unchanged(record, model)


def test_many_misfits_are_counted() -> None:
    plan = plan_swaps(nn.Sequential(*(zoo.bn(4) for _ in range(5))))
    with pytest.raises(PlanError, match=r"0: expected 4 channels, got 3; 1: .*; 2: .* \(\+2 more\); make a plan"):
        apply_plan(nn.Sequential(*(zoo.bn(3) for _ in range(5))), plan)


def test_a_plan_is_refused_where_the_owner_calls_something_else() -> None:
    plan = plan_swaps(nn.Sequential(zoo.TwiceBlock()))
    model = nn.Sequential(zoo.FunctionalBlock())
    model[0].first = zoo.FunctionalBlock()
    record = guarantees.Record.of(model)
    message = (
        "0: the plan names the batch_norm calls ['0.batch_norm', '0.batch_norm_1'], and its forward has ['batch_norm']"
    )
    with pytest.raises(SwapError, match=re.escape(message)):
        apply_plan(model, plan)
    unchanged(record, model)


def test_a_plan_is_refused_where_the_owner_cannot_be_rewritten() -> None:
    plan = plan_swaps(zoo.FunctionalBlock())
    model = zoo.UntraceableCall()
    with pytest.raises(SwapError, match=r"the model: the plan names the batch_norm calls .*, and its forward has"):
        apply_plan(model, plan)
    assert type(model) is zoo.UntraceableCall


def test_sites_are_synchronized_where_they_were_or_as_requested() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.SyncBatchNorm(8), nn.BatchNorm2d(8))
    assert [swap.synchronize for swap in plan_swaps(model).swaps] == [False, True, False]
    settings = {"1": {"synchronize": False}, "2": {"synchronize": True}}
    plan = plan_swaps(model, settings=settings)  # type: ignore[arg-type]
    assert [swap.synchronize for swap in plan.swaps] == [False, False, True]
    assert SwapPlan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="got plan= together with options for a plan"):
        convert(model, plan=plan, synchronize=True)
    assert [layer.synchronize for layer in convert(model, plan=plan).model] == [False, False, True]
    assert all(layer.synchronize for layer in convert(model, synchronize=True).model)
    without = nn.Sequential(nn.InstanceNorm2d(8), nn.BatchNorm2d(8))
    assert [s.synchronize for s in plan_swaps(without, kinds=("bn", "in"), synchronize=True).swaps] == [False, True]


def test_a_functional_site_is_synchronized_as_requested() -> None:
    plan = plan_swaps(zoo.FunctionalBlock(), synchronize=True)
    assert plan.swaps
    replaced = convert(zoo.FunctionalBlock(), plan=plan).replaced
    assert all(layer.synchronize for layer in replaced.values())
    assert not any(layer.synchronize for layer in convert(zoo.FunctionalBlock()).replaced.values())


# --- all or nothing ---------------------------------------------------------------------------------------------------


class Slotted(nn.BatchNorm2d):
    """Python cannot give such an object another class."""

    __slots__ = ("mark",)


STUBBORN = KNOWN_NORMS | {Slotted: read_batch_norm}


def stubborn() -> nn.Module:
    """Every kind of site, and last one that refuses."""
    torch.manual_seed(1)
    model = nn.Sequential(zoo.TwiceBlock(), zoo.conv(12, 8), zoo.bn(), zoo.HandMadeNorm(), Slotted(8))
    return zoo.randomise(model)


REFUSAL = rf"4: Python cannot change a {__name__}.Slotted into a SwitchNorm .*layout differs.*: pass exclude=\['4'\]"


def test_a_failure_in_the_middle_leaves_the_model_as_it_was() -> None:
    model = stubborn()
    record = guarantees.Record.of(model)
    with pytest.raises(SwapError, match=REFUSAL):
        convert(model, zoo.IMAGE(), inplace=True, norms=STUBBORN)
    unchanged(record, model)
    held = convert(model, zoo.IMAGE(), inplace=True, norms=STUBBORN, exclude=["4"])
    assert len(held.plan.swaps) == 4
    guarantees.nothing_else_changed(record, model, held.plan, same_objects=True)


def test_an_earlier_conversion_survives_the_failure_of_a_later_one() -> None:
    model = stubborn()
    original = copy.deepcopy(model)
    first = convert(model, zoo.IMAGE(), inplace=True, include=["0.batch_norm", "2"])
    record = guarantees.Record.of(model)
    with pytest.raises(SwapError, match=REFUSAL):
        convert(model, zoo.IMAGE(), inplace=True, norms=STUBBORN)
    unchanged(record, model)
    assert [s.fqn for s in first.plan.swaps] == ["0.batch_norm", "2"]
    guarantees.same_function(original, model, zoo.IMAGE())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_any_failure_is_undone(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    model = stubborn()
    record, plan = guarantees.Record.of(model), plan_swaps(model)
    monkeypatch.setattr(conversion, "convert_module", fail)
    with pytest.raises(error):
        apply_plan(model, plan)
    unchanged(record, model)


@pytest.mark.slow
def test_sites_of_one_owner_can_be_converted_one_after_the_other() -> None:
    original = zoo.BY_NAME["two calls"].model()
    model = copy.deepcopy(original)
    for names in (["batch_norm_1"], ["batch_norm"], ["first.batch_norm"]):
        result = convert(model, zoo.IMAGE(), inplace=True, include=names)
        assert [s.fqn for s in result.plan.swaps] == names
    assert type(model).__mro__[2] is zoo.TwiceBlock  # rewritten once, not on top of itself
    assert guarantees.norm_calls(model, zoo.IMAGE(), "training") == 0
    guarantees.same_function(original, model, zoo.IMAGE())
    again = copy.deepcopy(model)
    guarantees.same_function(original, again, zoo.IMAGE())
    assert type(revert(model)) is zoo.TwiceBlock
    assert model.state_dict().keys() == original.state_dict().keys()


# --- models that are refused ------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_copied_is_refused_with_the_way_out() -> None:
    model = zoo.BY_NAME["half-frozen"].model()
    model.handle = (item for item in ())
    with pytest.raises(
        SwapError, match=r"the model cannot be copied \(cannot pickle 'generator' object\): pass inplace"
    ):
        convert(model)
    assert len(convert(model, inplace=True).plan.swaps) == 2


# --- revert -----------------------------------------------------------------------------------------------------------


def moved(model: nn.Module, *names: str) -> nn.Module:
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).mean_weight.copy_(torch.tensor([0.25, 0.0, 0.75]))
    return model


@pytest.mark.parametrize("name", ["two calls", "half-frozen", "BatchNormAct2d", "in a list and a dict only"])
def test_revert_undoes_a_conversion_that_was_trained_elsewhere(name: str) -> None:
    trap = zoo.BY_NAME[name]
    original, converted = trap.model(), convert(trap.model(), trap.inputs()).model
    with torch.no_grad():
        for model in (original, converted):
            for tensor in dict(guarantees.own_tensors(original)):
                dict(guarantees.own_tensors(model))[tensor].add_(1)
    assert revert(converted) is converted
    guarantees.nothing_else_changed(guarantees.Record.of(original), converted, NOTHING, same_objects=False)


def test_reverting_learned_importance_is_refused_unless_it_is_to_be_discarded() -> None:
    model = convert(nn.Sequential(*(zoo.BY_NAME["two calls"].model(), zoo.conv(12), zoo.bn(), zoo.bn()))).model
    names = ["0.first.batch_norm", "0.batch_norm", "2", "3"]
    moved(model, *names[:2])
    record = guarantees.Record.of(model)
    message = "the importance weights of 2 sites differ from the old norm (0.first.batch_norm, 0.batch_norm): "
    with pytest.raises(SwapError, match=re.escape(message)):
        revert(model)
    unchanged(record, model)
    moved(model, *names)
    with pytest.raises(SwapError, match=r"of 4 sites differ from the old norm \(.*, 2, 3\): reverting"):
        revert(model)
    assert type(revert(model, discard=True)[0]) is zoo.TwiceBlock
    assert not any("_weight" in name for name in model.state_dict())


def test_softmax_gates_start_elsewhere_and_so_are_refused() -> None:
    model = convert(zoo.Chain(zoo.bn()), gate="softmax").model
    with pytest.raises(SwapError, match="the importance weights of 1 site differ from the old norm"):
        revert(model)
    assert type(revert(model, discard=True)[1]) is nn.BatchNorm2d


def test_a_layer_that_replaced_nothing_cannot_be_put_back() -> None:
    model = convert(nn.Sequential(zoo.BY_NAME["two calls"].model(), zoo.bn())).model
    model.append(SwitchNorm2d(8, gate="simplex"))
    moved(model, "2")
    record = guarantees.Record.of(model)
    with pytest.raises(SwapError, match=r"expected a layer made by normswap\.convert, got a SwitchNorm2d that"):
        revert(model, discard=True)
    unchanged(record, model)


def test_a_class_that_is_gone_is_to_be_imported_first(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = types.ModuleType("foreign_norms")
    foreign.Norm = type("Norm", (nn.BatchNorm2d,), {"__module__": "foreign_norms"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "foreign_norms", foreign)
    model = nn.Sequential(zoo.bn(), zoo.FunctionalBlock(8), foreign.Norm(8))
    convert(model, inplace=True, norms=KNOWN_NORMS | {foreign.Norm: read_batch_norm})
    record = guarantees.Record.of(model)
    monkeypatch.delitem(sys.modules, "foreign_norms")
    with pytest.raises(
        SwapError, match=r"cannot put back foreign_norms\.Norm, whose module is not imported: import it"
    ):
        revert(model)
    unchanged(record, model)
    monkeypatch.setitem(sys.modules, "foreign_norms", foreign)
    assert type(revert(model)[2]) is foreign.Norm


def test_reverting_a_model_that_was_never_converted_does_nothing() -> None:
    model = zoo.BY_NAME["half-frozen"].model()
    record = guarantees.Record.of(model)
    assert revert(model) is model
    unchanged(record, model)
