"""`normswap recipes`: the recipes that come with normswap - listed, shown, copied."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from normswap.cli.failures import one_line_failures
from normswap.errors import RecipeError

if TYPE_CHECKING:
    from normswap.finetune.recipe import ShippedRecipe


@click.group("recipes", short_help="List, show or copy the recipes for fine-tuning.")
def recipes_command() -> None:
    """List, show or copy the recipes for fine-tuning that come with normswap."""


@recipes_command.command("ls")
@one_line_failures
def list_command() -> None:
    """List the recipes, each with what it is for."""
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
    """Copy the recipe NAME to TARGET, a file or a folder (default: the current one), to be edited and run."""
    recipe = _find_recipe(name)
    place = target or Path()
    if place.is_dir():
        place = place / f"{name}.toml"
    if place.suffix != ".toml":
        raise RecipeError(f"{place}: expected a folder or a name in .toml")
    from normswap.checkpoints.io.atomic_files import check_writable, write_text

    check_writable(place, replace=force)
    write_text(place, recipe.text)
    click.echo(f"wrote {place}; run it with: normswap finetune {place}")


def _find_recipe(name: str) -> "ShippedRecipe":
    from normswap.finetune.recipe import find_shipped

    return find_shipped(name)
