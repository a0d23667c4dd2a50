"""The table of norms: exact types, what each becomes, and a reason for everything that only looks like one."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import EvoNorm2dS0, GroupNormAct, LayerNorm2d
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.layers.norm_act import FrozenBatchNormAct2d as TimmFrozen
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torchvision.ops.misc import Conv2dNormActivation, FrozenBatchNorm2d

from normswap import KNOWN_NORMS, SwitchNorm2d, convert, find_norm_sites, plan_swaps, read_batch_norm
from normswap.errors import ArgumentError
from normswap.layers.gated_module import FunctionalSwitchNorm
from normswap.layers.switch_norm import SwitchNorm, SwitchNorm1d, SwitchNorm3d, SwitchNormAct2d
from normswap.surgery.norms.classes import NormSpec, is_norm_layer, looks_like_norm, read_frozen_batch_norm, read_norm
from tests.helpers import zoo

# (module, what is read)
KNOWN: dict[str, tuple[nn.Module, NormSpec]] = {
    "BatchNorm1d": (nn.BatchNorm1d(4), NormSpec("bn", 4, 1e-5, 0.1, SwitchNorm1d)),
    "BatchNorm2d": (nn.BatchNorm2d(4, eps=1e-3, momentum=None), NormSpec("bn", 4, 1e-3, None, SwitchNorm2d)),
    "BatchNorm3d": (nn.BatchNorm3d(4, momentum=0.0), NormSpec("bn", 4, 1e-5, 0.0, SwitchNorm3d)),
    "no tensor": (
        nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        NormSpec("bn", 4, 1e-5, 0.1, SwitchNorm2d),
    ),
    "SyncBatchNorm": (nn.SyncBatchNorm(4), NormSpec("bn", 4, 1e-5, 0.1, SwitchNorm, synchronize=True)),
    "BatchNormAct2d": (BatchNormAct2d(4), NormSpec("bn", 4, 1e-5, 0.1, SwitchNormAct2d)),
    "FrozenBatchNorm2d": (
        FrozenBatchNorm2d(4, eps=0.0),
        NormSpec("frozen bn", 4, 0.0, None, SwitchNorm2d, frozen=True),
    ),
    "FrozenBatchNormAct2d": (
        FrozenBatchNormAct2d(4),
        NormSpec("frozen bn", 4, 1e-5, None, SwitchNormAct2d, frozen=True),
    ),
}


@pytest.mark.parametrize(("module", "spec"), KNOWN.values(), ids=KNOWN)
def test_known_norms_are_read(module: nn.Module, spec: NormSpec) -> None:
    assert read_norm(module) == spec
    assert is_norm_layer(module)


def sync_act() -> nn.Module:
    module = SyncBatchNormAct(4)
    module.act, module.drop = nn.ReLU(), nn.Identity()
    return module


def test_timms_synchronised_norm_is_read_once_it_has_its_activation() -> None:
    assert read_norm(sync_act()) == NormSpec("bn", 4, 1e-5, 0.1, SwitchNormAct2d, synchronize=True)
    spec = read_norm(SyncBatchNormAct(4))
    assert spec is not None
    assert spec.target is None
    assert spec.problem == "expected `act` and `drop` inside it: exclude it, or rebuild the model"


class Sub(nn.BatchNorm2d):
    pass


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x


class OnlyVariance(nn.Module):
    """As EvoNorm-B0: a running variance, and no mean."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x


class CosineNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x


def overridden() -> nn.Module:
    module = nn.BatchNorm2d(4)
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def grown() -> nn.Module:
    module = nn.BatchNorm2d(4)
    module.add_module("after", nn.ReLU())
    return module


def without_eps() -> nn.Module:
    module = FrozenBatchNorm2d(4)
    del module.running_var
    return module


