"""A module's own forward as two graphs, or the reason why a graph may not run in its place."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap import find_norm_sites
from normswap.surgery.graphs.module_trace import mentioned_norm_kinds, trace_module_forward
from normswap.surgery.norms.functions import batch_norm_nodes
from tests.helpers import guarantees, zoo

# (module, calls of batch_norm on an activation)
TRACED = {
    "functional": (zoo.FunctionalBlock, 1),
    "torch.batch_norm": (zoo.TorchFunctionalBlock, 1),
    "one call in each mode": (zoo.BranchingBlock, 1),
    "two calls": (zoo.TwiceBlock, 2),
    "parameters as arguments": (zoo.MamlConv4, 2),
    "an option that is not used": (zoo.UnusedOption, 1),
    "inherited": (zoo.Inheriting, 1),
    "a Sequential": (zoo.OwnSequential, 1),
    "a kernel": (zoo.Standardised, 0),
    "children call it": (zoo.Generator, 0),
    "a child cannot be traced": (lambda: nn.Sequential(zoo.UntraceableCall()), 0),
}


@pytest.mark.parametrize(("make", "calls"), TRACED.values(), ids=TRACED)
def test_a_forward_becomes_a_graph_for_each_mode(make: type[nn.Module], calls: int) -> None:
    own = trace_module_forward(make())
    assert own.reason is None
    assert own.training is not None
    assert own.evaluation is not None
    assert [len(batch_norm_nodes(graph)) for graph in (own.training, own.evaluation)] == [calls, calls]


OPTIONS = {
    "an option": (zoo.OptionalParameters, {"parameters": None}),
    "a keyword option": (lambda: KeywordOption(), {"mask": None}),
    "a switch": (lambda: Switch(), {"flip": False}),
    "an option that is not used": (zoo.UnusedOption, {}),
    "none": (zoo.FunctionalBlock, {}),
}


@pytest.mark.parametrize(("make", "options"), OPTIONS.values(), ids=OPTIONS)
def test_graphs_are_for_the_defaults_of_options_that_decide(make: type[nn.Module], options: dict[str, Any]) -> None:
    own = trace_module_forward(make())
    assert own.reason is None
    assert own.options == options


class Inference(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = x * 2
        return F.batch_norm(y, None, None, training=True)


class Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


class TorchDrawing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        keep = float(torch.rand(()) > 0.5)
        return F.batch_norm(x * keep, None, None, training=True)


class KeywordOption(nn.Module):
    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        x = F.batch_norm(x, None, None, training=True)
        return x if mask is None else x * mask


class Switch(nn.Module):
    def forward(self, x: Tensor, flip: bool = False) -> Tensor:
        x = F.batch_norm(x, None, None, training=True)
        return x.flip(0) if flip else x


class ListHeld(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Conv2d(3, 3, 1)]

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.layers[0](x), None, None, training=True)


class WritesBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean
        return F.batch_norm(x, None, None, training=True)


REFUSED = {
    "another number of calls": (zoo.TrainingOnlyBlock, "it makes 1 batch_norm calls in training and 0 in evaluation"),
    "control flow": (zoo.UntraceableCall, "TraceError: symbolically traced variables cannot be used as inputs"),
    "a value": (zoo.SelfCounting, "TypeError: float() argument must be a string or a real number, not 'Proxy'"),
    "a constant": (zoo.Constant, "it creates a tensor from constants in every call: register it as a buffer"),
    "Python's numbers": (zoo.Drawing, "it draws random numbers in Python"),
    "torch's numbers": (TorchDrawing, "it draws random numbers in Python"),
    "an attribute": (zoo.Remembering, "it writes to features"),
    "a list": (zoo.Collecting, "it writes to seen"),
    "a buffer": (WritesBuffer, "it writes to _buffers"),
    "no_grad": (zoo.PartlyWithoutGradient, "it switches gradients or autocast in a part of its code"),
    "no_grad as a decorator": (Decorated, "it switches gradients or autocast in a part of its code"),
    "inference_mode": (Inference, "it switches gradients or autocast in a part of its code"),
    "autocast": (zoo.WithoutAutocast, "it switches gradients or autocast in a part of its code"),
    "children in a list": (ListHeld, "NameError: module is not installed as a submodule"),
    "TorchScript": (lambda: zoo.BY_NAME["TorchScript inside"].model().part, "it is TorchScript, whose code is fixed"),
    "overridden on the instance": (
        lambda: zoo.overridden(nn.Sequential(zoo.FunctionalBlock()), "0")[0],
        "its forward is overridden on the instance: remove that first",
    ),
    "no forward": (nn.ModuleList, "NotImplementedError"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_forward_that_a_graph_cannot_stand_for_is_refused_in_words(make: type[nn.Module], reason: str) -> None:
    own = trace_module_forward(make())
    assert (own.training, own.evaluation) == (None, None)
    assert own.reason is not None
    assert own.reason.startswith(reason)


def test_the_module_is_left_as_it_is() -> None:
    for name in ("functional", "list filled in forward", "attribute written in forward", "half-frozen", "two calls"):
        model = zoo.BY_NAME[name].model()
        before = guarantees.Record.of(model)
        trace_module_forward(model)
        guarantees.nothing_else_changed(before, model, guarantees.NO_SWAPS, same_objects=True)


class Nested(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        def norm(y: Tensor) -> Tensor:
            return F.batch_norm(y, None, None, training=True)

        return norm(x)


MENTIONS = [
    (zoo.FunctionalBlock, True),
    (zoo.TorchFunctionalBlock, True),
    (zoo.Inheriting, True),
    (Nested, True),
    (Decorated, True),
    (zoo.TwoNames, False),
    (zoo.HandMadeNorm, False),
    (nn.ModuleList, False),
    (lambda: zoo.BY_NAME["TorchScript inside"].model().part, False),
]


class ChildOfThatName(nn.Module):
    """Shaped as decoding heads are: a child called `batch_norm`, and a loop that no trace gets through."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(3)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        return self.batch_norm(torch.cat([2 * feature for feature in features]))


class ChildAndCall(ChildOfThatName):
    """The same name twice: for the child, and for the function."""

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        x = self.batch_norm(torch.cat([2 * feature for feature in features]))
        return F.batch_norm(x, None, None, training=True)


@pytest.mark.parametrize(("make", "mentions"), [(ChildOfThatName, False), (ChildAndCall, True)])
def test_a_child_that_is_called_like_the_function_is_not_meant(make: type[nn.Module], mentions: bool) -> None:
    assert trace_module_forward(make()).evaluation is None
    assert mentioned_norm_kinds(make()) == ({"bn"} if mentions else set())
    features = (torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))
    for inputs in (None, (features,)):
        sites = find_norm_sites(make(), inputs)
        assert [site.fqn for site in sites if site.problem is None] == ["batch_norm"]
        assert len(sites) == (2 if mentions else 1)


@pytest.mark.parametrize(("make", "mentions"), MENTIONS)
def test_code_is_asked_whether_it_names_batch_norm(make: type[nn.Module], mentions: bool) -> None:
    assert mentioned_norm_kinds(make()) == ({"bn"} if mentions else set())
