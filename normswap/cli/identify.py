"""`normswap identify`: which architecture the tensors of a file belong to; nothing is built and nothing is written."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.checkpoints.io.atomic_files import check_readable
from normswap.cli.failures import one_line_failures
from normswap.cli.open_model import describe_size, read_file
from normswap.cli.options import entry_option, json_option, print_json, trust_option
from normswap.cli.progress import stage

if TYPE_CHECKING:
    from normswap.checkpoints.architecture.identification import Identification


@click.command("identify", short_help="Tell which timm or torchvision model a file holds.")
@click.argument("file", type=click.Path(path_type=Path))
@entry_option
@trust_option
@json_option
@one_line_failures
def identify_command(file: Path, entry: str | None, trust: bool, as_json: bool) -> None:
    """Tell which model of timm or torchvision the tensors of FILE belong to.

    Exit status 0: one function fits, and its name is what --arch takes. 1: several fit that compute different
    functions, with how they differ; or none fits, with the nearest and what they lack.
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
    """The file says it itself: normswap wrote it."""
    if as_json:
        print_json({"file": str(file), "architecture": architecture, "recorded": True})
    else:
        click.echo(f"{file.name} says that it belongs to {architecture}; it needs no --arch")


def _print(file: Path, found: "Identification") -> None:
    from rich.console import Console

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
    }