STAYS = "has no batch statistics, so small batches do not harm it: left as it is"
# (module, kind, the reason to stay)
STAYING: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "subclass": (
        lambda: Sub(4),
        "bn",
        rf"^{__name__}.Sub is not in the table .* pass norms=KNOWN_NORMS \| \{{\"{__name__}.Sub\": read_batch_norm\}}$",
    ),
    "own norm": (Running, "other", f"^{__name__}.Running is not in the table"),
    "running variance only": (
        OnlyVariance,
        "other",
        r"OnlyVariance has running statistics under other names \(running_var\)",
    ),
    "named like a norm": (CosineNorm, "other", f"^{STAYS}$"),
    "EvoNorm": (lambda: EvoNorm2dS0(8), "other", f"^{STAYS}$"),
    "lazy": (
        nn.LazyBatchNorm2d,
        "bn",
        "^torch.nn.modules.batchnorm.LazyBatchNorm2d has no sizes yet: run one forward pass,",
    ),
    "parametrized": (
        lambda: zoo.parametrized(module := nn.BatchNorm2d(4), module),
        "bn",
        "^is parametrized: call torch.nn.utils.parametrize.remove_parametrizations on it first$",
    ),
    "parametrized own norm": (
        lambda: zoo.parametrized(module := zoo.OwnNorm(), module),
        "other",
        "^is parametrized",
    ),
    "their GroupNorm": (
        lambda: TheirGroupNorm(2, 4),
        "gn",
        f"^{STAYS}; .* may do more than GroupNorm: .*read_group_norm",
    ),
    "LayerNorm": (lambda: nn.LayerNorm(4), "ln", f"^{STAYS}$"),
    "timm LayerNorm2d": (lambda: LayerNorm2d(4), "ln", f"^{STAYS}$"),
    "RMSNorm": (lambda: nn.RMSNorm(4), "rms", f"^{STAYS}$"),
    "InstanceNorm with statistics": (
        lambda: nn.InstanceNorm2d(4, track_running_stats=True),
        "in",
        r"^uses running statistics in evaluation \(track_running_stats=True\), which no InstanceNorm branch has: left",
    ),
    "SwitchNorm": (lambda: SwitchNorm2d(4), "sn", "^is Switchable Normalization already: nothing to do$"),
    "functional SwitchNorm": (
        lambda: FunctionalSwitchNorm(gate="simplex", branches=("ln", "bn")),
        "sn",
        "^is Switchable Normalization already: nothing to do$",
    ),
    "overridden forward": (overridden, "bn", "^its forward is overridden on the instance: remove that first$"),
    "pruned": (lambda: zoo.pruned()[1], "bn", "^its weight is computed before each call .*prune.remove$"),
    "a child more": (
        grown,
        "bn",
        r"^is not a plain BatchNorm2d: .* has \['after'\]: pass norms=KNOWN_NORMS",
    ),
    "a tensor less": (without_eps, "frozen bn", "^is not a plain FrozenBatchNorm2d: expected a BatchNorm module"),
}


class TheirGroupNorm(nn.GroupNorm):
    pass


@pytest.mark.parametrize(
    ("make", "target"),
    [(lambda: nn.GroupNorm(2, 4), "SwitchNorm"), (lambda: GroupNormAct(4, 2), "SwitchNormAct2d")],
    ids=["GroupNorm", "timm GroupNormAct"],
)
def test_group_norms_of_several_groups_are_a_kind_of_their_own(make: Callable[[], nn.Module], target: str) -> None:
    spec = read_norm(make())
    assert spec is not None
    assert spec.target is not None
    assert (spec.kind, spec.num_groups, spec.num_features, spec.target.__name__) == ("gn", 2, 4, target)


@pytest.mark.parametrize(("make", "kind", "reason"), STAYING.values(), ids=STAYING)
def test_what_stays_says_why(make: Callable[[], nn.Module], kind: str, reason: str) -> None:
    spec = read_norm(make())
    assert spec is not None
    assert (spec.kind, spec.target) == (kind, None)
    assert spec.problem is not None
    assert re.search(reason, spec.problem), spec.problem


