"""The one walk: every module once, with all its names, also where only a list, a dict or an attribute holds it."""

import torch
from torch import nn

from normswap.surgery.module_tree import ModuleEntry, class_name, copy_model, modules_by_name, walk_modules
from normswap.text import join_fqn
from tests.helpers import zoo


def names(model: nn.Module) -> list[tuple[tuple[str, ...], bool]]:
    return [(entry.names, entry.registered) for entry in walk_modules(model)]


def test_registered_modules_come_in_order_the_root_first() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    assert names(model) == [(("",), True), (("0",), True), (("1",), True), (("1.0",), True)]
    assert walk_modules(model)[0] == ModuleEntry(model, ("",), True)


def test_a_shared_module_has_all_its_names_the_first_met_first() -> None:
    model = zoo.SharedBlock(nn.Sequential(nn.ReLU()))
    assert names(model)[2:4] == [(("left", "right.0"), True), (("left.0", "right.0.0"), True)]
    by_name = modules_by_name(model)
    assert by_name["left.0"] is by_name["right.0.0"]


def test_a_module_in_a_container_is_named_as_python_would() -> None:
    found = {entry.names[0]: entry for entry in walk_modules(zoo.InContainers())}
    assert list(found) == ["", "conv", "norms[0]", "table['last']['norm']"]
    assert [entry.registered for entry in found.values()] == [True, True, False, False]


def test_a_reference_besides_registration_is_no_other_name() -> None:
    assert names(zoo.ListBeside()) == [(("",), True), (("conv",), True), (("bn1",), True), (("bn2",), True)]


class Hidden(nn.Module):
    """Modules in tuples of lists, behind plain attributes, inside modules that are in no registry; and cycles."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = ([nn.Linear(1, 1), "no module"], None)
        object.__setattr__(self, "plain", nn.Sequential(nn.ReLU(), nn.Linear(1, 1)))
        self.plain[1].inside = [nn.Tanh()]
        self.me = [self]
        self.plain[0].above = (self,)
        self.deep = [[[[nn.GELU()]]]]


def test_hidden_modules_are_found_inside_hidden_modules_and_cycles_end() -> None:
    assert names(Hidden()) == [
        (("",), True),
        (("pairs[0][0]",), False),
        (("plain",), False),
        (("plain.0",), False),
        (("plain.1",), False),
        (("plain.1.inside[0]",), False),
    ]  # four containers deep is not looked for


def test_hooks_keep_no_modules_of_the_model() -> None:
    model = nn.ReLU()
    model.register_forward_hook(nn.Identity())
    assert names(model) == [(("",), True)]


def test_torchscript_is_walked_by_its_registry_only() -> None:
    assert [entry.names for entry in walk_modules(zoo.BY_NAME["TorchScript inside"].model())] == [
        ("",),
        ("conv",),
        ("bn",),
        ("part",),
        ("part.0",),
        ("part.1",),
        ("part.2",),
    ]


def test_names_are_joined_and_classes_named() -> None:
    assert join_fqn("", "a") == "a"
    assert join_fqn("a.b", "c") == "a.b.c"
    assert class_name(nn.ReLU()) == "torch.nn.modules.activation.ReLU"
    assert class_name(zoo.DataDependentTail.Tail()) == "tests.helpers.zoo.functional_calls.DataDependentTail.Tail"


def test_a_copy_can_be_trained_like_the_model() -> None:
    model = zoo.BY_NAME["TorchScript inside"].model()
    next(model.part.parameters()).requires_grad_(False)
    model.conv.requires_grad_(False)
    twin = copy_model(model)
    for (name, own), (other, copied) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert name == other
        assert copied.is_leaf
        assert copied.requires_grad == own.requires_grad
        assert copied.data_ptr() != own.data_ptr()
        assert torch.equal(copied, own)
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    twin(zoo.IMAGE()).sum().backward()
    assert all(parameter.grad is not None for parameter in trained)
    assert all(parameter.grad is None for parameter in model.parameters())
