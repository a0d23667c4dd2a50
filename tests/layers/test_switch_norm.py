"""The modules: equal to BatchNorm at the start, and errors for norms that they cannot replace."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops.misc import FrozenBatchNorm2d

from normswap.errors import LayerError
from normswap.layers.gated_module import FunctionalSwitchNorm
from normswap.layers.gating import BRANCHES
from normswap.layers.matching import MATCHING_BUFFERS
from normswap.layers.switch_norm import (
    SwitchNorm,
    SwitchNorm1d,
    SwitchNorm2d,
    SwitchNorm3d,
    SwitchNormAct2d,
)
from tests.helpers import oracles
from tests.helpers.norm_layers import LAYER_CASES, gradients_as_one_vector, mixed, trained

# (BatchNorm class, SwitchNorm class, shape of the input)
RANKS: dict[str, tuple[type[nn.Module], type[SwitchNorm], tuple[int, ...]]] = {
    "1d (N, C)": (nn.BatchNorm1d, SwitchNorm1d, (6, 4)),
    "1d (N, C, L)": (nn.BatchNorm1d, SwitchNorm1d, (3, 4, 5)),
    "2d": (nn.BatchNorm2d, SwitchNorm2d, (3, 4, 5, 2)),
    "3d": (nn.BatchNorm3d, SwitchNorm3d, (2, 4, 2, 3, 2)),
    "2d, one sample": (nn.BatchNorm2d, SwitchNorm2d, (1, 4, 5, 2)),
    "2d, one position": (nn.BatchNorm2d, SwitchNorm2d, (5, 4, 1, 1)),
    "2d, one channel": (nn.BatchNorm2d, SwitchNorm2d, (3, 1, 5, 2)),
}


RANK_CASES = pytest.mark.parametrize(("bn_class", "sn_class", "shape"), RANKS.values(), ids=RANKS)
BN_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "affine=False": {"affine": False},
    "bias=False": {"bias": False},
    "momentum=None": {"momentum": None},
    "momentum=0.0": {"momentum": 0.0},
    "momentum=0.9": {"momentum": 0.9},
    "track_running_stats=False": {"track_running_stats": False},
    "neither affine nor tracked": {"affine": False, "track_running_stats": False},
    "odd eps": {"eps": 0.0371},
}


OPTION_CASES = pytest.mark.parametrize("options", BN_OPTIONS.values(), ids=BN_OPTIONS)


def assert_same_over_steps(bn: nn.Module, sn: SwitchNorm, inputs: list[Tensor], *, tolerance: float) -> None:
    """Assert equal outputs, gradients and buffers in several steps of SGD on the shared parameters."""
    optimizers = [
        torch.optim.SGD([p for p in (layer.weight, layer.bias) if isinstance(p, nn.Parameter)] or [torch.zeros(1)], 0.1)
        for layer in (bn, sn)
    ]
    for step, x in enumerate(inputs):
        outputs, vectors = [], []
        for layer, optimizer in zip((bn, sn), optimizers, strict=True):
            leaf = x.clone().requires_grad_()
            optimizer.zero_grad()
            y = layer(leaf)
            (y.double() ** 3).mean().backward()
            outputs.append(y.detach())
            vectors.append(gradients_as_one_vector(leaf, layer.weight, layer.bias))
            optimizer.step()
        assert outputs[1].dtype == outputs[0].dtype
        assert oracles.relative_error(outputs[1], outputs[0]) < tolerance, f"output of step {step}"
        assert vectors[0].norm() > 0
        assert oracles.relative_error(vectors[1], vectors[0]) < 10 * tolerance, f"gradients of step {step}"
        theirs, ours = dict(bn.named_buffers()), dict(sn.named_buffers())
        assert theirs.keys() == ours.keys() - MATCHING_BUFFERS.keys()
        for name, buffer in theirs.items():
            assert ours[name].dtype == buffer.dtype
            assert oracles.relative_error(ours[name], buffer) < tolerance, f"{name} of step {step}"


@pytest.mark.parametrize("training", [True, False])
@OPTION_CASES
@RANK_CASES
def test_from_batch_norm_computes_the_same_function(
    bn_class: type[nn.Module],
    sn_class: type[SwitchNorm],
    shape: tuple[int, ...],
    options: dict[str, Any],
    training: bool,
) -> None:
    bn = trained(bn_class(shape[1], dtype=torch.float64, **options)).train(training)
    sn = sn_class.from_batch_norm(copy.deepcopy(bn), bn_statistics="batch")
    assert type(sn) is sn_class
    assert sn.training == training
    assert sn.gate == "simplex"
    inputs = [torch.randn(shape).double() * 2 + 1 for _ in range(3)]
    assert_same_over_steps(bn, sn, inputs, tolerance=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
    ids=["float32", "float16", "bfloat16"],
)
def test_from_batch_norm_in_lower_precision(dtype: torch.dtype, tolerance: float, training: bool) -> None:
    bn = trained(nn.BatchNorm2d(4, dtype=dtype)).train(training)
    sn = SwitchNorm2d.from_batch_norm(copy.deepcopy(bn), bn_statistics="batch")
    assert sn.mean_weight.dtype == dtype
    assert sn.mean_weight.tolist() == [0, 0, 1]
    inputs = [torch.randn(4, 4, 8, 8).to(dtype) for _ in range(3)]
    assert_same_over_steps(bn, sn, inputs, tolerance=tolerance)


def test_switching_between_training_and_evaluation_keeps_the_two_alike() -> None:
    bn = trained(nn.BatchNorm2d(4, momentum=None, dtype=torch.float64))
    sn = SwitchNorm2d.from_batch_norm(copy.deepcopy(bn), bn_statistics="batch")
    for training in (True, False, True, True, False):
        assert_same_over_steps(
            bn.train(training), sn.train(training), [torch.randn(3, 4, 5, 2).double()], tolerance=1e-12
        )
    assert int(sn.num_batches_tracked) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [True, False])
def test_without_tracking_kept_statistics_are_for_evaluation_only(training: bool) -> None:
    """Setting `track_running_stats` to False after construction is a common way to stop updates."""
    bn = trained(nn.BatchNorm2d(4, dtype=torch.float64)).train(training)
    bn.track_running_stats = False
    sn = SwitchNorm2d.from_batch_norm(copy.deepcopy(bn), bn_statistics="batch")
    assert_same_over_steps(bn, sn, [torch.randn(3, 4, 5, 2).double() for _ in range(2)], tolerance=1e-12)


def test_statistics_that_are_kept_but_not_tracked_can_be_constants_in_training_too() -> None:
    bn = trained(nn.BatchNorm2d(4, dtype=torch.float64))
    bn.track_running_stats = False
    constant = SwitchNorm2d.from_batch_norm(copy.deepcopy(bn), bn_statistics="running")
    x = torch.randn(3, 4, 5, 2).double()
    assert oracles.relative_error(constant(x).detach(), bn.eval()(x).detach()) < 1e-12
    # On the batch, one value per channel has neither moments nor tracked statistics: refused, as in BatchNorm.
    batch = SwitchNorm2d.from_batch_norm(copy.deepcopy(bn).train(), bn_statistics="batch")
    for layer, message in (
        (bn.train(), "Expected more than 1 value"),
        (batch, "the `bn` branch needs more than one value per channel"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x[:1, :, :1, :1])


FROZEN: dict[str, tuple[Callable[[], nn.Module], type[SwitchNorm]]] = {
    "torchvision": (lambda: FrozenBatchNorm2d(4, eps=0.0), SwitchNorm2d),
    "timm": (lambda: FrozenBatchNormAct2d(4, act_layer=nn.SiLU), SwitchNormAct2d),
}


FROZEN_CASES = pytest.mark.parametrize(("make", "sn_class"), FROZEN.values(), ids=FROZEN)


def test_a_norm_with_parameters_is_not_frozen() -> None:
    assert not SwitchNorm2d(4).frozen
    assert not SwitchNorm2d(4, affine=False).frozen
    assert not SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(4).requires_grad_(False)).frozen


@pytest.mark.parametrize("training", [True, False])
@FROZEN_CASES
def test_a_frozen_norm_keeps_its_function_and_its_buffers(
    make: Callable[[], nn.Module], sn_class: type[SwitchNorm], training: bool
) -> None:
    frozen = trained(make()).double().train(training)
    sn = sn_class.from_batch_norm(copy.deepcopy(frozen))
    before = {name: buffer.clone() for name, buffer in sn.named_buffers()}
    assert before.keys() == {"weight", "bias", "running_mean", "running_var", *MATCHING_BUFFERS}
    assert [name for name, _ in sn.named_parameters()] == ["mean_weight", "var_weight"]
    assert not sn.mean_weight.requires_grad
    assert sn.frozen
    assert sn.bn_statistics == "running"
    for _ in range(2):
        xs = [torch.randn(3, 4, 5, 2).double()]
        xs.append(xs[0].clone())
        ys = [layer(x.requires_grad_()) for layer, x in zip((frozen, sn), xs, strict=True)]
        for y in ys:
            (y**3).mean().backward()
        assert oracles.relative_error(ys[1].detach(), ys[0].detach()) < 1e-12
        assert xs[0].grad is not None
        assert xs[1].grad is not None
        assert oracles.relative_error(xs[1].grad, xs[0].grad) < 1e-11
    assert all(buffer.equal(before[name]) for name, buffer in sn.named_buffers())


@FROZEN_CASES
def test_a_frozen_norm_accepts_and_drops_a_stored_count(
    make: Callable[[], nn.Module], sn_class: type[SwitchNorm]
) -> None:
    sn = sn_class.from_batch_norm(make())
    stored = sn.state_dict()
    assert "num_batches_tracked" not in stored
    trained(sn)
    stored["num_batches_tracked"] = torch.tensor(7)
    sn.load_state_dict(stored)
    assert sn.state_dict()["weight"].equal(stored["weight"])
    assert "num_batches_tracked" not in sn.state_dict()


@pytest.mark.parametrize("training", [True, False])
def test_timm_batch_norm_act_keeps_activation_drop_and_keys(training: bool) -> None:
    bn = BatchNormAct2d(4, act_layer=nn.SiLU, inplace=True, drop_layer=lambda: nn.Dropout(0.3), dtype=torch.float64)
    trained(bn).train(training)
    twin = copy.deepcopy(bn)
    sn = SwitchNormAct2d.from_batch_norm(twin, bn_statistics="batch")
    assert sn.act is twin.act
    assert sn.drop is twin.drop
    assert list(sn.state_dict()) == [
        *list(bn.state_dict())[:2],
        "mean_weight",
        "var_weight",
        *list(bn.state_dict())[2:],
        *MATCHING_BUFFERS,
    ]
    for _ in range(3):
        results = []
        x = torch.randn(3, 4, 5, 2).double()
        for layer in (bn, sn):
            torch.manual_seed(1)  # the same units are dropped
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            (y**3).mean().backward()
            results.append((y.detach(), gradients_as_one_vector(leaf, layer.weight, layer.bias)))
        assert oracles.relative_error(results[1][0], results[0][0]) < 1e-12
        assert oracles.relative_error(results[1][1], results[0][1]) < 1e-11
    assert oracles.relative_error(sn.running_var, bn.running_var) < 1e-12  # type: ignore[arg-type]


def test_an_activation_layer_built_from_scratch_drops_then_activates() -> None:
    x = torch.randn(2, 4, 5, 5)
    plain = SwitchNorm2d(4)(x)
    assert SwitchNormAct2d(4)(x).equal(plain)
    empty = nn.Sequential()
    assert SwitchNormAct2d(4, act=empty).act is empty
    layer = SwitchNormAct2d(4, act=nn.ReLU(), drop=nn.Threshold(0.5, -1.0))
    assert layer(x).equal(F.relu(F.threshold(plain, 0.5, -1.0)))


def test_from_batch_norm_shares_tensors_and_leaves_the_original_alone() -> None:
    bn = trained(nn.BatchNorm2d(4))
    keys = set(bn.__dict__), list(bn.state_dict())
    sn = SwitchNorm2d.from_batch_norm(bn)
    assert sn.weight is bn.weight
    assert sn.running_mean is bn.running_mean
    assert type(bn) is nn.BatchNorm2d
    assert (set(bn.__dict__), list(bn.state_dict())) == keys
    assert {*sn.state_dict()} == {*bn.state_dict(), "mean_weight", "var_weight", *MATCHING_BUFFERS}
    raw = SwitchNorm2d.from_batch_norm(bn, matched=False)
    assert {*raw.state_dict()} == {*bn.state_dict(), "mean_weight", "var_weight"}


# (what is trainable in BatchNorm, whether the gates are)
TRAINABLE: dict[str, tuple[dict[str, Any], tuple[str, ...], bool]] = {
    "all": ({}, (), True),
    "weight frozen": ({}, ("weight",), True),
    "weight and bias frozen": ({}, ("weight", "bias"), False),
    "nothing to freeze": ({"affine": False}, (), True),
}


@pytest.mark.parametrize(("options", "frozen", "expected"), TRAINABLE.values(), ids=TRAINABLE)
def test_gates_of_a_frozen_norm_are_frozen(options: dict[str, Any], frozen: tuple[str, ...], expected: bool) -> None:
    bn = nn.BatchNorm2d(4, **options)
    for name in frozen:
        getattr(bn, name).requires_grad_(False)
    sn = SwitchNorm2d.from_batch_norm(bn)
    assert sn.mean_weight.requires_grad == sn.var_weight.requires_grad == expected
    assert all(not getattr(sn, name).requires_grad for name in frozen)


REFUSED_ORIGINALS: dict[str, tuple[type[SwitchNorm], Callable[[], nn.Module], dict[str, Any], str]] = {
    "a group norm": (SwitchNorm2d, lambda: nn.GroupNorm(2, 4), {}, "expected a BatchNorm module, got GroupNorm"),
    "an instance norm": (
        SwitchNorm2d,
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        {},
        "expected a BatchNorm module, got InstanceNorm2d",
    ),
    "no norm": (SwitchNorm2d, lambda: nn.Conv2d(1, 1, 1), {}, "expected a BatchNorm module, got Conv2d"),
    "itself": (
        SwitchNorm2d,
        lambda: SwitchNorm2d(4),
        {},
        "expected a BatchNorm module, got SwitchNorm2d, which already is a SwitchNorm layer",
    ),
    "a lazy one": (
        SwitchNorm2d,
        nn.LazyBatchNorm2d,
        {},
        "expected a module with initialized tensors, got an uninitialized LazyBatchNorm2d: run one batch",
    ),
    "a fused activation": (
        SwitchNorm2d,
        lambda: BatchNormAct2d(4),
        {},
        "SwitchNorm2d runs the child modules [], but BatchNormAct2d has ['act', 'drop']: pass norms=KNOWN_NORMS",
    ),
    "no activation": (
        SwitchNormAct2d,
        lambda: nn.BatchNorm2d(4),
        {},
        "SwitchNormAct2d runs the child modules ['act', 'drop'], but BatchNorm2d has []",
    ),
    "no bn branch": (
        SwitchNorm2d,
        lambda: nn.BatchNorm2d(4),
        {"branches": ("in", "ln")},
        "branches: expected `bn` among them to start at batch normalization, got ('in', 'ln')",
    ),
    "gate": (SwitchNorm2d, lambda: nn.BatchNorm2d(4), {"gate": "hard"}, "gate: expected one of"),
    "bn_statistics": (
        SwitchNorm2d,
        lambda: nn.BatchNorm2d(4),
        {"bn_statistics": "moving"},
        "bn_statistics: expected one of",
    ),
}


# torch warns that lazy modules are under development.
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(("sn_class", "make", "options", "message"), REFUSED_ORIGINALS.values(), ids=REFUSED_ORIGINALS)
def test_what_from_batch_norm_refuses(
    sn_class: type[SwitchNorm], make: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    original = make()
    before = type(original), {*original.__dict__}
    with pytest.raises(LayerError, match=re.escape(message)):
        sn_class.from_batch_norm(original, **options)
    assert (type(original), {*original.__dict__}) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "hard"}, "gate: expected one of"),
        ({"branches": ()}, "branches: expected a non-empty subset"),
        ({"bn_statistics": "moving"}, "bn_statistics: expected one of"),
    ],
)
@pytest.mark.parametrize("make", [lambda **options: SwitchNorm2d(4, **options), FunctionalSwitchNorm])
def test_bad_options_are_refused(make: Callable[..., nn.Module], options: dict[str, Any], message: str) -> None:
    defaults: dict[str, Any] = {"gate": "softmax", "branches": BRANCHES}
    with pytest.raises(LayerError, match=message):
        make(**(defaults | options))


REFUSED_RANKS: dict[str, tuple[type[SwitchNorm], tuple[int, ...], str]] = {
    "1d": (SwitchNorm1d, (2, 4, 5, 5), "expected a 2-D or 3-D input, got shape (2, 4, 5, 5)"),
    "2d": (SwitchNorm2d, (2, 4, 5), "expected a 4-D input, got shape (2, 4, 5)"),
    "3d": (SwitchNorm3d, (2, 4, 5, 5), "expected a 5-D input, got shape (2, 4, 5, 5)"),
    "any rank": (SwitchNorm, (4,), "expected a floating tensor (N, C, *spatial), got torch.float32 of shape (4,)"),
    "channels": (SwitchNorm2d, (2, 3, 5, 5), "expected 4 channels in dimension 1, got an input of shape (2, 3, 5, 5)"),
}


@pytest.mark.parametrize(("sn_class", "shape", "message"), REFUSED_RANKS.values(), ids=REFUSED_RANKS)
def test_a_refused_input_changes_nothing(sn_class: type[SwitchNorm], shape: tuple[int, ...], message: str) -> None:
    layer = sn_class(4, gate="simplex")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(LayerError, match=re.escape(message)):
        layer(torch.randn(shape))
    assert all(value.equal(before[name]) for name, value in layer.state_dict().items())


def test_the_base_class_takes_any_rank_from_two_up() -> None:
    layer = mixed(SwitchNorm(4, gate="simplex", branches=("ln", "bn")))
    for shape in ((3, 4), (3, 4, 2), (3, 4, 2, 2), (3, 4, 2, 2, 2), (3, 4, 2, 1, 2, 2)):
        assert layer(torch.randn(shape)).shape == shape


@pytest.mark.parametrize("momentum", [None, 0.0, 0.1])
def test_running_statistics_of_a_layer_follow_the_oracle(momentum: float | None) -> None:
    layer = SwitchNorm2d(4, momentum=momentum, dtype=torch.float64)
    running = oracles.Constants(torch.zeros(4), torch.ones(4))
    for step in range(1, 4):
        x = torch.randn(3, 4, 2, 5).double() + step
        layer(x)
        running = oracles.updated_running(running, x, 1 / step if momentum is None else momentum)
        assert oracles.relative_error(layer.running_mean, running.mean) < 1e-14  # type: ignore[arg-type]
        assert oracles.relative_error(layer.running_var, running.var) < 1e-14  # type: ignore[arg-type]
        assert int(layer.num_batches_tracked) == step  # type: ignore[arg-type]


def test_layers_that_keep_no_statistics() -> None:
    for layer in (SwitchNorm2d(4, track_running_stats=False), SwitchNorm2d(4, branches=("in", "ln"))):
        assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None
        assert layer.state_dict().keys() == {"weight", "bias", "mean_weight", "var_weight"}
        x = torch.randn(3, 4, 5, 5)
        assert layer(x).equal(layer.eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_on_running_statistics_training_equals_evaluation_and_updates_nothing(training: bool) -> None:
    layer = mixed(trained(SwitchNorm2d(4, gate="simplex", bn_statistics="running")))  # type: ignore[arg-type]
    layer.train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(3, 4, 5, 5)
    y = layer(x)
    assert y.equal(layer.eval()(x))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert layer.state_dict()[name].equal(before[name])


@LAYER_CASES
def test_evaluation_never_writes(make: Callable[[], SwitchNorm]) -> None:
    layer = trained(make()).eval()
    with torch.no_grad():
        layer.mean_weight.copy_(torch.linspace(-1, 2, len(layer.mean_weight)))  # type: ignore[operator, arg-type]
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(3, 4, 5, 5, requires_grad=True)).sum().backward()
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(value.equal(before[name]) for name, value in after.items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 5)])
def test_an_empty_batch_is_treated_as_batch_norm_treats_it(shape: tuple[int, ...], training: bool) -> None:
    bn = trained(nn.BatchNorm2d(4)).train(training)
    sn = SwitchNorm2d.from_batch_norm(copy.deepcopy(bn), bn_statistics="batch")
    for layer in (bn, sn):
        x = torch.empty(shape, requires_grad=True)
        y = layer(x)
        assert y.shape == shape
        y.sum().backward()
        for tensor in (x, *layer.parameters()):
            assert tensor.grad is not None
            assert bool((tensor.grad == 0).all())
    for name, buffer in bn.named_buffers():
        assert buffer.equal(sn.get_buffer(name)), name
    assert int(sn.num_batches_tracked) == int(training)  # type: ignore[arg-type]


def test_one_value_per_channel_in_training_uses_the_running_statistics() -> None:
    sn = SwitchNorm2d.from_batch_norm(trained(nn.BatchNorm2d(4)), bn_statistics="batch")
    before = copy.deepcopy(sn.state_dict())
    x = torch.randn(1, 4, 1, 1)
    torch.testing.assert_close(sn(x), sn.eval()(x), rtol=0, atol=0)
    assert all(value.equal(before[name]) for name, value in sn.state_dict().items())


def test_one_channel_drops_the_branch_that_repeats_another() -> None:
    assert SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(1)).branches == ("in", "bn")
    assert SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(1, affine=False, track_running_stats=False)).branches == (
        "in",
        "bn",
    )
    assert SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(2)).branches == BRANCHES


SITE_CALLS: dict[str, tuple[bool, bool]] = {  # (running statistics are given, training)
    "training": (True, True),
    "evaluation": (True, False),
    "untracked": (False, True),
}


@pytest.mark.parametrize(("tracked", "training"), SITE_CALLS.values(), ids=SITE_CALLS)
@pytest.mark.parametrize("affine", [True, False])
def test_a_functional_site_replaces_batch_norm(tracked: bool, training: bool, affine: bool) -> None:
    site = FunctionalSwitchNorm(gate="simplex", branches=BRANCHES).double()
    ours, theirs = (
        [torch.full((4,), 0.5).double(), torch.full((4,), 2.0).double()] if tracked else [None, None] for _ in range(2)
    )
    parameters = [torch.rand(4).double(), torch.rand(4).double()] if affine else [None, None]
    for _ in range(2):
        x = torch.randn(3, 4, 5, 5).double()
        y = site(x, *ours, *parameters, training=training, momentum=0.3, eps=0.01)
        expected = F.batch_norm(x, *theirs, *parameters, training=training, momentum=0.3, eps=0.01)
        assert oracles.relative_error(y.detach(), expected) < 1e-12
        for mine, torchs in zip(ours, theirs, strict=True):
            assert mine is torchs is None or oracles.relative_error(mine, torchs) < 1e-14  # type: ignore[arg-type]


@pytest.mark.parametrize("site_trains", [True, False])
@pytest.mark.parametrize("call_trains", [True, False])
def test_a_functional_site_writes_gates_only_where_both_train(site_trains: bool, call_trains: bool) -> None:
    """Without running statistics, models call F.batch_norm with training=True in evaluation too."""
    site = FunctionalSwitchNorm(gate="simplex", branches=BRANCHES).train(site_trains)
    with torch.no_grad():
        site.mean_weight.copy_(torch.tensor([-1.0, 0.5, 2.0]))
    site(torch.randn(3, 4, 5, 5), None, None, training=call_trains)
    assert (site.mean_weight.tolist() == [-1.0, 0.5, 2.0]) == (not (site_trains and call_trains))
