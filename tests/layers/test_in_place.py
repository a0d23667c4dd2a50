"""Conversion in place: the module object and all references to it stay; reverting restores the old norm."""

import copy
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from normswap.errors import LayerError, SwapError
from normswap.layers.gating import BRANCHES
from normswap.layers.in_place import (
    Replaced,
    check_replaceable,
    convert_module,
    original_class,
    qualified_name,
    revert_module,
    shallow_copy,
)
from normswap.layers.matching import MATCHING_BUFFERS
from normswap.layers.switch_norm import SwitchNorm, SwitchNorm1d, SwitchNorm2d, SwitchNorm3d, SwitchNormAct2d
from tests.helpers import oracles

# (how to make the norm, what it becomes, shape of the input)
NORMS: dict[str, tuple[Callable[[], nn.Module], type[SwitchNorm], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), SwitchNorm1d, (3, 4, 6)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), SwitchNorm2d, (3, 4, 5, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), SwitchNorm3d, (2, 4, 3, 2, 2)),
    "BatchNorm2d, affine=False": (lambda: nn.BatchNorm2d(4, affine=False), SwitchNorm2d, (3, 4, 5, 5)),
    "BatchNorm2d, bias=False": (lambda: nn.BatchNorm2d(4, bias=False), SwitchNorm2d, (3, 4, 5, 5)),
    "BatchNorm2d, momentum=None": (lambda: nn.BatchNorm2d(4, momentum=None), SwitchNorm2d, (3, 4, 5, 5)),
    "BatchNorm2d, untracked": (lambda: nn.BatchNorm2d(4, track_running_stats=False), SwitchNorm2d, (3, 4, 5, 5)),
    "BatchNorm2d, no tensor at all": (
        lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        SwitchNorm2d,
        (3, 4, 5, 5),
    ),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), SwitchNorm2d, (3, 4, 5, 5)),
    "timm BatchNormAct2d": (lambda: BatchNormAct2d(4, act_layer=nn.SiLU), SwitchNormAct2d, (3, 4, 5, 5)),
    "torchvision FrozenBatchNorm2d": (lambda: FrozenBatchNorm2d(4), SwitchNorm2d, (3, 4, 5, 5)),
    "timm FrozenBatchNormAct2d": (lambda: FrozenBatchNormAct2d(4), SwitchNormAct2d, (3, 4, 5, 5)),
}
NORM_CASES = pytest.mark.parametrize(("make", "target", "shape"), NORMS.values(), ids=NORMS)


