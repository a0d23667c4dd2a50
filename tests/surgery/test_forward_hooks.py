"""One watched forward pass: what it sees, what it leaves, and how it passes on the model's own error."""

import random
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import StdConv2d
from torch import Tensor, nn

from normswap.errors import ModelError
from normswap.surgery.arguments import describe_shapes
from normswap.surgery.discovery.whole_model import Observation, observe_forward
from normswap.surgery.module_tree import walk_modules
from tests.helpers import guarantees, zoo


def observe(model: nn.Module, inputs: Any) -> Observation:
    return observe_forward(model, inputs, walk_modules(model))


def test_shapes_order_and_calls_of_norm_layers() -> None:
    seen = observe(zoo.Recurrent(), zoo.IMAGE())
    assert seen.shapes == {"bn": [(3, 8, 9, 9), (3, 8, 5, 5), (3, 8, 3, 3)]}
    assert seen.order == {"bn": 0}
    assert seen.runs == {"": 1, "stem": 1, "conv": 3, "bn": 3}
    assert seen.functional == {}


def test_functional_calls_are_identified_by_their_owner() -> None:
    inputs = torch.randn(2, 6), torch.tensor([0, 1])
    seen = observe(zoo.Generator(), inputs)
    assert seen.functional == {"norms.0": [(2, 8, 4, 4)], "norms.1": [(2, 8, 8, 8)]}
    assert seen.order == {"norms.0": 0, "norms.1": 1, "last_norm": 2}
    assert {name: shape for name, (_, shape) in _input_shapes(seen).items()} == {
        "norms.0": [(2, 8, 4, 4), (2,)],
        "norms.1": [(2, 8, 8, 8), (2,)],
    }


def _input_shapes(seen: Observation) -> dict[str, tuple[int, list[tuple[int, ...]]]]:
    return {name: (len(args), [tuple(a.shape) for a in args]) for name, (args, _) in seen.owner_inputs.items()}


@pytest.mark.parametrize("make", [zoo.FunctionalBlock, zoo.TorchFunctionalBlock, zoo.KeywordBlock])
def test_every_spelling_of_the_call_is_seen(make: type[nn.Module]) -> None:
    assert observe(make(), zoo.IMAGE()).functional == {"": [(3, 8, 9, 9)]}


def test_the_owner_is_the_innermost_running_module() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = zoo.FunctionalBlock()

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.inner(x), None, None, training=True)

    assert observe(Outer(), zoo.IMAGE()).functional == {"inner": [(3, 8, 9, 9)], "": [(3, 8, 9, 9)]}


def test_what_a_norm_layer_calls_is_its_own_affair() -> None:
    for module in (zoo.bn(3), zoo.TheirNorm(3), nn.InstanceNorm2d(3)):
        assert observe(module, zoo.IMAGE()).functional == {}


def test_kernels_are_known_by_their_storage() -> None:
    assert observe(nn.Sequential(StdConv2d(3, 4, 3)), zoo.IMAGE()).functional == {}


def test_on_meta_tensors_a_kernel_is_distinguished_from_an_activation() -> None:
    model = nn.Sequential(StdConv2d(3, 8, 3), zoo.HiddenHelper()).to("meta")
    seen = observe(model, torch.empty(2, 3, 9, 9, device="meta"))
    assert seen.functional == {"1": [(2, 8, 9, 9)]}


def test_an_empty_batch_is_an_activation() -> None:
    assert observe(zoo.HiddenHelper(), torch.empty(0, 8, 9, 9)).functional == {"": [(0, 8, 9, 9)]}


def test_producers_are_modules_and_functions_whose_output_is_the_input() -> None:
    assert observe(zoo.ListBeside(), zoo.IMAGE()).producers == {"bn1": "relu", "bn2": "relu"}
    assert observe(zoo.SharedBlock(zoo.bn()), zoo.IMAGE()).producers == {"left": "stem"}
    assert observe(zoo.bn(3), zoo.IMAGE()).producers == {}
    assert observe(zoo.TwoNames(), zoo.IMAGE()).producers == {"bn": "conv"}


