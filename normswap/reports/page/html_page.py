"""The report as one HTML page without links: style, script and charts are inside it, and it loads nothing.

Every text that comes from a file is escaped, and a content security policy forbids the page to load or send anything.
The same reports give the same bytes: a page contains no date of its own.
"""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import PurePath

from normswap.layers.gating import BRANCHES
from normswap.reports.file_report import Report, SiteReport
from normswap.reports.page.svg_charts import course_svg, importance_svg, series_svg
from normswap.surgery.importance import SiteWeights
from normswap.text import pluralize

_KINDS = {"mean": "means", "var": "variances"}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_BRANCH_NAMES = {"in": "instance norm", "ln": "layer norm", "bn": "batch norm"}
_VERDICTS = {True: ("same", "good"), False: ("differs", "bad"), None: ("not judged", "dim")}


def render_page(report: Report, against: Report | None = None) -> str:
    """Return the page of a report.

    Args:
        report: of the file.
        against: of the file before, such as before fine-tuning; its charts and weights are shown beside.
    """
    sections = [
        _header(report, against),
        _importance(report, against),
        _bake(report),
        _sites(report, against),
        _skips(report),
        _verification(report),
        _course(report),
        _history(report, against),
    ]
    title = escape(_text(f"{_labels(report, against)[0]}: normswap report"))
    head = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<style>\n{_asset("page.css")}</style>\n'
    )
    body = "\n".join(filter(None, sections))
    return f"{head}</head>\n<body>\n{body}\n<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"


def _asset(name: str) -> str:
    return files("normswap.reports.page").joinpath(name).read_text(encoding="utf-8")


# --- parts of the page ------------------------------------------------------------------------------------------------


def _header(report: Report, against: Report | None) -> str:
    sites, label = report.sites, _labels(report, against)
    moved = [site.moved for site in sites if site.moved is not None]
    tiles = {
        f"{len(sites)}": f"converted {'site' if len(sites) == 1 else 'sites'}",
        **({f"{len(report.skips)} ": "sites not converted"} if report.skips else {}),
        **({f"{moved.count(0.0)} of {len(moved)}": "sites still compute exactly the old norm"} if moved else {}),
        **_mean_tiles(report),
    }
    shown = "".join(f'<div class="tile"><b>{number}</b><span>{text}</span></div>' for number, text in tiles.items())
    facts = f'<p class="facts dim">{_escaped(report.facts)}</p>'
    if against is not None:
        facts += f'<p class="facts dim">compared with {_escaped(label[1])}: {_escaped(against.facts)}</p>'
    notes = "".join(f"<p>{_escaped(note)}</p>" for note in (report.plan.notes if report.plan else ()))
    return f'<header>\n<h1>{_escaped(label[0])}</h1>\n{facts}\n<div class="tiles">{shown}</div>\n{notes}</header>'


def _mean_tiles(report: Report) -> dict[str, str]:
    """The mean importance of each branch over all sites, means and variances."""
    sides = [side for weights in report.weights.values() for side in weights]
    if not sides:
        return {}
    means = (f"{sum(side.get(branch, 0.0) for side in sides) / len(sides):.2f}" for branch in BRANCHES)
    return {" / ".join(means): f"mean importance of {' / '.join(BRANCHES)}"}


def _importance(report: Report, against: Report | None) -> str:
    """The charts of importance weights over depth, side by side with those of the file before."""
    labels = _labels(report, against)
    columns = []
    for each, label in zip([report] if against is None else [against, report], reversed(labels), strict=True):
        name = f"<h3>{_escaped(label)}</h3>" if against is not None else ""
        columns.append(f"<div>{name}{''.join(_importance_figure(each, kind) for kind in _KINDS)}</div>")
    legend = "".join(f'<span><i class="{branch}"></i>{branch}: {_BRANCH_NAMES[branch]}</span>' for branch in BRANCHES)
    return (
        f'<section>\n<h2>Importance weights over depth</h2>\n<p class="legend">{legend}</p>\n'
        f'<div class="{"columns" if against is not None else ""}">{"".join(columns)}</div>\n</section>'
    )


def _importance_figure(report: Report, kind: str) -> str:
    sites = report.sites
    sides = [getattr(site.weights, kind) if site.weights else None for site in sites]
    titles = [f"{site.fqn or '(the model)'}: {_describe_side(side)}" for site, side in zip(sites, sides, strict=True)]
    chart = importance_svg(sides, titles, f"importance weights of {_KINDS[kind]}, {pluralize(len(sites), 'site')}")
    first, last = _name(sites[0]), _name(sites[-1])
    ends = f"<span>{first}</span>" + (f"<span>{last}</span>" if len(sites) > 1 else "")
    return f'<figure><figcaption>{_KINDS[kind]}</figcaption>{chart}<div class="ends">{ends}</div></figure>'


