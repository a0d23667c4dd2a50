"""Test `make evidence`: its arms, its plan and selection of rates, interruption and budget, its page."""

import random
import zlib
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from benchmarks.finetuning.evidence import __main__ as command
from benchmarks.finetuning.evidence import campaign as campaign_module
from benchmarks.finetuning.evidence import plan, training
from benchmarks.finetuning.evidence.arms import ABLATIONS, ALL, ARMS, REPORTED
from benchmarks.finetuning.evidence.campaign import Campaign, status
from benchmarks.finetuning.evidence.comparison import (
    Estimate,
    estimates,
    is_significant,
    paired,
    tolerance,
)
from benchmarks.finetuning.evidence.norms import (
    D_MAX,
    MOMENTUM,
    R_MAX,
    BatchRenorm,
    batch_norms,
    is_untrained,
    matched_group_norm,
    reestimate,
    replace,
)
from benchmarks.finetuning.evidence.plan import Job, Record, find, key_of, planned
from benchmarks.finetuning.evidence.report import page
from benchmarks.finetuning.evidence.verdict import cells, verdict
from benchmarks.records import read_lines

SETTING = ("digits_shift",)


def trained_bn(channels: int = 8, *, seed: int = 0) -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(seed)
    bn = nn.BatchNorm2d(channels).double().eval()
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            assert tensor is not None
            tensor.copy_(0.5 + torch.rand(channels, generator=generator, dtype=torch.float64))
    assert bn.num_batches_tracked is not None
    bn.num_batches_tracked.fill_(3)
    return bn


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- arms -------------------------------------------------------------------------------------------------------------


def test_a_matched_group_norm_is_the_bn_where_the_moments_of_the_groups_are_the_running_ones() -> None:
    bn = trained_bn()
    for groups in (1, 4):
        x = inputs(1, 8, 500)
        x = (x - x.mean(2, keepdim=True)) / x.var(2, keepdim=True, correction=0).sqrt()
        assert bn.running_var is not None
        assert bn.running_mean is not None
        x = (x * bn.running_var.sqrt()[:, None] + bn.running_mean[:, None])[..., None]
        assert torch.allclose(matched_group_norm(bn, groups)(x), bn(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", ["ln", "gn"])
def test_a_matched_group_norm_is_what_normswap_starts_with(start: Any) -> None:
    bn = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False).double(), trained_bn())
    groups = {"num_groups": 4} if start == "gn" else {}
    converted = normswap.convert(bn, inputs(2, 3, 5, 5), start=start, **groups).model
    replaced = replace(bn, lambda layer: matched_group_norm(layer, 4 if start == "gn" else 1))
    x = inputs(2, 3, 5, 5)
    assert torch.allclose(converted(x), replaced(x), rtol=0, atol=1e-12)


def test_batch_renorm_equals_bn_in_evaluation_and_its_running_normalization_within_the_limits() -> None:
    bn = trained_bn()
    layer = BatchRenorm(bn)
    x = inputs(4, 8, 3, 3) + 0.8
    assert torch.allclose(layer.eval()(x), bn(x), rtol=0, atol=1e-12)
    mean, std = layer.running_mean.clone(), layer.running_std.clone()
    assert torch.allclose(layer.train()(x), bn(x), rtol=0, atol=1e-12)
    assert torch.allclose(layer.running_mean, torch.lerp(mean, x.mean((0, 2, 3)), MOMENTUM))
    batch_std = (x.var((0, 2, 3), correction=0) + layer.eps).sqrt()
    assert torch.allclose(layer.running_std, torch.lerp(std, batch_std, MOMENTUM))


