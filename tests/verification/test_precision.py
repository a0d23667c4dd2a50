"""A model is verified in the widest precision that its own code runs in, and the result says which."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap import Verification, convert, verify
from normswap.errors import ModelError
from normswap.layers.gating import BnStatistics
from normswap.verification.precision import Precision, precisions, uses_narrower_dtype


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


class Head(nn.Module):
    """A linear layer, a norm and another linear layer, fed what `feed` makes of the input."""

    def __init__(self, feed: Callable[[Any, Tensor], Tensor], **attributes: Any) -> None:
        super().__init__()
        self.feed = feed
        self.f = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.feed(self, x))


class Spectral(nn.Module):
    """Complex weights before a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.bn = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64)), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn((x.to(self.mix.dtype) @ self.mix).abs())


class Autocast(nn.Module):
    """Computes a part in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.f(x)
        return self.bn(y.to(x.dtype))


class Between(nn.Module):
    """Rounds to float32 after its norm, whatever it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.last = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.bn(x).float().to(self.last.weight.dtype))


RANDOM = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
BYTES = torch.randint(0, 256, (6, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)

# The model, what it is fed, and the precision that it can be verified in.
MODELS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "casts its input": (lambda: Head(lambda m, x: x.float()), RANDOM, "float32"),
    "bytes by 255": (lambda: Head(lambda m, x: x.float() / 255), BYTES, "float32"),
    "booleans": (lambda: Head(lambda m, x: x.float()), RANDOM > 0, "float32"),
    "bytes in the dtype of its weights": (
        lambda: Head(lambda m, x: x.to(m.f[0].weight.dtype) / 255),
        BYTES,
        "float64",
    ),
    "a plain tensor": (lambda: Head(lambda m, x: x @ m.mix, mix=torch.eye(8)), RANDOM, "float64"),
    "a tensor in a list": (lambda: Head(lambda m, x: x @ m.mix[0], mix=[torch.eye(8)]), RANDOM, "float64"),
    "a tensor in a dict": (lambda: Head(lambda m, x: x @ m.mix["a"], mix={"a": torch.eye(8)}), RANDOM, "float64"),
    "a buffer made in forward": (
        lambda: Head(lambda m, x: x @ torch.eye(8, dtype=torch.float32)),
        RANDOM,
        "float32",
    ),
    "complex weights": (Spectral, RANDOM, "float64"),
    "complex weights that it names": (
        lambda: Head(lambda m, x: (x.to(torch.complex64) @ torch.eye(8, dtype=torch.complex64)).real),
        RANDOM,
        "float32",
    ),
    "autocast": (Autocast, RANDOM, "float64"),
    "float16": (lambda: Head(lambda m, x: x).half(), RANDOM.half(), "float64"),
    "float16 by its own code": (lambda: Head(lambda m, x: x.half()).half(), RANDOM.half(), "float16"),
    "bfloat16 by its own code": (lambda: Head(lambda m, x: x.bfloat16()).bfloat16(), RANDOM.bfloat16(), "bfloat16"),
    "float64": (lambda: Head(lambda m, x: x).double(), RANDOM.double(), "float64"),
}


def verified(
    name: str, fault: Callable[[nn.Module], Any] = lambda model: None, statistics: BnStatistics = "batch"
) -> Verification:
    make, x, _ = MODELS[name]
    model = seeded(make)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kept = vars(model).get("mix")
    converted = convert(model, x, bn_statistics=statistics).model
    fault(next(module for module in converted.modules() if hasattr(module, "mean_weight")))
    found = verify(model, converted, [x])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert vars(model).get("mix") is kept
    return found


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_verified_in_the_widest_precision_that_runs(name: str, statistics: BnStatistics) -> None:
    found = verified(name, statistics=statistics)
    precision = MODELS[name][2]
    assert found.passed
    assert [check.passed for check in found.checks] == [True] * 4
    assert found.precision == precision
    assert found.tolerance == {"float64": 1e-9, "float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}[precision]
    assert not found.loosened
    notes = found.notes if statistics == "batch" else found.notes[:-2]  # on the frozen original, and its statistics
    assert bool(notes) == (precision != "float64")
    assert all("the original model does not run in float" in note for note in notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("bfloat16")])
def test_a_fault_is_found_in_every_precision(name: str) -> None:
    assert not verified(name, lambda layer: setattr(layer, "eps", 0.5)).passed
    assert not verified(name, lambda layer: setattr(layer, "eps", 0.5), "running").passed
    assert not verified(name, lambda layer: setattr(layer, "momentum", 0.9)).passed


def test_a_model_that_rounds_by_its_own_code_is_compared_in_that_precision() -> None:
    model = seeded(Between)
    converted = convert(model, RANDOM).model
    with torch.no_grad():  # a difference that float64 shows and float32 does not
        converted.bn.weight.mul_(1 + 3e-7)
    assert uses_narrower_dtype(model.double(), RANDOM.double(), torch.float64)
    found = verify(seeded(Between), converted, [RANDOM])
    assert found.precision == "float32"
    assert found.notes[0] == "the original model's own code computes a part in a narrower type than float64"


def test_a_model_fails_only_if_it_fails_as_it_is_run() -> None:
    model = seeded(MODELS["casts its input"][0])
    with pytest.raises(ModelError, match="the original model fails on an input of 6x5: mat1 and mat2"):
        verify(model, convert(model).model, [torch.randn(6, 5)])


def test_what_raises_in_training_is_what_the_user_sees() -> None:
    model = seeded(MODELS["casts its input"][0])
    found = verify(model, convert(model, bn_statistics="batch").model, [torch.randn(1, 8)])
    assert found.passed
    note = "skipped: the original model raises in training: Expected more than 1 value per channel"
    assert all(check.note.startswith(note) for check in found.checks[1:])


def test_casting_back_is_exact_and_keeps_what_is_shared() -> None:
    model = seeded(lambda: Head(lambda m, x: x, mix=torch.randn(3)))
    shared = torch.randn(4)
    for module in (model, model.f):
        module.register_buffer("table", shared)
    model.half_scale = nn.Parameter(torch.randn(3).bfloat16())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    undo = Precision(torch.float64).apply([model])
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64, torch.int64}
    assert model.table is model.f.table
    assert model.mix.dtype == torch.float64
    undo()
    assert model.table is shared is model.f.table
    after = model.state_dict()
    assert all(after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in before.items())


def test_the_precisions_to_try_begin_with_the_widest() -> None:
    names = {dtype: [p.name for p in precisions(nn.Linear(1, 1).to(dtype))] for dtype in
             (torch.float64, torch.float32, torch.bfloat16)}  # fmt: skip
    assert names[torch.float64] == ["float64"]
    assert names[torch.float32] == ["float64", "float32"]
    assert names[torch.bfloat16] == ["float64", "float32", "bfloat16"]


class Ids(nn.Module):
    """Takes token ids, and amplifies rounding by about 1e5."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bn = nn.Embedding(9, 8), nn.BatchNorm1d(8)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.sin(1e5 * self.bn(self.table(ids)))


def test_own_response_is_measured_without_a_floating_input() -> None:
    torch.manual_seed(0)
    model, ids = Ids().double(), torch.arange(9).repeat(2)
    converted = convert(model, ids).model
    with torch.no_grad():
        converted.bn.weight.mul_(1 + 1e-13)
    outputs = verify(model, converted, [ids]).checks[0]
    assert outputs.own_response is not None
    assert outputs.own_response > 1e-13
