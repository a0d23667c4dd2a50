"""What the results of the library's functions print as: the tables that the command line shows for them."""

from collections.abc import Mapping
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.text import Text

from normswap.calibration import Calibration
from normswap.checkpoints.checkpoint import Loaded
from normswap.finetune.live_training import TrainingConversion
from normswap.reports.tables import (
    calibration_table,
    heading,
    history,
    importance_table,
    missing,
    parity,
    plan_summary,
    worst_sites,
)
from normswap.surgery.conversion import Conversion
from normswap.surgery.gated import ImportanceWeights
from normswap.surgery.plan import SwapPlan
from normswap.verification import Verification


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
    lines = [Text.assemble((name, "bold"), f"  {said or 'none'}") for name, said in parts.items()]
    return Group(
        heading(type(result.model).__name__, "converted"), Text(""), plan_summary(result.plan), Text(""), *lines
    )


def plan(result: SwapPlan) -> RenderableType:
    """Return the decisions by kind, with reasons and notes."""
    return plan_summary(result)


def verification(result: Verification) -> RenderableType:
    """Return every check, and the sites that differ most if one failed."""
    return parity(result) if result.passed else Group(parity(result), Text(""), worst_sites(result))


def calibration(result: Calibration) -> RenderableType:
    """Return the layers whose statistics moved most."""
    return calibration_table(result)


def loaded(result: Loaded) -> RenderableType:
    """Return the class of the model, its plan, its history, and the names of what else the file holds."""
    parts: list[RenderableType] = [heading(type(result.model).__name__, "loaded"), Text("")]
    parts.append(missing("Plan", "not converted") if result.plan is None else plan_summary(result.plan))
    if result.history:
        parts += [Text(""), history(result.history)]
    if result.rest:
        parts += [Text(""), Text.assemble(("Also in the file", "bold"), f"  {', '.join(map(str, result.rest))}")]
    return Group(*parts)


def importance(result: Mapping[str, ImportanceWeights]) -> RenderableType:
    """Return the importance weights of every site, one row each."""
    return importance_table(result)
