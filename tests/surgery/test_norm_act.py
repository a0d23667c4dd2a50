"""Norms with modules after them, of any rank and under any names: converted, and every message leads out."""

import copy
import pickle
import re
import sys
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from normswap import KNOWN_NORMS, SwitchNormAct, convert, read_batch_norm, read_norm_act, revert, verify
from normswap.errors import LayerError
from normswap.layers.switch_norm import SwitchNorm2d, SwitchNormAct2d

SHAPES = {1: (4, 8, 5), 2: (4, 8, 5, 5), 3: (2, 8, 4, 4, 4)}
NORMS: dict[int, type[Any]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def norm_act(rank: int, **modules: Any) -> nn.Module:
    """A norm of a rank whose class runs what is given after it, in order."""

    class NormAct(NORMS[rank]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(8)
            for name, module in modules.items():
                setattr(self, name, module)

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            for name in modules:
                y = getattr(self, name)(y)
            return y  # type: ignore[no-any-return]

    return NormAct()


def check(norm: nn.Module, reader: Any, rank: int) -> nn.Module:
    """Convert a model around `norm`, verify it in both modes, put the norm back."""
    torch.manual_seed(0)
    x = torch.randn(SHAPES[rank])
    model = nn.Sequential(nn.Identity(), norm)
    for parameter in norm.parameters(recurse=False):
        nn.init.uniform_(parameter)
    norms = KNOWN_NORMS | {type(norm): reader}
    conversion = convert(model, x, norms=norms)
    assert [swap.fqn for swap in conversion.plan.swaps] == ["1"]
    verification = verify(model, conversion.model, [x])
    assert verification.passed
    assert all(check.passed for check in verification.checks)
    layer = conversion.model[1]
    assert copy.deepcopy(layer)(x).equal(layer(x))
    inplace = convert(copy.deepcopy(model), x, norms=norms, inplace=True).model
    assert type(inplace[1]) is SwitchNormAct
    return layer  # type: ignore[no-any-return]


@pytest.mark.parametrize("rank", SHAPES)
def test_a_norm_with_drop_and_activation_of_any_rank_is_converted(rank: int) -> None:
    norm = norm_act(rank, drop=nn.Identity(), act=nn.ReLU())
    for reader in (read_norm_act, partial(read_batch_norm, target=SwitchNormAct)):
        check(norm, reader, rank)


@pytest.mark.parametrize("name", ["activation", "act_layer", "nonlinearity", "relu"])
@pytest.mark.parametrize("rank", SHAPES)
def test_an_activation_under_any_name_is_converted(rank: int, name: str) -> None:
    layer = check(norm_act(rank, **{name: nn.SiLU()}), partial(read_norm_act, then=(name,)), rank)
    assert [child for child, _ in layer.named_children()] == [name]


def test_an_activation_that_is_a_function_is_converted() -> None:
    check(norm_act(3, nonlinearity=F.leaky_relu), partial(read_norm_act, then=("nonlinearity",)), 3)


def test_modules_run_in_the_order_that_is_given() -> None:
    modules = {"first": nn.ReLU(), "second": nn.Threshold(0.5, -1.0)}
    check(norm_act(2, **modules), partial(read_norm_act, then=("first", "second")), 2)


def test_the_order_in_other_kinds_of_norms() -> None:
    class GroupNormAct3d(nn.GroupNorm):
        def __init__(self) -> None:
            super().__init__(1, 8)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    model, x = nn.Sequential(GroupNormAct3d()), torch.randn(SHAPES[3])
    reader = partial(read_norm_act, read=normswap.read_group_norm, then=("act",))
    converted = convert(model, x, kinds=("gn1",), norms=KNOWN_NORMS | {GroupNormAct3d: reader}).model
    assert verify(model, converted, [x]).passed


def test_reverting_takes_away_what_was_added() -> None:
    norm = norm_act(3, activation=nn.ReLU())
    sys.modules[__name__].Reverted = type(norm)
    type(norm).__qualname__ = "Reverted"
    model, x = nn.Sequential(norm), torch.randn(SHAPES[3])
    before = dict(vars(norm))
    convert(model, x, norms=KNOWN_NORMS | {type(norm): partial(read_norm_act, then=("activation",))}, inplace=True)
    assert norm.then == ("activation",)
    revert(model)
    assert vars(norm).keys() == before.keys()


def reason(norm: nn.Module, reader: Any, rank: int) -> str:
    norms = KNOWN_NORMS | ({type(norm): reader} if reader else {})
    plan = convert(nn.Sequential(norm), torch.randn(SHAPES[rank]), norms=norms).plan
    assert not plan.swaps
    return plan.skips[0].reason


def follow(advice: str, norm: nn.Module) -> dict[Any, Any]:
    """Type what a message says, as a user would."""
    typed = re.search(r"norms=(KNOWN_NORMS \| \{.*\})", advice)
    assert typed is not None, advice
    names = {"KNOWN_NORMS": KNOWN_NORMS, "partial": partial, "read_norm_act": read_norm_act}
    return eval(typed[1], names)  # type: ignore[no-any-return]


@pytest.mark.parametrize("reader", [None, read_batch_norm], ids=["unknown", "read_batch_norm"])
@pytest.mark.parametrize("rank", SHAPES)
def test_what_the_message_says_to_type_converts_the_norm(rank: int, reader: Any) -> None:
    norm = norm_act(rank, drop=nn.Identity(), activation=nn.ReLU())
    norms = follow(reason(norm, reader, rank), norm)
    assert len(convert(nn.Sequential(norm), torch.randn(SHAPES[rank]), norms=norms).plan.swaps) == 1


def test_a_target_of_another_rank_names_the_one_of_any_rank() -> None:
    norm = norm_act(3, drop=nn.Identity(), act=nn.ReLU())
    advice = reason(norm, partial(read_batch_norm, target=SwitchNormAct2d), 3)
    expected = r"has an input of 2x8x4x4x4, .* takes 4-D input: register it with target=SwitchNormAct, which takes any"
    assert re.search(expected, advice), advice
    plain = nn.BatchNorm3d(8)
    assert "target=SwitchNorm, which takes any rank" in reason(plain, partial(read_batch_norm, target=SwitchNorm2d), 3)


def test_a_name_that_the_norm_does_not_have_is_reported() -> None:
    norm = norm_act(2, act=nn.ReLU())
    expected = r"for its class in norms= failed: read_norm_act: expected modules or functions named \('drop', 'act'\), "
    assert re.search(expected + "found no 'drop'", reason(norm, read_norm_act, 2))
    with pytest.raises(LayerError, match="found no 'drop'"):
        read_norm_act(norm)


def test_the_norms_of_timm_3d_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = norm_act(3, drop=nn.Identity(), act=nn.ReLU())
    for name in ("BatchNormAct3d", "SyncBatchNormAct"):
        type(norm).__module__, type(norm).__qualname__ = "timm_3d.layers.norm_act", name
        plan = convert(nn.Sequential(norm), torch.randn(SHAPES[3])).plan
        assert [swap.synchronize for swap in plan.swaps] == [name == "SyncBatchNormAct"]


def test_the_layer_is_public_and_of_any_rank() -> None:
    layer = normswap.SwitchNormAct(8, act=nn.ReLU(), drop=nn.Threshold(0.5, -1.0))
    for shape in SHAPES.values():
        assert float(layer(torch.randn(shape)).detach().min()) == 0
    with pytest.raises(LayerError, match="expected a 4-D input"):
        SwitchNormAct2d(8)(torch.randn(SHAPES[3]))


def test_what_was_pickled_before_there_was_a_choice_of_names_loads() -> None:
    layer = SwitchNormAct2d(8, act=nn.ReLU())
    assert "then" not in vars(layer)  # the pickles of older versions do not have it
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is SwitchNormAct2d
    assert isinstance(again, SwitchNorm2d)
    x = torch.randn(SHAPES[2])
    assert again(x).equal(layer(x))
