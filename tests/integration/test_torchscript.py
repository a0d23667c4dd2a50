"""torch.jit: a converted model traces and passes torch's own check; compiling it is refused in one line."""

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from normswap import SwitchNorm2d, SwitchNormAct, convert, use_backend
from normswap.errors import LayerError
from tests.helpers import zoo

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(3, 3, 12, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def deprecated() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates torch.jit, and warns of every number in a trace
        yield


def modules() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())


def functional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), zoo.FunctionalBlock(8, 8))


def converted(make: Callable[[], nn.Module], *, moved: bool, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = convert(zoo.randomise(make()), X, **options).model
    for name, parameter in model.named_parameters():
        if moved and name.endswith(("mean_weight", "var_weight")):
            parameter.data.copy_(torch.tensor([0.2, 0.3, 0.5]))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("make", [modules, functional])
@pytest.mark.parametrize("gate", ["simplex", "softmax"])
def test_a_trace_passes_the_check_of_torch_and_works_for_other_sizes(
    make: Callable[[], nn.Module], gate: str, moved: bool, backend: str
) -> None:
    model = converted(make, moved=moved, gate=gate).eval()
    with use_backend(backend):
        traced = torch.jit.trace(model, X)
        torch.testing.assert_close(traced(OTHER), model(OTHER))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.freeze(torch.jit.load(file).eval())(OTHER), model(OTHER))


@pytest.mark.parametrize("bn_statistics", ["batch", "running"])
def test_a_trace_in_training_passes_the_check_of_torch(bn_statistics: str) -> None:
    model = converted(modules, moved=True, bn_statistics=bn_statistics).train()
    traced = torch.jit.trace(model, X)
    torch.testing.assert_close(traced(X), model(X))


@pytest.mark.parametrize("make", [modules, functional, lambda: SwitchNorm2d(3), lambda: SwitchNormAct(3)])
def test_torch_jit_script_is_refused_with_the_way_out(make: Callable[[], nn.Module]) -> None:
    model = converted(make, moved=True)
    keys = [*model.state_dict()]
    with pytest.raises(LayerError, match=r"torch.jit.script cannot compile \w+, .*: use torch.jit.trace\(model.eval"):
        torch.jit.script(model)
    assert [*model.state_dict()] == keys
    with torch.no_grad():
        model.eval()(X)


def test_the_ways_out_that_the_refusal_names_work() -> None:
    model = converted(modules, moved=True).eval()
    program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X), model(X))
