"""The command line: what each command prints, writes and answers, and that asking for help costs nothing."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import safetensors
import safetensors.torch
import timm
import torch
from click.testing import CliRunner, Result
from torch import nn

import normswap
from normswap.checkpoints.checkpoint import read_record
from normswap.checkpoints.record import Step
from normswap.checkpoints.saving import sha256_of
from normswap.cli import convert as convert_module
from normswap.cli import main
from normswap.cli.options import InputSpec, example_inputs, parse_input
from tests.helpers import files

SIZES = "x".join(map(str, files.SHAPE))
ARCH = ["--arch", files.ARCH]
INPUT = ["--input", SIZES]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one network as a file of every kind, and converted as one."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    model = files.small_model()
    torch.save(model.state_dict(), folder / "bn.pt")
    torch.save(model.state_dict(), folder / "legacy.bin", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(model.state_dict(), folder / "bn.safetensors")
    torch.save(model, folder / "module.pth")
    x = torch.randn(files.SHAPE)
    conversion = normswap.convert(model, x)
    proof = normswap.verify(model, conversion.model, [x])
    normswap.save(conversion.model, folder / "sn.pt", plan=conversion.plan, architecture=files.ARCH, verification=proof)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the good files, as the working directory."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    # Nothing about the terminal of whoever runs the tests may leak into what is printed.
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def ok(*arguments: str) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


# Starting.


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_help_imports_nothing_heavy() -> None:
    heavy = python(
        "import sys, click.testing, normswap.cli\n"
        "for command in ([], ['inspect'], ['convert'], ['verify']):\n"
        "    assert click.testing.CliRunner().invoke(normswap.cli.main, [*command, '--help']).exit_code == 0\n"
        "print({'torch', 'timm', 'torchvision', 'rich', 'numpy', 'safetensors'} & set(sys.modules))"
    )
    assert heavy.strip() == "set()"


def test_help_is_fast() -> None:
    def cpu_seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "normswap", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        return after.children_user - before.children_user + after.children_system - before.children_system

    # Processor time, and the best of a few, since the machine may be busy with something else.
    assert min(cpu_seconds() for _ in range(5)) < 0.3


def test_bad_input_costs_no_import_of_torch(tmp_path: Path) -> None:
    code = (
        "import sys, click.testing, normswap.cli\n"
        "result = click.testing.CliRunner().invoke(normswap.cli.main, ['convert', 'nowhere.pt'])\n"
        "print(result.exit_code, 'torch' in sys.modules)"
    )
    assert python(code).split() == ["2", "False"]


def test_the_version_is_told() -> None:
    assert ok("--version").stdout == f"normswap {normswap.__version__}\n"


COMMAND = Path(sys.executable).with_name("normswap")


def test_it_is_a_command_and_a_module() -> None:
    """As processes, where it costs no import of torch."""
    for command in ([str(COMMAND)], [sys.executable, "-m", "normswap"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"normswap {normswap.__version__}\n", "")
        done = subprocess.run([*command, "convert", "nowhere.pt"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: nowhere.pt: no such file")


@pytest.mark.parametrize(
    "start",
    [
        lambda: runpy.run_path(str(COMMAND), run_name="__main__"),
        lambda: runpy.run_module("normswap", run_name="__main__"),
    ],
    ids=["command", "module"],
)
def test_the_exit_status_is_the_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], start: Callable[[], Any]
) -> None:
    """By the very code that a process runs."""
    monkeypatch.setattr(sys, "argv", ["normswap", "inspect", "sn.pt"])
    with pytest.raises(SystemExit) as ended:
        start()
    shown = capsys.readouterr()
    assert (ended.value.code, shown.err) == (0, "")
    assert "Importance weights" in shown.out
    monkeypatch.setattr(sys, "argv", ["normswap", "convert", "sn.pt"])
    with pytest.raises(SystemExit) as ended:
        start()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: sn.pt: nothing to do")


# convert.

OUTPUTS: dict[str, tuple[list[str], str, str]] = {
    "state dict": (["bn.pt", *ARCH], "bn.normswap.pt", "torch zip"),
    "safetensors": (["bn.safetensors", *ARCH], "bn.normswap.safetensors", "safetensors"),
    "legacy": (["legacy.bin", *ARCH], "legacy.normswap.bin", "torch zip"),
    "module": (["module.pth", "--trust"], "module.normswap.pth", "torch zip"),
    "named": (["bn.pt", *ARCH, "-o", "out.pt"], "out.pt", "torch zip"),
    "to safetensors": (["bn.pt", *ARCH, "-o", "out.safetensors"], "out.safetensors", "safetensors"),
    "from safetensors": (["bn.safetensors", *ARCH, "-o", "out.pt"], "out.pt", "torch zip"),
}


@pytest.mark.parametrize(("arguments", "output", "container"), OUTPUTS.values(), ids=OUTPUTS)
def test_convert_writes_the_same_function(folder: Path, arguments: list[str], output: str, container: str) -> None:
    before = names(folder)
    result = ok("convert", *arguments, *INPUT)
    assert names(folder) == before | {output}
    first_bytes = (folder / output).read_bytes()[:4]
    assert (first_bytes == b"PK\x03\x04") == (container == "torch zip")
    x = torch.randn(files.SHAPE)
    loaded = normswap.load(output, trust=True)
    original = normswap.load("bn.pt", architecture=files.ARCH).model
    torch.testing.assert_close(loaded.model(x), original(x), rtol=1e-5, atol=1e-6)
    assert len(loaded.plan.swaps) == files.SITES
    assert output in result.stdout
    trust = ", trust=True" if "--trust" in arguments else ""
    assert f'next: model = normswap.load("{output}"{trust}).model' in result.stdout


def test_convert_tells_sites_decisions_and_parity(folder: Path) -> None:
    result = ok("convert", "bn.pt", *ARCH, *INPUT, "--exclude", "layer1.*")
    excluded = sum(skip.fqn.startswith("layer1") for skip in read_record(folder / "bn.normswap.pt").plan.skips)
    text = result.stdout
    assert re.search(rf"BatchNorm2d  torch +{files.SITES} +{files.SITES - excluded} +{excluded}\b", text)
    assert re.search(rf"{files.SITES - excluded} +swap +in\+ln\+bn, simplex gate, batch statistics", text)
    assert re.search(rf"{excluded} +skip +excluded by the pattern 'layer1\.\*'", text)
    assert "The example input (64x64)" not in text  # no site has another map for it
    for check in ("outputs in evaluation", "outputs in training", "gradients", "running statistics"):
        assert re.search(rf"{check} +\d\S* +1\.0e-09 +same", text)
    assert re.search(r"outputs in float32 +\d\S* +noted", text)
    assert f"relative L2 in float64 on {SIZES}" in text
    assert f"wrote bn.normswap.pt ({(folder / 'bn.normswap.pt').stat().st_size / 1e6:.1f} MB)" in text


def test_what_is_printed_fits_80_columns(folder: Path) -> None:
    for arguments in (["convert", "bn.pt", *ARCH, *INPUT], ["inspect", "bn.pt", *ARCH], ["inspect", "sn.pt"]):
        assert max(map(len, ok(*arguments).stdout.splitlines())) <= 80


def test_the_record_tells_where_the_file_came_from(folder: Path) -> None:
    ok("convert", "bn.pt", *ARCH, *INPUT)
    record = read_record(folder / "bn.normswap.pt")
    step = record.history[-1]
    assert (step.action, step.source, step.sha256) == ("converted", "bn.pt", sha256_of(folder / "bn.pt"))
    assert record.architecture == files.ARCH
    assert record.verification.passed


def test_history_and_architecture_of_the_input_are_kept(folder: Path) -> None:
    normswap.save(files.small_model(), "own.pt", architecture=files.ARCH)
    ok("convert", "own.pt", *INPUT)
    record = read_record(folder / "own.normswap.pt")
    assert [step.action for step in record.history] == ["saved", "converted"]
    assert record.architecture == files.ARCH


def test_without_input_timm_tells_the_size(folder: Path) -> None:
    assert "relative L2 in float64 on 2x3x160x160" in ok("convert", "bn.pt", *ARCH).stdout


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",), ("--save-plan", "plan.json")])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tied.pt", "--trust"], "the input size is unknown, so the conversion cannot be verified: pass --input 2x3x"),
        (["tied-state.pt", "--arch", "own.py:TiedNet"], "the input size is unknown, so the conversion cannot be"),
        (
            ["bn.pt", "--arch", "none"],
            "with --arch none there is no model to run, so the conversion cannot be verified",
        ),
    ],
)
def test_what_cannot_be_verified_is_not_written(
    folder: Path, arguments: list[str], message: str, dry_run: tuple[str, ...]
) -> None:
    torch.save(files.TiedNet(), "tied.pt")
    torch.save(files.TiedNet().state_dict(), "tied-state.pt")
    Path("own.py").write_text("from tests.helpers.files import TiedNet\n")
    before = names(folder)
    result = run("convert", *arguments, *dry_run)
    assert (result.exit_code, names(folder) - {"__pycache__"}) == (2, before)  # Python's own, of own.py
    assert message in result.stderr
    assert "--no-verify to write it unverified" in result.stderr
    output = ok("convert", *arguments, "--no-verify", "-o", "out.pt").stdout
    assert "Parity  not measured: " in output
    record = read_record(folder / "out.pt")
    assert (record.verification, record.history[-1].detail) == (None, "not verified")


def test_no_verify_measures_nothing(folder: Path) -> None:
    result = ok("convert", "bn.pt", *ARCH, *INPUT, "--no-verify", "--gate", "softmax")
    assert "Parity  not measured: --no-verify" in result.stdout
    record = read_record(folder / "bn.normswap.pt")
    assert record.verification is None
    assert {swap.gate for swap in record.plan.swaps} == {"softmax"}


def test_a_loosened_tolerance_is_told(folder: Path) -> None:
    result = ok("convert", "bn.pt", *ARCH, *INPUT, "--tolerance", "1e9", "--gate", "softmax")
    assert "limit loosened on request" in result.stdout
    assert read_record(folder / "bn.normswap.pt").verification.loosened


def test_include_leaves_the_rest(folder: Path) -> None:
    ok("convert", "bn.pt", *ARCH, *INPUT, "--include", "layer1.*", "--include", "re:layer2.*")
    plan = read_record(folder / "bn.normswap.pt").plan
    assert {swap.fqn.split(".")[0] for swap in plan.swaps} == {"layer1", "layer2"}
    assert {skip.reason for skip in plan.skips} == {"matches no include pattern"}


def test_force_replaces(folder: Path) -> None:
    (folder / "bn.normswap.pt").write_text("mine")
    ok("convert", "bn.pt", *ARCH, *INPUT, "--force")
    assert read_record(folder / "bn.normswap.pt") is not None


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    before = names(folder)
    result = ok("convert", "bn.pt", *ARCH, *INPUT, "--dry-run")
    assert names(folder) == before
    assert "dry run: without --dry-run this writes bn.normswap.pt" in result.stdout
    assert "same" in result.stdout


def test_a_plan_is_stored_and_carried_out(folder: Path) -> None:
    result = ok("convert", "bn.pt", *ARCH, *INPUT, "--dry-run", "--save-plan", "plan.json", "--exclude", "layer4.*")
    assert "plan stored in plan.json" in result.stdout
    assert not (folder / "bn.normswap.pt").exists()
    plan = normswap.SwapPlan.from_json((folder / "plan.json").read_text())
    ok("convert", "bn.pt", *ARCH, *INPUT, "--plan", "plan.json")
    assert read_record(folder / "bn.normswap.pt").plan == plan
    ok("convert", "bn.pt", *ARCH, *INPUT, "--plan", "plan.json", "--save-plan", "plan.json", "--force")
    assert normswap.SwapPlan.from_json((folder / "plan.json").read_text()) == plan


def document(*arguments: str, status: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def test_convert_as_json(folder: Path) -> None:
    found = document("convert", "bn.pt", *ARCH, *INPUT)
    assert (found["file"], found["output"], found["written"]) == ("bn.pt", "bn.normswap.pt", True)
    assert found["bytes"] == (folder / "bn.normswap.pt").stat().st_size
    assert found["architecture"] == files.ARCH
    assert normswap.SwapPlan.from_dict(found["plan"]) == read_record(folder / "bn.normswap.pt").plan
    assert normswap.Verification.from_dict(found["verification"]).passed


NO: dict[str, tuple[list[str], str]] = {
    "converted already": (["sn.pt"], "nothing to do"),
    "nothing to swap": (["bn.pt", *ARCH, *INPUT, "--exclude", "*"], "none of the"),
    "not the same": (["bn.pt", *ARCH, *INPUT, "--gate", "softmax"], "nothing written"),
}


@pytest.mark.parametrize(("arguments", "message"), NO.values(), ids=NO)
def test_a_no_as_json_is_one_document_too(folder: Path, arguments: list[str], message: str) -> None:
    found = document("convert", *arguments, status=1)
    assert (found["written"], found["output"]) == (False, None)
    assert "plan" in found
    assert message in run("convert", *arguments, "--json").stderr


def test_numbers_that_json_lacks_become_null(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = CliRunner().invoke(_print_command, []).stdout
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, {"b": None}, 1.5]}


@click.command()
def _print_command() -> None:
    from normswap.cli.options import print_json

    print_json({"a": (float("nan"), {"b": float("inf")}, 1.5)})


# inspect.


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
    assert re.search(r"^2 +GroupNorm +stays", result.stdout, re.M)
    assert re.search(r"^all +2 +1 +1", result.stdout, re.M)
    assert "note planned without an example input" in result.stdout


def test_inspect_shows_sites_that_did_not_run_or_run_twice(folder: Path) -> None:
    net = files.TiedNet()
    net.unused = nn.BatchNorm2d(4)
    torch.save(net, "tied.pt")
    result = ok("inspect", "tied.pt", "--trust", "--input", "2x3x8x8")
    assert re.search(r"^norm +BatchNorm2d +8 +2x8x6x6 +in\+ln\+bn", result.stdout, re.M)
    assert re.search(r"^unused +BatchNorm2d +4 +did not run", result.stdout, re.M)


def test_a_functional_site_is_told(folder: Path) -> None:
    torch.save(files.FunctionalNet(), "functional.pt")
    text = ok("convert", "functional.pt", "--trust", "--input", "2x3x8x8").stdout
    assert "a call of F.batch_norm: the forward of its module is rewritten" in " ".join(text.split())
    assert re.search(r"^all +2 +2 +0", text, re.M)


def test_inspect_shows_frozen_gates_and_left_out_branches(folder: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 8), nn.BatchNorm2d(16).requires_grad_(False), nn.BatchNorm2d(16))
    torch.save(net, "net.pt")
    text = " ".join(ok("inspect", "net.pt", "--trust", "--input", "2x3x8x8").stdout.split())
    assert "ln+bn, simplex gate, batch statistics; no `in`: one spatial position has no variance" in text
    assert "frozen, and so are its importance weights" in text


def other_norms(folder: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.InstanceNorm2d(8), nn.GroupNorm(1, 8)), "all.pt")


def test_other_norms_stay_and_say_how_to_swap_them(folder: Path) -> None:
    other_norms(folder)
    text = " ".join(ok("inspect", "all.pt", "--trust", "--input", "2x3x8x8").stdout.split())
    assert "unless asked for with kinds=('bn', 'in') (--kinds bn,in)" in text
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
    assert "3 of 3 sites are still exactly the norm they replaced" in text


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
    assert f"{files.SITES} of {files.SITES} sites are still exactly the norm they replaced" in text


def test_inspect_shows_moved_weights_and_absent_branches(folder: Path) -> None:
    conversion = normswap.convert(files.small_model(), plan=None, branches=("ln", "bn"))
    with torch.no_grad():
        next(iter(conversion.replaced.values())).mean_weight.copy_(torch.tensor([0.4, 0.6]))
    normswap.save(conversion.model, "moved.pt", plan=conversion.plan)
    text = ok("inspect", "moved.pt").stdout
    assert re.search(r"^\S+ +- +0\.40 +0\.60 +- +0\.00 +1\.00", text, re.M)
    assert f"{files.SITES - 1} of {files.SITES} sites are still" in text
    assert "Parity  no proof travels with this file" in text


def test_inspect_of_a_converted_module_runs_nothing_without_trust(folder: Path) -> None:
    ok("convert", "module.pth", "--trust", *INPUT)
    text = ok("inspect", "module.normswap.pth").stdout
    assert "Importance weights  pickled: add --trust" in text
    assert re.search(r"^converted .* module\.pth \([0-9a-f]{12}\)$", text, re.M)
    assert "sites are still exactly" in ok("inspect", "module.normswap.pth", "--trust").stdout


def test_inspect_of_a_converted_file_as_json(folder: Path) -> None:
    found = document("inspect", "sn.pt")
    assert found["converted"] is True
    assert len(found["importance_weights"]) == files.SITES
    assert {tuple(shares["mean"].values()) for shares in found["importance_weights"].values()} == {(0.0, 0.0, 1.0)}
    assert found["history"][0]["action"] == "saved"
    assert found["verification"]["passed"] is True


# verify.


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


def test_what_is_not_judged_is_said(folder: Path) -> None:
    class_plan = normswap.plan_swaps(files.small_model(), torch.randn(files.SHAPE), bn_statistics="renorm")
    (folder / "plan.json").write_text(class_plan.to_json())
    text = ok("convert", "bn.pt", *ARCH, *INPUT, "--plan", "plan.json").stdout
    assert re.search(r"outputs in training +not judged", text)
    assert f"{files.SITES} sites use running statistics in training, by choice" in text


# Inputs.


def test_inputs_are_parsed() -> None:
    assert parse_input("2x3x224x224") == InputSpec((2, 3, 224, 224))
    assert parse_input("7:int64") == InputSpec((7,), "int64")
    assert parse_input("2x10:bfloat16") == InputSpec((2, 10), "bfloat16")


INPUTS: dict[str, tuple[Callable[[], nn.Module], str | None, tuple[int, ...] | None]] = {
    "timm": (lambda: timm.create_model("test_resnet"), "timm:test_resnet", (2, 3, 160, 160)),
    "channels": (
        lambda: timm.create_model("test_resnet", in_chans=1),
        "timm:test_resnet,in_chans=1",
        (2, 1, 160, 160),
    ),
    "size": (lambda: timm.create_model("test_vit"), "timm:test_vit,img_size=96", (2, 3, 96, 96)),
    "two sizes": (lambda: timm.create_model("test_vit"), "timm:test_vit,img_size=(96,64)", (2, 3, 96, 64)),
    "a pickled timm model": (lambda: timm.create_model("test_resnet"), None, (2, 3, 160, 160)),
    "anything else": (files.TiedNet, None, None),
}


@pytest.mark.parametrize(("build", "architecture", "shape"), INPUTS.values(), ids=INPUTS)
def test_the_default_input_is_of_the_real_size(
    build: Callable[[], nn.Module], architecture: str | None, shape: tuple[int, ...] | None
) -> None:
    x = example_inputs((), build(), architecture)
    assert (None if x is None else tuple(x.shape)) == shape


def test_several_inputs_are_several_arguments() -> None:
    model = files.TiedNet()
    specs = (InputSpec((2, 3)), InputSpec((4,), "int64"), InputSpec((2, 3), "float16"))
    first, second, third = example_inputs(specs, model, None)
    assert (first.shape, second.dtype, third.dtype) == ((2, 3), torch.int64, torch.float16)
    assert 0 <= int(second.min()) <= int(second.max()) <= 9
    assert not torch.equal(first.half(), third)
    assert torch.equal(first, example_inputs(specs, model, None)[0])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "bool", "float16", "bfloat16",
                                   "float32", "float64", "complex64", "complex128"])  # fmt: skip
def test_an_input_of_any_dtype_is_made(dtype: str) -> None:
    x = example_inputs((parse_input(f"4x3x9x9:{dtype}"),), files.TiedNet(), None)
    assert (x.dtype, x.shape) == (getattr(torch, dtype), (4, 3, 9, 9))
    values = set(x.flatten().tolist())
    assert len(values) == 2 if dtype == "bool" else len(values) > 5
    if dtype == "uint8":
        assert max(values) > 200
    if "int" in dtype and dtype != "uint8":
        assert values <= set(range(10))


def test_an_unknown_dtype_of_an_input_is_refused() -> None:
    with pytest.raises(click.BadParameter, match=r"expected a dtype among float16, .*bool, got 'uint4'"):
        parse_input("2x3:uint4")


def test_inputs_have_the_type_of_the_model() -> None:
    assert example_inputs((InputSpec((2, 3)),), files.TiedNet().double(), None).dtype == torch.float64


# Failures and progress.


def _raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_an_interrupt_says_in_one_line_what_was_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = _raising(KeyboardInterrupt())
    for owner, name in ((convert_module.Wish, "check"), (convert_module, "read_file"), (convert_module, "_carried")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, stopped)
            before = names(folder)
            result = run("convert", "bn.pt", *ARCH, *INPUT)
            assert (result.exit_code, names(folder)) == (130, before)
            assert result.stderr == "interrupted; nothing was written\n"
    monkeypatch.setattr(convert_module, "_print_end", stopped)
    result = run("convert", "bn.pt", *ARCH, *INPUT)
    assert (result.exit_code, result.stderr) == (130, "interrupted; bn.normswap.pt was written\n")


def test_the_system_names_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module.Wish, "check", _raising(PermissionError(13, "Permission denied", "bn.pt")))
    result = run("convert", "bn.pt")
    assert (result.exit_code, result.output) == (2, "error: bn.pt: Permission denied\n")


@pytest.mark.parametrize("error", [RuntimeError("a defect"), OSError("no name")], ids=["defect", "nameless"])
def test_what_nobody_expected_keeps_its_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(convert_module.Wish, "check", _raising(error))
    assert run("convert", "bn.pt").exception is error


def test_progress_is_shown_on_a_terminal_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ok("convert", "bn.pt", *ARCH, *INPUT).stderr == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    shown = run("convert", "bn.pt", *ARCH, *INPUT, "--force", "--json")
    for stage in ("reading bn.pt", "building the model", "finding norm sites", "comparing", "writing bn.normswap.pt"):
        assert stage in shown.stderr
    assert json.loads(shown.stdout)["written"]


def test_what_an_error_tells_cannot_rule_the_terminal(folder: Path) -> None:
    result = run("inspect", "a\x1b[31m\udcff.pt")
    assert result.stderr.startswith(r"error: a\x1b[31m\udcff.pt: no such file")


def test_markup_in_a_record_is_shown_as_it_is(folder: Path) -> None:
    loaded = normswap.load("sn.pt")
    steps = (Step("[/bold]", "[/x]", "[red]"),)
    normswap.save(loaded.model, "marked.pt", plan=loaded.plan, architecture=files.ARCH, history=steps)
    assert "[/bold]" in ok("inspect", "marked.pt").stdout
