"""Norms other than BN, on request: each starts at its own vertex, and all that follows a BN site follows these too."""

import copy
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import GroupNorm1
from torch import Tensor, nn

import normswap
from normswap import KNOWN_NORMS, convert, plan_swaps, read_group_norm, read_instance_norm, revert, verify
from normswap.errors import LayerError, PlanError, SwapError
from normswap.layers.in_place import check_replaceable
from normswap.layers.switch_norm import SwitchNorm, SwitchNorm2d
from normswap.surgery.importance import sites_with_changed_weights
from normswap.surgery.norms.classes import NormSpec, read_norm
from normswap.surgery.plan import SwapPlan
from normswap.surgery.selection import KINDS, base_kind, branch_of_kind
from tests.helpers import guarantees, oracles, zoo

ALL = {"kinds": ("bn", "in", "gn1")}
WITH_NEW = {**ALL, "settings": {"re:instance|group": {"branches": ("in", "ln", "bn")}}}


def stylised() -> nn.Module:
    return zoo.BY_NAME["three kinds"].model()


def converted(**options: Any) -> normswap.Conversion:
    return convert(stylised(), zoo.IMAGE(), **(options or ALL))


# --- where they start -------------------------------------------------------------------------------------------------


def test_each_kind_starts_at_its_own_branch_without_bn() -> None:
    model, plan, _ = converted()
    assert {swap.fqn: (swap.kind, swap.branches, swap.vertex) for swap in plan.swaps} == {
        "bn": ("bn", ("in", "ln", "bn"), "bn"),
        "instance": ("in", ("in", "ln"), "in"),
        "group": ("gn1", ("in", "ln"), "ln"),
    }
    shares = {name: weights.mean for name, weights in normswap.importance_weights(model).items()}
    assert shares["instance"] == {"in": 1.0, "ln": 0.0}
    assert shares["group"] == {"in": 0.0, "ln": 1.0}
    assert sites_with_changed_weights(model) == []


def test_a_softmax_gate_starts_at_the_uniform_mix() -> None:
    weights = normswap.importance_weights(converted(**ALL, gate="softmax").model)
    assert weights["instance"].var == {"in": 0.5, "ln": 0.5}


def test_the_kinds_are_words_and_everything_else_is_bn() -> None:
    assert [base_kind(kind) for kind in (*KINDS, "frozen bn", "theirs")] == ["bn", "in", "gn1", "gn", "bn", "bn"]
    assert [branch_of_kind(kind) for kind in ("bn", "in", "gn1", "gn", "frozen bn")] == ["bn", "in", "ln", "ln", "bn"]


@pytest.mark.parametrize("kinds", ["in", (), ("bn", "gn2"), ("ln",)], ids=str)
def test_other_kinds_are_refused(kinds: Any) -> None:
    with pytest.raises(
        PlanError, match=r"kinds: expected some of \('bn', 'in', 'gn1', 'gn'\), got " + re.escape(repr(kinds))
    ):
        plan_swaps(stylised(), kinds=kinds)


def test_branches_must_include_the_starting_branch_of_each_kind() -> None:
    plan = plan_swaps(stylised(), zoo.IMAGE(), kinds=("in",), branches=("in", "ln"))
    assert [(swap.fqn, swap.branches) for swap in plan.swaps] == [("instance", ("in", "ln"))]
    plan = plan_swaps(stylised(), zoo.IMAGE(), kinds=("bn", "gn1"), branches=("ln", "bn"))
    assert [(swap.fqn, swap.branches) for swap in plan.swaps] == [("bn", ("ln", "bn"))]
    assert {s.fqn: s.reason for s in plan.skips}["group"] == "only the branch ln is allowed: nothing to switch to"
    with pytest.raises(PlanError, match=r"branches: expected `in` among them, .*; got \('ln', 'bn'\)"):
        plan_swaps(stylised(), kinds=("bn", "in"), branches=("ln", "bn"))


@pytest.mark.filterwarnings("ignore:input's size at dim=1 does not match num_features:UserWarning")
def test_only_the_channels_of_the_inputs_count() -> None:
    """An InstanceNorm without weight takes any number of channels, whatever it was made for, and only warns."""
    model = zoo.Chain(nn.InstanceNorm2d(1))
    plan = plan_swaps(model, zoo.IMAGE(), **ALL)
    with_new = plan_swaps(model, zoo.IMAGE(), **ALL, settings={"1": {"branches": ("in", "bn")}})
    guarantees.same_function(model, convert(model, plan=plan).model, zoo.IMAGE())
    assert plan.swaps[0].branches == ("in", "ln")
    assert with_new.skips[0].reason == (
        "has 1 channels, but its inputs have [8]: correct num_features, or leave `bn` out of its branches"
    )


