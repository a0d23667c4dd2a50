"""The protocol: settings, rates and steps, the runs in their order, and how rates are selected.

Rates are selected by half-length runs on validation inputs, with a seed that is not reported, at batch sizes 2 and 16;
4 takes the rate of 2, and 1 the better of that rate and half of it. An interrupted campaign is useful: each setting
has its first seed before any has its second.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from statistics import mean
from types import ModuleType
from typing import Any, NamedTuple

from benchmarks.finetuning.evidence.arms import ABLATIONS, ALL, ARMS, REPORTED
from benchmarks.finetuning.evidence.comparison import paired, rivals_of
from benchmarks.finetuning.evidence.settings import digits, fashion_mnist, series, shapes, task
from benchmarks.finetuning.evidence.settings.task import Task, code_digest
from benchmarks.finetuning.evidence.training import WEIGHT_DECAY, fingerprint

Record = dict[str, Any]
Records = Mapping[str, Record]
Rates = tuple[float, float | None]  # of the network, and of the gates

BATCHES = (1, 2, 4, 16)
SEEDS, SELECTION_SEED = (0, 1, 2), 100
# Seeds that are added for the default and its two best rivals, where they are close.
MORE_SEEDS = ((3, 4), (5, 6, 7))
CLOSE_RIVALS, CLOSE_POINTS = 2, 1.0
# Settings that were run for the first time after the rule of the default had been committed.
HELD_BACK: tuple[str, ...] = ("unseen_classes", "series")
# The default and the arms that come near it get their further seeds before the others.
CLOSEST_ARMS = ("frozen", "gn_matched", "ln_matched", "uniform", "default")
REPORTED_BATCHES = (2, 16)
ABLATION_BATCH = 2
ABLATED = ("digits_shift", "fashion_shift", "shapes")
# Ablations whose rate is selected as that of an arm; the others take the rate of the default.
OWN_RATE = ("price", "raw", "without_bn", "norms_only")
LOWER_RATES = ("frozen", "fully_frozen", "reestimated", "ln_matched")
CURVES, CURVE_ARMS = ("digits_shift", "fashion_shift"), ("frozen", "gn_matched", "ln_matched", "default")
LONGER, LONGER_ARMS, LONGER_BATCH = ("digits_shift", "fashion_shift"), ("bn", "frozen", "gn_matched", "default"), 16
LONGER_FACTOR = 10


@dataclass(frozen=True)
class Setting:
    """One task, its rates and the length of its runs.

    Args:
        title: as in tables.
        load: seed -> the task.
        sources: modules whose code determines the task.
        rates: the grid of AdamW's rates, in ascending order.
        lower_rates: that of `LOWER_RATES`, arms that larger rates destroy: half of their grid would be lost.
        pairs: for arms with gates of normswap, the grid of the network's rate and the gates' rate.
        steps: by batch size.
        near_chance: a score in percent that a network reaches without having learned anything.
        seconds: of a run of a plain network on one core, by batch size, for estimates.
        score: what is measured.
    """

    title: str
    load: Callable[[int], Task]
    sources: tuple[ModuleType, ...]
    rates: tuple[float, float, float]
    lower_rates: tuple[float, float, float]
    pairs: tuple[tuple[float, float], ...]
    steps: Mapping[int, int]
    near_chance: float
    seconds: Mapping[int, float]
    score: str = "accuracy"


# On small networks the rivals' own rates, at the largest rate of gates that normswap chooses by default.
_SMALL_RATES, _SMALL_LOWER_RATES = (3e-4, 1e-3, 3e-3), (1e-4, 3e-4, 1e-3)
_SMALL_PAIRS = tuple((rate, 1e-1) for rate in _SMALL_RATES)
_GATE_PAIRS = ((3e-4, 1e-2), (1e-3, 1e-2), (1e-3, 3e-2))
_SMALL_STEPS = {1: 400, 2: 400, 4: 400, 16: 200}
_SMALL_SECONDS = {1: 4.0, 2: 4.0, 4: 5.0, 16: 5.0}
_LITE0_RATES, _LITE0_LOWER_RATES = (1e-4, 3e-4, 1e-3), (3e-5, 1e-4, 3e-4)
_LITE0_PAIRS = ((1e-4, 1e-2), (1e-4, 3e-2), (3e-4, 1e-2))
_LITE0_STEPS = {1: 800, 2: 600, 4: 300, 16: 120}
_LITE0_SECONDS = {1: 35.0, 2: 38.0, 4: 32.0, 16: 29.0}
SETTINGS = {
    "digits_shift": Setting(
        "digits under shift",
        digits.shifted,
        (digits, *digits.SOURCES),
        _SMALL_RATES,
        _SMALL_LOWER_RATES,
        _SMALL_PAIRS,
        _SMALL_STEPS,
        20.0,
        _SMALL_SECONDS,
    ),
    "fashion_shift": Setting(
        "Fashion-MNIST under shift",
        fashion_mnist.shifted,
        (fashion_mnist, *fashion_mnist.SOURCES),
        _LITE0_RATES,
        _LITE0_LOWER_RATES,
        _LITE0_PAIRS,
        _LITE0_STEPS,
        20.0,
        _LITE0_SECONDS,
    ),
    "fashion": Setting(
        "Fashion-MNIST",
        fashion_mnist.plain,
        (fashion_mnist, *fashion_mnist.SOURCES),
        _LITE0_RATES,
        _LITE0_LOWER_RATES,
        _LITE0_PAIRS,
        _LITE0_STEPS,
        20.0,
        _LITE0_SECONDS,
    ),
    "shapes": Setting(
        "segmentation of shapes",
        shapes.segmented,
        (shapes, *shapes.SOURCES),
        _SMALL_RATES,
        _SMALL_LOWER_RATES,
        _GATE_PAIRS,
        _LITE0_STEPS,
        35.0,
        _LITE0_SECONDS,
        "mean intersection over union",
    ),
    "unseen_classes": Setting(
        "digits, unseen classes",
        digits.unseen_classes,
        (digits, *digits.SOURCES),
        _SMALL_RATES,
        _SMALL_LOWER_RATES,
        _SMALL_PAIRS,
        _SMALL_STEPS,
        30.0,
        _SMALL_SECONDS,
    ),
    "series": Setting(
        "time series",
        series.moved,
        (series, *series.SOURCES),
        _SMALL_RATES,
        _SMALL_LOWER_RATES,
        _SMALL_PAIRS,
        _SMALL_STEPS,
        30.0,
        _SMALL_SECONDS,
    ),
}


class Job(NamedTuple):
    """One run. `rate` is None until it is selected; `gate_rate` is None for arms that have no pairs of rates."""

    stage: str
    setting: str
    arm: str
    batch: int
    seed: int
    rate: float | None
    gate_rate: float | None
    steps: int


@cache
def setting_digest(name: str) -> str:
    """Return a digest of the code that makes the data and the network of a setting."""
    setting = SETTINGS[name]
    return code_digest(task, *setting.sources) + setting.load.__name__


@cache
def key_of(job: Job) -> str:
    """Return the key of a run: a digest of all that determines its result."""
    if job.rate is None:
        raise ValueError(f"expected a job with a rate, got {job}")
    parts = [
        setting_digest(job.setting),
        job.arm,
        fingerprint(job.arm),
        job.batch,
        job.seed,
        f"{job.rate:.6g}",
        job.gate_rate and f"{job.gate_rate:.6g}",
        job.steps,
        WEIGHT_DECAY,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def find(records: Records, job: Job) -> Record | None:
    """Return the record of a run, or None."""
    return None if job.rate is None else records.get(key_of(job))


# --- selection of rates -----------------------------------------------------------------------------------------------


def candidates(records: Records, setting: str, arm: str, batch: int) -> list[Job] | None:
    """Return the runs from which the rate of an arm at a batch size is selected; None if these are not known yet."""
    if batch == 4:
        return candidates(records, setting, arm, 2)
    rates = grid(setting, arm)
    if batch == 1:
        chosen = selected_rates(records, setting, arm, 2)
        if chosen is None:
            return None
        rates = [(chosen[0] / 2, chosen[1]), chosen]
    steps = SETTINGS[setting].steps[batch] // 2
    return [Job("rates", setting, arm, batch, SELECTION_SEED, rate, gates, steps) for rate, gates in rates]


def grid(setting: str, arm: str) -> list[Rates]:
    """Return the rates of the network and of the gates from which those of an arm are selected."""
    if has_pairs(arm):
        return [*SETTINGS[setting].pairs]
    found = SETTINGS[setting]
    return [(rate, None) for rate in (found.lower_rates if arm in LOWER_RATES else found.rates)]


def has_pairs(arm: str) -> bool:
    """Return whether the rate of the gates is selected too: in the arms that normswap converts to a simplex gate."""
    return arm == "default" or arm in OWN_RATE


def selected_rates(records: Records, setting: str, arm: str, batch: int) -> Rates | None:
    """Return the rates with the best validation score; the first of equals. None if a run is missing."""
    runs = candidates(records, setting, arm, batch)
    found = [find(records, job) for job in runs] if runs else [None]
    complete = [record for record in found if record is not None]
    if len(complete) < len(found):
        return None
    best = max(complete, key=lambda record: record["validation"])
    return best["rate"], best["gate_rate"]


# --- the runs in their order ------------------------------------------------------------------------------------------


def planned(records: Records, settings: tuple[str, ...]) -> Iterator[Job]:
    """Yield every run of `settings` in order, done or not. Runs that depend on missing ones have no rate."""
    for setting in settings:
        yield from selections(records, setting, tuple(ARMS))
        yield from finals(records, setting, tuple(ARMS), SEEDS[:1], "first seed")
    for arms in (CLOSEST_ARMS, tuple(arm for arm in ARMS if arm not in CLOSEST_ARMS)):
        for setting in settings:
            yield from finals(records, setting, arms, SEEDS[1:], "more seeds")
    for setting in settings:
        yield from selections(records, setting, tuple(REPORTED))
        yield from finals(records, setting, tuple(REPORTED), SEEDS, "more seeds")
    for setting in settings:
        if setting in ABLATED:
            yield from ablations(records, setting)
    for setting in settings:
        yield from extensions(records, setting)
    for setting in settings:
        if setting in CURVES:
            yield from curves(setting)
    for setting in settings:
        if setting in LONGER:
            yield from longer(records, setting)


def selections(records: Records, setting: str, arms: tuple[str, ...]) -> Iterator[Job]:
    """Yield the half-length runs, those at batch size 1 last."""
    for batch in (2, 16, 1):
        for arm in arms:
            if batch not in batches_of(arm):
                continue
            steps = SETTINGS[setting].steps[batch] // 2
            unknown = [Job("rates", setting, arm, batch, SELECTION_SEED, None, None, steps)] * 2
            yield from candidates(records, setting, arm, batch) or unknown


def finals(records: Records, setting: str, arms: tuple[str, ...], seeds: tuple[int, ...], stage: str) -> Iterator[Job]:
    """Yield the runs that are reported."""
    for seed in seeds:
        for batch in (2, 1, 16, 4):
            for arm in arms:
                if batch in batches_of(arm):
                    yield final(records, setting, arm, batch, seed, stage)


def batches_of(arm: str) -> tuple[int, ...]:
    """Return the batch sizes at which an arm runs: all, or two for an arm that is only reported."""
    return REPORTED_BATCHES if arm in REPORTED else BATCHES


def final(records: Records, setting: str, arm: str, batch: int, seed: int, stage: str = "more seeds") -> Job:
    """Return the full-length run of an arm at its selected rate."""
    chooser = "default" if arm in ABLATIONS and arm not in OWN_RATE else arm
    rate, gates = selected_rates(records, setting, chooser, batch) or (None, None)
    fixed = ALL[arm].gate_rate
    return Job(stage, setting, arm, batch, seed, rate, fixed or gates, SETTINGS[setting].steps[batch])


def ablations(records: Records, setting: str) -> Iterator[Job]:
    """Yield the runs of the variants of the default, at one batch size."""
    for arm in OWN_RATE:
        jobs = candidates(records, setting, arm, ABLATION_BATCH) or []
        yield from (job._replace(stage="ablations") for job in jobs)
    for seed in SEEDS:
        for arm in ABLATIONS:
            yield final(records, setting, arm, ABLATION_BATCH, seed, "ablations")


def extensions(records: Records, setting: str) -> Iterator[Job]:
    """Yield the runs with more seeds of the default and its closest rivals, where they are close."""
    for batch in BATCHES:
        seeds = SEEDS
        rivals = close_arms(scores_of(records, setting, batch, seeds))
        for more in MORE_SEEDS:
            scores = scores_of(records, setting, batch, seeds)
            if any(len(scores[arm]) < len(seeds) for arm in ("default", *rivals)):
                break
            rivals = [arm for arm in rivals if _is_close(records, setting, batch, arm, seeds)]
            if not rivals:
                break
            seeds += more
            for seed in more:
                for arm in ("default", *rivals):
                    yield final(records, setting, arm, batch, seed, "close rivals")


def close_arms(scores: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Return the two best rivals of the default."""
    return rivals_of({arm: mean(found.values()) for arm, found in scores.items() if found})[:CLOSE_RIVALS]


