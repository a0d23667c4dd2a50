"""Freezing and re-estimating running statistics: on BN what libraries do, on SN the same, and all put back."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from timm.layers.norm_act import FrozenBatchNorm2d
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from normswap import (
    SwapPlan,
    convert,
    freeze_statistics,
    revert,
    set_bn_statistics,
    unfreeze_statistics,
    update_statistics,
)
from normswap.errors import LayerError, ModelError, PlanError
from normswap.surgery.importance import gated_modules
from tests.helpers import guarantees, zoo

X = zoo.image(4, 3, 9, 9)().double()
BATCHES = [zoo.image(n, 3, 9, 9)().double() * n for n in (4, 2, 3)]


class Net(nn.Module):
    """Two sites, one of them without a momentum; one that was frozen before, and one that tracks nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = zoo.conv(), zoo.bn(), nn.Dropout(0.0)
        self.ice = FrozenBatchNorm2d(8)
        self.last, self.untracked = nn.BatchNorm2d(8, momentum=None), nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.untracked(self.ice(self.last(self.act(self.bn(self.conv(x)).relu()))).sin())


def original() -> Any:
    torch.manual_seed(5)
    return zoo.randomise(Net()).double().train()


MAKES: dict[str, Callable[[], Any]] = {
    "BN": original,
    "SN": lambda: convert(original(), X, bn_statistics="batch", match=False).model,
    "SN and BN": lambda: convert(original(), X, exclude=["last"], bn_statistics="batch", match=False).model,
}
every_make = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert guarantees.distance(value, second[name]) <= guarantees.LIMIT, name


# --- freezing ---------------------------------------------------------------------------------------------------------


@every_make
def test_frozen_statistics_are_used_in_training_and_stay(make: Callable[[], Any]) -> None:
    reference, model = original(), make()
    reference.bn.eval()
    reference.last.eval()
    assert freeze_statistics(model) == ["bn", "last"]
    before = statistics(model)
    model.train()  # which undoes what `eval()` does to a layer
    y = model(X)
    assert guarantees.distance(reference(X), y) <= guarantees.LIMIT
    assert_same(before, statistics(model))
    y.square().sum().backward()
    assert model.bn.weight.grad.abs().sum() > 0
    assert all(module.training for module in model.modules())
    model.eval()(X)
    assert not any(module.training for module in model.modules())
    assert freeze_statistics(model) == []


@every_make
def test_unfrozen_statistics_are_as_they_were(make: Callable[[], Any]) -> None:
    reference, model = make(), make()
    record = guarantees.Record.of(model)
    freeze_statistics(model)
    assert unfreeze_statistics(model) == ["bn", "last"]
    after = guarantees.Record.of(model)
    assert (after.attributes.keys(), after.hooks) == (record.attributes.keys(), record.hooks)
    assert guarantees.distance(reference(X), model(X)) <= guarantees.LIMIT
    assert_same(statistics(reference), statistics(model))
    assert unfreeze_statistics(model) == []


