"""What an install contains: the source distribution, a wheel of it, and an editable install in an own environment."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
EXTENSION = "normswap.layers._compiled"
LOOK = f"""
import importlib.util, json, normswap
print(json.dumps([normswap.__file__, importlib.util.find_spec("{EXTENSION}") is not None]))
"""


def run(*command: str | Path, folder: Path) -> str:
    """Run a command outside the checkout, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(what: str, project: Path, folder: Path) -> Path:
    """Build "sdist" or "wheel" of a project with the tools of this environment."""
    program = f"from setuptools import build_meta; build_meta.build_{what}({str(folder)!r})"
    run(sys.executable, "-c", program, folder=project)
    (archive,) = folder.glob("*.whl" if what == "wheel" else "*.tar.gz")
    return archive


def tracked() -> list[str]:
    """Return the files of the checkout that belong to the repository."""
    command = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    return [name for name in run(*command, folder=ROOT).splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the repository as a fresh clone has it."""
    folder = tmp_path_factory.mktemp("clone") / "normswap"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("sdist", checkout, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the source distribution, as an installer does that finds no wheel."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        # Python before 3.11.4 has no filters.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (project,) = folder.iterdir()
    return built("wheel", project, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., Path]:
    """Install into an own environment that sees the libraries of this one, but not its normswap."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, folder=tmp_path)
    python = next(environment.glob("bin/python")) if os.name == "posix" else environment / "Scripts" / "python.exe"
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path).strip()
    Path(own, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def installed(*what: str | Path) -> Path:
        options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed")
        run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, folder=tmp_path)
        return python

    return installed


def looked_at(python: Path, folder: Path) -> tuple[Path, bool, list[str]]:
    """Return where an environment has the package, whether it has the extension, and its recipes."""
    file, has_extension = json.loads(run(python, "-c", LOOK, folder=folder))
    listed = run(python, "-m", "normswap", "recipes", "ls", folder=folder).splitlines()
    return Path(file), has_extension, [line for line in listed if not line.startswith(" ")]


def shipped() -> list[str]:
    return sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_the_extension_is_there_if_a_compiler_is() -> None:
    """An install without it goes on, since it is optional: this test is what notices a source or path that is wrong."""
    try:
        module = importlib.import_module(EXTENSION)
    except ImportError as error:
        pytest.fail(
            f"{COMPILER} is installed, but {EXTENSION} was not built ({error}): run "
            "`pip install --verbose --editable .` and look for the error of the compiler"
        )
    assert module.INTERFACE


@pytest.mark.slow
def test_the_source_distribution_has_all_that_the_package_is_built_from_and_no_tests(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {name for name in tracked() if name.startswith(("normswap/", "recipes/"))}
    assert sources - names == set()
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names
    assert {name for name in names if name.startswith(("tests", "benchmarks", "docs"))} == set()


@pytest.mark.slow
def test_a_wheel_of_the_source_distribution_has_modules_data_recipes_and_extension(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {name for name in tracked() if name.startswith("normswap/") and not name.endswith((".c", ".h"))}
    assert sources - names == set()
    assert {f"normswap/recipes/{name}.toml" for name in shipped()} <= names
    assert not any(name.startswith(("recipes/", "tests/", "benchmarks/")) for name in names)
    compiled = [name for name in names if name.startswith("normswap/layers/_compiled.") and not name.endswith(".c")]
    assert len(compiled) == (1 if COMPILER else 0)


@pytest.mark.slow
def test_an_installed_wheel_works(wheel: Path, install: Callable[..., Path], tmp_path: Path) -> None:
    python = install(wheel)
    file, has_extension, recipes = looked_at(python, tmp_path)
    assert file.is_relative_to(tmp_path / "environment")
    assert (has_extension, recipes) == (COMPILER is not None, shipped())


@pytest.mark.slow
def test_an_editable_install_works(checkout: Path, install: Callable[..., Path], tmp_path: Path) -> None:
    python = install("--editable", checkout)
    file, has_extension, recipes = looked_at(python, tmp_path)
    assert file.is_relative_to(checkout)
    assert (has_extension, recipes) == (COMPILER is not None, shipped())
    # A recipe that is added is found without another install.
    new = checkout / "recipes" / "new.toml"
    new.write_text("# A new one.\n")
    try:
        assert "new" in looked_at(python, tmp_path)[2]
    finally:
        new.unlink()


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_built_without_the_extension(checkout: Path, tmp_path: Path) -> None:
    project = tmp_path / "normswap"
    shutil.copytree(checkout, project, ignore=shutil.ignore_patterns("*.so", "build", "*.egg-info"))
    program = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    environment = {**os.environ, "CC": "false"}
    subprocess.run([sys.executable, "-c", program], cwd=project, env=environment, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(archive) as found:
        names = found.namelist()
    assert "normswap/__init__.py" in names
    assert not any(name.endswith((".so", ".pyd")) for name in names)
