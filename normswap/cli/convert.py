"""`normswap convert`: plan, swap, prove, write - and write nothing unless the proof holds."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.checkpoints.atomic import check_readable, check_writable, write_text
from normswap.cli.failures import one_line_failures
from normswap.cli.opening import Opened, describe_file, describe_size, open_model, read_file
from normswap.cli.options import (
    InputSpec,
    arch_option,
    input_option,
    json_option,
    kinds_option,
    print_json,
    tolerance_option,
    trust_option,
)
from normswap.cli.progress import stage
from normswap.errors import CheckpointError, NothingToDo, PlanError

if TYPE_CHECKING:
    from rich.console import Console

    from normswap.checkpoints.containers import Container
    from normswap.surgery.conversion import Conversion
    from normswap.surgery.plan import SwapPlan
    from normswap.verification import Verification

_GATES = ("simplex", "softmax")


@dataclass(frozen=True)
class _Wish:
    """What the user asked for."""

    file: Path
    output: Path | None
    arch: str | None
    inputs: tuple[InputSpec, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    kinds: tuple[str, ...] | None
    gate: str | None
    plan: Path | None
    save_plan: Path | None
    verify: bool
    tolerance: float | None
    dry_run: bool
    trust: bool
    force: bool

    @property
    def target(self) -> Path:
        """Where the model goes: `model.normswap.pt` beside `model.pt` unless told otherwise."""
        return self.output or self.file.with_name(f"{self.file.stem}.normswap{self.file.suffix}")


@click.command("convert", short_help="Convert a file and write the model to a new one.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="What to write; NAME.safetensors becomes that, anything else a torch file. Default: model.normswap.pt beside "
    "model.pt, of the same kind.",
)
@arch_option
@input_option
@click.option("--include", multiple=True, metavar="PATTERN", help="Swap only these sites: glob on names, or re:REGEX.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these sites as they are; wins over --include.")
@kinds_option
@click.option(
    "--gate",
    type=click.Choice(_GATES),
    help="simplex (default) starts as the same function; softmax, the published gate, at the uniform mix.",
)
@click.option("--plan", type=click.Path(path_type=Path), help="Carry out a plan stored by --save-plan.")
@click.option("--save-plan", type=click.Path(path_type=Path), help="Store the plan as JSON, also with --dry-run.")
@click.option("--verify/--no-verify", default=True, help="Measure that the function is the same (default).")
@tolerance_option
@click.option("--dry-run", is_flag=True, help="Do everything but write the model.")
@trust_option
@click.option("--force", is_flag=True, help="Replace existing output files.")
@json_option
@one_line_failures
def convert_command(file: Path, output: Path | None, as_json: bool, **options: Any) -> None:
    """Swap Batch Normalization (and more, see --kinds) for Switchable Normalization in FILE, into a new file.

    FILE is a state dict (torch or safetensors; name its architecture with --arch) or a pickled module. The converted
    model is measured against the original wherever the size of an input is known, and written only if it computes the
    same function. Exit status 0 done, 1 nothing to convert or not the same function, 2 cannot.
    """
    wish = _Wish(file, output, **options)
    _check(wish)
    from rich.console import Console

    document: dict[str, Any] = {"file": str(file), "output": None, "written": False, "verification": None}
    answer: NothingToDo | None = None
    try:
        _convert(wish, Console(highlight=False, quiet=as_json), document)
    except NothingToDo as no:
        answer = no
    if as_json:
        print_json(document)
    if answer is not None:
        raise answer


def _check(wish: _Wish) -> None:
    """Refuse what can be refused before anything slow is done, torch's import included."""
    if wish.plan is not None and (wish.include or wish.exclude or wish.kinds or wish.gate is not None):
        raise click.UsageError("--plan decides everything: leave --include, --exclude, --kinds and --gate out")
    if not wish.verify and wish.tolerance is not None:
        raise click.UsageError("--tolerance has no meaning with --no-verify")
    if wish.save_plan is not None and wish.save_plan.resolve() == wish.target.resolve():
        raise click.UsageError("--save-plan and the output have the same name: choose another for one of them")
    check_readable(wish.file)
    if wish.plan is not None:
        check_readable(wish.plan)
    if not wish.dry_run:
        check_writable(wish.target, replace=wish.force)
    if wish.save_plan is not None:
        check_writable(wish.save_plan, replace=wish.force)


