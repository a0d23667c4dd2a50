"""`normswap inspect`: what a file holds and what would become of it; nothing is written."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.checkpoints.io.atomic_files import check_readable
from normswap.cli.failures import one_line_failures
from normswap.cli.open_model import OpenedModel, describe_content, describe_size, open_model, read_file, read_header
from normswap.cli.options import (
    InputSpec,
    arch_option,
    entry_option,
    input_option,
    json_option,
    kinds_option,
    print_json,
    trust_option,
)
from normswap.cli.progress import stage
from normswap.cli.survey import has_multiple_weights, print_survey
from normswap.cli.wish import NO_ARCHITECTURE
from normswap.errors import AmbiguityError, CheckpointError

if TYPE_CHECKING:
    from normswap.checkpoints.loading import CheckpointHeader
    from normswap.checkpoints.record import Record
    from normswap.surgery.importance import SiteWeights
    from normswap.surgery.plan import SwapPlan


@click.command("inspect", short_help="Show the norm sites of a file, or its record once converted.")
@click.argument("file", type=click.Path(path_type=Path))
@arch_option
@entry_option
@input_option
@kinds_option
@trust_option
@json_option
@one_line_failures
def inspect_command(file: Path, trust: bool, as_json: bool, entry: str | None, **options: Any) -> None:
    """Show the norm sites of FILE with the decision for each, or the record of a converted FILE.

    FILE is any checkpoint, or a folder of shards. Of a converted file the plan, the proof, the history and the
    importance weights are shown, which needs no --arch. If nothing tells the architecture, or with --arch none, the
    norms are shown that the names of the tensors tell, and what to type for more. Exit status 1: there are none.
    """
    check_readable(file)
    header = read_header(file)
    record = header.record
    if record is not None and entry is not None:
        record = read_file(header, trust=trust, entry=entry).record
    elif record is not None and len(record.entries) > 1:
        _show_networks(file, header, record, trust=trust, as_json=as_json)
        return
    if record is not None and record.plan is not None and record.plan.swaps:
        _show_converted(file, header, record, record.plan, trust=trust, as_json=as_json)
    else:
        _show_sites(file, header, **options, entry=entry, trust=trust, as_json=as_json)


def _show_sites(
    file: Path,
    header: "CheckpointHeader",
    *,
    arch: str | None,
    inputs: Sequence[InputSpec],
    kinds: Sequence[str] | None,
    entry: str | None,
    trust: bool,
    as_json: bool,
) -> None:
    from rich.console import Console

    from normswap.reports.tables import heading, history, plan_summary, site_table
    from normswap.surgery.discovery.sites import find_norm_sites
    from normswap.surgery.planning import plan_swaps

    opened = _open_model(header, arch=arch, inputs=inputs, entry=entry, trust=trust)
    if opened is None:
        print_survey(header, entry=entry, trust=trust and not header.loads_weights_only(arch), as_json=as_json)
        return
    with stage("finding norm sites"):
        sites = find_norm_sites(opened.model, opened.inputs)
        plan = plan_swaps(opened.model, opened.inputs, kinds=kinds or ("bn",))
    header.origin.check_unchanged()
    steps = header.record.history if header.record else ()
    if as_json:
        facts: dict[str, Any] = {"file": str(file), "architecture": opened.architecture, "converted": False}
        facts |= {"history": [asdict(step) for step in steps]} if steps else {}
        print_json({**facts, "sites": [asdict(site) for site in sites], "plan": plan.to_dict()})
        return
    console = Console(highlight=False)
    console.print(heading(file.name, describe_content(opened.checkpoint, opened.architecture)))
    for part in (site_table(sites, plan), plan_summary(plan), *([history(steps)] if steps else [])):
        console.print()
        console.print(part)


def _open_model(
    header: "CheckpointHeader", *, arch: str | None, inputs: Sequence[InputSpec], entry: str | None, trust: bool
) -> OpenedModel | None:
    """The model in a file, or None if nobody knows its architecture or which of several weights are meant."""
    if arch == NO_ARCHITECTURE:
        return None
    try:
        checkpoint = read_file(header, trust=trust, entry=entry, arch=arch)
    except CheckpointError:
        if entry is None and arch is None and not header.origin.is_closed and has_multiple_weights(header, trust=trust):
            return None
        raise
    try:
        return open_model(checkpoint, arch=arch, inputs=inputs, trust=trust)
    except AmbiguityError:
        return None


def _show_networks(file: Path, header: "CheckpointHeader", record: "Record", *, trust: bool, as_json: bool) -> None:
    """All converted networks of a file, one after the other."""
    documents = {}
    for entry in sorted(record.entries):
        seen = record.for_entry(entry)
        if seen.plan is None:
            continue
        if as_json:
            documents[entry] = _converted_document(file, seen, seen.plan, _weights(header, seen, trust=trust))
            continue
        click.echo(f"entry {entry}")
        _show_converted(file, header, seen, seen.plan, trust=trust, as_json=False)
        click.echo()
    if as_json:
        print_json({"file": str(file), "converted": True, "networks": documents})


def _show_converted(
    file: Path, header: "CheckpointHeader", record: "Record", plan: "SwapPlan", *, trust: bool, as_json: bool
) -> None:
    from rich.console import Console

    from normswap.reports.tables import (
        heading,
        history,
        importance_table,
        not_measured_line,
        plan_summary,
        verification_table,
    )

    weights = _weights(header, record, trust=trust)
    if as_json:
        print_json(_converted_document(file, record, plan, weights))
        return
    verification = record.verification
    facts = (f"converted {record.payload}", record.architecture, describe_size(file))
    console = Console(highlight=False)
    console.print(heading(file.name, ", ".join(fact for fact in facts if fact)))
    for part in (
        plan_summary(plan),
        verification_table(verification)
        if verification
        else not_measured_line("Parity", "no proof travels with this file"),
        history(record.history),
        importance_table(weights, plan)
        if weights is not None
        else not_measured_line("Importance weights", "pickled: add --trust"),
    ):
        console.print()
        console.print(part)


def _weights(header: "CheckpointHeader", record: "Record", *, trust: bool) -> "dict[str, SiteWeights] | None":
    """The importance weights in the file, or None where only running its code would show them."""
    from normswap.checkpoints.loading import stored_importance_weights

    if record.payload == "module" and not trust:
        return None
    weights = stored_importance_weights(read_file(header, trust=trust, entry=record.entry))
    header.origin.check_unchanged()
    return weights


def _converted_document(
    file: Path, record: "Record", plan: "SwapPlan", weights: "dict[str, SiteWeights] | None"
) -> dict[str, Any]:
    return {
        "file": str(file),
        "architecture": record.architecture,
        "converted": True,
        "plan": plan.to_dict(),
        "verification": record.verification and record.verification.to_dict(),
        "history": [asdict(step) for step in record.history],
        "importance_weights": weights and {fqn: found._asdict() for fqn, found in weights.items()},
    }
