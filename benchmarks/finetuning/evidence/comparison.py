"""Means, standard errors and paired differences of scores by seed.

Standard errors of differences are pooled: the variance of a paired difference between two arms is taken over all batch
sizes of a setting, since three seeds alone give a poor estimate.
"""

import math
from collections.abc import Mapping
from statistics import mean
from typing import NamedTuple

# A difference of less is not called a loss, and one of more always is.
TOLERANCE, MAX_TOLERANCE = 1.0, 2.0
Scores = Mapping[int, float]  # by seed


class Estimate(NamedTuple):
    """A mean with its standard error (nan if no two seeds are known anywhere) and the number of seeds."""

    mean: float
    error: float
    count: int


def pooled_variance(groups: Mapping[int, list[float]]) -> float:
    """Return the variance within groups; nan if each has at most one value."""
    squares = sum(sum((value - mean(values)) ** 2 for value in values) for values in groups.values() if values)
    freedom = sum(len(values) - 1 for values in groups.values() if values)
    return squares / freedom if freedom else math.nan


def estimates(groups: Mapping[int, list[float]]) -> dict[int, Estimate]:
    """Return mean and pooled standard error of each group that has values."""
    variance = pooled_variance(groups)
    return {
        name: Estimate(mean(values), math.sqrt(variance / len(values)), len(values))
        for name, values in groups.items()
        if values
    }


def paired(first: Mapping[int, Scores], second: Mapping[int, Scores]) -> dict[int, Estimate]:
    """Return the differences first - second by batch size, over the seeds that both have."""
    return estimates(
        {
            batch: [scores[seed] - second[batch][seed] for seed in sorted(set(scores) & set(second[batch]))]
            for batch, scores in first.items()
        }
    )


def rivals_of(means: Mapping[str, float], arm: str = "default") -> list[str]:
    """Return all other arms, the best first."""
    return sorted((name for name in means if name != arm), key=lambda name: -means[name])


def tolerance(difference: Estimate) -> float:
    """Return how far the default may be below an arm without having lost: a point or two standard errors, at most 2."""
    error = 0.0 if math.isnan(difference.error) else difference.error
    return min(max(TOLERANCE, 2 * error), MAX_TOLERANCE)


def is_significant(difference: Estimate) -> bool:
    """Return whether a difference is above 0 by more than two standard errors."""
    return difference.mean > 2 * difference.error  # false for nan
