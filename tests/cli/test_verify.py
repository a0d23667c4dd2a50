"""`normswap verify`: the answer, and what it does not judge."""

import re
from pathlib import Path

import pytest
import torch

import normswap
from tests.helpers import files
from tests.helpers.command_line import ARCH, INPUT, document, ok, run


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["bn.pt", "sn.pt"], ["sn.pt", "bn.pt"], ["bn.pt", "bn.safetensors", *ARCH], ["module.pth", "sn.pt", "--trust"]],
    ids=["original first", "converted first", "two originals", "a module and a state dict"],
)
def test_verify_says_that_they_are_the_same(folder: Path, arguments: list[str]) -> None:
    result = ok("verify", *arguments, *INPUT)
    assert result.stdout.count(" same") == 4


def another(folder: Path) -> str:
    torch.manual_seed(5)
    torch.save(files.small_model().state_dict(), folder / "another.pt")
    return "another.pt"


@pytest.mark.slow
def test_verify_says_that_they_are_not(folder: Path) -> None:
    arguments = ["verify", another(folder), "sn.pt", *INPUT]
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr == "error: sn.pt does not compute the same function as another.pt\n"
    assert "DIFFERS" in result.stdout
    assert "Sites that differ most" in result.stdout
    found = document(*arguments, status=1)
    assert found["passed"] is False
    assert (found["original"], found["converted"]) == ("another.pt", "sn.pt")


def test_verify_loosened(folder: Path) -> None:
    result = ok("verify", another(folder), "sn.pt", *INPUT, "--tolerance", "1e9")
    assert "limit loosened on request" in result.stdout


@pytest.mark.slow
def test_verify_compares_with_what_was_asked_for(folder: Path) -> None:
    assert document("verify", "bn.pt", "sn.pt", *INPUT)["training_reference"] == "frozen"
    running = document("verify", "bn.pt", "sn.pt", *INPUT, "--bn-statistics", "running")
    assert (running["passed"], running["training_reference"]) == (True, "frozen")
    batch = document("verify", "bn.pt", "sn.pt", *INPUT, "--bn-statistics", "batch", status=1)
    assert (batch["passed"], batch["training_reference"]) == (False, "original")
    ok("convert", "bn.pt", *ARCH, *INPUT, "--bn-statistics", "batch", "-o", "batch.pt")
    assert document("verify", "bn.pt", "batch.pt", *INPUT, "--bn-statistics", "batch")["passed"]
    assert not document("verify", "bn.pt", "batch.pt", *INPUT, "--bn-statistics", "running", status=1)["passed"]


def test_what_is_not_judged_is_reported(folder: Path) -> None:
    class_plan = normswap.plan_swaps(files.small_model(), torch.randn(files.SHAPE), bn_statistics="renorm")
    (folder / "plan.json").write_text(class_plan.to_json())
    text = ok("convert", "bn.pt", *ARCH, *INPUT, "--plan", "plan.json").stdout
    assert re.search(r"outputs in training +not judged", text)
    assert f"skipped: {files.SITES} sites with bn_statistics=" in text
