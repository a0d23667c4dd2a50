"""The targets, and which of them a run meets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from benchmarks.speed.arms import OURS, RUNNING, RUNNING_FIXED, RUNNING_MOVED
from benchmarks.speed.networks import CONVERTED, MOVED_GATES
from benchmarks.speed.records import Comparison, Measurements


@dataclass(frozen=True)
class Verdict:
    """A value and its limit; `where` names what the value belongs to, if it is one of several."""

    value: float
    limit: float | None
    where: str = ""
    at_least: bool = False
    digits: int = 2

    @property
    def is_met(self) -> bool:
        """Whether the value, as printed, keeps the limit; true without a limit."""
        value = round(self.value, self.digits)
        return self.limit is None or (value >= self.limit if self.at_least else value <= self.limit)

    def __str__(self) -> str:
        text = f"{self.value:.{self.digits}f}"
        if self.limit is not None:
            text = f"{text} met" if self.is_met else f"**{text} not met**"
        return f"{text} ({self.where})" if self.where else text


@dataclass(frozen=True)
class LayerTarget:
    """The largest ratio of some arms in some layouts: of the mean over the shapes, or of each shape."""

    text: str
    limit: float
    mode: str
    arms: Sequence[str]
    layouts: Sequence[str] = ("contiguous", "channels_last")
    of_each_shape: bool = False
    dtype: str | None = None

    def judge(self, found: Sequence[Comparison], dtype: str, threads: int) -> Verdict | None:
        """Return the largest ratio in a setting; None if the target does not concern it or nothing was measured."""
        if self.dtype not in (None, dtype):
            return None
        values: list[tuple[float, str]] = []
        for layout in self.layouts:
            chosen = choose(found, dtype, threads, layout, self.mode)
            for arm in self.arms:
                ratios = [(each.ratios[arm].value, each.subject) for each in chosen if arm in each.ratios]
                if ratios:
                    value, subject = max(ratios) if self.of_each_shape else (mean_ratio(chosen, arm), "")
                    values.append((value, self._where(subject, arm, layout)))
        if not values:
            return None
        value, where = max(values)
        return Verdict(value, self.limit, where)

    def _where(self, subject: str, arm: str, layout: str) -> str:
        names = [subject, arm if len(self.arms) > 1 else "", layout if len(self.layouts) > 1 else ""]
        return "; ".join(name for name in names if name)


LAYER_TARGETS = {
    "cpu": (
        LayerTarget("training, contiguous, each shape", 1.2, "train", OURS, ("contiguous",), of_each_shape=True),
        LayerTarget("training, channels_last, mean", 0.9, "train", OURS, ("channels_last",)),
        LayerTarget("training, channels_last, each shape", 1.2, "train", OURS, ("channels_last",), of_each_shape=True),
        LayerTarget("training, running statistics, gates that do not train, mean", 0.5, "train", (RUNNING_FIXED,)),
        LayerTarget("training, running statistics, moved gates, mean", 0.9, "train", (RUNNING_MOVED,)),
        LayerTarget("training in fp16, mean", 1.2, "train", OURS, dtype="fp16"),
        LayerTarget("evaluation in fp16, mean", 1.2, "eval", (RUNNING,), dtype="fp16"),
        LayerTarget("evaluation, moved gates, each shape", 1.5, "eval", (RUNNING_MOVED,), of_each_shape=True),
    ),
    "cuda": (LayerTarget("training, mean", 1.05, "train", OURS),),
}

PEAK = 1.0
BANDWIDTH = 0.8  # of a copy, on a GPU


@dataclass(frozen=True)
class NetworkTarget:
    """The largest ratio of one form of each network in one mode."""

    text: str
    mode: str
    form: str
    limit: float


NETWORK_TARGETS = {
    "cpu": (
        NetworkTarget("training", "train", CONVERTED, 0.95),
        NetworkTarget("training, moved gates", "train", MOVED_GATES, 0.95),
        NetworkTarget("evaluation", "eval", CONVERTED, 1.02),
        NetworkTarget("evaluation, moved gates", "eval", MOVED_GATES, 1.05),
    ),
    "cuda": (NetworkTarget("training", "train", CONVERTED, 1.05),),
}


def layer_verdicts(found: Measurements) -> list[tuple[LayerTarget, dict[tuple[str, int], Verdict]]]:
    """Return for each target its verdicts by dtype and number of threads."""
    columns = dict.fromkeys((each.dtype, each.threads) for each in found.layers)
    return [
        (target, _known(columns, lambda dtype, threads, target=target: target.judge(found.layers, dtype, threads)))  # type: ignore[misc]
        for target in LAYER_TARGETS[found.conditions.device]
    ]


def _known(
    columns: dict[tuple[str, int], None], judge: Callable[[str, int], Verdict | None]
) -> dict[tuple[str, int], Verdict]:
    verdicts = {column: judge(*column) for column in columns}
    return {column: verdict for column, verdict in verdicts.items() if verdict is not None}


def network_verdicts(found: Measurements) -> dict[tuple[str, str, str], list[Verdict | None]]:
    """Return for each network, layout and dtype the verdict of each target, None for what was not measured."""
    rows = dict.fromkeys((each.subject, each.layout, each.dtype) for each in found.networks)
    by_row = {(each.subject, each.layout, each.dtype, each.mode): each for each in found.networks}
    return {
        row: [
            Verdict(by_row[*row, target.mode].ratios[target.form].value, target.limit)
            if (*row, target.mode) in by_row
            else None
            for target in NETWORK_TARGETS[found.conditions.device]
        ]
        for row in rows
    }


def peak_verdicts(found: Measurements) -> dict[str, Verdict]:
    """Return for each network the peak memory of the converted one, relative to the original."""
    return {peak.network: Verdict(peak.converted / peak.original, PEAK, digits=3) for peak in found.peaks}


def choose(found: Sequence[Comparison], dtype: str, threads: int, layout: str, mode: str) -> list[Comparison]:
    """Return the comparisons in a setting, one per shape."""
    setting = (dtype, threads, layout, mode)
    return [each for each in found if (each.dtype, each.threads, each.layout, each.mode) == setting]


def mean_ratio(found: Sequence[Comparison], arm: str) -> float:
    """Return the geometric mean of the ratio over the shapes that have it."""
    return geometric_mean(each.ratios[arm].value for each in found if arm in each.ratios)
