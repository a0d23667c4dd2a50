"""The modules: equal to BatchNorm at the start, and what a torch layer owes to the rest of torch."""

import copy
import io
import pickle
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
from normswap.layers.importance import BRANCHES, GATES
from normswap.layers.modules import (
    FunctionalSwitchNorm,
    SwitchNorm,
    SwitchNorm1d,
    SwitchNorm2d,
    SwitchNorm3d,
    SwitchNormAct2d,
)
from tests.helpers import oracles

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

LAYERS: dict[str, Callable[[], SwitchNorm]] = {
    "softmax": lambda: SwitchNorm2d(4),
    "simplex": lambda: SwitchNorm2d(4, gate="simplex"),
    "without bn": lambda: SwitchNorm2d(4, branches=("in", "ln")),
    "on running statistics": lambda: SwitchNorm2d(4, gate="simplex", bn_statistics="running"),
    "from BatchNorm": lambda: SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(4)),
    "from frozen BatchNorm": lambda: SwitchNorm2d.from_batch_norm(FrozenBatchNorm2d(4)),
    "with activation": lambda: SwitchNormAct2d.from_batch_norm(BatchNormAct2d(4)),
    "untracked": lambda: SwitchNorm2d(4, affine=False, track_running_stats=False),
}
LAYER_CASES = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def trained(layer: nn.Module) -> nn.Module:
    """Give every tensor of a norm layer a value that no initialisation has; gates stay where they are."""
    with torch.no_grad():
        for name in ("weight", "running_var"):
            if isinstance(getattr(layer, name, None), Tensor):
                getattr(layer, name).uniform_(0.5, 1.5)
        for name in ("bias", "running_mean"):
            if isinstance(getattr(layer, name, None), Tensor):
                getattr(layer, name).normal_()
    return layer


def mixed(layer: SwitchNorm) -> SwitchNorm:
    """Move the gates into the interior, so that every branch takes part."""
    with torch.no_grad():
        k = len(layer.branches)
        for parameter, values in ((layer.mean_weight, [0.2, 0.5, 0.3]), (layer.var_weight, [0.6, 0.1, 0.3])):
            point = torch.tensor(values[:k]).to(parameter)
            parameter.copy_(point / point.sum())
    return layer


def gradients_as_one_vector(*tensors: Tensor | None) -> Tensor:
    return torch.cat([t.grad.flatten() for t in tensors if t is not None and t.grad is not None])


def assert_same_over_steps(bn: nn.Module, sn: SwitchNorm, inputs: list[Tensor], *, tolerance: float) -> None:
    """Outputs, gradients as one vector and buffers agree, step after step of SGD on the shared parameters."""
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
        assert theirs.keys() == ours.keys()
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
    sn = sn_class.from_batch_norm(copy.deepcopy(bn))
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
    sn = SwitchNorm2d.from_batch_norm(copy.deepcopy(bn))
    assert sn.mean_weight.dtype == dtype
    assert sn.mean_weight.tolist() == [0, 0, 1]
    inputs = [torch.randn(4, 4, 8, 8).to(dtype) for _ in range(3)]
    assert_same_over_steps(bn, sn, inputs, tolerance=tolerance)


def test_switching_between_training_and_evaluation_keeps_the_two_alike() -> None:
    bn = trained(nn.BatchNorm2d(4, momentum=None, dtype=torch.float64))
    sn = SwitchNorm2d.from_batch_norm(copy.deepcopy(bn))
    for training in (True, False, True, True, False):
        assert_same_over_steps(
            bn.train(training), sn.train(training), [torch.randn(3, 4, 5, 2).double()], tolerance=1e-12
        )
    assert int(sn.num_batches_tracked) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [True, False])
def test_without_tracking_the_statistics_that_are_kept_serve_evaluation_alone(training: bool) -> None:
    """`track_running_stats` set to False after construction is a common way to switch updates off."""
    bn = trained(nn.BatchNorm2d(4, dtype=torch.float64)).train(training)
    bn.track_running_stats = False
    sn = SwitchNorm2d.from_batch_norm(copy.deepcopy(bn))
    assert_same_over_steps(bn, sn, [torch.randn(3, 4, 5, 2).double() for _ in range(2)], tolerance=1e-12)


