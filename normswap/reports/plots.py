"""Plots with matplotlib: the importance weights of a network, and the course of a training run.

matplotlib is imported when a plot is drawn. Names of modules are drawn as they are, never as formulas.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from normswap.layers.gating import BRANCHES
from normswap.reports.training_course import Course, Points, read_course
from normswap.surgery.importance import SiteWeights, importance_weights

# Green, orange and blue as in the palette of Okabe and Ito, further apart in lightness: any two differ by at least 31
# in CIELAB for each kind of colour blindness (model of Machado, 2009). The stack has `bn` at the bottom.
COLORS: Mapping[str, str] = {"in": "#2BB58A", "ln": "#F0B429", "bn": "#00609C"}
KINDS: Mapping[str, str] = {"mean": "means", "var": "variances"}
_TEXT, _MUTED = "#24292f", "#6a7079"
_MAX_NAMED = 100  # sites that get their names
_MAX_NAME = 44  # letters of a name


def plot_importance(model: nn.Module | Mapping[str, SiteWeights], *, axes: Any = None) -> Any:
    """Draw the importance weights of every site as stacked bars over depth (paper, section 3.1).

    Needs matplotlib: `pip install 'normswap[report]'`.

    Args:
        model: a converted model with or without wrappers, or what `importance_weights` returned.
        axes: two matplotlib axes, for means and for variances; by default those of a new pyplot figure, which a
            notebook shows.

    Returns:
        The two axes as an array; `axes[0].figure` is the figure. For a model without sites they are empty.

    Raises:
        ArgumentError: `model` is neither a module nor what `importance_weights` returned.

    Examples:
        >>> import torch, normswap
        >>> model = normswap.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))).model
        >>> axes = normswap.plot_importance(model)
        >>> axes[0].figure.savefig("importance.png")
    """
    # A state dict is a mapping too, and refused as anything else that is no model.
    is_weights = isinstance(model, Mapping) and all(isinstance(site, SiteWeights) for site in model.values())
    weights: Any = model if is_weights else importance_weights(model)  # type: ignore[arg-type]
    if axes is None:
        from matplotlib import pyplot

        _, axes = pyplot.subplots(2, 1, sharex=True, sharey=True, figsize=(11, 4.8), layout="constrained")
    draw_importance(axes, weights)
    return axes


def draw_importance(axes: Sequence[Any], weights: Mapping[str, SiteWeights]) -> None:
    """Draw importance weights into two axes, one stacked bar per site; names of sites if there is room for them."""
    for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
        sides = [getattr(site, kind) for site in weights.values()]
        _draw_stacked_bars(axis, sides)
        axis.set_title(f"importance weights of {title}", loc="left", fontsize=10, color=_TEXT)
        axis.set(xlim=(-0.5, max(len(sides), 1) - 0.5), ylim=(0, 1), yticks=(0, 0.5, 1))
        _style(axis)
    last = axes[-1]
    if len(weights) <= _MAX_NAMED:
        names = [_plain(fqn or "(the model)") for fqn in weights]
        last.set_xticks(range(len(names)), names, rotation=90, fontsize=6.5, parse_math=False)
    else:
        last.set_xlabel("site, in the order of the network", fontsize=9, color=_TEXT)
    _add_legend(axes[0])


def _draw_stacked_bars(axis: Any, sides: Sequence[Mapping[str, float]]) -> None:
    """Draw one bar per site as polygons, one collection per branch, which stays fast for many sites."""
    from matplotlib.collections import PolyCollection

    half = 0.42 if len(sides) <= _MAX_NAMED else 0.5
    bottoms = [0.0] * len(sides)
    for branch in reversed(BRANCHES):
        boxes = []
        for index, side in enumerate(sides):
            low, high = bottoms[index], bottoms[index] + side.get(branch, 0.0)
            left, right = index - half, index + half
            boxes.append([(left, low), (left, high), (right, high), (right, low)])
            bottoms[index] = high
        axis.add_collection(PolyCollection(boxes, facecolors=COLORS[branch], edgecolors="none", label=branch))


def _add_legend(axis: Any) -> None:
    """A legend beside the axis, whose entries are in the order of the stack from top to bottom."""
    from matplotlib.patches import Patch

    handles = [Patch(color=COLORS[branch], label=branch) for branch in BRANCHES]
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1.02), frameon=False, fontsize=9)


def _style(axis: Any) -> None:
    axis.tick_params(labelsize=8, colors=_MUTED)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#b8bcc4")


def _plain(text: str) -> str:
    """The end of a text in ASCII, since a font may lack other letters and a picture the room."""
    plain = text.encode("ascii", "backslashreplace").decode()
    return plain if len(plain) <= _MAX_NAME else f"...{plain[3 - _MAX_NAME :]}"


# --- files ------------------------------------------------------------------------------------------------------------


def importance_png(weights: Mapping[str, SiteWeights]) -> bytes:
    """Return a picture of importance weights as the content of a PNG file; the same weights give the same bytes."""
    figure, axes = _new_figure(2, 1, figsize=(11, 4.8), sharex=True, sharey=True)
    draw_importance(axes, weights)
    return _to_png(figure)


def plot_run(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss, accuracy and importance weights by depth over the steps of a run into a PNG file."""
    course = read_course(records)
    depths = course.depths()
    figure, axes = _new_figure(2, 1 + len(depths), figsize=(3.2 * (1 + len(depths)), 5), squeeze=False)
    _draw_series(axes[0][0], course.losses, "training", COLORS["bn"])
    _draw_series(axes[0][0], course.evaluation_losses, "evaluation", COLORS["ln"])
    axes[0][0].set_title("loss", loc="left", fontsize=10, color=_TEXT)
    axes[0][0].set_ylim(bottom=0)
    if course.losses or course.evaluation_losses:
        axes[0][0].legend(frameon=False, fontsize=8)
    _draw_series(axes[1][0], course.figures, "", COLORS["bn"])
    axes[1][0].set_title(course.figure_label, loc="left", fontsize=10, color=_TEXT)
    axes[1][0].set_ylim(0, 102 if course.is_percent else None)
    for column, (title, fqns) in enumerate(depths.items(), start=1):
        for row, (kind, name) in enumerate(KINDS.items()):
            _draw_stack(axes[row][column], course, kind, fqns)
            axes[row][column].set_title(f"{_plain(title)}, {name}", loc="left", fontsize=10, color=_TEXT)
    if depths:
        _add_legend(axes[0][-1])
    for axis in axes.flat:
        axis.set_xlim(0, max(course.last_step, 1))
        _style(axis)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=9, color=_TEXT)
    path.write_bytes(_to_png(figure))


