"""Whatever a context changes is put back, also on failure; a test scrambles everything first."""

import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from normswap.model_state import (
    call_model,
    changed_attributes,
    module_state,
    preserved_state,
    preserved_training_flags,
    random_state,
    registered_hooks,
    rollback_on_error,
    seeded,
    set_training_flags,
    training_flags,
)


class Scrambled(nn.Module):
    """Flags as no `train()` would leave them, buffers, attributes and containers, and a `train()` that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.drop = nn.BatchNorm1d(4), nn.Dropout()
        self.bn.training, self.training = False, True
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("nothing", None)
        self.history, self.cache, self.seen, self.last = [1, 2], {"a": torch.ones(2)}, {"x"}, "before"

    def train(self, mode: bool = True) -> "Scrambled":
        return self

    def change_everything(self) -> None:
        self.bn.running_mean.fill_(9.0)
        self.count = self.count + 1
        self.nothing = torch.ones(1)
        self.history.append(3)
        self.cache["b"] = self.cache.pop("a")
        self.seen.clear()
        self.last = "after"
        self.new = "was not there"
        self.bn.momentum = 0.7
        self.bn.register_buffer("more", torch.ones(1))
        del self.drop


@pytest.fixture
def model() -> Scrambled:
    return Scrambled()


def test_flags_are_set_on_every_module_and_put_back_one_by_one(model: Scrambled) -> None:
    for wanted in (True, False):
        with training_flags(model.modules(), training=wanted):
            assert [module.training for module in model.modules()] == [wanted] * 3
        assert (model.training, model.bn.training, model.drop.training) == (True, False, True)
    with pytest.raises(ZeroDivisionError), training_flags(model.modules(), training=True):
        _ = 1 / 0
    assert not model.bn.training


def test_flags_of_single_modules_are_set_and_restored(model: Scrambled) -> None:
    with preserved_training_flags(model.modules()):
        set_training_flags([(model, False), (model.bn, True)])
        assert (model.training, model.bn.training, model.drop.training) == (False, True, True)
    assert (model.training, model.bn.training, model.drop.training) == (True, False, True)


@pytest.mark.parametrize("fails", [False, True])
def test_state_is_put_back_down_to_objects_and_values(model: Scrambled, fails: bool) -> None:
    modules = list(model.modules())
    before = [module_state(module) for module in modules]
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    try:
        with preserved_state(modules):
            model.change_everything()
            assert fails is False or 1 / 0
    except ZeroDivisionError:
        assert fails
    assert [changed_attributes(a, module_state(m)) for a, m in zip(before, modules, strict=True)] == [[], [], []]
    assert model.history == [1, 2]
    assert list(model.cache) == ["a"]
    assert model.seen == {"x"}
    assert model.last == "before"
    assert not hasattr(model, "new")
    assert model.nothing is None
    assert model.bn.momentum == 0.1
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])


def test_a_shared_buffer_is_put_back_once(model: Scrambled) -> None:
    model.bn.register_buffer("alias", model.count)
    with preserved_state(model.modules()):
        model.count.add_(5)
    assert model.count is model.bn.alias
    assert model.count.item() == 3


def test_only_what_was_named_is_preserved(model: Scrambled) -> None:
    with preserved_state([model.bn]):
        model.change_everything()
    assert model.last == "after"
    assert torch.equal(model.bn.running_mean, torch.zeros(4))


def test_changed_names_are_found_by_identity(model: Scrambled) -> None:
    before = module_state(model)
    model.change_everything()
    changed = changed_attributes(before, module_state(model))
    assert {"history", "cache", "seen", "last", "new", "_buffers", "_modules"} == set(changed)
    before = module_state(model)
    model.history[0] = 1.0  # equal, and another object
    assert changed_attributes(before, module_state(model)) == ["history"]


def test_all_or_nothing_undoes_classes_registries_and_attributes(model: Scrambled) -> None:
    modules = list(model.modules())
    before, values = [module_state(module) for module in modules], [type(module) for module in modules]

    def fail_in_the_middle() -> None:
        model.bn.__class__ = nn.BatchNorm2d
        model.bn.register_parameter("gate", nn.Parameter(torch.ones(3)))
        model.last = "after"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), rollback_on_error(modules):
        fail_in_the_middle()
    assert [type(module) for module in modules] == values
    assert [changed_attributes(a, module_state(m)) for a, m in zip(before, modules, strict=True)] == [[], [], []]


def test_all_or_nothing_keeps_what_succeeded(model: Scrambled) -> None:
    with rollback_on_error([model]):
        model.last = "after"
    assert model.last == "after"


def draw() -> list[float]:
    return [torch.rand(1).item(), random.random(), float(numpy.random.rand())]


def test_seeded_repeats_itself_and_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    expected = [draw(), draw()]
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    found = [draw()]
    drawn = []
    for _ in range(2):
        with seeded(5):
            drawn.append(draw())
    with pytest.raises(ZeroDivisionError), seeded(5):
        _ = draw() and 1 / 0
    found.append(draw())
    assert found == expected
    assert drawn[0] == drawn[1]
    with seeded(6):
        assert draw() != drawn[0]


@pytest.mark.parametrize("index", [0, 1, 2], ids=["torch", "python", "numpy"])
def test_random_state_reports_who_has_drawn(index: int) -> None:
    before = random_state()
    assert before == random_state()
    (lambda: torch.rand(1), random.random, numpy.random.rand)[index]()
    assert [a == b for a, b in zip(before, random_state(), strict=True)] == [i != index for i in range(3)]


def test_hooks_are_removed_also_when_registering_fails(model: Scrambled) -> None:
    calls: list[str] = []

    def register(name: str) -> Any:
        return lambda: model.bn.register_forward_hook(lambda *_: calls.append(name))

    with registered_hooks([register("a"), register("b")]):
        model.bn(torch.ones(2, 4))
    assert calls == ["a", "b"]

    def refuse() -> Any:
        raise RuntimeError("takes no hooks")

    with pytest.raises(RuntimeError, match="takes no hooks"), registered_hooks([register("c"), refuse]):
        pytest.fail("never entered")
    assert model.bn._forward_hooks == {}


class Called(nn.Module):
    def forward(self, a: Any, b: Any = None) -> tuple[Any, Any]:
        return a, b


def test_inputs_are_a_tensor_a_tuple_or_keywords() -> None:
    one, two = torch.tensor(1), torch.tensor(2)
    cases: list[tuple[Any, tuple[Any, Any]]] = [
        (one, (one, None)),
        ((one, two), (one, two)),
        ({"b": one, "a": two}, (two, one)),
        ([one, two], ([one, two], None)),
        (({"image": one},), ({"image": one}, None)),
    ]
    for inputs, expected in cases:
        assert call_model(Called(), inputs) == expected


def test_a_tensor_is_not_unpacked() -> None:
    x = torch.ones(2, 3)
    result: Tensor = call_model(Called(), x)[0]
    assert result is x
