"""bake: every layer becomes what its weights say, the outputs stay, and BN is folded only where that is exact."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import normswap
from normswap.baking.bake_plan import BakePlan
from normswap.baking.compact_norm import CompactNorm
from normswap.baking.network_baking import apply_bake_plan
from normswap.errors import ArgumentError, PlanError
from normswap.surgery.importance import gated_modules
from tests.baking.test_compact_norm import relative
from tests.helpers import files

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Convolutions and linear layers with norms of several ranks after them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, groups=3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 3)
        self.up_norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        self.fc_norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc_norm(self.fc(self.up_norm(self.up(x)).mean((2, 3))))  # type: ignore[no-any-return]


class Reused(nn.Module):
    """Norms that cannot be folded: a layer called twice, an output used twice, a norm called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.kept, self.third = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.once, self.shared = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.twice(self.first(self.twice(x))))
        y = self.kept(x)
        x = self.third(y) + y
        return self.shared(self.shared(self.once(x)))  # type: ignore[no-any-return]


def converted(model: nn.Module, x: Tensor = X, **options: Any) -> nn.Module:
    return normswap.convert(files.scrambled(model).eval(), x, **options).model.eval()


def move(model: nn.Module, *points: tuple[float, ...]) -> nn.Module:
    """Set the gates of the layers to these points by turns."""
    for index, layer in enumerate(gated_modules(model).values()):
        point = torch.tensor(points[index % len(points)][-len(layer.branches) :])
        for gate in (layer.mean_weight, layer.var_weight):
            gate.data.copy_(point / point.sum())
    return model


VERTICES = {"in": (1.0, 0.0, 0.0), "ln": (0.0, 1.0, 0.0), "bn": (0.0, 0.0, 1.0), "mix": (0.2, 0.3, 0.5)}


def test_each_layer_becomes_what_its_weights_say() -> None:
    model = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(4)))
    layers = move(converted(model), *VERTICES.values())
    baked = normswap.bake(layers, X)
    assert [type(layer) for layer in baked.model] == [nn.InstanceNorm2d, nn.GroupNorm, nn.BatchNorm2d, CompactNorm]  # type: ignore[attr-defined]
    assert [site.result for site in baked.plan.sites] == ["instance norm", "group norm", "batch norm", "compact"]
    assert relative(baked.model(X), copy.deepcopy(layers).double()(X.double())) < 1e-6
    assert baked.plan.measurement is not None
    assert baked.plan.measurement.relative_error < 1e-6
    assert type(layers[0]).__name__ == "SwitchNorm2d"  # type: ignore[index]


@pytest.mark.parametrize("weights", VERTICES)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"match": False}, {"start": "gn", "num_groups": 3}, {"start": "uniform"}], ids=str
)
def test_the_function_stays_at_any_rank_and_start(weights: str, rank: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, *(4, 3, 2)[:rank])
    bn = getattr(nn, f"BatchNorm{rank}d")(6)
    layers = move(converted(nn.Sequential(bn), x, **options), VERTICES[weights] if not options.get("start") else (1, 2))
    baked = normswap.bake(layers)
    assert relative(baked.model(x), copy.deepcopy(layers).double()(x.double())) < 1e-6
    assert not gated_modules(baked.model)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(6, affine=True), nn.GroupNorm(3, 6), nn.GroupNorm(1, 6)], ids=str)
def test_other_norms_that_stayed_come_back(norm: nn.Module) -> None:
    x = torch.randn(2, 6, 4, 4)
    layers = converted(nn.Sequential(copy.deepcopy(norm)), x, kinds=("in", "gn", "gn1"))
    baked = normswap.bake(layers)
    assert type(baked.model[0]) is type(norm)  # type: ignore[index]
    assert torch.equal(baked.model(x), norm(x))


def test_norms_of_timm_keep_their_activation() -> None:
    from timm.layers import BatchNormAct2d

    layers = converted(nn.Sequential(nn.Conv2d(3, 6, 3), BatchNormAct2d(6)))
    for point in (VERTICES["bn"], VERTICES["mix"]):
        moved = move(copy.deepcopy(layers), point)
        for fold in (False, True):
            assert relative(normswap.bake(moved, fold=fold).model(X), moved(X)) < 1e-6


