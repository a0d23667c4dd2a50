"""Write docs/measured/speed.md from the records: means, worst shapes, and a comparison with the targets."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from statistics import geometric_mean
from textwrap import fill

from benchmarks.speed.records import BASE, COPY, EAGER, Conditions, Measurements, Memory, Race, ours

_CLOCKS = {
    "wall": "wall time",
    "cpu": "CPU time of the thread, for a busy machine",
    "cuda": "time between two events on the device, with its caches flushed before each call",
}
_TRAFFIC = {"train": 8, "eval": 3}  # smallest number of activations read and written: 3 forward, 5 backward
_COPIED = 2
_LARGE = 2**25  # bytes of an activation that does not fit into any cache
_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Targets:
    """Targets: largest ratios to BatchNorm, smallest leads over the eager SN."""

    train: float
    worst: float | None
    evaluation: dict[str, float]
    lead: dict[str, float]
    networks: dict[str, float]
    saved: float = 1.02
    peak: float = 1.03
    bandwidth: float = 0.7


_TARGETS = {
    "cpu": Targets(
        1.3, 2.0, {"contiguous": 2.5, "channels_last": 2.1}, {"train": 4, "eval": 6}, {"train": 1.15, "eval": 1.2}
    ),
    "cuda": Targets(1.15, None, {"contiguous": 1.6, "channels_last": 1.6}, {}, {"train": 1.08}),
}


def document(found: Measurements) -> str:
    """Return the page as Markdown."""
    parts = [
        _head(found.conditions),
        _layer_targets(found),
        _means(found),
        _shapes(found),
        *([_bandwidth(found)] if _is_cuda(found) else []),
        _networks(found),
        _memory(found),
    ]
    return "\n\n".join(parts) + "\n"


def _head(conditions: Conditions) -> str:
    start, end = conditions.load
    lines = [
        "Written by `make bench` (`python -m benchmarks.speed.run`).",
        conditions.provenance,
        f"Device: {conditions.device}. Load average {start:.1f} at the start, {end:.1f} at the end.",
    ]
    if conditions.is_quick:
        lines.append("**Quick mode: few shapes, one network, small batches.**")
    if start >= 0.5 * conditions.cores:
        lines.append("**The machine was busy with other work, so these figures are not reliable.**")
    return "\n\n".join(
        [
            "# Speed and memory of the layer",
            "\n".join(lines),
            _filled(
                "All layers run in one process, in rounds and in rotating order, without garbage collection. Short "
                "calls are repeated several times in a row. Layers that take more than three times as long as "
                "BatchNorm run in every second round only. On a CPU, freed memory is kept for the next allocation, so "
                "page faults do not affect the comparison. A ratio is the median of the ratios to `nn.BatchNorm2d` "
                "(for 3-D volumes `nn.BatchNorm3d`) in the same round, by "
                f"{_CLOCKS[conditions.clock]}. `train` is a forward and backward pass with all gradients, `eval` a "
                "forward pass without gradients. In bf16 the layers have float32 parameters, as under autocast; "
                "GroupNorm and the eager SN do not support this and have bf16 parameters."
            ),
            _filled(
                "`native`, `reference` and so on are the backends of our layer: as converted (all weight on `bn`), "
                f"and with a `mix` of all three branches. The default on this device is `{conditions.backend}`. The "
                "eager SN computes the layer in separate torch operations, as published code does."
            ),
        ]
    )


def _layer_targets(found: Measurements) -> str:
    targets, backend = _targets(found), found.conditions.backend
    rows, verdicts = [], []
    for dtype, threads, layout in _settings(found.layers):
        chosen = {mode: _chosen(found.layers, dtype, threads, layout, mode) for mode in ("train", "eval")}
        for name in (backend, ours(backend, mixed=True)):
            means = {mode: _mean(races, name) for mode, races in chosen.items()}
            worst = max(chosen["train"], key=lambda race: race.ratios[name])
            cells = [
                _with_verdict(means["train"], targets.train),
                _with_verdict(worst.ratios[name], targets.worst) + f" ({worst.subject})",
                _with_verdict(means["eval"], targets.evaluation[layout]),
                *(
                    _with_verdict(
                        geometric_mean(race.ratios[EAGER] / race.ratios[name] for race in races),
                        targets.lead.get(mode) if layout == "contiguous" else None,
                        at_least=True,
                    )
                    for mode, races in chosen.items()
                ),
            ]
            verdicts += cells
            rows.append([dtype, str(threads), layout, name, *cells])
    evaluation = " / ".join(f"{limit}" for limit in targets.evaluation.values())
    lead = {mode: f", target {limit:g}" for mode, limit in targets.lead.items()}
    header = [
        *("dtype", "threads", "layout", "layer", f"train, target {targets.train}"),
        "worst shape" + (f", target {targets.worst}" if targets.worst else ""),
        f"eval, target {evaluation}",
        *(f"eager SN / ours, {mode}{lead.get(mode, '')}" for mode in ("train", "eval")),
    ]
    missed, judged = sum("**" in cell for cell in verdicts), sum("met" in cell for cell in verdicts)
    text = (
        f"Geometric means over the shapes, for the default backend. The header has the targets: largest ratios "
        "(evaluation: contiguous / channels_last), and smallest leads over the eager SN (contiguous only). "
        f"Met: {judged - missed} of {judged}."
    )
    return "\n\n".join(["## Layers: comparison with the targets", _filled(text), _table(header, rows)])


def _means(found: Measurements) -> str:
    names = _names(found.layers)
    rows = []
    for dtype, threads, layout in _settings(found.layers):
        for mode in ("train", "eval"):
            races = _chosen(found.layers, dtype, threads, layout, mode)
            rows.append([dtype, str(threads), layout, mode, *(_cell(races, name) for name in names)])
    parts = ["## All layers", "Geometric means of the ratios to BatchNorm over the shapes."]
    if not any(name.startswith("compiled") for name in names):
        parts[-1] += " `torch.compile` was not measured (use `--compile`)."
    return "\n\n".join([*parts, _table(["dtype", "threads", "layout", "mode", *names], rows)])


def _cell(races: Sequence[Race], name: str) -> str:
    return f"{_mean(races, name):.2f}" if all(name in race.ratios for race in races) else "-"


def _shapes(found: Measurements) -> str:
    dtype, threads, _ = _settings(found.layers)[0]
    names = [name for name in _names(found.layers) if name != BASE]
    parts = [
        "## All shapes",
        f"Ratios in {dtype} with {threads} {'thread' if threads == 1 else 'threads'}: train / eval. The times of "
        "BatchNorm are in milliseconds. `make bench` writes the other settings to `benchmarks/results/speed.json`.",
    ]
    for layout in dict.fromkeys(race.layout for race in found.layers):
        modes = [_chosen(found.layers, dtype, threads, layout, mode) for mode in ("train", "eval")]
        rows = [
            [
                pair[0].subject,
                " / ".join(f"{race.seconds[BASE] * 1e3:.3g}" for race in pair),
                *(" / ".join(f"{race.ratios[name]:.2f}" for race in pair) for name in names),
            ]
            for pair in zip(*modes, strict=True)
        ]
        parts.append(_table([layout, "BatchNorm, ms", *names], rows))
    return "\n\n".join(parts)


def _bandwidth(found: Measurements) -> str:
    targets, backend = _targets(found), found.conditions.backend
    rows = []
    for race in found.layers:
        size = prod(map(int, race.subject.split("x"))) * _BYTES[race.dtype]
        if size < _LARGE:
            continue
        speeds = {name: _TRAFFIC[race.mode] * size / race.seconds[name] for name in (BASE, backend)}
        copying = _COPIED * size / race.seconds[COPY]
        rows.append(
            [race.subject, race.dtype, race.layout, race.mode, f"{copying / 1e9:.0f}"]
            + [
                f"{speeds[BASE] / copying:.0%}",
                _with_verdict(speeds[backend] / copying, targets.bandwidth, at_least=True),
            ]
        )
    text = (
        "The smallest number of bytes that a layer must read and write (forward 2 reads and 1 write, backward 4 and "
        "1) divided by its time, relative to the bandwidth of a copy of the same activation; target "
        f"{targets.bandwidth} on large shapes. The same number of bytes is used for BatchNorm, whose evaluation needs "
        "one read less."
    )
    header = ["shape", "dtype", "layout", "mode", "copy, GB/s", BASE, backend]
    return "\n\n".join(["## Bandwidth", _filled(text), _table(header, rows)])


def _networks(found: Measurements) -> str:
    targets = _targets(found)
    rows = []
    for race in found.networks:
        limit = targets.networks.get(race.mode) if race.subject == found.memory.network else None
        times = [f"{race.seconds[form] * 1e3:.0f}" for form in ("original", "converted")]
        setting = [race.subject, race.dtype, str(race.threads), race.layout, race.mode]
        rows.append([*setting, *times, _with_verdict(race.ratios["converted"], limit)])
    limits = ", ".join(f"{mode} at most {limit}" for mode, limit in targets.networks.items())
    text = (
        f"timm networks at 224 pixels, batch size {found.memory.batch}, random weights, original and converted. "
        f"Target for {found.memory.network}: {limits}."
    )
    header = ["network", "dtype", "threads", "layout", "mode", "original, ms", "converted, ms", "ratio"]
    return "\n\n".join(["## Networks", _filled(text), _table(header, rows)])


def _memory(found: Measurements) -> str:
    targets, memory = _targets(found), found.memory
    layers = _table(
        ["layer", "saved for backward / bytes of x"], [[name, f"{share:.3f}"] for name, share in found.saved.items()]
    )
    network = _table(
        ["", "original, MB", "converted, MB", "ratio"],
        [
            _memory_row("saved for backward", memory.saved, targets.saved),
            _memory_row("peak of a training step", memory.peak, targets.peak),
        ],
    )
    return "\n\n".join(
        [
            "## Memory",
            _filled(
                "Memory that autograd saves for backward, without parameters and buffers. For one layer on "
                f"{found.saved_shape} in fp32, contiguous:"
            ),
            layers,
            _filled(_about_network(memory, targets)),
            network,
        ]
    )


def _about_network(memory: Memory, targets: Targets) -> str:
    return (
        f"`{memory.network}` at 224 pixels, batch size {memory.batch}, fp32. The peak is the memory of training steps "
        f"without the network and its input, the median of {memory.processes} new processes. Targets: "
        f"at most {targets.saved} and {targets.peak}."
    )


def _memory_row(what: str, pair: tuple[int, int], limit: float) -> list[str]:
    return [what, *(f"{size / 1e6:.1f}" for size in pair), _with_verdict(pair[1] / pair[0], limit, digits=4)]


def _with_verdict(value: float, limit: float | None, *, at_least: bool = False, digits: int = 2) -> str:
    """Return the value and, if there is a target, the verdict."""
    text = f"{value:.{digits}f}"
    if limit is None:
        return text
    return f"{text} met" if (value >= limit if at_least else value <= limit) else f"**{text} not met**"


def _targets(found: Measurements) -> Targets:
    return _TARGETS["cuda" if _is_cuda(found) else "cpu"]


def _is_cuda(found: Measurements) -> bool:
    return found.conditions.clock == "cuda"


def _settings(races: Iterable[Race]) -> list[tuple[str, int, str]]:
    return [*dict.fromkeys((race.dtype, race.threads, race.layout) for race in races)]


def _names(races: Iterable[Race]) -> list[str]:
    return [*dict.fromkeys(name for race in races for name in race.ratios if name != COPY)]


def _chosen(races: Iterable[Race], dtype: str, threads: int, layout: str, mode: str) -> list[Race]:
    setting = (dtype, threads, layout, mode)
    return [race for race in races if (race.dtype, race.threads, race.layout, race.mode) == setting]


def _mean(races: Iterable[Race], name: str) -> float:
    return geometric_mean(race.ratios[name] for race in races)


def _filled(text: str) -> str:
    return fill(text, 118, break_on_hyphens=False)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
