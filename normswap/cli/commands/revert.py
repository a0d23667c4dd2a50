"""`normswap revert`: writes a converted file with the old norms."""

from pathlib import Path

import click

from normswap.checkpoints.file_output import check_output, output_path
from normswap.checkpoints.io.atomic_files import check_readable
from normswap.cli.console import one_line_failures, print_json, report_interruption, stage
from normswap.cli.options import (
    InputSpec,
    arch_option,
    example_inputs,
    force_option,
    input_option,
    json_option,
    output_option,
    trust_option,
)


@click.command("revert", short_help="Put the old norms back.")
@click.argument("file", type=click.Path(path_type=Path))
@output_option("reverted")
@click.option("--discard", is_flag=True, help="Revert also if gates have moved, which changes the function.")
@input_option
@arch_option
@trust_option
@force_option
@json_option
@one_line_failures
def revert_command(
    file: Path,
    output: str | None,
    discard: bool,
    inputs: tuple[InputSpec, ...],
    arch: str | None,
    trust: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Put the old norms of FILE, a converted file, back, and write a new file.

    While no gate has moved, the tensors are those of the original file, bit for bit. Exit codes: 0 success; 1 gates
    have moved, or nothing to revert; 2 error.
    """
    check_readable(file)
    check_output(file, output_path(file, output, "reverted"), overwrite=force)
    with report_interruption():
        from rich.console import Console

        from normswap.checkpoints.derived.reverted_file import revert_file
        from normswap.checkpoints.reading import describe_size

        result = revert_file(
            file,
            output,
            architecture=arch,
            example_inputs=example_inputs(inputs),
            discard=discard,
            trust=trust,
            overwrite=force,
            progress=stage,
        )
    if as_json:
        print_json(result.to_dict())
        return
    from normswap.reports.results import reverted_file

    Console(highlight=False).print(reverted_file(result))
    click.echo(click.style(f"wrote {result.output} ({describe_size(result.output)})", bold=True))