def test_statistics_that_are_kept_but_not_tracked_can_be_constants_in_training_too() -> None:
    bn = trained(nn.BatchNorm2d(4, dtype=torch.float64))
    bn.track_running_stats = False
    constant = SwitchNorm2d.from_batch_norm(copy.deepcopy(bn), bn_statistics="running")
    x = torch.randn(3, 4, 5, 2).double()
    assert oracles.relative_error(constant(x).detach(), bn.eval()(x).detach()) < 1e-12
    # On the batch, one value per channel has neither moments nor tracked statistics: refused, as in BatchNorm.
    batch = SwitchNorm2d.from_batch_norm(copy.deepcopy(bn).train())
    for layer, message in ((bn.train(), "Expected more than 1 value"), (batch, "expected more than 1 value")):
        with pytest.raises(ValueError, match=message):
            layer(x[:1, :, :1, :1])


FROZEN: dict[str, tuple[Callable[[], nn.Module], type[SwitchNorm]]] = {
    "torchvision": (lambda: FrozenBatchNorm2d(4, eps=0.0), SwitchNorm2d),
    "timm": (lambda: FrozenBatchNormAct2d(4, act_layer=nn.SiLU), SwitchNormAct2d),
}
FROZEN_CASES = pytest.mark.parametrize(("make", "sn_class"), FROZEN.values(), ids=FROZEN)


@pytest.mark.parametrize("training", [True, False])
@FROZEN_CASES
def test_a_frozen_norm_keeps_its_function_and_its_buffers(
    make: Callable[[], nn.Module], sn_class: type[SwitchNorm], training: bool
) -> None:
    frozen = trained(make()).double().train(training)
    sn = sn_class.from_batch_norm(copy.deepcopy(frozen))
    before = {name: buffer.clone() for name, buffer in sn.named_buffers()}
    assert before.keys() == {"weight", "bias", "running_mean", "running_var"}
    assert [name for name, _ in sn.named_parameters()] == ["mean_weight", "var_weight"]
    assert not sn.mean_weight.requires_grad
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
    sn = SwitchNormAct2d.from_batch_norm(twin)
    assert sn.act is twin.act
    assert sn.drop is twin.drop
    assert list(sn.state_dict()) == [
        *list(bn.state_dict())[:2],
        "mean_weight",
        "var_weight",
        *list(bn.state_dict())[2:],
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
    assert {*sn.state_dict()} == {*bn.state_dict(), "mean_weight", "var_weight"}


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
        "expected a BatchNorm module, got SwitchNorm2d, which is a SwitchNorm layer already",
    ),
    "a lazy one": (
        SwitchNorm2d,
        nn.LazyBatchNorm2d,
        {},
        "expected tensors of known size, got LazyBatchNorm2d that has seen no input: run one batch through it first",
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
        "branches: expected `bn` among them to start from Batch Normalization, got ('in', 'ln')",
    ),
    "gate": (SwitchNorm2d, lambda: nn.BatchNorm2d(4), {"gate": "hard"}, "gate: expected one of"),
    "bn_statistics": (
        SwitchNorm2d,
        lambda: nn.BatchNorm2d(4),
        {"bn_statistics": "moving"},
        "bn_statistics: expected one of",
    ),
}


# torch warns that lazy modules are under development, whenever one is built.
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
def test_a_refused_input_leaves_no_trace(sn_class: type[SwitchNorm], shape: tuple[int, ...], message: str) -> None:
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
    sn = SwitchNorm2d.from_batch_norm(copy.deepcopy(bn))
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
    sn = SwitchNorm2d.from_batch_norm(trained(nn.BatchNorm2d(4)))
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


# --- the rest of torch -------------------------------------------------------------------------------------------


@LAYER_CASES
@pytest.mark.parametrize("training", [True, False])
def test_two_forwards_before_one_backward(make: Callable[[], SwitchNorm], training: bool) -> None:
    layer = mixed(trained(make()).double().train(training))  # type: ignore[arg-type]
    layer.requires_grad_()
    twin = copy.deepcopy(layer)
    a, b = torch.randn(2, 3, 4, 5, 5).double()
    (layer(a).pow(3).sum() + layer(b).pow(3).sum()).backward()
    for x in (a, b):
        twin(x).pow(3).sum().backward()
    for parameter, expected in zip(layer.parameters(), twin.parameters(), strict=True):
        assert expected.grad is not None
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-10, atol=1e-10)


