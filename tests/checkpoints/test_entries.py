"""The entries of a checkpoint's content, recognized by their structure."""

import argparse
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from normswap.checkpoints.content.entries import (
    drop_entry,
    format_key_path,
    get_entry,
    is_state_dict,
    read_architecture_hints,
    read_contents,
    replace_entries,
)
from normswap.errors import CheckpointError

STATE = nn.BatchNorm1d(3).state_dict()
OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
RNG = {"torch": torch.get_rng_state()}

CASES: dict[str, tuple[Any, str | None, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]] = {
    "bare": (STATE, None, (), (), ()),
    "a module": (nn.BatchNorm1d(3), None, (), (), ()),
    "timm": (
        {"state_dict": STATE, "state_dict_ema": STATE, "optimizer": OPTIMIZER},
        None,
        ("state_dict",),
        (("state_dict_ema",),),
        (("optimizer",),),
    ),
    "the likelier name": ({"extra": STATE, "model": STATE}, None, ("model",), (("extra",),), ()),
    "the only one that is no average": ({"mine": STATE, "mine_ema": STATE}, None, ("mine",), (("mine_ema",),), ()),
    "nested": ({"checkpoint": {"model": STATE}, "rng": RNG}, None, ("checkpoint", "model"), (), ()),
    "lists of optimizers": (
        {"state_dict": STATE, "optimizer_states": [OPTIMIZER, OPTIMIZER]},
        None,
        ("state_dict",),
        (),
        (("optimizer_states", 0), ("optimizer_states", 1)),
    ),
    "by name": ({"a": STATE, "b": {"net": STATE}}, "b.net", ("b", "net"), (("a",),), ()),
    "extra state": ({"model": {**STATE, "_extra_state": {"count": 3}}}, None, ("model",), (), ()),
}


@pytest.mark.parametrize(("content", "entry", "weights", "others", "optimizers"), CASES.values(), ids=CASES)
def test_places_are_found(content: Any, entry: str | None, weights: Any, others: Any, optimizers: Any) -> None:
    found = read_contents(content, entry=entry)
    assert (found.weights, found.others, found.optimizers) == (weights, others, optimizers)


REFUSED = {
    "two models": ({"a": STATE, "b": STATE}, None, r"several models \('a', 'b'\): select one, such as entry='a'"),
    "no such entry": ({"a": STATE, "b": STATE}, "c", "no weights at 'c': expected one of 'a', 'b'"),
    "nothing": ({"epoch": 3}, None, "a mapping with the entry 'epoch' of type int and without a state dict"),
    "counters": ({"a": torch.tensor(3)}, None, "a mapping of tensors without floating-point weights"),
}


@pytest.mark.parametrize(("content", "entry", "message"), REFUSED.values(), ids=REFUSED)
def test_no_guessing(content: Any, entry: str | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_contents(content, entry=entry)


def test_replacing_copies_the_way_and_nothing_else() -> None:
    content = {"a": {"b": [1, {"c": 2}], "keep": (kept := [3])}, "d": OrderedDict(e=4)}
    changed = replace_entries(content, {("a", "b", 1, "c"): 20, ("d", "e"): 40})
    assert changed == {"a": {"b": [1, {"c": 20}], "keep": [3]}, "d": OrderedDict(e=40)}
    assert content == {"a": {"b": [1, {"c": 2}], "keep": [3]}, "d": OrderedDict(e=4)}
    assert changed["a"]["keep"] is kept
    assert type(changed["d"]) is OrderedDict
    assert replace_entries(content, {(): 1}) == 1
    assert replace_entries(content, {}) is content


def test_the_rest_leaves_the_weights_out() -> None:
    content = {"model": {"net": STATE, "step": 3}, "epoch": 4}
    assert drop_entry(content, ("model", "net")) == {"epoch": 4, "model": {"step": 3}}
    assert drop_entry(content, ("model",)) == {"epoch": 4}
    assert drop_entry(STATE, ()) == {}
    assert get_entry(content, ("model", "step")) == 3
    assert format_key_path(("optimizer_states", 0)) == "optimizer_states.0"


def test_hints_are_words_of_the_file() -> None:
    args = argparse.Namespace(model="resnet50", lr=0.1)
    assert read_architecture_hints({"arch": "resnet18", "args": args}) == ("resnet18", "resnet50")
    assert read_architecture_hints({"model": STATE, "args": {"arch": "vgg"}}) == ("vgg",)
    assert read_architecture_hints(nn.ReLU()) == ()


def test_random_states_and_optimizers_are_no_weights() -> None:
    assert not is_state_dict(RNG)
    assert not is_state_dict({"count": torch.tensor(1.0)})
    assert not is_state_dict({0: torch.ones(2)})
    assert is_state_dict(STATE)
