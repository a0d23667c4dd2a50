"""`normswap analyze`: what data without labels show of the norms in a file; nothing is written."""

import ast
import re
import shlex
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.checkpoints.io.atomic_files import check_readable
from normswap.cli.console import one_line_failures, print_json, progress_bar
from normswap.cli.options import (
    arch_option,
    data_option,
    data_set_options,
    entry_option,
    json_option,
    move_model,
    open_data_set,
    open_model,
    read_file,
    trust_option,
)
from normswap.errors import CheckpointError

if TYPE_CHECKING:
    from normswap.analysis.network import Analysis
    from normswap.checkpoints.loading import OpenedModel
    from normswap.finetune.data.datasets import Data

_LOADED_TOGETHER = 32


@click.command("analyze", short_help="Measure the norms in a file on data, and say what to do with them.")
@click.argument("file", type=click.Path(path_type=Path))
@data_option
@data_set_options
@click.option(
    "--batch-size", type=click.IntRange(1), default=2, show_default=True, help="Images per batch in the training."
)
@click.option(
    "--images", type=click.IntRange(1), default=64, show_default=True, help="Number of randomly drawn images."
)
@click.option(
    "--budget",
    type=click.FloatRange(min=0),
    help="Of a converted file: the largest relative error of the outputs that sites with one branch may cause.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed for the choice of the images.")
@click.option("--device", default="cpu", show_default=True, help="Device that runs the model, such as cuda.")
@arch_option
@entry_option
@trust_option
@json_option
@one_line_failures
def analyze_command(
    file: Path, source: str, arch: str | None, entry: str | None, as_json: bool, **options: Any
) -> None:
    """Measure the norms in FILE on images without labels, and print advice. Nothing is written.

    Of each Batch Normalization: how far training with such small batches is from evaluation, how much of that is due to
    the size of the batches and how much to other data than those of the running statistics, and what to do. Of each
    converted site: what all weight on one branch does to the outputs, and settings for the sites that can have one
    branch within --budget.
    """
    check_readable(file)
    checkpoint = read_file(file, trust=options["trust"], entry=entry, arch=arch)
    if checkpoint.program is not None:
        raise CheckpointError(
            f"{file}: only the weights of an exported program can be analyzed: leave --trust out, or pass --arch"
        )
    opened = open_model(checkpoint, arch=arch, inputs=(), trust=options["trust"])
    batch_size, images = options["batch_size"], options["images"]
    if images < batch_size:
        raise click.BadParameter(
            f"expected at least --batch-size {batch_size} images, got {images}", param_hint="--images"
        )
    loaded = min(images, batch_size * max(1, _LOADED_TOGETHER // batch_size))
    data = open_data_set(source, opened.model, opened.architecture, {**options, "batch_size": loaded})
    result = _run_analysis(opened, data, -(-images // loaded), options)
    if as_json:
        print_json({"file": str(file), "architecture": opened.architecture, "data": source, **result.to_dict()})
        return
    from rich.console import Console

    from normswap.reports.analysis_tables import analysis_table, settings_text
    from normswap.reports.tables import heading

    console = Console(highlight=False)
    console.print(heading(file.name, checkpoint.describe(opened.architecture)))
    console.print()
    console.print(analysis_table(result, translate=lambda advice: _as_commands(advice, file, source)))
    if result.plan is not None and result.plan.settings:
        click.echo(f"\nTo start at these branches, add to a recipe:\n{settings_text(result.plan)}")


def _run_analysis(opened: "OpenedModel", data: "Data", count: int, options: dict[str, Any]) -> "Analysis":
    from normswap.analysis.network import analyze
    from normswap.checkpoints.loading import floating_dtype

    model = move_model(opened.model, options["device"])
    dtype = floating_dtype(model)
    with progress_bar("analyzing") as bar:
        return analyze(
            model,
            [images.to(dtype) for images, _ in islice(data, count)],
            batch_size=options["batch_size"],
            budget=options["budget"],
            device=options["device"],
            on_site=bar.show,
        )


def _as_commands(advice: str, file: Path, source: str) -> str:
    """Return advice with commands on this file instead of calls in Python; freezing has no command."""

    def calibrate(match: re.Match[str]) -> str:
        """Return the command for a call of `calibrate`."""
        words = ["normswap", "calibrate", str(file), "--data", source]
        for name in ast.literal_eval(match[1] or "[]"):
            words += ["--only", name]
        return shlex.join(words)

    advice = re.sub(r"normswap\.calibrate\(model, batches(?:, only=(\[.*?\]))?\)", calibrate, advice)
    return advice.replace("normswap.convert(model, x)", shlex.join(["normswap", "convert", str(file)]))
