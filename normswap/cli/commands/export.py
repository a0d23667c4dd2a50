"""`normswap export`: writes a network as a file that runs without normswap."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.checkpoints.io.atomic_files import check_readable, check_writable
from normswap.cli.console import one_line_failures, print_json, report_interruption, stage, translate_arguments
from normswap.cli.options import (
    InputSpec,
    arch_option,
    entry_option,
    force_option,
    input_option,
    json_option,
    open_model,
    read_file,
    read_header,
    trust_option,
)
from normswap.errors import CheckpointError

if TYPE_CHECKING:
    from normswap.exporting.export_options import Exported, ExportOptions

# As in `exporting.export_options`, which imports torch.
_TARGETS = ("onnx", "pt2", "state-dict", "published-layout")
_DTYPES = ("float32", "float16", "bfloat16")


@click.command("export", short_help="Write a network as a file that runs without normswap.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(_TARGETS),
    help="onnx: standard operators only. pt2: a program of torch.export. state-dict: plain weights for the original "
    "architecture, if every site computes its old norm. published-layout: weights as the authors of SN publish them. "
    "Default: by the suffix of the output, if it is .onnx or .pt2.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The file to write.")
@input_option
@click.option("--opset", type=click.IntRange(18, 23), help="Version of the ONNX operators. Default: 18.")
@click.option("--no-fold", is_flag=True, help="ONNX: keep BatchNorm and the names of all weights.")
@click.option("--dtype", type=click.Choice(_DTYPES), help="Precision of the network. Default: that of the file.")
@click.option("--half", is_flag=True, help="The same as --dtype float16.")
@click.option("--no-verify", is_flag=True, help="Write the file without running it.")
@arch_option
@entry_option
@trust_option
@force_option
@json_option
@one_line_failures
def export_command(
    file: Path,
    to: str | None,
    output: Path,
    inputs: tuple[InputSpec, ...],
    arch: str | None,
    entry: str | None,
    trust: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the network in FILE as a file that runs without normswap.

    Sites that compute their old norm become that norm again, the others a few standard operations. Batch size and sizes
    of images stay free. Before the file appears it is run at several sizes in a process that cannot import normswap,
    and compared with the network.
    """
    if options["half"] and options["dtype"] not in (None, "float16"):
        raise click.UsageError(f"--half and --dtype {options['dtype']} exclude each other: leave one of them out")
    check_readable(file)
    check_writable(output, replace=options["force"])
    with report_interruption():
        result = _export_file(file, to, output, inputs, arch, entry, trust, options)
    if as_json:
        print_json({"file": str(file), **result.to_dict()})
        return
    from rich.console import Console

    from normswap.reports.export_table import export_table

    notes = tuple(map(translate_arguments, result.notes))
    Console(highlight=False).print(export_table(replace(result, notes=notes)))
    click.echo(click.style(f"\nwrote {result.path}", bold=True))


def _export_file(
    file: Path,
    to: str | None,
    output: Path,
    inputs: tuple[InputSpec, ...],
    arch: str | None,
    entry: str | None,
    trust: bool,
    options: dict[str, Any],
) -> "Exported":
    with stage("starting"):
        from normswap.exporting.network_export import run_export
    checked = _check_options(to, output, options)
    checkpoint = read_file(read_header(file, output=output), trust=trust, entry=entry, arch=arch)
    if checkpoint.program is not None:
        raise CheckpointError(
            f"{file}: an exported program has no sites that can be exported again: leave --trust out, or pass --arch"
        )
    opened = open_model(checkpoint, arch=arch, inputs=inputs, trust=trust)
    result = run_export(opened.model, checked, opened.inputs, stage)
    checkpoint.origin.check_unchanged()
    return result


def _check_options(to: str | None, output: Path, options: dict[str, Any]) -> "ExportOptions":
    from normswap.exporting.export_options import ExportOptions, target_of

    checked = ExportOptions(
        output,
        target_of(output, to),
        fold=not options["no_fold"],
        opset=options["opset"],
        dtype="float16" if options["half"] else options["dtype"],
        verify=not options["no_verify"],
        overwrite=options["force"],
    )
    checked.check()
    return checked
