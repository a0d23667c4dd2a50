"""Optimizers that other libraries build by their own rules: what these do to gates, and that one call mends it.

Each rule is written here in our words, on the structure that the library gives its optimizer.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn

import normswap
from normswap.errors import OptimizerError
from normswap.surgery.importance import gated_modules, trainable_gates

DECAY = 0.05
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)


def build_yolo(model: nn.Module) -> Any:
    """Biases by name, norms by torch's classes, and all else, which decays."""
    by_name, by_class, rest = [], [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            place = by_name if "bias" in name else by_class if isinstance(module, NORMS) else rest
            place.append(parameter)
    optimizer = torch.optim.SGD(by_name, lr=0.1, momentum=0.9, nesterov=True)
    optimizer.add_param_group({"params": rest, "weight_decay": DECAY})
    optimizer.add_param_group({"params": by_class, "weight_decay": 0.0})
    return optimizer


def build_yolox(model: nn.Module) -> Any:
    """Parameters that are called `weight` and `bias` alone, so that gates are in no group."""
    groups: dict[str, list[nn.Parameter]] = {"norm": [], "rest": [], "bias": []}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            groups["bias"].append(module.bias)  # type: ignore[arg-type]
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            is_norm = isinstance(module, nn.BatchNorm2d) or "bn" in name
            groups["norm" if is_norm else "rest"].append(module.weight)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(groups["norm"], lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": groups["rest"], "weight_decay": DECAY})
    optimizer.add_param_group({"params": groups["bias"]})
    return optimizer


def build_mmengine(model: nn.Module) -> Any:
    """`norm_decay_mult=0`: a group for every parameter, without decay if its module is a norm by class."""
    groups = [
        {"params": [parameter], "weight_decay": 0.0 if isinstance(module, NORMS) else DECAY}
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    ]
    return torch.optim.AdamW(groups, lr=0.1)


def build_detectron(model: nn.Module) -> Any:
    """`WEIGHT_DECAY_NORM = 0`: two groups, by the class of the module."""
    sorted_: dict[float, list[nn.Parameter]] = {DECAY: [], 0.0: []}
    for module in model.modules():
        sorted_[0.0 if isinstance(module, NORMS) else DECAY] += module.parameters(recurse=False)
    return torch.optim.SGD([{"params": p, "weight_decay": decay} for decay, p in sorted_.items() if p], lr=0.1)


def build_transformers(model: nn.Module) -> Any:
    """The Trainer's own rule, by names: what is called bias or norm does not decay."""
    names = set(transformers.Trainer.get_decay_parameter_names(SimpleNamespace(), model))  # type: ignore[arg-type]
    parts = [[p for n, p in model.named_parameters() if (n in names) is decays] for decays in (True, False)]
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": d} for p, d in zip(parts, (DECAY, 0.0), strict=True)], lr=0.1
    )


def build_plain(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=DECAY)


def build_named(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.named_parameters(), lr=0.1, weight_decay=DECAY)


RULES: dict[str, Callable[[nn.Module], Any]] = {
    "YOLO": build_yolo,
    "YOLOX": build_yolox,
    "mmengine": build_mmengine,
    "detectron2": build_detectron,
    "transformers": build_transformers,
    "plain torch, Lightning": build_plain,
    "by name": build_named,
}


@pytest.fixture
def converted() -> nn.Module:
    return normswap.convert(timm.create_model("test_resnet"), torch.randn(2, 3, 32, 32)).model


def decays(optimizer: Any) -> dict[nn.Parameter, float]:
    return {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def affine(model: nn.Module) -> list[nn.Parameter]:
    return [p for layer in gated_modules(model).values() for p in (layer.weight, layer.bias)]  # type: ignore[misc]


@pytest.mark.parametrize("rule", RULES)
def test_one_call_takes_gates_out_of_the_decay_of_other_libraries(rule: str, converted: nn.Module) -> None:
    gates = list(trainable_gates(converted).values())
    optimizer = RULES[rule](converted)
    before = decays(optimizer)
    assert any(before.get(gate) != 0 for gate in gates), "the rule of the library needs no remedy"
    assert normswap.exempt_gates(converted, optimizer, importance_lr=0.02) is optimizer
    after = decays(optimizer)
    assert [after[gate] for gate in gates] == [0.0] * len(gates)
    assert {p: d for p, d in after.items() if p not in set(gates)} == {
        p: d for p, d in before.items() if p not in set(gates)
    }
    assert (optimizer.param_groups[-1]["params"], optimizer.param_groups[-1]["lr"]) == (gates, 0.02)


@pytest.mark.parametrize("rule", RULES)
def test_affine_parameters_of_sn_decay_as_little_as_those_of_bn_if_asked(rule: str, converted: nn.Module) -> None:
    optimizer = RULES[rule](converted)
    others = {p: d for p, d in decays(optimizer).items() if p not in {*affine(converted)}}
    for _ in range(2):  # twice is as once
        normswap.exempt_gates(converted, optimizer, affine=True)
        after = decays(optimizer)
        assert {after[p] for p in affine(converted)} == {0.0}
        assert len(after) == len(list(converted.parameters()))
        gates = {*trainable_gates(converted).values()}
        assert all(after[p] == d for p, d in others.items() if p not in gates)


def test_the_optimizer_steps_on_with_its_state(converted: nn.Module) -> None:
    optimizer = build_named(converted)
    x = torch.randn(2, 3, 32, 32)
    converted(x).square().mean().backward()
    optimizer.step()
    state = {p: entry["exp_avg"].clone() for p, entry in optimizer.state.items()}
    normswap.exempt_gates(converted, optimizer, affine=True)
    assert all(torch.equal(optimizer.state[p]["exp_avg"], value) for p, value in state.items())
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(g["param_names"]) for g in optimizer.param_groups]
    named = {id(p): name for name, p in converted.named_parameters()}
    for group in optimizer.param_groups:
        assert [named[id(p)] for p in group["params"]] == group["param_names"]
    before = [p.detach().clone() for p in converted.parameters()]
    optimizer.step()
    assert any(not torch.equal(p, old) for p, old in zip(converted.parameters(), before, strict=True))
    stored = optimizer.state_dict()
    again = normswap.exempt_gates(converted, build_named(converted), affine=True)
    again.load_state_dict(stored)


def test_timm_leaves_gates_alone_without_a_remedy(converted: nn.Module) -> None:
    for optimizer in (
        create_optimizer_v2(converted, opt="adamw", lr=0.1, weight_decay=DECAY),
        torch.optim.AdamW(param_groups_weight_decay(converted, DECAY), lr=0.1),
    ):
        after = decays(optimizer)
        assert {after[p] for p in (*trainable_gates(converted).values(), *affine(converted))} == {0.0}


class FastaiOptimizer:
    """The parts of fastai's optimizer that matter here: lists of parameters, hypers, a state with marks."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.param_lists, self.hypers = [parameters], [{"lr": 0.1, "wd": DECAY}]
        self.state: Any = defaultdict(dict)

    def step(self) -> None:
        for parameter in self.param_lists[0]:
            if self.state[parameter].get("do_wd", True):
                parameter.data.mul_(1 - self.hypers[0]["lr"] * self.hypers[0]["wd"])


def test_fastai_decays_neither_gates_nor_norms_once_they_are_marked(converted: nn.Module) -> None:
    optimizer = FastaiOptimizer(list(converted.parameters()))
    for module in converted.modules():
        for parameter in module.parameters(recurse=False) if isinstance(module, NORMS) else ():
            optimizer.state[parameter]["do_wd"] = False
    kept = [*trainable_gates(converted).values(), *affine(converted)]
    normswap.exempt_gates(converted, optimizer, affine=True)
    before = [p.detach().clone() for p in kept]
    other = next(p for p in converted.parameters() if p.ndim > 1)
    old = other.detach().clone()
    optimizer.step()
    assert all(torch.equal(p, value) for p, value in zip(kept, before, strict=True))
    assert not torch.equal(other, old)


@pytest.mark.parametrize(
    ("optimizer", "options", "text"),
    [
        (lambda _: "sgd", {}, "optimizer: expected a torch optimizer, got str"),
        (
            lambda m: FastaiOptimizer(list(m.parameters())[:3]),
            {"affine": True},
            "parameters of the model's gates and norms: build it from the converted model with learn.create_opt()",
        ),
        (lambda m: FastaiOptimizer(list(m.parameters())), {"importance_lr": 0.1}, "remove importance_lr"),
        (
            lambda m: torch.optim.SGD(list(m.parameters())[:3], lr=0.1),
            {},
            "trainable parameters are in no group",
        ),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused(
    optimizer: Callable[[nn.Module], Any], options: Any, text: str, converted: nn.Module
) -> None:
    with pytest.raises(OptimizerError, match=re.escape(text)):
        normswap.exempt_gates(converted, optimizer(converted), **options)
