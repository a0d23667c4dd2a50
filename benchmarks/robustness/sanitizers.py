"""Run the C extension under the address and undefined-behaviour sanitizers (`make sanitize`).

The program copies the package to a scratch folder, builds the extension there with `-fsanitize=address,undefined`, and
runs layer tests and random shapes. It first plants a fault in a second copy, by removing the check of buffer lengths:
the sanitizer must report it.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from benchmarks.paths import ROOT

FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
# Flags of the normal build that change what the compiler may assume.
BUILD = ("-shared", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
_TESTED = ("functional", "backends", "engines", "checks", "non_finite_values", "switch_norm", "switch_norm_in_torch")
TESTS = tuple(f"tests/layers/test_{name}.py" for name in _TESTED)
# Compilers start other processes, Triton does not use the extension, and without the usual optimization the extension
# rounds differently (`errors_are`).
EXCLUDED = " and ".join(
    f"not {word}" for word in ("compil", "export", "triton", "graph", "trace", "interface", "errors_are")
)
CHECK = "buffer->count != expected"
REPORT = "ERROR: AddressSanitizer: heap-buffer-overflow"


def main() -> int:
    """Build, plant a fault, run tests and random shapes; exit code 1 if the sanitizer or a test reports an error."""
    options = _options()
    if options.shapes_only:
        return _try_shapes(options.shapes, options.seed)
    with tempfile.TemporaryDirectory(prefix="normswap-sanitize-") as scratch:
        return _run_all(Path(scratch), options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, default=500, help="number of random shapes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shapes (default %(default)s)")
    parser.add_argument("--shapes-only", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_all(scratch: Path, options: argparse.Namespace) -> int:
    print(f"building with {' '.join(FLAGS)}", flush=True)
    planted, whole = scratch / "planted", scratch / "whole"
    for tree in (planted, whole):
        _copy(tree)
    header = planted / "normswap" / "layers" / "csrc" / "arguments.h"
    text = header.read_text()
    if CHECK not in text:
        sys.exit(f"error: {header.name}: expected the text {CHECK!r}, which this program removes to plant a fault")
    header.write_text(text.replace(CHECK, f"buffer->count < 0 && {CHECK}"))
    for tree in (planted, whole):
        _build(tree)
    found = _python(planted, "-c", _PLANTED_CALL, capture=True)
    if found.returncode == 0 or REPORT not in found.stderr:
        print(f"error: planted fault not reported (exit code {found.returncode}): {found.stderr[-2000:]}")
        return 1
    print("planted fault: reported")
    shapes = (
        "-m",
        "benchmarks.robustness.sanitizers",
        "--shapes-only",
        "--shapes",
        str(options.shapes),
        "--seed",
        str(options.seed),
    )
    tests = ("-m", "pytest", "-q", "-p", "no:xdist", "-k", EXCLUDED, *map(str, _test_files(whole)))
    # Run both, also after a failure.
    statuses = [_python(whole, *command).returncode for command in (shapes, tests)]
    print("sanitizers: nothing reported" if not any(statuses) else f"failed: exit codees {statuses}")
    return int(any(statuses))


_PLANTED_CALL = """
import torch
from normswap.layers.backends import cpu
assert cpu.AVAILABLE
row, mean, short = torch.ones(64), torch.zeros(64), torch.ones(1)
names = ("mean", "var", "running_mean", "running_var")
buffers = {name: cpu.describe(tensor) for name, tensor in zip(names, (row, row, mean, short))}
options = {"channels": 64, "momentum": 0.1, "var_factor": 1.0, "num_batches_tracked": None}
cpu._C.update_running(options | buffers)
"""


def _test_files(tree: Path) -> list[Path]:
    return [tree / name for name in TESTS]


def _copy(tree: Path) -> None:
    for name in ("normswap", "recipes", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)


def _build(tree: Path) -> None:
    layers = tree / "normswap" / "layers"
    out = layers / f"_compiled{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = f"-I{sysconfig.get_paths()['include']}"
    sources = sorted(map(str, (layers / "csrc").glob("*.c")))
    subprocess.run([_compiler(), *BUILD, *FLAGS, include, *sources, "-lm", "-o", str(out)], check=True)


def _compiler() -> str:
    return str(sysconfig.get_config_var("CC") or "cc").split()[0]


def _python(tree: Path, *arguments: str, capture: bool = False) -> "subprocess.CompletedProcess[str]":
    """Run Python in a copy of the package with the run-time libraries of the sanitizers preloaded."""
    libraries = [
        subprocess.run(
            [_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python does not free all memory at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=capture, text=True)


def _try_shapes(count: int, seed: int) -> int:
    """Compare forward and backward passes of random shapes, layouts, dtypes and options with the reference backend."""
    import torch

    from normswap import use_backend
    from normswap.layers.backends import cpu
    from normswap.layers.functional import switch_norm

    assert cpu.AVAILABLE
    choose = random.Random(seed)
    torch.manual_seed(seed)
    subsets = [("in", "ln", "bn"), ("in", "ln"), ("in", "bn"), ("ln", "bn"), ("in",), ("ln",), ("bn",)]
    for _ in range(count):
        torch.set_num_threads(choose.choice((1, 2, 3)))
        branches, gate = choose.choice(subsets), choose.choice(("simplex", "softmax"))
        rank = choose.choice((0, 1, 2, 2, 2, 3)) if branches != ("in",) else choose.choice((1, 2))
        samples, channels = choose.choice((1, 2, 3, 5)), choose.choice((1, 2, 3, 7, 16, 33))
        spatial = [choose.choice((1, 2, 3, 5, 17, 40)) + (branches == ("in",)) for _ in range(rank)]
        dtype = choose.choice((torch.float32, torch.float64, torch.bfloat16, torch.float16))
        x, dy = (torch.randn(samples, channels, *spatial) for _ in range(2))
        if rank >= 2 and choose.random() < 0.5:
            last = torch.channels_last if rank == 2 else torch.channels_last_3d
            x, dy = (t.contiguous(memory_format=last) for t in (x, dy))
        options = {"training": choose.random() < 0.7, "gate": gate, "branches": branches}
        options["bn_statistics"] = choose.choice(("batch", "running", "renorm"))
        kept = choose.choice((torch.float32, dtype))
        affine = [torch.rand(channels).to(kept) if choose.random() < 0.8 else None for _ in range(2)]
        points = [torch.rand(len(branches)) for _ in range(2)]
        running = [torch.randn(channels).to(kept), torch.rand(channels).to(kept) + 0.5]
        found = []
        for backend in ("native", "reference"):
            leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (x.to(dtype), *points, *affine)]
            statistics = [t.clone() for t in running]
            with use_backend(backend):
                y = switch_norm(*leaves[:3], *statistics, *leaves[3:], **options)
                wanted = [leaf for leaf in leaves if leaf is not None]
                gradients = torch.autograd.grad(y, wanted, dy.to(dtype), allow_unused=True)
            found.append([y.detach(), *gradients, *statistics])
        # The tests check the accuracy; here wrong values would show a read outside of a tensor. Half precision is too
        # coarse to compare gradients.
        half = dtype in (torch.bfloat16, torch.float16)
        for one, other in zip(*(each[: 1 if half else 2] for each in found), strict=True):
            torch.testing.assert_close(one, other, rtol=5e-2 if half else 1e-2, atol=5e-2 if half else 2e-2)
    print(f"{count} random shapes: equal to the reference backend")
    return 0


if __name__ == "__main__":
    sys.exit(main())
