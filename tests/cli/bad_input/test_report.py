"""Bad input to `normswap report`: one clear line, and nothing is written."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import normswap
from normswap.checkpoints.io import atomic_files
from tests.cli.bad_input.test_files import FILES
from tests.helpers import files
from tests.helpers.refusals import assert_refused

OUTPUTS = ["-o", "new.html", "--png", "new.png"]


@pytest.mark.parametrize(("make", "message"), FILES.values(), ids=FILES)
def test_a_bad_file_is_refused(folder: Path, make: Callable[[Path], Any], message: str) -> None:
    make(folder / "bad.pt")
    assert_refused(folder, ["report", "bad.pt", *OUTPUTS], 2, message)
    assert_refused(folder, ["report", "sn.pt", *OUTPUTS, "--against", "bad.pt"], 2, message)


def test_a_file_without_importance_weights_has_no_report(folder: Path) -> None:
    message = "contains no importance weights with a plan, so there is nothing to report: convert it with normswap conv"
    for name in ("bn.pt", "bn.safetensors", "legacy.pt"):
        assert_refused(folder, ["report", name, *OUTPUTS], 1, f"{name}: {message}")
    assert_refused(folder, ["report", "sn.pt", *OUTPUTS, "--against", "bn.pt"], 1, f"bn.pt: {message}")
    torch.save(torch.load("sn.pt"), "bare.pt")
    assert_refused(folder, ["report", "bare.pt", *OUTPUTS], 1, f"bare.pt: {message}")


def test_a_pickled_model_needs_trust(folder: Path) -> None:
    torch.save(normswap.convert(files.small_model()).model, "module-sn.pt")
    assert_refused(folder, ["report", "module-sn.pt", *OUTPUTS], 2, "--trust")


OPTIONS = {
    "output exists": (["-o", "bn.pt"], "bn.pt: exists already: choose another name, or pass --force to replace it"),
    "picture exists": (["--png", "bn.pt"], "bn.pt: exists already: choose another name, or pass --force to"),
    "output is the input": (
        ["-o", "sn.pt", "--force"],
        "sn.pt: is read and cannot be written too: choose another name for -o",
    ),
    "picture is the file compared with": (
        ["--against", "sn.safetensors", "--png", "sn.safetensors", "--force"],
        "sn.safetensors: is read and cannot be written too: choose another name for --png",
    ),
    "output is a link to the input": (
        ["-o", "link.html", "--force"],
        "link.html: is read and cannot be written too: choose another name for -o",
    ),
    "two outputs of one name": (
        ["-o", "new", "--png", "new"],
        "new: given as -o and --png: choose another name for one of them",
    ),
    "output is a folder": (["-o", "folder"], "folder: expected a file name, got a folder or a device: add a file name"),
    "output in no folder": (["-o", "no/new.html"], "no/new.html: expected an existing folder, got no: create it first"),
    "output in a file": (["-o", "bn.pt/new.html"], "expected an existing folder, got bn.pt"),
    "a long name": (["-o", "n" * 300], "File name too long"),
    "no graph": (["--node-data", "new.json"], "--node-data needs --graph, an exported program (.pt2) of the converted"),
    "graph alone": (["--graph", "sn.pt"], "--graph has no effect without --node-data: leave it out, or pass both"),
    "graph is no program": (
        ["--node-data", "new.json", "--graph", "bn.pt"],
        "bn.pt: expected an exported program of torch.export.save (.pt2)",
    ),
    "missing against": (["--against", "nowhere.pt"], "nowhere.pt: no such file"),
    "unknown entry": (["--entry", "ema"], "sn.pt: "),
    "tolerance out of range": (["--tolerance", "0.5"], "0.5 is not in the range 0<=x<0.5"),
    "tolerance of words": (["--tolerance", "small"], "'small' is not a valid float range"),
    "unknown option": (["--svg", "new.svg"], "No such option"),
}


@pytest.mark.parametrize(("arguments", "message"), OPTIONS.values(), ids=OPTIONS)
def test_wrong_options_are_reported(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "folder").mkdir()
    os.symlink("sn.pt", "link.html")
    (folder / "sn.safetensors").write_bytes((folder / "sn.pt").read_bytes())
    assert_refused(folder, ["report", "sn.pt", *arguments], 2, message)


def test_a_picture_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normswap.reports.report_files.find_spec", lambda _: None)
    message = "--png needs matplotlib, which is not installed: pip install 'normswap[report]'"
    assert_refused(folder, ["report", "sn.pt", *OUTPUTS], 2, message)


def test_an_unwritable_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic_files.os, "open", refuse)
    message = "new.html: cannot write in . (Permission denied): choose another folder"
    assert_refused(folder, ["report", "sn.pt", *OUTPUTS], 2, message)
