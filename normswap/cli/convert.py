"""`normswap convert`: plan, swap, prove, write - and write nothing unless the proof holds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.checkpoints.io.atomic_write import write_text
from normswap.checkpoints.io.memory import freed_at_once
from normswap.cli.failures import one_line_failures
from normswap.cli.open_model import Opened, describe_content, describe_size, open_model, read_file, read_header, size_of
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
from normswap.cli.outputs import dropped_entries, merged_notes
from normswap.cli.progress import stage
from normswap.cli.wish import Wish, wishes_for
from normswap.cli.writing import Result, Writing
from normswap.errors import ArchitectureError, CheckpointError, NothingToDo, PlanError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from normswap.checkpoints.converted_content import Carried
    from normswap.checkpoints.loading import Checkpoint
    from normswap.checkpoints.record import Record
    from normswap.surgery.conversion import Conversion
    from normswap.surgery.plan import SwapPlan
    from normswap.verification.equivalence import Verification

# Zoos whose models `normswap.load` builds from the name in a file alone.
_BUILT_BY_NAME = ("timm:", "torchvision:")
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
@freed_at_once()
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
    wishes = wishes_for(Wish(file, output, arch=None, entry=None, inputs=(), **options), entries, archs, inputs)
    document: dict[str, Any] = {"file": str(file), "output": None, "written": False, "verification": None}
    answer: NothingToDo | None = None
    try:
        for wish in wishes:
            wish.check()
        from rich.console import Console

        _convert(wishes, Console(highlight=False, quiet=as_json), document)
    except NothingToDo as no:
        answer = no
    except KeyboardInterrupt:
        written = f"{wishes[0].target} was written" if document["written"] else "nothing was written"
        raise KeyboardInterrupt(f"interrupted; {written}") from None
    if as_json:
        print_json(document)
    if answer is not None:
        raise answer


def _convert(wishes: Sequence[Wish], console: "Console", document: dict[str, Any]) -> None:
    """The command itself; what is known so far is printed, and noted in `document`."""
    from normswap.checkpoints.loading import at_entry
    from normswap.checkpoints.saving import sha256_in_background
    from normswap.reports.tables import carried_notes

    wish = wishes[0]
    header = read_header(wish.file, output=None if wish.dry_run else wish.target)
    for each in wishes:
        _refuse_converted(
            each, header.record and header.record.about(each.entry or header.record.entry or ""), document
        )
    stored = _stored_plan(wish.plan)
    checkpoint = read_file(header, trust=wish.trust, entry=wish.entry, arch=wish.arch)
    container = wish.container(checkpoint)
    digest = None if wish.dry_run else sha256_in_background(checkpoint.origin.copy)
    notes: list[str] = []
    for wish in wishes:
        part = document if len(wishes) == 1 else document.setdefault("networks", {}).setdefault(wish.entry, {})
        _refuse_converted(wish, checkpoint.record, part)
        _check_values(checkpoint)
        make = _by_names if wish.names_only else _by_architecture
        result = make(wish, checkpoint, stored, console, part)
        carried = _carried(wish, checkpoint, result)
        writing = Writing(wish, checkpoint, result, container, digest)
        notes = merged_notes(notes, (*carried.notes, *writing.notes), [w.entry for w in wishes])
        if wish is not wishes[-1]:
            following = wishes[wishes.index(wish) + 1].entry or ""
            checkpoint = at_entry(checkpoint, carried.content, writing.record(), following)
    if notes:
        console.print(carried_notes(notes))
    document["carried"] = notes
    content = writing.final(carried.content)
    if wish.dry_run:  # else the writer looks, once
        checkpoint.origin.check_unchanged()
    if not wish.dry_run:
        writing.write(content, console)
        document |= {"output": str(wish.target), "written": True, "bytes": size_of(wish.target)}
    if wish.save_plan is not None:
        write_text(wish.save_plan, result.plan.to_json())
    _print_end(console, wish, checkpoint, result)


def _by_architecture(
    wish: Wish, checkpoint: "Checkpoint", stored: "SwapPlan | None", console: "Console", document: dict[str, Any]
) -> Result:
    """Build the model, convert it, and hold it against the original."""
    from normswap.checkpoints.converted_content import new_of
    from normswap.checkpoints.saving import originals
    from normswap.reports.tables import missing, parity
    from normswap.surgery.conversion import convert

    try:
        opened = open_model(checkpoint, arch=wish.arch, inputs=wish.inputs, trust=wish.trust)
    except ArchitectureError as error:
        if error.convertible_by_names and not (wish.inputs or wish.kinds or wish.plan or wish.gate or wish.synchronize):
            raise type(error)(f"{error}; or convert by tensor names: --arch none --no-verify") from error
        raise
    with stage("finding norm sites"):
        plan = stored or _fresh_plan(wish, opened)
    _tell_plan(
        console, document, describe_content(checkpoint, opened.architecture), checkpoint, plan, opened.architecture
    )
    if wish.verify and opened.inputs is None:
        raise _unverifiable("the input size is unknown", "--input 2x3x224x224 (batch x channels x height x width)")
    with stage("swapping"):
        # What is built here is only looked at: one set of parameters serves both.
        alone = checkpoint.payload == "state dict"
        model = _twin(checkpoint, opened) if checkpoint.payload != "module" else opened.model
        conversion = convert(model, plan=plan, inplace=checkpoint.payload != "module")
    new, sites = new_of(opened.model.state_dict(), conversion.model), originals(conversion.model, plan)
    proof = _prove(wish, opened, conversion, in_place=alone)
    document["verification"] = proof and proof.to_dict()
    console.print(parity(proof) if proof else missing("Parity", "not measured: --no-verify"))
    _refuse_difference(console, plan, proof)
    module = None if alone else conversion.model
    notes = opened.built.fit.notes(opened.architecture or plan.model_class)
    return Result(plan, opened.built.names, new, opened.architecture, module, sites, proof, opened.inputs, notes)


def _twin(checkpoint: "Checkpoint", opened: Opened) -> "nn.Module":
    """The same model again, on the same parameters."""
    from normswap.surgery.graphs.exported_program import module_of
    from normswap.surgery.module_tree import lighter_copy

    # A copy of a graph would turn its constants into buffers.
    return module_of(checkpoint.program.program) if checkpoint.program is not None else lighter_copy(opened.model)


def _by_names(
    wish: Wish, checkpoint: "Checkpoint", stored: "SwapPlan | None", console: "Console", document: dict[str, Any]
) -> Result:
    """Convert the tensors by their names, without any model."""
    from normswap.checkpoints.content.key_prefixes import names_under
    from normswap.checkpoints.content.state_dict import gates_of, plan_from_names
    from normswap.checkpoints.converted_content import New
    from normswap.reports.tables import missing

    weights = checkpoint.weights
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{wish.file}: a pickled module brings its own architecture: leave --arch none out")
    names = names_under(weights, checkpoint.contents.prefix)
    state = {name: weights[key] for name, key in names.stored.items()}
    plan = plan_from_names(state, include=wish.include, exclude=wish.exclude)
    _tell_plan(console, document, describe_content(checkpoint, "by names alone"), checkpoint, plan, None)
    if wish.verify:
        raise _unverifiable("with --arch none there is no model to run", "--arch path/file.py:function or timm:NAME")
    console.print(missing("Parity", "not measured: without an architecture there is no model to run"))
    gates = gates_of(plan)
    return Result(plan, names, New(gates, {}, tuple(gates)))


def _tell_plan(
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
        raise NothingToDo(_nothing(plan))


def _carried(wish: Wish, checkpoint: "Checkpoint", result: Result) -> "Carried":
    from normswap.checkpoints.content.entries import read_contents
    from normswap.checkpoints.converted_content import Carried, converted_content

    if not wish.weights_only:
        return converted_content(checkpoint, result.names, result.new, module=result.module, plan=result.plan)
    alone = replace(checkpoint, content=checkpoint.weights, contents=read_contents(checkpoint.weights))
    content = converted_content(alone, result.names, result.new, module=result.module, plan=result.plan).content
    dropped = dropped_entries(checkpoint)
    return Carried(content, tuple(f"{name}: left out (--weights-only)" for name in dropped))


def _check_values(checkpoint: "Checkpoint") -> None:
    from normswap.checkpoints.content.state_dict import check_statistics

    if isinstance(checkpoint.weights, Mapping):
        check_statistics(checkpoint.weights, name=str(checkpoint.path))


def _refuse_converted(wish: Wish, record: "Record | None", document: dict[str, Any]) -> None:
    if record is not None and record.plan is not None and record.plan.swaps:
        document |= {"architecture": record.architecture, "plan": record.plan.to_dict()}
        named = "" if wish.entry is not None or record.entry is None else ", or name another network with --entry"
        raise NothingToDo(
            f"{wish.file}: nothing to do, {len(record.plan.swaps)} sites are converted already: convert the original "
            f"file again for another choice{named}"
        )


def _stored_plan(path: Path | None) -> "SwapPlan | None":
    from normswap.surgery.plan import SwapPlan

    if path is None:
        return None
    try:
        return SwapPlan.from_json(path.read_text(encoding="utf-8"))
    except (PlanError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: {error}") from error


def _fresh_plan(wish: Wish, opened: Opened) -> "SwapPlan":
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


def _nothing(plan: "SwapPlan") -> str:
    if not plan.skips:
        return f"no norm sites in this model ({plan.model_class}): nothing to convert"
    reasons = Counter(skip.reason for skip in plan.skips)
    told = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    return f"none of the {len(plan.skips)} norm sites is to be swapped: {told}"


def _prove(wish: Wish, opened: Opened, conversion: "Conversion", *, in_place: bool) -> "Verification | None":
    from normswap.verification.equivalence import verify, verify_in_place

    if not wish.verify:
        return None
    with stage("comparing original and converted"):
        prove = verify_in_place if in_place else verify
        return prove(opened.model, conversion.model, [opened.inputs], tolerance=wish.tolerance)


def _unverifiable(reason: str, remedy: str) -> ArchitectureError:
    return ArchitectureError(
        f"nothing written: {reason}, so the conversion cannot be verified: pass {remedy}, or --no-verify to write it "
        "unverified"
    )


def _refuse_difference(console: "Console", plan: "SwapPlan", proof: "Verification | None") -> None:
    from normswap.reports.tables import worst_sites

    if proof is None or proof.passed:
        return
    if any(swap.gate == "softmax" for swap in plan.swaps):
        raise NothingToDo(
            "nothing written: softmax gates start at the uniform mix, which is another function: use --gate simplex, "
            "or --no-verify to write it all the same"
        )
    console.print()
    console.print(worst_sites(proof))
    failed = ", ".join(check.name for check in proof.checks if check.passed is False) or "see the notes"
    raise NothingToDo(
        f"nothing written: the converted model is not the same function ({failed}): --exclude the sites above, or "
        "--no-verify to write it all the same"
    )


def _print_end(console: "Console", wish: Wish, source: "Checkpoint", result: Result) -> None:
    console.print()
    if wish.save_plan is not None:
        console.print(f"plan stored in {wish.save_plan}", markup=False)
    if wish.dry_run:
        console.print(f"dry run: without --dry-run this writes {wish.target}", markup=False)
        return
    console.print(f"wrote {wish.target} ({describe_size(wish.target)})", style="bold", markup=False)
    arguments = ", ".join([f'"{wish.target}"', *_arguments_of_load(wish, source, result)])
    console.print(f"next: model = normswap.load({arguments}).model", markup=False, soft_wrap=True)


def _arguments_of_load(wish: Wish, source: "Checkpoint", result: Result) -> list[str]:
    """What `normswap.load` needs to be told of the file just written."""
    from normswap.checkpoints.formats.formats import needs_trust

    arguments = []
    if wish.names_only:
        arguments.append("architecture=your_model")
    elif result.architecture is not None and not result.architecture.startswith(_BUILT_BY_NAME):
        beside = wish.target.is_dir() and result.architecture == f"hf:{source.path}"
        arguments += [] if beside else [f'architecture="{result.architecture}"']
    several = (source.record is not None and source.record.networks) or wish.one_of_several
    if several and wish.entry is not None:
        arguments.append(f'entry="{wish.entry}"')
    if source.payload != "state dict" or (wish.trust and needs_trust(wish.target)):
        arguments.append("trust=True")
    return arguments
