"""`normswap convert`: plan, swap, prove, write - and write nothing unless the proof holds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.checkpoints.io.atomic_files import write_text
from normswap.checkpoints.io.memory import return_freed_memory
from normswap.cli.failures import one_line_failures
from normswap.cli.open_model import (
    OpenedModel,
    describe_content,
    describe_size,
    get_size,
    open_model,
    read_file,
    read_header,
)
from normswap.cli.options import (
    InputSpec,
    archs_option,
    entries_option,
    json_option,
    kinds_option,
    named_inputs_option,
    print_json,
    tolerance_option,
    trust_option,
)
from normswap.cli.outputs import dropped_entries, merge_notes
from normswap.cli.progress import stage
from normswap.cli.wish import ConvertOptions, options_per_entry
from normswap.cli.writing import ConvertedWeights, OutputWriter
from normswap.errors import ArchitectureError, CheckpointError, NothingToDo, PlanError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from normswap.checkpoints.converted_content import ConvertedContent
    from normswap.checkpoints.loading import Checkpoint
    from normswap.checkpoints.record import Record
    from normswap.surgery.conversion import Conversion
    from normswap.surgery.plan import SwapPlan
    from normswap.verification.equivalence import Verification

# Zoos whose models `normswap.load` builds from the name in a file alone.
_KNOWN_ZOOS = ("timm:", "torchvision:")
_GATES = ("simplex", "softmax")


@click.command("convert", short_help="Convert a file and write the model to a new one.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="What to write; NAME.safetensors becomes that, anything else a torch file. Default: model.normswap.pt beside "
    "model.pt, of the same kind.",
)
@archs_option
@entries_option
@named_inputs_option
@click.option("--include", multiple=True, metavar="PATTERN", help="Swap only these sites: glob on names, or re:REGEX.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these sites as they are; wins over --include.")
@kinds_option
@click.option(
    "--gate",
    type=click.Choice(_GATES),
    help="simplex (default) starts as the same function; softmax, the published gate, at the uniform mix.",
)
@click.option(
    "--synchronize",
    is_flag=True,
    help="In training, take the batch of all processes in the BN branch, as SyncBatchNorm does.",
)
@click.option("--plan", type=click.Path(path_type=Path), help="Carry out a plan stored by --save-plan.")
@click.option("--save-plan", type=click.Path(path_type=Path), help="Store the plan as JSON, also with --dry-run.")
@click.option(
    "--weights-only", is_flag=True, help="Leave out what is not the converted weights: optimizer, epoch, EMA."
)
@click.option("--verify/--no-verify", default=True, help="Measure that the function is the same (default).")
@tolerance_option
@click.option("--dry-run", is_flag=True, help="Do everything but write the model.")
@trust_option
@click.option("--force", is_flag=True, help="Replace existing output files.")
@json_option
@one_line_failures
@return_freed_memory()
def convert_command(
    file: Path,
    output: Path | None,
    archs: tuple[str, ...],
    entries: tuple[str, ...],
    inputs: tuple[InputSpec, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Swap Batch Normalization (and more, see --kinds) for Switchable Normalization in FILE, into a new file.

    FILE is any checkpoint: a state dict, a training checkpoint (its EMA copy and optimizer are carried along), a
    pickled module, an exported program, a folder of shards. The converted model is compared with the original, and
    written only if it computes the same function; what cannot be compared is written only with --no-verify. With
    --arch none the tensors are converted by their names alone. Exit codes: 0 success; 1 nothing to convert or not the
    same function; 2 error.
    """
    wishes = options_per_entry(
        ConvertOptions(file, output, arch=None, entry=None, inputs=(), **options), entries, archs, inputs
    )
    document: dict[str, Any] = {"file": str(file), "output": None, "written": False, "verification": None}
    nothing_to_do: NothingToDo | None = None
    try:
        for wish in wishes:
            wish.check()
        from rich.console import Console

        _convert(wishes, Console(highlight=False, quiet=as_json), document)
    except NothingToDo as error:
        nothing_to_do = error
    except KeyboardInterrupt:
        written = f"{wishes[0].target} was written" if document["written"] else "nothing was written"
        raise KeyboardInterrupt(f"interrupted; {written}") from None
    if as_json:
        print_json(document)
    if nothing_to_do is not None:
        raise nothing_to_do


