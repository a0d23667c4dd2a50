"""Convert and verify the smallest model of every family of timm and torchvision that has batch norms."""

import pytest
import timm
import torch

from benchmarks.zoo import timm_models
from benchmarks.zoo.catalog import Entry, entries, sample
from benchmarks.zoo.checks import check_model
from benchmarks.zoo.norm_values import batch_norms
from benchmarks.zoo.records import CONVERTED, PARTLY

SAMPLE = sample()
LAW_PARAMETERS = 5_000_000  # what is larger takes up to a minute: `make zoo` verifies them
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("entry", SAMPLE, ids=lambda entry: entry.key)
def test_every_family_is_converted_and_keeps_the_laws(entry: Entry) -> None:
    record = check_model(entry, quick_above=LAW_PARAMETERS)
    assert record.failures == []
    assert record.outcome in (CONVERTED, PARTLY)
    assert record.swapped > 0
    assert record.is_verified == (record.parameters <= LAW_PARAMETERS)
    if record.is_verified:
        assert record.gates_checked > 0
        assert any(check[4] for check in record.checks)


@pytest.mark.skipif(timm.__version__ != timm_models.SAMPLED_FROM, reason="the sample was made from another timm")
def test_families_outside_the_sample_have_no_batch_norms() -> None:
    """Of each its first model."""
    chosen = {entry.family for entry in SAMPLE if entry.zoo == "timm"}
    others = {entry.family: entry for entry in reversed(list(entries("timm"))) if entry.family not in chosen}
    assert len(chosen) > 50
    assert len(others) > 30
    with torch.device("meta"):
        found = {family: len(batch_norms(entry.build())) for family, entry in others.items()}
    assert found == dict.fromkeys(others, 0)