@every_make
def test_a_copy_of_a_frozen_model_is_frozen(make: Callable[[], Any]) -> None:
    model = make()
    freeze_statistics(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert guarantees.distance(model(X), twin(X)) <= guarantees.LIMIT
        assert unfreeze_statistics(twin) == ["bn", "last"]
        assert guarantees.distance(make()(X), twin(X)) <= guarantees.LIMIT


def test_a_part_can_be_frozen_and_other_hooks_stay() -> None:
    model = MAKES["SN and BN"]()
    seen: list[Any] = []
    model.last.register_forward_hook(lambda *_: seen.append(model.last.training))
    model.last.register_forward_pre_hook(lambda *_: seen.append(model.last.training))
    assert freeze_statistics(model.last) == [""]
    model(X)
    assert unfreeze_statistics(model) == ["last"]
    model(X)
    assert seen == [True, False, True, True]


def test_a_frozen_layer_that_fails_is_put_back_too() -> None:
    model = MAKES["SN and BN"]()
    freeze_statistics(model)
    with pytest.raises(ValueError, match="expected 4D input"):
        model.last(X[0])
    assert model.last.training


def test_functional_sites_are_frozen_with_the_rest() -> None:
    torch.manual_seed(5)
    model = zoo.randomise(zoo.FunctionalBlock()).double().train()
    reference = copy.deepcopy(model).eval()
    model = convert(model, X).model
    before = statistics(model)
    assert freeze_statistics(model) == ["batch_norm"]
    assert guarantees.distance(reference(X), model.train()(X)) <= guarantees.LIMIT
    assert_same(before, statistics(model))
    assert unfreeze_statistics(model) == ["batch_norm"]


def test_sites_with_running_statistics_keep_them_when_unfrozen() -> None:
    model = convert(original(), X).model
    assert unfreeze_statistics(model) == []
    assert freeze_statistics(model) == unfreeze_statistics(model) == ["bn", "last"]
    assert (model.bn.bn_statistics, model.last.bn_statistics) == ("running", "running")


def test_a_frozen_model_converts_to_the_same_function_and_back() -> None:
    model = original()
    freeze_statistics(model)
    result = convert(model, X).model
    guarantees.same_function(model, result, X)
    assert unfreeze_statistics(result) == ["bn", "last"]
    guarantees.same_function(original(), result, X)
    freeze_statistics(result)
    assert type(revert(result).bn) is nn.BatchNorm2d


def test_names_are_those_inside_wrappers() -> None:
    model = nn.DataParallel(MAKES["SN and BN"]())
    assert freeze_statistics(model) == unfreeze_statistics(model) == ["bn", "last"]


# --- what the bn branches use -----------------------------------------------------------------------------------------


def modes(model: nn.Module) -> dict[str, str]:
    return {name: layer.bn_statistics for name, layer in gated_modules(model).items()}


def thawing_net() -> Any:
    """Sites `bn`, `ice` (which replaced a frozen BN), `last`, and `untracked`, which has nothing to choose."""
    return MAKES["SN"]()


@pytest.mark.parametrize("mode", ["renorm", "running"])
def test_bn_statistics_are_set_but_at_sites_that_were_frozen(mode: str) -> None:
    model = thawing_net()
    assert set_bn_statistics(model, mode) == ["bn", "last"]  # type: ignore[arg-type]
    assert modes(model) == {"bn": mode, "ice": "running", "last": mode, "untracked": "batch"}
    assert set_bn_statistics(model, mode) == []  # type: ignore[arg-type]
    assert set_bn_statistics(nn.DataParallel(model), "batch") == ["bn", "last"]
    assert modes(model) == modes(thawing_net())


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"include": ["re:la.*"]}, ["last"]),
        ({"exclude": ["b*"]}, ["last"]),
        ({"include": ["*"], "exclude": ["bn"]}, ["ice", "last"]),
        ({"include": "ice"}, ["ice"]),
    ],
    ids=["included", "excluded", "both", "frozen, by name"],
)
def test_bn_statistics_are_set_by_pattern(options: dict[str, Any], changed: list[str]) -> None:
    model = thawing_net()
    assert set_bn_statistics(model, "renorm", **options) == changed
    assert [name for name, mode in modes(model).items() if mode == "renorm"] == changed


def test_a_set_layer_computes_what_a_planned_one_does() -> None:
    planned, plan, _ = convert(original(), X, bn_statistics="renorm", match=False)
    assert SwapPlan.from_json(plan.to_json()) == plan
    model = MAKES["SN"]()
    assert set_bn_statistics(model, "renorm") == ["bn", "last"]
    assert planned(X).equal(model(X))
    assert_same(statistics(planned), statistics(model))
    assert not model(X).equal(MAKES["SN"]()(X))


def test_unfrozen_layers_renew_their_statistics_as_before() -> None:
    model = thawing_net()
    set_bn_statistics(model, "renorm", include=["bn"])
    before = {name: dict(vars(layer)) for name, layer in model.named_modules()}
    assert freeze_statistics(model) == ["bn", "last"]
    assert set(modes(model).values()) == {"running", "batch"}  # of what tracks nothing there is nothing to freeze
    assert unfreeze_statistics(model) == ["bn", "last"]
    assert modes(model) == {"bn": "renorm", "ice": "running", "last": "batch", "untracked": "batch"}
    assert {name: dict(vars(layer)).keys() for name, layer in model.named_modules()} == {
        name: attributes.keys() for name, attributes in before.items()
    }


def test_setting_ends_freezing_and_reverting_forgets_it() -> None:
    model = convert(original(), X, bn_statistics="renorm").model
    freeze_statistics(model)
    set_bn_statistics(model, "batch")
    freeze_statistics(model)
    assert unfreeze_statistics(model) == ["bn", "last"]
    assert modes(model)["bn"] == "batch"
    set_bn_statistics(model, "renorm")
    freeze_statistics(model)
    assert vars(revert(model).bn).keys() == vars(original().bn).keys()


def test_functional_sites_are_set_with_the_rest() -> None:
    model = convert(zoo.FunctionalBlock(), X.float()).model
    assert set_bn_statistics(model, "renorm") == ["batch_norm"]
    assert modes(model) == {"batch_norm": "renorm"}


