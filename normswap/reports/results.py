"""The tables that results print, the same as on the command line.

Each result class names its function here (`printable_as`), which takes the result and returns a rich renderable.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from normswap.analysis.network import Analysis
from normswap.baking.bake_plan import BakePlan
from normswap.baking.network_baking import Baked
from normswap.checkpoints.derived.baked_file import BakedFile
from normswap.checkpoints.derived.reverted_file import RevertedFile
from normswap.checkpoints.file_conversion import FileConversion, NetworkConversion
from normswap.checkpoints.loading import Loaded
from normswap.exporting.export_options import Exported
from normswap.finetune.preview import RunPreview
from normswap.finetune.run_files import Outcome
from normswap.finetune.tasks.interface import Evaluation
from normswap.layers.gating import BRANCHES
from normswap.reports.analysis_tables import analysis_table
from normswap.reports.baking_tables import bake_measurement_table, bake_table
from normswap.reports.export_table import export_table
from normswap.reports.file_report import Report
from normswap.reports.plots import KINDS
from normswap.reports.tables import (
    calibration_table,
    distance_table,
    heading,
    history,
    importance_table,
    not_measured_line,
    notes_table,
    plan_summary,
    predicted_bake_table,
    read_back_line,
    verification_table,
    worst_sites,
)
from normswap.reports.training_course import group_by_depth, mean_weight
from normswap.running_stats.calibration import Calibration
from normswap.surgery.conversion import Conversion
from normswap.surgery.importance import SiteWeights
from normswap.surgery.plan import SwapPlan
from normswap.text import pluralize
from normswap.training.live_conversion import TrainingConversion
from normswap.verification.distance import Distance
from normswap.verification.equivalence import Verification

# A batch may have as many inputs as images.
_SHOWN_INPUTS = 3


def recording_console(file: TextIO, width: int) -> Console:
    """Return a console that prints plain text to `file` and remembers it for HTML."""
    return Console(file=file, width=width, record=True, highlight=False, force_terminal=False, force_jupyter=False)


def conversion(result: Conversion) -> RenderableType:
    """Return the class of the converted model and the plan that was applied."""
    return Group(heading(type(result.model).__name__, "converted"), Text(""), plan_summary(result.plan))


def training(result: TrainingConversion) -> RenderableType:
    """Return the plan that was applied, and which parts of the training were converted with the model."""
    gates = (
        "in no optimizer" if result.group is None else f"learning rate {float(result.group['lr']):.3g}, no weight decay"
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


def distance(result: Distance) -> RenderableType:
    """Return how far a network is from its original, and the sites that differ most."""
    return distance_table(result)


def bake_plan(result: BakePlan) -> RenderableType:
    """Return what the sites became, and the measured time and error."""
    return Group(bake_table(result), Text(""), bake_measurement_table(result.measurement))


def baked(result: Baked) -> RenderableType:
    """Return the class of the baked model, and what its sites became."""
    return Group(heading(type(result.model).__name__, "baked"), Text(""), bake_plan(result.plan))


def baked_file(result: BakedFile) -> RenderableType:
    """Return what the sites of a baked file became, and what happened to its other entries."""
    parts = [heading(result.file.name, result.architecture or ""), Text(""), bake_plan(result.plan)]
    return Group(*parts, *([notes_table(result.notes)] if result.notes else []))


def reverted_file(result: RevertedFile) -> RenderableType:
    """Return how many sites have their old norm again, and what happened to the other entries of the file."""
    unmeasured = "unknown: the network or the size of its input is unknown"
    error = unmeasured if result.relative_error is None else f"{result.relative_error:.1e} (relative L2)"
    kept = "the tensors are those of the network before the conversion, or as trained since"
    change = f"{len(result.changed)} with moved gates, output error {error}" if result.changed else kept
    parts: list[RenderableType] = [Text(f"{pluralize(result.sites, 'site')} reverted: {change}")]
    return Group(*parts, *([notes_table(result.notes)] if result.notes else []))


def calibration(result: Calibration) -> RenderableType:
    """Return the layers whose statistics changed most."""
    return calibration_table(result)


def analysis(result: Analysis) -> RenderableType:
    """Return the sites of an analysis, advice and plan."""
    return analysis_table(result)


def exported(result: Exported) -> RenderableType:
    """Return what was written, the free dimensions, and the error of each comparison."""
    return export_table(result)


def file_conversion(result: FileConversion) -> RenderableType:
    """Return the tables of a converted file, what was written, and the call that loads it."""
    return Group(*file_conversion_parts(result), Text(""), *map(Text, result.closing_lines()))


def file_conversion_parts(result: FileConversion) -> list[RenderableType]:
    """Return the tables of a converted file; those of an unfinished conversion are the first of the finished one."""
    parts = [part for network in result.networks for part in _network_parts(network, result.file.name)]
    if result.notes:
        parts.append(notes_table(result.notes))
    if result.read_back_error is not None:
        parts.append(read_back_line(result.read_back_error))
    return parts


def _network_parts(network: NetworkConversion, file: str) -> list[RenderableType]:
    """The plan of one network, and its verification as soon as it is known."""
    if network.already_converted:
        return []
    parts = [heading(file, network.description), Text(""), plan_summary(network.plan), Text("")]
    if network.distance is not None:
        parts.append(distance_table(network.distance))
    elif network.unverified:
        parts.append(not_measured_line("Verification", f"not measured: {network.unverified}"))
    elif network.verification is not None:
        differs_by_design = any(swap.gate == "softmax" for swap in network.plan.swaps)
        table = verification_table if differs_by_design else verification
        parts.append(table(network.verification))
    return parts


def loaded(result: Loaded) -> RenderableType:
    """Return the class of the model, its plan, its history, and the names of the other entries of the file."""
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


def report(result: Report) -> RenderableType:
    """Return the importance weights of every site, what a bake would make of them, and the recorded facts."""
    parts: list[RenderableType] = [heading(Path(result.file).name, result.facts), Text("")]
    parts += [importance_table(result.weights, result.plan), Text(""), predicted_bake_table(result.predicted_bake)]
    if result.distance is not None:
        parts += [Text(""), distance_table(result.distance)]
    elif result.verification is not None:
        parts += [Text(""), verification_table(result.verification)]
    if result.skips:
        parts += [Text(""), Text(f"{pluralize(len(result.skips), 'site')} not converted; normswap inspect shows why")]
    return Group(*parts, Text(""), history(result.history)) if result.history else Group(*parts)


def outcome_table(outcome: Outcome, picture: Path) -> RenderableType:
    """Return metrics and loss before and after, the average importance weights, and the files that were written."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    before, after = outcome.before, outcome.after
    for name in after.figures:
        table.add_row(after.label(name), before.format(name), f"[bold]{after.format(name)}")
    if before.loss is not None and after.loss is not None:
        table.add_row("loss", f"{before.loss:.3f}", f"{after.loss:.3f}")
    summary = f"{outcome.steps} steps in {outcome.seconds:.0f} s, evaluated on {after.images} images"
    parts: list[RenderableType] = [table, Text(f"  {summary}", "dim")]
    if outcome.importance:
        parts += [Text(""), average_importance(outcome.importance)]
    files = (f"wrote {outcome.model}", f"log {outcome.log}", f"picture {picture}")
    return Group(*parts, Text(""), *map(Text, files))


