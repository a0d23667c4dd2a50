"""What a report of a converted file shows: importance weights, plan, verification, history, log, predicted bake.

Everything is read from the file and, if a recipe has written it, from the log in its folder. No model is built.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from normswap.checkpoints.file_output import copy_folder
from normswap.checkpoints.io.atomic_files import check_readable
from normswap.checkpoints.reading import Checkpoint, read_checkpoint, read_header, stored_importance_weights
from normswap.checkpoints.record import Step
from normswap.errors import ArgumentError, NothingToDo
from normswap.finetune.run_files import NAME as LOG
from normswap.finetune.run_files import read_journal
from normswap.layers.gating import BRANCHES
from normswap.reports.training_course import Course, read_course
from normswap.surgery.importance import SiteWeights, decided_branch
from normswap.surgery.plan import Skip, Swap, SwapPlan
from normswap.text import pluralize, printable_as
from normswap.verification.distance import Distance
from normswap.verification.equivalence import Verification

TOLERANCE = 0.0
# For which the predicted bake is counted, besides that of the report.
_TOLERANCES = (0.0, 0.01, 0.05, 0.1, 0.2)


class SiteReport(NamedTuple):
    """One converted site.

    Attributes:
        fqn: its name, "" for the model itself.
        swap: the decision of the plan; None if the file has no plan.
        weights: its importance weights; None if the file has none for it, such as for a baked site.
        decided: the branch that has all importance, within the tolerance of the report; None for a mix.
    """

    fqn: str
    swap: Swap | None
    weights: SiteWeights | None
    decided: str | None

    @property
    def becomes(self) -> str:
        """What a bake makes of the site: the class of a plain norm, or `mix`; "" without importance weights."""
        if self.weights is None:
            return ""
        groups = self.swap.num_groups if self.swap else 1
        names = {"bn": "BatchNorm", "ln": f"GroupNorm({groups})", "in": "InstanceNorm"}
        return "mix" if self.decided is None else names[self.decided]

    @property
    def moved(self) -> float | None:
        """The importance that has left the branch of the old norm, from 0 to 1; the larger one of means and variances.

        None if there is no plan, or if the site did not start at its old norm.
        """
        if self.swap is None or self.swap.start is not None or self.weights is None:
            return None
        return 1 - min(side.get(self.swap.vertex, 0.0) for side in self.weights)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is unusual about the site, in a few words each."""
        swap = self.swap
        missing = ("not in the file",) if self.weights is None else ()
        if swap is None:
            return missing
        facts = {
            "softmax gate": swap.gate == "softmax",
            f"started at {swap.start}": swap.start is not None,
            f"ln of {swap.num_groups} groups": swap.num_groups > 1,
            f"{swap.bn_statistics} statistics": "bn" in swap.branches and swap.bn_statistics != "running",
            "raw branches": swap.kind == "bn" and swap.start is None and not swap.matched,
            "frozen gate": not swap.train_gates and len(swap.branches) > 1,
            "untrained": swap.untrained,
            "functional call": swap.owner is not None,
        }
        return (*missing, *(text for text, applies in facts.items() if applies))