def test_batch_renorm_limits_its_corrections_and_passes_no_gradient_through_them() -> None:
    layer = BatchRenorm(trained_bn()).train()
    std = layer.running_std.clone()[:, None, None]
    x = 100 * inputs(4, 8, 3, 3) + 1000
    y = (layer(x) - layer.bias[:, None, None]) / layer.weight[:, None, None]
    assert torch.allclose(y.mean((0, 2, 3)), torch.full((8,), D_MAX, dtype=torch.float64))
    assert torch.allclose(y.std((0, 2, 3), correction=0), torch.full((8,), R_MAX, dtype=torch.float64), rtol=1e-6)
    # With r and d as constants, the gradient is that of BN with the weight r * weight.
    layer = BatchRenorm(trained_bn()).train()
    x, weights = inputs(4, 8, 3, 3).requires_grad_(), inputs(4, 8, 3, 3, seed=2)
    (gradient,) = torch.autograd.grad((layer(x) * weights).sum(), x)
    plain = nn.BatchNorm2d(8).double().train()
    with torch.no_grad():
        r = (x.var((0, 2, 3), correction=0) + layer.eps).sqrt() / std.flatten()
        plain.weight.copy_(layer.weight * r.clamp(1 / R_MAX, R_MAX))
    (expected,) = torch.autograd.grad((plain(x) * weights).sum(), x)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-12)


def test_only_the_sites_that_were_never_trained_are_calibrated() -> None:
    task = training._tiny_task()
    first, second, third = batch_norms(task.network)
    assert [is_untrained(bn) for bn in (first, second, third)] == [False, False, True]
    first.num_batches_tracked.fill_(0)  # as in a file that lacks the count
    model = ARMS["frozen"].prepare(task.network, task)
    found = batch_norms(model)
    assert [
        torch.equal(a.running_var, b.running_var) for a, b in zip(found, batch_norms(task.network), strict=True)
    ] == [
        True,
        True,
        False,
    ]
    assert not is_untrained(found[2])


def test_reestimation_averages_over_batches_and_restores_modes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).train()
    model[1].eval()
    batches = [torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([[5.0, 0.0], [7.0, 0.0]])]
    reestimate(model, [model[0]], batches)
    assert model[0].running_mean.tolist() == [4.0, 2.0]
    assert model[1].running_mean.tolist() == [0.0, 0.0]
    assert (model[0].momentum, model[0].training, model[1].training) == (0.1, True, False)


def test_an_activation_inside_a_norm_of_timm_stays() -> None:
    from timm.layers import BatchNormAct2d

    bn = BatchNormAct2d(4, act_layer=nn.ReLU).eval()
    model = replace(nn.Sequential(bn), matched_group_norm)
    assert float(model(torch.randn(2, 4, 5, 5)).detach().min()) == 0


@pytest.mark.parametrize("name", ["frozen", "fully_frozen", "norms_only", "tracked"])
def test_what_an_arm_trains(name: str) -> None:
    task = training._tiny_task()
    model = ALL[name].prepare(task.network, task)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    training.finetune(ALL[name], model, task, rate=1e-3, steps=2, batch=2, seed=0)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    convolutions, affine, head = {"0.weight", "3.weight", "6.weight"}, {"1.weight", "4.bias"}, {"11.weight", "11.bias"}
    assert head <= changed
    assert (convolutions <= changed) == (name != "norms_only")
    assert (affine <= changed) == (name != "fully_frozen")
    assert ("1.running_mean" in changed) == (name == "tracked")


def test_frozen_gates_compute_what_frozen_bn_computes_and_no_two_other_arms_do_the_same() -> None:
    assert training.fingerprint("frozen_gates") == training.fingerprint("frozen")
    found = [training.fingerprint(name) for name in (*ARMS, *REPORTED)]
    assert len(set(found)) == len(found)


def test_a_digest_ignores_comments_and_docstrings_only() -> None:
    from benchmarks.finetuning.evidence.settings.task import _code

    assert _code('"""A."""\n\n\ndef f(x):  # b\n    """C."""\n    return x + 1\n') == _code(
        "def f(x):\n    return x+1\n"
    )
    assert _code("x = 'text'\n") != _code("x = 'other'\n")


# --- comparison -------------------------------------------------------------------------------------------------------


