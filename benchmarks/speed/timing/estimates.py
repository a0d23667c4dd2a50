"""Estimate ratios of times and their uncertainty, and compare them with earlier ones."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TRUSTED = 0.02  # largest uncertainty of a ratio that counts as trusted
_TRIMMED = 0.2  # share of blocks left out at each end
_LEAST_BLOCKS = 4
_TOLERANCE = 0.05  # by which a ratio may grow beyond both uncertainties

Block = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Ratio:
    """A ratio of times.

    Attributes:
        uncertainty: half of the 95 % confidence interval, relative to the value; infinite for too few blocks.
    """

    value: float
    uncertainty: float

    @property
    def is_trusted(self) -> bool:
        """Whether the uncertainty is small enough."""
        return self.uncertainty <= TRUSTED

    def is_worse_than(self, earlier: "Ratio") -> bool:
        """Return whether the ratio grew by more than both uncertainties and 5 %."""
        return self.value / earlier.value - 1 > self.uncertainty + earlier.uncertainty + _TOLERANCE


def estimate_ratios(blocks: Sequence[Block], base: str) -> dict[str, Ratio]:
    """Return the ratio of each work to the base, from blocks of rounds that lie apart in time.

    The ratio of a block is the median over its rounds, each of which has both times within milliseconds. The load
    changes the ratios of a whole block alike, so their scatter between blocks is the uncertainty. The estimate is the
    trimmed mean of their logarithms with Yuen's standard error, which a few blocks under another load do not move.
    """
    names = dict.fromkeys(name for block in blocks for times in block for name in times)
    found = {}
    for name in names:
        logs = []
        for block in blocks:
            quotients = [times[name] / times[base] for times in block if name in times]
            if quotients:
                logs.append(math.log(statistics.median(quotients)))
        found[name] = _estimate(logs)
    return found


def _estimate(logs: list[float]) -> Ratio:
    logs = sorted(logs)
    count, trimmed = len(logs), int(_TRIMMED * len(logs))
    kept = logs[trimmed : count - trimmed]
    value = math.exp(statistics.fmean(kept))
    if count < _LEAST_BLOCKS:
        return Ratio(value, math.inf)
    winsorized = [kept[0]] * trimmed + kept + [kept[-1]] * trimmed
    error = statistics.stdev(winsorized) * math.sqrt(count) / len(kept)
    freedom = len(kept) - 1
    return Ratio(value, (2 + 4 / freedom) * error)  # a little above the 97.5 % quantile of Student's t


def median_seconds(blocks: Sequence[Block], name: str) -> float:
    """Return the median time of a work over all rounds."""
    return statistics.median(times[name] for block in blocks for times in block if name in times)
