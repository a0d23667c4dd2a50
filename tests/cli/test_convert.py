"""`normswap convert`: what it prints, writes and answers."""

import json
import re
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import normswap
from normswap.checkpoints.reading import read_record
from normswap.checkpoints.saving import compute_sha256
from tests.helpers import files
from tests.helpers.command_line import ARCH, INPUT, SIZES, document, names, ok, run

OUTPUTS: dict[str, tuple[list[str], str, str]] = {
    "state dict": (["bn.pt", *ARCH], "bn.normswap.pt", "torch zip"),
    "safetensors": (["bn.safetensors", *ARCH], "bn.normswap.safetensors", "safetensors"),
    "legacy": (["legacy.bin", *ARCH], "legacy.normswap.bin", "torch zip"),
    "module": (["module.pth", "--trust"], "module.normswap.pth", "torch zip"),
    "named": (["bn.pt", *ARCH, "-o", "out.pt"], "out.pt", "torch zip"),
    "to safetensors": (["bn.pt", *ARCH, "-o", "out.safetensors"], "out.safetensors", "safetensors"),
    "from safetensors": (["bn.safetensors", *ARCH, "-o", "out.pt"], "out.pt", "torch zip"),
}


@pytest.mark.slow
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


def test_convert_reports_sites_decisions_and_verification(folder: Path) -> None:
    result = ok("convert", "bn.pt", *ARCH, *INPUT, "--exclude", "layer1.*")
    excluded = sum(skip.fqn.startswith("layer1") for skip in read_record(folder / "bn.normswap.pt").plan.skips)
    text = result.stdout
    assert re.search(rf"BatchNorm2d  torch +{files.SITES} +{files.SITES - excluded} +{excluded}\b", text)
    assert re.search(rf"{files.SITES - excluded} +swap +in\+ln\+bn, simplex gate, running statistics, matched", text)
    assert re.search(rf"{excluded} +skip +excluded by the pattern 'layer1\.\*'", text)
    assert "The example input (64x64)" not in text  # no site has another map for it
    for check in ("outputs in evaluation", "outputs in training", "gradients", "running statistics"):
        assert re.search(rf"{check} +\d\S* +1\.0e-09 +same", text)
    assert re.search(r"outputs in float32 +\d\S* +no limit", text)
    assert f"relative L2 in float64 on {SIZES}" in text
    assert f"wrote bn.normswap.pt ({(folder / 'bn.normswap.pt').stat().st_size / 1e6:.1f} MB)" in text


@pytest.mark.slow
def test_what_is_printed_fits_80_columns(folder: Path) -> None:
    for arguments in (["convert", "bn.pt", *ARCH, *INPUT], ["inspect", "bn.pt", *ARCH], ["inspect", "sn.pt"]):
        assert max(map(len, ok(*arguments).stdout.splitlines())) <= 80


def test_the_record_reports_where_the_file_came_from(folder: Path) -> None:
    ok("convert", "bn.pt", *ARCH, *INPUT)
    record = read_record(folder / "bn.normswap.pt")
    step = record.history[-1]
    assert (step.action, step.source, step.sha256) == ("converted", "bn.pt", compute_sha256(folder / "bn.pt"))
    assert record.architecture == files.ARCH
    assert record.verification.passed


def test_history_and_architecture_of_the_input_are_kept(folder: Path) -> None:
    normswap.save(files.small_model(), "own.pt", architecture=files.ARCH)
    ok("convert", "own.pt", *INPUT)
    record = read_record(folder / "own.normswap.pt")
    assert [step.action for step in record.history] == ["saved", "converted"]
    assert record.architecture == files.ARCH


def test_without_input_timm_reports_the_size(folder: Path) -> None:
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
    assert "Verification  not measured: " in output
    record = read_record(folder / "out.pt")
    assert (record.verification, record.history[-1].detail) == (None, "not verified")


