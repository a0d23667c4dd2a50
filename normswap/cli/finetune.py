"""`normswap finetune`: a recipe carried out."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.cli.failures import one_line_failures
from normswap.cli.options import json_option, print_json, trust_option
from normswap.cli.progress import progress_bar
from normswap.errors import RecipeError

if TYPE_CHECKING:
    from normswap.finetune.recipe import Recipe
    from normswap.finetune.trainer import Outcome


@click.command("finetune", short_help="Fine-tune a model as a recipe says.")
@click.argument("recipe")
@click.option(
    "--set",
    "overrides",
    metavar="TABLE.KEY=VALUE",
    multiple=True,
    help="Put a value over the recipe's, such as train.lr=0.003; none takes a key out. Repeatable.",
)
@click.option("--resume", is_flag=True, help="Go on from the state that an interrupted run has saved.")
@click.option("--force", is_flag=True, help="Start anew where the folder of the run holds one.")
@trust_option
@json_option
@one_line_failures
def finetune_command(
    recipe: str, overrides: tuple[str, ...], resume: bool, force: bool, trust: bool, as_json: bool
) -> None:
    """Fine-tune a model as RECIPE says: a file in .toml, or the name of a recipe that `normswap recipes ls` lists.

    The model is loaded, converted and proved if it is not converted yet, trained and evaluated. Its folder gets
    model.pt, which `normswap load`s, state.pt to go on from, log.jsonl and a picture. With several processes:
    torchrun --nproc-per-node 2 -m normswap finetune RECIPE.
    """
    from normswap.finetune.recipe import read_recipe

    recipe_to_run = read_recipe(recipe, overrides)
    _check_installed()
    from rich.console import Console

    from normswap.finetune.trainer import is_first_process
    from normswap.reports.results import outcome_table

    console = Console(highlight=False, stderr=as_json, quiet=not is_first_process())
    outcome = _run(recipe_to_run, resume=resume, overwrite=force, trust=trust)
    if not is_first_process():
        return
    picture = _plot_outcome(outcome)
    if as_json:
        paths = {"output": outcome.output, "model": outcome.model, "log": outcome.log, "picture": picture}
        print_json({**asdict(outcome), **{name: str(path) for name, path in paths.items()}})
    else:
        console.print(outcome_table(outcome, picture))


def _run(recipe_to_run: "Recipe", **options: bool) -> "Outcome":
    """Run a recipe and show how far it has come.

    Raises:
        KeyboardInterrupt: at once, in the middle of a step or before the first one; says what is kept.
    """
    from normswap.finetune.model_source import STATE
    from normswap.finetune.trainer import run_recipe

    state = recipe_to_run.output / STATE
    before = state.stat().st_mtime_ns if state.is_file() else None
    try:
        with _progress() as (on_step, on_record):
            return run_recipe(recipe_to_run, on_step=on_step, on_record=on_record, **options)
    except KeyboardInterrupt:
        is_new = state.is_file() and state.stat().st_mtime_ns != before
        kept = (
            f"the last saved state is in {recipe_to_run.output}: go on with --resume"
            if is_new
            else "no state was saved"
        )
        raise KeyboardInterrupt(f"interrupted; {kept}") from None


def _plot_outcome(outcome: "Outcome") -> Path:
    from normswap.finetune.run_files import read_journal
    from normswap.reports.results import plot_run

    path = outcome.output / "course.png"
    plot_run(read_journal(outcome.output), path)
    return path


def _check_installed() -> None:
    """Refuse before an hour of training what would fail after it."""
    missing = [name for name in ("accelerate", "matplotlib") if find_spec(name) is None]
    if missing:
        raise RecipeError(f"fine-tuning needs {' and '.join(missing)}: pip install 'normswap[finetune]'")


def _format_record(record: Mapping[str, Any]) -> list[str]:
    """Lines for the terminal: what people want to see while they wait."""
    lines = [f"note: {note}" for note in record.get("notes", ())]
    if "evaluation" in record:
        found = record["evaluation"]
        lines.append(f"step {record['step']}: accuracy {found['accuracy']:.1f} %, loss {found['loss']:.3f}")
    return lines


@contextmanager
def _progress() -> Iterator[tuple[Callable[[int, int], None], Callable[[Mapping[str, Any]], None]]]:
    """Yield what to call at every step and with every record of the log; a bar on stderr if that is a terminal."""
    from normswap.reports.results import describe_losses

    figures = ""
    with progress_bar("training") as bar:

        def on_step(step: int, steps: int) -> None:
            bar.show(step, steps, figures)

        def on_record(record: Mapping[str, Any]) -> None:
            nonlocal figures
            figures = describe_losses(record) or figures
            for line in _format_record(record):
                bar.print_line(line)

        yield on_step, on_record
