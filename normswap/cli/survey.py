"""What `normswap inspect` shows of a file whose architecture nobody knows: its norms by name, and what to type."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from normswap.cli.open_model import describe_size
from normswap.cli.options import print_json
from normswap.cli.progress import stage
from normswap.errors import CheckpointError, NothingToDo

if TYPE_CHECKING:
    from normswap.checkpoints.architecture.identification import Identification
    from normswap.checkpoints.content.state_dict import Survey
    from normswap.checkpoints.loading import CheckpointHeader

_ADVICE = {
    "--arch path/file.py:function": "if a function of yours builds the model",
    "--arch timm:NAME": "if it is a model of timm; torchvision:NAME and hf:FOLDER likewise",
}
_BY_NAMES = "--arch none --no-verify"


def has_multiple_weights(header: "CheckpointHeader", *, trust: bool) -> bool:
    """Say whether a file holds several sets of weights, of which `--entry` chooses one."""
    from normswap.checkpoints.content.entries import find_weights
    from normswap.checkpoints.loading import read_content

    return len(find_weights(read_content(header, trust=trust, mmap=True))) > 1


def print_survey(header: "CheckpointHeader", *, entry: str | None, trust: bool, as_json: bool) -> None:
    """Print what the names and shapes in a file tell: all its weights, or those at `entry`.

    Raises:
        CheckpointError: there are no weights at `entry`, or the file changed while it was read.
        NothingToDo: there are no norm tensors, which is printed first.
    """
    from normswap.checkpoints.content.entries import read_contents
    from normswap.checkpoints.content.state_dict import survey
    from normswap.checkpoints.loading import read_content

    content = read_content(header, trust=trust, mmap=True)
    found = survey(content)
    if entry is not None:
        read_contents(content, entry=entry)
        found = type(found)(tuple(one for one in found.weights if one.entry == entry), found.optimizers)
    identified = _identify(content, entry)
    header.origin.check_unchanged()
    if as_json:
        print_json(_document(header, found, identified))
    else:
        _print(header, found, identified)
    if not any(weights.norms for weights in found.weights):
        raise NothingToDo(f"{header.path}: no norm tensors in this file, by their names: nothing to convert")


def _identify(content: Any, entry: str | None) -> "Identification | None":
    """Which architectures fit the weights that are meant; None where several are and no name is likelier."""
    from normswap.checkpoints.architecture.identification import get_state_dict, identify_state_dict
    from normswap.checkpoints.content.entries import get_entry, read_contents

    try:
        weights = get_entry(content, read_contents(content, entry=entry).weights)
    except CheckpointError:
        return None
    with stage("comparing with all architectures"):
        return identify_state_dict(get_state_dict(weights), content)


def _document(header: "CheckpointHeader", found: "Survey", identified: "Identification | None") -> dict[str, Any]:
    weights = [{**asdict(one), "batch_norms": len(one.batch_norms)} for one in found.weights]
    return {
        "file": str(header.path),
        "container": header.container,
        "architecture": None,
        "converted": False,
        "weights": weights,
        "optimizers": list(found.optimizers),
        "candidates": [group[0].architecture for group in identified.functions] if identified else [],
        "nearest": [match.architecture for match in identified.matches] if identified else [],
        "next": list(_suggest_options(found, identified)),
    }


def _print(header: "CheckpointHeader", found: "Survey", identified: "Identification | None") -> None:
    from rich.console import Console

    from normswap.reports.tables import bullets, heading, identification, weights_table

    console = Console(highlight=False)
    facts = ("architecture unknown", header.container, describe_size(header.path))
    parts = [heading(header.path.name, ", ".join(facts)), *map(weights_table, found.weights)]
    parts += [bullets(f"{name}: the state of an optimizer" for name in found.optimizers)] if found.optimizers else []
    parts += [identification(identified)] if identified is not None else []
    for number, part in enumerate(parts):
        if number:
            console.print()
        console.print(part)
    console.print()
    for option, meaning in _suggest_options(found, identified).items():
        console.print(f"type: {option}  ({meaning})", markup=False, soft_wrap=True)


def _suggest_options(found: "Survey", identified: "Identification | None") -> dict[str, str]:
    """Options to type next, each with what it is for."""
    entries = {f"--entry {one.entry}": "to choose these weights" for one in found.weights if one.entry}
    fitting = {
        f"--arch {group[0].architecture}": "fits all tensors" for group in (identified.functions if identified else ())
    }
    count = sum(len(one.batch_norms) for one in found.weights) if len(found.weights) == 1 else 0
    names = {_BY_NAMES: f"with normswap convert: converts the {count} batch norms by their names"} if count else {}
    return {**(entries if len(entries) > 1 else {}), **(fitting or _ADVICE), **names}
