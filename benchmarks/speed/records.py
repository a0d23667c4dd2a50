"""The records of `benchmarks.speed.run`, one per kind of processor, and of `benchmarks.speed.quick`, as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.records import read_document, write_document
from benchmarks.speed.timing.estimates import Block, Ratio, estimate_ratios, median_seconds

_DIGITS = 4


@dataclass(frozen=True)
class Comparison:
    """The comparison of all works on one subject (a shape or a network) in one setting.

    Attributes:
        mode: `train` or `eval`.
        rounds: number of times that the base was timed.
        seconds: median time of the base.
        ratios: to the base.
    """

    subject: str
    layout: str
    dtype: str
    threads: int
    mode: str
    rounds: int
    seconds: float
    ratios: dict[str, Ratio]

    @property
    def setting(self) -> tuple[str, str, str, int, str]:
        """Everything but the results."""
        return self.subject, self.layout, self.dtype, self.threads, self.mode

    @classmethod
    def of(cls, setting: tuple[str, str, str, int, str], blocks: Sequence[Block], base: str) -> Self:
        """Return the comparison of measured blocks."""
        rounds = sum(base in times for block in blocks for times in block)
        return cls(*setting, rounds, median_seconds(blocks, base), estimate_ratios(blocks, base))

    def to_json(self) -> dict[str, Any]:
        """Return plain data; a ratio is [value, uncertainty]."""
        ratios = {
            name: [round(ratio.value, _DIGITS), round(ratio.uncertainty, _DIGITS)]
            for name, ratio in self.ratios.items()
        }
        return asdict(self) | {"seconds": float(f"{self.seconds:.{_DIGITS}g}"), "ratios": ratios}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return what `to_json` described."""
        return cls(**{**data, "ratios": {name: Ratio(*pair) for name, pair in data["ratios"].items()}})


@dataclass(frozen=True)
class Peak:
    """Peak memory of training steps of a network in bytes, without the network and its input."""

    network: str
    original: int
    converted: int


@dataclass(frozen=True)
class VariantRun:
    """Comparisons with a forced variant of the kernels.

    Attributes:
        used: the variant that normswap reported.
        capability: the vector extensions that torch reported.
    """

    used: str | None
    capability: str
    comparisons: list[Comparison]


@dataclass(frozen=True)
class Conditions:
    """The conditions of a run.

    Attributes:
        device: `cpu` or `cuda`.
        capability: the vector extensions that torch uses.
        variant: the variant of normswap's kernels.
        load: load average of the machine at the start and at the end.
        minutes: time of each part of the program.
    """

    provenance: str
    device: str
    capability: str
    variant: str | None
    cores: int
    load: tuple[float, float]
    minutes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurements:
    """All results of one run. `saved` is the memory saved for backward by each layer, divided by the size of x."""

    conditions: Conditions
    layers: list[Comparison]
    networks: list[Comparison]
    variants: dict[str, VariantRun]
    saved: dict[str, float]
    peaks: list[Peak]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        variants = {
            name: {**vars(run), "comparisons": [each.to_json() for each in run.comparisons]}
            for name, run in self.variants.items()
        }
        return {
            "conditions": asdict(self.conditions),
            "layers": [each.to_json() for each in self.layers],
            "networks": [each.to_json() for each in self.networks],
            "variants": variants,
            "saved": {name: round(share, _DIGITS) for name, share in self.saved.items()},
            "peaks": [asdict(peak) for peak in self.peaks],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return what `to_json` described."""
        conditions = {**data["conditions"], "load": tuple(data["conditions"]["load"])}
        return cls(
            Conditions(**conditions),
            comparisons_from_json(data["layers"]),
            comparisons_from_json(data["networks"]),
            {
                name: VariantRun(run["used"], run["capability"], comparisons_from_json(run["comparisons"]))
                for name, run in data["variants"].items()
            },
            dict(data["saved"]),
            [Peak(**peak) for peak in data["peaks"]],
        )


def comparisons_from_json(data: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """Return comparisons that `to_json` described."""
    return [Comparison.from_json(each) for each in data]


def read_records(path: Path) -> dict[str, Measurements]:
    """Return the last run on each kind of processor, the latest last; empty without the file."""
    return {kind: Measurements.from_json(data) for kind, data in (read_document(path) or {}).items()}


def add_record(path: Path, kind: str, found: Measurements) -> dict[str, Measurements]:
    """Write the run on a kind of processor into the file, instead of an earlier one; return all records."""
    records = {name: run for name, run in read_records(path).items() if name != kind} | {kind: found}
    write_document(path, {name: run.to_json() for name, run in records.items()})
    return records
