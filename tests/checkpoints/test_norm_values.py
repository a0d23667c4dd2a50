"""Batch norms with invalid running statistics are refused by name; other tensors are not checked."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from normswap.checkpoints.content.state_dict import check_running_stats
from normswap.errors import CheckpointError
from tests.helpers import files

State = dict[str, Tensor]
NAN, INF = float("nan"), float("inf")


def state() -> State:
    return dict(files.small_model().state_dict())


def put(key: str, value: float | Tensor, *, index: int = 1) -> Callable[[State], None]:
    def change(changed: State) -> None:
        if isinstance(value, Tensor):
            changed[key] = value
        else:
            changed[key].view(-1)[index] = value

    return change


def _everywhere(changed: State) -> None:
    for key, tensor in changed.items():
        if key.endswith("running_mean"):
            tensor.fill_(NAN)


BAD = {
    "NaN in a mean": (put("bn1.running_mean", NAN), "bn1.running_mean (1 of 32 values, such as nan), expected finite"),
    "Inf in a variance": (
        put("bn1.running_var", INF),
        "bn1.running_var (1 of 32 values, such as inf), expected finite",
    ),
    "a negative variance": (
        put("bn1.running_var", -0.5),
        "bn1.running_var (1 of 32 values, such as -0.5), expected finite",
    ),
    "in half precision": (
        put("bn1.running_var", torch.full((32,), INF).half()),
        "(32 of 32 values, such as inf), expected finite",
    ),
    "everywhere": (_everywhere, "values, such as nan), +12 more, expected finite running statistics"),
    "a short mean": (
        put("bn1.running_mean", torch.zeros(3)),
        "bn1.running_var (32), bn1.weight (32), bn1.bias (32), expected the shape of the running_mean of the same norm",
    ),
    "a flat weight": (put("bn1.weight", torch.ones(31)), "bn1.weight (31), expected the shape"),
    "a variance of two dimensions": (
        put("bn1.running_var", torch.ones(32, 1)),
        "bn1.running_var (32x1), expected the shape",
    ),
    "a single number": (
        put("bn1.running_var", torch.tensor(1.0)),
        "bn1.running_var (a single number), expected the shape",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_values_that_cannot_normalize_are_refused(change: Callable[[State], None], message: str) -> None:
    bad = state()
    check_running_stats(bad, name="model.pt")
    change(bad)
    with pytest.raises(CheckpointError) as caught:
        check_running_stats(bad, name="model.pt")
    assert str(caught.value).startswith("model.pt: ")
    assert message in str(caught.value)


def test_a_norm_at_the_root_has_no_prefix() -> None:
    norm = nn.BatchNorm1d(3)
    norm.running_var[0] = -1
    with pytest.raises(CheckpointError, match=re.escape("x: running_var (1 of 3 values, such as -1), expected finite")):
        check_running_stats(norm.state_dict(), name="x")


GOOD = {
    "NaN in another layer": put("fc.weight", NAN),
    "NaN in a norm's weight": put("bn1.weight", NAN),
    "a variance of zero": put("bn1.running_var", 0.0),
    "a mean alone": lambda changed: changed.pop("bn1.running_var"),
    "no values": put("bn1.running_mean", torch.empty(32, device="meta")),
    "a convolution that keeps statistics": put("bn1.weight", torch.ones(8, 4, 3, 3)),
    "statistics of one byte": put("bn1.running_mean", torch.zeros(32).to(torch.float8_e4m3fn)),
    "whole numbers": put("bn1.running_var", torch.ones(32, dtype=torch.int32)),
}


@pytest.mark.parametrize("change", GOOD.values(), ids=GOOD)
def test_all_others_pass(change: Callable[[State], None]) -> None:
    good = state()
    change(good)
    check_running_stats(good, name="model.pt")


def test_the_check_is_cheap_and_touches_norms_only(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet50").state_dict(), tmp_path / "a.pt")
    mapped = torch.load(tmp_path / "a.pt", mmap=True)
    for key in list(mapped):
        if mapped[key].dim() > 1:
            mapped[key] = mapped[key].to("meta")  # which raises once its values are asked for
    started = time.perf_counter()
    check_running_stats(mapped, name="a.pt")
    assert time.perf_counter() - started < 1
