"""Draw the pictures of the demo and of the README: the same function at the start, and the accuracy after fine-tuning.

The demo draws the values of its own run, with one seed. `python -m benchmarks.finetuning.picture` draws those in the
records of the evidence, with all seeds, -> docs/measured/finetuning.png. A picture contains its values as JSON, so that
a test can compare them with the records.
"""

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from benchmarks.paths import PAGES, RESULTS
from benchmarks.records import read_lines

PICTURE = PAGES / "finetuning.png"
SETTING, BATCH = "fashion_shift", 2
OURS, BN, OTHER, TEXT = "#0b6e99", "#c0392b", "#8a8f98", "#24292f"
CHANCE = 10.0
_COLORS = {"default": OURS, "bn": BN, "frozen": BN}


def main() -> int:
    """Draw the picture of the README; return the exit code."""
    from benchmarks.finetuning import demo  # which draws with this module

    network, _ = demo.load_efficientnet_lite0()
    values = shown_values() | {"classes": demo.top_classes(network)}
    draw(values, demo.photograph(demo.PHOTOGRAPH)[0], demo.samples(), PICTURE)
    print(f"wrote {PICTURE}")
    return 0


def shown_values() -> dict[str, Any]:
    """Return what the records of the evidence give to the picture: the scores of the seeds that all its arms have.

    Raises:
        SystemExit: there is no such seed.
    """
    from benchmarks.finetuning.demo import RATES  # which draws with this module
    from benchmarks.finetuning.evidence.arms import ARMS
    from benchmarks.finetuning.evidence.plan import SETTINGS, scores_of

    found = scores_of(read_lines(RESULTS / "evidence.jsonl", key="key"), SETTING, BATCH)
    seeds = sorted(set.intersection(*(set(found[arm]) for arm in RATES)))
    if not seeds:
        raise SystemExit(f"error: the evidence has no results of {SETTING} at batch size {BATCH} yet: make evidence")
    setting = SETTINGS[SETTING]
    return {
        "arms": {arm: {"title": ARMS[arm].title, "scores": [found[arm][seed] for seed in seeds]} for arm in RATES},
        "caption": f"{setting.title},\n{setting.steps[BATCH]} steps at batch size {BATCH}",
    }


def draw(values: Mapping[str, Any], photograph: Tensor, samples: Tensor, path: Path) -> None:
    """Draw a photograph with its classes, samples of the target, and the accuracy of the arms.

    Args:
        values: `classes`: probabilities in percent by name; `arms`: `title` and `scores`, a score in percent for each
            seed; `caption`: what the arms were trained on. The picture contains them.
        photograph: (3, H, W), 8 bits.
        samples: (2, N, 3, H, W), 8 bits: before and under the shift.
        path: of the PNG file.
    """
    # A figure without pyplot, which would look for a display.
    figure = Figure(figsize=(11.6, 3.6), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    cat, target, arms = (
        figure.add_axes(box) for box in ((0.01, 0.2, 0.2, 0.66), (0.25, 0.2, 0.32, 0.66), (0.7, 0.17, 0.285, 0.69))
    )
    _draw_photograph(cat, photograph, values["classes"])
    _draw_samples(target, samples)
    _draw_arms(arms, values["arms"], values["caption"])
    figure.savefig(path, metadata={"Description": json.dumps(values), "Software": "benchmarks.finetuning.picture"})


def _draw_photograph(axes: Axes, photograph: Tensor, classes: Mapping[str, float]) -> None:
    axes.imshow(photograph.permute(1, 2, 0).numpy())
    name, share = next(iter(classes.items()))
    axes.text(
        0,
        -0.06,
        f"{name}, {share:.1f} %,\nbefore and after",
        fontsize=10,
        color=OURS,
        weight="bold",
        va="top",
        transform=axes.transAxes,
    )
    _style_image(axes, "Converted: the same outputs")


def _draw_samples(axes: Axes, samples: Tensor) -> None:
    """Show half of the samples in each of two lines: before the shift above, under it below."""
    before, shifted = (row.permute(0, 2, 3, 1) for row in samples)
    half = len(before) // 2
    size = before.shape[1]
    for line, images in enumerate((before[:half], shifted[:half], shifted[half : 2 * half])):
        for column, image in enumerate(images):
            left, top = column * (size + 2), line * (size + 2) + (10 if line else 0)
            axes.imshow(image.numpy(), extent=(left, left + size, top + size, top), interpolation="nearest")
    axes.set(xlim=(0, half * (size + 2)), ylim=(3 * (size + 2) + 10, 0))
    _style_image(axes, "Fine-tuned on the lower rows")


def _style_image(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11, color=TEXT, loc="left", pad=8)
    axes.set_aspect("equal", anchor="NW")
    axes.axis("off")


def _draw_arms(axes: Axes, arms: Mapping[str, Mapping[str, Any]], caption: str) -> None:
    """Draw a bar for the mean of the seeds of each arm, the lowest at the bottom, and a dot for each seed."""
    rows = sorted(arms, key=lambda arm: statistics.fmean(arms[arm]["scores"]))
    for row, arm in enumerate(rows):
        scores = arms[arm]["scores"]
        mean, color = statistics.fmean(scores), _COLORS.get(arm, OTHER)
        axes.barh(row, mean, height=0.6, color=color, alpha=0.85)
        if len(scores) > 1:
            axes.plot(scores, [row] * len(scores), ".", color=TEXT, markersize=4)
        axes.text(max(mean, *scores, 0) + 2, row, f"{mean:.1f}", va="center", fontsize=9.5, color=color, weight="bold")
    axes.axvline(CHANCE, color=TEXT, linewidth=1, linestyle=":")
    axes.text(CHANCE, len(rows) - 0.42, "chance", fontsize=8, color=TEXT, ha="center")
    axes.set_yticks(range(len(rows)), [arms[arm]["title"] for arm in rows])
    for label, arm in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if arm == "default" else "normal")
    axes.set(xlim=(0, 104), ylim=(-0.6, len(rows) - 0.4), xlabel=caption)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_title("Accuracy (%)", fontsize=11, color=TEXT, loc="left", pad=14)
    axes.tick_params(labelsize=9.5, colors=TEXT)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.label.set(fontsize=9.5, color=TEXT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b8bcc4")


def read_values(path: Path = PICTURE) -> dict[str, Any]:
    """Return the values that a picture contains."""
    with Image.open(path) as image:
        values: dict[str, Any] = json.loads(image.info["Description"])
    return values


if __name__ == "__main__":
    sys.exit(main())
