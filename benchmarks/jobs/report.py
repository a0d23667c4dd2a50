"""The page on jobs, from the records of its runs."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.jobs.plan import SEEDS, TRIAL_SEED, Job, arm_names

Record = Mapping[str, Any]
_OURS = "normswap"
_TABLE = ("| arm | rate | before | after, by seed | seconds |", "|---|---|---|---|---|")
# Level: the mean of the paired differences is at most so many standard errors, or points of 100, below.
_ERRORS, _POINTS = 2.0, 1.0


def best_rate(records: Iterable[Record], arm: str) -> float:
    """Return the learning rate with the best leading metric on validation data; the lowest of equal ones."""
    trials = [record for record in records if record["arm"] == arm and record["seed"] == TRIAL_SEED]
    return min(trials, key=lambda record: (-leading(record), record["rate"]))["rate"]  # type: ignore[no-any-return]


def leading(record: Record) -> float:
    """Return the value of the leading metric, in points of 100; a run that diverged has the lowest."""
    value = next(iter(record["figures"].values()))
    if value is None or value != value:
        return float("-inf")
    return float(value if record["unit"] == "%" else 100 * value)


def page(jobs: Mapping[str, Job], records: Mapping[str, Record]) -> str:
    """Return the page: a table of all jobs, and for each job the metrics, rates and costs of its arms."""
    found = list(records.values())
    rows, details = [], []
    for job in jobs.values():
        own = [record for record in found if record["job"] == job.recipe]
        rows.append(_row(job, own))
        details.append(_details(job, own))
    dates = sorted({record["provenance"] for record in found})
    arms = list(dict.fromkeys(arm for job in jobs.values() for arm in arm_names(job)[:4]))
    return "\n".join(
        [
            "# Jobs",
            "",
            "Each recipe of a job in four forms, at the batch size of the job: BN in training, BN frozen (its affine",
            "is trained), GroupNorm matched to the running statistics, and the recipe as it is. Each arm takes the",
            "best of its learning rates on validation data, with a seed that the table leaves out. The table has the",
            f"leading metric on test data, in points of 100, as the mean of seeds {', '.join(map(str, SEEDS))}.",
            "Written by `make jobs`.",
            "",
            *dates[-1:],
            "",
            f"| job | metric | {' | '.join(arms)} | normswap is |",
            f"|---|---|{'---|' * (len(arms) + 1)}",
            *rows,
            "",
            "*first*: the best mean; *level*: below the best arm by at most 1 point or 2 standard errors of the paired",
            "difference. A number in parentheses counts the seeds if some are missing.",
            "",
            *details,
        ]
    )


def _row(job: Job, records: Sequence[Record]) -> str:
    values = {arm: seeds_of(records, arm) for arm in arm_names(job)}
    metric = next((next(iter(record["figures"])) for record in records), "-")
    cells = [_cell(found) for found in list(values.values())[:4]]
    return f"| [{job.title}](#{_anchor(job)}) | {metric} | {' | '.join(cells)} | {verdict(values)} |"


def seeds_of(records: Iterable[Record], arm: str) -> dict[int, float]:
    """Return the leading metric on test data by seed."""
    return {record["seed"]: leading(record) for record in records if record["arm"] == arm and record["seed"] in SEEDS}


def _cell(values: Mapping[int, float]) -> str:
    if not values:
        return "-"
    count = "" if len(values) == len(SEEDS) else f" ({len(values)})"
    return f"{statistics.mean(values.values()):.1f}{count}"


def verdict(values: Mapping[str, Mapping[int, float]]) -> str:
    """Return whether normswap is first, level, or behind, by the seeds that it shares with the best other arm."""
    ours = values[_OURS]
    others = {arm: found for arm, found in values.items() if arm != _OURS and set(found) & set(ours)}
    if not ours or not others:
        return "-"
    best = max(others, key=lambda arm: statistics.mean(others[arm].values()))
    differences = [ours[seed] - others[best][seed] for seed in sorted(set(ours) & set(others[best]))]
    mean = statistics.mean(differences)
    if mean >= 0:
        return "first"
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return "level" if -mean <= max(_POINTS, _ERRORS * error) else f"behind {best} by {-mean:.1f}"


def _anchor(job: Job) -> str:
    kept = "".join(letter for letter in job.title.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


def _details(job: Job, records: Sequence[Record]) -> str:
    """The arms of a job: chosen rate, every metric before and after, seconds."""
    lines = [
        f"## {job.title}",
        "",
        f"Recipe `{job.recipe}`{f', from the network of `{job.source}`' if job.source else ''}. {job.notes}".rstrip(),
        "",
        *(("Not run yet.",) if not records else _TABLE),
    ]
    for arm in arm_names(job):
        own = [record for record in records if record["arm"] == arm and record["seed"] in SEEDS]
        if own:
            lines.append(_detail(arm, sorted(own, key=lambda record: record["seed"])))
    return "\n".join([*lines, ""])


def _detail(arm: str, records: Sequence[Record]) -> str:
    scale = 1 if records[0]["unit"] == "%" else 100
    by_name = {
        name: ", ".join(_number(record["figures"][name], scale) for record in records) for name in records[0]["figures"]
    }
    after = "; ".join(f"{name} {values}" for name, values in by_name.items())
    name = next(iter(records[0]["figures"]))
    before = statistics.mean(scale * (record["before"].get(name) or 0.0) for record in records)
    seconds = statistics.mean(record["seconds"] for record in records)
    return f"| {arm} | {records[0]['rate']:g} | {name} {before:.1f} | {after} | {seconds:.0f} |"


def _number(value: float | None, scale: int) -> str:
    return "-" if value is None else f"{scale * value:.1f}"