def _describe_side(side: dict[str, float] | None) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in side.items()) if side else "not in the file"


def _bake(report: Report) -> str:
    """How many sites a bake would make plain norms, by tolerance."""
    if not report.weights:
        return ""
    rows = [
        (
            *(
                f"<b>{text}</b>" if tolerance == report.tolerance else text
                for text in (f"{tolerance:g}", *(str(counts[name]) for name in ("bn", "ln", "in", "mix")))
            ),
        )
        for tolerance, counts in report.predicted_bake.items()
    ]
    heads = ("tolerance", "BatchNorm", "GroupNorm", "InstanceNorm", "mix")
    return (
        "<section>\n<h2>Predicted bake</h2>\n<p>A site becomes a plain norm if the importance of one branch is at "
        "least 1 - tolerance, for means and for variances. Every other site stays a mix. The table of sites below uses "
        f"a tolerance of {report.tolerance:g}.</p>\n{_table(heads, rows, numeric={1, 2, 3, 4}, escaped=True)}</section>"
    )


def _sites(report: Report, against: Report | None) -> str:
    """The table of all sites, which can be sorted and filtered."""
    before = {site.fqn: site for site in against.sites} if against is not None else {}
    sites = [*report.sites, *(site._replace(weights=None) for fqn, site in before.items() if fqn not in _fqns(report))]
    change = ["change"] if against is not None else []
    heads = [
        "#",
        "site",
        "means",
        *BRANCHES,
        "variances",
        *BRANCHES,
        "moved",
        *change,
        "becomes",
        "old norm",
        "C",
        "notes",
    ]
    numeric = {"#", "C", *BRANCHES, "moved", "change"}
    head = "".join(
        f'<th scope="col"{_number_class(name in numeric)}><button type="button">{name}</button></th>' for name in heads
    )
    rows = "\n".join(
        _site_row(number, site, before.get(site.fqn), compared=against is not None)
        for number, site in enumerate(sites, start=1)
    )
    more = ""
    if against is not None:
        old, new = _escaped(_labels(report, against)[1]), _escaped(_labels(report, against)[0])
        more = f" Of two bars the upper one is {old} and the lower one {new}; change is the largest one of a weight."
    return (
        f"<section>\n<h2>Sites</h2>\n<p>moved: the importance that has left the branch of the old norm.{more}</p>\n"
        '<input id="filter" type="search" placeholder="Filter sites" aria-label="Filter sites">\n'
        f'<div class="scroll tall"><table class="sites sortable"><thead><tr>{head}</tr></thead><tbody>\n{rows}\n'
        "</tbody></table></div>\n</section>"
    )


