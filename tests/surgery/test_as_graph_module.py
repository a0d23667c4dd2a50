"""as_graph=True: one GraphModule on the same tensors that still obeys its mode."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import normswap
from normswap.errors import SwapError
from normswap.layers.gated_module import GatedModule


class Dropped(nn.Module):
    """BN beside a functional dropout and a mode-dependent branch without norms."""

    class Jitter(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x) if self.training else x

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.jitter = Dropped.Jitter()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.jitter(self.bn(self.conv(x))), 0.5, training=self.training)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.register_buffer("mean", torch.randn(8) / 4)
        self.register_buffer("var", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.inner(x), self.mean, self.var, training=self.training)


def drop_path_net() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=5, drop_path_rate=0.5, drop_rate=0.3)


MODELS = [
    ("dropout and a forked child", Dropped, (4, 3, 9, 9)),
    ("a functional site", Functional, (4, 3, 9, 9)),
    ("timm with drop path", drop_path_net, (2, 3, 64, 64)),
]
EACH = pytest.mark.parametrize(("build", "shape"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])


def run(module: nn.Module, x: Tensor, *, training: bool) -> Tensor:
    torch.manual_seed(3)
    return module.train(training)(x)


@EACH
def test_the_graph_is_the_same_function_in_both_modes(build, shape) -> None:  # type: ignore[no-untyped-def]
    model, x = build(), torch.randn(shape)
    graph = normswap.convert(model, x, as_graph=True, bn_statistics="batch").model
    assert isinstance(graph, fx.GraphModule)
    assert any(isinstance(module, GatedModule) for module in graph.modules())
    for training in (True, False, True):
        torch.testing.assert_close(run(graph, x, training=training), run(model, x, training=training))


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_the_graph_obey_their_mode(build, shape, copied) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(shape)
    graph = normswap.convert(build(), x, as_graph=True, bn_statistics="batch").model
    twin = copied(graph)
    for training in (True, False):
        assert torch.equal(run(twin, x, training=training), run(graph, x, training=training))
    assert not torch.equal(run(twin, x, training=True), run(twin, x, training=False))


@pytest.mark.slow
def test_keys_and_parameters_are_those_of_the_converted_model() -> None:
    model, x = drop_path_net(), torch.randn(2, 3, 64, 64)
    tree = normswap.convert(model, x).model
    graph = normswap.convert(model, x, as_graph=True).model
    assert graph.state_dict().keys() == tree.state_dict().keys()
    assert normswap.verify(model, graph, [x]).passed


def test_in_place_the_graph_runs_on_the_very_parameters() -> None:
    model, x = Dropped(), torch.randn(4, 3, 9, 9)
    weight = model.conv.weight
    graph = normswap.convert(model, x, as_graph=True, inplace=True).model
    assert graph.conv.weight is weight


class Forked(nn.Module):
    """Another path in training, at the root, where no leaf can hide it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) * 2 if self.training else self.bn(x)


class Undecided(Forked):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("build", "reason"), [(Forked, "training and evaluation run different operations"), (Undecided, "control flow")]
)
def test_what_is_not_one_graph_is_refused(build: type[nn.Module], reason: str) -> None:
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(
        SwapError, match=f"{build.__name__} cannot be made one graph .*{reason}.*: convert without as_graph"
    ):
        normswap.convert(build(), x, as_graph=True)


def test_a_refusal_in_place_leaves_the_model_as_it_was() -> None:
    model = Forked()
    with pytest.raises(SwapError, match="cannot be made one graph"):
        normswap.convert(model, torch.randn(2, 3, 4, 4), as_graph=True, inplace=True)
    assert type(model.bn) is nn.BatchNorm2d


def test_a_functional_site_of_a_graph_is_put_back() -> None:
    model, x = Functional(), torch.randn(4, 3, 9, 9)
    graph = normswap.revert(normswap.convert(model, x, as_graph=True).model)
    assert graph.state_dict().keys() == model.state_dict().keys()
    assert not any(isinstance(module, GatedModule) for module in graph.modules())
    for training in (True, False):
        assert torch.equal(run(graph, x, training=training), run(model, x, training=training))