def test_running_statistics_stay_in_training() -> None:
    layers = converted(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)))
    baked = normswap.bake(layers).model.train()
    before = copy.deepcopy(baked.state_dict())
    assert torch.equal(baked(X), baked.eval()(X))
    again = copy.deepcopy(baked).train()
    again(X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
    assert type(baked[1]) is nn.BatchNorm2d  # type: ignore[index]


def test_batch_statistics_stay_in_training_too() -> None:
    layers = converted(nn.Sequential(nn.BatchNorm2d(3)), bn_statistics="batch")
    baked = normswap.bake(layers).model.train()
    baked(X)
    assert baked[0].num_batches_tracked == 1  # type: ignore[index]


def test_a_native_layer_and_one_that_depends_on_the_batch() -> None:
    native = normswap.SwitchNorm2d(3, gate="simplex")
    batch = normswap.SwitchNorm2d(3, track_running_stats=False)
    baked = normswap.bake(nn.Sequential(move(native, VERTICES["bn"]), batch).eval())
    assert type(baked.model[0]) is nn.BatchNorm2d  # type: ignore[index]
    (kept,) = [site for site in baked.plan.sites if site.result == "kept"]
    assert (kept.fqn, str(kept.reason)[:24]) == ("1", "its `bn` branch has weig")
    assert gated_modules(baked.model).keys() == {"1"}


def test_nearly_decided_layers_need_a_tolerance() -> None:
    layers = move(converted(nn.Sequential(nn.BatchNorm2d(3))), (0.01, 0.0, 0.99))
    assert normswap.bake(layers, X).plan.sites[0].result == "compact"
    baked = normswap.bake(layers, X, tolerance=0.02)
    assert baked.plan.sites[0].result == "batch norm"
    assert baked.plan.measurement is not None
    assert 1e-4 < baked.plan.measurement.relative_error < 0.1


def test_softmax_gates_bake_into_compact_layers() -> None:
    layers = converted(nn.Sequential(nn.BatchNorm2d(3)), gate="softmax")
    baked = normswap.bake(layers)
    assert baked.plan.sites[0].result == "compact"
    assert relative(baked.model(X), layers(X)) < 1e-6


def test_layers_with_one_position_get_the_weights_that_they_use() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    layers = move(converted(model), (0.5, 0.2, 0.3))
    with pytest.warns(UserWarning, match="one spatial position"):
        expected = layers(X[:, :, :1, :1])
    baked = normswap.bake(layers, X[:, :, :1, :1])
    assert relative(baked.model(X[:, :, :1, :1]), expected) < 1e-6


def test_a_norm_with_one_and_with_several_positions_is_kept() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(x.mean((2, 3), keepdim=True))  # type: ignore[no-any-return]

    layers = normswap.convert(Twice().eval()).model.eval()
    move(layers, VERTICES["mix"])
    with pytest.warns(UserWarning, match="one spatial position"):
        (site,) = normswap.bake(layers, X).plan.sites
    assert site.result == "kept"
    assert "with one spatial position and with several" in str(site.reason)


def test_functional_sites_are_kept_and_listed() -> None:
    layers = converted(files.FunctionalNet())
    baked = normswap.bake(layers, X, fold=True)
    assert {site.fqn: site.result for site in baked.plan.sites} == {"norm": "batch norm", "batch_norm": "kept"}
    assert relative(baked.model(X), layers(X)) < 1e-6


# --- folding


def test_folding_reaches_every_kind_of_layer() -> None:
    model = Block()
    layers = converted(model)
    baked = normswap.bake(layers, X, fold=True)
    assert [site.folded_into for site in baked.plan.sites] == ["conv", "up", "fc"]
    assert relative(baked.model(X), model(X)) < 1e-5
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in baked.model.modules())


@pytest.mark.parametrize("rank", [1, 3])
def test_folding_at_other_ranks(rank: int) -> None:
    x = torch.randn(2, 3, *(5, 4, 3)[:rank])
    model = nn.Sequential(getattr(nn, f"Conv{rank}d")(3, 4, 2), getattr(nn, f"BatchNorm{rank}d")(4), nn.ReLU())
    baked = normswap.bake(converted(model, x), x, fold=True)
    assert baked.plan.sites[0].folded_into == "0"
    assert relative(baked.model(x), model(x)) < 1e-5


def test_what_cannot_be_folded_says_why() -> None:
    layers = converted(Reused())
    baked = normswap.bake(layers, X, fold=True)
    assert {site.fqn: str(site.reason) for site in baked.plan.sites} == {
        "first": "the layer before it is called 2 times",
        "second": "the layer before it is called 2 times",
        "third": "the output of the layer before it is used elsewhere too",
        "shared": "it is called 2 times",
    }
    assert relative(baked.model(X), layers(X)) < 1e-6


class Standardized(nn.Conv2d):
    """A convolution that computes with another weight than its own, and that tracers do not enter."""

    __module__ = "torch.nn.standardized"

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.std()
        return nn.functional.conv2d(x, weight, self.bias)


def _normalized() -> nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))


def _hooked() -> nn.Module:
    layer = nn.Conv2d(3, 4, 1)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return layer


