"""README and docs run: every Python block is executed and every `normswap` command typed, page by page, in order."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from normswap.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
pytestmark = pytest.mark.slow


def steps(page: Path) -> list[str]:
    """The page as Python statements: Python blocks as they are, `normswap` commands as calls that must succeed."""
    found = []
    for language, body in BLOCK.findall(page.read_text()):
        if language == "python":
            found.append(body)
        elif language in ("sh", "console"):
            commands = [line.removeprefix("$ ") for line in body.splitlines()]
            found += [f"run({c.split('#')[0].strip()!r})" for c in commands if c.startswith("normswap ")]
    return found


def run(command: str) -> None:
    """As it is typed, but for the start of a process, which tests/cli/test_command_line.py covers."""
    done = CliRunner().invoke(main, shlex.split(command)[1:])
    assert done.exit_code == 0, f"{command}: exit {done.exit_code}\n{done.output}"


@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning",  # pytorch-lightning 2.6 with torch 2.14
    "ignore::UserWarning:pytorch_lightning",  # its advice on workers and on the folder of logs
)
@pytest.mark.parametrize("page", [p for p in PAGES if steps(p)], ids=lambda p: p.name)
def test_every_block_of_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n".join(steps(page)))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), {"run": run}, "page")


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} points at {target}"


def test_every_make_target_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for name in re.findall(r"`make ([a-z]+)`", page.read_text()):
            assert name in targets, f"{page.name} names make {name}"


def test_the_readme_has_code_before_line_30() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any(line.startswith("```") for line in lines[:30])


def test_commands_are_found_in_blocks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh\n$ normswap --help  # short\nmake demo\n```\n\n```python\nx = 1\n```\n")
    assert [shlex.split(step)[0] for step in steps(page)] == ["run(normswap --help)", "x"]
