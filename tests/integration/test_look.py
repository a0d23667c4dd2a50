"""`make look`, without a browser, and the picture of importance weights in docs/measured/."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import normswap
from benchmarks import look
from benchmarks.finetuning import importance


def test_without_a_browser_it_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NORMSWAP_BROWSER", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.argv", ["look"])
    assert look.main() == 2
    message = "error: no browser found: apt-get install chromium, or set NORMSWAP_BROWSER to the path of a Chromium\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(("width", "pixels"), look.WIDTHS.items())
def test_a_screenshot_has_the_width_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: str, pixels: int
) -> None:
    def browse(command: list[str], **_: Any) -> None:
        target = next(option.partition("=")[2] for option in command if option.startswith("--screenshot="))
        size = next(option.partition("=")[2] for option in command if option.startswith("--window-size="))
        Image.new("RGB", tuple(map(int, size.split(",")))).save(target)
        assert (tmp_path / "a.html").as_uri() in Path(command[-1].removeprefix("file://")).read_text()

    monkeypatch.setattr(subprocess, "run", browse)
    with Image.open(look.take_screenshot("browser", tmp_path / "a.html", width, "dark")) as image:
        assert image.size == (pixels, look.HEIGHTS[width])


def test_moved_gates_are_points_of_the_simplex() -> None:
    model = normswap.convert(look.deep_network(9), torch.randn(2, 4, 8, 8)).model
    look.move_gates(model, 1.0)
    for site in normswap.importance_weights(model).values():
        assert sum(site.mean.values()) == pytest.approx(1)
        assert min(site.var.values()) >= 0


def test_the_picture_contains_the_importance_weights_that_it_shows(tmp_path: Path) -> None:
    weights = importance.read_values()
    assert len(weights) == 49
    assert all(sum(side.values()) == pytest.approx(1, abs=1e-5) for site in weights.values() for side in site)
    assert any(site.mean["bn"] < 0.9 for site in weights.values())
    importance.draw(weights, "images", tmp_path / "again.png")
    assert importance.read_values(tmp_path / "again.png") == weights
