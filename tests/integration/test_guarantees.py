"""The checks of the guarantees find planted violations; without that, the other tests would show little."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap import SwapPlan, convert
from tests.helpers import guarantees, zoo


def plain() -> nn.Module:
    return zoo.BY_NAME["half-frozen"].model()


def converted(fault: Callable[[Any], Any] = lambda model: None, **options: Any) -> nn.Module:
    model = convert(plain(), zoo.IMAGE(), **options).model
    with torch.no_grad():
        fault(model)
    return model


# (what goes wrong in the converted model, what guarantee 1 says)
OTHER_FUNCTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a gate": (lambda m: m.body[1].var_weight.copy_(torch.tensor([1e-6, 0, 1 - 1e-6])), "evaluation: output 0 is"),
    "eps": (lambda m: setattr(m.body[1], "eps", 1.1e-5), "evaluation: output 0 is"),
    "a count": (lambda m: m.body[1].num_batches_tracked.add_(1), "evaluation: buffer body.1.num_batches_tracked is"),
    "a running mean": (lambda m: m.body[1].running_mean.mul_(1.001), "evaluation: output 0 is"),
    "a gradient": (lambda m: m.body[0].requires_grad_(False), "evaluation: gradients of parameters is"),
    "the gradient of the input": (
        lambda m: m.body[0].register_full_backward_hook(lambda _m, given, _o: (given[0] * 2,)),
        "evaluation: gradients of inputs is",
    ),
    "a second output": (
        lambda m: m.register_forward_hook(lambda *a: (a[2], 1)),
        "evaluation: number of outputs is inf",
    ),
}


@pytest.mark.parametrize(("fault", "message"), OTHER_FUNCTIONS.values(), ids=OTHER_FUNCTIONS)
def test_guarantee_1_finds_another_function(fault: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(AssertionError, match=f"^guarantee 1, {re.escape(message)}"):
        guarantees.same_function(plain(), converted(fault), zoo.IMAGE())


def in_training(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Register a hook that changes a layer after it ran in training."""
    return lambda m: m.body[1].register_forward_hook(
        lambda layer, _args, y: setattr(layer, *change(layer)) if layer.training else None
    )


# What goes wrong in training only.
OTHER_TRAINING: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a running mean": (
        in_training(lambda n: ("running_mean", n.running_mean + 1e-6)),
        "training: body.1.running_mean changed",
    ),
    "a count": (
        in_training(lambda n: ("num_batches_tracked", n.num_batches_tracked + 1)),
        "training: body.1.num_batches_tracked changed",
    ),
    "a constant of matched branches": (
        in_training(lambda n: ("ln_mean_shift", n.ln_mean_shift + 1)),
        "training: body.1.ln_mean_shift changed",
    ),
    "an output": (
        lambda m: m.body[1].register_forward_hook(lambda n, _a, y: y * (1 + 1e-6) if n.training else None),
        "training: output 0 is",
    ),
}