def _site_row(number: int, site: SiteReport, before: SiteReport | None, *, compared: bool) -> str:
    swap, old = site.swap, before.weights if before else None
    cells = [
        _number_cell(str(number)),
        f'<td class="fqn">{_name(site)}</td>',
    ]
    for kind in _KINDS:
        side = getattr(site.weights, kind) if site.weights else None
        bars = [getattr(old, kind) if old else None, side] if compared else [side]
        cells.append(f'<td data-v="{side.get("bn", 0.0) if side else ""}">{"".join(map(_bar, bars))}</td>')
        cells += [_weight_cell(side.get(branch) if side else None) for branch in BRANCHES]
    cells.append(_weight_cell(site.moved))
    if compared:
        cells.append(_weight_cell(_largest_change(old, site.weights)))
    old_norm = swap.class_name if swap else ""
    cells += [
        f"<td>{_escaped(site.becomes)}</td>",
        f'<td title="{_escaped(old_norm)}">{_escaped(old_norm.rpartition(".")[2])}</td>',
        _number_cell(str(swap.num_features) if swap else ""),
        f"<td>{_escaped(', '.join(site.notes))}</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _largest_change(before: SiteWeights | None, after: SiteWeights | None) -> float | None:
    """The largest change of an importance weight; a branch that a site does not have counts 0."""
    if before is None or after is None:
        return None
    return max(
        abs(new.get(branch, 0.0) - old.get(branch, 0.0))
        for old, new in zip(before, after, strict=True)
        for branch in BRANCHES
    )


def _bar(side: dict[str, float] | None) -> str:
    parts = "".join(
        f'<i class="{branch}" style="width:{100 * side[branch]:.4g}%"></i>'
        for branch in reversed(BRANCHES)
        if side and side.get(branch)
    )
    return f'<span class="bar">{parts}</span>'


def _skips(report: Report) -> str:
    rows = [(skip.fqn or "(the model)", skip.class_name, skip.reason) for skip in report.skips]
    return _section("Not converted", _table(("site", "class", "reason"), rows, fqn=True)) if rows else ""


def _verification(report: Report) -> str:
    """Every check of the recorded verification, or the distance of a network that starts without `bn`."""
    found, distance = report.verification, report.distance
    if distance is not None:
        agreement = (
            "" if distance.top1_agreement is None else f"; {distance.top1_agreement:.1%} of predictions are the same"
        )
        return _section(
            "Distance from the original",
            f"<p>Relative L2 error of the outputs: {distance.relative_error:.3g}{agreement} (on "
            f"{_escaped(distance.inputs)}).</p>",
        )
    if found is None:
        return _section("Verification", "<p>None is recorded in this file.</p>")
    rows = []
    for check in found.checks:
        verdict, style = _VERDICTS[check.passed]
        limit = _error(check.limit) if check.passed is not None else ""
        rows.append((_escaped(check.name), _error(check.error), limit, f'<span class="{style}">{verdict}</span>'))
    notes = dict.fromkeys((*(check.note for check in found.checks if check.note), *found.notes))
    text = f"Relative L2 errors in {found.precision} on {found.inputs}, judged by {found.judged_by}."
    lines = "".join(f'<p class="dim">{_escaped(line)}</p>' for line in (text, *notes))
    return _section(
        "Verification", _table(("check", "error", "limit", "verdict"), rows, numeric={1, 2}, escaped=True) + lines
    )


def _course(report: Report) -> str:
    course = report.course
    if not course:
        return ""
    last = course.last_step
    losses = {"bn": course.losses, "ln": course.evaluation_losses}
    legend = (
        '<span class="legend"><span><i class="bn"></i>training</span><span><i class="ln"></i>evaluation</span></span>'
    )
    charts = [
        _chart(f"loss {legend}", series_svg(losses, last, "loss over steps")),
        _chart(
            course.figure_label,
            series_svg(
                {"bn": course.figures},
                last,
                f"{course.figure_name} over steps",
                top=100 if course.is_percent else None,
            ),
        ),
    ]
    for title, fqns in course.depths().items():
        for kind, name in _KINDS.items():
            text = f"{title}, {name}"
            charts.append(
                _chart(_escaped(text), course_svg(course, kind, fqns, f"importance weights over steps: {text}"))
            )
    return _section("Training", f'<div class="charts">{"".join(charts)}</div>')


def _chart(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def _history(report: Report, against: Report | None) -> str:
    parts = []
    for each, label in zip((report, against), _labels(report, against), strict=False):
        if each is None or not each.history:
            continue
        rows = [
            (
                step.action,
                step.date.removesuffix("+00:00").replace("T", " "),
                f"normswap {step.normswap}",
                ", ".join(
                    filter(None, (step.source, step.detail, f"SHA-256 {step.sha256[:12]}" if step.sha256 else None))
                ),
            )
            for step in each.history
        ]
        name = f"<h3>{_escaped(label)}</h3>" if against is not None else ""
        parts.append(name + _table(("step", "when (UTC)", "by", "from"), rows))
    return _section("History", "".join(parts)) if parts else ""


# --- elements ---------------------------------------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>"


def _table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numeric: set[int] | None = None,
    fqn: bool = False,
    escaped: bool = False,
) -> str:
    """A table of texts.

    Args:
        numeric: the columns that are aligned right.
        fqn: whether the first column contains names of modules.
        escaped: whether the cells are HTML already.
    """
    numbers = numeric or set()
    head = "".join(f'<th scope="col"{_number_class(i in numbers)}>{name}</th>' for i, name in enumerate(heads))
    lines = []
    for row in rows:
        cells = row if escaped else [_escaped(cell) for cell in row]
        styles = (' class="fqn"' if fqn and i == 0 else _number_class(i in numbers) for i in range(len(row)))
        lines.append("".join(f"<td{style}>{cell}</td>" for style, cell in zip(styles, cells, strict=True)))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    table = f'<table class="plain"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _number_class(is_number: bool) -> str:
    return ' class="n"' if is_number else ""


def _number_cell(text: str) -> str:
    return f'<td class="n">{text}</td>'


def _weight_cell(value: float | None) -> str:
    if value is None:
        return '<td class="n"></td>'
    style = "n zero" if value == 0 else "n"
    return f'<td class="{style}" data-v="{value:.6g}">{value:.2f}</td>'


def _error(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def _fqns(report: Report) -> set[str]:
    return {site.fqn for site in report.sites}


def _name(site: SiteReport) -> str:
    return _escaped(site.fqn or "(the model)")


def _labels(report: Report, against: Report | None) -> tuple[str, ...]:
    """The names of the files: without folders, unless both have the same name."""
    paths = [report.file] if against is None else [report.file, against.file]
    names = [PurePath(path).name or path for path in paths]
    return tuple(names if len(set(names)) == len(names) else paths)


def _escaped(text: str) -> str:
    return escape(_text(text))


def _text(text: str) -> str:
    """The text with escapes for letters that no page should contain: control characters and changes of direction."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
