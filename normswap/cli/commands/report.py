"""`normswap report`: shows what a converted file has learned, as tables, an HTML page, a picture and node data."""

from pathlib import Path
from typing import Any

import click

from normswap.checkpoints.io.atomic_files import check_readable
from normswap.cli.console import one_line_failures, print_json, report_interruption, stage
from normswap.cli.options import entry_option, json_option, trust_option

_PATH = click.Path(path_type=Path)


@click.command("report", short_help="Show what a converted network has learned, on an HTML page.")
@click.argument("file", type=_PATH)
@click.option("-o", "--output", type=_PATH, help="The HTML page to write, in one file without links.")
@click.option("--png", type=_PATH, help="A picture of the importance weights to write. Needs matplotlib.")
@click.option("--against", type=_PATH, help="A file to compare with, such as the one before fine-tuning.")
@click.option(
    "--node-data",
    "node_data_file",
    type=_PATH,
    help="A JSON file to write for Model Explorer: the importance of bn for each node of --graph.",
)
@click.option(
    "--graph",
    type=_PATH,
    help="The exported program (.pt2) of the converted model whose nodes --node-data names.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 0.5, max_open=True),
    default=0.0,
    show_default=True,
    help="How far from 1 an importance weight may be for its site to count as decided.",
)
@entry_option
@trust_option
@click.option("--force", "overwrite", is_flag=True, help="Replace existing output files.")
@json_option
@one_line_failures
def report_command(file: Path, as_json: bool, **options: Any) -> None:
    """Show the importance weights of every site in a converted FILE, and write them as an HTML page.

    The page also shows what a bake would make of each site, the recorded verification, skips, history, and the course
    of the run if FILE is in the folder of a run. It is one file that loads nothing; the same FILE gives the same bytes.
    """
    check_readable(file)
    with report_interruption(), stage(f"reading {file.name}"):
        from normswap.reports.report_files import write_report

        report = write_report(file, **options)
    outputs = {name: options[name] for name in ("output", "png", "node_data_file") if options[name] is not None}
    if as_json:
        print_json({**report.to_dict(), "outputs": {name: str(path) for name, path in outputs.items()}})
        return
    from rich.console import Console

    from normswap.checkpoints.reading import file_size
    from normswap.reports.results import report as report_tables

    Console(highlight=False).print(report_tables(report))
    if outputs:
        click.echo()
    for path in outputs.values():
        click.echo(click.style(f"wrote {path} ({file_size(path) / 1e3:,.0f} kB)", bold=True))