@LAYER_CASES
def test_a_training_forward_between_an_evaluation_forward_and_its_backward(make: Callable[[], SwitchNorm]) -> None:
    """The training pass overwrites running statistics and re-projects gates that the first pass used."""
    layer = mixed(trained(make()).double())  # type: ignore[arg-type]
    layer.requires_grad_()
    twin = copy.deepcopy(layer).eval()
    x = torch.randn(3, 4, 5, 5).double().requires_grad_()
    y = layer.eval()(x)
    layer.train()(torch.randn(3, 4, 5, 5).double() * 9)
    grads = torch.autograd.grad(y.pow(3).sum(), [x, *layer.parameters()])
    expected = torch.autograd.grad(twin(x).pow(3).sum(), [x, *twin.parameters()])
    for grad, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, truth, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inside", [torch.bfloat16, torch.float32])
def test_autocast_gives_the_dtype_that_batch_norm_gives(inside: torch.dtype, training: bool) -> None:
    bn = trained(nn.BatchNorm2d(4)).train(training)
    sn = SwitchNorm2d.from_batch_norm(copy.deepcopy(bn))
    conv = nn.Conv2d(3, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        x = conv(torch.randn(2, 3, 9, 9)).to(inside).detach().requires_grad_()
        expected, y = bn(x), sn(x)
    assert y.dtype == expected.dtype == inside
    torch.testing.assert_close(y, expected, rtol=2e-2 if inside == torch.bfloat16 else 1e-5, atol=1e-2)
    y.float().pow(2).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == inside
    for parameter in sn.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert bool(parameter.grad.isfinite().all())


MEMORY_FORMATS: dict[str, tuple[type[SwitchNorm], tuple[int, ...], torch.memory_format]] = {
    "2d": (SwitchNorm2d, (2, 4, 5, 6), torch.channels_last),
    "2d, one sample": (SwitchNorm2d, (1, 4, 5, 6), torch.channels_last),
    "3d": (SwitchNorm3d, (2, 4, 3, 5, 6), torch.channels_last_3d),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sn_class", "shape", "memory_format"), MEMORY_FORMATS.values(), ids=MEMORY_FORMATS)
def test_the_memory_format_is_kept(
    sn_class: type[SwitchNorm],
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    training: bool,
) -> None:
    layer = sn_class(4).train(training)
    plain = torch.randn(shape).to(dtype)
    x = plain.clone(memory_format=memory_format).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=memory_format)
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, layer(plain), rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert layer(plain).is_contiguous()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=memory_format)


@LAYER_CASES
def test_deepcopy_and_pickle_are_bit_identical(make: Callable[[], SwitchNorm]) -> None:
    layer = mixed(trained(make()))  # type: ignore[arg-type]
    x = torch.randn(3, 4, 5, 5)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    outputs = [layer(x), *(twin(x) for twin in copies)]
    for twin, y in zip(copies, outputs[1:], strict=True):
        assert type(twin) is type(layer)
        assert y.equal(outputs[0])
        assert twin.state_dict().keys() == layer.state_dict().keys()
        assert all(value.equal(layer.state_dict()[name]) for name, value in twin.state_dict().items())
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in layer.parameters()]
        assert repr(twin) == repr(layer)


@pytest.mark.parametrize("make", [lambda **k: SwitchNorm2d(4, **k), lambda **k: SwitchNormAct2d(4, act=nn.ReLU(), **k)])
@pytest.mark.parametrize("gate", GATES)
def test_meta_device_to_empty_and_reset_parameters(make: Callable[..., SwitchNorm], gate: str) -> None:
    layer = make(gate=gate, device="meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    for training in (True, False):
        assert layer.train(training)(torch.empty(2, 4, 5, 5, device="meta")).shape == (2, 4, 5, 5)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    fresh = make(gate=gate).state_dict()
    assert all(value.equal(fresh[name]) for name, value in layer.state_dict().items())


def test_from_batch_norm_on_the_meta_device() -> None:
    sn = SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(4, device="meta"))
    assert {t.device.type for t in sn.state_dict().values()} == {"meta"}
    for shape in ((2, 4, 5, 5), (2, 4, 1, 1), (0, 4, 5, 5)):
        assert sn(torch.empty(shape, device="meta")).shape == shape


@LAYER_CASES
def test_reset_parameters_gives_what_a_new_layer_has(make: Callable[[], SwitchNorm]) -> None:
    layer = trained(make())
    layer(torch.randn(3, 4, 5, 5))
    assert isinstance(layer, SwitchNorm)
    layer.reset_parameters()
    options: dict[str, Any] = {"gate": layer.gate, "branches": layer.branches}
    swapped = "replaced" in vars(layer)  # starts as the BatchNorm that it was
    new = SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(4), **options) if swapped else SwitchNorm2d(4, **options)
    fresh = new.state_dict()
    assert all(value.equal(fresh[name]) for name, value in layer.state_dict().items())


