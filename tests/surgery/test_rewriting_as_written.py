"""Calls that no graph was made for: the code runs as it is written, its batch_norm calls led to the gates in order."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from normswap.errors import LayerError
from normswap.layers.gated_module import FunctionalSwitchNorm
from normswap.surgery.graphs.rewriting import run_original_forward
from tests.helpers import guarantees, zoo


class Switched(zoo.FunctionalBlock):
    """Two calls of its own around a child's, a helper that makes one, a kernel, and a switch that decides."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.FunctionalBlock(8, 8)
        self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor, flip: bool = False, calls: int = 2) -> Tensor:
        x = self.inner(self.conv(x))
        if flip:
            x = x.flip(3)
        kernel = F.batch_norm(self.kernel.reshape(1, 8, -1) * 2, None, None, training=True).reshape_as(self.kernel)
        x = F.conv2d(x, kernel, padding=1)
        for _ in range(calls):
            x = self.normalize(x)
        return x

    def normalize(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


def pair() -> tuple[Any, Any]:
    torch.manual_seed(7)
    block = guarantees.in_float64(zoo.randomise(Switched()))
    return block, normswap.convert(block, zoo.IMAGE().double(), bn_statistics="batch").model


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"flip": False}, {"flip": True}, {"flip": True, "calls": 2}], ids=str)
def test_every_call_is_the_same_function(arguments: dict[str, Any], training: bool) -> None:
    block, converted = pair()
    results = [model.train(training)(zoo.IMAGE().double(), **arguments) for model in (block, converted)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(converted.running_var, block.running_var)


def test_arguments_may_come_by_position() -> None:
    block, converted = pair()
    for flip in (False, True):
        torch.testing.assert_close(converted(zoo.IMAGE().double(), flip, 2), block(zoo.IMAGE().double(), flip, 2))
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        converted(flip=True)


def test_kernels_and_other_modules_keep_their_calls() -> None:
    _, converted = pair()
    called: list[str] = []
    for name in ("batch_norm", "batch_norm_1", "inner.batch_norm"):
        converted.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
    converted(zoo.IMAGE().double(), flip=True)
    assert called == ["inner.batch_norm", "batch_norm", "batch_norm_1"]
    assert guarantees.norm_calls(converted, zoo.IMAGE().double(), "training") == 1


def test_a_site_that_was_left_stays_torchs_own() -> None:
    block, _ = pair()
    converted = normswap.convert(block, zoo.IMAGE().double(), exclude=["batch_norm"], bn_statistics="batch").model
    called: list[int] = []
    converted.batch_norm_1.register_forward_pre_hook(lambda *_: called.append(1))
    torch.testing.assert_close(converted(zoo.IMAGE().double(), flip=True), block(zoo.IMAGE().double(), flip=True))
    assert called == [1]


@pytest.mark.slow
@pytest.mark.parametrize(("calls", "made"), [(0, 1), (1, 2), (3, 4)])
def test_another_number_of_calls_is_refused_in_words(calls: int, made: int) -> None:
    _, converted = pair()
    message = (
        rf"Switched.forward was rewritten for 3 batch_norm calls, but makes {made} with these arguments: "
        "move each call into a small module, then convert again"
    )
    with pytest.raises(LayerError, match=message):
        converted(zoo.IMAGE().double(), calls=calls)


def test_an_operator_that_returns_a_tuple_still_does() -> None:
    x, mean, var = torch.randn(4, 3, 5, 5), torch.zeros(3), torch.ones(3)

    def forward(x: Tensor) -> Any:
        return torch.ops.aten._native_batch_norm_legit_functional.default(x, None, None, mean, var, True, 0.1, 1e-5)

    gate = FunctionalSwitchNorm(gate="simplex", branches=("in", "ln", "bn"))
    y, _, _, new_mean, new_var = run_original_forward(forward, [gate], x)
    torch.testing.assert_close(y, forward(x)[0])
    assert new_mean is mean
    assert new_var is var


class Bypassed(zoo.FunctionalBlock):
    """A switch that leaves the norm out."""

    def forward(self, x: Tensor, normalize: bool = True) -> Tensor:
        return super().forward(x) if normalize else self.conv(x)


def test_a_call_without_any_norm_has_nothing_to_mistake() -> None:
    block = Bypassed()
    converted = normswap.convert(block, zoo.IMAGE(), bn_statistics="batch").model
    assert torch.equal(converted(zoo.IMAGE(), normalize=False), block(zoo.IMAGE(), normalize=False))


@pytest.mark.slow
def test_a_learner_is_found_inside_another_module() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Switched()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, True)

    def make() -> nn.Module:
        torch.manual_seed(7)
        return zoo.randomise(Outer())

    checked = guarantees.check_all(make, zoo.IMAGE())
    assert {swap.fqn for swap in checked.conversion.plan.swaps} == {
        "block.batch_norm",
        "block.batch_norm_1",
        "block.inner.batch_norm",
    }
