"""A fine-tuning run for people: a closing table, and a picture of its course."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from normswap.finetune.engine import Outcome
from normswap.layers.importance import BRANCHES
from normswap.surgery.gated import ImportanceWeights

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
    pace = f"{outcome.steps} steps in {outcome.seconds:.0f} s, evaluated on {after.images} images"
    parts: list[RenderableType] = [table, Text(f"  {pace}", "dim")]
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
    told = [f"{branch} {_mean(shares, branch):.2f}" for branch in BRANCHES] if shares else []
    return " ".join([f"loss {record['loss']:.3f}", f"lr {record['lr']:.2g}", *told])


def average_importance(importance: Mapping[str, ImportanceWeights]) -> Table:
    """Return the mean over all sites of each branch's share, and how many sites still are what they were."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(Text(f"importance weights, mean of {len(importance)} sites", "bold"))
    for branch in BRANCHES:
        table.add_column(branch, justify="right")
    for kind, title in _KINDS.items():
        shares = [getattr(weights, kind) for weights in importance.values()]
        table.add_row(title, *(f"{_mean(shares, branch):.2f}" for branch in BRANCHES))
    return table


def draw_course(records: Sequence[Mapping[str, Any]], path: Path) -> None:
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
            [_mean([site[kind] for site in r["importance"].values()], branch) for r in gated] for branch in BRANCHES
        ]
        panel.stackplot(steps, shares, labels=BRANCHES)
        panel.set(title=f"importance, {title}", xlabel="step", ylim=(0, 1))
        panel.margins(x=0)
        panel.legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=120)


def _mean(shares: Sequence[Mapping[str, float]], branch: str) -> float:
    """The mean share of a branch; a site without it gives it none."""
    return sum(share.get(branch, 0.0) for share in shares) / len(shares)
