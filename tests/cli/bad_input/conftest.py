"""The good files that `folder` of the outer conftest copies for each test of bad input."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

import normswap
from tests.helpers import files


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good files of every kind."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    model = files.small_model()
    torch.save(model.state_dict(), folder / "bn.pt")
    torch.save(model.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(model.state_dict(), folder / "bn.safetensors")
    torch.save(model, folder / "module.pt")
    conversion = normswap.convert(model, torch.randn(files.SHAPE))
    normswap.save(conversion.model, folder / "sn.pt", plan=conversion.plan, architecture=files.ARCH)
    (folder / "plan.json").write_text(conversion.plan.to_json())
    return folder
