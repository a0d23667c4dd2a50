"""docs/measured/batch-price.md out of the records: tables, and the words on the tasks that they need. Runs nothing."""

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from benchmarks.finetuning.batch_dependence_records import (
    BATCH_SIZES,
    PRICES,
    RENORM_BATCH_SIZE,
    RENORM_PRICES,
    TASKS,
    Run,
    Study,
)


def write_report(study: Study, path: Path, *, planned: int) -> None:
    """Write the page as Markdown.

    Args:
        planned: how many runs there will be.
    """
    tasks = [_task(study.runs, task) for task in TASKS]
    path.write_text(
        "\n".join([_head(study, planned), _gains(study.runs), *tasks, _method(study.runs)]), encoding="utf-8"
    )


def cell_of(runs: Iterable[Run], task: str, batch_size: int, price: float, *, statistics: str = "batch") -> list[Run]:
    """Return the runs of one cell of a table, one a seed, in the order of the seeds."""
    wanted = (task, statistics, batch_size, price)
    return sorted((run for run in runs if run.cell[:4] == wanted), key=lambda run: run.seed)


def _head(study: Study, planned: int) -> str:
    left = "" if len(study.runs) >= planned else f" **{len(study.runs)} of {planned} runs are made so far.**"
    return f"""# The price of batch dependence

In a batch of one sample Instance and Batch Normalization take the same moments, so in training no gradient tells
their importance weights apart, while evaluation, on running statistics, does. A price on the share of BN,
`loss + price * normswap.batch_dependence(model)`, decides. What does it do, and where does it harm? A BN network is
converted and fine-tuned with four prices at four batch sizes, the same number of steps each. Written by `make price`;
every single run is in `benchmarks/results/batch-price.json`.{left}

{study.provenance}
"""


def _gains(runs: list[Run]) -> str:
    rows = [
        [str(size), TASKS[task], *(_gain(_pairs(runs, task, size, price)) for price in PRICES[1:])]
        for size in BATCH_SIZES
        for task in TASKS
    ]
    header = ["batch size", "from clean digits", *(f"price {price:g}" for price in PRICES[1:])]
    return f"""## In short

Points of test accuracy over the same fine-tuning without a price, mean of the seeds.

{_table(header, rows)}"""


def _gain(differences: list[float]) -> str:
    return f"{mean(differences):+.1f}" if differences else "-"


def _pairs(runs: list[Run], task: str, batch_size: int, price: float) -> list[float]:
    """Points over no price, by seed."""
    without = {run.seed: run.accuracy for run in cell_of(runs, task, batch_size, 0.0)}
    priced = cell_of(runs, task, batch_size, price)
    return [run.accuracy - without[run.seed] for run in priced if run.seed in without]


def _task(runs: list[Run], task: str) -> str:
    header = ["batch size", "statistics", *(f"price {price:g}" for price in PRICES)]
    rows = [
        [str(size), "batch", *(_entry(cell_of(runs, task, size, price)) for price in PRICES)] for size in BATCH_SIZES
    ]
    renewed = [
        _entry(cell_of(runs, task, RENORM_BATCH_SIZE, price, statistics="renorm")) if price in RENORM_PRICES else ""
        for price in PRICES
    ]
    rows.insert(1 + BATCH_SIZES.index(RENORM_BATCH_SIZE), [str(RENORM_BATCH_SIZE), "renorm", *renewed])
    return f"""## From clean digits {TASKS[task]}

Test accuracy in percent, mean (one value per seed), and the share of BN that is left, mean of sites, gates and seeds.

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
    return f"""## How it was done

Network, data, shift and optimizer are those of the [evidence](evidence.md). *Shift*: trained on clean digits,
fine-tuned on digits of other colours, contrast and brightness. *Transfer*: trained on the digits 0 to 4, given a new
head and fine-tuned on 5 to 9, all clean. Each run takes {_numbers(steps)} steps. The network's rate is
{_numbers(rates)}, the one that the converted network chose most often in the evidence; that of the gates is
{_numbers(gates)} times as large. All prices of a seed start from the same network and see the same images in the same
order. With `renorm` the `bn` branch takes the values of the running statistics in training too.

**What this does not show.** One small network, one data set, few seeds: differences of one or two points mean
nothing. With the same number of steps, larger batches see more images. How far a price moves a gate hangs on the
gate's rate and on the number of steps too: a short training at a small rate needs a larger one.
"""


def _steps(run: Run) -> float:
    return run.steps


def _rate(run: Run) -> float:
    return run.rate


def _gate_rate(run: Run) -> float:
    return run.gate_rate


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
