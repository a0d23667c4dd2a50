"""Options, filters of sites, and settings by pattern: in Python and in a plan file."""

import json
import pickle
import re
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from normswap import SwapOptions, convert, plan_swaps
from normswap.errors import ArgumentError, PlanError
from normswap.surgery.plan import SwapPlan
from normswap.surgery.selection import first_matching_patterns, matched, resolve_settings
from tests.helpers import guarantees, zoo


class Net(nn.Module):
    """Two BN, a frozen one, one at a single position, and a GroupNorm that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.second, self.frozen = zoo.conv(), nn.BatchNorm2d(8), FrozenBatchNorm2d(8)
        self.group, self.pool, self.pooled = nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8)
        self.again = self.second

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.pool(self.group(self.frozen(self.again(self.conv(x))))))


SITES = ("second", "frozen", "pooled")


def planned(settings: Any, **options: Any) -> SwapPlan:
    return plan_swaps(Net(), zoo.IMAGE(), settings=settings, **options)


def chosen(plan: SwapPlan, key: str) -> dict[str, Any]:
    return {swap.fqn: getattr(swap, key) for swap in plan.swaps}


# --- the options object ----------------------------------------------------------------------------------------------


def test_options_and_keywords_make_the_same_plan() -> None:
    keywords: dict[str, Any] = {"exclude": ["second"], "gate": "softmax", "settings": {"pooled": {"gate": "simplex"}}}
    plan = plan_swaps(Net(), zoo.IMAGE(), **keywords)
    assert plan_swaps(Net(), zoo.IMAGE(), options=SwapOptions(**keywords)) == plan
    assert convert(Net(), zoo.IMAGE(), options=SwapOptions(**keywords)).plan == plan
    assert chosen(plan, "gate") == {"frozen": "softmax", "pooled": "simplex"}


def test_options_are_checked_and_canonical() -> None:
    options = SwapOptions(include="layer4.*", exclude=["a", "b"], kinds=["bn"], branches=["bn", "ln"])
    assert (options.include, options.exclude, options.kinds) == (("layer4.*",), ("a", "b"), ("bn",))
    assert options.branches == ("ln", "bn")
    assert replace(options, branches=None) == SwapOptions(include=("layer4.*",), exclude=("a", "b"))
    assert SwapOptions.default() == SwapOptions() == SwapOptions.from_dict({})
    assert pickle.loads(pickle.dumps(options)) == options
    assert {options, replace(options)} == {options}
    with pytest.raises(FrozenInstanceError):
        options.gate = "softmax"  # type: ignore[misc]


def test_options_come_from_plain_data() -> None:
    data = {"include": ["layer4.*"], "kinds": ["bn", "in"], "settings": {"*": {"branches": ["bn", "in"]}}}
    options = SwapOptions.from_dict(json.loads(json.dumps(data)))
    assert options == SwapOptions(include=("layer4.*",), kinds=("bn", "in"), settings={"*": {"branches": ("in", "bn")}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"gate": "hard"}, "gate: expected 'simplex' or 'softmax', got 'hard'"),
        ({"gat": "softmax"}, r"unknown name 'gat'; did you mean 'gate'\?"),
        ({"include": [3]}, r"include\[0\]: expected a string, got 3"),
        ({"kinds": []}, r"kinds: expected some of \('bn', 'in', 'gn1', 'gn'\), got \(\): pass a list such as"),
        ({"kinds": ["bm"]}, r"kinds: expected some of .*, got \('bm',\)"),
        (
            {"kinds": ["bn", "in"], "branches": ["ln", "bn"]},
            "branches: expected `in` among them, .* of kind 'in' starts",
        ),
        ({"synchronize": 1}, "synchronize: expected true or false, got 1"),
        ([], r"expected a table of named values, got \[\]"),
    ],
)
def test_data_that_is_no_options_is_refused(data: Any, message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}"):
        SwapOptions.from_dict(data)


@pytest.mark.parametrize("function", [convert, plan_swaps])
def test_options_with_keywords_are_refused(function: Any) -> None:
    with pytest.raises(
        PlanError, match=r"got options= together with kinds=, gate=: .* dataclasses.replace\(options, kinds=\.\.\.\)"
    ):
        function(Net(), options=SwapOptions(), gate="simplex", kinds=("bn",))
    with pytest.raises(ArgumentError, match=r"options: expected a SwapOptions, such as .*, got a dict"):
        function(Net(), options={"gate": "softmax"})


def test_a_plan_with_options_or_keywords_is_refused() -> None:
    plan = plan_swaps(Net())
    for options in ({"options": SwapOptions()}, {"gate": "softmax"}, {"include": ["second"]}, {"synchronize": True}):
        with pytest.raises(PlanError, match="got plan= together with options for a plan"):
            convert(Net(), plan=plan, **options)  # type: ignore[arg-type]
    assert convert(Net(), plan=plan, include=[], gate="simplex").plan is plan  # the defaults change nothing


# --- functions as filters ---------------------------------------------------------------------------------------------


def is_frozen(module: nn.Module, fqn: str) -> bool:
    return isinstance(module, FrozenBatchNorm2d)


def test_a_function_selects_sites_by_module_and_name() -> None:
    assert {*chosen(plan_swaps(Net(), include=is_frozen), "gate")} == {"frozen"}
    plan = plan_swaps(Net(), include=["second", lambda module, fqn: fqn == "pooled"], exclude=is_frozen)
    assert {*chosen(plan, "gate")} == {"second", "pooled"}
    reasons = {skip.fqn: skip.reason for skip in plan_swaps(Net(), exclude=[is_frozen]).skips}
    assert reasons["frozen"] == "excluded by the function is_frozen"
    assert {*convert(Net(), options=SwapOptions(include=is_frozen)).replaced} == {"frozen"}


def test_a_function_gets_the_owner_of_a_functional_site() -> None:
    trap = zoo.BY_NAME["functional"]
    model, seen = trap.model(), {}

    def record(module: nn.Module, fqn: str) -> bool:
        seen[fqn] = module
        return True

    plan = plan_swaps(model, trap.inputs(), include=record, **trap.options)
    owners = {swap.fqn: swap.owner for swap in plan.swaps if swap.owner is not None}
    assert owners
    assert all(seen[fqn] is model.get_submodule(owner) for fqn, owner in owners.items())


@pytest.mark.parametrize("kind", ["include", "exclude"])
def test_a_function_that_matches_nothing_is_refused(kind: str) -> None:
    with pytest.raises(
        PlanError, match=r"the function .*<lambda> matches none of the 4 norm sites; the first are \['sec"
    ):
        plan_swaps(Net(), **{kind: lambda module, fqn: False})  # type: ignore[arg-type]


def test_what_is_no_filter_is_refused() -> None:
    with pytest.raises(PlanError, match=r"exclude: expected patterns \(strings\) or functions .*, got 3"):
        plan_swaps(Net(), exclude=["second", 3])  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match="include: expected a list of patterns"):
        plan_swaps(Net(), include=3)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="the function is_frozen needs the modules of a model"):
        first_matching_patterns([is_frozen], [("a",)])


# --- precedence -------------------------------------------------------------------------------------------------------

ENTRIES: dict[str, tuple[dict[str, Any], str, tuple[Any, Any, Any]]] = {
    "none": ({}, "gate", ("simplex", "simplex", "simplex")),
    "one": ({"second": {"gate": "softmax"}}, "gate", ("softmax", "simplex", "simplex")),
    "all": ({"*": {"gate": "softmax"}}, "gate", ("softmax", "softmax", "softmax")),
    "the later wins": (
        {"*": {"gate": "softmax"}, "re:f.*": {"gate": "simplex"}},
        "gate",
        ("softmax", "simplex", "softmax"),
    ),
    "the later wins, though wider": (
        {"second": {"gate": "simplex"}, "*": {"gate": "softmax"}},
        "gate",
        ("softmax", "softmax", "softmax"),
    ),
    "key by key": ({"*": {"gate": "softmax"}, "second": {"train_gates": False}}, "gate", ("softmax",) * 3),
    "by another name": ({"again": {"gate": "softmax"}}, "gate", ("softmax", "simplex", "simplex")),
    "gates that learn": ({"frozen": {"train_gates": True}}, "train_gates", (True, True, True)),
    "gates that do not": ({"second": {"train_gates": False}}, "train_gates", (False, False, True)),
    "branches": (
        {"second": {"branches": ["bn", "ln"]}},
        "branches",
        (("ln", "bn"), ("in", "ln", "bn"), ("ln", "bn")),
    ),
    "branches that the shape cuts": (
        {"*": {"branches": ("in", "ln", "bn")}},
        "branches",
        (("in", "ln", "bn"), ("in", "ln", "bn"), ("ln", "bn")),
    ),
    "statistics, frozen ones too": (
        {"*": {"bn_statistics": "batch"}},
        "bn_statistics",
        ("batch", "batch", "batch"),
    ),
}


@pytest.mark.parametrize(("settings", "key", "expected"), ENTRIES.values(), ids=ENTRIES)
def test_settings_override_the_arguments(settings: Any, key: str, expected: tuple[Any, ...]) -> None:
    assert chosen(planned(settings), key) == dict(zip(SITES, expected, strict=True))


def test_the_arguments_apply_without_a_matching_setting() -> None:
    plan = planned(
        {"second": {"branches": ("in", "bn")}}, branches=("ln", "bn"), bn_statistics="running", gate="softmax"
    )
    assert chosen(plan, "branches") == {"second": ("in", "bn"), "frozen": ("ln", "bn"), "pooled": ("ln", "bn")}
    assert set(chosen(plan, "bn_statistics").values()) == {"running"}
    assert set(chosen(plan, "gate").values()) == {"softmax"}


def test_the_plan_has_them_resolved_and_conversion_carries_them_out() -> None:
    settings = {"second": {"branches": ("ln", "bn"), "train_gates": False, "bn_statistics": "running"}}
    conversion = convert(Net(), zoo.IMAGE(), settings=settings)
    layer = conversion.model.second
    assert (layer.branches, layer.bn_statistics, layer.mean_weight.requires_grad) == (("ln", "bn"), "running", False)
    assert "settings" not in conversion.plan.to_dict()
    guarantees.plan_survives_json(conversion.plan)


def test_the_guarantees_hold_with_settings() -> None:
    trap = zoo.Trap("settings", Net, zoo.IMAGE)
    guarantees.check_all(
        trap.model, trap.inputs(), settings={"*": {"branches": ("ln", "bn")}, "frozen": {"train_gates": True}}
    )


def test_what_the_user_should_know_is_noted() -> None:
    settings = {"frozen": {"bn_statistics": "batch"}, "pooled": {"gate": "softmax"}, "group": {"gate": "softmax"}}
    assert planned(settings, bn_statistics="batch").notes == (
        "The settings of 'group' have no effect: the pattern matches only skipped sites.",
        "Frozen norms are set to use batch statistics, which changes the function in training: frozen.",
        "Softmax gates start at the uniform mix: the converted model computes another function.",
    )


def test_batch_statistics_at_a_frozen_site_are_another_function_in_training_only() -> None:
    model = convert(Net(), zoo.IMAGE(), settings={"frozen": {"bn_statistics": "batch"}}).model
    guarantees.same_function(Net_like(model), model, zoo.IMAGE(), ("evaluation",))
    with pytest.raises(AssertionError, match="guarantee 1, training"):
        guarantees.same_function(Net_like(model), model, zoo.IMAGE(), ("training",))


def Net_like(model: nn.Module) -> nn.Module:  # noqa: N802
    net = Net()
    net.load_state_dict(model.state_dict(), strict=False)
    return net


def test_a_setting_that_leaves_one_branch_skips_the_site() -> None:
    reasons = {
        skip.fqn: skip.reason
        for skip in planned({"*": {"branches": ("in", "bn")}, "second": {"branches": ["bn"]}}).skips
    }
    assert reasons["second"] == "only the branch bn is allowed: nothing to switch to"
    assert reasons["pooled"].startswith("8 channels at one spatial position leave only the branch bn")


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, str]] = {
    "no mapping": ([("*", {})], r"settings: expected a table of named values, got \[[\[(]'\*'"),
    "a pattern that is no string": ({3: {}}, "key of settings: expected a string, got 3"),
    "no mapping inside": ({"*": "softmax"}, r"settings\['\*'\]: expected a table of named values, got 'softmax'"),
    "an unknown key": ({"*": {"gates": "softmax"}}, r"settings\['\*'\]: unknown name 'gates'; did you mean 'gate'\?"),
    "a gate": ({"*": {"gate": "hard"}}, r"settings\['\*'\].gate: expected 'simplex' or 'softmax', got 'hard'"),
    "a branch": ({"*": {"branches": ["gn"]}}, r"settings\['\*'\].branches\[0\]: expected 'in' or 'ln' or 'bn', got"),
    "a branch twice": (
        {"*": {"branches": ["bn", "bn"]}},
        r"settings\['\*'\].branches: expected a non-empty subset of .*, got \('bn', 'bn'\)",
    ),
    "no branches": ({"*": {"branches": []}}, r"settings\['\*'\].branches: expected a non-empty subset"),
    "branches that are no list": ({"*": {"branches": 3}}, r"settings\['\*'\].branches: expected a list, each item"),
    "statistics": (
        {"*": {"bn_statistics": "moving"}},
        r"settings\['\*'\].bn_statistics: expected 'batch' or 'running'",
    ),
    "a flag": ({"*": {"train_gates": 1}}, r"settings\['\*'\].train_gates: expected true or false, got 1"),
    "a pattern": ({"secnd": {}}, r"the pattern 'secnd' matches none of the 4 norm sites; nearest: \['second'"),
    "an expression": ({"re:(": {}}, r"expected a regular expression after `re:`, got 're:\('"),
    "no starting branch": (
        {"second": {"branches": ["in", "ln"]}},
        r"settings of 'second': branches: expected `bn` among them, .* of kind 'bn' starts; got \('in', 'ln'\)",
    ),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_make_no_sense_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        planned(settings)


# --- in a plan file ---------------------------------------------------------------------------------------------------


def read(plan: SwapPlan, settings: Any) -> SwapPlan:
    return SwapPlan.from_json(json.dumps(json.loads(plan.to_json()) | {"settings": settings}))


@pytest.mark.parametrize(("settings", "key", "expected"), [e for e in ENTRIES.values() if "again" not in e[0]])
def test_a_plan_file_takes_the_same_settings(settings: Any, key: str, expected: tuple[Any, ...]) -> None:
    plan = read(planned({}), settings)
    assert chosen(plan, key) == dict(zip(SITES, expected, strict=True))
    assert SwapPlan.from_json(plan.to_json()) == plan
    assert convert(Net(), plan=plan).plan is plan


def test_a_plan_file_adds_bn_to_other_norms_but_nothing_that_was_cut() -> None:
    trap = zoo.BY_NAME["three kinds"]
    plan = read(plan_swaps(trap.model(), trap.inputs(), **trap.options), {"*": {"branches": ["in", "ln", "bn"]}})
    assert set(chosen(plan, "branches").values()) == {("in", "ln", "bn")}
    assert plan.notes[0].startswith("The old norms have no running statistics, so the `bn` branches of instance, group")
    narrow = plan_swaps(Net(), zoo.IMAGE(), branches=("ln", "bn"))
    assert set(chosen(read(narrow, {"*": {"branches": ["in", "ln", "bn"]}}), "branches").values()) == {("ln", "bn")}


IN_A_FILE: dict[str, tuple[Any, str]] = {
    **{name: case for name, case in REFUSED.items() if name not in ("a pattern that is no string", "a pattern")},
    "a pattern": ({"secnd": {}}, r"the pattern 'secnd' matches none of the 3 swaps of the plan; nearest: \['second'"),
    "a skipped site": ({"group": {}}, "the pattern 'group' matches none of the 3 swaps of the plan"),
    "one branch": (
        {"pooled": {"branches": ["in", "bn"]}},
        r"settings of 'pooled': branches: \('in', 'bn'\) leave only 'bn' of \('ln', 'bn'\): nothing to switch to",
    ),
}


@pytest.mark.parametrize(("settings", "message"), IN_A_FILE.values(), ids=IN_A_FILE)
def test_a_plan_file_refuses_what_makes_no_sense(settings: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read(planned({}), settings)


def test_a_plan_file_adds_no_running_statistics_that_are_never_updated() -> None:
    trap = zoo.BY_NAME["three kinds"]
    plan = plan_swaps(trap.model(), trap.inputs(), **trap.options)
    with pytest.raises(
        PlanError, match="settings of 'instance': bn_statistics: expected 'batch' or 'renorm', since the old"
    ):
        read(plan, {"instance": {"branches": ["in", "bn"], "bn_statistics": "running"}})


# --- the parts --------------------------------------------------------------------------------------------------------


def test_patterns_match_any_name_and_give_the_first() -> None:
    sites = [("a.bn", "b.bn"), ("a.norm",), ("",)]
    assert matched("b.*", sites) == ["a.bn"]
    assert matched("re:a\\..*", sites) == ["a.bn", "a.norm"]
    assert first_matching_patterns(["*.norm", "*"], sites) == {"a.norm": "*.norm", "a.bn": "*", "": "*"}
    assert first_matching_patterns("a.*", sites) == {"a.bn": "a.*", "a.norm": "a.*"}
    with pytest.raises(PlanError, match=re.escape("the pattern 'a' matches none of the 3 things; nearest:")):
        matched("a", sites, "things")


def test_resolved_values_are_checked_and_canonical() -> None:
    found = resolve_settings({"*": {"branches": ["bn", "in"]}, "a": {"train_gates": True}}, [("a",), ("b",)])
    assert found == {"a": {"branches": ("in", "bn"), "train_gates": True}, "b": {"branches": ("in", "bn")}}
    assert resolve_settings({}, [("a",)]) == {"a": {}}


@pytest.mark.parametrize("name", ["include", "exclude"])
def test_what_is_no_filter_is_refused_by_the_name_of_its_argument(name: str) -> None:
    functions = f"{name}: expected patterns (strings) or functions (module, fqn) -> bool, got"
    for value, text in (
        (3, f"{name}: expected a list of patterns such as ['layer4.*'], got an int"),
        (None, f"{name}: expected a list of patterns such as ['layer4.*'], got None"),
        (b"layer4", f"{name}: expected patterns (strings), got b'layer4': pass a str"),
        ([3], f"{functions} 3"),
        (
            nn.BatchNorm2d,
            f"{functions} the class BatchNorm2d: pass lambda module, fqn: isinstance(module, BatchNorm2d)",
        ),
        ([nn.BatchNorm2d(3)], f"{functions} the module BatchNorm2d: pass lambda"),
    ):
        with pytest.raises((PlanError, ArgumentError), match=re.escape(text)):
            SwapOptions(**{name: value})


def test_equal_options_are_equal_in_any_order() -> None:
    first, second = (
        SwapOptions(kinds=kinds, branches=branches)
        for kinds, branches in ((("in", "bn"), ["bn", "in"]), (["bn", "in", "in"], ("in", "bn")))
    )
    assert first == second
    assert hash(first) == hash(second)


def test_options_round_trip_through_json() -> None:
    options = SwapOptions(include="layer4.*", kinds=("gn1", "bn"), settings={"*.bn1": {"branches": ["bn", "ln"]}})
    assert SwapOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    assert SwapOptions.from_dict(SwapOptions().to_dict()) == SwapOptions()
    with pytest.raises(
        PlanError, match=r"exclude: the function .*<lambda> cannot be written as plain data: use a pattern"
    ):
        SwapOptions(exclude=lambda module, fqn: True).to_dict()
