"""`normswap verify`: measures whether two files compute the same function."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from normswap.checkpoints.io.atomic_files import check_readable
from normswap.checkpoints.io.memory import return_freed_memory
from normswap.cli.console import one_line_failures, print_json, stage
from normswap.cli.options import (
    InputSpec,
    arch_option,
    entry_option,
    input_option,
    json_option,
    open_model,
    read_file,
    tolerance_option,
    trust_option,
)
from normswap.errors import ArchitectureError, NothingToDo
from normswap.text import pluralize

if TYPE_CHECKING:
    from normswap.checkpoints.loading import OpenedModel
    from normswap.layers.gating import BnStatistics


@click.command("verify", short_help="Measure whether two files compute the same function.")
@click.argument("original", type=click.Path(path_type=Path))
@click.argument("converted", type=click.Path(path_type=Path))
@arch_option
@entry_option
@input_option
@click.option(
    "--bn-statistics",
    type=click.Choice(("running", "batch")),
    help="Compare all sites in training with what was asked for: running, with the original whose norms are in "
    "evaluation (frozen); batch, with the original as it trains. Default: each site with what it is set to.",
)
@tolerance_option
@trust_option
@json_option
@one_line_failures
@return_freed_memory()
def verify_command(
    original: Path,
    converted: Path,
    arch: str | None,
    entry: str | None,
    inputs: tuple[InputSpec, ...],
    bn_statistics: "BnStatistics | None",
    tolerance: float | None,
    trust: bool,
    as_json: bool,
) -> None:
    """Measure whether CONVERTED computes the same function as ORIGINAL.

    Outputs in evaluation and in training, gradients and running statistics are compared in float64. If only one of the
    files names its architecture, it is used for both. Exit codes: 0 the same; 1 outputs differ; 2 error.
    """
    for path in (original, converted):
        check_readable(path)
    from rich.console import Console

    from normswap.checkpoints.loading import select_architectures
    from normswap.reports.tables import heading, verification_table, worst_sites
    from normswap.verification.equivalence import verify

    files = [read_file(path, trust=trust, entry=entry, arch=arch) for path in (original, converted)]
    architectures = select_architectures(files, arch, trust=trust)
    first, second = (
        open_model(file, arch=own, inputs=inputs, trust=trust) for file, own in zip(files, architectures, strict=True)
    )
    if first.inputs is None:
        raise ArchitectureError("the input size is unknown: pass --input 2x3x224x224")
    if first.checkpoint.program is not None and second.checkpoint.program is not None:
        if bn_statistics is not None:
            raise click.UsageError("--bn-statistics: the mode of exported programs is fixed: leave it out")
        _compare_programs(first, second, as_json=as_json)
        return
    result = verify(
        first.model,
        second.model,
        [first.inputs],
        tolerance=tolerance,
        bn_statistics=bn_statistics,
        progress=lambda check: stage(f"comparing: {check}"),
    )
    _check_unchanged(first, second)
    if as_json:
        print_json({"original": str(original), "converted": str(converted), **result.to_dict()})
    else:
        console = Console(highlight=False)
        for opened in (first, second):
            console.print(heading(opened.checkpoint.path.name, opened.checkpoint.describe(opened.architecture)))
        console.print()
        console.print(verification_table(result))
        if not result.passed and result.sites:
            console.print()
            console.print(worst_sites(result))
    if not result.passed:
        raise NothingToDo(f"{converted} does not compute the same function as {original}{_explain(second)}")


def _explain(converted: "OpenedModel") -> str:
    """Why a converted model computes another function, as far as its record says it."""
    record = converted.checkpoint.record
    if record is not None and record.baked is not None:
        return ", since it was baked: normswap bake printed its error; folded weights are rounded to their precision"
    started = [swap for swap in record.plan.swaps if swap.start] if record and record.plan else []
    if record is None or not started:
        return ""
    distance = f"; its recorded distance: normswap inspect {converted.checkpoint.path}" if record.distance else ""
    return f", since {pluralize(len(started), 'site')} started without `bn`{distance}"


def _compare_programs(first: "OpenedModel", second: "OpenedModel", *, as_json: bool) -> None:
    """Compare two exported programs in their own precision, since a graph has a fixed precision and mode."""
    from normswap.surgery.graphs.exported_program import difference

    original, converted = first.checkpoint, second.checkpoint
    if original.program is None or converted.program is None:
        return
    with stage("comparing the two programs"):
        found = difference(original.program.program, converted.program.program, first.inputs)
    _check_unchanged(first, second)
    if as_json:
        files = {"original": str(original.path), "converted": str(converted.path)}
        print_json({**files, "passed": found.passed, **found._asdict()})
    else:
        click.echo(f"outputs and buffers differ by {found.error:.1e}, at most {found.limit:.1e} (relative L2)")
    if not found.passed:
        raise NothingToDo(f"{converted.path} does not compute the same function as {original.path}")


def _check_unchanged(*opened: "OpenedModel") -> None:
    for one in opened:
        one.checkpoint.origin.check_unchanged()
