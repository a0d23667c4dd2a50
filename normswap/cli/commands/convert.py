"""`normswap convert`: the command line of `normswap.convert_file`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from normswap.checkpoints.file_output import ConvertOptions, NetworkOptions, check_output
from normswap.checkpoints.io.atomic_files import check_readable, check_writable, write_text
from normswap.checkpoints.io.memory import only_new_objects_scanned, return_freed_memory
from normswap.cli.console import (
    one_line_failures,
    print_json,
    report_interruption,
    stage,
    translate_arguments,
    translate_plan,
)
from normswap.cli.options import (
    InputSpec,
    archs_option,
    data_set_options,
    entries_option,
    example_inputs,
    json_option,
    kinds_option,
    named_inputs_option,
    open_data_set,
    tolerance_option,
    trust_option,
)
from normswap.errors import NothingToDo, PlanError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from normswap.checkpoints.file_conversion import FileConversion
    from normswap.surgery.plan import SwapPlan

_GATES = ("simplex", "softmax")
_STATISTICS = ("running", "batch", "renorm")
_STARTS = ("ln", "gn", "uniform")
# The options that decide which sites are swapped and how.
_SWAP_OPTIONS = (
    *("include", "exclude", "kinds", "gate", "bn_statistics", "synchronize"),
    *("start", "num_groups", "untrained"),
)


_DATA_OPTIONS = ("source", "split", "data_root", "input_size", "batch_size", "batches")


@click.command("convert", short_help="Convert a file and write the model to a new one.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    help="The file to write; NAME.safetensors becomes that format, other names a torch file. Default: "
    "model.normswap.pt next to model.pt, in the same format.",
)
@archs_option
@entries_option
@named_inputs_option
@click.option("--include", multiple=True, metavar="PATTERN", help="Swap only these sites: glob on names, or re:REGEX.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Do not swap these sites; overrides --include.")
@kinds_option
@click.option(
    "--gate",
    type=click.Choice(_GATES),
    help="simplex (default) starts at the same function; softmax, as in the paper, at equal weights: another function.",
)
@click.option(
    "--bn-statistics",
    type=click.Choice(_STATISTICS),
    help="Statistics of the bn branches in training: running (default), as constants, so that nothing depends on the "
    "batch; batch, as BatchNorm itself, to go on training with large batches; renorm.",
)
@click.option(
    "--start",
    type=click.Choice(_STARTS),
    help="Start without a bn branch: at layer norm (ln) or group norm (gn) matched to the running statistics, or at "
    "equal weights of in and ln (uniform). The function changes; its distance is measured and recorded.",
)
@click.option("--groups", "num_groups", type=click.IntRange(1), help="Number of groups for --start gn. Default: 32.")
@click.option("--no-match", is_flag=True, help="Do not match the in and ln branches to the running statistics.")
@click.option(
    "--untrained",
    type=click.Choice(("keep", "uniform")),
    help="What to do with norms whose statistics were never updated: keep (default) their function, or start them at "
    "equal weights of in and ln.",
)
@click.option(
    "--synchronize",
    is_flag=True,
    help="In training, compute the BN statistics over the batches of all processes, as SyncBatchNorm does.",
)
@click.option(
    "--data",
    "source",
    metavar="SPEC",
    help="Match the in branches to the images of a data set, which needs no labels, and measure the distance of "
    "--start on them: folder:PATH, digits, digits:shifted, or a timm name such as torch/NAME.",
)
@data_set_options
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Images per batch.")
@click.option("--batches", type=click.IntRange(1), default=4, show_default=True, help="Number of batches.")
@click.option("--plan", type=click.Path(path_type=Path), help="Apply a plan written by --save-plan.")
@click.option("--save-plan", type=click.Path(path_type=Path), help="Write the plan as JSON, also with --dry-run.")
@click.option("--weights-only", is_flag=True, help="Write only the converted weights; drop optimizer, epoch and EMA.")
@click.option("--verify/--no-verify", default=True, help="Check that the function stays the same (default).")
@tolerance_option
@click.option("--dry-run", is_flag=True, help="Do everything except writing the model.")
@trust_option
@click.option("--force", is_flag=True, help="Replace existing output files.")
@json_option
@one_line_failures
@return_freed_memory()
def convert_command(
    file: Path,
    output: str | None,
    archs: tuple[str, ...],
    entries: tuple[str, ...],
    inputs: tuple[InputSpec, ...],
    plan: Path | None,
    save_plan: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Swap Batch Normalization (and more, see --kinds) for Switchable Normalization in FILE, into a new file.

    FILE is any checkpoint: a state dict, a training checkpoint (its EMA copy and optimizer are converted too), a
    pickled module, an exported program, a folder of shards. The converted model is compared with the original and
    written only if it computes the same function; a model that cannot be compared is written only with --no-verify.
    With --start it computes another function, and its distance from the original is printed and recorded instead.
    With --arch none the tensors are converted by their names only. Exit codes: 0 success; 1 nothing to convert or
    outputs differ; 2 error.
    """
    swap = {name: value for name in _SWAP_OPTIONS if (value := options.pop(name))}
    if options.pop("no_match"):
        swap["match"] = False
    networks = networks_from_options(entries, archs, inputs)
    data_options = {name: options.pop(name) for name in _DATA_OPTIONS}
    data, data_name = _data(archs, data_options), _describe_data(data_options)
    arguments = ConvertOptions(file, output, networks, data=data, data_name=data_name, overwrite=force, **options)
    printer = _Printer(as_json=as_json)
    with report_interruption(lambda: printer.written):
        try:
            _check_paths(arguments, plan, save_plan)
            _convert(arguments, swap, plan, save_plan, printer)
        except NothingToDo:
            printer.print_document()
            raise
        printer.print_document()


