"""A folder with one small network as a file of every kind, fresh for each test."""

import shutil
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

import normswap
from tests.helpers import files


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one network as a file of every kind, and converted as one."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    model = files.small_model()
    torch.save(model.state_dict(), folder / "bn.pt")
    torch.save(model.state_dict(), folder / "legacy.bin", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(model.state_dict(), folder / "bn.safetensors")
    torch.save(model, folder / "module.pth")
    x = torch.randn(files.SHAPE)
    conversion = normswap.convert(model, x)
    proof = normswap.verify(model, conversion.model, [x])
    normswap.save(conversion.model, folder / "sn.pt", plan=conversion.plan, architecture=files.ARCH, verification=proof)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the good files, as the working directory."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    # Nothing about the terminal of whoever runs the tests may leak into what is printed.
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
