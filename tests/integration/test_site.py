"""The site: every page is in its menu and in the index, every public name on one page, and no link is broken."""

import os
import re
import shutil
import subprocess
import sys
from inspect import isfunction
from pathlib import Path
from typing import Any

import pytest
import yaml

import normswap
import normswap.privacy as normswap_privacy

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def pages_in(entry: Any) -> list[str]:
    """Return the pages of an entry of the menu: a page, a list, or titles with their entries."""
    if isinstance(entry, str):
        return [entry]
    entries = entry if isinstance(entry, list) else entry.values()
    return [page for inner in entries for page in pages_in(inner)]


def test_every_page_is_once_in_the_menu() -> None:
    menu = pages_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(menu) == sorted(PAGES)


def test_every_page_has_one_line_in_the_index() -> None:
    linked = re.findall(r"^- \[[^\]]+\]\(([^)]+)\): .+\.$", (DOCS / "README.md").read_text(), re.M)
    assert sorted(linked) == sorted(PAGES - {"README.md"})


def test_every_public_name_is_on_one_page_of_the_api() -> None:
    named = [name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (.+)$", page.read_text(), re.M)]
    # `normswap.privacy` imports Opacus, so its names are not among those that `import normswap` offers.
    private = [f"normswap.privacy.{name}" for name, value in vars(normswap_privacy).items() if isfunction(value)]
    assert sorted(named) == sorted([*(f"normswap.{name}" for name in normswap.__all__), *private])


@pytest.mark.slow
def test_the_site_is_built_and_describes_every_public_name(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    html = "".join(page.read_text(encoding="utf-8") for page in tmp_path.glob("api/*/index.html"))
    for name in normswap.__all__:
        assert f'id="normswap.{name}"' in html, f"the API pages do not show {name}"
    assert (tmp_path / "measured" / "finetuning.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[nowhere](nowhere.md)", "nowhere.md"),
        ("[nowhere](how-to.md#nowhere)", "nowhere"),
        ("::: normswap.nowhere", "normswap.nowhere"),
    ],
    ids=["page", "anchor", "name"],
)
def test_what_leads_nowhere_fails_the_build(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copytree(ROOT / "normswap", tmp_path / "normswap", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n{text}\n")
    (tmp_path / "docs" / "how-to.md").write_text("# How to\n")
    config = re.sub(r"^nav:.*", "nav: [index.md, how-to.md]\n", (ROOT / "mkdocs.yml").read_text(), flags=re.M | re.S)
    (tmp_path / "mkdocs.yml").write_text(config)
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert problem in done.stdout + done.stderr
