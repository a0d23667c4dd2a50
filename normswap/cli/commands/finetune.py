"""`normswap finetune`: trains a model as a recipe describes. `normswap recipes`: lists, shows and copies recipes."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normswap.cli.console import one_line_failures, print_json, progress_bar
from normswap.cli.options import json_option, trust_option
from normswap.errors import RecipeError
from normswap.text import pluralize

if TYPE_CHECKING:
    from normswap.finetune.preview import RunPreview
    from normswap.finetune.recipe import Recipe, ShippedRecipe
    from normswap.finetune.run_files import Outcome


# --- normswap finetune ------------------------------------------------------------------------------------------------


overrides_option = click.option(
    "--set",
    "overrides",
    metavar="TABLE.KEY=VALUE",
    multiple=True,
    help="Override a value of the recipe, such as train.lr=0.003; none removes a key. Repeatable.",
)


@click.command("finetune", short_help="Fine-tune a model as a recipe describes.")
@click.argument("recipe")
@overrides_option
@click.option("--resume", is_flag=True, help="Continue from the saved state of an interrupted run.")
@click.option("--force", is_flag=True, help="Start again even if the output folder contains a run.")
@click.option("--dry-run", is_flag=True, help="Build everything, print sizes, steps, rates and memory; write nothing.")
@trust_option
@json_option
@one_line_failures
def finetune_command(
    recipe: str, overrides: tuple[str, ...], resume: bool, force: bool, dry_run: bool, trust: bool, as_json: bool
) -> None:
    """Fine-tune a model as RECIPE describes: a .toml file, or the name of a recipe that `normswap recipes ls` lists.

    The model is loaded, converted and verified if it is not converted yet, trained and evaluated. The output folder
    contains model.pt for normswap.load, state.pt for --resume, log.jsonl and a plot. With several processes:
    torchrun --nproc-per-node 2 -m normswap finetune RECIPE.
    """
    recipe_to_run = _read_recipe(recipe, overrides)
    _check_installed()
    if dry_run:
        _print_preview(_preview(recipe_to_run, trust=trust), as_json=as_json)
        return
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
        evaluations = {"before": outcome.before, "after": outcome.after}
        print_json(
            {
                **asdict(outcome),
                # As before there were tasks; `evaluations` has the same by name.
                **{name: (found.loss, found.leading, found.images) for name, found in evaluations.items()},
                "evaluations": {name: found.to_dict() for name, found in evaluations.items()},
                **{name: str(path) for name, path in paths.items()},
            }
        )
    else:
        console.print(outcome_table(outcome, picture))


def _preview(recipe_to_run: "Recipe", *, trust: bool) -> "RunPreview":
    from normswap.cli.console import stage
    from normswap.finetune.preview import preview_recipe

    with stage("building the run"):
        return preview_recipe(recipe_to_run, trust=trust)


def _print_preview(preview: "RunPreview", *, as_json: bool) -> None:
    if as_json:
        print_json(preview.to_dict())
        return
    from rich.console import Console

    from normswap.reports.results import preview_table

    Console(highlight=False).print(preview_table(preview))


def _read_recipe(recipe: str, overrides: tuple[str, ...]) -> "Recipe":
    """Read a recipe; what Python would hide from users of a command, such as an old key, is shown on stderr."""
    from normswap.finetune.recipe import read_recipe

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecationWarning)
        found = read_recipe(recipe, overrides)
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        click.echo(f"warning: {message}", err=True)
    return found


def _run(recipe_to_run: "Recipe", **options: bool) -> "Outcome":
    """Run a recipe and show its progress.

    Raises:
        KeyboardInterrupt: the run was stopped within a step or before the first one; the message names what was saved.
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
            f"the last saved state is in {recipe_to_run.output}: continue with --resume"
            if is_new
            else "no state was saved"
        )
        raise KeyboardInterrupt(f"interrupted; {kept}") from None


def _plot_outcome(outcome: "Outcome") -> Path:
    from normswap.finetune.run_files import read_journal
    from normswap.reports.plots import plot_run

    path = outcome.output / "course.png"
    plot_run(read_journal(outcome.output), path)
    return path