def _convert(wishes: Sequence[ConvertOptions], console: "Console", document: dict[str, Any]) -> None:
    """The command itself; what is known so far is printed, and noted in `document`."""
    from normswap.checkpoints.loading import select_entry
    from normswap.checkpoints.saving import sha256_in_background
    from normswap.reports.tables import notes_table

    wish = wishes[0]
    header = read_header(wish.file, output=None if wish.dry_run else wish.target)
    for each in wishes:
        _refuse_converted(
            each, header.record and header.record.for_entry(each.entry or header.record.entry or ""), document
        )
    stored = _load_plan(wish.plan)
    checkpoint = read_file(header, trust=wish.trust, entry=wish.entry, arch=wish.arch)
    container = wish.container(checkpoint)
    digest = None if wish.dry_run else sha256_in_background(checkpoint.origin.copy)
    notes: list[str] = []
    for wish in wishes:
        part = document if len(wishes) == 1 else document.setdefault("networks", {}).setdefault(wish.entry, {})
        _refuse_converted(wish, checkpoint.record, part)
        _check_values(checkpoint)
        convert_weights = _convert_by_names if wish.without_architecture else _convert_with_model
        result = convert_weights(wish, checkpoint, stored, console, part)
        converted = _convert_file_content(wish, checkpoint, result)
        writing = OutputWriter(wish, checkpoint, result, container, digest)
        notes = merge_notes(notes, (*converted.notes, *writing.notes), [w.entry for w in wishes])
        if wish is not wishes[-1]:
            next_entry = wishes[wishes.index(wish) + 1].entry or ""
            checkpoint = select_entry(checkpoint, converted.content, writing.record(), next_entry)
    if notes:
        console.print(notes_table(notes))
    document["carried"] = notes
    content = writing.prepare_content(converted.content)
    if wish.dry_run:  # else the writer looks, once
        checkpoint.origin.check_unchanged()
    if not wish.dry_run:
        writing.write(content, console)
        document |= {"output": str(wish.target), "written": True, "bytes": get_size(wish.target)}
    if wish.save_plan is not None:
        write_text(wish.save_plan, result.plan.to_json())
    _print_summary(console, wish, checkpoint, result)


def _convert_with_model(
    wish: ConvertOptions,
    checkpoint: "Checkpoint",
    stored: "SwapPlan | None",
    console: "Console",
    document: dict[str, Any],
) -> ConvertedWeights:
    """Build the model, convert it, and hold it against the original."""
    from normswap.checkpoints.converted_content import collect_added_state
    from normswap.checkpoints.saving import originals
    from normswap.reports.tables import not_measured_line, verification_table
    from normswap.surgery.conversion import convert

    try:
        opened = open_model(checkpoint, arch=wish.arch, inputs=wish.inputs, trust=wish.trust)
    except ArchitectureError as error:
        if error.convertible_by_names and not (wish.inputs or wish.kinds or wish.plan or wish.gate or wish.synchronize):
            raise type(error)(f"{error}; or convert by tensor names: --arch none --no-verify") from error
        raise
    with stage("finding norm sites"):
        plan = stored or _make_plan(wish, opened)
    _print_plan(
        console, document, describe_content(checkpoint, opened.architecture), checkpoint, plan, opened.architecture
    )
    if wish.verify and opened.inputs is None:
        raise _unverifiable("the input size is unknown", "--input 2x3x224x224 (batch x channels x height x width)")
    with stage("swapping"):
        # What is built here is only looked at: one set of parameters serves both.
        alone = checkpoint.payload == "state dict"
        model = _copy_model(checkpoint, opened) if checkpoint.payload != "module" else opened.model
        conversion = convert(model, plan=plan, inplace=checkpoint.payload != "module")
    new, sites = collect_added_state(opened.model.state_dict(), conversion.model), originals(conversion.model, plan)
    verification = _verify_conversion(wish, opened, conversion, in_place=alone)
    document["verification"] = verification and verification.to_dict()
    console.print(
        verification_table(verification) if verification else not_measured_line("Parity", "not measured: --no-verify")
    )
    _require_verified(console, plan, verification)
    module = None if alone else conversion.model
    notes = opened.built.fit.notes(opened.architecture or plan.model_class)
    return ConvertedWeights(
        plan, opened.built.names, new, opened.architecture, module, sites, verification, opened.inputs, notes
    )


