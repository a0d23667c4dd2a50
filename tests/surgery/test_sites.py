"""Norm sites: tree, graphs and one pass in one ordered tuple of facts."""

import random
import re
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from timm.models import create_model
from torch import Tensor, nn

from normswap import KNOWN_NORMS, NormSite, find_norm_sites, read_batch_norm
from normswap.errors import ModelError
from tests.helpers import guarantees, zoo


def site(model: nn.Module, inputs: Any = None) -> NormSite:
    found = find_norm_sites(model, inputs)
    assert len(found) == 1
    return found[0]


def test_a_module_site_reports_all_that_is_known() -> None:
    model = nn.Sequential(zoo.conv(), zoo.bn(eps=1e-3, momentum=0.01))
    assert site(model, zoo.IMAGE()) == NormSite(
        fqn="1",
        aliases=(),
        kind="bn",
        class_name="torch.nn.modules.batchnorm.BatchNorm2d",
        num_features=8,
        eps=1e-3,
        momentum=0.01,
        has_running_stats=True,
        untrained=True,
        shapes=((3, 8, 9, 9),),
        calls=1,
        order=0,
        producer="0",
        seen_by="forward pass",
    )


def test_a_functional_site_reports_its_owner() -> None:
    model = nn.Sequential(zoo.FunctionalBlock(), nn.ReLU())
    assert site(model, zoo.IMAGE()) == NormSite(
        fqn="0.batch_norm",
        aliases=(),
        kind="bn",
        class_name="torch.nn.functional.batch_norm",
        num_features=8,
        has_running_stats=True,
        untrained=True,
        owner="0",
        shapes=((3, 8, 9, 9),),
        calls=1,
        order=0,
        seen_by="forward pass",
    )


def test_without_an_input_the_graph_reports_order_and_nothing_gives_shapes() -> None:
    found = find_norm_sites(zoo.Generator())
    assert [(s.fqn, s.order, s.seen_by, s.shapes, s.calls) for s in found] == [
        ("norms.0.batch_norm", 0, "symbolic trace", None, None),
        ("norms.1.batch_norm", 1, "symbolic trace", None, None),
        ("last_norm", 2, "symbolic trace", None, None),
    ]
    assert [s.num_features for s in found] == [8, 8, 8]
    assert found[2].producer == "convs.1"


def test_without_a_graph_the_tree_is_left() -> None:
    found = find_norm_sites(zoo.Untraceable())
    assert [(s.fqn, s.order, s.seen_by) for s in found] == [
        ("bn", None, "module tree"),
        ("block.batch_norm", None, "module tree"),
    ]