# --- new statistics --------------------------------------------------------------------------------------------------


def test_new_statistics_are_the_plain_average_over_the_batches() -> None:
    conversion = converted(**WITH_NEW)
    layer = conversion.model.instance
    assert layer.running_mean.tolist() == [0.0] * 4
    assert layer.running_var.tolist() == [1.0] * 4
    assert layer.num_batches_tracked == 0
    reference = nn.BatchNorm2d(4, momentum=None)
    layer.register_forward_pre_hook(lambda _module, args: _feed(reference, args))
    conversion.model.train()
    for seed in range(3):
        conversion.model(torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(seed)))
    assert layer.num_batches_tracked == 3
    torch.testing.assert_close(layer.running_mean, reference.running_mean)
    torch.testing.assert_close(layer.running_var, reference.running_var)


def _feed(reference: nn.Module, args: tuple[Tensor, ...]) -> None:
    reference(args[0].detach())


def test_new_statistics_are_noted_and_must_be_updated() -> None:
    plan = converted(**WITH_NEW, bn_statistics="batch").plan
    assert plan.notes == (
        "The old norms have no running statistics, so the `bn` branches of instance, group start with mean 0 and "
        "variance 1: train, or call normswap.update_statistics, before evaluation.",
    )
    by_default = {swap.fqn: swap.bn_statistics for swap in plan_swaps(stylised(), zoo.IMAGE(), **WITH_NEW).swaps}
    assert by_default == {"bn": "running", "instance": "batch", "group": "batch"}
    running = {"re:instance|group": {"branches": ("in", "ln", "bn"), "bn_statistics": "running"}}
    never = plan_swaps(stylised(), zoo.IMAGE(), **{**WITH_NEW, "settings": running})  # type: ignore[arg-type]
    assert [swap.fqn for swap in never.swaps] == ["bn"]
    assert "its `bn` branch cannot use running statistics, since the old norm has no" in never.skips[0].reason
    text = plan.to_json().replace('"bn_statistics": "batch"', '"bn_statistics": "running"')
    with pytest.raises(
        PlanError, match="swap of 'instance': bn_statistics: expected 'batch' or 'renorm', since the old norm"
    ):
        SwapPlan.from_json(text)


def test_what_has_no_bn_branch_is_silent_on_its_statistics() -> None:
    plan = plan_swaps(stylised(), zoo.IMAGE(), **ALL, bn_statistics="running")
    assert {swap.fqn: swap.bn_statistics for swap in plan.swaps} == {
        "bn": "running",
        "instance": "batch",
        "group": "batch",
    }


@pytest.mark.parametrize("options", [ALL, WITH_NEW], ids=["plain", "with_new"])
def test_resetting_puts_a_layer_back_at_the_norm_that_it_replaced(options: dict[str, Any]) -> None:
    layer = converted(**options).model.instance
    layer.train()(torch.randn(3, 4, 5, 5))
    move(layer, "ln")
    layer.reset_parameters()
    assert layer.is_at("in")
    assert layer.weight.tolist() == [1.0] * 4
    if layer.running_mean is not None:
        assert (layer.running_mean.tolist(), layer.num_batches_tracked.item()) == ([0.0] * 4, 0)


# --- the way back, and around -----------------------------------------------------------------------------------------


def move(layer: Any, branch: str) -> None:
    with torch.no_grad():
        for point in (layer.mean_weight, layer.var_weight):
            point.copy_(torch.tensor([float(name == branch) for name in layer.branches]))


@pytest.mark.parametrize("options", [ALL, WITH_NEW], ids=["plain", "with_new"])
@pytest.mark.parametrize(("site", "branch"), [("instance", "ln"), ("group", "in")])
def test_a_site_that_left_its_vertex_has_moved(options: dict[str, Any], site: str, branch: str) -> None:
    model = converted(**options).model
    move(getattr(model, site), branch)
    assert sites_with_changed_weights(model) == [site]
    with pytest.raises(SwapError, match=rf"the importance weights of 1 site differ from the old norm \({site}\)"):
        revert(model)
    revert(model, discard=True)
    guarantees.same_function(stylised(), model, zoo.IMAGE())
    assert [type(m) for m in model.modules()] == [type(m) for m in stylised().modules()]