def preview_table(preview: RunPreview) -> RenderableType:
    """Return the sizes of a run, its learning rates over the steps, and the memory of a step."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
    inputs = ", ".join("x".join(map(str, shape)) for shape in preview.inputs[:_SHOWN_INPUTS])
    more = len(preview.inputs) - _SHOWN_INPUTS
    passes = f" x {preview.accumulation} passes" if preview.accumulation > 1 else ""
    epochs = preview.steps * preview.accumulation / preview.batches
    memory = preview.memory
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "average": memory.average,
        "activations": memory.activations,
    }
    rows = {
        "task": preview.task,
        "model": f"{preview.architecture or 'from the checkpoint'}: {preview.parameters:,} parameters, "
        f"{preview.trained:,} of them trained",
        "sites": f"{pluralize(preview.sites, 'converted norm')}",
        "inputs": inputs + (f", +{more} more" if more > 0 else ""),
        "step": f"{preview.batch_size} samples{passes}",
        "length": f"{preview.steps:,} steps, {epochs:.1f} epochs of {preview.batches:,} batches",
        "memory": f"{memory.total / 1e6:,.0f} MB: "
        + ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in parts.items() if size),
        "loss": f"{preview.loss:.3f} (first batch)",
        "output": preview.output,
    }
    for name, text in rows.items():
        table.add_row(Text(name, "bold"), text)
    rates = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("step", "learning rate", "of the gates"):
        rates.add_column(column, justify="right")
    for rate in preview.rates:
        gates = "-" if rate.importance_lr is None else f"{rate.importance_lr:.2g}"
        rates.add_row(f"{rate.step:,}", f"{rate.lr:.2g}", gates)
    return Group(table, Text(""), rates, *(Text(f"note: {note}") for note in preview.notes))


def describe_losses(record: Mapping[str, Any]) -> str:
    """Return loss, learning rate and mean importance weight of each branch in a record; "" without a loss."""
    if "loss" not in record:
        return ""
    sites = record.get("importance", {}).values()
    weights = [site[kind] for site in sites for kind in KINDS]
    branch_texts = [f"{branch} {mean_weight(weights, branch):.2f}" for branch in BRANCHES] if weights else []
    rate = [f"lr {record['lr']:.2g}"] if "lr" in record else []
    return " ".join([f"loss {record['loss']:.3f}", *rate, *branch_texts])


def describe_evaluation(values: Mapping[str, Any]) -> str:
    """Return the metrics and the loss of an evaluation in a record, such as `accuracy 97.5 %, loss 0.083`."""
    found = Evaluation.from_dict(values)
    texts = [f"{name} {found.format(name)}{' %' if found.unit else ''}" for name in found.figures]
    return ", ".join([*texts, *([] if found.loss is None else [f"loss {found.loss:.3f}"])])


def average_importance(importance: Mapping[str, SiteWeights]) -> Table:
    """Return the importance weight of each branch, averaged over all sites and over groups of sites by depth."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(Text(f"importance weights, mean of {len(importance)} sites", "bold"))
    for branch in BRANCHES:
        table.add_column(branch, justify="right")
    groups = group_by_depth(list(importance))
    for kind, title in KINDS.items():
        for name, fqns in {title: list(importance), **(groups if len(groups) > 1 else {})}.items():
            weights = [getattr(importance[fqn], kind) for fqn in fqns]
            table.add_row(
                name if name == title else f"  {name}", *(f"{mean_weight(weights, branch):.2f}" for branch in BRANCHES)
            )
    return table
