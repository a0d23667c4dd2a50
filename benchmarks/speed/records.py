"""Records of `make bench`: what was raced against what and how it ended, to JSON and back; runs and prints nothing."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

BASE = "BatchNorm"
EAGER = "eager SN"
COPY = "copy"


def ours(backend: str, *, mixed: bool = False) -> str:
    """Return the name under which our layer races on a backend, at the `bn` vertex or at a mix of all branches."""
    return f"{backend}, mix" if mixed else backend


@dataclass(frozen=True)
class Race:
    """One subject (a shape or a network) in one setting: median seconds of each entrant, and medians of its ratios.

    `mode` is `train` or `eval`; a ratio is that to the base of the same round.
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
    """Bytes of original and converted network: saved for backward, and what a step adds at its peak, the median."""

    network: str
    batch: int
    processes: int
    saved: tuple[int, int]
    peak: tuple[int, int]


@dataclass(frozen=True)
class Conditions:
    """Where and how a run was made; `load` is the load average of the machine at its start and at its end."""

    provenance: str
    device: str
    clock: str
    cores: int
    load: tuple[float, float]
    backend: str
    is_quick: bool


@dataclass(frozen=True)
class Measurements:
    """One run: races of layers and of networks, what layers save for backward in units of x, and memory."""

    conditions: Conditions
    layers: list[Race]
    networks: list[Race]
    saved_shape: str
    saved: dict[str, float]
    memory: Memory

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote."""
        data = json.loads(path.read_text())
        races = {part: [Race(**race) for race in data[part]] for part in ("layers", "networks")}
        return cls(
            **data | races | {"conditions": Conditions(**data["conditions"]), "memory": Memory(**data["memory"])}
        )
