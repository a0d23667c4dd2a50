"""Networks that lose batch statistics at once, matched branches, and norms that were never trained."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from normswap.errors import ModelError, PlanError, SwapError
from normswap.surgery.plan import SwapPlan
from normswap.surgery.planning import plan_swaps
from normswap.surgery.selection import SwapOptions
from tests.helpers import guarantees

CHANNELS = 16


class Net(nn.Module):
    """Norms of several sizes, a call of F.batch_norm, and a norm behind a pooled map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3)
        self.bn = nn.BatchNorm2d(CHANNELS)
        self.call = Called(CHANNELS)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.pooled = nn.BatchNorm2d(CHANNELS)
        self.head = nn.Linear(CHANNELS, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.call(torch.relu(self.bn(self.conv(x))))
        return self.head(torch.relu(self.pooled(self.pool(x))).flatten(1))


class Called(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum=0.1, eps=1e-3
        )


def batches(count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [2 * torch.randn(4, 3, 10, 10, generator=generator) + 1 for _ in range(count)]


def trained() -> Net:
    torch.manual_seed(0)
    net = Net().train()
    with torch.no_grad():
        for batch in batches(40):
            net(batch)
    return net.eval()


X = batches(1)[0]
SITES = ["bn", "call.batch_norm", "pooled"]


def matching_by_hand(mean: Tensor, var: Tensor, eps: float, groups: int = 1) -> tuple[Tensor, Tensor]:
    """The shift and the scale of `ln`, channel by channel, as the formulas are written."""
    mean, var = mean.double(), var.double()
    shift, scale = torch.empty_like(mean), torch.empty_like(var)
    size = len(mean) // groups
    for c in range(len(mean)):
        own = slice(c // size * size, (c // size + 1) * size)
        gm = mean[own].sum() / size
        gv = var[own].sum() / size + ((mean[own] - gm) ** 2).sum() / size
        shift[c], scale[c] = (mean[c] - gm) / math.sqrt(gv + eps), (var[c] + eps) / (gv + eps)
    return shift, scale


# --- starts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "groups"), [("ln", 1), ("gn", 8)])
def test_it_is_exactly_a_matched_group_norm_without_batch_statistics(start: Any, groups: int) -> None:
    model = trained().double()
    options = {"num_groups": groups} if start == "gn" else {}
    conversion = normswap.convert(model, X.double(), start=start, **options)
    layer, bn = conversion.model.bn, model.bn
    assert (layer.branches, layer.num_groups, layer.running_mean) == (("in", "ln"), groups, None)
    assert not [name for name, _ in conversion.model.named_buffers() if name.startswith("bn.running")]
    shift, scale = matching_by_hand(bn.running_mean, bn.running_var, bn.eps, groups)
    x = model.conv(X.double())
    expected = F.group_norm(x, groups, bn.weight / scale.sqrt(), bn.bias - bn.weight * shift / scale.sqrt(), bn.eps)
    assert guarantees.distance(expected, layer(x)) < 1e-12
    with torch.no_grad():
        alone = torch.cat([conversion.model.train()(x[None].double()) for x in X])
        assert guarantees.distance(conversion.model(X.double()), alone) < 1e-12  # nothing depends on the batch


def test_the_plan_says_where_sites_start_and_survives_json() -> None:
    plan = plan_swaps(trained(), X, start="gn", num_groups=8)
    found = {swap.fqn: (swap.start, swap.branches, swap.num_groups, swap.vertex, swap.matched) for swap in plan.swaps}
    assert found == {
        "bn": ("gn", ("in", "ln"), 8, "ln", True),
        "call.batch_norm": ("gn", ("in", "ln"), 8, "ln", True),
        "pooled": ("gn", ("ln",), 2, "ln", True),  # of 8 channels each at one position
    }
    guarantees.plan_survives_json(plan)
    assert any("start without `bn`, so the converted model computes another function" in note for note in plan.notes)
    layers = normswap.convert(trained(), plan=plan).replaced
    assert {name: layer.num_groups for name, layer in layers.items()} == {"bn": 8, "call.batch_norm": 8, "pooled": 2}


def test_layer_norm_alone_is_close_to_the_original_and_without_matching_it_is_not() -> None:
    model = trained()
    near, far = (
        normswap.measure_distance(model, normswap.convert(model, X, start="ln", match=match).model, batches())
        for match in (True, False)
    )
    assert near.relative_error < 0.5 * far.relative_error
    assert near.top1_agreement is not None
    assert near.predictions == 32
    assert [site.fqn for site in near.sites] == ["bn", "pooled"]


def test_equal_weights_start_without_bn() -> None:
    layers = normswap.convert(trained(), X, start="uniform").replaced
    assert [layers[name].branches for name in SITES] == [("in", "ln"), ("in", "ln"), ("ln",)]
    assert layers["bn"].mean_weight.tolist() == layers["call.batch_norm"].var_weight.tolist() == [0.5, 0.5]
    assert layers["pooled"].mean_weight.tolist() == [1.0]
    assert not layers["pooled"].mean_weight.requires_grad  # there is nothing to choose


def test_settings_start_single_sites_and_undo_a_start() -> None:
    plan = plan_swaps(trained(), X, start="ln", settings={"bn": {"start": None}, "call.*": {"start": "uniform"}})
    assert [swap.start for swap in plan.swaps] == [None, "uniform", "ln"]
    assert plan.swaps[0].branches == ("in", "ln", "bn")
    again = SwapPlan.from_dict({**plan.to_dict(), "settings": {"pooled": {"start": None}, "bn": {"start": "ln"}}})
    assert [(swap.start, swap.branches) for swap in again.swaps] == [
        ("ln", ("in", "ln")),
        ("uniform", ("in", "ln")),
        (None, ("ln", "bn")),
    ]


def test_groups_of_the_ln_branch_can_be_set_without_a_start() -> None:
    plan = plan_swaps(trained(), X, settings={"bn": {"num_groups": 12}, "call.*": {"match": False}})
    assert [(swap.num_groups, swap.matched) for swap in plan.swaps] == [(4, True), (1, False), (1, True)]
    model = normswap.convert(trained(), X, plan=plan).model
    assert normswap.verify(trained(), model, [X]).passed
    assert [layer.matched for layer in normswap.convert(trained(), plan=plan).replaced.values()] == [False, True, True]


def test_too_few_values_at_one_position_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
    (skip,) = plan_swaps(model, X, start="ln").skips
    assert skip.reason.startswith("4 channels at one spatial position have no variance without the batch, and start=")
    single = nn.Sequential(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1))
    assert plan_swaps(single, X, start="ln").swaps[0].branches == ("ln",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "bn"}, "start: expected 'ln' or 'gn' or 'uniform', got 'bn'"),
        ({"start": "ln", "gate": "softmax"}, "gate: expected 'simplex' with start='ln', since softmax gates start at"),
        ({"start": "ln", "branches": ("in", "bn")}, "branches: expected none of them `bn`, which start='ln' leaves"),
        ({"start": "ln", "branches": ("in",)}, r"branches: expected `ln` among them, at which start='ln' starts"),
        ({"start": "ln", "kinds": ("in",)}, r"start='ln' has no effect with kinds=\('in',\)"),
        ({"num_groups": 8}, "num_groups=8 has no effect without start='gn': pass both, or none"),
        (
            {"start": "ln", "bn_statistics": "batch"},
            "bn_statistics='batch' has no effect with start='ln', without `bn`: pass one of the two",
        ),
        ({"num_groups": 0, "start": "gn"}, "num_groups: expected at least 1, got 0"),
        ({"match": 1}, "match: expected true or false, got 1"),
        ({"untrained": "calibrate"}, "untrained: expected 'keep' or 'uniform', got 'calibrate'"),
        ({"settings": {"*": {"num_groups": 0}}}, r"settings\['\*'\].num_groups: expected at least 1, got 0"),
        ({"settings": {"*": {"start": "bn"}}}, r"settings\['\*'\].start: expected 'ln' or"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}"):
        SwapOptions(**options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "ln", "gate": "softmax"}, "gate: expected 'simplex' with start='ln'"),
        ({"start": "ln", "num_groups": 4}, "num_groups: start='ln' has one group: pass start='gn'"),
        ({"start": "ln", "branches": ("in",)}, "branches: expected `ln` among them"),
    ],
)
def test_settings_without_a_meaning_name_the_site(settings: Any, message: str) -> None:
    with pytest.raises(PlanError, match=f"settings of 'bn': {message}"):
        plan_swaps(trained(), X, settings={"bn": settings})


