"""`normswap calibrate`: recomputes running statistics over a data set and writes a new file."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.checkpoints.file_output import check_output, output_path, select_format
from normswap.checkpoints.io.atomic_files import check_readable
from normswap.cli.console import (
    Bar,
    one_line_failures,
    print_json,
    progress_bar,
    report_interruption,
    stage,
    translate_arguments,
)
from normswap.cli.options import (
    arch_option,
    data_option,
    data_set_options,
    entry_option,
    force_option,
    json_option,
    move_model,
    open_data_set,
    open_model,
    output_option,
    read_file,
    read_header,
    trust_option,
)
from normswap.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from normswap.checkpoints.loading import OpenedModel
    from normswap.finetune.data.datasets import Data
    from normswap.running_stats.calibration import Calibration


@click.command("calibrate", short_help="Recompute running statistics over a data set.")
@click.argument("file", type=click.Path(path_type=Path))
@data_option
@data_set_options
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images per batch.")
@click.option("--batches", type=click.IntRange(1), help="Number of batches of randomly drawn images. Default: all.")
@click.option(
    "--workers", type=click.IntRange(0), default=0, show_default=True, help="Number of processes that read images."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed for the order of the images.")
@click.option("--device", default="cpu", show_default=True, help="Device that runs the model, such as cuda.")
@click.option("--layer-by-layer", is_flag=True, help="One pass over the data per layer: exact at any batch size.")
@click.option("--include-frozen", is_flag=True, help="Also calibrate layers that replaced a frozen norm.")
@click.option("--only", metavar="PATTERN", multiple=True, help="Calibrate only layers with such names. Repeatable.")
@click.option("--match", is_flag=True, help="Match the in and ln branches to the new statistics, in one more pass.")
@output_option("calibrated")
@arch_option
@entry_option
@trust_option
@force_option
@json_option
@one_line_failures
def calibrate_command(
    file: Path, output: str | None, source: str, arch: str | None, entry: str | None, as_json: bool, **options: Any
) -> None:
    """Recompute the running statistics of the SN and BN layers in FILE over a data set, and write a new file.

    FILE is any checkpoint, converted or not. Its other entries are copied; only the recorded verification of a
    conversion is dropped, since the calibrated model computes another function in evaluation.
    """
    target = output_path(file, output, "calibrated")
    with report_interruption():
        document, closing = _calibrate_file(
            file, target, source, arch, entry, as_json, named=output is not None, options=options
        )
    if as_json:
        print_json(document)
    else:
        click.echo(closing)


def _calibrate_file(
    file: Path,
    target: Path,
    source: str,
    arch: str | None,
    entry: str | None,
    as_json: bool,
    *,
    named: bool,
    options: dict[str, Any],
) -> tuple[dict[str, Any], str]:
    """Write the calibrated file and print the tables; return them as one document, and the closing lines."""
    check_readable(file)
    check_output(file, target, overwrite=options.pop("force"))
    from rich.console import Console

    from normswap.checkpoints.reading import describe_size, file_size
    from normswap.checkpoints.saving import calibration_notes, write_calibrated
    from normswap.reports.tables import calibration_table, heading, notes_table

    checkpoint = read_file(read_header(file, output=target), trust=options["trust"], entry=entry, arch=arch)
    if checkpoint.program is not None:
        raise CheckpointError(
            f"{file}: only the weights of an exported program can be calibrated: leave --trust out, or pass --arch"
        )
    checkpoint.refuse_baked("calibrate")
    file_format = select_format(target, checkpoint, named=named)
    opened = open_model(checkpoint, arch=arch, inputs=(), trust=options["trust"])
    data = open_data_set(source, opened.model, opened.architecture, options)
    console = Console(highlight=False, quiet=as_json)
    console.print(heading(file.name, checkpoint.describe(opened.architecture)))
    result = _run_calibration(opened, data, options)
    console.print()
    console.print(calibration_table(result))
    notes = [translate_arguments(note) for note in calibration_notes(checkpoint)]
    if notes:
        console.print(notes_table(notes))
    images = f"{result.batches} batches of {data.settings.batch_size}"
    with stage(f"writing {target.name}"):
        scope = [f"only {', '.join(options['only'])}"] if options["only"] else []
        detail = ", ".join([source, data.settings.split, images, *scope, *["matched"] * options["match"]])
        write_calibrated(checkpoint, opened.built, target, file_format, detail=detail)
    closing = f"\n{len(result.layers)} layers calibrated on {images} of {source}"
    written_line = click.style(f"wrote {target} ({describe_size(target)})", bold=True)
    facts = {"file": str(file), "output": str(target), "bytes": file_size(target)}
    return {
        **facts,
        "architecture": opened.architecture,
        "carried": notes,
        **result.to_dict(),
    }, f"{closing}\n{written_line}"


class _Batches:
    """The first `count` batches of a data set, cast to the dtype of the model; can be iterated more than once.

    The bar shows the number of batches done and, from the second one on, the number of the pass.
    """

    def __init__(self, data: "Data", count: int | None, dtype: "torch.dtype", bar: Bar) -> None:
        self._data, self._count, self._dtype, self._bar = data, count, dtype, bar
        self._passes = 0

    def __iter__(self) -> "Iterator[torch.Tensor]":
        self._passes += 1
        total, pass_label = self._total(), f"pass {self._passes}" if self._passes > 1 else ""
        for done, (images, _) in enumerate(islice(self._data, self._count)):
            self._bar.show(done, total, pass_label)
            yield images.to(self._dtype)
            self._bar.show(done + 1, total, pass_label)

    def _total(self) -> int | None:
        try:
            return min(len(self._data), self._count or len(self._data))
        except TypeError:  # a streamed data set may have no length
            return self._count


def _run_calibration(opened: "OpenedModel", data: "Data", options: dict[str, Any]) -> "Calibration":
    from normswap.checkpoints.loading import floating_dtype
    from normswap.running_stats.calibration import calibrate

    device = options["device"]
    model = move_model(opened.model, device)
    with progress_bar("calibrating") as bar:
        result = calibrate(
            model,
            _Batches(data, options["batches"], floating_dtype(model), bar),
            layer_by_layer=options["layer_by_layer"],
            include_frozen=options["include_frozen"],
            only=options["only"],
            match=options["match"],
            device=device,
        )
    model.to("cpu")
    return result
