"""Draw the picture of the README from the records of the evidence and the recipes -> docs/measured/finetuning.png.

Nothing is measured. The picture contains the values that it shows as JSON, so a test can compare them with the records.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.finetuning.arms import ARMS
from benchmarks.finetuning.evidence_records import chosen, read_json
from benchmarks.paths import PAGES, RESULTS
from benchmarks.records import read_document

PICTURE = PAGES / "finetuning.png"
OURS, BN, OTHER, TEXT = "#0b6e99", "#c0392b", "#8a8f98", "#24292f"
ROWS = ("frozen", "bn", "adapted", "group_norm", "uniform", "converted")
LEGEND = "bar: new digits, after 400 steps\n$\\diamond$: old digits, right after the swap"
SHORT = {"adapted": "BN re-estimated, frozen", "uniform": "SN swap, uniform start"}
# Size of one digit in digits.png, with its border on one side, in pixels.
TILE, BORDER = 34, 2


def main() -> int:
    """Draw the picture; return the exit code."""
    values = shown_values()
    # A figure without pyplot, which would look for a display.
    figure = Figure(figsize=(11.6, 3.7), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    digits, batches, arms = figure.subplots(
        1, 3, width_ratios=(1.75, 2.0, 2.7), gridspec_kw={"wspace": 0.12, "left": 0.01, "right": 0.985}
    )
    figure.subplots_adjust(top=0.87, bottom=0.2)
    _draw_digits(digits)
    _draw_batch_sizes(batches, values["batch sizes"])
    _draw_arms(arms, values["arms"])
    # The labels of the arms are long: move their panel away from the one before it.
    box = arms.get_position()
    arms.set_position((box.x0 + 0.14, box.y0, box.width - 0.14, box.height))
    figure.savefig(PICTURE, metadata={"Description": json.dumps(values), "Software": "benchmarks.finetuning.picture"})
    print(f"wrote {PICTURE}")
    return 0


def shown_values() -> dict[str, Any]:
    """Return the values in the picture: test accuracies in percent, computed from the records."""
    records: Any = read_document(RESULTS / "small-batch.json")
    section = read_json(RESULTS / "evidence.json").sections[0]
    by_batch = {
        arm: {
            str(batch): [run["after"] for run in records["runs"] if (run["arm"], run["batch"]) == (arm, batch)]
            for batch in sorted({run["batch"] for run in records["runs"]})
        }
        for arm in ("recipe", "bn")
    }
    arms = {
        arm: {
            "clean digits after the swap": _mean(outcome.source_before for outcome in chosen(section, arm)),
            "shifted digits after training": _mean(outcome.target for outcome in chosen(section, arm)),
        }
        for arm in ROWS
    }
    return {"batch sizes": by_batch, "arms": arms}


def _mean(values: Any) -> float:
    return round(statistics.fmean(values), 1)


def _draw_digits(axes: Axes) -> None:
    """Show digits of both domains, cut from docs/measured/digits.png."""
    with Image.open(PAGES / "digits.png") as file:
        sample = file.convert("RGB")
    columns = 4
    strip = sample.crop((0, 0, columns * TILE + BORDER, sample.height))
    rows = [strip.crop((BORDER, BORDER + row * TILE, strip.width - BORDER, (row + 1) * TILE)) for row in (0, 1)]
    width, height = rows[0].size
    for image, base, title in zip(rows, (1.5, 0.0), ("Trained on these digits,", "fine-tuned on these"), strict=True):
        axes.imshow(image, extent=(0, width / height, base, base + 1), interpolation="nearest")
        axes.text(0, base + 1.1, title, fontsize=11, color=TEXT)
    axes.set(xlim=(0, width / height), ylim=(-0.1, 2.85))
    axes.set_aspect("equal")
    axes.axis("off")


def _draw_batch_sizes(axes: Axes, values: dict[str, dict[str, list[float]]]) -> None:
    """Draw the accuracy after fine-tuning by batch size: the mean of the seeds as a line, each seed as a dot."""
    labels = {"recipe": ("converted", OURS), "bn": ("BatchNorm", BN)}
    batches = list(values["recipe"])
    for arm, (label, color) in labels.items():
        means = [_mean(values[arm][batch]) for batch in batches]
        axes.plot(range(len(batches)), means, color=color, linewidth=2.2, marker="o", markersize=6)
        for place, batch in enumerate(batches):
            axes.plot([place] * len(values[arm][batch]), values[arm][batch], ".", color=color, alpha=0.45, markersize=5)
            axes.annotate(
                f"{means[place]:.1f}",
                (place, means[place]),
                xytext=(0, -17),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=color,
            )
        axes.text(0.12, means[0] + (4 if arm == "recipe" else -3), label, color=color, fontsize=10, weight="bold")
    axes.set_xticks(range(len(batches)), batches)
    axes.set(xlim=(-0.3, len(batches) - 0.7), ylim=(0, 109), xlabel="batch size")
    _style(axes, "Accuracy on the new digits (%)")
    axes.grid(axis="y", color="#e4e6ea", linewidth=0.8)


def _draw_arms(axes: Axes, values: dict[str, dict[str, float]]) -> None:
    """Draw two dots for each arm: what is left of the trained network, and what fine-tuning reaches."""
    for row, (arm, shown) in enumerate(values.items()):
        kept, reached = shown.values()
        color = OURS if arm == "converted" else BN if arm in ("frozen", "bn", "adapted") else OTHER
        axes.plot([0, reached], [row, row], color=color, linewidth=7, alpha=0.85, solid_capstyle="butt")
        axes.text(
            max(reached, kept if abs(kept - reached) < 8 else 0) + 3,
            row,
            f"{reached:.1f}",
            va="center",
            fontsize=9,
            color=color,
            weight="bold",
        )
        axes.plot(kept, row, "D", markersize=6, markerfacecolor="white", markeredgecolor=TEXT, zorder=3)
    titles = [SHORT.get(arm, ARMS[arm].title) for arm in values]
    axes.set_yticks(range(len(titles)), titles)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == ARMS["converted"].title else "normal")
    axes.set(xlim=(0, 116), ylim=(-0.6, len(titles) - 0.4), xlabel=LEGEND)
    axes.set_xticks([0, 25, 50, 75, 100])
    _style(axes, "By method, batch size 2 (%)")
    axes.tick_params(axis="y", length=0)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11, color=TEXT, loc="left", pad=10)
    axes.tick_params(labelsize=9.5, colors=TEXT)
    axes.xaxis.label.set(fontsize=9.5, color=TEXT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b8bcc4")


def read_values(path: Path = PICTURE) -> dict[str, Any]:
    """Return the values that the picture contains."""
    with Image.open(path) as image:
        values: dict[str, Any] = json.loads(image.info["Description"])
    return values


if __name__ == "__main__":
    sys.exit(main())
