"""How a refusal on the command line looks."""

from pathlib import Path

from tests.helpers.command_line import run


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.rglob("*") if entry.is_file()}


def assert_refused(folder: Path, arguments: list[str], status: int, message: str) -> None:
    """One line on stderr with `message` in it, nothing on stdout but tables, nothing written."""
    before = contents(folder)
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit)
    assert message in result.stderr
    assert "Traceback" not in result.output
    if result.stderr.startswith("error: "):
        assert result.stderr.count("\n") == 1
    else:  # click's own, with the usage above it
        assert result.stderr.startswith("Usage: ")
    assert contents(folder) == before
