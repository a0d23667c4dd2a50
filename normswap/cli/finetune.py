"""`normswap finetune`: a recipe carried out."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import click

from normswap.cli.failures import one_line_failures
from normswap.cli.options import json_option, print_json, trust_option
from normswap.errors import RecipeError


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

    wanted = read_recipe(recipe, overrides)
    _check_installed()
    from rich.console import Console

    from normswap.finetune.engine import is_first_process, run_recipe
    from normswap.finetune.journal import read_journal
    from normswap.reports.finetuning import draw_course, outcome_table

    console = Console(highlight=False, stderr=as_json, quiet=not is_first_process())
    with _progress() as (on_step, say):
        outcome = run_recipe(
            wanted,
            resume=resume,
            overwrite=force,
            trust=trust,
            on_step=on_step,
            on_record=lambda record: say(_told(record)),
        )
    if not is_first_process():
        return
    draw_course(read_journal(outcome.output), outcome.output / "course.png")
    if as_json:
        print_json({**asdict(outcome), "output": str(outcome.output), "model": str(outcome.model)})
    else:
        console.print(outcome_table(outcome))


def _check_installed() -> None:
    """Refuse before an hour of training what would fail after it."""
    missing = [name for name in ("accelerate", "matplotlib") if find_spec(name) is None]
    if missing:
        raise RecipeError(f"fine-tuning needs {' and '.join(missing)}: pip install 'normswap[finetune]'")


def _told(record: Mapping[str, Any]) -> str | None:
    """A line for the terminal, for what people want to see while they wait."""
    if "evaluation" in record:
        found = record["evaluation"]
        return f"step {record['step']}: accuracy {found['accuracy']:.1f} %, loss {found['loss']:.3f}"
    return None


@contextmanager
def _progress() -> Iterator[tuple[Callable[[int, int], None], Callable[[str | None], None]]]:
    """Give what to call at every step and with every line; a bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=None)

        def on_step(step: int, steps: int) -> None:
            progress.update(task, completed=step, total=steps)

        def say(line: str | None) -> None:
            if line:
                console.print(line)

        yield on_step, say
