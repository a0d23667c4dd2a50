"""A model's own `train()` and `eval()` count: what they keep in evaluation stays so; a call leaves nothing behind."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normswap import convert, plan_swaps, update_statistics, verify
from normswap.surgery.module_tree import model_mode, model_training_flags
from tests.helpers import guarantees

X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two sites with an activation and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.2)
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.bn(self.conv(x)).relu()))


class ByClass(Net):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


class ByName(Net):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.bn.eval()
        return self


class NeverTrained(Net):
    """Was put into evaluation when it was made; its `train()` reaches the head only."""

    def __init__(self) -> None:
        super().__init__()
        nn.Module.train(self, False)

    def train(self, mode: bool = True) -> Any:
        self.training = mode
        self.head.train(mode)
        return self


class Part(nn.Module):
    """Has such a model inside."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.neck = ByClass(), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(self.backbone(x))


def of_one_object() -> nn.Module:
    model = Net()

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        Net.train(self, mode)
        self.bn.eval()
        return self

    model.train = types.MethodType(train, model)
    return model


def by_closure() -> nn.Module:
    model = Net()

    def train(mode: bool = True) -> nn.Module:
        Net.train(model, mode)
        model.bn.eval()
        return model

    model.train = train  # which is bound to this object, also in its copies
    return model


# How a model keeps norms in evaluation, and which.
KEEPS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "by class": (ByClass, {"bn", "head.1"}),
    "by name": (ByName, {"bn"}),
    "never trained": (NeverTrained, {"bn"}),
    "a part": (Part, {"backbone.bn", "backbone.head.1"}),
    "one object": (of_one_object, {"bn"}),
    "none": (Net, set()),
}


@pytest.mark.parametrize(("make", "kept"), KEEPS.values(), ids=KEEPS)
def test_norms_that_train_leaves_in_evaluation_keep_their_statistics(make: Callable[[], Any], kept: set[str]) -> None:
    model = make()
    before = guarantees.Record.of(model)
    conversion = convert(model, X, bn_statistics="batch")
    guarantees.nothing_else_changed(before, model, guarantees.NO_SWAPS, same_objects=True)
    assert {swap.fqn for swap in conversion.plan.swaps if swap.bn_statistics == "running"} == kept
    notes = [
        note for note in conversion.plan.notes if "The model's own train() leaves these norms in evaluation" in note
    ]
    assert len(notes) == bool(kept)
    assert all(name in notes[0] for name in kept)
    found = verify(model, conversion.model, [X])
    guarantees.nothing_else_changed(before, model, guarantees.NO_SWAPS, same_objects=True)
    assert found.passed
    assert [check.passed for check in found.checks] == [True] * 4
    assert all(site.training is not None for site in found.sites)


@pytest.mark.parametrize("make", [ByClass, ByName, Part, of_one_object], ids=lambda make: make.__name__)
def test_a_converted_model_trains_as_the_original_does(make: Callable[[], Any]) -> None:
    model = make()
    converted = convert(model, X, bn_statistics="batch").model
    for _ in range(3):
        outputs = []
        for each in (model, converted):
            each.train()
            torch.manual_seed(1)
            outputs.append(each(X))
            each.zero_grad()
            outputs[-1].square().mean().backward()
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    ours, theirs = dict(converted.named_buffers()), dict(model.named_buffers())
    for name, buffer in theirs.items():
        torch.testing.assert_close(ours[name], buffer, rtol=1e-4, atol=1e-5)
    gradients = {name: p.grad for name, p in converted.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_copy_whose_train_reaches_the_original_only_does_not_pass() -> None:
    model = by_closure()
    flags = {name: module.training for name, module in model.named_modules()}
    conversion = convert(model, X, bn_statistics="batch")
    assert {swap.fqn for swap in conversion.plan.swaps if swap.bn_statistics == "running"} == {"bn"}
    assert not verify(model, conversion.model, [X]).passed  # whose eval() does not put it into evaluation
    assert {name: module.training for name, module in model.named_modules()} == flags


def test_a_conversion_that_forgets_them_does_not_pass() -> None:
    model = ByClass()
    settings: Any = {"*": {"bn_statistics": "batch"}}
    conversion = convert(model, X, settings=settings)
    assert {swap.bn_statistics for swap in conversion.plan.swaps} == {"batch"}
    assert any(
        "settings make them use batch statistics, which changes the function" in n for n in conversion.plan.notes
    )
    found = verify(model, conversion.model, [X])
    assert not found.passed
    assert {check.name for check in found.checks if check.passed is False} >= {"outputs in training", "gradients"}


def test_a_norm_that_eval_keeps_in_training_is_skipped_with_the_reason() -> None:
    class Adapting(Net):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.training = True
            return self

    plan = plan_swaps(Adapting(), X)
    assert plan.swaps == ()
    assert {skip.reason for skip in plan.skips} == {
        "the model's own eval() leaves it in training mode, so it uses batch statistics there: left as it is"
    }


class Merging(Net):
    """Folds a scale into its weight for evaluation, as adapters do, and freezes its stem for training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.merged = nn.Parameter(torch.tensor(1.3)), False

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.conv.weight.mul_(1 / self.scale if mode else self.scale)
            self.merged = not mode
        self.conv.bias.requires_grad_(not mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.merged else x * self.scale)


def test_what_train_and_eval_change_is_put_back_to_the_bit() -> None:
    model = Merging()
    before = guarantees.Record.of(model)
    converted = convert(model, X).model
    found = verify(model, converted, [X])
    guarantees.nothing_else_changed(before, model, guarantees.NO_SWAPS, same_objects=True)
    assert found.passed
    assert [check.passed for check in found.checks] == [True] * 4


class Refusing(Net):
    def train(self, mode: bool = True) -> Any:
        raise NotImplementedError("made for inference")


def test_a_model_whose_train_raises_is_verified_by_its_flags() -> None:
    model = Refusing()
    assert {swap.bn_statistics for swap in plan_swaps(model, X, bn_statistics="batch").swaps} == {"batch"}
    wrong = convert(model, X, bn_statistics="batch").model
    assert verify(model, wrong, [X]).passed
    wrong.bn.momentum = 0.9
    assert not verify(model, wrong, [X]).passed


def test_flags_are_put_back_after_a_failure() -> None:
    model = ByClass().train()
    flags = {name: module.training for name, module in model.named_modules()}
    seen = []

    def fail() -> None:
        with model_mode(model, training=False):
            seen.append(model.drop.training)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert seen == [False]
    assert {name: module.training for name, module in model.named_modules()} == flags


def test_models_without_a_train_of_their_own_are_not_asked() -> None:
    assert model_training_flags(Net()) is None
    flags = model_training_flags(ByName())
    assert flags is not None
    assert [name for name, flag in flags.training.items() if not flag] == ["bn"]
    assert not any(flags.evaluation.values())


def test_statistics_that_train_keeps_are_not_updated() -> None:
    model = ByName()
    before = {name: buffer.clone() for name, buffer in model.bn.named_buffers()}
    update_statistics(model, [X])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.bn.named_buffers())
    assert int(model.head[1].num_batches_tracked) == 1


def test_running_statistics_by_choice_are_compared_with_frozen_norms() -> None:
    model = Net()
    converted = convert(model, X, bn_statistics="running").model
    found = verify(model, converted, [X])
    assert [check.passed for check in found.checks] == [True] * 4
    assert found.notes[0] == "training is compared with the original whose norms are in evaluation (frozen)"
    converted.head[0].register_forward_hook(lambda module, _args, y: 2 * y if module.training else y)
    assert not verify(model, converted, [X]).passed
