"""Compare layers with a forced variant of the kernels, in a new process for each.

`python -m benchmarks.speed.variants SECONDS` measures in this process and prints JSON. torch is limited to the same
vector extensions as the kernels, so both compute as on a processor without the wider ones.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial

import torch

from benchmarks.paths import ROOT
from benchmarks.speed.arms import ARMS, BASE, BATCH, RUNNING, RUNNING_FIXED, RUNNING_MOVED
from benchmarks.speed.layers import DTYPES, LAYOUTS, Setting, layer_works
from benchmarks.speed.records import Comparison, VariantRun, comparisons_from_json
from benchmarks.speed.timing.estimates import TRUSTED
from benchmarks.speed.timing.rounds import cpu_time, keep_freed_memory
from benchmarks.speed.timing.schedule import measure
from normswap.layers.backends import cpu

_SHAPES = ((8, 64, 56, 56), (8, 512, 7, 7), (2, 512, 7, 7))
_ARMS = (BASE, RUNNING, RUNNING_FIXED, RUNNING_MOVED, BATCH)
# The value of torch's ATEN_CPU_CAPABILITY for each variant, widest last.
_CAPABILITIES = {"baseline": "default", "avx2": "avx2", "avx512": "avx512"}


def available_variants() -> list[str]:
    """Return the variants that this processor can run, widest last."""
    widest = {"AVX512": 3, "AVX2": 2}.get(capability(), 1)
    return [*_CAPABILITIES][:widest]


def capability() -> str:
    """Return the vector extensions that torch uses: `AVX512`, `AVX2`, or another name."""
    return torch.backends.cpu.get_cpu_capability()


def used_variant() -> str | None:
    """Return the variant of normswap's kernels in this process; None if normswap does not report it."""
    return getattr(cpu, "VARIANT", None)


def measure_variant(name: str, seconds: float) -> VariantRun:
    """Measure in a new process with this variant."""
    environment = os.environ | {"NORMSWAP_CPU_VARIANT": name, "ATEN_CPU_CAPABILITY": _CAPABILITIES[name]}
    command = [sys.executable, "-m", "benchmarks.speed.variants", str(seconds)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    data = json.loads(done.stdout)
    return VariantRun(data["used"], data["capability"], comparisons_from_json(data["comparisons"]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float, help="total time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    arms = [arm for arm in ARMS if arm.name in _ARMS]
    settings = [
        Setting(shape, layout, dtype, 1, mode)
        for dtype in DTYPES
        for layout in LAYOUTS
        for shape in _SHAPES
        for mode in ("train", "eval")
    ]
    blocks = measure(
        {setting: partial(layer_works, setting, arms) for setting in settings},
        cpu_time,
        BASE,
        seconds=options.seconds,
        block=0.2,
        least_blocks=4,
        precision=TRUSTED,
    )
    found = [Comparison.of(setting.key, blocks[setting], BASE).to_json() for setting in settings]
    print(json.dumps({"used": used_variant(), "capability": capability(), "comparisons": found}))


if __name__ == "__main__":
    main()
