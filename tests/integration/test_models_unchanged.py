"""Whatever a forward pass does to a model, the model is bit-identical after every call that runs it."""

import collections
import contextlib
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from normswap import calibrate, convert, find_norm_sites, plan_swaps, verify
from normswap.errors import ModelError, NormswapError, SwapError
from normswap.model_state import preserved_on_write

C = 8
X = torch.randn(4, C, generator=torch.Generator().manual_seed(0))


class Meter:
    """A plain object as libraries keep them: numbers, tensors and lists."""

    def __init__(self) -> None:
        self.count, self.total, self.seen = 0, torch.zeros(C), [torch.zeros(1)]


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Base(nn.Module):
    """A BN, and state of every kind that the forward passes below write to."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.bn, self.linear, self.key = nn.BatchNorm1d(C), nn.Linear(C, C), nn.Linear(C, C)
        self.key.requires_grad_(False)
        self.register_buffer("seen", torch.empty(0))
        self.register_buffer("queue", torch.zeros(3, C), persistent=False)
        self.register_buffer("gone", torch.ones(2))
        self.plain, self.listed, self.mapped = torch.zeros(2), [torch.zeros(2)], {"a": [torch.zeros(2)]}
        self.array, self.meter, self.slotted = numpy.zeros(3), Meter(), Slotted()
        self.calls = collections.Counter(forward=1)
        self.last = collections.deque([1, 2], maxlen=2)
        self.space = SimpleNamespace(step=0)
        self.generator, self.python = torch.Generator().manual_seed(3), random.Random(3)
        self.numpy = numpy.random.default_rng(3)
        self.handle: Any = None
        self.fails = fails

    def change(self, x: Tensor) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self.change(x)
        if self.fails:
            raise IndexError("list index out of range")
        return self.linear(self.bn(x))


class Resizes(Base):
    def change(self, x: Tensor) -> None:
        self.seen.resize_(C).copy_(x.detach().mean(0))
        self.gone.resize_(1)


class Sets(Base):
    def change(self, x: Tensor) -> None:
        self.queue.fill_(7)
        self.queue.set_(self.queue.new_ones(5))


class ReplacesData(Base):
    def change(self, x: Tensor) -> None:
        self.queue.data = torch.ones(1)
        self.key.weight.data = self.key.weight.data * 0.9 + self.linear.weight.data * 0.1
        self.linear.weight.data = self.linear.weight.data.renorm(2, 0, 0.1)


class WritesParameters(Base):
    """As momentum encoders and weight clipping do."""

    def change(self, x: Tensor) -> None:
        for old, new in zip(self.key.parameters(), self.linear.parameters(), strict=True):
            old.data.mul_(0.5).add_(new.data, alpha=0.5)
        with torch.no_grad():
            self.linear.weight.clamp_(-0.01, 0.01)


class Registers(Base):
    def change(self, x: Tensor) -> None:
        self.register_buffer("new", torch.ones(1))
        self.seen = torch.ones(2)
        del self.gone
        self.register_parameter("scale", nn.Parameter(torch.ones(1)))
        self.linear.register_forward_hook(lambda *_: None)
        self.linear.weight.requires_grad_(False)
        self.bn.momentum = 0.9


class WritesInPlace(Base):
    """Tensors and numbers that are in no registry."""

    def change(self, x: Tensor) -> None:
        for tensor in (self.plain, self.listed[0], self.mapped["a"][0], self.meter.total, self.meter.seen[0]):
            tensor.add_(1)
        self.queue[0] = x[0].detach()
        self.array += 1
        self.meter.count += 1
        self.meter.seen.append(x)
        self.slotted.count += 1
        self.mapped["b"] = [x]
        self.calls["forward"] += 1
        self.calls["more"] = 1
        self.last.append(3)
        self.space.step += 1


class DrawsNumbers(Base):
    def change(self, x: Tensor) -> None:
        torch.randn(2, generator=self.generator)
        self.python.random()
        self.numpy.random()
        torch.randn(1)
        random.random()
        numpy.random.rand()


class SetsGradients(Base):
    def change(self, x: Tensor) -> None:
        self.linear.weight.grad = torch.ones_like(self.linear.weight)
        self.key.weight.requires_grad_(True)
        self.linear.bias.register_hook(lambda grad: grad)
        self.linear.bias.note = "written"
        self.train()


KINDS = [Resizes, Sets, ReplacesData, WritesParameters, Registers, WritesInPlace, DrawsNumbers, SetsGradients]


def refused_or_done(call: Callable[[], Any]) -> None:
    """Most of these models cannot be made one graph; the attempts run their code all the same."""
    with contextlib.suppress(SwapError):
        call()


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "find_norm_sites": lambda model: find_norm_sites(model, X),
    "plan_swaps": lambda model: plan_swaps(model, X),
    "convert": lambda model: convert(model, X),
    "convert, without an input": lambda model: convert(model),
    "convert to a graph": lambda model: refused_or_done(lambda: convert(model, X, as_graph=True)),
    "verify": lambda model: verify(model, model, [X]),
}


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that the forward passes above write to, by value and by object."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found |= {f"{name}: {key}": id(value) for key, value in vars(module).items() if key != "training"}
        found |= {f"{name}.training": module.training, f"{name}.hooks": len(module._forward_hooks)}
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            form = tensor.shape, tensor.stride(), tensor.untyped_storage().nbytes(), tensor.data_ptr()
            flags = tensor.requires_grad, id(tensor.grad), len(tensor._backward_hooks or ()), sorted(vars(tensor))
            found[f"{name}.{key}"] = id(tensor), form, flags, tensor.detach().tolist()
    model = next(module for module in model.modules() if isinstance(module, Base))
    found["tensors"] = [t.tolist() for t in (model.plain, *model.listed, *model.mapped["a"], model.meter.total)]
    found["objects"] = model.meter.count, [t.tolist() for t in model.meter.seen], model.slotted.count, [*model.mapped]
    found["containers"] = dict(model.calls), [*model.last], model.space.step, model.array.tolist()
    found["generators"] = (
        model.generator.get_state().tolist(),
        model.python.getstate(),
        repr(model.numpy.bit_generator.state),
    )
    found["global"] = torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()
    return found


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_that_changes_the_model_leaves_it_as_it_was(kind: type[Base], call: Callable[..., Any]) -> None:
    model = kind().train()
    model.bn.eval()
    before = state(model)
    call(model)
    assert state(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_that_fails_half_way_leaves_the_model_as_it_was(kind: type[Base]) -> None:
    for call in (convert, plan_swaps, find_norm_sites):
        model = kind(fails=True)
        before = state(model)
        with pytest.raises(ModelError, match=r"the model fails on an input of 4x8, in the model .*index out of range"):
            call(model, X)
        assert state(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_that_fails_half_way_leaves_the_model_as_it_was(kind: type[Base]) -> None:
    model = kind()
    before = state(model)
    with pytest.raises(NormswapError, match="batch 1 "):
        calibrate(model, [X, torch.zeros(4, 3)])
    assert state(model) == before


# --- weights that a verification copies only before something writes to them ------------------------------------------


@torch.library.custom_op("normswap_tests::enlarge", mutates_args={"tensor"})
def enlarge(tensor: Tensor) -> None:
    tensor.mul_(1.5)


LARGE = 128

WEIGHT_WRITERS: dict[str, Callable[[Tensor], Any]] = {
    "a method": lambda w: w.mul_(1.5),
    "a list of tensors": lambda w: torch._foreach_mul_([w], 1.5),
    "an operator": lambda w: torch.ops.aten.mul_.Tensor(w, torch.tensor(1.5, dtype=w.dtype)),
    "a packet of operators": lambda w: torch.ops.aten.mul_(w, torch.tensor(1.5, dtype=w.dtype)),
    "a custom operator": enlarge,
    "a named custom operator": lambda w: torch.ops.normswap_tests.enlarge(w),
    "out": lambda w: torch.mul(w, 1.5, out=w),
    "inplace": lambda w: nn.functional.relu(w, inplace=True),
    "max_norm": lambda w: nn.functional.embedding(torch.arange(4), w, max_norm=0.1),
    "numpy": lambda w: w.numpy().fill(1),
    "dlpack": lambda w: torch.from_dlpack(w).mul_(1.5),
    "a storage": lambda w: w.untyped_storage().fill_(1),
}


@pytest.mark.parametrize("write", WEIGHT_WRITERS.values(), ids=WEIGHT_WRITERS)
def test_a_pass_of_a_verification_puts_large_weights_back(write: Callable[[Tensor], Any]) -> None:
    linear = nn.Linear(LARGE, LARGE)
    before = linear.weight.detach().clone()
    with preserved_on_write([linear], "weights"), torch.no_grad():
        write(linear.weight.detach())
        assert not torch.equal(linear.weight, before)
    assert torch.equal(linear.weight, before)
