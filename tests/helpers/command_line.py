"""How tests call the command line."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from normswap.cli import main
from tests.helpers import files

SIZES = "x".join(map(str, files.SHAPE))
ARCH = ["--arch", files.ARCH]
INPUT = ["--input", SIZES]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def ok(*arguments: str) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def document(*arguments: str, status: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)
