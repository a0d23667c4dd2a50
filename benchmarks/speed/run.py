"""Measure time and memory of the layer as ratios to BatchNorm (`make bench`) -> docs/measured/speed.md.

All layers are measured in turn in one process. `--render` only writes the page from benchmarks/results/speed.json.
"""

import argparse
import os
import time
from collections.abc import Iterable

import torch

from benchmarks.paths import PAGES, RESULTS
from benchmarks.provenance import provenance
from benchmarks.speed.layers import DTYPES, NETWORKS, layer_races, network_races, saved_by_layers, shapes
from benchmarks.speed.memory import network_memory
from benchmarks.speed.records import Conditions, Measurements, Race
from benchmarks.speed.report import document
from benchmarks.speed.timing import cpu_time, cuda_clock, keep_freed_memory, wall_time
from normswap.layers.backends.selection import fused_backend

CLOCKS = {"wall": lambda: wall_time, "cpu": lambda: cpu_time, "cuda": cuda_clock}
BATCH = {"cpu": 8, "cuda": 32}
QUICK_BATCH = 2  # of networks
PROCESSES = 3  # for peak memory
PRECISIONS = {"cpu": ("fp32",), "cuda": ("fp32", "bf16")}
SECONDS = 1.5  # for one comparison of layers
QUICK_SECONDS = 0.5
STEPS = 6  # times `SECONDS` for one comparison of networks


def main() -> None:
    """Measure and write benchmarks/results/speed.json and docs/measured/speed.md."""
    options = _options()
    measurements = Measurements.read(RESULTS / "speed.json") if options.render else _measured(options)
    measurements.write(RESULTS / "speed.json")
    text = document(measurements)
    (PAGES / "speed.md").write_text(text)
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=[*BATCH], default="cpu", help="device of the layers (default cpu)")
    parser.add_argument(
        "--quick", action="store_true", help="few shapes and one network, small batches, fp32, one thread"
    )
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile; needs a C++ compiler")
    parser.add_argument("--cpu-time", action="store_true", help="measure CPU time of one thread, for a busy machine")
    parser.add_argument("--render", action="store_true", help="only write the page from its records")
    options = parser.parse_args()
    if options.cpu_time and options.device != "cpu":
        parser.error("--cpu-time: expected --device cpu; remove --device")
    return options


def _measured(options: argparse.Namespace) -> Measurements:
    keep_freed_memory()
    device, quick = options.device, options.quick
    clock_name = "cuda" if device == "cuda" else "cpu" if options.cpu_time else "wall"
    clock = CLOCKS[clock_name]()
    all_threads = torch.get_num_threads()
    threads = (
        (all_threads,) if device == "cuda" else (1,) if quick or options.cpu_time else tuple(sorted({1, all_threads}))
    )
    seconds = QUICK_SECONDS if quick else SECONDS
    load = os.getloadavg()[0]
    layers = layer_races(
        shapes(BATCH[device], quick=quick),
        ("fp32",) if quick else tuple(DTYPES),
        threads,
        device=device,
        clock=clock,
        seconds=seconds,
        with_compiled=options.compile,
    )
    layer_records = _run_all(layers)
    torch.set_num_threads(threads[-1])
    batch = QUICK_BATCH if quick else BATCH[device]
    networks = network_races(
        NETWORKS[:1] if quick else NETWORKS,
        batch,
        PRECISIONS[device],
        device=device,
        clock=clock,
        seconds=STEPS * seconds,
    )
    network_records = _run_all(networks)
    saved_shape, saved = saved_by_layers(device)
    memory = network_memory(NETWORKS[0], batch, 1 if quick else PROCESSES, device)
    backend = fused_backend(torch.empty(0, device=device))
    conditions = Conditions(
        provenance(),
        torch.cuda.get_device_name() if device == "cuda" else device,
        clock_name,
        len(os.sched_getaffinity(0)),
        (load, os.getloadavg()[0]),
        "reference" if backend is None else backend.name,
        quick,
    )
    return Measurements(conditions, layer_records, network_records, saved_shape, saved, memory)


def _run_all(races: Iterable[Race]) -> list[Race]:
    """Run the comparisons and print a line after each."""
    start, done = time.perf_counter(), []
    for race in races:
        done.append(race)
        figures = ", ".join(f"{name} {ratio:.2f}" for name, ratio in race.ratios.items())
        where = f"{race.subject} {race.layout} {race.dtype} x{race.threads} {race.mode}"
        print(f"{time.perf_counter() - start:6.0f} s  {where} ({race.rounds} rounds): {figures}", flush=True)
    return done


if __name__ == "__main__":
    main()