def _is_close(records: Records, setting: str, batch: int, arm: str, seeds: tuple[int, ...]) -> bool:
    by_batch = {size: scores_of(records, setting, size, seeds) for size in BATCHES}
    found = paired(
        {size: scores["default"] for size, scores in by_batch.items()}, {s: v[arm] for s, v in by_batch.items()}
    )
    difference = found.get(batch)
    return difference is not None and abs(difference.mean) <= max(CLOSE_POINTS, 2 * difference.error)


def scores_of(
    records: Records,
    setting: str,
    batch: int,
    seeds: tuple[int, ...] = tuple(chain(SEEDS, *MORE_SEEDS)),
    *,
    arms: tuple[str, ...] = tuple(ARMS),
) -> dict[str, dict[int, float]]:
    """Return the test scores of arms by seed, at one batch size."""
    found: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    for arm in arms:
        for seed in seeds:
            record = find(records, final(records, setting, arm, batch, seed))
            if record is not None:
                found[arm][seed] = record["test"]
    return found


def curves(setting: str) -> Iterator[Job]:
    """Yield half-length runs at rates of the grid and beyond it; normswap chooses the rate of gates."""
    steps = SETTINGS[setting].steps[ABLATION_BATCH] // 2
    for rate in curve_rates(setting):
        for arm in CURVE_ARMS:
            yield Job("curves", setting, arm, ABLATION_BATCH, SELECTION_SEED, rate, None, steps)


def curve_rates(setting: str) -> tuple[float, ...]:
    """Return the rates of a curve."""
    rates = SETTINGS[setting].rates
    return (rates[0] / 3, *rates, rates[-1] * 3)


def longer(records: Records, setting: str) -> Iterator[Job]:
    """Yield runs of ten times the length, at batch size 16."""
    for arm in LONGER_ARMS:
        job = final(records, setting, arm, LONGER_BATCH, SEEDS[0], "ten times longer")
        yield job._replace(steps=LONGER_FACTOR * job.steps)
