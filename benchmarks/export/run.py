"""Measure exported files (`make export`) -> docs/measured/export.md. A network that was measured is not measured again.

Delete benchmarks/results/export.json to measure everything.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.export.int8 import measure_int8
from benchmarks.export.networks import NETWORKS
from benchmarks.export.outputs import measure_outputs, measure_sites
from benchmarks.export.speed import ROUNDS, THREADS, measure_speed
from benchmarks.paths import PAGES, RESULTS
from benchmarks.provenance import provenance
from benchmarks.records import read_document, write_document

SITES_OF = ("timm resnet18", "timm resnet50")
SPEED_OF = ("timm resnet18", "timm resnet50")


def main() -> None:
    """Measure what is missing, print and write docs/measured/export.md."""
    torch.set_num_threads(THREADS)
    path = RESULTS / "export.json"
    found: dict[str, Any] = read_document(path) or {}
    found.setdefault("provenance", f"{provenance()} {_runtimes()}")
    for part, name, measure in _work():
        if name not in found.setdefault(part, {}):
            print(f"{part} of {name}", flush=True)
            found[part][name] = measure()
            write_document(path, found)
            (PAGES / "export.md").write_text(page(found), encoding="utf-8")
    print(page(found))


def _work() -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Yield part, network and function of each measurement."""
    yield "int8", "digits", measure_int8
    for part, names, measure in (
        ("speed", SPEED_OF, measure_speed),
        ("sites", SITES_OF, measure_sites),
        ("outputs", NETWORKS, measure_outputs),
    ):
        for name in names:
            yield part, name, partial(measure, NETWORKS[name])


def _runtimes() -> str:
    found = []
    for name in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"without {name}")
    return f"{', '.join(found)}."


def page(found: dict[str, Any]) -> str:
    """Return the page of the measurements."""
    parts = [
        "# Exported networks",
        "Written by `make export` (`python -m benchmarks.export.run`).\n" + found["provenance"],
        "Each network is converted, and its gates are moved to random points of the simplex. It is exported with "
        "`normswap.export` and run in a process that cannot import normswap. See [export](../how-to/export.md).",
    ]
    for part, write in (
        ("outputs", _outputs),
        ("outputs", _nodes),
        ("sites", _sites),
        ("speed", _speed),
        ("int8", _int8),
    ):
        if part in found:
            parts.append(write(found[part]))
    return "\n\n".join(parts) + "\n"


def _table(head: str, rows: list[str]) -> str:
    columns = head.count("|") - 1
    return "\n".join([head, "|---" * columns + "|", *rows])


def _outputs(found: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {of['sites']} | {of['errors']['onnx']:.1e} | {of['errors']['pt2']:.1e} | "
        f"{of['errors']['half']:.1e} | {'; '.join(of['inputs'])} | {of['free'].get('height', 1)} |"
        for name, of in found.items()
    ]
    head = "| network | sites | ONNX | pt2 | ONNX float16 | inputs | smallest size |"
    text = (
        "The largest relative L2 error of the outputs, against the converted network in float32. The smallest size is "
        "that at which every `in` branch has two positions."
    )
    return f"## Outputs\n\n{text}\n\n{_table(head, rows)}"


def _nodes(found: dict[str, Any]) -> str:
    rows = []
    for name, of in found.items():
        nodes, seconds = of["nodes"], of["seconds"]
        rows.append(
            f"| {name} | {nodes['bn']} | {nodes['vertex']} | {nodes['moved']} | {of['per_site_two']:.0f} | "
            f"{of['per_site_three']:.0f} | {seconds['bn']:.1f} | {seconds['vertex'] / seconds['bn']:.2f} | "
            f"{seconds['moved'] / seconds['bn']:.2f} |"
        )
    head = (
        "| network | BN | all gates at BN | moved | per site, two branches | three | BN, s | all gates at BN / BN | "
        "moved / BN |"
    )
    text = "ONNX nodes with BatchNorm folded, and the time of an export without its verification."
    return f"## Nodes and export time\n\n{text}\n\n{_table(head, rows)}"


def _sites(found: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {dtype} | {of['median']:.1e} | {of['largest']:.1e} |"
        for name, by_dtype in found.items()
        for dtype, of in by_dtype.items()
    ]
    text = "Relative L2 error of the output of a site in onnxruntime, with the errors of all layers before it."
    return f"## Sites\n\n{text}\n\n{_table('| network | precision | median | largest |', rows)}"


def _speed(found: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {runtime} | {of['bn']:.1f} | {of['vertex'] / of['bn']:.3f} | {of['moved'] / of['bn']:.2f} |"
        for name, by_runtime in found.items()
        for runtime, of in by_runtime.items()
    ]
    text = f"Medians of {ROUNDS} runs that alternate in one process, {THREADS} thread, batches of 2 at 64x64."
    head = "| network | runtime | BN, ms | all gates at BN / BN | moved / BN |"
    return f"## Speed\n\n{text}\n\n{_table(head, rows)}"


def _int8(found: dict[str, Any]) -> str:
    found = found["digits"]
    sites = found["sites"]
    rows = [f"| {name} | {found[name]['float32']:.1%} | {found[name]['int8']:.1%} |" for name in ("BN", "SN")]
    text = (
        f"A network on the digits of scikit-learn, quantized by onnxruntime (QDQ, per channel, calibrated on training "
        f"images). In the SN network {sites['bn']} of {sites['sites']} sites compute BN and are folded; the others mix "
        "three branches, stay in float32, and were trained for 5 epochs."
    )
    return f"## int8\n\n{text}\n\n{_table('| network | float32 accuracy | int8 accuracy |', rows)}"


if __name__ == "__main__":
    main()