def make_trained(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> nn.Module:
    """Return a float64 norm whose values all differ from their initial values."""
    module = make().double()
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
            assert name.rpartition(".")[2] in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        module(torch.randn(shape).double())
    return module


def convert_as(module: nn.Module, target: type[SwitchNorm], **options: Any) -> SwitchNorm:
    """Convert with the options of `normswap.convert`."""
    frozen = "weight" in module._buffers
    chosen: dict[str, Any] = {
        "gate": "simplex",
        "branches": BRANCHES,
        "bn_statistics": "running" if frozen else "batch",
        "train_gates": not frozen,
    }
    convert_module(module, target, **(chosen | options))
    assert isinstance(module, target)
    return module


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Return the `__dict__` with copies of the registries."""
    return {name: dict(v) if isinstance(v, dict) else v for name, v in module.__dict__.items()}


def assert_identical(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Assert that keys, their order and the objects are the same."""
    assert {*now} == {*before}
    for name, value in before.items():
        if isinstance(value, dict):
            assert list(now[name]) == list(value)
            assert all(now[name][key] is item for key, item in value.items())
        else:
            assert now[name] is value


@pytest.mark.parametrize("training", [True, False])
@NORM_CASES
def test_a_converted_norm_computes_the_same_function(
    make: Callable[[], nn.Module], target: type[SwitchNorm], shape: tuple[int, ...], training: bool
) -> None:
    original = make_trained(make, shape).train(training)
    layer = convert_as(copy.deepcopy(original), target)
    assert layer.training == training
    for _ in range(3):
        data, results = torch.randn(shape).double(), []
        for module in (original, layer):
            x = data.clone().requires_grad_()
            y = module(x)
            module.zero_grad()
            y.pow(3).mean().backward()
            own = [p.grad for name, p in module.named_parameters() if name in ("weight", "bias")]
            results.append((y.detach(), torch.cat([g.flatten() for g in (x.grad, *own) if g is not None])))
        assert oracles.relative_error(results[1][0], results[0][0]) < 1e-12
        assert oracles.relative_error(results[1][1], results[0][1]) < 1e-11
    for (name, buffer), twin in zip(original.named_buffers(), layer.buffers(), strict=True):
        assert oracles.relative_error(twin, buffer) < 1e-12, name


@NORM_CASES
def test_conversion_adds_gates_and_changes_nothing_else(
    make: Callable[[], nn.Module], target: type[SwitchNorm], shape: tuple[int, ...]
) -> None:
    module = make_trained(make, shape)
    before, keys = snapshot(module), list(module.state_dict())
    layer = convert_as(module, target)
    assert type(layer) is target
    assert layer is module
    for name, value in before.items():
        if name == "_parameters":
            assert {*layer._parameters} == {*value, "mean_weight", "var_weight"}
            assert all(layer._parameters[key] is item for key, item in value.items())
        elif name == "_buffers":
            assert layer._buffers == value | dict.fromkeys(MATCHING_BUFFERS)
        elif isinstance(value, dict):
            assert layer.__dict__[name] == value
        else:
            assert layer.__dict__[name] is value
    assert [key for key in layer.state_dict() if key not in ("mean_weight", "var_weight")] == keys
    assert layer.mean_weight.dtype == torch.float64 or not keys
    assert layer.num_features == 4
    assert f"{target.__name__}(4" in repr(layer) or "act" in repr(layer)


@NORM_CASES
def test_reverting_restores_the_same_dict_and_class(
    make: Callable[[], nn.Module], target: type[SwitchNorm], shape: tuple[int, ...]
) -> None:
    module = make_trained(make, shape)
    cls, before, state = type(module), snapshot(module), copy.deepcopy(module.state_dict())
    x = torch.randn(shape).double()
    expected = copy.deepcopy(module)(x)
    revert_module(convert_as(module, target))
    assert type(module) is cls
    assert_identical(snapshot(module), before)
    assert all(value.equal(state[name]) for name, value in module.state_dict().items())
    assert module(x).equal(expected)


def test_reverting_keeps_the_current_tensors() -> None:
    layer = convert_as(make_trained(lambda: nn.BatchNorm2d(4), (3, 4, 5, 5)), SwitchNorm2d)
    layer(torch.randn(3, 4, 5, 5).double() * 3)
    layer.eval().requires_grad_(False)
    layer.momentum, layer.eps = 0.5, 1e-2
    now = {k: v.clone() for k, v in layer.state_dict().items() if "mean_weight" not in k and "var_weight" not in k}
    revert_module(layer)
    assert type(layer) is nn.BatchNorm2d
    assert (layer.momentum, layer.eps) == (0.5, 1e-2)
    assert not layer.training
    assert layer.state_dict().keys() == now.keys()
    assert all(value.equal(now[name]) for name, value in layer.state_dict().items())
    assert not any(p.requires_grad for p in layer.parameters())


def test_reverting_restores_attributes_with_the_name_of_an_option() -> None:
    """Attributes that a user set on a module survive, whatever their names are."""
    module = nn.BatchNorm2d(4)
    notes = {
        "gate": "open",
        "branches": 3,
        "bn_statistics": None,
        "synchronize": [1],
        "replaced": "twice",
        "remark": "mine",
    }
    module.__dict__.update(notes)
    before = snapshot(module)
    layer = convert_as(module, SwitchNorm2d)
    assert layer.gate == "simplex"
    assert layer(torch.randn(3, 4, 5, 5)).shape == (3, 4, 5, 5)
    revert_module(copy.deepcopy(layer))
    revert_module(layer)
    assert_identical(snapshot(module), before)


def test_everything_that_pointed_at_the_module_still_does() -> None:
    bn = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), bn, nn.Sequential(bn))
    listed, parameters, calls = [bn], dict(bn.named_parameters()), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bn.register_forward_hook(lambda module, args, output: calls.append(module))
    bn.register_forward_pre_hook(lambda module, args: calls.append("before"))
    bn.weight.register_hook(lambda grad: calls.append("weight"))
    convert_as(bn, SwitchNorm2d)
    assert isinstance(model[1], SwitchNorm2d)
    assert model[1] is model[2][0] is listed[0]
    assert all(bn.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert any(p is bn.weight for p in optimizer.param_groups[0]["params"])
    before = bn.weight.detach().clone()
    model(torch.randn(3, 4, 5, 5)).pow(3).sum().backward()
    assert calls == ["before", bn, "before", bn, "weight"]
    optimizer.step()
    assert not bn.weight.detach().equal(before)


@pytest.mark.parametrize("train_gates", [True, False])
def test_gates_train_only_as_asked(train_gates: bool) -> None:
    layer = convert_as(nn.BatchNorm2d(4), SwitchNorm2d, train_gates=train_gates)
    assert layer.mean_weight.requires_grad == layer.var_weight.requires_grad == train_gates
    assert layer.weight is not None
    assert layer.weight.requires_grad


@pytest.mark.parametrize("synchronize", [True, False])
@pytest.mark.parametrize("branches", [("bn",), ("in", "bn"), ("ln", "bn"), BRANCHES])
def test_the_callers_choices_are_recorded(branches: tuple[str, ...], synchronize: bool) -> None:
    layer = convert_as(
        nn.BatchNorm2d(4),
        SwitchNorm2d,
        branches=branches,
        gate="softmax",
        bn_statistics="running",
        synchronize=synchronize,
    )
    assert (layer.branches, layer.gate, layer.bn_statistics) == (branches, "softmax", "running")
    assert layer.synchronize == synchronize
    assert layer.mean_weight.tolist() == [1.0] * len(branches)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gates_have_the_dtype_and_device_of_the_norm(dtype: torch.dtype, device: str) -> None:
    for options in ({}, {"affine": False}, {"track_running_stats": False}):
        layer = convert_as(nn.BatchNorm2d(4, dtype=dtype, device=device, **options), SwitchNorm2d)  # type: ignore[arg-type]
        assert layer.mean_weight.dtype == dtype
        assert layer.mean_weight.device.type == device


def test_a_simplex_start_without_bn_is_refused_before_anything_is_written() -> None:
    bn = nn.BatchNorm2d(4)
    before = snapshot(bn)
    with pytest.raises(
        LayerError, match=r"branches: expected 'bn' among them, where the gate starts, got \('in', 'ln'\)"
    ):
        convert_as(bn, SwitchNorm2d, branches=("in", "ln"))
    assert type(bn) is nn.BatchNorm2d
    assert_identical(snapshot(bn), before)


# torch warns that lazy modules are under development.
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(4, 4), "expected a BatchNorm module, got Linear"),
        (lambda: nn.LayerNorm(4), "expected a BatchNorm module, got LayerNorm"),
        (lambda: nn.InstanceNorm2d(4), "expected a BatchNorm module, got InstanceNorm2d"),
        (lambda: SwitchNorm2d(4), "expected a BatchNorm module, got SwitchNorm2d, which already is a SwitchNorm layer"),
        (
            lambda: nn.LazyBatchNorm1d(),
            "expected a module with initialized tensors, got an uninitialized LazyBatchNorm1d: run one batch",
        ),
        (
            lambda: BatchNormAct2d(4),
            "SwitchNorm2d runs the child modules [], but BatchNormAct2d has ['act', 'drop']: pass norms=KNOWN_NORMS | "
            "{\"timm.layers.norm_act.BatchNormAct2d\": partial(read_norm_act, then=('drop', 'act'))}, with the",
        ),
    ],
    ids=["linear", "layer norm", "instance norm", "switch norm", "lazy", "fused activation"],
)
def test_what_cannot_be_replaced(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(LayerError, match=re.escape(message)):
        check_replaceable(make(), SwitchNorm2d, frozenset())


def test_what_can_be_replaced() -> None:
    for make, target, _ in NORMS.values():
        check_replaceable(make(), target, target._expected_children)


class _Outer:
    class InnerNorm(nn.BatchNorm2d):
        """A norm that is defined inside another class."""


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, _Outer.InnerNorm])
def test_the_original_class_is_found_by_name(cls: type[nn.Module]) -> None:
    target = SwitchNormAct2d if cls is BatchNormAct2d else SwitchNorm2d
    layer = convert_as(cls(4), target)
    assert layer.__dict__["replaced"].class_name == qualified_name(cls)
    for twin in (layer, copy.deepcopy(layer)):
        assert original_class(twin) is cls
        revert_module(twin)
        assert type(twin) is cls