LAYERS = {
    "activation": (nn.ReLU, 3, "not the output of a convolution or a linear layer"),
    "another use of the weight": (lambda: Standardized(3, 4, 1), 4, "computes another function of its weight"),
    "transposed with groups": (
        lambda: nn.ConvTranspose2d(3, 3, 1, groups=3),
        3,
        "a transposed convolution with groups",
    ),
    "parametrized": (_normalized, 4, "is computed (pruned, or parametrized)"),
    "hooks": (_hooked, 4, "has hooks"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_take_up_no_norm(name: str) -> None:
    make, channels, reason = LAYERS[name]
    layers = converted(nn.Sequential(make(), nn.BatchNorm2d(channels)))
    baked = normswap.bake(layers, X, fold=True)
    assert reason in str(baked.plan.sites[0].reason)
    assert relative(baked.model(X), layers(X)) < 1e-6


def test_a_shared_weight_and_a_linear_layer_of_unknown_rank() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    baked = normswap.bake(converted(model), fold=True)
    assert baked.plan.sites[0].reason == "the layer before it shares its weight with another one"
    linear = normswap.convert(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()).model.eval()
    assert "pass example_inputs=" in str(normswap.bake(linear, fold=True).plan.sites[0].reason)
    x = torch.randn(2, 3, 3)
    assert "another dimension" in str(normswap.bake(linear, x, fold=True).plan.sites[0].reason)


def test_a_model_that_cannot_be_traced_is_baked_and_not_folded() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x if x.sum() > 0 else -x))  # type: ignore[no-any-return]

    (site,) = normswap.bake(converted(Branching()), X, fold=True).plan.sites
    assert (site.result, site.folded_into) == ("batch norm", None)
    assert str(site.reason).startswith("the network cannot be traced: TraceError")


def test_graph_modules_and_frozen_norms_fold() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    graph = normswap.convert(files.scrambled(model).eval(), X, as_graph=True).model.eval()
    baked = normswap.bake(graph, X, fold=True)
    assert [site.folded_into for site in baked.plan.sites] == ["0"]
    assert relative(baked.model(X), model(X)) < 1e-5
    torchvision = pytest.importorskip("torchvision")
    frozen = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), torchvision.ops.FrozenBatchNorm2d(4))
    frozen[1].running_mean.normal_()
    baked = normswap.bake(normswap.convert(frozen.eval(), X).model, X, fold=True)
    assert baked.plan.sites[0].folded_into == "0"
    assert relative(baked.model(X), frozen(X)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "regnety_002", "densenet121", "mobilenetv3_small_050"])
def test_networks_of_the_zoo_fold_to_the_outputs_of_the_original(name: str) -> None:
    torch.manual_seed(0)
    model = files.scrambled(timm.create_model(name)).eval()
    with torch.no_grad():
        baked = normswap.bake(normswap.convert(model, X).model, X, fold=True)
        assert relative(baked.model(X), model(X)) < 1e-4
    into = baked.plan.counts["folded"]
    assert into == (59 if name == "densenet121" else len(baked.plan.sites))


# --- the plan and the arguments


def test_a_plan_rebuilds_the_structure_from_the_conversion() -> None:
    model, points = nn.Sequential(Block(), nn.Flatten()), list(VERTICES.values())
    conversion = normswap.convert(files.scrambled(model).eval(), X)
    layers = move(conversion.model, *points).eval()
    baked = normswap.bake(layers, X, fold=True)
    plan = BakePlan.from_json(baked.plan.to_json())
    assert plan == baked.plan
    blank = copy.deepcopy(model)
    normswap.apply_plan(blank, conversion.plan)
    apply_bake_plan(blank, plan)
    blank.load_state_dict(baked.model.state_dict(), strict=True)
    assert torch.equal(blank.eval()(X), baked.model(X))


def test_a_plan_of_another_model_is_refused() -> None:
    plan = normswap.bake(converted(Block()), X, fold=True).plan
    with pytest.raises(PlanError, match="which has no norm"):
        apply_bake_plan(converted(nn.Sequential(nn.BatchNorm2d(3))), plan)
    other = converted(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    wrong = normswap.bake(other, X, fold=True).plan
    with pytest.raises(PlanError, match="1 cannot be folded"):
        apply_bake_plan(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), wrong)
    moved = normswap.bake(move(copy.deepcopy(other), VERTICES["ln"])).plan
    text = moved.to_json().replace('"group norm"', '"batch norm"')
    with pytest.raises(PlanError, match="1 cannot become a batch norm"):
        apply_bake_plan(other, BakePlan.from_json(text))
    with pytest.raises(PlanError, match="expected a bake plan as JSON"):
        BakePlan.from_json('{"sites": 3}')


def test_bad_arguments() -> None:
    model = converted(nn.Sequential(nn.BatchNorm2d(3)))
    for wrong in (-0.1, 0.5, True, "0"):
        with pytest.raises(ArgumentError, match="tolerance: expected a number from 0"):
            normswap.bake(model, tolerance=wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="fold: expected True or False"):
        normswap.bake(model, fold=1)  # type: ignore[arg-type]


def test_inplace_keeps_objects_and_wrappers() -> None:
    layers = nn.DataParallel(converted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    inside = layers.module
    alias = inside[1]  # type: ignore[index]
    baked = normswap.bake(layers, X, inplace=True)
    assert baked.model is layers
    assert type(alias) is nn.BatchNorm2d
    assert alias is inside[1]  # type: ignore[index]
    again = normswap.bake(nn.DataParallel(converted(nn.Sequential(nn.BatchNorm2d(3)))))
    assert isinstance(again.model, nn.DataParallel)
    assert repr(baked) == "Baked(DataParallel, 1 site: 1 batch norm)"
    assert "Baked sites" in str(baked)
    assert "output error" in str(baked.plan)