def test_modules_in_containers_are_seen() -> None:
    seen = observe(zoo.InContainers(), zoo.IMAGE())
    assert list(seen.order) == ["norms[0]", "table['last']['norm']"]


def test_a_shared_module_is_seen_under_its_first_name() -> None:
    assert observe(zoo.SharedBlock(zoo.FunctionalBlock(8, 8)), zoo.IMAGE()).functional == {"left": [(3, 8, 9, 9)] * 2}


class Trying(nn.Module):
    """A child that fails and is caught, and then a norm of another module."""

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("on purpose")

    def __init__(self) -> None:
        super().__init__()
        self.failing, self.bn = Trying.Failing(), zoo.bn(3)

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.failing(x)
        except ValueError:
            x = F.batch_norm(x, None, None, training=True)
        return self.bn(x)


def test_a_child_that_failed_and_was_caught_is_not_the_end() -> None:
    seen = observe(nn.Sequential(Trying(), zoo.FunctionalBlock()), zoo.IMAGE())
    assert seen.shapes == {"0.bn": [(3, 3, 9, 9)]}
    assert "1" in seen.functional


@pytest.mark.parametrize(
    "name",
    ["half-frozen", "list filled in forward", "attribute written in forward", "hooks", "dropout beside it", "bfloat16"],
)
def test_the_model_and_the_random_numbers_are_left_alone(name: str) -> None:
    trap = zoo.BY_NAME[name]
    model, inputs = trap.model(), trap.inputs()
    before, states = guarantees.Record.of(model), (torch.get_rng_state(), random.getstate())
    observe(model, inputs)
    guarantees.nothing_else_changed(before, model, guarantees.NO_SWAPS, same_objects=True)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(inputs, trap.inputs())


def test_it_runs_in_evaluation_and_without_gradients() -> None:
    flags: list[tuple[bool, bool]] = []
    model = nn.Sequential(nn.Dropout(), zoo.bn(3))
    model[1].register_forward_hook(lambda module, *_: flags.append((module.training, torch.is_grad_enabled())))
    observe(model, zoo.IMAGE())
    assert flags == [(False, False)]


FAILURES = {
    "a child": (
        lambda: zoo.Chain(zoo.bn(5)),
        r"^the model fails on an input of 3x3x9x9, in 1 \(BatchNorm2d, with an input of 3x8x9x9\): ",
    ),
    "the root": (
        Trying.Failing,
        r"^the model fails on an input of 3x3x9x9, in the model \(Failing, with an input of 3x3x9x9\): on purpose$",
    ),
    "arguments": (
        zoo.KeywordInput,
        r"^the model fails on an input of 3x3x9x9, in the model .*takes 1 positional argument",
    ),
}


@pytest.mark.parametrize(("make", "message"), FAILURES.values(), ids=FAILURES)
def test_the_models_error_comes_with_its_place(make: type[nn.Module], message: str) -> None:
    model = make()
    before = guarantees.Record.of(model)
    with pytest.raises(ModelError, match=message) as caught:
        observe(model, zoo.IMAGE())
    assert caught.value.__cause__ is not None
    guarantees.nothing_else_changed(before, model, guarantees.NO_SWAPS, same_objects=True)


def test_before_any_module_runs_the_model_itself_is_named() -> None:
    class Refusing(nn.Module):
        def __call__(self, *args: Any) -> Any:
            raise TypeError("not like this")

    with pytest.raises(ModelError, match=re.escape("on an input of no tensor, in the model: not like this")):
        observe(Refusing(), ("text",))


def test_shapes_are_described() -> None:
    assert describe_shapes(torch.zeros(2, 3)) == "2x3"
    assert describe_shapes({"a": torch.zeros(2), "b": [torch.zeros(1, 4), 3]}) == "2, 1x4"
    assert describe_shapes(3) == "no tensor"