@pytest.mark.parametrize("act", [original_class, revert_module])
def test_a_layer_that_replaced_no_norm_cannot_be_reverted(act: Callable[[nn.Module], Any]) -> None:
    layer = SwitchNorm2d(4)
    with pytest.raises(
        SwapError, match=r"expected a layer made by normswap\.convert, got a SwitchNorm2d that replaced no norm"
    ):
        act(layer)
    assert type(layer) is SwitchNorm2d


def test_a_layer_is_reverted_once() -> None:
    layer = convert_as(nn.BatchNorm2d(4), SwitchNorm2d)
    revert_module(layer)
    with pytest.raises(SwapError, match="got a BatchNorm2d that replaced no norm"):
        revert_module(layer)


@pytest.mark.parametrize("name", ["no_such_package.norms.Norm", "torch.nn.NoSuchNorm", "torch.nn.functional", "Norm"])
def test_a_class_that_is_not_imported_is_named(name: str) -> None:
    layer = convert_as(nn.BatchNorm2d(4), SwitchNorm2d)
    layer.__dict__["replaced"] = Replaced(name, layer.__dict__["replaced"].added)
    before, imported = snapshot(layer), {*sys.modules}
    with pytest.raises(
        SwapError,
        match=f"cannot put back {re.escape(name)}, whose module is not imported: import it, then revert again",
    ):
        revert_module(layer)
    assert type(layer) is SwitchNorm2d
    assert_identical(snapshot(layer), before)
    assert {*sys.modules} == imported, "a class is looked up, never imported"


def test_a_shallow_copy_shares_tensors_and_children_but_no_registry() -> None:
    module = BatchNormAct2d(4)
    module.register_forward_hook(lambda *_: None)
    twin = shallow_copy(module)
    assert type(twin) is BatchNormAct2d
    assert twin.act is module.act
    assert twin.weight is module.weight
    assert twin.running_mean is module.running_mean
    assert twin._forward_hooks == module._forward_hooks
    twin.register_parameter("extra", None)
    twin.register_buffer("running_mean", None)
    twin._forward_hooks.clear()
    twin.eval()
    assert "extra" not in module._parameters
    assert isinstance(module.running_mean, Tensor)
    assert len(module._forward_hooks) == 1
    assert module.training