def test_no_verify_measures_nothing(folder: Path) -> None:
    result = ok("convert", "bn.pt", *ARCH, *INPUT, "--no-verify", "--gate", "softmax")
    assert "Verification  not measured: --no-verify" in result.stdout
    record = read_record(folder / "bn.normswap.pt")
    assert record.verification is None
    assert {swap.gate for swap in record.plan.swaps} == {"softmax"}


def test_a_loosened_tolerance_is_reported(folder: Path) -> None:
    result = ok("convert", "bn.pt", *ARCH, *INPUT, "--tolerance", "1e9", "--gate", "softmax")
    assert "limit loosened on request" in result.stdout
    assert read_record(folder / "bn.normswap.pt").verification.loosened


def test_include_leaves_the_rest(folder: Path) -> None:
    ok("convert", "bn.pt", *ARCH, *INPUT, "--include", "layer1.*", "--include", "re:layer2.*")
    plan = read_record(folder / "bn.normswap.pt").plan
    assert {swap.fqn.split(".")[0] for swap in plan.swaps} == {"layer1", "layer2"}
    assert {skip.reason for skip in plan.skips} == {"no filter of include matches it"}


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


@pytest.mark.slow
def test_a_plan_is_stored_and_carried_out(folder: Path) -> None:
    result = ok("convert", "bn.pt", *ARCH, *INPUT, "--dry-run", "--save-plan", "plan.json", "--exclude", "layer4.*")
    assert "plan written to plan.json" in result.stdout
    assert not (folder / "bn.normswap.pt").exists()
    plan = normswap.SwapPlan.from_json((folder / "plan.json").read_text())
    ok("convert", "bn.pt", *ARCH, *INPUT, "--plan", "plan.json")
    assert read_record(folder / "bn.normswap.pt").plan == plan
    ok("convert", "bn.pt", *ARCH, *INPUT, "--plan", "plan.json", "--save-plan", "plan.json", "--force")
    assert normswap.SwapPlan.from_json((folder / "plan.json").read_text()) == plan


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


@pytest.mark.slow
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
    from normswap.cli.console import print_json

    print_json({"a": (float("nan"), {"b": float("inf")}, 1.5)})


# --- statistics, starts and matched branches --------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["running", "batch", "renorm"])
def test_the_statistics_in_training_are_chosen(folder: Path, statistics: str) -> None:
    found = document("convert", "bn.pt", *ARCH, *INPUT, "--bn-statistics", statistics, "--dry-run")
    assert {swap["bn_statistics"] for swap in found["plan"]["swaps"]} == {statistics}
    assert found["verification"]["passed"]


def test_a_start_without_bn_prints_and_records_its_distance(folder: Path) -> None:
    text = ok("convert", "bn.pt", *ARCH, *INPUT, "--start", "gn", "--groups", "8").stdout
    assert re.search(r"\d+ +swap +in\+ln, simplex gate, `ln` of 8 groups, matched; starts at group norm", text)
    assert re.search(r"relative L2 error of the outputs +\d", text)
    assert re.search(r"top-1 agreement of predictions +[\d.]+% of 2", text)
    assert "Verification" not in text
    assert "measure_distance" not in text
    assert "distance measured on the example input: pass --data to measure it on images" in text
    record = read_record(folder / "bn.normswap.pt")
    assert record is not None
    assert record.distance is not None
    shown = ok("inspect", "bn.normswap.pt").stdout
    assert "Distance from the original" in shown
    assert "starts at group norm" in shown
    found = document("inspect", "bn.normswap.pt")
    assert found["distance"]["relative_error"] == record.distance.relative_error
    assert len(found["distance"]["sites"]) == files.SITES
    assert {swap["start"] for swap in found["plan"]["swaps"]} == {"gn"}
    result = run("verify", "bn.pt", "bn.normswap.pt", *INPUT)
    assert result.exit_code == 1
    reason = f"since {files.SITES} sites started without `bn`; its recorded distance: normswap inspect bn.normswap.pt"
    assert reason in result.stderr