def test_standard_errors_are_pooled_over_batch_sizes() -> None:
    found = estimates({1: [1.0, 3.0], 2: [10.0, 10.0, 16.0], 4: []})
    assert found == {1: Estimate(2.0, (26 / 3 / 2) ** 0.5, 2), 2: Estimate(12.0, (26 / 3 / 3) ** 0.5, 3)}
    difference = paired({1: {0: 5.0, 1: 6.0}}, {1: {1: 4.0, 0: 4.0, 2: 9.0}})[1]
    assert difference == Estimate(1.5, 0.5, 2)
    assert is_significant(difference)
    assert not is_significant(paired({1: {0: 5.0}}, {1: {0: 1.0}})[1])


def test_the_tolerance_is_a_point_or_two_standard_errors_but_at_most_two_points() -> None:
    assert [tolerance(Estimate(0.0, error, 3)) for error in (0.1, 0.8, 5.0, float("nan"))] == [1.0, 1.6, 2.0, 1.0]


# --- plan and campaign ------------------------------------------------------------------------------------------------


class Inline(Executor):
    """Run a job when it is submitted."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except RuntimeError as error:
            future.set_exception(error)
        return future


def record_of(job: Job) -> Record:
    """Return a made-up result: the default is best, BN at batch size 1 is at chance, 1e-3 is the best rate."""
    drawn = random.Random(zlib.crc32(repr((job.arm, job.batch, job.seed)).encode()))
    assert job.rate is not None
    base = {"default": 90.0, "gn_matched": 88.0, "frozen": 80.0}.get(job.arm, 75.0)
    score = 10.0 if (job.arm, job.batch) == ("bn", 1) else base + drawn.gauss(0, 0.3) - 1000 * abs(job.rate - 1e-3)
    return {
        "key": key_of(job),
        **{name: value for name, value in job._asdict().items() if name != "stage"},
        "validation": score,
        "test": None if job.seed == plan.SELECTION_SEED else score,
        "form": "",
        "loss": 1.0,
        "bn_share": None,
        "seconds": 5.0,
        "date": "2026-01-02",
        "machine": "a machine",
        "versions": {"torch": "2.9"},
    }


def complete_records() -> dict[str, Record]:
    """Return made-up results of all runs of one setting."""
    records: dict[str, Record] = {}
    while jobs := [job for job in planned(records, SETTING) if job.rate is not None and find(records, job) is None]:
        records |= {key_of(job): record_of(job) for job in jobs}
    return records


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Job]]:
    """Jobs that were run, with made-up results."""
    monkeypatch.setattr(plan, "fingerprint", lambda name: name)
    key_of.cache_clear()
    done: list[Job] = []
    monkeypatch.setattr(campaign_module, "run_job", lambda job: done.append(job) or record_of(job))  # type: ignore[func-returns-value]
    yield done
    key_of.cache_clear()


def test_rates_come_first_then_one_seed_of_every_arm_and_nothing_runs_twice(made_up: list[Job], tmp_path: Path) -> None:
    campaign = Campaign(tmp_path / "a.jsonl", {}, SETTING)
    assert {job.seed for job in campaign.left() if job.rate is not None} == {plan.SELECTION_SEED}
    count = campaign.run(budget=1e9, executor=Inline(), workers=1)
    assert count == len(made_up) == len({key_of(job) for job in made_up})
    stages = list(dict.fromkeys(job.stage for job in made_up))
    assert stages[:3] == ["rates", "first seed", "more seeds"]
    assert {"ablations", "curves", "ten times longer"} <= set(stages)
    first = [job for job in made_up if job.stage == "first seed"]
    assert {(job.arm, job.batch) for job in first} == {(arm, batch) for arm in ARMS for batch in plan.BATCHES}
    assert campaign.left() == []
    assert "0 runs are left" in status(campaign)


def test_the_rate_with_the_best_validation_score_is_selected_and_batch_size_1_tries_half_of_it(
    made_up: list[Job],
) -> None:
    records: dict[str, Record] = {}

    def add(jobs: list[Job] | None, score: dict[float, float]) -> None:
        for job in jobs or []:
            assert job.rate is not None
            records[key_of(job)] = record_of(job) | {"validation": score[job.rate]}

    assert plan.selected_rates(records, "digits_shift", "frozen", 2) is None
    assert plan.candidates(records, "digits_shift", "frozen", 1) is None
    low, middle, high = plan.SETTINGS["digits_shift"].lower_rates
    add(plan.candidates(records, "digits_shift", "frozen", 2), {low: 50.0, middle: 70.0, high: 70.0})
    assert plan.selected_rates(records, "digits_shift", "frozen", 2) == (middle, None)
    assert plan.selected_rates(records, "digits_shift", "frozen", 4) == (middle, None)
    jobs = plan.candidates(records, "digits_shift", "frozen", 1)
    assert [job.rate for job in jobs or []] == [middle / 2, middle]
    assert {job.seed for job in jobs or []} == {plan.SELECTION_SEED}
    assert plan.SELECTION_SEED not in (*plan.SEEDS, *plan.MORE_SEEDS[0], *plan.MORE_SEEDS[1])
    add(jobs, {middle / 2: 60.0, middle: 55.0})
    assert plan.selected_rates(records, "digits_shift", "frozen", 1) == (middle / 2, None)


def test_the_default_has_as_many_candidates_as_any_arm_and_variants_take_its_rate(made_up: list[Job]) -> None:
    records: dict[str, Record] = {}
    for setting in plan.SETTINGS.values():
        assert len(setting.pairs) == len(setting.rates) == len(setting.lower_rates) == 3
        assert setting.rates[0] in setting.lower_rates
    for job in plan.candidates(records, "digits_shift", "default", 2) or []:
        records[key_of(job)] = record_of(job)
    chosen = plan.selected_rates(records, "digits_shift", "default", 2)
    assert chosen in plan.SETTINGS["digits_shift"].pairs
    job = plan.final(records, "digits_shift", "tracked", 2, 0)
    assert (job.rate, job.gate_rate) == chosen
    assert plan.final(records, "digits_shift", "gates_3e-3", 2, 0).gate_rate == 3e-3


def test_an_interrupted_campaign_resumes(made_up: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"

    def interrupted(job: Job) -> Record:
        if len(made_up) == 7:
            raise KeyboardInterrupt
        made_up.append(job)
        return record_of(job)

    monkeypatch.setattr(campaign_module, "run_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Campaign(path, {}, SETTING).run(budget=1e9, executor=Inline(), workers=1)
    before = read_lines(path, key="key")
    assert len(before) == 7
    left = Campaign(path, dict(before), SETTING).left()
    assert not {key_of(job) for job in left if job.rate is not None} & set(before)
    assert left[0] not in made_up


def test_a_run_that_fails_does_not_end_the_campaign(
    made_up: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails_once(job: Job) -> Record:
        made_up.append(job)
        if len(made_up) == 2:
            raise RuntimeError("no memory")
        return record_of(job)

    monkeypatch.setattr(campaign_module, "run_job", fails_once)
    campaign = Campaign(tmp_path / "a.jsonl", {}, SETTING)
    count = campaign.run(budget=1e9, executor=Inline(), workers=1)
    assert campaign.failed == [made_up[1]]
    assert count == len(made_up) - 1 > 100
    assert "FAILED: Job(" in capsys.readouterr().out
    # What depends on the failed run waits for it.
    assert {job.arm for job in campaign.left()} == {made_up[1].arm}


def test_training_ends_at_a_loss_that_is_not_finite() -> None:
    task = training._tiny_task()
    task.train.inputs[:] = float("nan")
    outcome = training.run(ARMS["gn_matched"], task, rate=1e-3, steps=5, batch=2, seed=0)
    assert outcome.loss is None
    assert campaign_module._rounded({"a": float("nan"), "b": 1.23456, "c": "x"}) == {"a": None, "b": 1.2346, "c": "x"}


def test_no_run_starts_that_would_end_after_the_budget(made_up: list[Job], tmp_path: Path) -> None:
    clock = iter(range(0, 10_000, 4))
    campaign = Campaign(tmp_path / "a.jsonl", {}, SETTING)
    count = campaign.run(budget=60, executor=Inline(), workers=1, clock=lambda: float(next(clock)))
    assert 3 <= count <= 10
    assert len(read_lines(campaign.path, key="key")) == count


def test_more_seeds_are_for_the_default_and_close_rivals_only(made_up: list[Job], tmp_path: Path) -> None:
    records: dict[str, Record] = {}
    close = {"default": 90.0, "gn_matched": 89.9, "frozen": 85.0}

    def score(job: Job) -> float:
        return close.get(job.arm, 70.0) + 0.01 * job.seed

    for _ in range(4):  # rates at 2 and 16, then at 1, then all other runs
        jobs = [job for job in planned(records, SETTING) if job.rate is not None and find(records, job) is None]
        for job in jobs:
            if job.stage != "close rivals":
                records[key_of(job)] = record_of(job) | {"validation": score(job), "test": score(job)}
    added = [job for job in planned(records, SETTING) if job.stage == "close rivals"]
    assert {job.arm for job in added} == {"default", "gn_matched"}
    assert {job.seed for job in added} == {3, 4}
    for job in added:
        records[key_of(job)] = record_of(job) | {"test": score(job)}
    added = [job for job in planned(records, SETTING) if job.stage == "close rivals"]
    assert {job.seed for job in added} == {3, 4, 5, 6, 7}


def test_all_settings_are_run_unless_some_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(plan.HELD_BACK) < set(plan.SETTINGS)
    assert command._options([]).settings == [*plan.SETTINGS]
    assert command._options(["--settings", "series"]).settings == ["series"]
    assert command._options(["--budget", "1.5h"]).budget == 5400
    for wrong in (["--budget", "soon"], ["--workers", "0"], ["--output", "no/such/folder"]):
        with pytest.raises(SystemExit):
            command._options(wrong)
    assert "expected a time such as 90s, 150m or 2h, got 'soon'" in capsys.readouterr().err


# --- page -------------------------------------------------------------------------------------------------------------


def test_the_page_contains_the_values_of_the_records(made_up: list[Job]) -> None:
    records = complete_records()
    found = verdict(records)
    assert (found.cells, found.planned_cells, found.lost, found.best_mean) == (4, 24, [], "default")
    assert found.above_frozen == found.above_group_norm == 4
    assert not found.is_met  # most cells are not complete
    text = page(records, with_picture=True)
    scores = [record_of(plan.final(records, "digits_shift", "default", 2, seed))["test"] for seed in plan.SEEDS]
    assert f"**{sum(scores) / 3:.1f} ± " in text
    assert "4 of 24 cells are complete" in text
    assert "| BN in training | 10" in text  # dead at batch size 1
    assert "a machine; torch 2.9" in text
    assert "Not run yet" in text
    for arm in (ARMS | REPORTED | ABLATIONS).values():
        assert arm.title in text
        assert arm.description in " ".join(text.split())


def test_a_lost_cell_and_a_death_of_the_default_are_named(made_up: list[Job]) -> None:
    records = complete_records()
    for seed in plan.SEEDS:
        job = plan.final(records, "digits_shift", "default", 16, seed)
        records[key_of(job)] = record_of(job) | {"test": 70.0 + seed / 10}
    job = plan.final(records, "digits_shift", "default", 1, 0)
    records[key_of(job)] = record_of(job) | {"test": 10.0, "loss": None}
    assert [cell.batch for cell in cells(records) if cell.is_lost] == [1, 16]
    assert verdict(records).dead == 1
    text = page(records, with_picture=False)
    assert text.count("**lost**") == 2
    assert "digits under shift at 16 (-" in text
    assert "digits under shift, batch 1, seed 0, rate" in " ".join(text.split())


def test_records_of_other_code_are_no_part_of_the_page(made_up: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("rates", "digits_shift", "bn", 2, plan.SELECTION_SEED, plan.SETTINGS["digits_shift"].rates[0], None, 200)
    records = {key_of(job): record_of(job)}
    assert find(records, job) is not None
    assert "1 runs" in page(records, with_picture=False)
    key_of.cache_clear()
    monkeypatch.setattr(plan, "fingerprint", lambda name: f"{name}, changed")
    assert find(records, job) is None
    assert "Nothing has been measured yet." in page(records, with_picture=False)