def _copy_model(checkpoint: "Checkpoint", opened: OpenedModel) -> "nn.Module":
    """The same model again, on the same parameters."""
    from normswap.surgery.graphs.exported_program import program_module
    from normswap.surgery.module_tree import copy_sharing_parameters

    # A copy of a graph would turn its constants into buffers.
    return (
        program_module(checkpoint.program.program)
        if checkpoint.program is not None
        else copy_sharing_parameters(opened.model)
    )


def _convert_by_names(
    wish: ConvertOptions,
    checkpoint: "Checkpoint",
    stored: "SwapPlan | None",
    console: "Console",
    document: dict[str, Any],
) -> ConvertedWeights:
    """Convert the tensors by their names, without any model."""
    from normswap.checkpoints.content.key_prefixes import names_with_prefix
    from normswap.checkpoints.content.state_dict import initial_gates, plan_from_names
    from normswap.checkpoints.converted_content import AddedState
    from normswap.reports.tables import not_measured_line

    weights = checkpoint.weights
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{wish.file}: a pickled module brings its own architecture: leave --arch none out")
    names = names_with_prefix(weights, checkpoint.contents.prefix)
    state = {name: weights[key] for name, key in names.stored.items()}
    plan = plan_from_names(state, include=wish.include, exclude=wish.exclude)
    _print_plan(console, document, describe_content(checkpoint, "by names alone"), checkpoint, plan, None)
    if wish.verify:
        raise _unverifiable("with --arch none there is no model to run", "--arch path/file.py:function or timm:NAME")
    console.print(not_measured_line("Parity", "not measured: without an architecture there is no model to run"))
    gates = initial_gates(plan)
    return ConvertedWeights(plan, names, AddedState(gates, {}, tuple(gates)))


def _print_plan(
    console: "Console",
    document: dict[str, Any],
    description: str,
    checkpoint: "Checkpoint",
    plan: "SwapPlan",
    architecture: str | None,
) -> None:
    from normswap.reports.tables import heading, plan_summary

    document |= {"architecture": architecture, "plan": plan.to_dict()}
    console.print(heading(checkpoint.path.name, description))
    console.print()
    console.print(plan_summary(plan))
    console.print()
    if not plan.swaps:
        raise NothingToDo(_describe_nothing_to_swap(plan))


def _convert_file_content(
    wish: ConvertOptions, checkpoint: "Checkpoint", result: ConvertedWeights
) -> "ConvertedContent":
    from normswap.checkpoints.content.entries import read_contents
    from normswap.checkpoints.converted_content import ConvertedContent, convert_content

    if not wish.weights_only:
        return convert_content(checkpoint, result.names, result.new, module=result.module, plan=result.plan)
    alone = replace(checkpoint, content=checkpoint.weights, contents=read_contents(checkpoint.weights))
    content = convert_content(alone, result.names, result.new, module=result.module, plan=result.plan).content
    dropped = dropped_entries(checkpoint)
    return ConvertedContent(content, tuple(f"{name}: left out (--weights-only)" for name in dropped))


def _check_values(checkpoint: "Checkpoint") -> None:
    from normswap.checkpoints.content.state_dict import check_running_stats

    if isinstance(checkpoint.weights, Mapping):
        check_running_stats(checkpoint.weights, name=str(checkpoint.path))


def _refuse_converted(wish: ConvertOptions, record: "Record | None", document: dict[str, Any]) -> None:
    if record is not None and record.plan is not None and record.plan.swaps:
        document |= {"architecture": record.architecture, "plan": record.plan.to_dict()}
        named = "" if wish.entry is not None or record.entry is None else ", or name another network with --entry"
        raise NothingToDo(
            f"{wish.file}: nothing to do, {len(record.plan.swaps)} sites are converted already: convert the original "
            f"file again for another choice{named}"
        )