@printable_as("report")
@dataclass(frozen=True, repr=False)
class Report:
    """What a converted file contains, for a report; `print` shows it as tables.

    Attributes:
        file: the file, as the caller named it.
        facts: format, architecture and size, in one line.
        architecture: what builds the model, such as `timm:resnet50`; None if it is unknown.
        plan: the plan of the conversion; None for a pickled module without a record.
        weights: the importance weights of every site by fqn, in the order of the plan.
        verification, distance: how the converted model compared with the original; None if not recorded.
        history: the operations on the model, oldest first.
        course: the course of the fine-tuning run whose log is in the folder of the file; empty without such a log.
        tolerance: how far from 1 an importance weight may be for its site to count as decided.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> result = normswap.convert(model, torch.randn(2, 3, 16, 16))
        >>> normswap.save(result.model, "sn.pt", plan=result.plan)
        >>> report = normswap.read_report("sn.pt")
        >>> [(site.fqn, site.becomes) for site in report.sites]
        [('1', 'BatchNorm')]
    """

    file: str
    facts: str
    architecture: str | None
    plan: SwapPlan | None
    weights: Mapping[str, SiteWeights]
    verification: Verification | None = None
    distance: Distance | None = None
    history: tuple[Step, ...] = ()
    course: Course = field(default_factory=Course)
    tolerance: float = TOLERANCE

    __module__ = "normswap"

    def __repr__(self) -> str:
        return f"Report({self.file!r}, {pluralize(len(self.sites), 'site')})"

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """The converted sites, in the order of the plan."""
        swaps: dict[str, Swap | None] = dict.fromkeys(self.weights)
        if self.plan is not None:
            swaps = {swap.fqn: swap for swap in self.plan.swaps} | {
                fqn: None for fqn in self.weights if fqn not in {swap.fqn for swap in self.plan.swaps}
            }
        return tuple(
            SiteReport(fqn, swap, weights, decided_branch(weights, self.tolerance) if weights else None)
            for fqn, swap in swaps.items()
            for weights in [self.weights.get(fqn)]
        )

    @property
    def skips(self) -> tuple[Skip, ...]:
        """The sites that were not converted, with their reasons."""
        return self.plan.skips if self.plan else ()

    @property
    def predicted_bake(self) -> dict[float, dict[str, int]]:
        """How many sites are decided for each branch, and how many are a mix, by tolerance."""
        counts = {}
        for tolerance in sorted({*_TOLERANCES, self.tolerance}):
            found = Counter(decided_branch(weights, tolerance) or "mix" for weights in self.weights.values())
            counts[tolerance] = {name: found[name] for name in (*BRANCHES, "mix")}
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain lists, dicts, strings and numbers."""
        return {
            "file": self.file,
            "architecture": self.architecture,
            "sites": [
                {
                    "fqn": site.fqn,
                    "importance_weights": site.weights and site.weights._asdict(),
                    "moved": site.moved,
                    "decided": site.decided,
                    "becomes": site.becomes,
                    "notes": list(site.notes),
                }
                for site in self.sites
            ],
            "skips": [asdict(skip) for skip in self.skips],
            "predicted_bake": [{"tolerance": tolerance, **counts} for tolerance, counts in self.predicted_bake.items()],
            "verification": self.verification and self.verification.to_dict(),
            "distance": self.distance and self.distance.to_dict(),
            "history": [asdict(step) for step in self.history],
            "course": asdict(self.course),
        }


def read_report(
    file: str | Path, *, entry: str | None = None, trust: bool = False, tolerance: float = TOLERANCE
) -> Report:
    """Read what a report of a converted file shows; nothing is written and no model is built.

    Args:
        file: a converted file, or a folder of shards.
        entry: which of several converted networks in the file.
        trust: unpickle objects that run code.
        tolerance: how far from 1 an importance weight may be, from 0 to 0.5, for its site to count as decided.

    Returns:
        A `Report`; `print(report)` shows it as tables.

    Raises:
        ArgumentError: `tolerance` is not a number from 0 to 0.5.
        CheckpointError: the file is missing, damaged, or needs `trust` or `entry`.
        NothingToDo: the file has no converted sites.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> result = normswap.convert(model, torch.randn(2, 3, 16, 16))
        >>> normswap.save(result.model, "sn.pt", plan=result.plan)
        >>> normswap.read_report("sn.pt")
        Report('sn.pt', 1 site)
    """
    check_tolerance(tolerance)
    path = Path(file)
    check_readable(path)
    header = read_header(path, folder=copy_folder(None))
    checkpoint = read_checkpoint(header, entry=entry, trust=trust, mmap=True)
    weights = stored_importance_weights(checkpoint)
    header.origin.check_unchanged()
    record = checkpoint.record
    if not weights and not (record and record.plan and record.plan.swaps):
        raise NothingToDo(
            f"{path}: contains no importance weights with a plan, so there is nothing to report: convert it with "
            "normswap convert, or save a converted model with normswap.save(plan=...)"
        )
    return Report(
        str(file),
        checkpoint.describe(record.architecture if record else None),
        record.architecture if record else None,
        record.plan if record else None,
        weights,
        record.verification if record else None,
        record.distance if record else None,
        record.history if record else (),
        _read_log(checkpoint),
        float(tolerance),
    )


def check_tolerance(tolerance: object) -> None:
    """Refuse a tolerance that is not a number from 0 to 0.5, above which several branches could be decided.

    Raises:
        ArgumentError: it is something else.
    """
    is_number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if not is_number or not 0 <= tolerance < 0.5:  # type: ignore[operator]
        raise ArgumentError(f"tolerance: expected a number from 0 to below 0.5, got {tolerance!r}")


def _read_log(checkpoint: Checkpoint) -> Course:
    """The course of the run that wrote the file; empty if the file was not fine-tuned, or lies in another folder."""
    record, folder = checkpoint.record, checkpoint.path.parent
    finetuned = record is not None and any(step.action == "finetuned" for step in record.history)
    return read_course(read_journal(folder)) if finetuned and (folder / LOG).is_file() else Course()