def test_reset_parameters_of_a_functional_site_is_its_start() -> None:
    for gate, start in (("simplex", [0.0, 0.0, 1.0]), ("softmax", [1.0, 1.0, 1.0])):
        site = FunctionalSwitchNorm(gate=gate, branches=BRANCHES)  # type: ignore[arg-type]
        assert site.mean_weight.tolist() == start
        nn.init.uniform_(site.mean_weight)
        site.reset_parameters()
        assert site.mean_weight.tolist() == site.var_weight.tolist() == start


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_per_sample_gradients_with_torch_func(gate: str, training: bool) -> None:
    layer = SwitchNorm2d(4, gate=gate, bn_statistics="running", dtype=torch.float64)  # type: ignore[arg-type]
    layer = mixed(trained(layer)).train(training)  # type: ignore[arg-type]
    state = {name: p.detach() for name, p in layer.named_parameters()}
    buffers = dict(layer.named_buffers())
    x = torch.randn(5, 4, 3, 3).double()

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        y = torch.func.functional_call(layer, (parameters, buffers), (sample[None],))
        return y.pow(3).sum()  # type: ignore[no-any-return]

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x)
    for index in range(len(x)):
        layer.zero_grad()
        layer(x[index : index + 1]).pow(3).sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(per_sample[name][index], parameter.grad, rtol=1e-10, atol=1e-10)


# torch loads its forward-mode decompositions through its own deprecated scripting compiler (2.14).
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:FutureWarning")
def test_jacobians_with_torch_func() -> None:
    layer = mixed(SwitchNorm2d(2, gate="simplex", dtype=torch.float64)).eval()
    x = torch.randn(1, 2, 2, 2).double()
    forward, backward = torch.func.jacfwd(layer)(x), torch.func.jacrev(layer)(x)
    torch.testing.assert_close(forward, backward, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@LAYER_CASES
def test_compiles_without_graph_breaks(make: Callable[[], SwitchNorm], training: bool) -> None:
    torch.compiler.reset()
    layer = mixed(trained(make()).train(training)).double()  # type: ignore[arg-type]
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for _ in range(2):
        x = torch.randn(3, 4, 5, 5).double()
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [module(leaf) for module, leaf in zip((compiled, eager), leaves, strict=True)]
        for y in outputs:
            y.pow(3).sum().backward()
        torch.testing.assert_close(outputs[0], outputs[1])
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    for (name, value), expected in zip(layer.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)
    for parameter, twin in zip(layer.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad)


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_compiles_with_its_updates_of_gates_and_statistics(momentum: float | None) -> None:
    torch.compiler.reset()
    layer = SwitchNorm2d(4, momentum=momentum, gate="simplex")
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([-0.5, 0.2, 1.1]))
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(3, 4, 5, 5)
        outputs = [module(x) for module in (compiled, eager)]
        for y in outputs:
            y.pow(3).sum().backward()
        torch.testing.assert_close(outputs[0], outputs[1])
    for (name, value), expected in zip(layer.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)
    assert float(layer.mean_weight.detach().sum()) == pytest.approx(1)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_and_exports_at_one_spatial_position(training: bool) -> None:
    """Whether `in` has weight is read from a tensor, which a graph cannot do: a compiled layer warns if it may have."""
    torch.compiler.reset()
    layer = SwitchNorm2d.from_batch_norm(trained(nn.BatchNorm2d(4))).train(training)
    x = torch.randn(3, 4, 1, 1)
    expected = copy.deepcopy(layer)(x)
    with pytest.warns(UserWarning, match="is fed one spatial position per channel"):
        torch.testing.assert_close(torch.compile(copy.deepcopy(layer), fullgraph=True, backend="eager")(x), expected)
    if not training:
        torch.testing.assert_close(torch.export.export(layer, (x,), strict=False).module()(x), expected)


@LAYER_CASES
def test_exports_in_evaluation(make: Callable[[], SwitchNorm]) -> None:
    layer = mixed(trained(make()).eval())  # type: ignore[arg-type]
    batch = torch.export.Dim("batch", min=2, max=64)
    example = torch.randn(3, 4, 5, 5)
    program = torch.export.export(layer, (example,), strict=False, dynamic_shapes=({0: batch},))
    for x in (example, torch.randn(7, 4, 5, 5)):
        torch.testing.assert_close(program.module()(x), layer(x))


