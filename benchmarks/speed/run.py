"""Measure time and memory as ratios to BatchNorm (`make bench`) -> docs/measured/speed.md.

Works are timed in turn in one process until their ratios are certain to 2 %, or their time is over: with one thread by
its CPU time, with several by wall time. The records of each kind of processor stay in benchmarks/results/speed.json.
`--render` only writes the page from them.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks.paths import PAGES, RESULTS
from benchmarks.provenance import cpu_kind, provenance
from benchmarks.speed.arms import ARMS, BASE, EAGER_ARM, MODES, Arm
from benchmarks.speed.layers import DTYPES, LAYOUTS, Setting, Shape, layer_works, saved_by_layers, shapes
from benchmarks.speed.memory import measure_peaks
from benchmarks.speed.networks import NETWORKS, ORIGINAL, build_forms, network_works
from benchmarks.speed.records import Comparison, Conditions, Measurements, VariantRun, add_record, read_records
from benchmarks.speed.report.page import document
from benchmarks.speed.timing.estimates import TRUSTED, Block
from benchmarks.speed.timing.rounds import Clock, Work, cpu_time, cuda_clock, keep_freed_memory, wall_time
from benchmarks.speed.timing.schedule import Key, measure
from benchmarks.speed.variants import available_variants, capability, measure_variant, used_variant

_FILE = RESULTS / "speed.json"
_BATCH = {"cpu": 8, "cuda": 32}
_DTYPES = {"cpu": tuple(DTYPES), "cuda": ("fp32", "bf16")}
_PRECISIONS = {"cpu": ("fp32",), "cuda": ("fp32", "bf16")}
_SECONDS_PER_LAYER = 2.0  # for one comparison, on average
_SECONDS_PER_NETWORK = 10.0
_SECONDS_PER_VARIANT = 40.0
_BLOCK = 0.2
_LEAST_BLOCKS = 4
_PROCESSES = 1  # for the peak memory of a network; each takes many seconds
# The eager SN is slow, so it is measured on a large, a middle and a small map with one thread.
_EAGER_SHAPES = ((64, 56, 56), (256, 14, 14), (512, 7, 7))


def main() -> None:
    """Measure, and write benchmarks/results/speed.json and docs/measured/speed.md."""
    options = _options()
    if options.render:
        records = read_records(_FILE)
    else:
        kind = torch.cuda.get_device_name() if options.device == "cuda" else cpu_kind()
        records = add_record(_FILE, kind, _measured(options.device, options.scale))
    text = document(records)
    (PAGES / "speed.md").write_text(text)
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=[*_BATCH], default="cpu", help="device of the layers (default cpu)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all times (default 1)")
    parser.add_argument("--render", action="store_true", help="only write the page from its records")
    return parser.parse_args()


def _measured(device: str, scale: float) -> Measurements:
    keep_freed_memory()
    all_threads = torch.get_num_threads()
    threads = (all_threads,) if device == "cuda" else tuple(sorted({1, all_threads}))
    clock = cuda_clock() if device == "cuda" else wall_time
    load = os.getloadavg()[0]
    minutes: dict[str, float] = {}
    with _part("layers", minutes):
        layers = []
        for count in threads:
            torch.set_num_threads(count)
            layer_clock = cpu_time if device == "cpu" and count == 1 else clock
            for dtype in _DTYPES[device]:
                for layout in LAYOUTS:
                    layers += _layers(layout, dtype, count, device, layer_clock, scale)
    with _part("networks", minutes):
        torch.set_num_threads(all_threads)
        networks = [each for name in NETWORKS for each in _network(name, device, clock, scale)]
    with _part("memory", minutes):
        saved = saved_by_layers((*ARMS, EAGER_ARM), device)
        peaks = measure_peaks(NETWORKS, _PROCESSES, device)
    with _part("kernel variants", minutes):
        variants = _variants(scale) if device == "cpu" else {}
    cores = len(os.sched_getaffinity(0))
    ends = load, os.getloadavg()[0]
    conditions = Conditions(provenance(), device, capability(), used_variant(), cores, ends, minutes)
    return Measurements(conditions, layers, networks, variants, saved, peaks)


@contextmanager
def _part(name: str, minutes: dict[str, float]) -> Iterator[None]:
    """Record the time of a part of the program and print it."""
    start = time.perf_counter()
    yield
    minutes[name] = round((time.perf_counter() - start) / 60, 1)
    print(f"{name}: {minutes[name]} minutes", flush=True)


def _layers(layout: str, dtype: str, threads: int, device: str, clock: Clock, scale: float) -> list[Comparison]:
    batch = _BATCH[device]
    settings = [Setting(shape, layout, dtype, threads, mode) for shape in shapes(batch) for mode in MODES]
    works = {
        setting: partial(layer_works, setting, _arms(setting.shape, batch, threads), device) for setting in settings
    }
    found = _compared(works, clock, BASE, seconds=scale * _SECONDS_PER_LAYER * len(works))
    return [Comparison.of(setting.key, blocks, BASE) for setting, blocks in found.items()]


def _arms(shape: Shape, batch: int, threads: int) -> tuple[Arm, ...]:
    has_eager = threads == 1 and shape in [(batch, *map_) for map_ in _EAGER_SHAPES]
    return (*ARMS, EAGER_ARM) if has_eager else ARMS


def _network(name: str, device: str, clock: Clock, scale: float) -> Iterator[Comparison]:
    network = NETWORKS[name]
    forms, x = build_forms(network, device)
    for precision in _PRECISIONS[device]:
        for layout in network.layouts:
            works: dict[str, Callable[[], Mapping[str, Work]]] = {
                mode: partial(network_works, forms, x, layout, mode, precision) for mode in MODES
            }
            found = _compared(works, clock, ORIGINAL, seconds=scale * _SECONDS_PER_NETWORK * len(works))
            for mode, blocks in found.items():
                setting = (name, layout, precision, torch.get_num_threads(), mode)
                yield Comparison.of(setting, blocks, ORIGINAL)


def _compared(
    works: Mapping[Key, Callable[[], Mapping[str, Work]]], clock: Clock, base: str, *, seconds: float
) -> dict[Key, list[Block]]:
    return measure(works, clock, base, seconds=seconds, block=_BLOCK, least_blocks=_LEAST_BLOCKS, precision=TRUSTED)


def _variants(scale: float) -> dict[str, VariantRun]:
    return {name: measure_variant(name, scale * _SECONDS_PER_VARIANT) for name in available_variants()}


if __name__ == "__main__":
    main()
