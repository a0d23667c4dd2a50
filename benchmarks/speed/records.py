"""The records of `benchmarks.speed.run`: comparisons, memory and conditions, as JSON."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from benchmarks.records import read_document, write_document

BASE = "BatchNorm"
EAGER = "eager SN"
COPY = "copy"


def ours(backend: str, *, mixed: bool = False) -> str:
    """Return the name of our layer on a backend: as converted (all weight on `bn`), or with a mix of all branches."""
    return f"{backend}, mix" if mixed else backend


@dataclass(frozen=True)
class Race:
    """The comparison of all entrants on one subject (a shape or a network) in one setting.

    Attributes:
        mode: `train` or `eval`.
        seconds: median time of each entrant.
        ratios: median of the ratios to the base entrant in the same round.
    """

    subject: str
    layout: str
    dtype: str
    threads: int
    mode: str
    rounds: int
    seconds: dict[str, float]
    ratios: dict[str, float]


@dataclass(frozen=True)
class Memory:
    """Memory of the original and the converted network in bytes: saved for backward, and median peak of a step."""

    network: str
    batch: int
    processes: int
    saved: tuple[int, int]
    peak: tuple[int, int]


@dataclass(frozen=True)
class Conditions:
    """The conditions of a run. `load` is the load average of the machine at its start and at its end."""

    provenance: str
    device: str
    clock: str
    cores: int
    load: tuple[float, float]
    backend: str
    is_quick: bool


@dataclass(frozen=True)
class Measurements:
    """All results of one run. `saved` is the memory saved for backward by each layer, divided by the size of x."""

    conditions: Conditions
    layers: list[Race]
    networks: list[Race]
    saved_shape: str
    saved: dict[str, float]
    memory: Memory

    def write(self, path: Path) -> None:
        """Write as JSON."""
        write_document(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file written by `write`."""
        data = read_document(path)
        races = {part: [Race(**race) for race in data[part]] for part in ("layers", "networks")}
        return cls(
            **data | races | {"conditions": Conditions(**data["conditions"]), "memory": Memory(**data["memory"])}
        )
