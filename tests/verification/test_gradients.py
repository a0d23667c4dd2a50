"""Streamed gradients are the same as all gradients at once, wherever they are stored."""

import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normswap.verification import model_pass
from normswap.verification.model_pass import GradientDistance, GradientStore, stream_gradients


class Twice(nn.Module):
    """A layer used twice, the second time inside a checkpoint, one that never runs, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: self.used(y).tanh(), self.frozen(self.used(x)).tanh(), use_reentrant=False)


@pytest.fixture
def model() -> Twice:
    torch.manual_seed(0)
    return Twice()


def _streamed(model: nn.Module, on_gradient: model_pass.GradientCallback) -> None:
    parameters: dict[Any, Tensor] = {(name,): parameter for name, parameter in model.named_parameters()}
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)
    stream_gradients([model(x), "no tensor"], parameters, on_gradient, seed=0)


def _at_once(model: Twice) -> dict[str, Tensor]:
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)
    cotangent = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.autograd.grad(model(x), [model.used.weight, model.used.bias], cotangent)
    return {"used.weight": weight, "used.bias": bias}


def test_each_gradient_comes_once_and_whole(model: Twice) -> None:
    found: list[tuple[model_pass.TensorNames, Tensor]] = []
    _streamed(model, lambda names, gradient: found.append((names, gradient)))
    expected = _at_once(model)
    assert sorted(names for names, _ in found) == [(name,) for name in sorted(expected)]
    assert all(torch.equal(gradient, expected[names[0]]) for names, gradient in found)
    assert not any(parameter._backward_hooks or parameter.grad is not None for parameter in model.parameters())


def _no_disk(**_: object) -> None:
    raise OSError("no space left on device")


@pytest.mark.parametrize("place", ["memory", "file", "no disk"])
def test_kept_gradients_are_what_came(model: Twice, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    if place != "memory":
        monkeypatch.setattr(model_pass, "MAX_BYTES_IN_MEMORY", 0)
    if place == "no disk":
        monkeypatch.setattr(tempfile, "TemporaryFile", _no_disk)
    with GradientStore() as kept:
        _streamed(model, kept.store)
        assert {names: kept[names].tolist() for names in kept} == {
            (name,): gradient.tolist() for name, gradient in _at_once(model).items()
        }
        assert bool(kept._file_offsets) == (place == "file")
        same = GradientDistance(kept)
        _streamed(model, same.compare_gradient)
        assert same.result() == 0.0


def test_a_gradient_that_one_side_lacks_counts_as_zeros() -> None:
    with GradientStore() as kept:
        kept.store(("a", "alias"), torch.tensor([3.0]))
        kept.store(("b",), torch.tensor([4.0]))
        for names, error in ((("alias",), 0.8), (("a",), 0.8), (("c",), 2**0.5)):
            distance = GradientDistance(kept)
            distance.compare_gradient(names, torch.tensor([3.0 if names != ("c",) else 5.0]))
            assert distance.result() == pytest.approx(error)