def _check_installed() -> None:
    """Check packages that are only used after the training."""
    missing = [name for name in ("accelerate", "matplotlib") if find_spec(name) is None]
    if missing:
        raise RecipeError(f"fine-tuning needs {' and '.join(missing)}: pip install 'normswap[finetune]'")


def _format_record(record: Mapping[str, Any]) -> list[str]:
    """The notes and the evaluation in a record of the log, as lines for the terminal."""
    from normswap.reports.results import describe_evaluation

    lines = [f"note: {note}" for note in record.get("notes", ())]
    if "evaluation" in record:
        lines.append(f"step {record['step']}: {describe_evaluation(record['evaluation'])}")
    return lines


@contextmanager
def _progress() -> Iterator[tuple[Callable[[int, int], None], Callable[[Mapping[str, Any]], None]]]:
    """Yield the callbacks for every step and every record of the log; they show a bar on stderr if it is a terminal."""
    from normswap.reports.results import describe_losses

    figures = ""
    with progress_bar("training") as bar:

        def on_step(step: int, steps: int) -> None:
            bar.show(step, steps, figures)

        def on_record(record: Mapping[str, Any]) -> None:
            """Show the losses next to the bar, and notes and evaluations above it."""
            nonlocal figures
            figures = describe_losses(record) or figures
            for line in _format_record(record):
                bar.print_line(line)

        yield on_step, on_record


# --- normswap recipes -------------------------------------------------------------------------------------------------


@click.group("recipes", short_help="List, show, copy or check the recipes for fine-tuning.")
def recipes_command() -> None:
    """List, show or copy the recipes for fine-tuning that come with normswap, or check one."""


@recipes_command.command("ls")
@one_line_failures
def list_command() -> None:
    """List the recipes, each with its purpose."""
    from normswap.finetune.recipe import shipped_recipes

    for recipe in shipped_recipes().values():
        click.secho(recipe.name, bold=True)
        click.echo(click.wrap_text(recipe.summary, 80, "  ", "  "))


@recipes_command.command("show")
@click.argument("name")
@one_line_failures
def show_command(name: str) -> None:
    """Print the recipe NAME."""
    click.echo(_find_recipe(name).text, nl=False)


@recipes_command.command("cp")
@click.argument("name")
@click.argument("target", type=click.Path(path_type=Path), required=False)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@one_line_failures
def copy_command(name: str, target: Path | None, force: bool) -> None:
    """Copy the recipe NAME to TARGET, a file or a folder (default: the current folder), to edit and run it."""
    recipe = _find_recipe(name)
    place = target or Path()
    if place.is_dir():
        place = place / f"{name}.toml"
    if place.suffix != ".toml":
        raise RecipeError(f"{place}: expected a folder or a name that ends in .toml")
    from normswap.checkpoints.io.atomic_files import check_writable, write_text

    copies = {place: recipe.text, **{place.parent / file.name: file.read_text("utf-8") for file in recipe.companions}}
    for path in copies:
        check_writable(path, replace=force)
    for path, text in copies.items():
        write_text(path, text)
    trust = " --trust" if recipe.companions else ""
    click.echo(f"wrote {', '.join(map(str, copies))}; run it with: normswap finetune {place}{trust}")


@recipes_command.command("validate")
@click.argument("recipe")
@overrides_option
@trust_option
@json_option
@one_line_failures
def validate_command(recipe: str, overrides: tuple[str, ...], trust: bool, as_json: bool) -> None:
    """Check that RECIPE can run: build model, data and optimizer, convert, verify and take one step that is not kept.

    RECIPE is a .toml file, or the name of a recipe that `normswap recipes ls` lists. Nothing is written.
    """
    recipe_to_check = _read_recipe(recipe, overrides)
    _check_installed()
    preview = _preview(recipe_to_check, trust=trust)
    if as_json:
        print_json(preview.to_dict())
        return
    for note in preview.notes:
        click.echo(f"note: {note}")
    click.echo(f"{recipe}: valid ({preview.steps:,} steps, {pluralize(preview.sites, 'converted norm')})")


def _find_recipe(name: str) -> "ShippedRecipe":
    from normswap.finetune.recipe import find_shipped

    return find_shipped(name)
