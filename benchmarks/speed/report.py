"""docs/measured/speed.md from the records: means, worst shapes, what was wanted and what was found; runs nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from statistics import geometric_mean
from textwrap import fill

from benchmarks.speed.records import BASE, COPY, EAGER, Conditions, Measurements, Memory, Race, ours

_CLOCKS = {
    "wall": "wall time",
    "cpu": "CPU time of the thread, which a trial on a loaded machine uses",
    "cuda": "time between two events on the device, its caches flushed before each call",
}
_TRAFFIC = {"train": 8, "eval": 3}  # activations read and written at least: 3 forward, 5 backward
_COPIED = 2
_LARGE = 2**25  # bytes of an activation that no cache holds
_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Wanted:
    """What was set out to be shown: ratios to BatchNorm at most, leads over the eager SN at least."""

    train: float
    worst: float | None
    evaluation: dict[str, float]
    lead: dict[str, float]
    networks: dict[str, float]
    saved: float = 1.02
    peak: float = 1.03
    bandwidth: float = 0.7


_WANTED = {
    "cpu": Wanted(
        1.3, 2.0, {"contiguous": 2.5, "channels_last": 2.1}, {"train": 4, "eval": 6}, {"train": 1.15, "eval": 1.2}
    ),
    "cuda": Wanted(1.15, None, {"contiguous": 1.6, "channels_last": 1.6}, {}, {"train": 1.08}),
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
        "Written by `make bench` (`benchmarks/speed.py`).",
        conditions.provenance,
        f"Device: {conditions.device}. Load average {start:.1f} at the start, {end:.1f} at the end.",
    ]
    if conditions.is_quick:
        lines.append("**A quick trial: few shapes, one network, small batches.**")
    if start >= 0.5 * conditions.cores:
        lines.append("**The machine was busy with other work: take these figures as a trial.**")
    return "\n\n".join(
        [
            "# What the layer costs",
            "\n".join(lines),
            _filled(
                "All competitors run in one process, round after round in rotating order, without garbage collection; "
                "short calls several times in a row, and what takes more than three times what BatchNorm does in every "
                "second round only. On a CPU, freed memory is kept for the next allocation: page faults, which would "
                "fall on one or another by chance, are no part of it. A ratio is the median of the ratios to "
                "`nn.BatchNorm2d` (of 3-D volumes `nn.BatchNorm3d`) in the same round, by "
                f"{_CLOCKS[conditions.clock]}. `train` is forward and backward with all gradients, `eval` a forward "
                "pass without any. Layers have float32 parameters in bf16 too, as under autocast; GroupNorm and the "
                "eager SN, which cannot, have those of their input."
            ),
            _filled(
                "`native`, `reference` and their like are the backends of our layer: as converted, at the `bn` vertex, "
                f"and at a `mix` of all three branches. The default on this device is `{conditions.backend}`. The "
                "eager SN is written for this page as published code writes it, one torch operation after the other."
            ),
        ]
    )


def _layer_targets(found: Measurements) -> str:
    wanted, backend = _wanted(found), found.conditions.backend
    rows, verdicts = [], []
    for dtype, threads, layout in _settings(found.layers):
        chosen = {mode: _chosen(found.layers, dtype, threads, layout, mode) for mode in ("train", "eval")}
        for name in (backend, ours(backend, mixed=True)):
            means = {mode: _mean(races, name) for mode, races in chosen.items()}
            worst = max(chosen["train"], key=lambda race: race.ratios[name])
            cells = [
                _judged(means["train"], wanted.train),
                _judged(worst.ratios[name], wanted.worst) + f" ({worst.subject})",
                _judged(means["eval"], wanted.evaluation[layout]),
                *(
                    _judged(
                        geometric_mean(race.ratios[EAGER] / race.ratios[name] for race in races),
                        wanted.lead.get(mode) if layout == "contiguous" else None,
                        at_least=True,
                    )
                    for mode, races in chosen.items()
                ),
            ]
            verdicts += cells
            rows.append([dtype, str(threads), layout, name, *cells])
    evaluation = " / ".join(f"{limit}" for limit in wanted.evaluation.values())
    lead = {mode: f", wanted {limit:g}" for mode, limit in wanted.lead.items()}
    header = [
        *("dtype", "threads", "layout", "layer", f"train, wanted {wanted.train}"),
        "worst shape" + (f", wanted {wanted.worst}" if wanted.worst else ""),
        f"eval, wanted {evaluation}",
        *(f"eager SN / ours, {mode}{lead.get(mode, '')}" for mode in ("train", "eval")),
    ]
    missed, judged = sum("**" in cell for cell in verdicts), sum("met" in cell for cell in verdicts)
    text = (
        f"Geometric means over the shapes, for the default backend. Wanted: ratios at most as the header says "
        "(evaluation: contiguous / channels_last), leads over the eager SN at least so, these where contiguous. "
        f"Met: {judged - missed} of {judged}."
    )
    return "\n\n".join(["## What was wanted, and what was found: layers", _filled(text), _table(header, rows)])


def _means(found: Measurements) -> str:
    names = _names(found.layers)
    rows = []
    for dtype, threads, layout in _settings(found.layers):
        for mode in ("train", "eval"):
            races = _chosen(found.layers, dtype, threads, layout, mode)
            rows.append([dtype, str(threads), layout, mode, *(_cell(races, name) for name in names)])
    parts = ["## All competitors", "Geometric means of the ratios to BatchNorm over the shapes."]
    if not any(name.startswith("compiled") for name in names):
        parts[-1] += " `torch.compile`: not measured (`--compile` does)."
    return "\n\n".join([*parts, _table(["dtype", "threads", "layout", "mode", *names], rows)])


def _cell(races: Sequence[Race], name: str) -> str:
    return f"{_mean(races, name):.2f}" if all(name in race.ratios for race in races) else "-"


def _shapes(found: Measurements) -> str:
    dtype, threads, _ = _settings(found.layers)[0]
    names = [name for name in _names(found.layers) if name != BASE]
    parts = [
        "## Every shape",
        f"In {dtype}, threads: {threads}; train, then eval. The first column of figures is BatchNorm in milliseconds. "
        "All other settings: `make bench` writes them to `benchmarks/results/speed.json`.",
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
    wanted, backend = _wanted(found), found.conditions.backend
    rows = []
    for race in found.layers:
        size = prod(map(int, race.subject.split("x"))) * _BYTES[race.dtype]
        if size < _LARGE:
            continue
        speeds = {name: _TRAFFIC[race.mode] * size / race.seconds[name] for name in (BASE, backend)}
        copying = _COPIED * size / race.seconds[COPY]
        rows.append(
            [race.subject, race.dtype, race.layout, race.mode, f"{copying / 1e9:.0f}"]
            + [f"{speeds[BASE] / copying:.0%}", _judged(speeds[backend] / copying, wanted.bandwidth, at_least=True)]
        )
    text = (
        "Bytes that a layer has to read and write at least (forward 2 reads and 1 write, backward 4 and 1) over its "
        f"time, as a share of what a copy of the same activation reaches; wanted {wanted.bandwidth} on large shapes. "
        "BatchNorm is credited with as many, though its evaluation needs one read less."
    )
    header = ["shape", "dtype", "layout", "mode", "copy, GB/s", BASE, backend]
    return "\n\n".join(["## Bandwidth", _filled(text), _table(header, rows)])


def _networks(found: Measurements) -> str:
    wanted = _wanted(found)
    rows = []
    for race in found.networks:
        limit = wanted.networks.get(race.mode) if race.subject == found.memory.network else None
        times = [f"{race.seconds[form] * 1e3:.0f}" for form in ("original", "converted")]
        setting = [race.subject, race.dtype, str(race.threads), race.layout, race.mode]
        rows.append([*setting, *times, _judged(race.ratios["converted"], limit)])
    limits = ", ".join(f"{mode} at most {limit}" for mode, limit in wanted.networks.items())
    text = (
        f"timm networks at 224 pixels, batch {found.memory.batch}, random weights, original against converted. "
        f"Wanted for {found.memory.network}: {limits}."
    )
    header = ["network", "dtype", "threads", "layout", "mode", "original, ms", "converted, ms", "ratio"]
    return "\n\n".join(["## Networks", _filled(text), _table(header, rows)])


def _memory(found: Measurements) -> str:
    wanted, memory = _wanted(found), found.memory
    layers = _table(
        ["layer", "saved for backward / bytes of x"], [[name, f"{share:.3f}"] for name, share in found.saved.items()]
    )
    network = _table(
        ["", "original, MB", "converted, MB", "ratio"],
        [
            _memory_row("saved for backward", memory.saved, wanted.saved),
            _memory_row("peak of a training step", memory.peak, wanted.peak),
        ],
    )
    return "\n\n".join(
        [
            "## Memory",
            _filled(
                "Distinct storages that autograd is handed for backward, without parameters and buffers. A layer, on "
                f"{found.saved_shape} in fp32, contiguous:"
            ),
            layers,
            _filled(_about_network(memory, wanted)),
            network,
        ]
    )


def _about_network(memory: Memory, wanted: Wanted) -> str:
    return (
        f"`{memory.network}` at 224 pixels, batch {memory.batch}, fp32. The peak is what training steps add "
        f"to the network and its input, the median of {memory.processes} in fresh processes. Wanted: "
        f"at most {wanted.saved} and {wanted.peak}."
    )


def _memory_row(what: str, pair: tuple[int, int], limit: float) -> list[str]:
    return [what, *(f"{size / 1e6:.1f}" for size in pair), _judged(pair[1] / pair[0], limit, digits=4)]


def _judged(value: float, limit: float | None, *, at_least: bool = False, digits: int = 2) -> str:
    """The value and, where a limit is set, whether it is kept."""
    text = f"{value:.{digits}f}"
    if limit is None:
        return text
    return f"{text} met" if (value >= limit if at_least else value <= limit) else f"**{text} not met**"


def _wanted(found: Measurements) -> Wanted:
    return _WANTED["cuda" if _is_cuda(found) else "cpu"]


def _is_cuda(found: Measurements) -> bool:
    return found.conditions.clock == "cuda"


def _settings(races: Iterable[Race]) -> list[tuple[str, int, str]]:
    return [*dict.fromkeys((race.dtype, race.threads, race.layout) for race in races)]


def _names(races: Iterable[Race]) -> list[str]:
    return [*dict.fromkeys(name for race in races for name in race.ratios if name != COPY)]


def _chosen(races: Iterable[Race], dtype: str, threads: int, layout: str, mode: str) -> list[Race]:
    wanted = (dtype, threads, layout, mode)
    return [race for race in races if (race.dtype, race.threads, race.layout, race.mode) == wanted]


def _mean(races: Iterable[Race], name: str) -> float:
    return geometric_mean(race.ratios[name] for race in races)


def _filled(text: str) -> str:
    return fill(text, 118, break_on_hyphens=False)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