@pytest.mark.parametrize(("fault", "message"), OTHER_TRAINING.values(), ids=OTHER_TRAINING)
def test_guarantee_1_finds_what_is_wrong_in_training_only(fault: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(AssertionError, match=f"^guarantee 1, {re.escape(message)}"):
        guarantees.same_function(plain(), converted(fault), zoo.IMAGE())


@pytest.mark.parametrize("name", ["half-frozen", "functional", "torch.batch_norm", "dropout beside it"])
def test_guarantee_1_tells_running_statistics_from_those_of_the_batch(name: str) -> None:
    model, x = zoo.BY_NAME[name].model(), zoo.IMAGE()
    for statistics, other in (("running", "batch"), ("batch", "running")):
        layers = convert(model, x, bn_statistics=statistics).model  # type: ignore[arg-type]
        guarantees.same_function(model, layers, x)
        for layer in layers.modules():
            if hasattr(layer, "bn_statistics"):  # which now says what the layer does not do
                layer.__class__ = says(type(layer), other, layer.bn_statistics)
        with pytest.raises(AssertionError, match=r"^guarantee 1, training: "):
            guarantees.same_function(model, layers, x, ("training",))


def says(cls: Any, statistics: str, does: str) -> Any:
    """A class whose layers say that they use other statistics than they do."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.running = True
        try:
            return cls.forward(self, *args, **kwargs)
        finally:
            self.running = False

    tells = property(lambda self: does if vars(self).get("running") else statistics, lambda self, value: None)
    return type(cls.__name__, (cls,), {"bn_statistics": tells, "forward": forward})


def test_guarantee_1_finds_another_momentum_with_batch_statistics() -> None:
    wrong = converted(lambda m: setattr(m.body[1], "momentum", 0.11), bn_statistics="batch")
    with pytest.raises(AssertionError, match=r"^guarantee 1, training: buffer body.1.running_mean is"):
        guarantees.same_function(plain(), wrong, zoo.IMAGE())


def test_guarantee_1_lets_no_error_of_the_converted_model_pass() -> None:
    with pytest.raises(ZeroDivisionError):
        guarantees.same_function(plain(), converted(lambda m: m.register_forward_hook(lambda *_: 1 / 0)), zoo.IMAGE())


def test_guarantee_1_skips_the_mode_in_which_the_original_raises() -> None:
    model, one = zoo.BY_NAME["one position"].model(), zoo.image(1, 3, 9, 9)()
    errors = guarantees.same_function(model, convert(model, zoo.IMAGE(), bn_statistics="batch").model, one)
    assert [mode for mode, error in errors.items() if error is None] == ["training", "as it is"]
    assert None not in guarantees.same_function(model, convert(model, zoo.IMAGE()).model, one).values()


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a value": (lambda m: m.body[0].weight[0].mul_(2), "body.0.weight is not bit-identical"),
    "memory format": (
        lambda m: setattr(
            m.body[0].weight, "data", m.body[0].weight.data.contiguous(memory_format=torch.channels_last)
        ),
        "body.0.weight is not bit-identical",
    ),
    "dtype": (lambda m: m.body[0].half(), "body.0.weight is not bit-identical"),
    "requires_grad": (lambda m: m.stem[0].requires_grad_(True), "stem.0.weight.requires_grad changed"),
    "a flag": (lambda m: m.stem[1].train(), "stem.1.training changed"),
    "a class": (lambda m: setattr(m.stem[2], "__class__", nn.ReLU6), "stem.2 became a ReLU6"),
    "a hook": (lambda m: m.stem[0].register_forward_hook(lambda *_: None), "hooks of stem.0 changed"),
    "an attribute": (lambda m: delattr(m.stem[2], "inplace"), "stem.2 lost {'inplace'}"),
    "a new tensor": (lambda m: m.register_buffer("extra", torch.ones(1)), "{'extra'}"),
    "a lost tensor": (lambda m: m.body[0].register_parameter("bias", None), "{'body.0.bias'}"),
    "a buffer that was a parameter": (
        lambda m: m.body[0]._buffers.update(bias=m.body[0]._parameters.pop("bias").detach()),
        "body.0.bias changed its class",
    ),
    "an alias": (lambda m: setattr(m.body[0], "bias", m.body[1].bias), "body.0.bias is not bit-identical"),
}


@pytest.mark.parametrize(("fault", "message"), CHANGES.values(), ids=CHANGES)
def test_guarantee_2_finds_any_other_change(fault: Callable[[Any], Any], message: str) -> None:
    original, plan = plain(), convert(plain(), zoo.IMAGE()).plan
    guarantees.nothing_else_changed(guarantees.Record.of(original), converted(), plan, same_objects=False)
    with pytest.raises(AssertionError, match=f"^guarantee 2: {re.escape(message)}"):
        guarantees.nothing_else_changed(guarantees.Record.of(original), converted(fault), plan, same_objects=False)


def test_guarantee_2_finds_lost_aliases_and_other_objects() -> None:
    model = zoo.BY_NAME["two names"].model()
    record, plan = guarantees.Record.of(model), convert(model).plan
    twin = convert(model).model
    with pytest.raises(AssertionError, match=r"guarantee 2: .* is another object"):
        guarantees.nothing_else_changed(record, twin, plan, same_objects=True)
    twin.alias = copy.deepcopy(twin.bn)
    with pytest.raises(AssertionError, match="guarantee 2: aliases"):
        guarantees.nothing_else_changed(record, twin, plan, same_objects=False)


def test_guarantee_2_finds_a_swap_that_was_not_planned_and_one_that_was_not_made() -> None:
    plan = convert(plain(), zoo.IMAGE()).plan
    with pytest.raises(AssertionError, match=r"guarantee 2: \{'stem.1."):
        guarantees.nothing_else_changed(
            guarantees.Record.of(plain()), converted(), replace(plan, swaps=plan.swaps[1:]), same_objects=False
        )
    with pytest.raises(AssertionError, match=r"guarantee 2: \{"):
        guarantees.nothing_else_changed(guarantees.Record.of(plain()), plain(), plan, same_objects=False)


def test_guarantee_3_finds_a_wrong_and_a_missing_gradient() -> None:
    assert guarantees.alive(converted(), ["stem.1", "body.1"], zoo.IMAGE()) == 2
    model = guarantees.in_float64(converted())
    with pytest.raises(AssertionError, match=r"guarantee 3: body.1.mean_weight is .* off the oracle's"):
        guarantees.alive(_with_gradients(model, lambda gradient: gradient * 1.001), ["body.1"], zoo.IMAGE())
    with pytest.raises(AssertionError, match=r"guarantee 3: body.1.mean_weight is .* off the oracle's"):
        guarantees.alive(_with_gradients(model, torch.zeros_like), ["body.1"], zoo.IMAGE())
    with pytest.raises(AssertionError, match=r"guarantee 3: body.1.mean_weight has the gradient \[nan"):
        guarantees.alive(_with_gradients(model, lambda gradient: gradient * float("nan")), ["body.1"], zoo.IMAGE())


class _Tampered(torch.autograd.Function):
    """Passes a gate on, and changes its gradient."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, change: Any) -> torch.Tensor:
        ctx.change = change
        return gate.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.change(gradient), None


def _with_gradients(model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A model whose layer gets a changed gradient for its mean gate, in a way that a deep copy keeps."""
    model = copy.deepcopy(model)
    layer = model.body[1]
    base = type(layer)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate = self._parameters["mean_weight"]
        self._parameters["mean_weight"] = _Tampered.apply(gate, change)
        try:
            return base.forward(self, x)
        finally:
            self._parameters["mean_weight"] = gate

    layer.__class__ = type("SwitchNormTampered", (base,), {"forward": forward, "project_gates": lambda self: None})
    return model


def test_guarantee_4_finds_what_is_nowhere_twice_or_without_a_reason() -> None:
    model = zoo.BY_NAME["unknown subclass"].model()
    plan = convert(model, zoo.IMAGE()).plan
    guarantees.accounted_for(model, plan, zoo.IMAGE())
    cases = {
        "guarantee 4: Counter()": replace(plan, skips=()),
        "guarantee 4: Counter({'1': 2})": replace(plan, skips=plan.skips * 2),
        "guarantee 4: the reason of 1 is 'no'": replace(plan, skips=(replace(plan.skips[0], reason="no"),)),
    }
    for message, other in cases.items():
        with pytest.raises(AssertionError, match=re.escape(message)):
            guarantees.accounted_for(model, other, zoo.IMAGE())


def test_guarantee_5_finds_what_a_revert_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(fault: Callable[[Any], Any]) -> Callable[[nn.Module], nn.Module]:
        revert = normswap.revert

        def reverted(model: nn.Module) -> nn.Module:
            with torch.no_grad():
                fault(revert(model))
            return model

        return reverted

    faults: dict[str, Callable[[Any], Any]] = {
        "classes": lambda m: setattr(m.body[1], "__class__", zoo.TheirNorm),
        "flags": lambda m: m.stem.train(),
        "attributes of body.1: {'gate'}": lambda m: setattr(m.body[1], "gate", "simplex"),
        "attributes of body.1": lambda m: setattr(m.body[1], "eps", 1e-3),
        "body.1.bias is not bit-identical": lambda m: m.body[1].bias.add_(1),
    }
    original = normswap.revert
    for message, fault in faults.items():
        monkeypatch.setattr(normswap, "revert", original, raising=False)
        monkeypatch.setattr(normswap, "revert", leave(fault), raising=False)
        with pytest.raises(AssertionError, match=f"guarantee 5: {re.escape(message)}"):
            guarantees.reverts(plain(), zoo.IMAGE())


def test_guarantee_5_finds_a_plan_that_changes_and_a_second_conversion_that_does_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = convert(plain(), zoo.IMAGE()).plan
    assert guarantees.plan_survives_json(plan) == plan
    monkeypatch.setattr(SwapPlan, "from_json", classmethod(lambda cls, text: replace(plan, notes=("more",))))
    with pytest.raises(AssertionError, match="guarantee 5: the plan changed on its way through JSON"):
        guarantees.plan_survives_json(plan)
    with pytest.raises(AssertionError, match="guarantee 5: swapped again"):
        guarantees.converting_twice_changes_nothing(plain(), plan, zoo.IMAGE())


class Counting:
    """A hook with a state of its own, which a copy of the model copies."""

    def __call__(self, *_: Any) -> None:
        return None


def test_hooks_that_are_objects_are_copied_with_the_model_and_kept_in_place() -> None:
    model = zoo.BY_NAME["two calls"].model()
    model.register_forward_hook(Counting())
    before, plan = guarantees.Record.of(model), SwapPlan((), (), "")
    twin = copy.deepcopy(model)
    guarantees.nothing_else_changed(before, twin, plan, same_objects=False)
    twin._forward_hooks.clear()
    with pytest.raises(AssertionError, match="guarantee 2: hooks of  changed"):
        guarantees.nothing_else_changed(before, twin, plan, same_objects=False)
    model._forward_hooks.clear()
    model.register_forward_hook(Counting())
    with pytest.raises(AssertionError, match="guarantee 2: hooks of  changed"):
        guarantees.nothing_else_changed(before, model, plan, same_objects=True)