def _load_plan(path: Path | None) -> "SwapPlan | None":
    from normswap.surgery.plan import SwapPlan

    if path is None:
        return None
    try:
        return SwapPlan.from_json(path.read_text(encoding="utf-8"))
    except (PlanError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: {error}") from error


def _make_plan(wish: ConvertOptions, opened: OpenedModel) -> "SwapPlan":
    from normswap.layers.gating import check_gate
    from normswap.surgery.planning import plan_swaps

    return plan_swaps(
        opened.model,
        opened.inputs,
        include=wish.include,
        exclude=wish.exclude,
        kinds=wish.kinds or ("bn",),
        gate=check_gate(wish.gate or "simplex"),
        synchronize=wish.synchronize,
    )


def _describe_nothing_to_swap(plan: "SwapPlan") -> str:
    if not plan.skips:
        return f"no norm sites in this model ({plan.model_class}): nothing to convert"
    reasons = Counter(skip.reason for skip in plan.skips)
    summary = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    return f"none of the {len(plan.skips)} norm sites is to be swapped: {summary}"


def _verify_conversion(
    wish: ConvertOptions, opened: OpenedModel, conversion: "Conversion", *, in_place: bool
) -> "Verification | None":
    from normswap.verification.equivalence import verify, verify_in_place

    if not wish.verify:
        return None
    with stage("comparing original and converted"):
        run_verification = verify_in_place if in_place else verify
        return run_verification(opened.model, conversion.model, [opened.inputs], tolerance=wish.tolerance)


def _unverifiable(reason: str, remedy: str) -> ArchitectureError:
    return ArchitectureError(
        f"nothing written: {reason}, so the conversion cannot be verified: pass {remedy}, or --no-verify to write it "
        "unverified"
    )


def _require_verified(console: "Console", plan: "SwapPlan", verification: "Verification | None") -> None:
    from normswap.reports.tables import worst_sites

    if verification is None or verification.passed:
        return
    if any(swap.gate == "softmax" for swap in plan.swaps):
        raise NothingToDo(
            "nothing written: softmax gates start at the uniform mix, which is another function: use --gate simplex, "
            "or --no-verify to write it all the same"
        )
    console.print()
    console.print(worst_sites(verification))
    failed = ", ".join(check.name for check in verification.checks if check.passed is False) or "see the notes"
    raise NothingToDo(
        f"nothing written: the converted model is not the same function ({failed}): --exclude the sites above, or "
        "--no-verify to write it all the same"
    )


def _print_summary(console: "Console", wish: ConvertOptions, source: "Checkpoint", result: ConvertedWeights) -> None:
    console.print()
    if wish.save_plan is not None:
        console.print(f"plan stored in {wish.save_plan}", markup=False)
    if wish.dry_run:
        console.print(f"dry run: without --dry-run this writes {wish.target}", markup=False)
        return
    console.print(f"wrote {wish.target} ({describe_size(wish.target)})", style="bold", markup=False)
    arguments = ", ".join([f'"{wish.target}"', *_load_arguments(wish, source, result)])
    console.print(f"next: model = normswap.load({arguments}).model", markup=False, soft_wrap=True)


def _load_arguments(wish: ConvertOptions, source: "Checkpoint", result: ConvertedWeights) -> list[str]:
    """What `normswap.load` needs to be told of the file just written."""
    from normswap.checkpoints.formats.formats import needs_trust

    arguments = []
    if wish.without_architecture:
        arguments.append("architecture=your_model")
    elif result.architecture is not None and not result.architecture.startswith(_KNOWN_ZOOS):
        in_same_folder = wish.target.is_dir() and result.architecture == f"hf:{source.path}"
        arguments += [] if in_same_folder else [f'architecture="{result.architecture}"']
    several = (source.record is not None and source.record.networks) or wish.is_one_of_several_entries
    if several and wish.entry is not None:
        arguments.append(f'entry="{wish.entry}"')
    if source.payload != "state dict" or (wish.trust and needs_trust(wish.target)):
        arguments.append("trust=True")
    return arguments
