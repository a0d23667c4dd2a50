"""Torch-Pruning on converted networks: pruning and conversion commute."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.errors import LayerError
from normswap.layers.switch_norm import SwitchNorm
from tests.helpers.compact_networks import compacted
from tests.helpers.files import scrambled

tp = pytest.importorskip("torch_pruning", reason="needs torch-pruning")

# Whose branches all have weight. A network without `bn` keeps the gates at which it starts.
MEAN, VAR = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.3, 0.2])
SMALL_IMAGES = (2, 3, 64, 64)


def plain(conv: Any, norm: Any) -> nn.Module:
    return nn.Sequential(conv(3, 8, 3, padding=1), norm(8), nn.ReLU(), conv(8, 8, 3, padding=1), norm(8))


# Network, shape of its input, convolution whose output channels are removed.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "1-D": (lambda: plain(nn.Conv1d, nn.BatchNorm1d), (2, 3, 12), "0"),
    "2-D": (lambda: plain(nn.Conv2d, nn.BatchNorm2d), (2, 3, 8, 8), "0"),
    "3-D": (lambda: plain(nn.Conv3d, nn.BatchNorm3d), (2, 3, 6, 6, 6), "0"),
    "residual": (lambda: timm.create_model("resnet10t"), SMALL_IMAGES, "layer1.0.conv2"),
    "depthwise, norm and activation": (
        lambda: timm.create_model("mobilenetv3_small_050"),
        SMALL_IMAGES,
        "blocks.1.0.conv_pw",
    ),
    "concatenation": (
        lambda: timm.models.densenet.DenseNet(growth_rate=8, block_config=(2, 2), num_classes=4),
        SMALL_IMAGES,
        "features.denseblock1.denselayer1.conv2",
    ),
}


def prune(model: nn.Module, shape: tuple[int, ...], conv: str, removed: list[int]) -> nn.Module:
    """Return the model, pruned."""
    graph = tp.DependencyGraph().build_dependency(
        model, example_inputs=torch.randn(shape), customized_pruners=normswap.channel_pruners()
    )
    group = graph.get_pruning_group(model.get_submodule(conv), tp.prune_conv_out_channels, idxs=removed)
    assert graph.check_pruning_group(group)
    group.prune()
    return model


def converted(model: nn.Module, shape: tuple[int, ...], **options: Any) -> nn.Module:
    """Return the converted model with weight on all branches of each layer."""
    model = normswap.convert(model, torch.randn(shape), **options).model.eval()
    if "start" not in options:
        move_gates(model)
    return model


def move_gates(model: nn.Module) -> None:
    for name, gate in normswap.trainable_gates(model).items():
        weights = (MEAN if name.endswith("mean_weight") else VAR)[-len(gate) :]
        gate.data.copy_(weights / weights.sum())


def assert_same_tensors(ours: nn.Module, theirs: nn.Module) -> None:
    """The constants of `ln` up to rounding, everything else bit for bit."""
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        if name.endswith(("ln_mean_shift", "ln_var_scale")):
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pruned_network_is_that_of_pruning_before_the_conversion(name: str) -> None:
    make, shape, conv = NETWORKS[name]
    torch.manual_seed(0)
    model = scrambled(make()).eval()
    before = converted(prune(copy.deepcopy(model), shape, conv, [1, 5]), shape)
    after = prune(converted(copy.deepcopy(model), shape), shape, conv, [1, 5])
    assert_same_tensors(after, before)
    x = torch.randn(shape)
    torch.testing.assert_close(after(x), before(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"match": False},
        {"gate": "softmax"},
        {"start": "ln"},
        {"start": "uniform"},
        {"settings": {"*": {"num_groups": 2}}},
        {"start": "gn", "num_groups": 4},
        {"bn_statistics": "batch"},
        {"branches": ("in", "bn")},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_same_holds_for_other_options(options: dict[str, Any], backend: str) -> None:
    make, shape, conv = NETWORKS["2-D"]
    removed = [0, 2, 4, 6]  # one of each group
    torch.manual_seed(0)
    model = scrambled(make()).eval()
    with normswap.use_backend(backend):
        before = converted(prune(copy.deepcopy(model), shape, conv, removed), shape, **options)
        after = prune(converted(copy.deepcopy(model), shape, **options), shape, conv, removed)
        assert_same_tensors(after, before)
        x = torch.randn(shape)
        torch.testing.assert_close(after(x), before(x), rtol=1e-4, atol=1e-4)
    assert after(x).shape == model(x).shape


@pytest.mark.parametrize("options", [{}, {"start": "gn", "num_groups": 4}], ids=str)
def test_a_pruner_by_importance_prunes_the_whole_network(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = converted(timm.create_model("resnet10t").eval(), SMALL_IMAGES, **options)
    x = torch.randn(SMALL_IMAGES)
    pruner = tp.pruner.MagnitudePruner(
        model,
        x,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[model.get_submodule("fc")],
        customized_pruners=normswap.channel_pruners(),
    )
    channels = [layer.num_features for layer in model.modules() if isinstance(layer, SwitchNorm)]
    pruner.step()
    assert [layer.num_features for layer in model.modules() if isinstance(layer, SwitchNorm)] == [
        each // 2 for each in channels
    ]
    model.train()(x).square().sum().backward()
    assert all(gate.grad is not None for gate in normswap.trainable_gates(model).values())


def test_a_network_as_one_graph_prunes_too() -> None:
    torch.manual_seed(0)
    make, shape, conv = NETWORKS["residual"]
    model = scrambled(make()).eval()
    graph = normswap.convert(model, torch.randn(shape), as_graph=True).model.eval()
    pruned = prune(graph, shape, conv, [1, 5])
    assert pruned.get_submodule("layer1.0.bn2").num_features == 62
    assert pruned(torch.randn(shape)).shape == (2, 1000)


def test_a_layer_used_twice_is_pruned_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.second(self.norm(self.first(x))))  # type: ignore[no-any-return]

    shape = (2, 3, 9, 9)
    model = prune(converted(Twice().eval(), shape), shape, "first", [1, 5])
    assert model.get_submodule("norm").num_features == 6
    assert model(torch.randn(shape)).shape == (2, 6, 5, 5)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
def test_without_the_pruner_the_pruned_network_raises() -> None:
    """Torch-Pruning then takes gates for weights of channels. The outputs must not be wrong without notice."""
    make, shape, conv = NETWORKS["2-D"]
    model = converted(make().eval(), shape)
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=torch.randn(shape))
    graph.get_pruning_group(model.get_submodule(conv), tp.prune_conv_out_channels, idxs=[1, 5]).prune()
    with pytest.raises(LayerError, match=r"expected gate parameters of shape \(3,\), got \(2,\)"):
        model(torch.randn(shape))


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
@pytest.mark.parametrize("weights", [(0.2, 0.3, 0.5), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)])
def test_a_pruned_compact_layer_raises(weights: tuple[float, ...]) -> None:
    """Prune before you bake: Torch-Pruning does not know the constants of a compact layer."""
    make, shape, conv = NETWORKS["2-D"]
    model = converted(make().eval(), shape)
    for gate in normswap.trainable_gates(model).values():
        gate.data.copy_(torch.tensor(weights))
    pruned = prune(compacted(model), shape, conv, [1, 5])
    with pytest.raises(RuntimeError, match=r"must match|should contain"):
        pruned(torch.randn(shape))


class Functional(nn.Module):
    """Calls `F.batch_norm`, whose statistics Torch-Pruning does not find, neither before nor after a conversion."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.get_buffer("mean"), self.get_buffer("var")
        return F.batch_norm(self.conv(x), mean, var, self.weight, self.bias, self.training)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
def test_a_pruned_functional_site_raises_as_the_original_does() -> None:
    shape = (2, 3, 9, 9)
    with pytest.raises(RuntimeError, match="running_mean should contain 6 elements not 8"):
        prune(Functional().eval(), shape, "conv", [1, 5])(torch.randn(shape))
    with pytest.raises(LayerError, match="expected gate parameters"):
        prune(converted(Functional().eval(), shape), shape, "conv", [1, 5])(torch.randn(shape))


def test_importance_by_bn_scale_finds_nothing_in_a_converted_network() -> None:
    """As the page says: Torch-Pruning reads the scale of torch's BatchNorm classes only."""
    make, shape, _ = NETWORKS["2-D"]
    model = converted(make().eval(), shape)
    tp.pruner.BNScalePruner(
        model,
        torch.randn(shape),
        importance=tp.importance.BNScaleImportance(),
        pruning_ratio=0.5,
        customized_pruners=normswap.channel_pruners(),
    ).step()
    assert model.get_submodule("1").num_features == 8
