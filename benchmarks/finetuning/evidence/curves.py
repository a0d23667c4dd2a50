"""Draw validation scores over the learning rate, from the records."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.finetuning.evidence.arms import ALL
from benchmarks.finetuning.evidence.plan import CURVE_ARMS, CURVES, SETTINGS, Records, curves, find

COLORS = {"default": "#0b6e99", "frozen": "#c0392b", "gn_matched": "#8a6d1f", "ln_matched": "#8a8f98"}


def draw(records: Records, path: Path) -> bool:
    """Write the picture; return false if there is nothing to draw."""
    points = {setting: points_of(records, setting) for setting in CURVES}
    if not any(found for lines in points.values() for found in lines.values()):
        return False
    # A figure without pyplot, which would look for a display.
    figure = Figure(figsize=(8.4, 3.2), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (setting, lines) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True):
        _draw(axes, SETTINGS[setting].title, lines)
    figure.savefig(path, metadata={"Software": "benchmarks.finetuning.evidence"})
    return True


def points_of(records: Records, setting: str) -> dict[str, list[tuple[float, float]]]:
    """Return rates with validation scores, by arm."""
    found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in CURVE_ARMS}
    for job in curves(setting):
        record = find(records, job)
        if record is not None:
            found[job.arm].append((record["rate"], record["validation"]))
    return {arm: sorted(points) for arm, points in found.items()}


def _draw(axes: Axes, title: str, lines: dict[str, list[tuple[float, float]]]) -> None:
    for arm, points in lines.items():
        if points:
            rates, scores = zip(*points, strict=True)
            axes.plot(rates, scores, marker="o", markersize=4, color=COLORS[arm], label=ALL[arm].title)
    axes.set_xscale("log")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("learning rate of the network", fontsize=9)
    axes.set_ylim(0, 100)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e4e6ea", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
