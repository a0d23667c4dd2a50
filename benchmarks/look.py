"""Open the HTML report in a headless browser and take screenshots, for people to look at (`make look`).

Writes reports of a short run of a recipe, alone and against the file before it, and of 500 sites; and a screenshot
of each at the width of a desktop and of a phone, light and dark, to demo-output/look/. A browser is found by its name,
or by NORMSWAP_BROWSER.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn

import normswap
from benchmarks.paths import ROOT
from normswap.surgery.importance import gated_modules

OUTPUT = ROOT / "demo-output" / "look"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell", "microsoft-edge")
WIDTHS = {"desktop": 1280, "phone": 390}
HEIGHTS = {"desktop": 3000, "phone": 4200}
SCHEMES = {"light": "1", "dark": "0"}
# The browser makes no window narrower than 500 pixels: the page is shown in a frame.
FRAME = '<body style="margin:0"><iframe src="{page}" style="border:0;width:{width}px;height:{height}px"></iframe>'
MANY_SITES = 500


def main() -> int:
    """Write the reports and take the screenshots; return the exit code."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    browser = find_browser()
    if browser is None:
        print(
            "error: no browser found: apt-get install chromium, or set NORMSWAP_BROWSER to the path of a Chromium",
            file=sys.stderr,
        )
        return 2
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for page in write_pages(OUTPUT):
        for width in WIDTHS:
            for scheme in SCHEMES:
                print(f"wrote {take_screenshot(browser, page, width, scheme).relative_to(ROOT)}")
    return 0


def find_browser() -> str | None:
    """Return the path of a browser of the Chromium family, None if there is none."""
    return os.environ.get("NORMSWAP_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)


def write_pages(folder: Path) -> list[Path]:
    """Write the reports into `folder` and return their paths."""
    torch.manual_seed(0)
    run = train(folder / "runs")
    many = normswap.convert(deep_network(MANY_SITES), torch.randn(2, 4, 8, 8), exclude=["0"])
    move_gates(many.model, 1.0)
    normswap.save(many.model, folder / "many.pt", plan=many.plan)
    pages = {"run": (run, None), "against": (run, run.with_name("converted.pt")), "many": (folder / "many.pt", None)}
    for name, (file, other) in pages.items():
        start = time.perf_counter()
        output = folder / f"{name}.html"
        normswap.write_report(file, output, png=output.with_suffix(".png"), against=other, overwrite=True)
        print(f"wrote {output.relative_to(ROOT)} in {time.perf_counter() - start:.1f} s")
    return [folder / f"{name}.html" for name in pages]


def train(folder: Path) -> Path:
    """Return the file of a network that a recipe has converted and fine-tuned; beside it the file before that."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = ["train.epochs=6", f"run.output={folder / 'source'}"]
    source = normswap.run_recipe(normswap.read_recipe("digits_source", settings)).model
    settings = ["train.epochs=1", "run.evaluate_every=300", f"run.output={folder / 'target'}"]
    settings += [f"model.checkpoint={source}"]
    model = normswap.run_recipe(normswap.read_recipe("digits_small_batch", settings)).model
    normswap.convert_file(source, model.with_name("converted.pt"))
    return model


def deep_network(sites: int) -> nn.Module:
    """Return a network with many sites whose convolutions cost little."""
    layers = (layer for _ in range(sites) for layer in (nn.BatchNorm2d(4), nn.ReLU()))
    return nn.Sequential(*layers)


def move_gates(model: nn.Module, strength: float) -> None:
    """Move gates as training might: the more the deeper, and some not at all."""
    layers = list(gated_modules(model).values())
    for index, layer in enumerate(layers):
        depth = (index + 1) / len(layers)
        for gate, phase in ((layer.mean_weight, 0.0), (layer.var_weight, 1.0)):
            share = max(0.0, strength * depth * (0.6 + 0.5 * math.sin(7 * depth + phase)))
            point = torch.zeros_like(gate)
            point[-1] = 1 - min(share, 1.0)
            point[0] += 0.35 * min(share, 1.0)
            point[-2] += 0.65 * min(share, 1.0)
            gate.data.copy_(point)


def take_screenshot(browser: str, page: Path, width: str, scheme: str) -> Path:
    """Return the path of a PNG file with the page as a browser shows it."""
    target = page.with_name(f"{page.stem}-{width}-{scheme}.png")
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder, "frame.html")
        frame.write_text(FRAME.format(page=page.as_uri(), width=WIDTHS[width], height=HEIGHTS[width]))
        options = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"),
            f"--user-data-dir={folder}",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            f"--window-size={max(WIDTHS[width], 500)},{HEIGHTS[width]}",
            f"--screenshot={target}",
        ]
        subprocess.run([browser, *options, frame.as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(target) as image:
        image.crop((0, 0, WIDTHS[width], HEIGHTS[width])).save(target)
    return target


if __name__ == "__main__":
    sys.exit(main())
