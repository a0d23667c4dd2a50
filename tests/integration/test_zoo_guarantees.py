"""All guarantees on every trap of the zoo, and on whole networks of timm and torchvision."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
import torchvision
import torchvision.models.video.resnet as video
from torch import Tensor, nn

from normswap import KNOWN_NORMS, SwapPlan, convert, plan_swaps, read_batch_norm
from tests.helpers import guarantees, oracles, zoo

COPYABLE = [trap for trap in zoo.TRAPS if trap.copyable]
pytestmark = pytest.mark.slow


def options_of(trap: zoo.Trap) -> dict[str, Any]:
    classes = trap.also_read_as_batch_norm
    norms = {"norms": KNOWN_NORMS | dict.fromkeys(classes, read_batch_norm)} if classes else {}
    return {**trap.options, **norms}


def named(trap: zoo.Trap) -> str:
    return trap.name


def assert_decided(plan: SwapPlan, swaps: tuple[str, ...], reasons: Any) -> None:
    assert sorted(swap.fqn for swap in plan.swaps) == sorted(swaps)
    assert {skip.fqn for skip in plan.skips} == set(reasons)
    for skip in plan.skips:
        assert re.search(reasons[skip.fqn], skip.reason), f"{skip.fqn}: {skip.reason}"


@pytest.mark.parametrize("trap", zoo.TRAPS, ids=named)
def test_each_site_of_a_trap_is_decided_for_its_reason(trap: zoo.Trap) -> None:
    assert_decided(plan_swaps(trap.model(), trap.inputs(), **options_of(trap)), trap.swaps, trap.skips)


@pytest.mark.parametrize("trap", zoo.TRAPS, ids=named)
def test_without_an_input_nothing_is_lost_either(trap: zoo.Trap) -> None:
    swaps, reasons = trap.blind or (trap.swaps, trap.skips)
    assert_decided(plan_swaps(trap.model(), **options_of(trap)), swaps, reasons)


@pytest.mark.parametrize("trap", COPYABLE, ids=named)
def test_every_guarantee_holds_on_a_trap(trap: zoo.Trap) -> None:
    inputs = trap.inputs()
    checked = guarantees.check_all(trap.model, inputs, **options_of(trap))
    assert [mode for mode, error in checked.errors.items() if error is None] == list(trap.raises_in)
    trainable = [swap for swap in checked.conversion.plan.swaps if swap.train_gates and swap.fqn not in trap.idle]
    assert checked.gates == 2 * len(trainable)


@pytest.mark.parametrize("trap", [trap for trap in zoo.TRAPS if not trap.copyable], ids=named)
def test_a_model_that_torch_cannot_copy_is_planned_and_left_alone(trap: zoo.Trap) -> None:
    model = trap.model()
    before = guarantees.Record.of(model)
    conversion = convert(model, trap.inputs(), inplace=True)
    guarantees.nothing_else_changed(before, model, conversion.plan, same_objects=True)
    assert conversion.plan.swaps == ()


NO_NORM_LEFT = [trap for trap in COPYABLE if trap.swaps and not trap.skips and not trap.kernels]


@pytest.mark.parametrize("trap", NO_NORM_LEFT, ids=named)
def test_no_norm_of_torch_runs_any_more(trap: zoo.Trap) -> None:
    original, inputs = trap.model(), trap.inputs()
    converted = convert(original, inputs, **options_of(trap)).model
    frozen = any("Frozen" in type(module).__name__ for module in zoo.everything_in(original))
    for mode in ("evaluation", "training"):
        assert frozen or guarantees.norm_calls(original, inputs, mode) > 0
        assert guarantees.norm_calls(converted, inputs, mode) == 0


@pytest.mark.parametrize("branches", [("in", "bn"), ("ln", "bn"), ("in", "ln", "bn")])
def test_the_guarantees_hold_on_any_branches(branches: tuple[str, ...]) -> None:
    trap = zoo.BY_NAME["two calls"]
    conversion = guarantees.check_all(trap.model, trap.inputs(), branches=branches).conversion
    assert {swap.branches for swap in conversion.plan.swaps} == {branches}


BATCH_SAMPLE = (
    "functional",
    "keyword arguments",
    "two calls",
    "dropout beside it",
    "control flow around modules",
    "a GraphModule with a functional call",
    "shared block",
    "called several times",
    "one position",
    "momentum=None",
    "tracking stopped later",
    "half-frozen",
    "SyncBatchNorm",
    "BatchNormAct2d",
)


@pytest.mark.parametrize("name", BATCH_SAMPLE)
def test_every_guarantee_holds_with_batch_statistics(name: str) -> None:
    trap = zoo.BY_NAME[name]
    checked = guarantees.check_all(trap.model, trap.inputs(), **options_of(trap), bn_statistics="batch")
    assert None not in checked.errors.values()
    assert {swap.bn_statistics for swap in checked.conversion.plan.swaps} == {"batch"}


@pytest.mark.parametrize("name", ["functional", "called several times", "BatchNormAct2d"])
def test_renorm_keeps_the_function_in_evaluation(name: str) -> None:
    trap = zoo.BY_NAME[name]
    conversion = guarantees.check_all(
        trap.model, trap.inputs(), modes=("evaluation",), bn_statistics="renorm"
    ).conversion
    assert {swap.bn_statistics for swap in conversion.plan.swaps} == {"renorm"}
    with pytest.raises(AssertionError, match="guarantee 1, training"):
        guarantees.same_function(trap.model(), conversion.model, trap.inputs(), ("training",))


@pytest.mark.parametrize("running", ["first.batch_norm", "batch_norm"])
def test_every_guarantee_holds_with_sites_of_both_kinds(running: str) -> None:
    trap = zoo.BY_NAME["two calls"]
    settings = {running: {"bn_statistics": "running"}}
    checked = guarantees.check_all(trap.model, trap.inputs(), bn_statistics="batch", settings=settings)
    assert {s.fqn for s in checked.conversion.plan.swaps if s.bn_statistics == "running"} == {running}
    assert None not in checked.errors.values()


def test_gates_of_frozen_sites_are_trained_on_request_only() -> None:
    trap = zoo.BY_NAME["half-frozen"]
    frozen, asked = (convert(trap.model(), trap.inputs(), train_frozen_gates=ask) for ask in (False, True))
    assert [swap.train_gates for swap in frozen.plan.swaps] == [False, True]
    assert not frozen.model.stem[1].mean_weight.requires_grad
    assert [swap.train_gates for swap in asked.plan.swaps] == [True, True]
    assert guarantees.alive(frozen.model, list(frozen.replaced), trap.inputs(), "as it is") == 2
    assert guarantees.alive(asked.model, list(asked.replaced), trap.inputs(), "as it is") == 4


# --- whole networks ---------------------------------------------------------------------------------------------------

IMAGES = zoo.image(2, 3, 64, 64)


@dataclass(frozen=True)
class Network:
    """A network, its input, how many sites it has, and the deciding arguments of its conversion."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    sites: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        torch.manual_seed(11)
        return zoo.randomise(self.make())


