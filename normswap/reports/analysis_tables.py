"""The tables of an analysis, and its settings as text to paste."""

import json
from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from normswap.analysis.network import Analysis
from normswap.analysis.single_branches import ConvertedSite, SingleBranchPlan
from normswap.layers.gating import BRANCHES
from normswap.text import pluralize

_MAX_SITES = 12


def analysis_table(
    analysis: Analysis, *, translate: Callable[[str], str] = lambda text: text, limit: int | None = _MAX_SITES
) -> RenderableType:
    """Return the Batch Normalizations with advice, and the converted sites with the plan.

    Args:
        translate: applied to the advice; the command line replaces calls by commands.
        limit: the largest number of rows of a table; None: all.
    """
    parts: list[RenderableType] = []
    if analysis.batch_norms:
        parts += [_batch_norm_table(analysis, limit), Text("")]
        parts += [Text.assemble(("Advice", "bold"), "  ", translate(analysis.advice))]
    if analysis.converted:
        parts += [*[Text("")] * bool(parts), _branch_table(analysis, limit)]
    if analysis.plan is not None:
        parts += [
            Text(""),
            Text.assemble(("Plan", "bold"), "  ", _describe_plan(analysis.plan, len(analysis.converted))),
        ]
    return Group(*parts)


def settings_text(plan: SingleBranchPlan) -> str:
    """Return the settings of a plan as a part of a recipe."""
    lines = ["[convert.settings]"]
    for name, values in plan.settings.items():
        items = ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
        lines.append(f"{json.dumps(name)} = {{{items}}}")
    return "\n".join(lines)


def _table(first: str, *others: str, left_aligned: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, header_style="bold not dim", overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name in left_aligned else "right")
    return table


def _batch_norm_table(analysis: Analysis, limit: int | None) -> RenderableType:
    table = _table("BN site", "gap", "noise", "shift", "mean by", "std x", "advice", "", left_aligned=("advice", ""))
    ranked = sorted(analysis.batch_norms, key=lambda site: max(site.gap, site.shift), reverse=True)
    for site in ranked[:limit]:
        numbers = (site.gap, site.noise, site.shift, site.mean_distance, site.deviation_ratio)
        remark = "never updated" if site.untrained else "frozen" if site.frozen else ""
        table.add_row(
            Text(site.fqn or "(the model)", overflow="fold"),
            *(f"{number:.2f}" for number in numbers),
            analysis.site_advice[site.fqn],
            Text(remark, "dim"),
        )
    rest = [] if limit is None else ranked[limit:]
    lines: list[RenderableType] = [table]
    if rest:
        lines.append(Text(f"  {len(rest)} more with smaller gaps", "dim"))
    lines += [
        Text(
            f"  gap: outputs in training with batches of {analysis.batch_size} against evaluation, relative L2;", "dim"
        ),
        Text("  noise: due to small batches; shift: statistics of the data against running ones", "dim"),
    ]
    agreement = (
        "" if analysis.training_agreement is None else f", {analysis.training_agreement:.0%} of predictions agree"
    )
    lines.append(Text(f"  network: outputs differ by {analysis.training_error:.2g}{agreement}", "dim"))
    return Group(*lines)


def _branch_table(analysis: Analysis, limit: int | None) -> RenderableType:
    table = _table("Forced to one branch", *BRANCHES, "agree", "best", left_aligned=("best",))
    for site in analysis.converted[:limit]:
        table.add_row(Text(site.fqn or "(the model)", overflow="fold"), *_branch_cells(site))
    rest = [] if limit is None else analysis.converted[limit:]
    lines: list[RenderableType] = [table]
    if rest:
        largest = rest[-1].best.relative_error
        lines.append(Text(f"  {len(rest)} more, at their best branch at most {largest:.2g}", "dim"))
    lines.append(Text("  relative L2 error of the outputs of the network, one site at a time", "dim"))
    return Group(*lines)


def _branch_cells(site: ConvertedSite) -> list[RenderableType]:
    errors = {error.branch: error.relative_error for error in site.branches}
    cells: list[RenderableType] = [
        f"{errors[branch]:.2g}" if branch in errors else Text("-", "dim") for branch in BRANCHES
    ]
    agreement = site.best.top1_agreement
    single = Text(f"{site.best.branch}, already" if site.single else site.best.branch)
    return [*cells, "" if agreement is None else f"{agreement:.0%}", single]


def _describe_plan(plan: SingleBranchPlan, sites: int) -> str:
    budget = "" if plan.budget is None else f" within {plan.budget:g}"
    agreement = "" if plan.top1_agreement is None else f", {plan.top1_agreement:.0%} of predictions agree"
    return (
        f"{len(plan.branches)} of {pluralize(sites, 'site')} at one branch{budget}; outputs of all together differ by "
        f"{plan.relative_error:.2g}{agreement}"
    )
