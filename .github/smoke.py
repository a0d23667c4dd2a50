"""Smoke test of an installed normswap: `smoke.py with-extension` or `smoke.py without-extension`.

Saves a small timm model, converts the file on the command line, loads the result and compares the outputs.
"""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch

import normswap


def main(expected: str) -> None:
    """Raise an error if the extension is not as expected, the conversion fails or outputs differ."""
    if expected not in ("with-extension", "without-extension"):
        raise SystemExit(f"expected with-extension or without-extension, got {expected!r}")
    has_extension = importlib.util.find_spec("normswap.layers._compiled") is not None
    if has_extension != (expected == "with-extension"):
        raise SystemExit(f"{normswap.__file__}: expected {expected}, found the extension: {has_extension}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        model = timm.create_model("test_resnet").eval()
        torch.save(model.state_dict(), folder / "model.pt")
        arguments = ["convert", "model.pt", "--arch", "timm:test_resnet", "--input", "2x3x64x64"]
        subprocess.run([sys.executable, "-m", "normswap", *arguments], cwd=folder, check=True)
        converted = normswap.load(folder / "model.normswap.pt").model.eval()
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(converted(x), model(x))
        sites = len(normswap.importance_weights(converted))
    print(f"{normswap.__file__}: converted {sites} sites, {expected}")


if __name__ == "__main__":
    main(*sys.argv[1:] or [""])