def from_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10, **options)


NETWORKS = {
    "timm resnet26": Network(from_timm("resnet26"), IMAGES, 29),
    "timm efficientnet_b0": Network(from_timm("efficientnet_b0", drop_path_rate=0.2), IMAGES, 49),
    "timm densenet121": Network(from_timm("densenet121"), IMAGES, 121),
    "timm mobilenetv3_large_100": Network(
        from_timm("mobilenetv3_large_100", drop_rate=0.2), zoo.image(2, 3, 96, 96), 46
    ),
    "timm regnety_002": Network(from_timm("regnety_002"), IMAGES, 44),
    "torchvision resnet18": Network(lambda: torchvision.models.resnet18(num_classes=10), IMAGES, 20),
    "torchvision resnet18 of InstanceNorm": Network(
        lambda: torchvision.models.resnet18(num_classes=10, norm_layer=nn.InstanceNorm2d), IMAGES, 20, zoo.OTHER_KINDS
    ),
    "torchvision resnet18 of GroupNorm": Network(
        lambda: torchvision.models.resnet18(num_classes=10, norm_layer=lambda c: nn.GroupNorm(1, c)),
        IMAGES,
        20,
        zoo.BEGUN,
    ),
    "torchvision video ResNet": Network(
        lambda: video.VideoResNet(video.BasicBlock, [video.Conv3DSimple] * 4, [1, 1, 1, 1], video.BasicStem, 10),
        zoo.image(2, 3, 4, 32, 32),
        12,
    ),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_every_guarantee_holds_on_a_network(network: Network) -> None:
    inputs = network.inputs()
    checked = guarantees.check_all(network.model, inputs, modes=("evaluation", "training"), **network.options)
    assert checked.conversion.plan.skips == ()
    assert len(checked.conversion.plan.swaps) == network.sites
    assert None not in checked.errors.values()
    assert checked.gates == 2 * network.sites


# --- the checks themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 8), (2, 5, 7), (2, 4, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("running", [False, True])
def test_the_closed_form_of_the_laws_is_the_oracle(shape: tuple[int, ...], running: bool) -> None:
    x, dy = torch.randn(shape).double(), torch.randn(shape).double()
    branches = ("ln", "bn") if len(shape) == 2 else oracles.ALL_BRANCHES
    shares, var_shares = (torch.rand(len(branches)).double() for _ in range(2))
    weight = torch.rand(shape[1]).double()
    constants = oracles.Constants(torch.randn(shape[1]).double(), torch.rand(shape[1]).double()) if running else None
    visit = guarantees.Visit(x, weight, constants, 1e-3, dy)
    expected = oracles.backward(dy, x, shares, var_shares, weight, branches, constants, 1e-3)
    mean, var, *_ = guarantees.share_gradients(visit, shares, var_shares, branches)
    torch.testing.assert_close(mean, expected.mean_weight, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(var, expected.var_weight, rtol=1e-12, atol=1e-13)
