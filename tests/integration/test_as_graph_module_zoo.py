"""as_graph=True on every trap of the zoo: the same function in both modes, copied and pickled, or a reason."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from normswap import convert, verify
from normswap.errors import SwapError
from normswap.surgery.graphs.module_trace import trace_module_forward
from tests.helpers import guarantees, zoo

CONTROL_FLOW = "TraceError: symbolically traced variables cannot be used as inputs to control flow"
CONTEXT = "it switches gradients or autocast in a part of its code"
REFUSED = {
    "one call in each mode": "training and evaluation run different operations",
    "a call in training only": "training and evaluation run different operations",
    "in training only, another module": "training and evaluation run different operations",
    "number drawn in forward": "it draws random numbers in Python",
    "attribute written in forward": "it writes to features",
    "list filled in forward": "it writes to seen",
    "no_grad inside": CONTEXT,
    "autocast switched inside": CONTEXT,
    "a trace that is wrong": "its traced forward differs from the real one",
    "a wrong trace around modules": "its traced forward differs from the real one",
    "control flow around modules": CONTROL_FLOW,
    "control flow around a call": CONTROL_FLOW,
    "in a list and a dict only": "NameError: module is not installed as a submodule",
    "InstanceNorm without a batch": "TraceError: Proxy object cannot be iterated",
    "dict input": "RuntimeError: 'len' is not supported in symbolic tracing by default.",
}
UNPICKLED = {  # torch pickles no such model
    "parametrized kernel",
    "parametrized BN",
    "a program exported in evaluation",
    "a program exported in training",
}
OTHERS = {*REFUSED, "the root is a BN", "the root is an InstanceNorm", "TorchScript inside"}
GRAPHS = [trap for trap in zoo.TRAPS if trap.copyable and trap.name not in OTHERS]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("trap", GRAPHS, ids=lambda trap: trap.name)
def test_a_graph_is_the_same_function_and_so_are_its_copies(trap: zoo.Trap) -> None:
    original, inputs = trap.model(), trap.inputs()
    graph = convert(original, inputs, as_graph=True, **trap.options).model
    assert isinstance(graph, fx.GraphModule)
    assert graph.training == original.training
    guarantees.same_function(original, graph, inputs, ("evaluation", "training"))
    if trap.name not in UNPICKLED:
        guarantees.same_function(original, pickle.loads(pickle.dumps(graph)), inputs, ("training",))


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_what_is_not_one_graph_says_why_and_prints_nothing(
    name: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    trap = zoo.BY_NAME[name]
    model, inputs = trap.model(), trap.inputs()
    before = guarantees.Record.of(model)
    with pytest.raises(
        SwapError, match=f"cannot be made one graph {re.escape(f'({reason}')}.*: convert without as_graph"
    ):
        convert(model, inputs, as_graph=True, inplace=True)
    guarantees.nothing_else_changed(before, model, guarantees.NO_SWAPS, same_objects=True)
    assert capfd.readouterr() == ("", "")


class Switch(nn.Module):
    """A switch that would be control flow on a proxy, and one by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = zoo.bn(3)

    def forward(self, x: Tensor, twice: bool = False, *, scale: float | None = None) -> Tensor:
        x = self.bn(x)
        x = x if scale is None else x * scale
        return self.bn(x) if twice else x


@pytest.mark.parametrize("inputs", [None, zoo.IMAGE()], ids=["blind", "seen"])
@pytest.mark.parametrize("make", [Switch, zoo.OptionalParameters])
def test_optional_arguments_that_decide_are_resolved_at_their_defaults(make: type[nn.Module], inputs: Any) -> None:
    model = make()
    graph = convert(model, inputs, as_graph=True).model
    guarantees.same_function(model, graph, zoo.IMAGE(), ("evaluation", "training"))
    with pytest.raises(AssertionError, match=r"has been specialized to have value (False|None) but got another value"):
        graph.forward(zoo.IMAGE(), True)


def test_an_input_that_uses_an_option_is_refused() -> None:
    with pytest.raises(SwapError, match="its traced forward differs from the real one"):
        convert(Switch(), (zoo.IMAGE(), True), as_graph=True)


def test_a_single_norm_is_no_model() -> None:
    with pytest.raises(SwapError, match="SwitchNorm2d is a single norm layer and has no graph"):
        convert(zoo.bn(3), as_graph=True)


def test_torchscript_stays_whole() -> None:
    model = zoo.BY_NAME["TorchScript inside"].model().eval()
    graph = convert(model, zoo.IMAGE(), as_graph=True).model  # torch 2.14 cannot copy such a graph
    torch.testing.assert_close(graph(zoo.IMAGE()), model(zoo.IMAGE()))


class TrainedConstant(nn.Module):
    """Adds another constant in training, in one operation."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.full((1,), 2.0 if self.training else 1.0)


class TrainedNumber(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 if self.training else 1.0)


class TrainedOrder(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        pair = (x, x.flip(0))
        return torch.sub(*(pair if self.training else pair[::-1]))


class Inverted(nn.Module):
    """A flag that is the mode's opposite."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, not self.training)