def _draw_series(axis: Any, points: Points, label: str, color: str) -> None:
    """Draw points with a line between them, without a line if there are only two."""
    if points:
        few = len(points) <= 2
        style = {"linestyle": "none", "marker": "o"} if few else {"marker": "." if len(points) < 20 else ""}
        # A point on the edge of the panel is drawn in whole.
        axis.plot(*zip(*points, strict=True), label=label, color=color, clip_on=not few, **style)


def _draw_stack(axis: Any, course: Course, kind: str, fqns: Sequence[str]) -> None:
    """Draw the mean importance weights of some sites over the steps; as bars if there are only two points."""
    steps, weights = course.mean_importance(kind, fqns)
    series = [weights[branch] for branch in reversed(BRANCHES)]
    colors = [COLORS[branch] for branch in reversed(BRANCHES)]
    if len(steps) > 2:
        axis.stackplot(steps, series, colors=colors)
    else:
        bottoms = [0.0] * len(steps)
        for values, color in zip(series, colors, strict=True):
            axis.bar(steps, values, bottom=bottoms, color=color, width=max(course.last_step, 1) / 8)
            bottoms = [low + value for low, value in zip(bottoms, values, strict=True)]
    axis.set(ylim=(0, 1), yticks=(0, 0.5, 1))


def _new_figure(rows: int, columns: int, *, figsize: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure without pyplot, which would look for a display and keep the figure in memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def _to_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png", metadata={"Software": "normswap"})
    return buffer.getvalue()
