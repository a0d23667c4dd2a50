"""Build steps that pyproject.toml cannot express; everything else is declared there.

- Recipes are in `recipes/` at the top of the repository, and in `normswap/recipes` of a wheel.
- Microsoft's compiler has other names for the options of the C extension.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

RECIPES = Path("recipes")


class BuildWithRecipes(build_py):
    """Copies the recipes into the package, except for an editable install, which reads them where they are."""

    def run(self) -> None:
        """Build the package, then add the recipes."""
        super().run()
        if self.editable_mode:
            return
        for source, target in self._recipes().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return every file that is built, recipes included."""
        return [*super().get_outputs(include_bytecode), *self._recipes().values()]

    def _recipes(self) -> dict[str, str]:
        """Return where each recipe is built, by where it is."""
        folder = Path(self.build_lib, "normswap", "recipes")
        found = sorted(RECIPES.glob("*.toml"))
        if not found:
            raise FileNotFoundError(f"{RECIPES.absolute()}: expected recipes (*.toml), found none")
        return {str(path): str(folder / path.name) for path in [*found, *sorted(RECIPES.glob("*.py"))]}


class BuildForCompiler(build_ext):
    """Gives each compiler the options that it knows."""

    def build_extensions(self) -> None:
        """Compile."""
        if self.compiler.compiler_type == "msvc":
            for extension in self.extensions:
                extension.extra_compile_args = ["/O2", "/std:c11"]
        super().build_extensions()


setup(cmdclass={"build_py": BuildWithRecipes, "build_ext": BuildForCompiler})