class _Net(nn.Module):
    """A site that is a module, one that is a child of a child, and one that is functional."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(4))
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), SwitchNormAct2d.from_batch_norm(BatchNormAct2d(4)))
        self.site = FunctionalSwitchNorm(gate="simplex", branches=BRANCHES)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.site(x, self.mean, self.var)
        return self.body(self.norm(x)) + x  # type: ignore[no-any-return]


def test_a_plain_fx_trace_keeps_layers_as_leaves_that_obey_train_and_eval() -> None:
    net = _Net()
    traced = torch.fx.symbolic_trace(copy.deepcopy(net))
    functions = [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]  # type: ignore[union-attr]
    assert functions.count("apply_layer") == 2
    assert functions.count("apply_site") == 1
    for graph in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        reference = copy.deepcopy(net)
        for training in (False, True, False):
            x = torch.randn(3, 4, 5, 5)
            assert graph.train(training)(x).equal(reference.train(training)(x))
            assert int(graph.get_buffer("norm.num_batches_tracked")) == int(reference.norm.num_batches_tracked)  # type: ignore[arg-type]
        for name, value in reference.state_dict().items():
            assert graph.state_dict()[name].equal(value), name


@pytest.mark.parametrize("track", [True, False])
def test_renorm_trains_on_what_evaluation_reads(track: bool) -> None:
    """Values are those of the statistics just updated; without any they are the batch's, as in evaluation."""
    layer = mixed(SwitchNorm2d(4, gate="simplex", bn_statistics="renorm", track_running_stats=track))
    for n in (2, 1, 3):
        x = torch.randn(n, 4, 5, 5) * n + 1
        y = layer.train()(x)
        torch.testing.assert_close(y, layer.eval()(x), rtol=1e-5, atol=1e-6)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True))
    assert layer.num_batches_tracked == (3 if track else None)


def test_sync_batch_norm_conversion_leaves_the_layer_alone() -> None:
    layers = [make() for make in LAYERS.values()]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(*layers, nn.BatchNorm2d(4)))
    assert all(after is before for after, before in zip(converted, layers, strict=False))
    assert type(converted[-1]) is nn.SyncBatchNorm
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in layers)


def test_an_average_of_the_model_keeps_kind_and_values() -> None:
    layer = mixed(SwitchNorm2d(4, gate="simplex"))
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    average.update_parameters(layer)
    x = torch.randn(3, 4, 5, 5)
    assert average.eval()(x).equal(layer.eval()(x))


def test_repr_shows_the_options() -> None:
    shown = repr(SwitchNorm2d(4, eps=0.5, momentum=None, affine=False, gate="simplex", branches=("ln", "bn")))
    assert shown == (
        "SwitchNorm2d(4, eps=0.5, momentum=None, affine=False, track_running_stats=True, gate='simplex', "
        "branches=('ln', 'bn'), bn_statistics='batch')"
    )
    assert "gate='softmax', branches=('in', 'bn')" in repr(FunctionalSwitchNorm(gate="softmax", branches=("bn", "in")))
    for make in LAYERS.values():
        assert f"{make().branches}" in repr(make())


# --- functional sites ----------------------------------------------------------------------------------------------

SITE_CALLS: dict[str, tuple[bool, bool]] = {  # (running statistics are given, training)
    "training": (True, True),
    "evaluation": (True, False),
    "untracked": (False, True),
}


@pytest.mark.parametrize(("tracked", "training"), SITE_CALLS.values(), ids=SITE_CALLS)
@pytest.mark.parametrize("affine", [True, False])
def test_a_functional_site_stands_in_for_batch_norm(tracked: bool, training: bool, affine: bool) -> None:
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
    """Without running statistics F.batch_norm is called with training=True in evaluation too."""
    site = FunctionalSwitchNorm(gate="simplex", branches=BRANCHES).train(site_trains)
    with torch.no_grad():
        site.mean_weight.copy_(torch.tensor([-1.0, 0.5, 2.0]))
    site(torch.randn(3, 4, 5, 5), None, None, training=call_trains)
    assert (site.mean_weight.tolist() == [-1.0, 0.5, 2.0]) == (not (site_trains and call_trains))
