"""What the commands print, in whole: `pytest tests/cli/test_snapshots.py --update-snapshots` writes the texts again."""

import difflib
import re
from pathlib import Path

import pytest

import normswap
from tests.helpers import files
from tests.helpers.command_line import ARCH, INPUT, run

SNAPSHOTS = Path(__file__).with_name("snapshots")
WIDTH = 100
DATA = ["--data", "digits", "--input-size", "32", "--batch-size", "20", "--batches", "2", "--device", "cpu"]
IMAGES = ["--data", "digits", "--input-size", "3x64x64", "--images", "8"]
# (exit code, command)
COMMANDS: dict[str, tuple[int, list[str]]] = {
    "inspect": (0, ["inspect", "bn.pt", *ARCH, *INPUT]),
    "inspect_converted": (0, ["inspect", "sn.pt"]),
    "inspect_identified": (0, ["inspect", "bn.pt"]),
    "convert": (0, ["convert", "bn.pt", *ARCH, *INPUT, "-o", "out.pt"]),
    "convert_that_differs": (
        1,
        ["convert", "bn.pt", *ARCH, *INPUT, "--gate", "softmax", "--include", "conv1*", "--dry-run"],
    ),
    "verify": (0, ["verify", "bn.pt", "sn.pt", *ARCH, *INPUT]),
    "identify": (0, ["identify", "bn.pt"]),
    "analyze": (0, ["analyze", "bn.pt", *ARCH, *IMAGES]),
    "analyze_converted": (0, ["analyze", "moved.pt", *IMAGES, "--budget", "0.5"]),
    "calibrate": (0, ["calibrate", "sn.pt", *DATA, "-o", "out.pt"]),
    "bake": (0, ["bake", "sn.pt", "--fold", *INPUT, "-o", "out.pt"]),
    "revert": (0, ["revert", "sn.pt", "-o", "out.pt"]),
    "report": (0, ["report", "sn.pt", "-o", "report.html"]),
    "export": (0, ["export", "sn.pt", "--to", "published-layout", *INPUT, "-o", "out.pt"]),
    "recipes_ls": (0, ["recipes", "ls"]),
    "an_error": (2, ["convert", "nowhere.pt"]),
}
# What rounding, clocks and machines decide.
VARYING = {
    r"^((?:outputs|gradients|running statistics)[a-z0-9 ]*?) {2,}(?:0|\d\S*e-\d+)(?= )": r"\1  <error>",
    r"^([\w.]+ +[\d,]+)(?: +\d+(?:\.\d+)?){3}$": r"\1  <shifts>",
    r"\b\d+\.\d ms -> \d+\.\d ms, \d+% (?:less|more)": "<time>",
    r"^([\w.]+)(?: +\d+(?:\.\d+)?){5}(?= +(?:leave|freeze|convert|calibrate))": r"\1  <distances>",
    r"^([\w.]+)(?: +\d+(?:\.\d+)?){3}(?= +\d+% +(?:in|ln|bn)\b)": r"\1  <errors>",
    r"(?<=differ by )\d+(?:\.\d+)?": "<error>",
    r"^( +\d+ more, at their best branch at most )\S+$": r"\1<error>",
    r"^(\d+ more, at most +)\S+$": r"\1<shift>",
    r"\b\d+(?:\.\d+)?e[-+]\d+\b": "<error>",
    r"\b\d+(?:\.\d+)? ?(?:[kKMG]i?B|bytes)\b": "<size>",
    r"^(Time +)\d+\.\d s$": r"\1<seconds>",
    r"^(\d[\dx]*) {2,}0\.0e\+00 ": r"\1  <error> ",
    r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\b": "<time>",
    r"\b\d+\.\d+\.\d+(?:\+\w+)?(?![\w.])": "<version>",
}
SPACED_BY_WHAT_VARIES = ("Verification", "History", "saved", "Statistics that changed", "Measured")


def normalised(text: str) -> str:
    """The text without what varies; the columns of a table with a varying one are two spaces apart."""
    lines = []
    for line in text.splitlines():
        found = line.rstrip()
        for pattern, name in VARYING.items():
            found = re.sub(pattern, name, found)
        varies = "<" in found or found.startswith(SPACED_BY_WHAT_VARIES)
        lines.append(re.sub(r"(?<=\S) {2,}", "  ", found) if varies else found)
    return "".join(f"{line}\n" for line in lines)


def save_moved(path: str) -> None:
    """Write the network of the folder with gates that left `bn`, each by another share."""
    model, plan, *_ = normswap.load("sn.pt")
    for number, name in enumerate(normswap.importance_weights(model)):
        normswap.set_importance(model, {name: {"ln": 0.01 * number, "bn": 1 - 0.01 * number}})
    normswap.save(model, path, plan=plan, architecture=files.ARCH)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_what_it_printed(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    save_moved("moved.pt")
    status, command = COMMANDS[name]
    result = run(*command)
    assert result.exit_code == status, result.output
    output = result.output.replace(str(folder), "<folder>")
    assert all(len(line) <= WIDTH for line in output.splitlines() if not line.startswith("error: "))
    found, file = normalised(output), SNAPSHOTS / f"{name}.txt"
    if request.config.getoption("--update-snapshots"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(found)
    expected = file.read_text()
    difference = "".join(difflib.unified_diff(expected.splitlines(True), found.splitlines(True), file.name, "now"))
    assert found == expected, f"the output changed; if it should, pass --update-snapshots:\n{difference}"


def test_every_snapshot_is_of_a_command() -> None:
    assert {file.stem for file in SNAPSHOTS.iterdir()} == {*COMMANDS}


def test_a_changed_word_is_noticed_and_a_changed_rounding_is_not() -> None:
    line = "outputs in training    2.6e-16  1.0e-09  same"
    assert (
        normalised(line) == normalised(line.replace("  2.6e-16", "        0")) == normalised(line.replace("2.6", "3.1"))
    )
    for word in ("outputs", "training", "same"):
        assert normalised(line) != normalised(line.replace(word, "other"))
    assert normalised("bn1    10,240     1.64        0.346   3.27") == "bn1  10,240  <shifts>\n"
    assert normalised("bn1  2x32x16x16  in+ln+bn") == "bn1  2x32x16x16  in+ln+bn\n"
