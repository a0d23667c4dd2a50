"""Write docs/measured/batch-dependence.md from the records: tables and a description of the tasks."""

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from benchmarks.finetuning.batch_dependence.records import (
    BATCH_SIZES,
    PENALTIES,
    RENORM_BATCH_SIZE,
    RENORM_PENALTIES,
    TASKS,
    Run,
    Study,
)


def write_report(study: Study, path: Path, *, planned: int) -> None:
    """Write the page as Markdown.

    Args:
        planned: number of runs of the complete study.
    """
    tasks = [_task(study.runs, task) for task in TASKS]
    path.write_text(
        "\n".join([_head(study, planned), _gains(study.runs), *tasks, _method(study.runs)]), encoding="utf-8"
    )


def cell_of(runs: Iterable[Run], task: str, batch_size: int, penalty: float, *, statistics: str = "batch") -> list[Run]:
    """Return the runs of one cell of a table in the order of the seeds."""
    configuration = (task, statistics, batch_size, penalty)
    return sorted((run for run in runs if run.cell[:4] == configuration), key=lambda run: run.seed)


def _head(study: Study, planned: int) -> str:
    left = "" if len(study.runs) >= planned else f" **{len(study.runs)} of {planned} runs are complete.**"
    return f"""# A penalty on batch dependence

With one sample per batch, Instance and Batch Normalization use the same moments in training, so the gradients of their
importance weights are equal. In evaluation BN uses running statistics and the branches differ. A penalty on the weight
of BN, `loss + penalty * normswap.batch_dependence(model)`, moves the weights away from BN. This page measures its
effect: a BN network is converted and fine-tuned with four penalties at four batch sizes, with the same number of steps.
`make batch-dependence` writes this page; all runs are in `benchmarks/results/batch-dependence.json`.{left}

**An ablation.** All runs have `bn_statistics="batch"` (or `"renorm"`) and branches that are not matched, which was the
default of `normswap.convert` before. With the default of today, `"running"`, nothing depends on the batch and a penalty
is of no use; the [evidence](evidence.md) compares both.

{study.provenance}
"""


def _gains(runs: list[Run]) -> str:
    rows = [
        [str(size), TASKS[task], *(_gain(_pairs(runs, task, size, penalty)) for penalty in PENALTIES[1:])]
        for size in BATCH_SIZES
        for task in TASKS
    ]
    header = ["batch size", "task: from clean digits", *(f"penalty {penalty:g}" for penalty in PENALTIES[1:])]
    return f"""## Summary

Gain in test accuracy over the same fine-tuning without a penalty, in points, mean of the seeds.

{_table(header, rows)}"""


def _gain(differences: list[float]) -> str:
    return f"{mean(differences):+.1f}" if differences else "-"


def _pairs(runs: list[Run], task: str, batch_size: int, penalty: float) -> list[float]:
    """Return the gain over no penalty for each seed, in points."""
    without = {run.seed: run.accuracy for run in cell_of(runs, task, batch_size, 0.0)}
    penalized = cell_of(runs, task, batch_size, penalty)
    return [run.accuracy - without[run.seed] for run in penalized if run.seed in without]


def _task(runs: list[Run], task: str) -> str:
    header = ["batch size", "statistics", *(f"penalty {penalty:g}" for penalty in PENALTIES)]
    rows = [
        [str(size), "batch", *(_entry(cell_of(runs, task, size, penalty)) for penalty in PENALTIES)]
        for size in BATCH_SIZES
    ]
    renorm = [
        _entry(cell_of(runs, task, RENORM_BATCH_SIZE, penalty, statistics="renorm"))
        if penalty in RENORM_PENALTIES
        else ""
        for penalty in PENALTIES
    ]
    rows.insert(1 + BATCH_SIZES.index(RENORM_BATCH_SIZE), [str(RENORM_BATCH_SIZE), "renorm", *renorm])
    return f"""## From clean digits {TASKS[task]}

Test accuracy in percent, mean (one value per seed), and the importance weight of BN after fine-tuning, mean of sites,
gates and seeds.

{_table(header, rows)}"""


def _entry(runs: list[Run]) -> str:
    if not runs:
        return "-"
    values = ", ".join(f"{run.accuracy:.1f}" + ("" if run.is_finite else " diverged") for run in runs)
    return f"{mean(run.accuracy for run in runs):.1f} ({values}), BN {mean(run.bn_share for run in runs):.2f}"


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join(lines) + "\n"


def _method(runs: list[Run]) -> str:
    steps, rates, gates = (sorted({value(run) for run in runs}) for value in (_steps, _rate, _gate_rate))
    return f"""## Method

Network, data and shift are those of the digits in the [evidence](evidence.md); the optimizer is SGD with momentum 0.9.
*Shift*: trained on clean digits, fine-tuned on digits with other colours, contrast and brightness. *Transfer*: trained
on the digits 0 to 4, then with a new head fine-tuned on 5 to 9, all clean. Each run has {_numbers(steps)} steps. The
learning rate of the network is {_numbers(rates)}, the best in a comparison of rates; that of the gates is
{_numbers(gates)} times as large. For one seed, all penalties start from the same network and get the same images in the
same order. With `renorm` the `bn` branch normalizes with the running statistics in training too.

**Limits.** This is one small network, one data set and few seeds: differences of one or two points are not significant.
With the same number of steps, larger batches train on more images. The effect of a penalty also depends on the learning
rate of the gates and on the number of steps: a short training at a low rate needs a larger penalty.
"""


def _steps(run: Run) -> float:
    return run.steps


def _rate(run: Run) -> float:
    return run.rate


def _gate_rate(run: Run) -> float:
    return run.gate_rate


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
