"""`normswap inspect`: shows what a file contains and what a conversion would do; writes nothing."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.checkpoints.file_output import NO_ARCHITECTURE
from normswap.checkpoints.io.atomic_files import check_readable
from normswap.cli.console import one_line_failures, print_json, stage, translate_arguments, translate_plan
from normswap.cli.options import (
    InputSpec,
    arch_option,
    entry_option,
    input_option,
    json_option,
    kinds_option,
    open_model,
    read_file,
    read_header,
    trust_option,
)
from normswap.errors import AmbiguityError, CheckpointError, NothingToDo

if TYPE_CHECKING:
    from normswap.checkpoints.architecture.identification import Identification
    from normswap.checkpoints.content.state_dict import Survey
    from normswap.checkpoints.loading import OpenedModel
    from normswap.checkpoints.reading import CheckpointHeader
    from normswap.checkpoints.record import Record
    from normswap.surgery.importance import SiteWeights
    from normswap.surgery.plan import SwapPlan

_ADVICE = {
    "--arch path/file.py:function": "if a function of yours builds the model",
    "--arch timm:NAME": "if it is a model of timm; torchvision:NAME and hf:FOLDER likewise",
}
_BY_NAMES = "--arch none --no-verify"


# --- sites and records ------------------------------------------------------------------------------------------------


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

    FILE is any checkpoint, or a folder of shards. For a converted file the plan, the verification, the history and the
    importance weights are shown, which needs no --arch. If the architecture is unknown, or with --arch none, the norms
    are listed by the names of their tensors, with the options to type for more. Exit codes: 0 success; 1 no norms in
    the file; 2 error.
    """
    check_readable(file)
    header = read_header(file)
    record = header.record
    if record is not None and entry is not None:
        record = read_file(header, trust=trust, entry=entry).record
    elif record is not None and len(record.entries) > 1:
        if options["arch"] not in (None, NO_ARCHITECTURE):
            names = ", ".join(sorted(record.entries))
            first = min(record.entries)
            raise click.UsageError(
                f"--arch: {file} contains several converted models ({names}): choose one, such as --entry {first}"
            )
        _show_networks(file, header, record, trust=trust, as_json=as_json)
        return
    if record is not None and record.plan is not None and record.plan.swaps:
        if record.payload == "state dict" and options["arch"] not in (None, NO_ARCHITECTURE):
            # The record is shown, so an architecture that contradicts it has to be an error.
            checkpoint = read_file(header, trust=trust, entry=entry, arch=options["arch"])
            open_model(checkpoint, arch=options["arch"], inputs=(), trust=trust)
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

    from normswap.reports.tables import bullets, heading, history, plan_summary, site_table
    from normswap.surgery.discovery.sites import find_norm_sites
    from normswap.surgery.planning import plan_swaps

    opened = _open_model(header, arch=arch, inputs=inputs, entry=entry, trust=trust)
    if opened is None:
        _show_survey(header, entry=entry, trust=trust and not header.loads_weights_only(arch), as_json=as_json)
        return
    with stage("finding norm sites"):
        sites = find_norm_sites(opened.model, opened.inputs)
        plan = translate_plan(plan_swaps(opened.model, opened.inputs, kinds=kinds or ("bn",)))
    header.origin.check_unchanged()
    steps = header.record.history if header.record else ()
    if as_json:
        facts: dict[str, Any] = {"file": str(file), "architecture": opened.architecture, "converted": False}
        facts |= {"history": [asdict(step) for step in steps]} if steps else {}
        print_json({**facts, "sites": [asdict(site) for site in sites], "plan": plan.to_dict()})
        return
    console = Console(highlight=False)
    console.print(heading(file.name, opened.checkpoint.describe(opened.architecture)))
    notes = opened.name_notes
    more = [*([bullets(map(translate_arguments, notes))] if notes else []), *([history(steps)] if steps else [])]
    for part in (site_table(sites, plan), plan_summary(plan), *more):
        console.print()
        console.print(part)


def _open_model(
    header: "CheckpointHeader", *, arch: str | None, inputs: Sequence[InputSpec], entry: str | None, trust: bool
) -> "OpenedModel | None":
    """The model in a file, None if its architecture or the choice among several sets of weights is unknown."""
    if arch == NO_ARCHITECTURE:
        return None
    try:
        checkpoint = read_file(header, trust=trust, entry=entry, arch=arch)
    except CheckpointError:
        if (
            entry is None
            and arch is None
            and not header.origin.is_closed
            and _has_multiple_weights(header, trust=trust)
        ):
            return None
        raise
    try:
        return open_model(checkpoint, arch=arch, inputs=inputs, trust=trust)
    except AmbiguityError:
        return None


