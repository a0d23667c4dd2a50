"""Charts of the HTML report as SVG texts: importance weights over depth, and the course of a run.

Colours and fonts come from the style sheet of the page, by class, so that they follow its light and dark schemes.
"""

from collections.abc import Mapping, Sequence
from html import escape

from normswap.layers.gating import BRANCHES
from normswap.reports.training_course import Course, Points

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 300, 150, 34, 10, 8, 20


def importance_svg(sides: Sequence[Mapping[str, float] | None], titles: Sequence[str], label: str) -> str:
    """Return a chart of stacked bars that fills the width of its place, one bar per site.

    Args:
        sides: the importance weights of each site by branch; None leaves a gap.
        titles: what is shown for each site under the pointer.
        label: the text for screen readers.
    """
    count = max(len(sides), 1)
    gap = 0.06 if count <= 120 else 0.0
    paths = []
    bottoms = [0.0] * len(sides)
    for branch in reversed(BRANCHES):
        boxes = []
        for index, side in enumerate(sides):
            height = 100 * (side or {}).get(branch, 0.0)
            if height:
                top = 100 - bottoms[index] - height
                width, start = 1 - 2 * gap, f"M{_short(index + gap)} {_short(top)}"
                boxes.append(f"{start}h{_short(width)}v{_short(height)}h{_short(-width)}z")
            bottoms[index] += height
        paths.append(f'<path class="{branch}" d="{"".join(boxes)}"/>')
    hover = "".join(
        f'<rect x="{index}" width="1" height="100"><title>{escape(_printable(title))}</title></rect>'
        for index, title in enumerate(titles)
    )
    return (
        f'<svg class="stack" viewBox="0 0 {count} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{"".join(paths)}<g class="hover">{hover}</g></svg>'
    )


def series_svg(series: Mapping[str, Points], last_step: int, label: str, *, top: float | None = None) -> str:
    """Return a chart of values over steps, from step 0; points only where a series has no more than two.

    Args:
        series: the points by CSS class.
        last_step: the right end of the axis.
        label: the text for screen readers.
        top: the upper end of the axis; None for the largest value.
    """
    values = [value for points in series.values() for _, value in points]
    limit = top if top is not None else max([*values, 0.0]) or 1.0
    parts = [_frame(last_step, ["0", _number(limit / 2), _number(limit)])]
    for name, points in series.items():
        spots = [(_x(step, last_step), _y(value / limit)) for step, value in points]
        if len(spots) > 2:
            parts.append(f'<polyline class="line {name}" points="{" ".join(f"{x},{y}" for x, y in spots)}"/>')
        if len(spots) <= 20:
            parts += [f'<circle class="{name}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in spots]
    return _chart("".join(parts), label)


def course_svg(course: Course, kind: str, fqns: Sequence[str], label: str) -> str:
    """Return a chart of the mean importance weights of some sites over the steps; bars if there are only two steps."""
    steps, weights = course.mean_importance(kind, fqns)
    last_step = course.last_step
    parts = []
    bottoms = [0.0] * len(steps)
    for branch in reversed(BRANCHES):
        tops = [low + value for low, value in zip(bottoms, weights[branch], strict=True)]
        if len(steps) > 2:
            edge = [(_x(step, last_step), _y(value)) for step, value in zip(steps, tops, strict=True)]
            edge += [(_x(s, last_step), _y(value)) for s, value in reversed([*zip(steps, bottoms, strict=True)])]
            parts.append(f'<polygon class="{branch}" points="{" ".join(f"{x},{y}" for x, y in edge)}"/>')
        else:
            for step, low, high in zip(steps, bottoms, tops, strict=True):
                parts.append(_bar(branch, _x(step, last_step), _y(low), _y(high)))
        bottoms = tops
    return _chart("".join(parts) + _frame(last_step, ["0", "0.5", "1"]), label)


def _bar(name: str, center: float, low: float, high: float) -> str:
    width = 18
    left = min(max(center - width / 2, _LEFT), _WIDTH - _RIGHT - width)
    return f'<rect class="{name}" x="{_short(left)}" y="{high}" width="{width}" height="{_short(low - high)}"/>'


def _chart(content: str, label: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(_printable(label))}">'
        f"{content}</svg>"
    )


def _frame(last_step: int, marks: Sequence[str]) -> str:
    """The axes: lines at three heights with their marks, and the first and the last step."""
    lines = []
    for index, mark in enumerate(marks):
        y = _y(index / 2)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        lines.append(f'<text x="{_LEFT - 4}" y="{_short(y + 3)}" text-anchor="end">{escape(mark)}</text>')
    lines.append(f'<text x="{_LEFT}" y="{_HEIGHT - 6}">step 0</text>')
    lines.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">{last_step}</text>')
    return "".join(lines)


def _x(step: int, last_step: int) -> float:
    return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * step / max(last_step, 1), 2)


def _y(share: float) -> float:
    return round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share), 2)


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _number(value: float) -> str:
    return f"{value:.3g}"


def _printable(text: str) -> str:
    """The text with escapes for letters that steer a terminal or the direction of a line."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
