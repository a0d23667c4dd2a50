"""Test `make batch-dependence`: its second task, its grid, records after an interruption, its page."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.finetuning.batch_dependence import run as study
from benchmarks.finetuning.batch_dependence.records import (
    PENALTIES,
    RENORM_PENALTIES,
    TASKS,
    Cell,
    Run,
    Study,
    cells,
    read_study,
    write_study,
)
from benchmarks.finetuning.batch_dependence.report import write_report
from benchmarks.finetuning.batch_dependence.training import FineTuning, build_optimizer, finetune
from benchmarks.finetuning.training import build_network


def run_of(cell: Cell, accuracy: float = 90.0) -> Run:
    return Run(
        **cell._asdict(), accuracy=accuracy, bn_share=0.25, is_finite=True, seconds=1, steps=4, rate=0.03, gate_rate=1.0
    )


def test_the_transfer_is_to_classes_and_images_never_seen() -> None:
    digits = study.prepare_transfer(seed=1)
    for domain in (digits.source, digits.target):
        for images in (domain.train, domain.validation, domain.test):
            assert images.labels.unique().tolist() == [0, 1, 2, 3, 4]
    sets = [part.pixels for domain in (digits.source, digits.target) for part in (domain.train, domain.test)]
    images = torch.cat(sets).flatten(1)
    assert len(images.unique(dim=0)) == len(images)
    assert torch.equal(study.prepare_transfer(seed=1).target.train.pixels, digits.target.train.pixels)


def test_every_cell_is_run_once_and_seeds_come_one_after_the_other() -> None:
    planned = list(cells([0, 1]))
    assert len(planned) == len(set(planned)) == 2 * len(TASKS) * (4 * len(PENALTIES) + len(RENORM_PENALTIES))
    assert [cell.seed for cell in planned] == sorted(cell.seed for cell in planned)


@pytest.mark.parametrize("statistics", ["batch", "renorm"])
def test_a_penalty_moves_the_gates_away_from_bn(statistics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = study.prepare_transfer(seed=0)
    monkeypatch.setattr(study, "trained_network", lambda *_: (build_network(seed=0), digits))
    monkeypatch.setattr(study, "STEPS", 3)
    free, penalized = (study.run_cell(Cell("transfer", statistics, 2, penalty, 0)) for penalty in (0.0, 0.5))
    assert penalized.bn_share < free.bn_share <= 1
    assert (penalized.steps, penalized.is_finite, penalized.cell.statistics) == (3, True, statistics)


def test_the_penalty_is_no_part_of_the_losses_that_are_returned() -> None:
    images = study.prepare_transfer(seed=0).target.train
    losses = []
    for penalty in (0.0, 0.5):
        model = study.convert(build_network(seed=0), "batch")
        losses.append(finetune(model, images, rate=0.01, settings=FineTuning(steps=1), seed=0, penalty=penalty))
    assert losses[0] == losses[1]


def test_the_gates_have_a_rate_of_their_own_and_no_weight_decay() -> None:
    model = study.convert(build_network(seed=0), "batch")
    groups = build_optimizer(model, rate=0.1, settings=FineTuning(gate_rate=5.0)).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 1e-4), (0.5, 0.0)]


def test_an_interrupted_study_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Cell] = []

    def run_cell(cell: Cell) -> Run:
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(cell)
        return run_of(cell)

    monkeypatch.setattr(study, "run_cell", run_cell)
    monkeypatch.setattr(sys, "argv", ["batch_dependence.py", "--seeds", "0", "--output", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        study.main()
    monkeypatch.setattr(study, "run_cell", lambda cell: made.append(cell) or run_of(cell))  # type: ignore[func-returns-value]
    study.main()
    assert made == list(cells([0]))
    stored = read_study(tmp_path / "batch-dependence.json")
    assert stored is not None
    assert [run.cell for run in stored.runs] == made
    assert "runs are complete" not in (tmp_path / "batch-dependence.md").read_text()


def test_the_page_contains_the_values_of_the_records(tmp_path: Path) -> None:
    runs = [run_of(cell, 50 + 100 * cell.penalty + cell.seed) for cell in cells([0, 1]) if cell.batch_size != 16]
    record = Study("Measured here.", runs)
    write_study(record, tmp_path / "a.json")
    assert read_study(tmp_path / "a.json") == record
    assert read_study(tmp_path / "b.json") is None
    write_report(record, tmp_path / "a.md", planned=72)
    text = (tmp_path / "a.md").read_text()
    assert f"**{len(runs)} of 72 runs are complete.**" in text
    assert "| 2 | to shifted digits | +1.0 | +3.0 | +10.0 |" in text
    assert "| 16 | to shifted digits | - | - | - |" in text
    assert "| 4 | batch | 50.5 (50.0, 51.0), BN 0.25 | 51.5 (51.0, 52.0), BN 0.25 |" in text
    assert "| 1 | renorm | 50.5 (50.0, 51.0), BN 0.25 |  | 53.5 (53.0, 54.0), BN 0.25 |  |" in text
    assert "Each run has 4 steps. The\nlearning rate of the network is 0.03, the best" in text
