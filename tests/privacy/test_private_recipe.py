"""The file of the recipe `private` trains within its budget, and the conversion sees no private image."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import normswap
from normswap.checkpoints.architecture.registry import import_python_file
from normswap.finetune.recipe import shipped_recipes
from tests.integration.test_imports import ROOT
from tests.privacy.networks import convert, small_network

INPUTS = torch.randn(40, 3, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def own_file(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = import_python_file(ROOT / "recipes" / "private.py")
    labels = torch.arange(40) % 4
    monkeypatch.setattr(module, "open_data", lambda split, images_seed=0: TensorDataset(INPUTS, labels))
    return module


def run(records: list[Any], *overrides: str, **options: Any) -> Any:
    return SimpleNamespace(
        recipe=normswap.read_recipe("private", overrides=["train.epochs=2", "data.batch_size=8", *overrides]),
        options=options,
        device="cpu",
        log=records.append,
        build_optimizer=lambda model: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
    )


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["switch", "opacus"])
def test_training_spends_its_budget_and_not_more(own_file: ModuleType, norm: str) -> None:
    model, records = small_network(), list[Any]()
    if norm == "switch":
        model = convert(model, INPUTS[:2]).float()
    before = model[0].weight.detach().clone()
    own_file.train_model(model, run(records, epsilon=3.0, delta=1e-2, norm=norm))
    (record,) = records
    assert 2.5 < record["epsilon"] <= 3.0
    assert record["step"] == 10
    assert isinstance(model[1], nn.GroupNorm if norm == "opacus" else normswap.SwitchNorm2d)
    assert not torch.equal(model[0].weight, before)
    assert not hasattr(model[0].weight, "grad_sample")
    if norm == "switch":
        assert [*model[1].buffers()]


def test_calibration_on_private_images_is_refused(own_file: ModuleType) -> None:
    with pytest.raises(normswap.RecipeError, match="reads private images, which epsilon does not cover"):
        own_file.train_model(small_network(), run([], 'convert.untrained="calibrate"'))


def test_the_conversion_sees_no_private_image(own_file: ModuleType) -> None:
    example = own_file.example_inputs([INPUTS, torch.zeros(40)])
    assert example.shape == INPUTS.shape
    assert not torch.isclose(example, INPUTS).all()
    assert torch.equal(example, own_file.example_inputs([INPUTS + 1, torch.zeros(40)]))
    assert "private" in shipped_recipes()
