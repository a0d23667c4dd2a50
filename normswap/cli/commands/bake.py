"""`normswap bake`: writes a converted network with plain and compact layers instead of gates."""

from pathlib import Path

import click

from normswap.checkpoints.file_output import check_output, output_path
from normswap.checkpoints.io.atomic_files import check_readable
from normswap.cli.console import one_line_failures, print_json, report_interruption, stage
from normswap.cli.options import (
    InputSpec,
    arch_option,
    entry_option,
    example_inputs,
    force_option,
    input_option,
    json_option,
    output_option,
    trust_option,
)


@click.command("bake", short_help="Replace gates by plain and compact layers.")
@click.argument("file", type=click.Path(path_type=Path))
@output_option("baked")
@click.option("--fold", is_flag=True, help="Fold Batch Normalization into the layer before it, if that is exact.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 0.5, max_open=True),
    default=0.0,
    show_default=True,
    help="A branch with importance weights of at least 1 - TOLERANCE gets all weight. 0: the function stays.",
)
@input_option
@arch_option
@entry_option
@trust_option
@force_option
@json_option
@one_line_failures
def bake_command(
    file: Path,
    output: str | None,
    fold: bool,
    tolerance: float,
    inputs: tuple[InputSpec, ...],
    arch: str | None,
    entry: str | None,
    trust: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Replace the gates in FILE, a converted file, by plain norms and compact layers, and write a new file.

    A layer with all weight on one branch becomes BatchNorm, GroupNorm or InstanceNorm; every other layer becomes a
    compact one with fixed importance weights. The new file contains the weights alone, without optimizer and EMA.
    """
    check_readable(file)
    check_output(file, output_path(file, output, "baked"), overwrite=force)
    with report_interruption():
        from rich.console import Console

        from normswap.checkpoints.derived.baked_file import bake_file
        from normswap.checkpoints.reading import describe_size

        result = bake_file(
            file,
            output,
            architecture=arch,
            entry=entry,
            example_inputs=example_inputs(inputs),
            tolerance=tolerance,
            fold=fold,
            trust=trust,
            overwrite=force,
            progress=stage,
        )
    if as_json:
        print_json(result.to_dict())
        return
    from normswap.reports.results import baked_file

    Console(highlight=False).print(baked_file(result))
    click.echo(click.style(f"\nwrote {result.output} ({describe_size(result.output)})", bold=True))
    if result.plan.is_plain:
        click.echo("the original architecture loads these weights too, without normswap")
