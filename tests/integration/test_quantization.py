"""Models prepared for quantization: refused in one line with the way out, and the way out works."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantization
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx

from normswap import apply_plan, convert, find_norm_sites, importance_weights, param_groups, plan_swaps
from normswap.checkpoints.loading import load
from normswap.cli import main
from normswap.errors import CheckpointError, SwapError

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
REFUSAL = r"prepared for quantization \(.* is a \w+\): convert the original model, then prepare the"


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())


def eager(model: nn.Module, *, qat: bool, fused: bool) -> nn.Module:
    model.train(qat)
    if fused:
        fuse = quantization.fuse_modules_qat if qat else quantization.fuse_modules
        model = fuse(model, [["0", "1", "2"]])
    model.qconfig = (
        quantization.get_default_qat_qconfig("fbgemm") if qat else quantization.get_default_qconfig("fbgemm")
    )
    return (quantization.prepare_qat if qat else quantization.prepare)(model)


PREPARED: dict[str, Callable[[], nn.Module]] = {
    "eager": lambda: eager(plain(), qat=False, fused=False),
    "eager, QAT": lambda: eager(plain(), qat=True, fused=False),
    "eager, QAT, fused": lambda: eager(plain(), qat=True, fused=True),
    "FX": lambda: prepare_fx(plain().eval(), quantization.get_default_qconfig_mapping("fbgemm"), (X,)),
    "FX, QAT": lambda: prepare_qat_fx(plain().train(), quantization.get_default_qat_qconfig_mapping("fbgemm"), (X,)),
}


@pytest.fixture(autouse=True)
def deprecated() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates torch.ao.quantization
        yield


@pytest.fixture(params=PREPARED.values(), ids=PREPARED)
def prepared(request: Any) -> nn.Module:
    return request.param()  # type: ignore[no-any-return]


def values(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def test_a_prepared_model_is_refused_with_the_way_out_and_left_as_it_is(prepared: nn.Module) -> None:
    before = values(prepared)
    plan = plan_swaps(plain())
    calls: list[Callable[[], Any]] = [
        lambda: convert(prepared, X),
        lambda: convert(prepared, inplace=True),
        lambda: plan_swaps(prepared),
        lambda: find_norm_sites(prepared, X),
        lambda: apply_plan(prepared, plan),
    ]
    for call in calls:
        with pytest.raises(SwapError, match=REFUSAL):
            call()
    after = prepared.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_file_of_a_prepared_model_is_refused_with_the_way_out(
    prepared: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(prepared.state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"from a model prepared for quantization: convert the original model"):
        load(tmp_path / "model.pt", architecture=plain)
    for command in (["convert", "model.pt", "--arch", "none", "--no-verify"], ["inspect", "model.pt"]):
        with pytest.raises(SystemExit) as status:
            main([command[0], str(tmp_path / command[1]), *command[2:]])
        assert status.value.code == 2
        printed = capsys.readouterr().err
        assert "from a model prepared for quantization: convert the original model" in printed
    assert [*tmp_path.iterdir()] == [tmp_path / "model.pt"]


@pytest.mark.parametrize("qat", [False, True])
def test_a_converted_model_can_be_prepared_and_trained(qat: bool) -> None:
    model = eager(convert(plain(), X).model, qat=qat, fused=False).train()
    optimizer = torch.optim.SGD(param_groups(model, lr=0.01, importance_lr=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    assert importance_weights(model)["1"].mean["bn"] < 1
    assert not plan_swaps(model).swaps