class Backwards(nn.Module):
    """Registered in another order than it runs, and one site not at all in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.auxiliary, self.first, self.conv = zoo.bn(), zoo.bn(), zoo.bn(), zoo.conv()

    def forward(self, x: Tensor) -> Any:
        x = self.last(self.first(self.conv(x)))
        return (x, self.auxiliary(x)) if self.training else x


def test_sites_come_as_they_run_and_the_others_after_them() -> None:
    for inputs in (None, zoo.IMAGE()):
        found = find_norm_sites(Backwards(), inputs)
        assert [(s.fqn, s.order) for s in found] == [("first", 0), ("last", 1), ("auxiliary", None)]
    assert (found[2].shapes, found[2].calls, found[2].seen_by) == ((), 0, "module tree")


def test_aliases_calls_and_the_smallest_number_of_positions() -> None:
    assert site(zoo.TwoNames()).aliases == ("alias",)
    shared = site(zoo.SharedBlock(zoo.FunctionalBlock(8, 8)), zoo.IMAGE())
    assert (shared.fqn, shared.aliases, shared.owner) == ("left.batch_norm", ("right.0.batch_norm",), "left")
    assert (shared.shapes, shared.calls) == (((3, 8, 9, 9),), 2)
    several = site(zoo.Recurrent(), zoo.IMAGE())
    assert (several.calls, several.positions) == (3, 9)
    assert site(zoo.Recurrent()).positions is None
    assert [s.positions for s in find_norm_sites(zoo.Heads(), torch.randn(4, 3, 10))] == [8, 1]


def test_two_calls_of_one_owner_are_two_sites_with_shapes_of_their_own() -> None:
    found = {s.fqn: s for s in find_norm_sites(nn.Sequential(zoo.TwiceBlock()), zoo.IMAGE())}
    assert found["0.batch_norm"].num_features == 8
    assert found["0.batch_norm_1"].num_features == 12
    assert found["0.batch_norm_1"].shapes == ((3, 12, 9, 9),)


def frozen(*names: str) -> nn.Module:
    block = zoo.FunctionalBlock()
    for name in names:
        getattr(block, name).requires_grad_(False)
    return block


TRAINABLE = {
    "both": (zoo.BY_NAME["two names"].make(), True),
    "affine=False": (nn.Sequential(zoo.bn(affine=False)), True),
    "frozen parameters": (zoo.frozen_norm(), False),
    "frozen class": (zoo.BY_NAME["torchvision FrozenBatchNorm2d"].make(), False),
    "functional": (frozen(), True),
    "functional, half": (frozen("weight"), True),
    "functional, frozen": (frozen("weight", "bias"), False),
    "functional without affine": (zoo.HiddenHelper(), True),
}


@pytest.mark.parametrize(("model", "trainable"), TRAINABLE.values(), ids=TRAINABLE)
def test_trainable_where_some_own_parameter_is_or_there_is_none(model: nn.Module, trainable: bool) -> None:
    assert site(model).trainable is trainable


def test_frozen_synchronised_and_unregistered_sites_are_marked() -> None:
    assert site(zoo.BY_NAME["torchvision FrozenBatchNorm2d"].make()).frozen
    assert site(zoo.BY_NAME["SyncBatchNorm"].make()).synchronize
    assert [s.registered for s in find_norm_sites(zoo.InContainers())] == [False, False]
    assert [s.registered for s in find_norm_sites(zoo.ListBeside())] == [True, True]


def test_a_call_that_does_not_run_every_time_is_a_problem() -> None:
    class Depends(zoo.FunctionalBlock):
        """The trace takes one way, the input another: a bool argument that is fed."""

        def forward(self, x: Tensor, again: Any) -> Tensor:
            x = super().forward(x)
            if again is not None:
                x = torch.nn.functional.batch_norm(x, None, None, training=True)
            return x

    found = find_norm_sites(Depends(), (zoo.IMAGE(), None))
    assert {s.problem for s in found} == {
        "not every F.batch_norm call runs in every pass: move the call into a small module"
    }


def test_a_problem_names_the_class_the_reason_and_the_way_out() -> None:
    assert site(zoo.UntraceableCall(), zoo.IMAGE()).problem == (
        "the forward of UntraceableCall cannot be rewritten (TraceError: symbolically traced variables cannot be used "
        "as inputs to control flow): move its F.batch_norm call into a small module, or use nn.BatchNorm"
    )


def test_what_a_caller_knows_is_no_problem() -> None:
    norms = KNOWN_NORMS | {zoo.TheirNorm: read_batch_norm}
    assert site(nn.Sequential(zoo.TheirNorm(3))).problem is not None
    assert find_norm_sites(nn.Sequential(zoo.TheirNorm(3)), norms=norms)[0].problem is None


def test_a_class_registered_as_a_norm_is_no_owner_of_its_call() -> None:
    norms = KNOWN_NORMS | {zoo.OwnNorm: read_batch_norm}
    for inputs in (None, zoo.FEATURES()):
        found = find_norm_sites(nn.Sequential(zoo.OwnNorm()), inputs, norms=norms)
        assert [(s.fqn, s.owner) for s in found] == [("0", None)]
        assert found[0].problem == (
            "is left as it is, since the reader registered for its class in norms= failed: "
            "'OwnNorm' object has no attribute 'num_features'"
        )


@pytest.mark.parametrize("lazy", [nn.LazyBatchNorm2d(), nn.LazyConv2d(4, 1)], ids=["norm", "conv"])
def test_sizes_must_be_resolved_before_a_pass_is_watched(lazy: nn.Module) -> None:
    model = nn.Sequential(lazy, zoo.bn(4))
    name = type(lazy).__name__
    with pytest.raises(ModelError, match=re.escape(f"0 ({name}) is lazy and has no sizes yet: run it once first")):
        find_norm_sites(model, zoo.IMAGE())
    with pytest.raises(ModelError, match=re.escape(f"the model ({name}) is lazy and has no sizes yet")):
        find_norm_sites(lazy, zoo.IMAGE())
    assert type(model[0]).__name__ == name
    assert find_norm_sites(model)[-1].problem is None


def test_a_site_is_a_frozen_record() -> None:
    with pytest.raises(FrozenInstanceError):
        site(zoo.TwoNames()).kind = "gn"  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("trap", zoo.TRAPS, ids=lambda trap: trap.name)
@pytest.mark.parametrize("blind", [False, True], ids=["seen", "blind"])
def test_finding_changes_nothing(trap: zoo.Trap, blind: bool) -> None:
    model, inputs = trap.model(), None if blind else trap.inputs()
    before, states = guarantees.Record.of(model), (torch.get_rng_state(), random.getstate())
    find_norm_sites(model, inputs)
    guarantees.nothing_else_changed(before, model, guarantees.NO_SWAPS, same_objects=True)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()


NETWORKS = {"resnet18": 20, "levit_128s": 52, "repvgg_a0": 61, "vit_tiny_patch16_224": 25, "convnext_atto": 17}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sites"), NETWORKS.items())
def test_sites_of_whole_networks_on_the_meta_device(name: str, sites: int) -> None:
    model = create_model(name).to("meta")
    size = model.pretrained_cfg["input_size"]
    found = find_norm_sites(model, torch.empty(2, *size, device="meta"))
    assert len(found) == sites
    assert len({s.fqn for s in found}) == sites