def _convert(wish: _Wish, console: "Console", document: dict[str, Any]) -> None:
    """The command itself; what is known so far is printed, and noted in `document`."""
    from normswap.reports.tables import heading, missing, parity, plan_summary
    from normswap.surgery.conversion import convert

    _refuse_converted(wish.file, document)
    stored = _stored_plan(wish.plan)
    opened = open_model(read_file(wish.file, trust=wish.trust), arch=wish.arch, inputs=wish.inputs)
    container = _container(wish, opened)
    with stage("finding norm sites"):
        plan = stored or _fresh_plan(wish, opened)
    document |= {"architecture": opened.architecture, "plan": plan.to_dict()}
    console.print(heading(wish.file.name, describe_file(opened)))
    console.print()
    console.print(plan_summary(plan))
    console.print()
    if not plan.swaps:
        raise NothingToDo(_nothing(plan))
    with stage("swapping"):
        conversion = convert(opened.model, plan=plan)
    proof = _prove(wish, opened, conversion)
    document["verification"] = proof and proof.to_dict()
    reason = "--no-verify" if not wish.verify else "give --input, nothing tells the size"
    console.print(parity(proof) if proof else missing("Parity", f"not measured: {reason}"))
    _refuse_difference(console, plan, proof)
    if wish.save_plan is not None:
        write_text(wish.save_plan, plan.to_json())
    if not wish.dry_run:
        _write(wish, opened, conversion, proof, container)
        document |= {"output": str(wish.target), "written": True, "bytes": wish.target.stat().st_size}
    _print_end(console, wish, opened)


def _refuse_converted(file: Path, document: dict[str, Any]) -> None:
    with stage("starting"):
        from normswap.checkpoints.checkpoint import read_record

        record = read_record(file)
    if record is not None and record.plan is not None and record.plan.swaps:
        document |= {"architecture": record.architecture, "plan": record.plan.to_dict()}
        raise NothingToDo(
            f"{file}: nothing to do, {len(record.plan.swaps)} sites are converted already: convert the original file "
            "again for another choice"
        )


def _container(wish: _Wish, opened: Opened) -> "Container":
    """The kind of the output: what the name given with -o says, else the input's own."""
    checkpoint = opened.checkpoint
    as_safetensors = wish.target.suffix == ".safetensors"
    if as_safetensors and checkpoint.payload == "module":
        raise CheckpointError(f"{wish.target}: safetensors holds no pickled module: choose -o NAME.pt")
    if wish.output is None:
        return "safetensors" if checkpoint.container == "safetensors" else "torch zip"
    return "safetensors" if as_safetensors else "torch zip"


def _stored_plan(path: Path | None) -> "SwapPlan | None":
    from normswap.surgery.plan import SwapPlan

    if path is None:
        return None
    try:
        return SwapPlan.from_json(path.read_text(encoding="utf-8"))
    except (PlanError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: {error}") from error


def _fresh_plan(wish: _Wish, opened: Opened) -> "SwapPlan":
    from normswap.layers.importance import check_gate
    from normswap.surgery.planning import plan_swaps

    return plan_swaps(
        opened.model,
        opened.inputs,
        include=wish.include,
        exclude=wish.exclude,
        kinds=wish.kinds or ("bn",),
        gate=check_gate(wish.gate or "simplex"),
    )


def _nothing(plan: "SwapPlan") -> str:
    if not plan.skips:
        return f"no norm sites in this model ({plan.model_class}): nothing to convert"
    reasons = Counter(skip.reason for skip in plan.skips)
    told = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    return f"none of the {len(plan.skips)} norm sites is to be swapped: {told}"


def _prove(wish: _Wish, opened: Opened, conversion: "Conversion") -> "Verification | None":
    from normswap.verification import verify

    if not wish.verify or opened.inputs is None:
        return None
    with stage("comparing original and converted in float64"):
        return verify(opened.model, conversion.model, [opened.inputs], tolerance=wish.tolerance)


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
    failed = ", ".join(check.name for check in proof.checks if check.passed is False)
    raise NothingToDo(
        f"nothing written: the converted model is not the same function ({failed}): --exclude the sites above, or "
        "--no-verify to write it all the same"
    )


def _write(
    wish: _Wish, opened: Opened, conversion: "Conversion", proof: "Verification | None", container: "Container"
) -> None:
    from normswap.checkpoints.checkpoint import sha256_of, write_checkpoint
    from normswap.checkpoints.record import Record, Step

    source = opened.checkpoint
    with stage(f"writing {wish.target.name}"):
        step = Step.now("converted", source=wish.file.name, sha256=sha256_of(wish.file))
        record = Record(
            payload=source.payload,
            architecture=opened.architecture,
            plan=conversion.plan,
            verification=proof,
            history=(*(source.record.history if source.record else ()), step),
        )
        write_checkpoint(conversion.model, wish.target, container, record)


def _print_end(console: "Console", wish: _Wish, opened: Opened) -> None:
    console.print()
    if wish.save_plan is not None:
        console.print(f"plan stored in {wish.save_plan}", markup=False)
    if wish.dry_run:
        console.print(f"dry run: without --dry-run this writes {wish.target}", markup=False)
        return
    trust = ", trust=True" if opened.checkpoint.payload == "module" else ""
    console.print(f"wrote {wish.target} ({describe_size(wish.target)})", style="bold", markup=False)
    console.print(f'next: model = normswap.load("{wish.target}"{trust}).model', markup=False, soft_wrap=True)