def _show_networks(file: Path, header: "CheckpointHeader", record: "Record", *, trust: bool, as_json: bool) -> None:
    """Show all converted networks of a file."""
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

    from normswap.checkpoints.reading import describe_size
    from normswap.reports.baking_tables import bake_table
    from normswap.reports.tables import (
        distance_table,
        heading,
        history,
        importance_table,
        not_measured_line,
        plan_summary,
        verification_table,
    )

    weights, plan = _weights(header, record, trust=trust), translate_plan(plan)
    if as_json:
        print_json(_converted_document(file, record, plan, weights))
        return
    verification, distance = record.verification, record.distance
    facts = (f"converted {record.payload}", record.architecture, describe_size(file))
    console = Console(highlight=False)
    console.print(heading(file.name, ", ".join(fact for fact in facts if fact)))
    for part in (
        plan_summary(plan),
        distance_table(distance)
        if distance
        else verification_table(verification)
        if verification
        else not_measured_line("Verification", "none is recorded in this file"),
        history(record.history),
        bake_table(record.baked)
        if record.baked is not None
        else importance_table(weights, plan)
        if weights is not None
        else not_measured_line("Importance weights", "pickled: add --trust"),
    ):
        console.print()
        console.print(part)


def _weights(header: "CheckpointHeader", record: "Record", *, trust: bool) -> "dict[str, SiteWeights] | None":
    """The importance weights in the file, None if reading them would run code."""
    from normswap.checkpoints.reading import stored_importance_weights

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
        **({"distance": record.distance.to_dict()} if record.distance else {}),
        "history": [asdict(step) for step in record.history],
        "importance_weights": weights and {fqn: found._asdict() for fqn, found in weights.items()},
    }


# --- unknown architectures --------------------------------------------------------------------------------------------


def _has_multiple_weights(header: "CheckpointHeader", *, trust: bool) -> bool:
    """Whether a file contains several sets of weights, of which `--entry` selects one."""
    from normswap.checkpoints.content.entries import find_weights
    from normswap.checkpoints.reading import read_content

    return len(find_weights(read_content(header, trust=trust, mmap=True))) > 1


def _show_survey(header: "CheckpointHeader", *, entry: str | None, trust: bool, as_json: bool) -> None:
    """Print the norms in a file by the names of their tensors: in all its weights, or in those at `entry`.

    Raises:
        CheckpointError: there are no weights at `entry`, or the file changed while it was read.
        NothingToDo: there are no norm tensors; this is raised after printing.
    """
    from normswap.checkpoints.content.entries import read_contents
    from normswap.checkpoints.content.state_dict import survey
    from normswap.checkpoints.reading import read_content

    content = read_content(header, trust=trust, mmap=True)
    found = survey(content)
    if entry is not None:
        read_contents(content, entry=entry)
        found = type(found)(tuple(one for one in found.weights if one.entry == entry), found.optimizers)
    identified = _identify(content, entry)
    header.origin.check_unchanged()
    if as_json:
        print_json(_survey_document(header, found, identified))
    else:
        _print_survey(header, found, identified)
    if not any(weights.norms for weights in found.weights):
        raise NothingToDo(f"{header.path}: no tensor in this file has the name of a norm: nothing to convert")


def _identify(content: Any, entry: str | None) -> "Identification | None":
    """The architectures that fit the selected weights, None if several sets of weights are equally likely."""
    from normswap.checkpoints.architecture.identification import get_state_dict, identify_state_dict
    from normswap.checkpoints.content.entries import get_entry, read_contents

    try:
        weights = get_entry(content, read_contents(content, entry=entry).weights)
    except CheckpointError:
        return None
    with stage("comparing with all architectures"):
        return identify_state_dict(get_state_dict(weights), content)


def _survey_document(
    header: "CheckpointHeader", found: "Survey", identified: "Identification | None"
) -> dict[str, Any]:
    weights = [{**asdict(one), "batch_norms": len(one.batch_norms)} for one in found.weights]
    return {
        "file": str(header.path),
        "container": header.file_format,
        "architecture": None,
        "converted": False,
        "weights": weights,
        "optimizers": list(found.optimizers),
        "candidates": [group[0].architecture for group in identified.functions] if identified else [],
        "nearest": [match.architecture for match in identified.matches] if identified else [],
        "next": list(_suggest_options(found, identified)),
    }


def _print_survey(header: "CheckpointHeader", found: "Survey", identified: "Identification | None") -> None:
    from rich.console import Console

    from normswap.checkpoints.reading import describe_size
    from normswap.reports.tables import bullets, heading, identification, weights_table

    console = Console(highlight=False)
    facts = ("architecture unknown", header.file_format, describe_size(header.path))
    parts = [heading(header.path.name, ", ".join(facts)), *map(weights_table, found.weights)]
    parts += [bullets(f"{name}: the state of an optimizer" for name in found.optimizers)] if found.optimizers else []
    parts += [identification(identified)] if identified is not None else []
    for number, part in enumerate(parts):
        if number:
            console.print()
        console.print(part)
    console.print()
    for option, meaning in _suggest_options(found, identified).items():
        console.print(f"type: {option}  ({meaning})", markup=False, soft_wrap=True)


def _suggest_options(found: "Survey", identified: "Identification | None") -> dict[str, str]:
    """The options to type next, each with its purpose."""
    entries = {f"--entry {one.entry}": "to choose these weights" for one in found.weights if one.entry}
    fitting = {
        f"--arch {group[0].architecture}": "fits all tensors" for group in (identified.functions if identified else ())
    }
    count = sum(len(one.batch_norms) for one in found.weights) if len(found.weights) == 1 else 0
    names = {_BY_NAMES: f"with normswap convert: converts the {count} batch norms by their names"} if count else {}
    return {**(entries if len(entries) > 1 else {}), **(fitting or _ADVICE), **names}
