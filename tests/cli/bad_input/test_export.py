"""Bad input of `normswap export`: one clear line, nothing written."""

from pathlib import Path

import pytest

from tests.helpers.refusals import assert_refused

USAGE = {
    "no kind": (["-o", "a.pt"], "--to: expected one of onnx, pt2, state-dict, published-layout for the file a.pt"),
    "another suffix": (
        ["-o", "a.onnx", "--to", "pt2"],
        "a.onnx: expected a name that ends in .pt2 for --to pt2: choose",
    ),
    "no output": ([], "Missing option '-o'"),
    "an unknown kind": (["-o", "a.tflite", "--to", "tflite"], "Invalid value for '--to'"),
    "an old opset": (["-o", "a.onnx", "--opset", "11"], "Invalid value for '--opset'"),
    "opset of pt2": (["-o", "a.pt2", "--opset", "18"], "--opset applies to --to onnx only: leave it out for --to pt2"),
    "folding of pt2": (["-o", "a.pt2", "--no-fold"], "--no-fold applies to --to onnx only: leave it out for --to pt2"),
    "two precisions": (["-o", "a.onnx", "--half", "--dtype", "bfloat16"], "--half and --dtype bfloat16 exclude each"),
    "bfloat16 in ONNX": (["-o", "a.onnx", "--dtype", "bfloat16"], "--dtype bfloat16 has no kernels in onnxruntime"),
    "half of weights": (
        ["-o", "a.pt", "--to", "state-dict", "--half"],
        "--dtype applies to --to onnx and --to pt2 only",
    ),
    "an existing file": (["-o", "bn.pt", "--to", "state-dict"], "bn.pt: exists already: choose another name, or pass"),
    "no folder": (["-o", "nowhere/a.onnx"], "nowhere/a.onnx: expected an existing folder, got nowhere"),
    "sizes": (["-o", "a.onnx", "--input", "2x0"], "expected sizes such as 2x3x224x224[:dtype], got '2x0'"),
    "another input": (["-o", "a.onnx", "--input", "2x7"], "the forward pass fails on 2x7: "),
}


@pytest.mark.parametrize(("options", "message"), USAGE.values(), ids=USAGE)
def test_bad_options(folder: Path, options: list[str], message: str) -> None:
    assert_refused(folder, ["export", "sn.pt", *options], 2, message)


def test_bad_files(folder: Path) -> None:
    assert_refused(folder, ["export", "nowhere.pt", "-o", "a.onnx"], 2, "nowhere.pt: no such file")
    (folder / "text.pt").write_text("nothing")
    assert_refused(folder, ["export", "text.pt", "-o", "a.onnx"], 2, "text.pt: expected a file of torch.save")