def _describe_data(options: dict[str, Any]) -> str:
    """The images that the branches are matched to, for the history.

    Raises:
        click.UsageError: options of a data set are given without one.
    """
    if options["source"] is not None:
        return "{source}, {split}, at most {batches} batches of {batch_size}".format(**options)
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in _DATA_OPTIONS and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} has no effect without --data: pass both, or none")
    return ""


def _data(archs: Sequence[str], options: dict[str, Any]) -> "Callable[[nn.Module], list[Tensor]] | None":
    """Return a function that reads batches of images for a model; None without a data set."""
    if options["source"] is None:
        return None

    def read(model: "nn.Module") -> "list[Tensor]":
        """Read the batches."""
        from normswap.checkpoints.loading import floating_dtype

        data = open_data_set(options["source"], model, archs[0] if archs else None, options)
        with stage(f"reading {options['batches']} batches"):
            return [images.to(floating_dtype(model)) for images, _ in islice(data, options["batches"])]

    return read


def _check_paths(arguments: ConvertOptions, plan: Path | None, save_plan: Path | None) -> None:
    """Refuse paths before torch is imported, which takes seconds."""
    if save_plan is not None and save_plan.resolve() == arguments.target.resolve():
        raise click.UsageError("--save-plan and the output have the same name: choose another for one of them")
    if save_plan is not None and arguments.several:
        raise click.UsageError("--save-plan applies to one network: pass one --entry")
    check_readable(arguments.file)
    if plan is not None:
        check_readable(plan)
    check_output(arguments.file, arguments.target, overwrite=arguments.overwrite)
    if save_plan is not None:
        check_writable(save_plan, replace=arguments.overwrite)