def test_other_kinds_have_no_start() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.InstanceNorm2d(8))
    plan = plan_swaps(model, X, start="ln", kinds=("bn", "in"))
    assert {swap.kind: swap.start for swap in plan.swaps} == {"bn": "ln", "in": None}
    with pytest.raises(PlanError, match="settings of '2': start: expected a Batch Normalization, got Instance"):
        plan_swaps(model, X, kinds=("bn", "in"), settings={"2": {"start": "ln"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "in", "branches": ("in", "ln"), "start": "ln"}, "start: expected None at Instance Normalization"),
        ({"kind": "in", "branches": ("in", "ln")}, "matched: expected False at Instance Normalization"),
        ({"num_groups": 5}, "num_groups: expected a divisor of 16 channels, got 5"),
        ({"num_groups": 0}, "num_groups: expected at least 1, got 0"),
        ({"start": "ln"}, "branches: expected none of them `bn`"),
    ],
)
def test_a_plan_with_swaps_that_cannot_be_applied_is_refused(changes: dict[str, Any], message: str) -> None:
    plan = plan_swaps(trained(), X)
    edited = replace(plan, swaps=(replace(plan.swaps[0], **changes), *plan.swaps[1:]))
    with pytest.raises(PlanError, match=f"swap of 'bn': {message}"):
        SwapPlan.from_json(edited.to_json())