class Holder(nn.Module):
    """Holds the statistics of a norm that somebody else computes; has no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))


NONE: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(3, 4, 1),
    "spectral-normalized linear": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "a container named like a norm": zoo.ConvNormAct,
    "torchvision's container": lambda: Conv2dNormActivation(3, 4),
    "a name without tensors": lambda: type("PixelNorm", (nn.Identity,), {})(),
    "a holder of statistics": Holder,
    "a list": lambda: nn.ModuleList([nn.BatchNorm2d(3)]),
}


@pytest.mark.parametrize("make", NONE.values(), ids=NONE)
def test_what_is_no_norm_is_none(make: Callable[[], nn.Module]) -> None:
    module = make()
    assert read_norm(module) is None
    assert not looks_like_norm(module)
    assert not is_norm_layer(module)


def test_parametrizations_are_no_norms_by_name() -> None:
    linear = parametrizations.weight_norm(nn.Linear(4, 4))
    assert parametrize.is_parametrized(linear)
    assert all(read_norm(module) is None for module in linear.modules())


def test_a_caller_adds_a_class_without_changing_the_table() -> None:
    norms = KNOWN_NORMS | {Sub: read_batch_norm}
    assert read_norm(Sub(4), norms) == NormSpec("bn", 4, 1e-5, 0.1, SwitchNorm)
    assert Sub not in KNOWN_NORMS
    with pytest.raises(TypeError, match="does not support item assignment"):
        KNOWN_NORMS[Sub] = read_batch_norm  # type: ignore[index]


def test_a_class_can_be_named_instead() -> None:
    norms = KNOWN_NORMS | {f"{Sub.__module__}.Sub": lambda module: read_batch_norm(module, SwitchNorm2d)}
    spec = read_norm(Sub(4), norms)
    assert spec is not None
    assert spec.target is SwitchNorm2d
    assert is_norm_layer(Running(), {f"{Running.__module__}.Running": read_batch_norm})


def test_a_frozen_class_can_be_added() -> None:
    class TheirFrozen(TimmFrozen):
        pass

    norms = KNOWN_NORMS | {TheirFrozen: lambda module: read_frozen_batch_norm(module, SwitchNormAct2d)}
    spec = read_norm(TheirFrozen(4), norms)
    assert spec == NormSpec("frozen bn", 4, 1e-5, None, SwitchNormAct2d, frozen=True)


def test_what_a_caller_says_is_compared_with_the_module() -> None:
    spec = read_norm(zoo.ActivatedNorm(4), KNOWN_NORMS | {zoo.ActivatedNorm: read_batch_norm})
    assert spec is not None
    assert spec.target is None
    assert spec.problem is not None
    assert "runs the child modules [], but ActivatedNorm has ['activation']" in spec.problem


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({nn.BatchNorm2d: 3}, "norms[BatchNorm2d]: expected a function such as read_batch_norm, got 3"),
        ({"lib.Norm": "read"}, "norms[lib.Norm]: expected a function such as read_batch_norm, got 'read'"),
        ({3: read_batch_norm}, "norms: expected classes of modules or their qualified names as keys, got 3: pass"),
        (
            {int: read_batch_norm},
            "norms: expected classes of modules or their qualified names as keys, got <class 'int'>",
        ),
        (
            {nn.BatchNorm2d(3): read_batch_norm},
            "norms: expected classes of modules as keys, got an instance of BatchNorm2d: pass BatchNorm2d",
        ),
        ({nn.BatchNorm2d: lambda _: None}, "norms[BatchNorm2d]: expected a NormSpec from the reader, got None"),
        ({nn.BatchNorm2d: nn.Identity}, "norms[BatchNorm2d]: expected a NormSpec from the reader, got Identity()"),
    ],
)
def test_a_table_with_a_wrong_key_or_reader_is_refused(entry: Any, text: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    for function in (find_norm_sites, plan_swaps, convert):
        with pytest.raises(ArgumentError, match=re.escape(text)):
            function(model, norms=KNOWN_NORMS | entry)
