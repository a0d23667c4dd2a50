"""`normswap report`: tables on stdout, and the files that the options name."""

import json
from pathlib import Path

import pytest

from tests.helpers import files
from tests.helpers.command_line import document, names, ok, run


def test_the_tables_are_printed_and_nothing_is_written_without_outputs(folder: Path) -> None:
    before = names(folder)
    result = ok("report", "sn.pt")
    for part in ("Importance weights", "layer1.0.bn1", "Predicted bake, tolerance", "Verification", "History"):
        assert part in result.stdout
    assert names(folder) == before


def test_the_page_and_the_picture_are_written(folder: Path) -> None:
    before = names(folder)
    result = ok("report", "sn.pt", "-o", "r.html", "--png", "r.png", "--against", "sn.pt")
    assert result.stdout.count("wrote r.") == 2
    assert Path("r.html").read_text().count("<svg") == 4
    assert Path("r.png").read_bytes().startswith(b"\x89PNG")
    assert names(folder) - before == {"r.html", "r.png"}
    again = run("report", "sn.pt", "-o", "r.html")
    assert (again.exit_code, again.stdout) == (2, "")
    ok("report", "sn.pt", "-o", "r.html", "--force")


def test_one_json_document_is_printed(folder: Path) -> None:
    found = document("report", "sn.pt", "-o", "r.html", "--tolerance", "0.2")
    assert found["outputs"] == {"output": "r.html"}
    assert found["architecture"] == files.ARCH
    assert len(found["sites"]) == files.SITES
    assert {site["becomes"] for site in found["sites"]} == {"BatchNorm"}
    assert [each["tolerance"] for each in found["predicted_bake"]] == [0.0, 0.01, 0.05, 0.1, 0.2]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("name", ["<b>&amp;.pt", "a b.pt", "日本.pt"])
def test_any_name_of_a_file_is_shown(folder: Path, name: str) -> None:
    Path("sn.pt").rename(name)
    ok("report", name, "-o", "r.html")
    assert "<b>" not in Path("r.html").read_text().partition("<h1>")[2].partition("</h1>")[0]
