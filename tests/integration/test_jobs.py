"""The table of jobs: which runs it needs, which rate an arm gets, and what it says of normswap."""

from typing import Any

import pytest

from benchmarks.jobs import run as program
from benchmarks.jobs.catalog import JOBS
from benchmarks.jobs.plan import ARMS, SEEDS, TRIAL_SEED, Job, Run, arm_names, overrides, trials
from benchmarks.jobs.report import best_rate, page, verdict
from normswap.finetune.recipe import find_shipped, read_recipe

JOB = JOBS["federated"]


def record(arm: str, rate: float, seed: int, value: float, unit: str = "%") -> dict[str, Any]:
    return {
        "job": JOB.recipe,
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "figures": {"accuracy": value},
        "before": {"accuracy": 10.0},
        "unit": unit,
        "seconds": 3.0,
        "provenance": "Measured.",
    }


@pytest.mark.parametrize("job", JOBS.values(), ids=lambda job: job.recipe)
def test_every_run_is_a_recipe_that_can_be_read(job: Job) -> None:
    keys = set()
    for run in [*trials(job), *(Run(job.recipe, arm, job.rates[0], seed, job.test) for arm in ARMS for seed in SEEDS)]:
        recipe = read_recipe(job.recipe, overrides(job, run))
        assert (recipe.train.lr, recipe.train.seed, recipe.data.evaluation_split) == (run.rate, run.seed, run.split)
        keys.add(program.key_of(job, run))
    assert len(keys) == len(arm_names(job)) * (len(job.rates) + len(SEEDS))
    assert job.source is None or find_shipped(job.source)


def test_arms_differ_in_what_they_start_from() -> None:
    run, job = next(trials(JOB)), JOBS["private"]
    recipes = {arm: read_recipe("private", overrides(job, run._replace(arm=arm))) for arm in ARMS}
    starts = {arm: (one.convert.enabled, one.convert.start, one.train.importance_lr) for arm, one in recipes.items()}
    assert starts == {
        "BN in training": (False, "ln", 0),
        "BN frozen": (True, None, 0),
        "GN matched": (True, "gn", 0),
        "normswap": (True, "ln", 0),
    }


def test_the_best_rate_is_chosen_by_the_seed_that_is_not_reported() -> None:
    found = [record("normswap", 0.1, TRIAL_SEED, 80.0), record("normswap", 0.3, TRIAL_SEED, 90.0)]
    found += [record("normswap", 0.1, 0, 99.0), record("BN frozen", 0.9, TRIAL_SEED, 99.0)]
    assert best_rate(found, "normswap") == 0.3
    # Equal ones: the lower rate; and a run that diverged never wins.
    found += [record("normswap", 0.2, TRIAL_SEED, 90.0), record("normswap", 0.01, TRIAL_SEED, float("nan"))]
    assert best_rate(found, "normswap") == 0.2


@pytest.mark.parametrize(
    ("ours", "others", "text"),
    [
        ([80.0, 82.0, 84.0], [79.0, 81.0, 83.0], "first"),
        ([80.0, 82.0, 84.0], [80.5, 82.5, 84.5], "level"),
        ([80.0, 82.0, 84.0], [83.0, 85.0, 87.0], "behind GN matched by 3.0"),
        ([80.0, 82.0, 84.0], [92.0, 82.0, 80.0], "level"),  # the differences scatter
        ([], [83.0], "-"),
    ],
)
def test_the_verdict_compares_seeds_in_pairs(ours: list[float], others: list[float], text: str) -> None:
    values = {"normswap": dict(enumerate(ours)), "GN matched": dict(enumerate(others)), "BN frozen": {0: 20.0}}
    assert verdict(values) == text


def test_the_page_has_a_row_for_each_job_and_says_what_is_missing() -> None:
    found = [record(arm, 0.01, seed, 80.0 + seed) for arm in ARMS for seed in (0, 1)]
    text = page(JOBS, {str(number): each for number, each in enumerate(found)})
    title = "[Four clients, batch 2](#four-clients-batch-2)"
    assert f"| {title} | accuracy | {' | '.join(['80.5 (2)'] * 4)} | first |" in text
    assert "| [Videos, R3D-18, batch 2](#videos-r3d-18-batch-2) | - | - | - | - | - | - |" in text
    assert "| normswap | 0.01 | accuracy 10.0 | accuracy 80.0, 81.0 | 3 |" in text


def test_records_of_another_recipe_are_not_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run = next(trials(JOB))
    before = program.key_of(JOB, run)
    shipped = find_shipped(JOB.recipe)
    monkeypatch.setattr(program, "find_shipped", lambda name: shipped._replace(text=shipped.text + "\n"))
    assert program.key_of(JOB, run) != before
