"""Write docs/measured/speed.md: the targets for every kind of processor on record, and details for the latest."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from textwrap import fill

from benchmarks.speed.arms import ARMS, BASE, COPY, EAGER, FROZEN, MOVED, RUNNING, RUNNING_FIXED, RUNNING_MOVED
from benchmarks.speed.layers import SAVED, name_of
from benchmarks.speed.networks import CONVERTED, MOVED_GATES, NETWORKS, ORIGINAL
from benchmarks.speed.records import Comparison, Measurements
from benchmarks.speed.report.targets import (
    BANDWIDTH,
    NETWORK_TARGETS,
    PEAK,
    Verdict,
    choose,
    layer_verdicts,
    mean_ratio,
    network_verdicts,
    peak_verdicts,
)
from benchmarks.speed.timing.estimates import TRUSTED, Ratio

_TRAFFIC = {"train": 8, "eval": 3}  # smallest number of activations read and written: 3 forward, 5 backward
_COPIED = 2
_LARGE = 2**25  # bytes of an activation that does not fit into any cache
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def document(records: Mapping[str, Measurements]) -> str:
    """Return the page as Markdown. The last record is the latest."""
    latest_kind, latest = [*records.items()][-1]
    parts = [
        "# Speed and memory of the layer",
        "Written by `make bench` (`python -m benchmarks.speed.run`).",
        *_method(),
        "## Targets",
        *(part for kind, found in reversed([*records.items()]) for part in _targets(kind, found)),
        f"## Layers on {latest_kind}",
        *_means(latest),
        *_running(latest),
        *_shapes(latest),
        *([_bandwidth(latest)] if latest.conditions.device == "cuda" else []),
        *_variants(latest),
        *_networks(latest),
        *_memory(latest),
    ]
    return "\n\n".join(parts) + "\n"


def _method() -> list[str]:
    return [
        _filled(
            "All layers of a comparison run in one process, in short rounds and in random order, without garbage "
            "collection. A layer is called several times in a row, and the shortest call counts. A CPU keeps freed "
            "memory for the next allocation, so page faults do not affect the comparison. The program passes over "
            "the comparisons until "
            f"the 95 % confidence intervals of their ratios are within {TRUSTED:.0%}, or their time is over; ratios "
            "with a wider one have a `?`. A ratio is the trimmed mean, over these passes, of the median of the "
            "ratios in the same round to `nn.BatchNorm2d` in training mode (for 3-D volumes `nn.BatchNorm3d`; in "
            "evaluation: in evaluation mode). One thread is measured by its CPU time, several by wall time, a GPU by "
            "the time between two events, with its caches flushed before each call. `train` is a forward and backward "
            "pass with all gradients, `eval` a forward pass without gradients. In bf16 and fp16 the layers have "
            "float32 parameters, as under autocast; GroupNorm and the eager SN do not support this and have "
            "parameters in half precision."
        ),
        "\n".join(
            [
                f"- `{FROZEN}`: BatchNorm in evaluation mode, with the gradients of its affine parameters.",
                f"- `{RUNNING}`: `SwitchNorm2d.from_batch_norm(bn)`, the default of a conversion: the `bn` branch",
                "  uses the running statistics, the branches are matched, the gates are at the vertex and train.",
                f"- `{RUNNING_FIXED}`: the same with gates that do not train.",
                f"- `{RUNNING_MOVED}`: the same with trained gates at {MOVED} for `in`, `ln` and `bn`.",
                '- `batch`, `batch, mix`: with `bn_statistics="batch"`, at the vertex and with gates at (0.25, 0.25,',
                "  0.5).",
                f"- `{EAGER}`: the layer in separate torch operations, as published code computes it, on some shapes.",
                "",
                "In evaluation, layers with the same gates compute the same, so only two of ours are measured.",
            ]
        ),
    ]


def _targets(kind: str, found: Measurements) -> list[str]:
    conditions = found.conditions
    start, end = conditions.load
    about = (
        f"{conditions.provenance} Device: {conditions.device}; vector extensions: {conditions.capability}, kernels of "
        f"normswap: {conditions.variant or 'not reported'}. Load average {start:.1f} at the start, {end:.1f} at the "
        "end."
    )
    if start >= 0.5 * conditions.cores:
        about += " **The machine was busy with other work.**"
    layers = layer_verdicts(found)
    columns = [*dict.fromkeys(column for _, verdicts in layers for column in verdicts)]
    rows = [
        [f"{target.text}: at most {target.limit}", *(str(verdicts.get(column, "")) for column in columns)]
        for target, verdicts in layers
    ]
    networks, peaks = network_verdicts(found), peak_verdicts(found)
    every = [verdict for _, verdicts in layers for verdict in verdicts.values()]
    every += [verdict for verdicts in networks.values() for verdict in verdicts if verdict is not None]
    every += peaks.values()
    met = sum(verdict.is_met for verdict in every)
    header = [f"{each.text}, at most {each.limit}" for each in NETWORK_TARGETS[conditions.device]]
    is_first: set[str] = set()
    network_rows = []
    for (network, layout, dtype), verdicts in networks.items():
        peak = "" if network in is_first else str(peaks.get(network, ""))
        is_first.add(network)
        network_rows.append([network, layout, dtype, *map(_shown, verdicts), peak])
    return [
        f"### {kind}",
        _filled(f"{about} Met: {met} of {len(every)}."),
        _table(["layers, ratio to BatchNorm", *(f"{dtype}, {_threads(count)}" for dtype, count in columns)], rows),
        _table(["network", "layout", "dtype", *header, f"peak memory in training, at most {PEAK}"], network_rows),
    ]


def _shown(verdict: Verdict | None) -> str:
    return "" if verdict is None else str(verdict)


def _means(found: Measurements) -> list[str]:
    names = [name for name in _names(found.layers) if name not in (EAGER, COPY)]
    rows = []
    for dtype, threads, layout in _settings(found.layers):
        for mode in ("train", "eval"):
            chosen = choose(found.layers, dtype, threads, layout, mode)
            rows.append([dtype, str(threads), layout, mode, *(_mean_cell(chosen, name) for name in names)])
    return [
        "Geometric means of the ratios to BatchNorm over the shapes.",
        _table(["dtype", "threads", "layout", "mode", *names], rows),
    ]


def _mean_cell(found: Sequence[Comparison], name: str) -> str:
    return f"{mean_ratio(found, name):.2f}" if any(name in each.ratios for each in found) else ""


def _running(found: Measurements) -> list[str]:
    rows = []
    for dtype, threads, layout in _settings(found.layers):
        chosen = choose(found.layers, dtype, threads, layout, "train")
        frozen = mean_ratio(chosen, FROZEN)
        means = [mean_ratio(chosen, name) for name in (RUNNING_FIXED, RUNNING, RUNNING_MOVED)]
        rows.append([dtype, str(threads), layout, f"{frozen:.2f}", *(f"{mean / frozen:.2f}" for mean in means)])
    return [
        "### Running statistics compared with frozen BatchNorm",
        _filled(
            "A training step with running statistics, relative to BatchNorm in evaluation mode with gradients: means "
            "over the shapes."
        ),
        _table(
            ["dtype", "threads", "layout", f"{FROZEN} / {BASE}"]
            + [f"{name} / {FROZEN}" for name in (RUNNING_FIXED, RUNNING, RUNNING_MOVED)],
            rows,
        ),
    ]


def _shapes(found: Measurements) -> list[str]:
    dtype, threads, _ = _settings(found.layers)[0]
    parts = [
        "### All shapes",
        _filled(
            f"Ratios in {dtype} with {_threads(threads)}. The times of BatchNorm are in milliseconds. "
            "`benchmarks/results/speed.json` has the other settings, and the uncertainties."
        ),
    ]
    for layout in dict.fromkeys(each.layout for each in found.layers):
        for mode in ("train", "eval"):
            parts.append(_ratios(f"{layout}, {mode}", choose(found.layers, dtype, threads, layout, mode)))
    return parts


def _ratios(title: str, found: Sequence[Comparison], setting: bool = False) -> str:
    names = [name for name in _names(found) if name not in (BASE, COPY)]
    rows = []
    for each in found:
        cells = [each.subject, *([each.layout, each.dtype, each.mode] if setting else []), f"{each.seconds * 1e3:.3g}"]
        rows.append(cells + [_ratio(each.ratios[name]) if name in each.ratios else "" for name in names])
    return _table([title, *(["layout", "dtype", "mode"] if setting else []), f"{BASE}, ms", *names], rows)


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}" + ("" if ratio.is_trusted else "?")


def _bandwidth(found: Measurements) -> str:
    rows = []
    for each in found.layers:
        size = prod(map(int, each.subject.split("x"))) * _BYTES[each.dtype]
        if size < _LARGE:
            continue
        copying = _COPIED * size / (each.ratios[COPY].value * each.seconds)
        shares = {
            name: _TRAFFIC[each.mode] * size / (each.ratios[name].value * each.seconds) / copying
            for name in (BASE, RUNNING_MOVED)
        }
        rows.append(
            [each.subject, each.dtype, each.layout, each.mode, f"{copying / 1e9:.0f}", f"{shares[BASE]:.0%}"]
            + [str(Verdict(shares[RUNNING_MOVED], BANDWIDTH, at_least=True))]
        )
    text = (
        "The smallest number of bytes that a layer must read and write (forward 2 reads and 1 write, backward 4 and "
        "1) divided by its time, relative to the bandwidth of a copy of the same activation; target "
        f"{BANDWIDTH} on large shapes. The same number of bytes is used for BatchNorm, whose evaluation needs "
        "one read less."
    )
    header = ["shape", "dtype", "layout", "mode", "copy, GB/s", BASE, RUNNING_MOVED]
    return "\n\n".join(["### Bandwidth", _filled(text), _table(header, rows)])


def _variants(found: Measurements) -> list[str]:
    if not found.variants:
        return []
    parts = [
        "## Kernel variants",
        _filled(
            "Each variant of the kernels that this processor can run, forced by `NORMSWAP_CPU_VARIANT`, in a new "
            "process with one thread. torch is limited to the same vector extensions."
        ),
    ]
    for name, run in found.variants.items():
        parts += [
            f"### {name}",
            f"In use: {run.used or 'not reported'}; torch: {run.capability}.",
            _ratios("shape", run.comparisons, setting=True),
        ]
    return parts


def _networks(found: Measurements) -> list[str]:
    rows = []
    for each in found.networks:
        cells = [each.subject, each.layout, each.dtype, str(each.threads), each.mode, f"{each.seconds * 1e3:.0f}"]
        rows.append(cells + [_ratio(each.ratios[form]) for form in (CONVERTED, MOVED_GATES)])
    shapes = ", ".join(f"{name} {name_of(network.shape)}" for name, network in NETWORKS.items())
    return [
        "## Networks",
        _filled(
            f"Networks with random weights, original and converted by `normswap.convert`, as converted and with all "
            f"gates at {MOVED}. Training is a step without the optimizer. Inputs: {shapes}."
        ),
        _table(
            ["network", "layout", "dtype", "threads", "mode", f"{ORIGINAL}, ms"]
            + [f"{form} / {ORIGINAL}" for form in (CONVERTED, MOVED_GATES)],
            rows,
        ),
    ]


def _memory(found: Measurements) -> list[str]:
    return [
        "## Memory",
        _filled(
            "Memory that autograd saves for backward, without parameters and buffers, for one layer in training on "
            f"{name_of(SAVED)} in fp32, contiguous."
        ),
        _table(
            ["layer", "saved for backward / bytes of x"],
            [[name, f"{share:.3f}"] for name, share in found.saved.items()],
        ),
        _filled(
            "The peak is the memory of training steps without the network and its input, the median of new processes."
        ),
        _table(
            ["network", "original, MB", "converted, MB", f"ratio, at most {PEAK}"],
            [
                [peak.network, f"{peak.original / 1e6:.1f}", f"{peak.converted / 1e6:.1f}", str(verdict)]
                for peak, verdict in zip(found.peaks, peak_verdicts(found).values(), strict=True)
            ],
        ),
    ]


def _settings(found: Iterable[Comparison]) -> list[tuple[str, int, str]]:
    return [*dict.fromkeys((each.dtype, each.threads, each.layout) for each in found)]


def _names(found: Iterable[Comparison]) -> list[str]:
    """Return the names of all arms, in the order of the comparison."""
    measured = {name for each in found for name in each.ratios}
    return [name for name in (*(arm.name for arm in ARMS), EAGER, COPY) if name in measured]


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def _filled(text: str) -> str:
    return fill(text, 118, break_on_hyphens=False)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
