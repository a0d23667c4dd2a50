"""Modules that keep handles of hooks, or references to modules: every copy can be copied again, and is whole."""

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from normswap import convert, load, save, verify
from normswap.surgery.module_tree import copy_model, deep_copy

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Hook:
    """A plain object whose method is a hook, and which keeps what it was shown and the handle."""

    def __init__(self, module: nn.Module) -> None:
        self.seen = torch.zeros(())
        self.handle = module.register_forward_hook(self.note)

    def note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen = output


class Net(nn.Module):
    """A U-Net in small: a hook keeps the skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        self.skip = Hook(self.stage)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stage(x)
        return y + self.skip.seen


class HandleFirst(Net):
    """Here the handle is copied before the module whose hook it removes."""

    def __init__(self) -> None:
        super().__init__()
        stage = self.stage
        del self.stage
        self.first = nn.Identity()
        self.first.handles = [stage.register_forward_pre_hook(_nothing)]
        self.stage = stage


def _nothing(*_: Any) -> None:
    return None


REGISTERED: dict[str, Callable[[nn.Module], RemovableHandle]] = {
    "forward": lambda m: m.register_forward_hook(_nothing),
    "forward, with keywords": lambda m: m.register_forward_hook(_nothing, with_kwargs=True, always_call=True),
    "pre-forward": lambda m: m.register_forward_pre_hook(_nothing, with_kwargs=True),
    "backward": lambda m: m.register_full_backward_hook(_nothing),
    "pre-backward": lambda m: m.register_full_backward_pre_hook(_nothing),
    "state dict": lambda m: m.register_state_dict_post_hook(_nothing),
    "pre-state dict": lambda m: m.register_state_dict_pre_hook(_nothing),
    "load": lambda m: m.register_load_state_dict_pre_hook(_nothing),
    "loaded": lambda m: m.register_load_state_dict_post_hook(_nothing),
    "of a parameter": lambda m: next(m.parameters()).register_hook(_nothing),
}


def kept(register: Callable[[nn.Module], RemovableHandle], *, removed: bool) -> nn.Module:
    model = Net()
    handle = register(model.stage[1])
    if removed:
        handle.remove()
    model.stage.handle, model.handles, model.by_name = handle, [handle], {"a": (handle,)}
    return model


def check_copies(model: nn.Module, folder: Path) -> nn.Module:
    """Convert, and do to the conversion all that copies it; return it."""
    converted, plan, _ = convert(model, X)
    copy.deepcopy(copy.deepcopy(converted))
    assert verify(model, converted, [X]).passed
    assert not convert(converted, X).plan.swaps
    AveragedModel(converted)
    save(converted, folder / "module.pt", plan=plan, payload="module")
    assert torch.equal(load(folder / "module.pt", trust=True).model.eval()(X), converted.eval()(X))
    return converted


@pytest.mark.parametrize("make", [Net, HandleFirst])
def test_a_copy_whose_hook_keeps_its_handle_can_be_copied_again(make: Callable[[], Net], tmp_path: Path) -> None:
    model = make().eval()
    converted: Any = check_copies(model, tmp_path)
    model.skip.seen = torch.zeros(())
    converted(X)
    assert converted.skip.seen.shape == (2, 8, 4, 4)  # the hook of the copy writes to the copy
    assert model.skip.seen.shape == ()
    converted.skip.handle.remove()
    assert not converted.stage._forward_hooks
    assert model.stage._forward_hooks


@pytest.mark.slow
@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("register", REGISTERED.values(), ids=REGISTERED)
def test_handles_of_every_kind_survive_copying(
    register: Callable[[nn.Module], RemovableHandle], removed: bool, tmp_path: Path
) -> None:
    check_copies(kept(register, removed=removed), tmp_path)


def test_a_handle_in_a_copy_removes_the_hook_of_the_copy() -> None:
    for name, register in REGISTERED.items():
        model = kept(register, removed=False)
        twin: Any = copy_model(model)
        twin.handles[0].remove()
        counts = [_hooks(m.stage[1]) for m in (model, twin)]
        assert counts == ([1, 0] if name != "of a parameter" else [0, 0]), name


def _hooks(module: nn.Module) -> int:
    registries = (value for name, value in vars(module).items() if name.endswith("_hooks") and value is not None)
    return sum(map(len, registries))


def test_a_handle_in_a_graph_module_removes_the_hook_of_the_copy() -> None:
    graph: Any = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval())
    graph.handle = graph.register_forward_hook(_nothing)
    converted: Any = convert(graph, X).model
    converted.handle.remove()
    assert (len(graph._forward_hooks), len(converted._forward_hooks)) == (1, 0)
    copy_model(converted)


def test_references_to_the_dicts_of_a_module_stay_references() -> None:
    model = Net()
    model.parts, model.tensors, model.nothing = model._modules, model.stage[0]._parameters, model.stage._buffers
    twin: Any = deep_copy(model, {})
    assert twin.parts is twin._modules
    assert twin.tensors is twin.stage[0]._parameters
    assert twin.nothing is twin.stage._buffers


def test_weak_references_are_copied_as_torch_copies_them(tmp_path: Path) -> None:
    model: Any = Net()
    model.stage.owner = weakref.ref(model)
    converted: Any = convert(model, X).model
    assert converted.stage.owner() is copy.deepcopy(model).stage.owner() is model
    copy.deepcopy(converted)
    assert verify(model, converted, [X]).passed