def test_a_plan_of_version_1_has_raw_layers() -> None:
    data = plan_swaps(trained(), X, match=False, bn_statistics="batch").to_dict()
    new = ("start", "num_groups", "matched", "untrained")
    old = {**data, "version": 1, "swaps": [{k: v for k, v in swap.items() if k not in new} for swap in data["swaps"]]}
    plan = SwapPlan.from_dict(old)
    assert plan == SwapPlan.from_dict(data)
    model = normswap.convert(trained(), plan=plan).model
    assert not any(layer.matched for layer in normswap.convert(trained(), plan=plan).replaced.values())
    assert normswap.verify(trained(), model, [X]).passed


def test_revert_refuses_a_layer_without_its_statistics_and_leaves_the_model() -> None:
    model = normswap.convert(trained(), X, settings={"bn": {"start": "ln"}}).model
    before = guarantees.Record.of(model)
    with pytest.raises(SwapError, match=r"1 site \(bn\) started without `bn` and kept no running statistics"):
        normswap.revert(model)
    guarantees.nothing_else_changed(before, model, guarantees.NO_SWAPS, same_objects=True)


def test_a_call_that_starts_elsewhere_keeps_its_tensors_and_reverts() -> None:
    model = trained()
    converted = normswap.convert(model, X, include=["call.*"], start="ln").model
    expected = model.state_dict()
    before = {name: tensor.clone() for name, tensor in converted.call.state_dict().items()}
    converted.train()(X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in converted.call.state_dict().items())
    reverted = normswap.revert(converted).eval()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in reverted.state_dict().items() if "call" in name)


# --- matched branches -------------------------------------------------------------------------------------------------


def test_sites_are_matched_to_their_own_statistics() -> None:
    model = trained()
    layers = normswap.convert(model, X).replaced
    for name, statistics, eps in (("bn", model.bn, 1e-5), ("call.batch_norm", model.call, 1e-3)):
        shift, scale = matching_by_hand(statistics.running_mean, statistics.running_var, eps)
        torch.testing.assert_close(layers[name].ln_mean_shift, shift.float())
        torch.testing.assert_close(layers[name].ln_var_scale, scale.float())
        assert layers[name].in_var_scale.tolist() == [1.0] * CHANNELS
    assert layers["pooled"].in_var_scale is None


@pytest.mark.parametrize("start", [None, "ln"])
def test_data_scale_the_in_branches(start: Any) -> None:
    model, data = trained().double(), [batch.double() for batch in batches()]
    layers = normswap.convert(model, X.double(), start=start, data=iter(data)).replaced
    seen = torch.cat([model.conv(batch) for batch in data])
    instance_var = seen.var((2, 3), correction=0).mean(0)
    expected = (model.bn.running_var + 1e-5) / (instance_var + 1e-5)
    torch.testing.assert_close(layers["bn"].in_var_scale, expected)
    assert not torch.allclose(layers["call.batch_norm"].in_var_scale, torch.ones(()).double())


def test_data_change_nothing_else() -> None:
    model = trained()
    before = guarantees.Record.of(model)
    plan = plan_swaps(model, X)
    conversion = normswap.convert(model, X, data=[{"x": X}, (X,)])
    guarantees.nothing_else_changed(before, conversion.model, plan, same_objects=False)
    assert normswap.verify(model, conversion.model, [X]).passed


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (X, r"data: expected a list of inputs, got one Tensor: pass \[x\]"),
        ([], "data: expected at least one input, got none"),
        ([torch.zeros(2, 5, 9, 9)], "data: the model fails on an input of 2x5x9x9"),
    ],
    ids=["one input", "none", "wrong channels"],
)
def test_data_that_cannot_be_used_leave_the_model_as_it_was(data: Any, message: str) -> None:
    model = trained()
    before = guarantees.Record.of(model)
    with pytest.raises(ModelError, match=message):
        normswap.convert(model, X, data=data, inplace=True)
    guarantees.nothing_else_changed(before, model, guarantees.NO_SWAPS, same_objects=True)


def test_sites_without_running_statistics_use_the_batch_and_are_raw() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))
    plan = plan_swaps(model, X)
    assert [(swap.bn_statistics, swap.matched, swap.untrained) for swap in plan.swaps] == [("batch", False, False)]
    assert plan.notes == ("Without running statistics, as before, these sites depend on the batch: 1.",)
    guarantees.check_all(lambda: copy.deepcopy(model), X)


