"""`normswap inspect`: sites, decisions, records and importance weights."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import normswap
from normswap.checkpoints.reading import read_record
from tests.helpers import files
from tests.helpers.command_line import ARCH, INPUT, document, names, ok


@pytest.mark.parametrize(
    "arguments",
    [["bn.pt", *ARCH], ["bn.safetensors", *ARCH], ["module.pth", "--trust"]],
    ids=["state dict", "safetensors", "module"],
)
def test_inspect_shows_every_site_and_its_decision(folder: Path, arguments: list[str]) -> None:
    before = names(folder)
    result = ok("inspect", *arguments, *INPUT)
    plan = normswap.plan_swaps(files.small_model(), torch.randn(files.SHAPE))
    for swap in plan.swaps:
        shape = rf"2x{swap.num_features}x\d+x\d+"
        assert re.search(
            rf"^{re.escape(swap.fqn)} +BatchNorm2d +{swap.num_features} +{shape} +in\+ln\+bn *$", result.stdout, re.M
        )
    assert names(folder) == before


def test_inspect_shows_what_stays(folder: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.GroupNorm(2, 8)), "mixed.pt")
    result = ok("inspect", "mixed.pt", "--trust")
    assert re.search(r"^2 +GroupNorm +8 +stays", result.stdout, re.M)
    assert re.search(r"^all +2 +1 +1", result.stdout, re.M)
    assert "note Planned without example inputs" in result.stdout


def test_inspect_shows_sites_that_did_not_run_or_run_twice(folder: Path) -> None:
    net = files.TiedNet()
    net.unused = nn.BatchNorm2d(4)
    torch.save(net, "tied.pt")
    result = ok("inspect", "tied.pt", "--trust", "--input", "2x3x8x8")
    assert re.search(r"^norm +BatchNorm2d +8 +2x8x6x6 +in\+ln\+bn", result.stdout, re.M)
    assert re.search(r"^unused +BatchNorm2d +4 +did not run", result.stdout, re.M)


def test_a_functional_site_is_reported(folder: Path) -> None:
    torch.save(files.FunctionalNet(), "functional.pt")
    text = ok("convert", "functional.pt", "--trust", "--input", "2x3x8x8").stdout
    assert "a call of F.batch_norm; the forward of its module is rewritten" in " ".join(text.split())
    assert re.search(r"^all +2 +2 +0", text, re.M)


def test_inspect_shows_frozen_gates_and_left_out_branches(folder: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 8), nn.BatchNorm2d(16).requires_grad_(False), nn.BatchNorm2d(16))
    torch.save(net, "net.pt")
    text = " ".join(ok("inspect", "net.pt", "--trust", "--input", "2x3x8x8").stdout.split())
    assert "ln+bn, simplex gate, running statistics, matched; no `in`: a 1x1 map has no variance" in text
    assert "frozen together with its importance weights" in text


def other_norms(folder: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.InstanceNorm2d(8), nn.GroupNorm(1, 8)), "all.pt")


def test_other_norms_stay_and_say_how_to_swap_them(folder: Path) -> None:
    other_norms(folder)
    text = " ".join(ok("inspect", "all.pt", "--trust", "--input", "2x3x8x8").stdout.split())
    assert "to swap it" in text
    assert "in+ln, simplex gate; no `bn`: the old norm has no running statistics" not in text
    text = " ".join(ok("inspect", "all.pt", "--trust", "--input", "2x3x8x8", "--kinds", "bn, in,gn1").stdout.split())
    assert "in+ln, simplex gate; no `bn`: the old norm has no running statistics" in text


def test_other_norms_are_converted_on_request(folder: Path) -> None:
    other_norms(folder)
    found = document("convert", "all.pt", "--trust", "--input", "2x3x8x8", "--kinds", "bn,in,gn1")
    assert [swap["kind"] for swap in found["plan"]["swaps"]] == ["bn", "in", "gn1"]
    assert found["verification"]["passed"]
    text = ok("inspect", "all.normswap.pt", "--trust").stdout
    assert re.search(r"^2 +1\.00 +0\.00 +- +1\.00 +0\.00 +-", text, re.M)
    assert "3 of 3 sites still compute exactly the norm they replaced" in text


def test_a_file_remembers_that_its_sites_are_synchronized(folder: Path) -> None:
    found = document("convert", "bn.pt", *ARCH, *INPUT, "--synchronize")
    assert found["verification"]["passed"]
    assert all(swap["synchronize"] for swap in found["plan"]["swaps"])
    assert normswap.load("bn.normswap.pt").model.bn1.synchronize


def test_settings_in_a_plan_file_are_carried_out(folder: Path) -> None:
    ok("convert", "bn.pt", *ARCH, *INPUT, "--dry-run", "--save-plan", "plan.json")
    edited = json.loads((folder / "plan.json").read_text()) | {"settings": {"layer1.*": {"branches": ["ln", "bn"]}}}
    (folder / "plan.json").write_text(json.dumps(edited))
    ok("convert", "bn.pt", *ARCH, *INPUT, "--plan", "plan.json")
    plan = read_record(folder / "bn.normswap.pt").plan
    branches = {swap.fqn.startswith("layer1."): swap.branches for swap in plan.swaps}
    assert branches == {True: ("ln", "bn"), False: ("in", "ln", "bn")}


def test_inspect_as_json(folder: Path) -> None:
    found = document("inspect", "bn.pt", *ARCH, *INPUT)
    assert found["converted"] is False
    assert len(found["sites"]) == len(found["plan"]["swaps"]) == files.SITES
    assert found["sites"][0]["shapes"]


def test_inspect_shows_the_record_and_the_weights_of_a_converted_file(folder: Path) -> None:
    text = ok("inspect", "sn.pt").stdout
    assert files.ARCH in text
    assert re.search(r"outputs in training +\S+ +1\.0e-09 +same", text)
    assert re.search(r"^saved +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d +normswap", text, re.M)
    weights = r"0\.00 +0\.00 +1\.00 +0\.00 +0\.00 +1\.00"
    assert len(re.findall(weights, text)) == files.SITES
    assert f"{files.SITES} of {files.SITES} sites still compute exactly the norm they replaced" in text


def test_inspect_shows_moved_weights_and_absent_branches(folder: Path) -> None:
    conversion = normswap.convert(files.small_model(), plan=None, branches=("ln", "bn"))
    with torch.no_grad():
        next(iter(conversion.replaced.values())).mean_weight.copy_(torch.tensor([0.4, 0.6]))
    normswap.save(conversion.model, "moved.pt", plan=conversion.plan)
    text = ok("inspect", "moved.pt").stdout
    assert re.search(r"^\S+ +- +0\.40 +0\.60 +- +0\.00 +1\.00", text, re.M)
    assert f"{files.SITES - 1} of {files.SITES} sites still compute" in text
    assert "Verification  none is recorded in this file" in text


def test_inspect_of_a_converted_module_runs_nothing_without_trust(folder: Path) -> None:
    ok("convert", "module.pth", "--trust", *INPUT)
    text = ok("inspect", "module.normswap.pth").stdout
    assert "Importance weights  pickled: add --trust" in text
    assert re.search(r"^converted .* module\.pth \([0-9a-f]{12}\)$", text, re.M)
    assert "sites still compute exactly" in ok("inspect", "module.normswap.pth", "--trust").stdout


def test_inspect_of_a_converted_file_as_json(folder: Path) -> None:
    found = document("inspect", "sn.pt")
    assert found["converted"] is True
    assert len(found["importance_weights"]) == files.SITES
    assert {tuple(shares["mean"].values()) for shares in found["importance_weights"].values()} == {(0.0, 0.0, 1.0)}
    assert found["history"][0]["action"] == "saved"
    assert found["verification"]["passed"] is True