def test_data_match_the_in_branches_and_measure_the_distance(folder: Path) -> None:
    data = ["--data", "digits", "--input-size", "3x32x32", "--batch-size", "4", "--batches", "2"]
    found = document("convert", "bn.pt", *ARCH, *INPUT, *data, "--start", "ln")
    assert (found["distance"]["predictions"], found["distance"]["inputs"]) == (8, "4x3x32x32")
    scales = [t for key, t in torch.load("bn.normswap.pt").items() if key.endswith("in_var_scale")]
    scaled = [scale for scale in scales if not torch.equal(scale, torch.ones_like(scale))]
    assert len(scaled) > len(scales) / 2  # the others have maps of one position at this size
    name = "digits, train, at most 2 batches of 4"
    record = read_record(folder / "bn.normswap.pt")
    assert record is not None
    assert record.history[-1].detail == f"matched to {name}"
    assert f"`in` branches matched to {name}" in ok("convert", "bn.pt", *ARCH, *INPUT, *data, "--force").stdout


def test_notes_and_reasons_name_options(folder: Path) -> None:
    net = files.small_model()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    torch.save(net, "new.pth")
    for command in ("inspect", "convert"):
        text = " ".join(ok(command, "new.pth", "--trust", *INPUT).stdout.split())
        assert "or start these sites at `in` and `ln` with --untrained uniform." in text or command == "inspect"
        assert "Compute them with normswap calibrate --data ... --only ..." in text
        skipped = run(command, "new.pth", "--trust", *INPUT, "--kinds", "in", *(["--force"] * (command == "convert")))
        text = " ".join(skipped.stdout.split())
        assert "is Batch Normalization, which --kinds does not include; pass --kinds bn,in to swap it" in text
    text = " ".join(ok("convert", "bn.pt", *ARCH, *INPUT, "--synchronize", "--dry-run").stdout.split())
    assert "to use the joint batch, pass --bn-statistics batch too." in text
    plan = document("convert", "bn.pt", *ARCH, *INPUT, "--synchronize", "--dry-run", "--save-plan", "plan.json")["plan"]
    assert "--bn-statistics batch" in plan["notes"][0]
    saved = normswap.SwapPlan.from_json(Path("plan.json").read_text())
    assert "bn_statistics='batch'" in saved.notes[0]  # Python reads it


def test_branches_stay_raw_on_request(folder: Path) -> None:
    ok("convert", "bn.pt", *ARCH, *INPUT, "--no-match")
    assert not any(key.endswith("in_var_scale") for key in torch.load("bn.normswap.pt"))


def test_norms_that_were_never_trained_are_shown_and_start_uniform_on_request(folder: Path) -> None:
    net = files.small_model()
    new = next(module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d))
    new.reset_running_stats()
    torch.save(net, "new.pth")
    assert re.search(r"in\+ln\+bn, untrained *$", ok("inspect", "new.pth", "--trust", *INPUT).stdout, re.M)
    text = " ".join(ok("convert", "new.pth", "--trust", *INPUT).stdout.split())
    assert "its running statistics were never updated" in text
    assert "Running statistics that were never updated (mean 0, variance 1) do not normalize" in text
    found = document("convert", "new.pth", "--trust", *INPUT, "--untrained", "uniform", "--force")
    assert [swap["start"] for swap in found["plan"]["swaps"] if swap["untrained"]] == ["uniform"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start", "ln", "--gate", "softmax"], "--gate: expected 'simplex' with --start ln"),
        (["--groups", "8"], "--groups 8 has no effect without --start gn"),
        (["--start", "ln", "--kinds", "in"], "--start ln has no effect with --kinds in, since only Batch"),
        (["--split", "test"], "--split has no effect without --data: pass both, or none"),
        (["--data", "digits", "--no-match"], "--data has no effect with --no-match"),
        (["--arch", "none", "--no-verify", "--start", "ln"], "leave --start out"),
        (["--arch", "none", "--no-verify", "--data", "digits"], "leave --data out"),
    ],
)
def test_options_without_a_meaning_name_the_options(folder: Path, arguments: list[str], message: str) -> None:
    result = run("convert", "bn.pt", *(ARCH if "--arch" not in arguments else []), *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (folder / "bn.normswap.pt").exists()
