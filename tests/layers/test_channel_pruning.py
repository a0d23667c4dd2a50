"""Channels removed from layers: which tensors change, what a pruned layer computes, and what is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import normswap
from normswap.errors import LayerError
from normswap.layers.matching import MATCHING_BUFFERS, match_statistics
from normswap.layers.switch_norm import SwitchNorm, SwitchNormAct2d
from tests.helpers.norm_layers import trained
from tests.layers.test_matching import like_running_statistics, matched_layer, set_gates, trained_norm

REMOVED = [0, 4]
KEPT = [1, 2, 3, 5]
MIX = [0.2, 0.3, 0.5]
X = torch.randn(3, 6, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PER_CHANNEL = ("weight", "bias", "running_mean", "running_var", "in_var_scale")


def prune(layer: nn.Module, removed: list[int] = REMOVED) -> Any:
    """Return a pruned copy of a layer."""
    return normswap.channel_pruners()[type(layer)].prune_out_channels(copy.deepcopy(layer), removed)


def trained_layer(**options: Any) -> normswap.SwitchNorm2d:
    torch.manual_seed(0)
    layer = matched_layer(trained_norm(), **options)
    assert layer.in_var_scale is not None
    layer.in_var_scale.uniform_(0.5, 2)
    return set_gates(layer, MIX, MIX).eval()  # type: ignore[no-any-return]


def tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in layer.state_dict().items()}


def test_kept_channels_keep_their_tensors_and_the_gates_stay() -> None:
    layer = trained_layer()
    pruned = prune(layer)
    assert pruned.num_features == 4
    for name in PER_CHANNEL:
        assert torch.equal(getattr(pruned, name), getattr(layer, name)[KEPT])
    for name in ("mean_weight", "var_weight", "num_batches_tracked"):
        assert torch.equal(getattr(pruned, name), getattr(layer, name))


@pytest.mark.parametrize("num_groups", [1, 2])
def test_the_constants_of_ln_are_those_of_the_kept_running_statistics(num_groups: int) -> None:
    layer = trained_layer(num_groups=num_groups)
    pruned = prune(layer)
    expected = match_statistics(pruned.running_mean, pruned.running_var, layer.normalising_eps, num_groups)
    torch.testing.assert_close(pruned.ln_mean_shift, expected.ln_mean_shift, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pruned.ln_var_scale, expected.ln_var_scale, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("branch", ["in", "bn"])
def test_branches_of_single_channels_keep_their_outputs(branch: str) -> None:
    layer = trained_layer()
    gate = [float(each == branch) for each in layer.branches]
    set_gates(layer, gate, gate)
    torch.testing.assert_close(prune(layer)(X[:, KEPT]), layer(X)[:, KEPT], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("gate", [[0.0, 1.0, 0.0], [0.0, 0.4, 0.6]])
def test_a_sample_with_the_running_statistics_keeps_its_output(gate: list[float], num_groups: int) -> None:
    bn = trained_norm()
    layer = set_gates(matched_layer(bn, num_groups=num_groups), gate, gate).eval()
    pruned = prune(layer)
    kept_bn = nn.BatchNorm2d(4, eps=bn.eps, dtype=torch.float64).eval()
    kept_bn.load_state_dict({k: v if v.dim() == 0 else v[KEPT] for k, v in bn.state_dict().items()})
    x = like_running_statistics(kept_bn, (2, 4, 5, 7), num_groups)
    torch.testing.assert_close(pruned(x), kept_bn(x), rtol=1e-9, atol=1e-9)


def test_constants_that_are_the_identity_stay_the_identity() -> None:
    layer = trained_layer()
    layer._reset_matching()
    for name, neutral in zip(MATCHING_BUFFERS, (0, 1, 1), strict=True):
        assert torch.equal(getattr(prune(layer), name), torch.full((4,), neutral, dtype=torch.float64))


def test_a_scale_that_is_zero_in_float16_stays_a_scale_of_zero() -> None:
    """Not the identity, with which a channel without variance would get the variance of the others."""
    bn = nn.BatchNorm2d(6).eval()
    trained(bn)
    bn.get_buffer("running_var")[2] = 0.0
    layer = matched_layer(bn).half().eval()
    layer.ln_var_scale[2] = 0.0
    pruned = prune(layer)
    assert pruned.ln_var_scale.dtype == torch.float16
    assert pruned.ln_var_scale[1] < 1e-6
    assert pruned.ln_mean_shift[1] != 0


def test_a_layer_without_statistics_is_matched_by_its_constants() -> None:
    bn = trained_norm()
    dropped = matched_layer(bn, start="ln")
    kept = prune(matched_layer(bn))
    assert dropped.running_mean is None
    torch.testing.assert_close(prune(dropped).ln_var_scale, kept.ln_var_scale)
    torch.testing.assert_close(prune(dropped).ln_mean_shift, kept.ln_mean_shift)


def test_gradients_and_frozen_parameters_follow() -> None:
    layer = trained_layer()
    layer(X).square().sum().backward()
    assert layer.bias is not None
    layer.bias.requires_grad_(False)
    weight_gradient = layer.weight.grad
    assert weight_gradient is not None
    pruner = normswap.channel_pruners()[type(layer)]
    assert pruner.prune_in_channels(layer, REMOVED) is layer
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer.weight.grad, weight_gradient[KEPT])
    assert not layer.bias.requires_grad


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(6, affine=False),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.SyncBatchNorm(6),
        nn.InstanceNorm2d(6, affine=True),
        nn.GroupNorm(1, 6),
        nn.GroupNorm(2, 6),
    ],
    ids=str,
)
def test_a_pruned_layer_reverts_to_the_pruned_norm(norm: nn.Module) -> None:
    trained(norm)
    x = X.float()
    model = nn.Sequential(copy.deepcopy(norm)).eval()
    converted = normswap.convert(model, kinds=("bn", "in", "gn1", "gn")).model
    converted[0] = prune(converted[0])
    reverted = normswap.revert(converted)[0]
    assert type(reverted) is type(norm)
    for name, tensor in norm.state_dict().items():
        assert torch.equal(
            reverted.get_parameter(name) if name in reverted._parameters else reverted.get_buffer(name),
            tensor if tensor.dim() == 0 else tensor[KEPT],
        )
    assert reverted(x[:, KEPT]).shape == (3, 4, 5, 7)


def test_buffers_of_a_frozen_norm_stay_buffers() -> None:
    converted = normswap.convert(nn.Sequential(FrozenBatchNorm2d(6))).model
    pruned = prune(converted[0])
    assert {name for name, _ in pruned.named_parameters()} == {"mean_weight", "var_weight"}
    assert torch.equal(pruned.weight, torch.ones(4))
    assert pruned(X.float()[:, KEPT]).shape == (3, 4, 5, 7)


def test_softmax_gates_and_raw_branches_prune_too() -> None:
    layer = normswap.SwitchNorm2d(6, dtype=torch.float64).eval()
    trained(layer)
    pruned = prune(layer)
    assert pruned.matching is None
    assert pruned(X[:, KEPT]).shape == (3, 4, 5, 7)


def test_every_class_has_a_pruner_also_those_of_users() -> None:
    class Own(normswap.SwitchNorm2d):
        pass

    found = normswap.channel_pruners()
    assert {SwitchNorm, normswap.SwitchNorm1d, normswap.SwitchNorm3d, SwitchNormAct2d, Own} <= {*found}
    pruner = found[Own]
    assert pruner.get_out_channels(Own(6)) == pruner.get_in_channels(Own(6)) == 6
    assert pruner.get_out_channel_groups(Own(6, num_groups=3)) == 3
    assert pruner.get_in_channel_groups(Own(6)) == 1


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ([1, 6, -1], r"expected channels from 0 to 5 to remove, got \[-1, 6\]"),
        ([*range(6)], "expected fewer than 6 channels to remove, got all: a layer needs one channel"),
        (
            [0, 1],
            r"num_groups=2: expected the same number of channels to remove from each group, but the groups would have "
            r"\[1, 3\] channels; remove as many from each, as Torch-Pruning's pruners do",
        ),
    ],
)
def test_channels_that_cannot_be_removed_are_refused_and_the_layer_stays(removed: list[int], message: str) -> None:
    layer = trained_layer(num_groups=2)
    before = tensors(layer)
    with pytest.raises(LayerError, match=message):
        normswap.channel_pruners()[type(layer)].prune_out_channels(layer, removed)
    assert layer.num_features == 6
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
