"""The command line converts and verifies models whose own code sets modes and precision, and says so."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from normswap.cli import main

CODE = """
import torch
from torch import nn


class Frozen(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


class Bytes(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = layers()

    def forward(self, x):
        return self.net(x.float() / 255)


def layers(kind=nn.Sequential):
    torch.manual_seed(0)
    return kind(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))


def frozen():
    return layers(Frozen)


def from_bytes():
    return Bytes()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CODE)
    names = {"": "frozen.pt", "net.": "bytes.pt"}
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    for prefix, name in names.items():
        torch.save({prefix + key: value for key, value in layers.state_dict().items()}, tmp_path / name)
    return tmp_path


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result


def test_norms_kept_in_evaluation_are_recorded_and_printed(folder: Path) -> None:
    options = ["frozen.pt", "--arch", "net.py:frozen", "--input", "4x3x9x9"]
    note = "so they use running statistics in training too: 1"
    assert note not in " ".join(run("convert", *options).output.split())  # as all others do
    options += ["--bn-statistics", "batch"]
    assert note in " ".join(run("convert", *options, "--force").output.split())
    found = json.loads(run("convert", *options, "--force", "--json").stdout)
    assert [swap["bn_statistics"] for swap in found["plan"]["swaps"]] == ["running", "batch"]
    assert any(note in text for text in found["plan"]["notes"])
    assert found["verification"]["passed"]
    assert [check["passed"] for check in found["verification"]["checks"]] == [True] * 4


@pytest.mark.parametrize("dtype", ["uint8", "bool", "int64", "float16", "bfloat16"])
def test_a_model_of_bytes_is_verified_in_float32_and_the_report_says_so(folder: Path, dtype: str) -> None:
    options = ["bytes.pt", "--arch", "net.py:from_bytes", "--input", f"4x3x9x9:{dtype}", "--force"]
    text = " ".join(run("convert", *options).output.split())
    assert "relative L2 in float32 on 4x3x9x9" in text
    assert "the original model does not run in float64" in text
    assert "judged by the whole model" in text
