"""`normswap identify`: finds the architecture of the tensors in a file, without building a model."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.checkpoints.io.atomic_files import check_readable
from normswap.cli.console import one_line_failures, print_json, stage
from normswap.cli.options import entry_option, json_option, read_file, trust_option

if TYPE_CHECKING:
    from normswap.checkpoints.architecture.identification import Identification


@click.command("identify", short_help="Find the timm or torchvision model of a file.")
@click.argument("file", type=click.Path(path_type=Path))
@entry_option
@trust_option
@json_option
@one_line_failures
def identify_command(file: Path, entry: str | None, trust: bool, as_json: bool) -> None:
    """Find the model of timm or torchvision that has the tensors in FILE.

    Exit codes: 0 one architecture fits, and its name is printed as an option for --arch; 1 several architectures fit
    that compute different functions, or none fits (the nearest are shown); 2 error.
    """
    check_readable(file)
    checkpoint = read_file(file, trust=trust, entry=entry)
    from normswap.checkpoints.loading import recorded_architecture

    if checkpoint.record is not None and recorded_architecture(checkpoint, trust=trust) is not None:
        checkpoint.origin.check_unchanged()
        _print_known(file, checkpoint.record.architecture or f"hf:{checkpoint.path}", as_json=as_json)
        return
    with stage("comparing with all architectures"):
        from normswap.checkpoints.architecture.identification import get_state_dict, identify_state_dict, require_unique

        found = identify_state_dict(get_state_dict(checkpoint.weights), checkpoint.content)
    checkpoint.origin.check_unchanged()
    if as_json:
        print_json(_document(file, found))
    else:
        _print(file, found)
    require_unique(found)


def _print_known(file: Path, architecture: str, *, as_json: bool) -> None:
    """Print the architecture in the record of the file."""
    if as_json:
        print_json({"file": str(file), "architecture": architecture, "recorded": True})
    else:
        click.echo(f"{file.name} was written by normswap as {architecture}: --arch is not needed")


def _print(file: Path, found: "Identification") -> None:
    from rich.console import Console

    from normswap.checkpoints.reading import describe_size
    from normswap.reports.tables import heading, identification

    console = Console(highlight=False)
    console.print(heading(file.name, describe_size(file)))
    console.print()
    console.print(identification(found))
    if len(found.functions) == 1:
        console.print()
        console.print(f"type: --arch {found.functions[0][0].architecture}", style="bold", markup=False, soft_wrap=True)


def _document(file: Path, found: "Identification") -> dict[str, Any]:
    functions = found.functions
    return {
        "file": str(file),
        "architecture": functions[0][0].architecture if len(functions) == 1 else None,
        "recorded": False,
        "functions": [[asdict(candidate) for candidate in group] for group in functions],
        "differences": found.differences(),
        "matches": [asdict(match) for match in found.matches],
        "index": found.origin,
        "layout": found.layout,
    }
