"""What is known of one model after the proof, and the file of one line per model that a run appends to."""

import json
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from benchmarks.paths import ROOT

OUTPUT = ROOT / "zoo-output"

# The only reasons for which a batch norm may stay as it is: what they are called, and how a skip of each is known by
# its class or by what the plan says of it.
ACCEPTED_REASONS = {
    "quantised": (r"torch\.ao\.nn\.(quantized|qat)\.", r"^$"),
    "fused intrinsic": (r"torch\.ao\.nn\.intrinsic\.", r"^$"),
    "kernel standardisation": (r"^$", r"standardis|standardiz"),
    "no signal left": (r"^$", r"leave only the branch bn"),
}
MODEL_FAILS = "the model itself fails"

# What can come of a model. The first four are no failures.
NO_NORM, CONVERTED, PARTLY, PLANNED, FAILED = "no batch norm", "converted", "partly", "planned on meta", "failed"
UNFINISHED = "unfinished"


@dataclass
class Record:
    """One model put through the laws. `failures` says in words what did not hold; empty when all is well.

    `checks` are those of law 1: name, error, limit, own response, passed, note. `site_errors` is the worst of all
    sites in evaluation and in training. `stage` tells where it stopped, if it did. `commit` is that of the code.
    """

    key: str
    zoo: str
    name: str
    family: str
    outcome: str = UNFINISHED
    stage: str = "start"
    reduced: str = ""
    parameters: int = 0
    norms: int = 0
    inputs: str = ""
    sites: int = 0
    swapped: int = 0
    skips: list[list[str]] = field(default_factory=list)
    other_norms: int = 0
    path: str = ""
    path_reason: str = ""
    precision: str = ""
    checks: list[list[Any]] = field(default_factory=list)
    site_errors: list[float | None] = field(default_factory=list)
    fp32_error: float | None = None
    gates_checked: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    trace: str = ""
    commit: str = ""

    def to_json(self) -> str:
        """Return one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Return the record in a line; fields of older programs are dropped."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in json.loads(line).items() if name in known})

    @property
    def is_proved(self) -> bool:
        """Whether laws 1 and 3 were held against it too."""
        return bool(self.checks)

    @property
    def is_unproved(self) -> bool:
        """Whether it was swapped, and laws 1 and 3 are still to be run."""
        return self.outcome in (CONVERTED, PARTLY) and not self.is_proved

    @property
    def ratio(self) -> float | None:
        """Planning and swapping over building and one forward pass, where all four were measured."""
        times = [self.seconds.get(name) for name in ("plan", "swap", "build", "forward")]
        if any(time is None for time in times):
            return None
        plan, swap, build, forward = (float(time or 0.0) for time in times)
        return (plan + swap) / (build + forward)


def accepted_reason(class_name: str, reason: str) -> str | None:
    """Return which accepted reason a skip has, None if it has none."""
    for name, (by_class, by_reason) in ACCEPTED_REASONS.items():
        if re.search(by_class, class_name) or re.search(by_reason, reason):
            return name
    return None


def read_records(path: Path) -> dict[str, Record]:
    """Return the last record of each model by key; a line cut short by a crash is left out."""
    found: dict[str, Record] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = Record.from_json(line)
        except (json.JSONDecodeError, TypeError):
            continue
        found[record.key] = record
    return found


def append_record(path: Path, record: Record) -> None:
    """Add one line to the file."""
    with path.open("a") as file:
        file.write(record.to_json() + "\n")


def code_version() -> str:
    """Return the commit of the working tree, with a mark if files differ from it."""

    def git(*arguments: Iterable[str]) -> str:
        return subprocess.run(["git", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "normswap")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")