class AtRoot(nn.Module):
    """A forked operation beside a norm: at the root of one graph, or in a child that stays whole."""

    def __init__(self, fork: nn.Module) -> None:
        super().__init__()
        self.bn = zoo.bn(3)
        self.__dict__["fork"] = type(fork).forward

    def forward(self, x: Tensor) -> Tensor:
        return self.__dict__["fork"](self, self.bn(x))


FORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a constant": (TrainedConstant, "training and evaluation use different constants"),
    "a number": (TrainedNumber, "training uses 2.0 where evaluation uses 1.0"),
    "the order of values": (TrainedOrder, "training and evaluation use different values"),
    "the opposite flag": (Inverted, "training uses False where evaluation uses True"),
}


@pytest.mark.parametrize(("make", "reason"), FORKS.values(), ids=FORKS)
def test_a_fork_is_refused_at_the_root_and_kept_whole_in_a_child(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(SwapError, match=re.escape(f"({reason})")):
        convert(AtRoot(make()), zoo.IMAGE(), as_graph=True)
    model = nn.Sequential(zoo.bn(3), make())
    graph = convert(model, zoo.IMAGE(), as_graph=True).model
    guarantees.same_function(model, graph, zoo.IMAGE(), ("evaluation", "training"))


def test_a_constant_of_both_modes_goes_with_the_graph() -> None:
    model = nn.Sequential(zoo.Constant(), zoo.bn())
    assert trace_module_forward(model[0]).reason is not None
    graph = convert(model, zoo.IMAGE(), as_graph=True).model
    assert verify(model, graph, [zoo.IMAGE()]).passed


def test_hooks_of_inner_modules_and_of_the_model_go_on_running() -> None:
    seen: list[str] = []
    model = nn.Sequential(zoo.Chain(zoo.bn()), nn.Linear(4, 2))
    handle = model.register_forward_hook(lambda *_: seen.append("model"))
    model.register_forward_pre_hook(lambda _module, args: seen.append("before") or (args[0] * 2,))
    model[0].register_forward_hook(lambda *_: seen.append("chain"))
    model[0][1].register_forward_hook(lambda *args: seen.append("norm") or args[2] + 1)
    graph = convert(model, zoo.IMAGE(), as_graph=True, inplace=True).model
    assert all(isinstance(entry, str) for entry in seen)
    seen.clear()
    graph(zoo.IMAGE())
    assert seen == ["before", "norm", "chain", "model"]
    handle.remove()
    seen.clear()
    graph(zoo.IMAGE())
    assert seen == ["before", "norm", "chain"]


def test_hooks_that_change_values_are_part_of_the_function() -> None:
    model = nn.Sequential(zoo.BY_NAME["hooks"].model())
    model[0].register_forward_hook(zoo.double_output)
    graph = convert(model, zoo.IMAGE(), as_graph=True).model
    guarantees.same_function(model, graph, zoo.IMAGE(), ("evaluation", "training"))


def half_frozen_dropout() -> nn.Module:
    """A part in evaluation whose dropout is functional: its flag is nobody's but its own."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Sequential(zoo.DropoutBlock(), zoo.bn()), zoo.DropoutBlock())
    model[1].conv = zoo.conv(8)
    model[0].eval()
    return zoo.randomise(model)


@pytest.mark.parametrize("make", [zoo.BY_NAME["half-frozen"].model, half_frozen_dropout])
def test_flags_that_were_set_one_by_one_are_kept(make: Callable[[], nn.Module]) -> None:
    model = make()
    graph = convert(model, zoo.IMAGE(), as_graph=True).model
    guarantees.same_function(model, graph, zoo.IMAGE())
    flags = {name: module.training for name, module in model.named_modules()}
    ours = {name: module.training for name, module in graph.named_modules() if name in flags}
    assert ours == {name: flags[name] for name in ours}
    assert set(ours.values()) == {True, False}
    before = guarantees.Record.of(model)
    convert(model, zoo.IMAGE(), as_graph=True, inplace=True)
    assert {name: module.training for name, module in model.named_modules() if name in flags} == before.flags


def test_a_part_of_a_graph_can_be_put_in_evaluation() -> None:
    model = half_frozen_dropout().train()
    graph = convert(model, zoo.IMAGE(), as_graph=True).model
    for part in (model, graph):
        part.get_submodule("0").eval()
    guarantees.same_function(model, graph, zoo.IMAGE(), ("as it is",))


def test_a_graph_can_be_saved_by_torch_and_goes_on_learning() -> None:
    buffer = io.BytesIO()
    model = zoo.BY_NAME["dropout beside it"].model()
    torch.save(convert(model, zoo.IMAGE(), as_graph=True).model, buffer)
    buffer.seek(0)
    graph = torch.load(buffer, weights_only=False)
    copy.deepcopy(graph).train()(zoo.IMAGE()).sum().backward()
    graph.train()(zoo.IMAGE()).sum().backward()
    gates = [parameter for name, parameter in graph.named_parameters() if name.startswith("batch_norm.")]
    assert len(gates) == 2
    assert all(gate.grad is not None for gate in gates)