def test_softmax_gates_are_raw() -> None:
    assert not any(swap.matched for swap in plan_swaps(trained(), X, gate="softmax").swaps)


def test_the_guarantees_hold_with_batch_statistics_and_without() -> None:
    for options in ({}, {"bn_statistics": "batch"}, {"match": False}, {"bn_statistics": "batch", "match": False}):
        guarantees.check_all(trained, X, **options)


# --- norms that were never trained ------------------------------------------------------------------------------------


def with_new_norms() -> Net:
    net = trained()
    net.bn, net.call = nn.BatchNorm2d(CHANNELS), Called(CHANNELS)
    return net.eval()


def test_sites_whose_statistics_were_never_updated_are_found() -> None:
    sites = normswap.find_norm_sites(with_new_norms(), X)
    assert {site.fqn: site.untrained for site in sites} == {"bn": True, "call.batch_norm": True, "pooled": False}
    plan = plan_swaps(with_new_norms(), X)
    assert plan.untrained == ("bn", "call.batch_norm")
    (note,) = plan.notes
    assert note.startswith("Running statistics that were never updated (mean 0, variance 1) do not normalize: bn, call")
    assert "untrained='uniform'" in note
    assert normswap.verify(with_new_norms(), normswap.convert(with_new_norms(), plan=plan).model, [X]).passed


def test_they_start_at_equal_weights_on_request() -> None:
    conversion = normswap.convert(with_new_norms(), X, untrained="uniform")
    assert {swap.fqn: swap.start for swap in conversion.plan.swaps} == {
        "bn": "uniform",
        "call.batch_norm": "uniform",
        "pooled": None,
    }
    assert conversion.model.bn.branches == ("in", "ln")
    assert conversion.plan.untrained == ("bn", "call.batch_norm")


def test_counted_batches_and_other_values_are_trained() -> None:
    counted, valued = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    counted.num_batches_tracked.fill_(1)
    valued.running_mean[0] = 0.5  # as in files from before torch counted batches
    sites = normswap.find_norm_sites(nn.Sequential(counted, valued, nn.BatchNorm2d(4).to("meta")))
    assert [site.untrained for site in sites] == [False, False, False]


# --- GroupNorm of several groups --------------------------------------------------------------------------------------


class Grouped(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3)
        self.norm = nn.GroupNorm(4, 12, eps=1e-3, **options)
        self.extreme = nn.GroupNorm(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.extreme(torch.relu(self.norm(self.conv(x))) + 1)


@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=str)
def test_group_norms_of_several_groups_are_converted_on_request(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Grouped(**options)
    checked = guarantees.check_all(lambda: copy.deepcopy(model), X, kinds=("bn", "gn"))
    layer = checked.conversion.model.norm
    assert (layer.branches, layer.num_groups, layer.vertex, layer.matched) == (("in", "ln"), 4, "ln", False)
    assert {skip.fqn: skip.reason for skip in checked.conversion.plan.skips} == {
        "extreme": "12 channels in 12 groups leave only the branch ln: nothing to switch to"
    }
    assert "is GroupNorm of several groups, which has no batch statistics" in plan_swaps(model, X).skips[0].reason


def test_a_group_norm_can_get_a_bn_branch() -> None:
    settings: Any = {"norm": {"branches": ("in", "ln", "bn")}}
    model = normswap.convert(Grouped(), X, kinds=("gn",), settings=settings).model
    assert (model.norm.bn_statistics, model.norm.num_batches_tracked.item()) == ("batch", 0)


def test_a_plan_for_other_groups_is_refused() -> None:
    plan = plan_swaps(Grouped(), X, kinds=("gn",))
    other = Grouped()
    other.norm = nn.GroupNorm(6, 12, eps=1e-3)
    with pytest.raises(PlanError, match="norm: expected 4 groups, got 6"):
        normswap.convert(other, plan=plan)


def test_the_groups_of_a_group_norm_are_its_own() -> None:
    with pytest.raises(PlanError, match="num_groups: expected a Batch Normalization, got GroupNorm of several"):
        plan_swaps(Grouped(), X, kinds=("gn",), settings={"norm": {"num_groups": 2}})


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({}, "Running statistics are not synchronized: to use the joint batch, pass bn_statistics='batch' too."),
        ({"bn_statistics": "batch"}, "Synchronized although the old norms were not"),
    ],
)
def test_running_statistics_are_not_synchronized(options: dict[str, Any], note: str) -> None:
    (found,) = plan_swaps(trained(), X, synchronize=True, **options).notes
    assert found.startswith(note)
