"""A fine-tuning run for people: a closing table, and a picture of its course."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from normswap.checkpoints.loading import Loaded
from normswap.finetune.trainer import Outcome
from normswap.layers.gating import BRANCHES
from normswap.reports.tables import (
    calibration_table,
    heading,
    history,
    importance_table,
    not_measured_line,
    plan_summary,
    verification_table,
    worst_sites,
)
from normswap.running_stats.calibration import Calibration
from normswap.surgery.conversion import Conversion
from normswap.surgery.importance import SiteWeights
from normswap.surgery.plan import SwapPlan
from normswap.training.live_conversion import TrainingConversion
from normswap.verification.equivalence import Verification

# MERGED DOC: What the results of the library's functions print as: the tables that the command line shows for them.


def recording_console(file: TextIO, width: int) -> Console:
    """Return a console that prints plain text to `file` and remembers it for HTML."""
    return Console(file=file, width=width, record=True, highlight=False, force_terminal=False, force_jupyter=False)


def conversion(result: Conversion) -> RenderableType:
    """Return the class of the converted model above the plan that was carried out."""
    return Group(heading(type(result.model).__name__, "converted"), Text(""), plan_summary(result.plan))


def training(result: TrainingConversion) -> RenderableType:
    """Return the plan that was carried out, and what of the training was converted with it."""
    gates = (
        "in no optimizer" if result.group is None else f"learning rate {float(result.group['lr']):g}, no weight decay"
    )
    parts = {"Gates": gates, "Schedulers": ", ".join(result.schedulers), "Averages": ", ".join(result.averages)}
    lines = [Text.assemble((name, "bold"), f"  {description or 'none'}") for name, description in parts.items()]
    return Group(
        heading(type(result.model).__name__, "converted"), Text(""), plan_summary(result.plan), Text(""), *lines
    )


def plan(result: SwapPlan) -> RenderableType:
    """Return the decisions by kind, with reasons and notes."""
    return plan_summary(result)


def verification(result: Verification) -> RenderableType:
    """Return every check, and the sites that differ most if one failed."""
    return (
        verification_table(result)
        if result.passed
        else Group(verification_table(result), Text(""), worst_sites(result))
    )


def calibration(result: Calibration) -> RenderableType:
    """Return the layers whose statistics moved most."""
    return calibration_table(result)


def loaded(result: Loaded) -> RenderableType:
    """Return the class of the model, its plan, its history, and the names of what else the file holds."""
    parts: list[RenderableType] = [heading(type(result.model).__name__, "loaded"), Text("")]
    parts.append(not_measured_line("Plan", "not converted") if result.plan is None else plan_summary(result.plan))
    if result.history:
        parts += [Text(""), history(result.history)]
    if result.rest:
        parts += [Text(""), Text.assemble(("Also in the file", "bold"), f"  {', '.join(map(str, result.rest))}")]
    return Group(*parts)


def importance(result: Mapping[str, SiteWeights]) -> RenderableType:
    """Return the importance weights of every site, one row each."""
    return importance_table(result)


_KINDS = {"mean": "means", "var": "variances"}


def outcome_table(outcome: Outcome, picture: Path) -> RenderableType:
    """Return accuracy and loss before and after, what the gates learned on average, and where things are."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    before, after = outcome.before, outcome.after
    table.add_row("accuracy, %", f"{before.accuracy:.1f}", f"[bold]{after.accuracy:.1f}")
    table.add_row("loss", f"{before.loss:.3f}", f"{after.loss:.3f}")
    summary = f"{outcome.steps} steps in {outcome.seconds:.0f} s, evaluated on {after.images} images"
    parts: list[RenderableType] = [table, Text(f"  {summary}", "dim")]
    if outcome.importance:
        parts += [Text(""), average_importance(outcome.importance)]
    files = (f"wrote {outcome.model}", f"log {outcome.log}", f"picture {picture}")
    return Group(*parts, Text(""), *map(Text, files))


def describe_losses(record: Mapping[str, Any]) -> str:
    """Return the loss, the learning rate and the mean share of each branch in a record; "" without a loss."""
    if "loss" not in record:
        return ""
    sites = record["importance"].values()
    shares = [site[kind] for site in sites for kind in _KINDS]
    branch_texts = [f"{branch} {_mean_importance(shares, branch):.2f}" for branch in BRANCHES] if shares else []
    return " ".join([f"loss {record['loss']:.3f}", f"lr {record['lr']:.2g}", *branch_texts])


def average_importance(importance: Mapping[str, SiteWeights]) -> Table:
    """Return the mean over all sites of each branch's share, and how many sites still are what they were."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(Text(f"importance weights, mean of {len(importance)} sites", "bold"))
    for branch in BRANCHES:
        table.add_column(branch, justify="right")
    for kind, title in _KINDS.items():
        shares = [getattr(weights, kind) for weights in importance.values()]
        table.add_row(title, *(f"{_mean_importance(shares, branch):.2f}" for branch in BRANCHES))
    return table


def plot_run(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss, accuracy and mean importance weights over the steps of a run into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    FigureCanvasAgg(figure)
    losses = [record for record in records if "loss" in record]
    gated = [record for record in losses if record.get("importance")]
    evaluations = [record for record in records if "evaluation" in record]
    panels: Any = figure.subplots(1, 4 if gated else 2)
    panels[0].plot([r["step"] for r in losses], [r["loss"] for r in losses])
    panels[0].set(title="training loss", xlabel="step", ylim=(0, None))
    accuracies = [r["evaluation"]["accuracy"] for r in evaluations]
    panels[1].plot([r["step"] for r in evaluations], accuracies, marker="o")
    panels[1].set(title="accuracy, %", xlabel="step", ylim=(0, 102))
    for panel, (kind, title) in zip(panels[2:], _KINDS.items(), strict=False):
        steps = [record["step"] for record in gated]
        shares = [
            [_mean_importance([site[kind] for site in r["importance"].values()], branch) for r in gated]
            for branch in BRANCHES
        ]
        panel.stackplot(steps, shares, labels=BRANCHES)
        panel.set(title=f"importance, {title}", xlabel="step", ylim=(0, 1))
        panel.margins(x=0)
        panel.legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=120)


def _mean_importance(shares: Sequence[Mapping[str, float]], branch: str) -> float:
    """The mean share of a branch; a site without it gives it none."""
    return sum(share.get(branch, 0.0) for share in shares) / len(shares)
