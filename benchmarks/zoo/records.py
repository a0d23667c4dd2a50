"""The record of one model, and the file with one line per model."""

import json
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from benchmarks.paths import ROOT
from benchmarks.records import append_line, read_lines

OUTPUT = ROOT / "zoo-output"

# The accepted reasons to skip a batch norm: name, pattern of the class name, pattern of the reason in the plan.
ACCEPTED_REASONS = {
    "quantized": (r"torch\.ao\.nn\.(quantized|qat)\.", r"^$"),
    "fused intrinsic": (r"torch\.ao\.nn\.intrinsic\.", r"^$"),
    "kernel standardization": (r"^$", r"standardis|standardiz"),
    "no signal left": (r"^$", r"leave only the branch bn"),
}
MODEL_FAILS = "the original model fails"

# Outcomes of a model. The first four are not failures.
NO_NORM, CONVERTED, PARTLY, PLANNED, FAILED = "no batch norm", "converted", "partly", "planned on meta", "failed"
UNFINISHED = "unfinished"


# Stages of records that were written before the stages had these names.
_OLD_STAGES = {
    "look": "inspect",
    "law 1": "verify",
    "law 2": "check unchanged parts",
    "law 3": "check gate gradients",
    "law 4": "check the plan",
    "law 5": "check reversal",
}


@dataclass
class Record:
    """The results of one model.

    Attributes:
        failures: descriptions of failed checks; empty if all passed.
        checks: those of the verification: name, error, limit, own response, passed, note.
        site_errors: largest error of all sites in evaluation and in training.
        bn_statistics: what the converted sites use in training, joined by "+"; records of before the default was
            `"running"` have none and used `"batch"`.
        training_reference: the original with which training was compared, as in `normswap.Verification`.
        stage: the current stage, or the last one if the process ended early.
        commit: version of the code.
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
    bn_statistics: str = "batch"
    training_reference: str = "original"
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
        """Return the record of a line. Unknown fields are ignored, and old names of stages are replaced."""
        return cls.from_dict(json.loads(line))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the record with these fields; see `from_json`."""
        known = {f.name for f in fields(cls)}
        record = cls(**{name: value for name, value in data.items() if name in known})
        record.seconds = {_OLD_STAGES.get(name, name): value for name, value in record.seconds.items()}
        return record

    @property
    def is_verified(self) -> bool:
        """Return true if verification and the check of gate gradients were run."""
        return bool(self.checks)

    @property
    def is_unverified(self) -> bool:
        """Return true if the model was converted and verification was not run."""
        return self.outcome in (CONVERTED, PARTLY) and not self.is_verified

    @property
    def ratio(self) -> float | None:
        """Return (plan + swap) / (build + one forward pass), or None if one of the four was not measured."""
        times = [self.seconds.get(name) for name in ("plan", "swap", "build", "forward")]
        if any(time is None for time in times):
            return None
        plan, swap, build, forward = (float(time or 0.0) for time in times)
        return (plan + swap) / (build + forward)


def accepted_reason(class_name: str, reason: str) -> str | None:
    """Return the name of the accepted reason of a skip, or None if it has none."""
    for name, (by_class, by_reason) in ACCEPTED_REASONS.items():
        if re.search(by_class, class_name) or re.search(by_reason, reason):
            return name
    return None


def read_records(path: Path) -> dict[str, Record]:
    """Return the last record of each model by key."""
    return {key: Record.from_dict(data) for key, data in read_lines(path, key="key").items()}


def append_record(path: Path, record: Record) -> None:
    """Add one line to the file."""
    append_line(path, asdict(record))


def code_version() -> str:
    """Return the commit of the working tree, followed by `+changes` if the package differs from it."""

    def git(*arguments: Iterable[str]) -> str:
        return subprocess.run(["git", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "normswap")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")
