"""`normswap bake` and `normswap revert`: files, JSON, and what other commands do with a baked file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import normswap
from tests.baking.test_bake import VERTICES, move
from tests.helpers import files
from tests.helpers.command_line import INPUT, run
from tests.helpers.refusals import assert_refused


@pytest.fixture
def moved(folder: Path) -> Path:
    """The folder, with a converted network whose gates have moved as moved.pt."""
    loaded = normswap.load("sn.pt")
    model = move(loaded.model, *VERTICES.values())
    normswap.save(model, "moved.pt", plan=loaded.plan, architecture=files.ARCH)
    return folder


def ok(*arguments: str) -> Any:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def test_bake_prints_what_the_sites_became_and_writes_a_file_that_loads(moved: Path) -> None:
    output = ok("bake", "moved.pt", *INPUT, "--fold").stdout
    for line in (
        "folded into the layer before",
        "GroupNorm",
        "InstanceNorm",
        "compact layer, no gates",
        "output error",
    ):
        assert line in output
    assert "original architecture" not in output
    x = torch.randn(files.SHAPE)
    with torch.no_grad():
        found, expected = (normswap.load(name).model(x) for name in ("moved.baked.pt", "moved.pt"))
    assert torch.allclose(found, expected, atol=1e-4)
    assert "the original architecture loads these weights too" in ok("bake", "sn.pt", *INPUT).stdout


def test_bake_as_json(moved: Path) -> None:
    document = json.loads(ok("bake", "moved.pt", *INPUT, "--json", "-o", "out.safetensors").stdout)
    assert document["counts"]["compact"] == len([s for s in document["plan"]["sites"] if s["result"] == "compact"]) == 3
    assert document["plan"]["measurement"]["relative_error"] < 1e-5
    assert Path(document["output"]).stat().st_size == document["bytes"]


def test_revert_states_the_change(moved: Path) -> None:
    document = json.loads(ok("revert", "moved.pt", *INPUT, "--discard", "--json").stdout)
    assert len(document["changed"]) == 11
    assert document["relative_error"] > 1e-3
    assert "11 with moved gates, output error" in ok("revert", "moved.pt", *INPUT, "--discard", "--force").stdout
    ok("revert", "sn.pt")
    original, found = torch.load("bn.pt"), torch.load("sn.reverted.pt")
    assert [*original] == [*found]
    assert all(torch.equal(found[name], tensor) for name, tensor in original.items())


REFUSED = {
    "not converted": (["bake", "bn.pt"], 1, "bn.pt: nothing to bake, it is not converted"),
    "nothing to revert": (["revert", "bn.pt"], 1, "bn.pt: nothing to revert, it is not converted"),
    "moved gates": (["revert", "moved.pt", *INPUT], 1, "reverting changes the function (the outputs by"),
    "the option for moved gates": (["revert", "moved.pt", *INPUT], 1, "pass --discard to revert anyway"),
    "no file": (["bake", "nowhere.pt"], 2, "nowhere.pt: no such file"),
    "no file to revert": (["revert", "nowhere.pt"], 2, "nowhere.pt: no such file"),
    "an existing output": (["bake", "sn.pt", "-o", "bn.pt"], 2, "bn.pt: exists already"),
    "an existing output to revert": (["revert", "sn.pt", "-o", "bn.pt"], 2, "bn.pt: exists already"),
    "a tolerance": (["bake", "sn.pt", "--tolerance", "0.5"], 2, "0.5 is not in the range 0<=x<0.5"),
    "an input": (["bake", "sn.pt", "--input", "2x3"], 2, "the model fails on an input of 2x3"),
    "a size": (["revert", "sn.pt", "--input", "big"], 2, "expected sizes such as 2x3x224x224[:dtype], got 'big'"),
    "a format": (["bake", "sn.pt", "-o", "out.pt2"], 2, ".pt2 is for exported programs"),
    "a format to revert": (["revert", "sn.pt", "-o", "out.pt2"], 2, ".pt2 is for exported programs"),
    "another architecture": (["bake", "sn.pt", "--arch", "timm:resnet18"], 2, "sn.pt: was converted as"),
    "a pickle": (["bake", "module.pth"], 2, "pass --trust"),
    "baked twice": (["bake", "baked.pt"], 1, "it was baked already"),
    "revert of baked": (["revert", "baked.pt"], 2, "it was baked, which cannot be undone: revert the converted file"),
    "convert of baked": (["convert", "baked.pt"], 1, "15 sites are converted already"),
    "calibrate of baked": (
        ["calibrate", "baked.pt", "--data", "digits", "--input-size", "32"],
        2,
        "baked.pt: it was baked: calibrate the converted file, then bake that",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_line(moved: Path, name: str) -> None:
    arguments, status, message = REFUSED[name]
    if "baked.pt" in arguments:
        ok("bake", "moved.pt", *INPUT, "-o", "baked.pt")
    assert_refused(moved, arguments, status, message)


def test_inspect_and_verify_of_a_baked_file(moved: Path) -> None:
    ok("bake", "moved.pt", *INPUT, "-o", "baked.pt")
    output = ok("inspect", "baked.pt").stdout
    assert "Baked sites" in output
    assert "Importance weights" not in output
    result = run("verify", "moved.pt", "baked.pt", *INPUT)
    assert result.exit_code == 1
    assert "since it was baked" in result.stderr
