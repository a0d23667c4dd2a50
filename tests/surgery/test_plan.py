"""Plans: what is decided for which site, the patterns, and the JSON that can be edited and fed back."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import timm
import torch
from torch import Tensor, nn

from normswap.errors import ModelError, PlanError
from normswap.layers.gating import Branch
from normswap.surgery.discovery.sites import find_norm_sites
from normswap.surgery.plan import SwapPlan
from normswap.surgery.planning import plan_swaps


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
        self.tiny = nn.Sequential(nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4))
        self.single = nn.Sequential(nn.Conv2d(4, 1, 1), nn.BatchNorm2d(1))
        self.wide = nn.Conv2d(1, 16, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.pooled = nn.BatchNorm2d(16)
        self.narrow = nn.Sequential(nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.wide(self.single(self.tiny(self.stem(x)))))
        return self.narrow(self.pooled(self.pool(x)))


X = torch.zeros(2, 3, 9, 9)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def plan(net: Net) -> SwapPlan:
    return plan_swaps(net, X)


def test_branches_follow_the_shape_of_each_site(plan: SwapPlan) -> None:
    assert {swap.fqn: swap.branches for swap in plan.swaps} == {
        "stem.1": ("in", "ln", "bn"),
        "tiny.1": ("in", "ln", "bn"),
        "single.1": ("in", "bn"),  # one channel: LN is IN
        "pooled": ("ln", "bn"),  # one position: IN has no variance
    }


def test_swaps_and_skips_are_all_the_sites_in_order(net: Net, plan: SwapPlan) -> None:
    sites = [site.fqn for site in find_norm_sites(net, X)]
    assert sites == ["stem.1", "tiny.1", "single.1", "norm", "pooled", "narrow.1"]
    decided = {item.fqn for item in (*plan.swaps, *plan.skips)}
    assert decided == set(sites)
    assert len(plan.swaps) + len(plan.skips) == len(sites)


def test_every_skip_has_a_reason_of_its_own(plan: SwapPlan) -> None:
    reasons = {skip.fqn: skip.reason for skip in plan.skips}
    assert "has no batch statistics" in reasons["norm"]
    assert reasons["narrow.1"].startswith("4 channels at one spatial position leave only the branch bn")


def test_without_an_input_sizes_are_unknown_and_the_plan_says_so(net: Net) -> None:
    plan = plan_swaps(net)
    assert {swap.fqn: swap.branches for swap in plan.swaps}["pooled"] == ("in", "ln", "bn")
    assert plan.notes[0].startswith("Planned without example inputs, so spatial sizes are unknown.")
    assert plan.inputs is None


@pytest.mark.parametrize(
    ("size", "default", "note"),
    [
        (
            32,
            64,
            "The example input (32x32) is smaller than the model's default (64x64). 3 layers with a 1x1 map here were "
            "planned without instance norm; pass example_inputs=torch.randn(2, 3, 64, 64).",
        ),
        (
            64,
            32,
            "The example input (64x64) is larger than the model's default (32x32). 3 layers with a 1x1 map at 32x32 "
            "were planned with instance norm, which has no variance there; pass "
            "example_inputs=torch.randn(2, 3, 32, 32).",
        ),
        (64, 64, None),
        (64, 96, None),  # smaller, and no site is affected
        (96, 64, None),  # larger, and no site is affected
    ],
)
def test_another_input_size_is_noted_only_if_a_site_is_affected(size: int, default: int, note: str | None) -> None:
    model = timm.create_model("resnet10t", pretrained_cfg_overlay={"input_size": (3, default, default)})
    plan = plan_swaps(model, torch.zeros(2, 3, size, size), bn_statistics="batch")
    assert plan.notes == (() if note is None else (note,))


def test_maps_that_are_1x1_at_every_input_size_are_no_reason_for_a_note() -> None:
    model = timm.create_model("resnet10t")
    model.fc = nn.Identity()
    model.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(512), nn.Flatten())
    plan = plan_swaps(model, torch.zeros(2, 3, 64, 64), bn_statistics="batch")
    assert {swap.fqn: swap.branches for swap in plan.swaps}["global_pool.1"] == ("ln", "bn")
    assert plan.notes == ()


def test_an_input_size_that_the_model_refuses_is_no_reason_for_a_note() -> None:
    model = timm.create_model("resnet10t", pretrained_cfg_overlay={"input_size": (3, 0, 0)})
    assert plan_swaps(model, torch.zeros(2, 3, 32, 32), bn_statistics="batch").notes == ()


def test_a_plan_decides_nothing_about_the_model_itself(net: Net) -> None:
    before = {name: type(module) for name, module in net.named_modules()}
    plan_swaps(net, X)
    assert {name: type(module) for name, module in net.named_modules()} == before


@pytest.mark.parametrize(
    ("include", "exclude", "swapped"),
    [
        (["stem.*"], [], {"stem.1"}),
        (["*.1"], [], {"stem.1", "tiny.1", "single.1"}),
        ([], ["stem.*", "pooled"], {"tiny.1", "single.1"}),
        (["re:(stem|tiny)\\.1"], [], {"stem.1", "tiny.1"}),
        (["*"], ["re:s.*"], {"tiny.1", "pooled"}),
        (["norm", "pooled"], [], {"pooled"}),
    ],
)
def test_patterns_choose_sites(net: Net, include: list[str], exclude: list[str], swapped: set[str]) -> None:
    plan = plan_swaps(net, X, include=include, exclude=exclude)
    assert {swap.fqn for swap in plan.swaps} == swapped
    assert len(plan.swaps) + len(plan.skips) == 6


def test_the_reason_names_the_pattern(net: Net) -> None:
    reasons = {s.fqn: s.reason for s in plan_swaps(net, X, include=["*.1"], exclude=["tiny.*"]).skips}
    assert reasons["tiny.1"] == "excluded by the pattern 'tiny.*'"
    assert reasons["pooled"] == "no filter of include matches it"


@pytest.mark.parametrize("kind", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_names_the_nearest(net: Net, kind: str) -> None:
    with pytest.raises(PlanError, match=r"'stem\.2' matches none of the 6 norm sites; nearest: \['stem\.1'"):
        plan_swaps(net, X, **{kind: ["stem.2"]})  # type: ignore[arg-type]


def test_a_broken_regular_expression_is_refused(net: Net) -> None:
    with pytest.raises(PlanError, match=r"expected a regular expression after `re:`, got 're:\(': "):
        plan_swaps(net, X, include=["re:("])


@pytest.mark.parametrize(
    ("branches", "expected"),
    [(("ln", "bn"), {("ln", "bn")}), (("in", "bn"), {("in", "bn")})],
)
def test_branches_can_be_restricted(net: Net, branches: tuple[Branch, ...], expected: set[tuple[Branch, ...]]) -> None:
    plan = plan_swaps(net, X, branches=branches)
    assert {swap.branches for swap in plan.swaps} == expected


def test_a_restriction_to_bn_leaves_nothing(net: Net) -> None:
    plan = plan_swaps(net, X, branches=("bn",))
    assert not plan.swaps
    assert "only the branch bn is allowed: nothing to switch to" in {skip.reason for skip in plan.skips}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"branches": ("in", "ln")}, PlanError, "expected `bn` among them"),
        ({"branches": ("gn", "bn")}, PlanError, "expected a non-empty subset of"),
        ({"bn_statistics": "moving"}, PlanError, "bn_statistics: expected 'batch' or"),
        ({"gate": "hard"}, PlanError, "gate: expected 'simplex' or"),
    ],
)
def test_unknown_options_are_refused(net: Net, options: dict, error: type, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(error, match=message):
        plan_swaps(net, X, **options)


def test_an_input_that_the_model_cannot_take_shows_its_own_error(net: Net) -> None:
    with pytest.raises(
        ModelError, match=r"input of 2x5x9x9, in stem\.0 \(Conv2d, with an input of 2x5x9x9\): .*channels"
    ):
        plan_swaps(net, torch.zeros(2, 5, 9, 9))


def test_gates_of_frozen_sites_do_not_train_unless_asked(net: Net) -> None:
    net.stem.requires_grad_(False)
    trains = {swap.fqn: swap.train_gates for swap in plan_swaps(net, X).swaps}
    assert trains == {"stem.1": False, "tiny.1": True, "single.1": True, "pooled": True}
    assert all(swap.train_gates for swap in plan_swaps(net, X, train_frozen_gates=True).swaps)


def test_softmax_gates_are_noted_as_another_function(net: Net) -> None:
    assert "Softmax gates start at the uniform mix" in plan_swaps(net, X, gate="softmax").notes[-1]


def test_a_plan_is_immutable_and_contains_no_tensor(plan: SwapPlan) -> None:
    with pytest.raises(FrozenInstanceError):
        plan.inputs = "1x3x1x1"  # type: ignore[misc]
    json.dumps(plan.to_dict())


def test_json_there_and_back(plan: SwapPlan) -> None:
    assert SwapPlan.from_json(plan.to_json()) == plan
    assert SwapPlan.from_json(SwapPlan.from_json(plan.to_json()).to_json()) == plan


def edited(plan: SwapPlan, **changes: object) -> str:
    return json.dumps(plan.to_dict() | changes)


def edited_swap(plan: SwapPlan, **changes: object) -> str:
    data = json.loads(plan.to_json())
    data["swaps"][0] |= changes
    return json.dumps(data)


def test_json_that_is_no_plan_is_refused(plan: SwapPlan) -> None:
    cases = [
        ("not json", "expected a plan as JSON, as SwapPlan.to_json"),
        ("[]", r"the plan: expected a table of named values, got \[\]"),
        ("{}", "the plan: inputs, model_class, notes, skips, swaps, version missing; expected inputs"),
        (edited(plan, extra=1), "the plan: unknown name 'extra'; expected one of inputs"),
        (edited(plan, note=[]), r"the plan: unknown name 'note'; did you mean 'notes'\?"),
        (edited(plan, version=99), "the plan has version 99, and this normswap reads 2: update normswap"),
        (edited(plan, swaps="all"), "the plan.swaps: expected a list, .*, got 'all'"),
        (edited(plan, skips=[3]), r"the plan.skips\[0\]: expected a table of named values, got 3"),
        (edited_swap(plan, gate="hard"), r"the plan.swaps\[0\].gate: expected 'simplex' or 'softmax', got 'hard'"),
        (edited_swap(plan, branches=["ln"]), "swap of 'stem.1': branches: expected `bn` among them"),
        (edited_swap(plan, branches=["bn", "bn"]), "swap of 'stem.1': branches: expected a non-empty subset"),
        (edited_swap(plan, branches=["ln", "xy", "bn"]), r"swaps\[0\].branches\[1\]: expected 'in' or 'ln' or 'bn'"),
        (edited_swap(plan, branches=[["bn"]]), r"swaps\[0\].branches\[0\]: expected 'in' or"),
        (edited(plan, notes=[3]), r"the plan.notes\[0\]: expected a string, got 3"),
        (edited_swap(plan, gate=3), r"swaps\[0\].gate: expected .*, got 3"),
        (edited_swap(plan, bn_statistics="moving"), r"swaps\[0\].bn_statistics: expected 'batch' or"),
        (edited_swap(plan, num_features="16"), r"swaps\[0\].num_features: expected a whole number, got '16'"),
        (edited_swap(plan, train_gates=1), r"swaps\[0\].train_gates: expected true or false, got 1"),
    ]
    for text, message in cases:
        with pytest.raises(PlanError, match=message):
            SwapPlan.from_json(text)


def test_the_old_name_of_a_property_warns(plan: SwapPlan) -> None:
    with pytest.warns(DeprecationWarning, match="Swap.starts_statistics is creates_running_stats now"):
        assert plan.swaps[0].starts_statistics is plan.swaps[0].creates_running_stats


def test_an_edited_plan_is_carried_out(net: Net, plan: SwapPlan) -> None:
    data = json.loads(plan.to_json())
    data["swaps"][0] |= {"branches": ["ln", "bn"], "train_gates": False}
    plan_again = SwapPlan.from_json(json.dumps(data))
    assert plan_again.swaps[0] == replace(plan.swaps[0], branches=("ln", "bn"), train_gates=False)


@pytest.mark.parametrize("text", [b"\xff", "[" * 100_000, '{"swaps": ' + 5000 * "9" + "}"])
def test_what_no_parser_reads_is_no_plan(text: str | bytes) -> None:
    with pytest.raises(PlanError, match=r"expected a plan as JSON, as SwapPlan\.to_json"):
        SwapPlan.from_json(text)
