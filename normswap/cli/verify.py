"""`normswap verify`: whether two files hold the same function."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from normswap.checkpoints.io.atomic_files import check_readable
from normswap.checkpoints.io.memory import return_freed_memory
from normswap.cli.failures import one_line_failures
from normswap.cli.open_model import OpenedModel, describe_content, open_model, read_file
from normswap.cli.options import (
    InputSpec,
    arch_option,
    entry_option,
    input_option,
    json_option,
    print_json,
    tolerance_option,
    trust_option,
)
from normswap.cli.progress import stage
from normswap.errors import ArchitectureError, NothingToDo

if TYPE_CHECKING:
    from normswap.checkpoints.loading import Checkpoint


@click.command("verify", short_help="Measure whether two files hold the same function.")
@click.argument("original", type=click.Path(path_type=Path))
@click.argument("converted", type=click.Path(path_type=Path))
@arch_option
@entry_option
@input_option
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
    tolerance: float | None,
    trust: bool,
    as_json: bool,
) -> None:
    """Measure whether CONVERTED computes the same function as ORIGINAL: exit status 0 the same, 1 not the same.

    Outputs in evaluation and in training, gradients and running statistics are compared in float64. The architecture
    of either file is taken from the other where only one says it.
    """
    for path in (original, converted):
        check_readable(path)
    from rich.console import Console

    from normswap.checkpoints.loading import recorded_architecture
    from normswap.reports.tables import heading, verification_table, worst_sites
    from normswap.verification.equivalence import verify

    files = [read_file(path, trust=trust, entry=entry, arch=arch) for path in (original, converted)]
    recorded = [recorded_architecture(file, trust=trust) for file in files] if arch is None else []
    default = arch or next(filter(None, recorded), None)
    first, second = (_open(file, default, inputs, trust=trust) for file in files)
    if first.inputs is None:
        raise ArchitectureError("nothing tells the size of an input: give one with --input 2x3x224x224")
    if first.checkpoint.program is not None and second.checkpoint.program is not None:
        _compare_programs(first, second, as_json=as_json)
        return
    with stage("comparing the two"):
        result = verify(first.model, second.model, [first.inputs], tolerance=tolerance)
    _check_unchanged(first, second)
    if as_json:
        print_json({"original": str(original), "converted": str(converted), **result.to_dict()})
    else:
        console = Console(highlight=False)
        for opened in (first, second):
            console.print(
                heading(opened.checkpoint.path.name, describe_content(opened.checkpoint, opened.architecture))
            )
        console.print()
        console.print(verification_table(result))
        if not result.passed and result.sites:
            console.print()
            console.print(worst_sites(result))
    if not result.passed:
        raise NothingToDo(f"{converted} does not compute the same function as {original}")


def _compare_programs(first: OpenedModel, second: OpenedModel, *, as_json: bool) -> None:
    """Two exported programs, in their own precision: nothing else can be told of graphs."""
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


def _check_unchanged(*opened: OpenedModel) -> None:
    for one in opened:
        one.checkpoint.origin.check_unchanged()


def _open(file: "Checkpoint", arch: str | None, inputs: tuple[InputSpec, ...], *, trust: bool) -> OpenedModel:
    from normswap.checkpoints.loading import builds_without_trust

    # Each file's own word goes first, since --arch may be meant for the other one; code needs the user's.
    itself = file.payload == "module" or builds_without_trust(file)
    return open_model(file, arch=None if itself else arch, inputs=inputs, trust=trust)