def _load_plan(path: Path | None) -> "SwapPlan | None":
    if path is None:
        return None
    from normswap.surgery.plan import SwapPlan

    try:
        return SwapPlan.from_json(path.read_text(encoding="utf-8"))
    except (PlanError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: {error}") from error


def _convert(
    arguments: ConvertOptions, swap: dict[str, Any], plan: Path | None, save_plan: Path | None, printer: "_Printer"
) -> None:
    with stage("starting"):
        from normswap.checkpoints.file_conversion import run_conversion
        from normswap.surgery.selection import SwapOptions

    arguments = replace(arguments, swap=SwapOptions(**swap), plan=_load_plan(plan))
    with only_new_objects_scanned():
        result = run_conversion(arguments, progress=stage, report=printer.show)
    if save_plan is not None:
        write_text(save_plan, result.plan.to_json())
    printer.print_closing_lines(save_plan, arguments.data_name)


class _Printer:
    """Prints a conversion on stdout: tables as soon as they are known, or one JSON document at the end."""

    def __init__(self, *, as_json: bool) -> None:
        self.result: FileConversion | None = None
        self._as_json, self._num_printed = as_json, 0

    @property
    def written(self) -> Path | None:
        """The new file, None if it is not written yet."""
        return self.result.output if self.result is not None and self.result.written else None

    def show(self, result: "FileConversion") -> None:
        """Print the parts of a result that the previous one did not have."""
        from rich.console import Console

        from normswap.reports.results import file_conversion_parts

        self.result = _translate(result)
        parts = file_conversion_parts(self.result)
        console = Console(highlight=False, quiet=self._as_json)
        for part in parts[self._num_printed :]:
            console.print(part)
        self._num_printed = len(parts)

    def print_closing_lines(self, saved_plan: Path | None, data_name: str) -> None:
        """Print what was written, and what to type next."""
        from rich.console import Console

        if self.result is None:
            return
        console = Console(highlight=False, quiet=self._as_json)
        console.print()
        if data_name and any(swap.matched for network in self.result.networks for swap in network.plan.swaps):
            console.print(f"`in` branches matched to {data_name}", markup=False, soft_wrap=True)
        elif any(network.distance for network in self.result.networks):
            console.print("distance measured on the example input: pass --data to measure it on images", soft_wrap=True)
        if saved_plan is not None:
            console.print(f"plan written to {saved_plan}", markup=False)
        for line in self.result.closing_lines():
            is_code = line.startswith("next: ")
            text = line if is_code else translate_arguments(line)
            console.print(text, style="bold" if self.written and not is_code else None, markup=False, soft_wrap=True)

    def print_document(self) -> None:
        """Print the result as JSON, if that was asked for."""
        if self._as_json and self.result is not None:
            print_json(self.result.to_dict())


def _translate(result: "FileConversion") -> "FileConversion":
    """A result whose texts name options of the command line instead of Python's arguments."""
    networks = (
        replace(
            network,
            plan=translate_plan(network.plan),
            unverified=network.unverified and translate_arguments(network.unverified),
        )
        for network in result.networks
    )
    return replace(result, networks=tuple(networks), notes=tuple(map(translate_arguments, result.notes)))


def networks_from_options(
    entries: Sequence[str], archs: Sequence[str], inputs: Sequence[InputSpec]
) -> tuple[NetworkOptions, ...]:
    """Return the networks that `--entry`, `--arch` and `--input` name: one, or one for each of several entries.

    Raises:
        click.UsageError: it is unclear which network has an architecture or an input.
    """
    names: Sequence[str | None] = entries or [None]
    if len(archs) > 1 and len(entries) < 2:
        raise click.UsageError(f"--arch: expected one, got {len(archs)}: name the networks with --entry")
    if len(archs) not in (0, 1, len(names)):
        raise click.UsageError(f"--arch: expected one, or one for each of {len(names)} --entry, got {len(archs)}")
    unknown = [spec.entry for spec in inputs if spec.entry is not None and spec.entry not in entries]
    if unknown:
        raise click.UsageError(f"--input {unknown[0]}=...: there is no --entry {unknown[0]}")
    return tuple(
        NetworkOptions(
            name,
            (archs[index] if len(archs) > 1 else archs[0]) if archs else None,
            example_inputs(_select_inputs(name, index, names, inputs)),
        )
        for index, name in enumerate(names)
    )


def _select_inputs(
    name: str | None, index: int, names: Sequence[str | None], inputs: Sequence[InputSpec]
) -> tuple[InputSpec, ...]:
    """The inputs of one network: those with its name; else the only one, or the one at its position."""
    named_specs = tuple(spec for spec in inputs if spec.entry is not None and spec.entry == name)
    unnamed_specs = tuple(spec for spec in inputs if spec.entry is None)
    if named_specs or len(names) == 1 or len(unnamed_specs) < 2:
        return named_specs or unnamed_specs
    if len(unnamed_specs) != len(names) or len(unnamed_specs) != len(inputs):
        raise click.UsageError(
            f"--input: expected one, or one for each of {len(names)} --entry, got {len(unnamed_specs)}: name the "
            f"network, such as --input {name}=2x3x224x224"
        )
    return (unnamed_specs[index],)