def test_what_cannot_be_set_is_refused_before_anything_is() -> None:
    model = thawing_net()
    begin = {"1": {"branches": ("in", "ln", "bn")}}
    begun = convert(nn.Sequential(zoo.conv(), nn.InstanceNorm2d(8)), kinds=("in",), settings=begin).model
    cases: list[tuple[nn.Module, dict[str, Any], type[Exception], str]] = [
        (model, {"mode": "moving"}, LayerError, "bn_statistics: expected one of"),
        (model, {"mode": "renorm", "include": ["bm"]}, PlanError, "the pattern 'bm' matches none of the 3 layers"),
        (model, {"mode": "renorm", "exclude": ["un*"]}, PlanError, "the pattern 'un\\*' matches none"),
        (
            original(),
            {"mode": "renorm"},
            ModelError,
            "the model has no SN layer with a `bn` branch and running statistics",
        ),
        (
            begun,
            {"mode": "running"},
            ModelError,
            "the running statistics of 1 have not seen a batch yet: train the model or call",
        ),
    ]
    for network, options, error, message in cases:
        before = modes(network)
        with pytest.raises(error, match=message):
            set_bn_statistics(network, **options)
        assert modes(network) == before
    begun.train()(torch.randn(2, 3, 9, 9))
    assert set_bn_statistics(begun, "running") == ["1"]


# --- averaging --------------------------------------------------------------------------------------------------------


@every_make
@pytest.mark.parametrize(
    "as_item", [lambda x: x, lambda x: (x, "label"), lambda x: [x]], ids=["tensor", "tuple", "list"]
)
def test_statistics_are_updated_as_torch_updates_those_of_bn(
    make: Callable[[], Any], as_item: Callable[[Tensor], Any]
) -> None:
    reference, model = original(), make()
    update_bn([as_item(batch) for batch in BATCHES], reference)
    update_statistics(model, [as_item(batch) for batch in BATCHES])
    assert_same(statistics(reference), statistics(model))
    assert (model.bn.momentum, model.last.momentum) == (0.1, None)
    assert model.bn.num_batches_tracked == len(BATCHES)


def test_torch_itself_passes_sn_by() -> None:
    model = MAKES["SN"]()
    before = statistics(model)
    update_bn(BATCHES, model)
    assert_same(before, statistics(model))


class Elsewhere:
    """A batch on another device, of which a test has none."""

    def to(self, device: Any) -> Tensor:
        assert device == "here"
        return BATCHES[0]


def test_inputs_are_moved_on_request() -> None:
    reference, model = original(), MAKES["SN"]()
    update_bn([Elsewhere()], reference, device="here")  # type: ignore[arg-type]
    update_statistics(model, [Elsewhere()], device="here")
    assert_same(statistics(reference), statistics(model))


def test_flags_stay_and_no_graph_is_built() -> None:
    model = MAKES["SN and BN"]()
    model.eval()
    model.bn.train()
    flags = {name: module.training for name, module in model.named_modules()}
    seen: list[Tensor] = []
    model.register_forward_hook(lambda *args: seen.append(args[2]))
    update_statistics(model, BATCHES[:1])
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert not seen[0].requires_grad


@pytest.mark.parametrize("frozen", ["bn", "last"])
def test_frozen_statistics_are_left_alone(frozen: str) -> None:
    model = MAKES["SN and BN"]()
    before = statistics(model)
    freeze_statistics(model.get_submodule(frozen))
    update_statistics(model, BATCHES)
    changed = {name.split(".")[0] for name, buffer in statistics(model).items() if not buffer.equal(before[name])}
    assert changed == {"bn", "last"} - {frozen}


def test_running_statistics_are_constants_and_left_alone() -> None:
    model = convert(original(), X, exclude=["last"]).model
    before = statistics(model)
    update_statistics(model, BATCHES)
    assert {name.split(".")[0] for name, buffer in statistics(model).items() if not buffer.equal(before[name])} == {
        "last"
    }
    model = convert(original(), X).model
    with pytest.warns(UserWarning, match="no layer was updated: all 2 with running statistics use them as constants"):
        update_statistics(model, BATCHES)


def failing() -> Iterator[Tensor]:
    yield BATCHES[0]
    raise RuntimeError("the disk is full")


@every_make
def test_a_failure_leaves_everything_as_it_was(make: Callable[[], Any]) -> None:
    model = make().eval()
    before = statistics(model)
    for loader, error, message in (
        (failing(), RuntimeError, "the disk is full"),
        ([], ModelError, "loader: expected at least one batch, got none"),
    ):
        with pytest.raises(error, match=message):
            update_statistics(model, loader)
        assert_same(before, statistics(model))
        assert (model.bn.momentum, model.last.momentum) == (0.1, None)
        assert not any(module.training for module in model.modules())


def test_layers_are_selected_by_functions_too() -> None:
    model = convert(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(5)), bn_statistics="batch").model
    assert set_bn_statistics(model, "running", include=lambda module, fqn: module.num_features == 5) == ["1"]
    assert set_bn_statistics(model, "running", exclude=[lambda module, fqn: fqn == "1"]) == ["0"]
    with pytest.raises(PlanError, match=r"exclude: expected patterns .*, got the class BatchNorm2d: pass lambda"):
        set_bn_statistics(model, "batch", exclude=nn.BatchNorm2d)