def test_eps_is_reported_where_nothing_can_be_folded_wrongly() -> None:
    plain, begun = converted().model, converted(**WITH_NEW).model
    assert plain.group.eps == 1e-3
    move(plain.group, "in")
    for layer in (plain.group, begun.group, begun.instance):
        with pytest.raises(
            LayerError, match="can be folded as a BatchNorm only while its importance weights are those of BN"
        ):
            _ = layer.eps
    move(begun.group, "bn")
    assert begun.group.eps == 1e-3


@pytest.mark.parametrize("options", [ALL, WITH_NEW], ids=["plain", "with_new"])
def test_copies_and_pickles_are_the_same_and_revert(options: dict[str, Any]) -> None:
    model = converted(**options).model
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        guarantees.same_function(model, twin, zoo.IMAGE())
        assert twin.instance.vertex == "in"
        guarantees.same_function(stylised(), revert(twin), zoo.IMAGE())


@pytest.mark.parametrize("options", [ALL, WITH_NEW], ids=["plain", "with_new"])
def test_the_verification_holds_in_both_modes(options: dict[str, Any]) -> None:
    model, _, replaced = converted(**options)
    proof = verify(stylised(), model, [zoo.IMAGE()])
    assert [check.passed for check in proof.checks] == [True] * 4
    assert {site.fqn for site in proof.sites} == set(replaced)
    move(model.instance, "ln")
    assert not verify(stylised(), model, [zoo.IMAGE()]).passed


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("options", [ALL, WITH_NEW], ids=["plain", "with_new"])
def test_a_file_is_converted_again_by_its_plan(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    model, plan, _ = converted(**options)
    model.train()(zoo.IMAGE())
    normswap.save(model, tmp_path / name, plan=plan)
    loaded = normswap.load(tmp_path / name, architecture=zoo.Stylised)
    assert loaded.plan == plan
    for (key, tensor), (other, value) in zip(
        model.state_dict().items(), loaded.model.state_dict().items(), strict=True
    ):
        assert key == other
        assert tensor.equal(value)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_pickled_module_is_read_in_a_fresh_process(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8), GroupNorm1(8))
    conversion = convert(model, zoo.IMAGE(), kinds=("in", "gn1"), settings={"1": {"branches": ("in", "bn")}})
    normswap.save(conversion.model, tmp_path / "model.pt", plan=conversion.plan, payload="module")
    torch.save({"x": zoo.IMAGE(), "y": conversion.model.eval()(zoo.IMAGE())}, tmp_path / "data.pt")
    code = (
        "import sys, torch, normswap; from pathlib import Path; here = Path(sys.argv[1])\n"
        "torch.set_num_threads(1)\n"  # as here: with other threads sums have other last bits
        "d = torch.load(here / 'data.pt'); m = normswap.load(here / 'model.pt', trust=True).model.eval()\n"
        "assert torch.equal(m(d['x']), d['y']); import timm; print([type(c).__name__ for c in normswap.revert(m)])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['Conv2d', 'InstanceNorm2d', 'GroupNorm1']"


def test_a_state_dict_of_the_original_lacks_gates_and_new_statistics_only() -> None:
    # A count that is missing is 0, as for a BN that was stored before batches were counted.
    layer = converted(**WITH_NEW).model.instance
    missing, unexpected = layer.load_state_dict(stylised().instance.state_dict(), strict=False)
    assert {*missing} == {"mean_weight", "var_weight", "running_mean", "running_var"}
    assert unexpected == []


def test_a_record_of_adoption_from_before_statistics_could_be_added_is_read() -> None:
    replaced = convert(zoo.Chain(zoo.bn())).model[1].replaced
    del replaced.__dict__["created"]
    buffer = io.BytesIO()
    pickle.dump(replaced, buffer)
    assert pickle.loads(buffer.getvalue()).created == ()


def test_a_plan_for_another_number_of_groups_is_refused() -> None:
    plan = plan_swaps(zoo.Chain(nn.GroupNorm(1, 8)), **ALL)
    with pytest.raises(PlanError, match=r"1: expected the kind gn1, got gn; make a plan"):
        convert(zoo.Chain(nn.GroupNorm(2, 8)), plan=plan)
    plan = plan_swaps(zoo.Chain(nn.InstanceNorm2d(8)), **ALL)
    with pytest.raises(PlanError, match="1: uses running statistics in evaluation"):
        convert(zoo.Chain(nn.InstanceNorm2d(8, track_running_stats=True)), plan=plan)


# --- classes ----------------------------------------------------------------------------------------------------------

READ: dict[str, tuple[nn.Module, NormSpec]] = {
    "InstanceNorm2d": (nn.InstanceNorm2d(4, eps=1e-3), NormSpec("in", 4, 1e-3, None, SwitchNorm2d)),
    "GroupNorm": (nn.GroupNorm(1, 4), NormSpec("gn1", 4, 1e-5, None, SwitchNorm)),
}


@pytest.mark.parametrize(("module", "spec"), READ.values(), ids=READ)
def test_other_norms_are_read(module: nn.Module, spec: NormSpec) -> None:
    assert read_norm(module) == spec


def test_a_caller_adds_their_classes() -> None:
    norms = KNOWN_NORMS | {zoo.TheirInstanceNorm: read_instance_norm, zoo.TheirGroupNorm: read_group_norm}
    trap = zoo.Trap("theirs", lambda: zoo.Chain(zoo.TheirGroupNorm(1, 8), zoo.TheirInstanceNorm(8)), zoo.IMAGE)
    checked = guarantees.check_all(trap.model, trap.inputs(), norms=norms, **ALL)
    assert [swap.kind for swap in checked.conversion.plan.swaps] == ["gn1", "in"]


def stopped_tracking() -> nn.Module:
    module = nn.InstanceNorm2d(4, track_running_stats=True)
    module.track_running_stats = False
    return module


def test_statistics_that_are_kept_but_unused_keep_an_instance_norm_as_it_is() -> None:
    spec = read_norm(stopped_tracking())
    assert spec is not None
    assert spec.target is None


def pruned_group(groups: int) -> nn.Module:
    module = nn.GroupNorm(groups, 4)
    torch.nn.utils.prune.random_unstructured(module, "weight", amount=1)
    return module


@pytest.mark.parametrize(
    ("groups", "problem"),
    [(1, "its weight is computed before each call"), (2, "its weight is computed before each call")],
)
def test_a_pruned_group_norm_says_what_matters(groups: int, problem: str) -> None:
    spec = read_norm(pruned_group(groups))
    assert spec is not None
    assert str(spec.problem).startswith(problem)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_instance_norm_says_its_kind() -> None:
    spec = read_norm(nn.LazyInstanceNorm2d())
    assert spec is not None
    assert (spec.kind, spec.problem) == (
        "in",
        "torch.nn.modules.instancenorm.LazyInstanceNorm2d has no sizes yet: run one forward pass, then convert",
    )


@pytest.mark.parametrize(
    ("vertex", "make", "message"),
    [
        ("in", lambda: nn.GroupNorm(1, 4), "expected an InstanceNorm module, got GroupNorm"),
        ("ln", lambda: nn.InstanceNorm2d(4), "expected a GroupNorm module, got InstanceNorm2d"),
        ("bn", lambda: nn.InstanceNorm2d(4), "expected a BatchNorm module, got InstanceNorm2d"),
        ("ln", lambda: nn.Linear(4, 4), "expected a GroupNorm module, got Linear"),
    ],
)
def test_only_the_norm_of_a_vertex_is_replaced_there(vertex: Any, make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(LayerError, match=message):
        check_replaceable(make(), SwitchNorm2d, frozenset(), vertex=vertex)


def test_a_norm_without_tensors_is_given_dtype_and_device_by_what_is_around_it() -> None:
    for model in (zoo.Chain(nn.InstanceNorm2d(8)).to(torch.bfloat16), zoo.Chain(nn.InstanceNorm2d(8)).to("meta")):
        layer = convert(model, **ALL, settings={"1": {"branches": ("in", "bn")}}).model[1]
        for tensor in (layer.mean_weight, layer.var_weight, layer.running_mean, layer.running_var):
            assert (tensor.dtype, tensor.device) == (model[0].weight.dtype, model[0].weight.device)


def test_the_layer_mixes_as_the_oracle_does_once_it_has_moved() -> None:
    layer = converted(**WITH_NEW).model.double().group.train()
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.25, 0.5, 0.25]))
        layer.var_weight.copy_(torch.tensor([0.5, 0.125, 0.375]))
    x = torch.randn(3, 8, 4, 5).double()
    tensors = [getattr(layer, name).detach() for name in ("mean_weight", "var_weight", "weight", "bias")]
    expected = oracles.forward(x, *tensors, eps=1e-3)
    assert oracles.relative_error(layer(x).detach(), expected) < 1e-12
