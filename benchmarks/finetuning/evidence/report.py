"""Write docs/measured/evidence.md and its picture from the records. Everything on the page is computed from them."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from textwrap import fill

from benchmarks.finetuning.evidence import curves
from benchmarks.finetuning.evidence.arms import ABLATIONS, ALL, ARMS, REPORTED
from benchmarks.finetuning.evidence.comparison import MAX_TOLERANCE, TOLERANCE, Estimate, estimates, paired
from benchmarks.finetuning.evidence.plan import (
    ABLATED,
    ABLATION_BATCH,
    BATCHES,
    CLOSE_POINTS,
    CURVES,
    HELD_BACK,
    LONGER,
    LONGER_ARMS,
    LONGER_BATCH,
    LONGER_FACTOR,
    LOWER_RATES,
    SEEDS,
    SELECTION_SEED,
    SETTINGS,
    Job,
    Record,
    Records,
    final,
    find,
    longer,
    planned,
    selected_rates,
)
from benchmarks.finetuning.evidence.training import CLIP, WEIGHT_DECAY
from benchmarks.finetuning.evidence.verdict import (
    Cell,
    Verdict,
    arm_estimates,
    cells,
    deaths,
    deaths_of_default_alone,
    difference,
    means_over_cells,
    scores,
    title,
    verdict,
)

PICTURE = "learning-rates.png"


def write_report(records: Records, folder: Path) -> None:
    """Write the page, and the picture if there are curves."""
    drawn = curves.draw(records, folder / PICTURE)
    (folder / "evidence.md").write_text(page(records, with_picture=drawn), encoding="utf-8")


def page(records: Records, *, with_picture: bool) -> str:
    """Return the page as Markdown."""
    parts = [
        _head(records),
        _summary(records, verdict(records)),
        *(_setting(records, name) for name in SETTINGS),
        _TRIALS,
        _dead(records),
        _ablations(records),
        _curves(with_picture),
        _longer(records),
        _rates(records),
        _method(),
        _status(records),
    ]
    blocks = "\n".join(part for part in parts if part).split("\n\n")
    return "\n\n".join(_refill(block) for block in blocks).rstrip() + "\n"


# --- text -------------------------------------------------------------------------------------------------------------


def _refill(block: str) -> str:
    """Wrap the lines of a paragraph or list; headings and tables stay."""
    if block.startswith(("#", "|", "!")):
        return block
    items = block.strip().replace("\n- ", "\0- ").split("\0")
    return "\n".join(
        fill(" ".join(item.split()), 118, subsequent_indent="  " * item.startswith("- "), break_on_hyphens=False)
        for item in items
    )


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join(lines) + "\n"


def _figure(value: Estimate | None, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    error = "" if value.error != value.error else f" ± {value.error:.1f}"
    return f"{value.mean:{'+' if signed else ''}.1f}{error} ({value.count})"


def _used(records: Records) -> list[Record]:
    """Return the records of the runs that are planned now; those of older code are left out."""
    jobs = planned(records, tuple(SETTINGS))
    return list({record["key"]: record for job in jobs if (record := find(records, job))}.values())


# --- sections ---------------------------------------------------------------------------------------------------------


def _head(records: Records) -> str:
    used = _used(records)
    if used:
        dates = sorted({record["date"] for record in used})
        span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        machines = "; ".join(sorted({record["machine"] for record in used}))
        numbers = {name: sorted({record["versions"][name] for record in used}) for name in used[0]["versions"]}
        versions = ", ".join(f"{name} {' and '.join(found)}" for name, found in numbers.items())
        hours = sum(record["seconds"] for record in used) / 3600
        where = f"Measured from {span} on {machines}; {versions}. {len(used)} runs, {hours:.1f} hours of one core."
    else:
        where = "Nothing has been measured yet."
    return f"""# Fine-tuning evidence

A trained network with Batch Normalization (BN) is fine-tuned on other data, at batch sizes of
{_and(BATCHES)}. Nine ways to do that (*arms*) are compared on {len(SETTINGS)} tasks (*settings*); a setting at a batch
size is a *cell*. `make evidence` writes this page; `benchmarks/results/evidence.jsonl` contains every run.
{_and([SETTINGS[name].title for name in HELD_BACK])} were not run before the rule of normswap's default was committed.
After their first runs, the rates of the default on small networks were set to those of its rivals.

{where}
"""


def _summary(records: Records, found: Verdict) -> str:
    if not found.cells:
        return ""
    over_cells = sorted(means_over_cells(records).items(), key=lambda item: -item[1])
    third = found.cells / 3
    safe = "" if min(found.above_frozen, found.above_group_norm) >= third else " It is as safe as frozen BN, no more."
    return f"""## Summary

{found.cells} of {found.planned_cells} cells are complete. normswap's default is

- further below the best of the other arms than {TOLERANCE:g} point or two standard errors in {len(found.lost)} cells{
        ": " + "; ".join(_name(cell) for cell in found.lost) if found.lost else ""
    };
- significantly above frozen BN in {found.above_frozen} cells, and above matched GN in {found.above_group_norm};
- near chance where frozen BN is not in {found.dead} runs.{safe}

Mean over the complete cells, in percent:

{table(["arm", "mean"], [[title(arm), f"{value:.1f}"] for arm, value in over_cells])}"""


def _name(cell: Cell) -> str:
    return (
        f"{SETTINGS[cell.setting].title} at {cell.batch} ({_figure(cell.to_best, signed=True)} to {title(cell.best)})"
    )


def _setting(records: Records, name: str) -> str:
    setting, found = SETTINGS[name], scores(records, name)
    heading = f"## {setting.title[0].upper()}{setting.title[1:]}"
    rows = {arm: arm_estimates(found, arm) for arm in (*ARMS, *REPORTED)}
    if not any(rows.values()):
        return f"{heading}\n\nNot run yet.\n"
    best = {
        batch: max((row[batch].mean for arm, row in rows.items() if arm in ARMS and batch in row), default=None)
        for batch in BATCHES
    }
    lines = []
    for arm, row in rows.items():
        figures = [_figure(row.get(batch)) for batch in BATCHES]
        marked = [
            f"**{text}**" if batch in row and row[batch].mean == best[batch] else text
            for batch, text in zip(BATCHES, figures, strict=True)
        ]
        lines.append([title(arm), *marked])
    return f"""{heading}

{_first_upper(setting.score)} on the test inputs in percent: mean ± standard error (number of seeds), by batch size.

{table(["arm", *(f"batch {batch}" for batch in BATCHES)], lines)}
{_differences(records, name)}"""


def _differences(records: Records, name: str) -> str:
    found = scores(records, name)
    complete = [cell for cell in cells(records) if cell.setting == name]
    if not complete:
        return ""
    rows = [
        [
            str(cell.batch),
            f"{title(cell.best)}: {_figure(cell.to_best, signed=True)}{', **lost**' if cell.is_lost else ''}",
            *(_figure(difference(found, cell.batch, arm), signed=True) for arm in ("frozen", "gn_matched")),
        ]
        for cell in complete
    ]
    return f"""Difference of normswap's default, paired by seed, in points:

{table(["batch size", "to the best other arm", f"to {title('frozen')}", f"to {title('gn_matched')}"], rows)}"""


def _dead(records: Records) -> str:
    counts = Counter((record["arm"], record["setting"]) for record in deaths(records))
    if not _used(records):
        return ""
    rows = [
        [title(arm), *(str(counts[arm, setting] or "") for setting in SETTINGS)]
        for arm in ALL
        if any(counts[arm, setting] for setting in SETTINGS)
    ]
    alone = [
        f"{SETTINGS[record['setting']].title}, batch {record['batch']}, seed {record['seed']}, "
        f"rate {_rate((record['rate'], record['gate_rate']))}"
        for record in deaths_of_default_alone(records)
    ]
    text = "; ".join(alone) if alone else "none"
    return f"""## Runs near chance

Runs of all stages, at every rate of the grids, that ended near chance.

{table(["arm", *(setting.title for setting in SETTINGS.values())], rows) if rows else "There is none."}
Runs of normswap's default near chance where frozen BN at the same rate, batch size and seed is not: {text}.
"""


def _ablations(records: Records) -> str:
    rows = []
    for arm in ("default", *ABLATIONS):
        row = [title(arm)]
        for setting in ABLATED:
            own = _seeds(records, setting, arm)
            base = _seeds(records, setting, "default")
            change = paired({0: own}, {0: base}).get(0) if arm != "default" else None
            row += [_figure(estimates({0: [*own.values()]}).get(0)), _figure(change, signed=True)]
        rows.append(row)
    if all(set(row[3:]) == {"-"} for row in rows[1:]) and all(set(row[1:]) == {"-"} for row in rows[1:]):
        return ""
    header = [text for setting in ABLATED for text in (SETTINGS[setting].title, "change")]
    described = "\n".join(f"- *{arm.title}*: {arm.description}." for arm in ABLATIONS.values())
    return f"""## Variants of the default

At batch size {ABLATION_BATCH}: score in percent, and the change to the default, paired by seed.

{table(["variant", *header], rows)}
{described}
"""


def _seeds(records: Records, setting: str, arm: str) -> dict[int, float]:
    jobs = (final(records, setting, arm, ABLATION_BATCH, seed) for seed in SEEDS)
    return {job.seed: record["test"] for job in jobs if (record := find(records, job))}


def _curves(drawn: bool) -> str:
    if not drawn:
        return ""
    names = _and([SETTINGS[name].title for name in CURVES])
    return f"""## Over the learning rate

![Validation score over the learning rate]({PICTURE})

Validation score after half the steps at batch size {ABLATION_BATCH}, seed {SELECTION_SEED}: {names}.
"""


def _longer(records: Records) -> str:
    rows = []
    for setting in LONGER:
        for job in longer(records, setting):
            usual = final(records, setting, job.arm, LONGER_BATCH, SEEDS[0])
            scored = [find(records, usual), find(records, job)]
            if scored[1]:
                rows.append([SETTINGS[setting].title, title(job.arm), *(_test(record) for record in scored)])
    if not rows:
        return ""
    return f"""## {LONGER_FACTOR} times longer

At batch size {LONGER_BATCH}, seed {SEEDS[0]}, for {len(LONGER_ARMS)} arms.

{table(["setting", "arm", "usual length", f"{LONGER_FACTOR} times longer"], rows)}"""


def _test(record: Record | None) -> str:
    return "-" if record is None else f"{record['test']:.1f}"


def _rates(records: Records) -> str:
    rows = []
    for arm in (*ARMS, *REPORTED):
        chosen = [[selected_rates(records, setting, arm, batch) for batch in (1, 2, 16)] for setting in SETTINGS]
        rows.append([title(arm), *(", ".join(map(_rate, rates)) for rates in chosen)])
    if all(set(row[1:]) == {"-, -, -"} for row in rows):
        return ""
    return f"""## Selected rates

At batch sizes 1, 2 (and 4) and 16; for normswap's default with the rate of the gates.

{table(["arm", *(setting.title for setting in SETTINGS.values())], rows)}"""


def _rate(rates: tuple[float, float | None] | None) -> str:
    if rates is None:
        return "-"
    return f"{rates[0]:g}" + ("" if rates[1] is None else f" / {rates[1]:g}")


# Trials by hand, not by `make evidence`: the mean of validation and test accuracy over seeds that are not reported.
_TRIALS = """## Lost cells: causes, and what was tried

Small networks that were trained on little data, at 2 and more inputs in a step: time series, and in part the digits.
There the statistics of the *batch* help by themselves, more than any choice among statistics of single inputs. Trials
of 2026-11-30, mean of validation and test accuracy, seeds 100 to 102, at the better of the rates 1e-3 and 3e-3:

| setting, batch size | default | `bn_statistics="batch"` |
|---|---|---|
| time series, 2 | 78.2 | 80.4 |
| time series, 4 | 83.0 | 85.8 |
| time series, 16 | 81.2 | 90.0 |
| digits under shift, 16 | 97.7 | 98.0 |
| digits, unseen classes, 2 | 97.8 | 98.2 |
| digits, unseen classes, 16 | 98.1 | 98.9 |

So for such a network pass `bn_statistics="batch"`, if the batches stay that large. What helped less, on time series at
4 and 16 (default 81.4 and 78.9, seeds 100 and 101): no warm-up of the gates 79.3 and 79.4, gates at 0.3 79.5 and 79.2,
a network rate of 3e-3 81.0 and 80.4, branches not matched 79.2 at 4, `start="ln"` 79.1 and 80.8, `start="uniform"`
81.7 and 83.7. On digits under shift, with seeds 100 to 103, warm-ups of 20 and 100 steps, limits of 0.5 and 1 / sites
and gates at 0.1 and 0.3 are within a point of each other.
"""


def _method() -> str:
    tasks = "\n".join(
        f"- *{setting.title}*: {_described(setting.load.__doc__)} "
        f"Rates {_and([f'{rate:g}' for rate in setting.rates])}; lower rates "
        f"{_and([f'{rate:g}' for rate in setting.lower_rates])}; pairs of rates "
        f"{_and([f'{rate:g} / {gates:g}' for rate, gates in setting.pairs])}; "
        f"{_and([f'{count} steps at {batch}' for batch, count in setting.steps.items()])}; "
        f"near chance: at most {setting.near_chance:g} %."
        for setting in SETTINGS.values()
    )
    arms = "\n".join(f"- *{arm.title}*: {arm.description}." for arm in (ARMS | REPORTED).values())
    return f"""## Method

**Settings.**

{tasks}

**Arms.** All start from the same trained network.

{arms}

Sites whose statistics were never trained (a new decoder) are calibrated on training inputs, without labels, where the
statistics of BN are constants: in frozen BN and in normswap's default.

**Training.** AdamW with a rate that falls linearly to 0, weight decay {WEIGHT_DECAY:g} on parameters of two and more
dimensions, gradients of all parameters but gates clipped to norm {CLIP:g}. All arms get the same inputs in the same
order.

**Rates.** For each arm, three rates of the network (for normswap's default three pairs of this rate and the rate of the
gates) are compared on validation inputs after half the steps, with seed {SELECTION_SEED}, which is not reported, at
batch sizes 2 and 16. The lower rates of a setting are for arms that larger ones destroy:
{_and([title(arm) for arm in LOWER_RATES])}. Batch size 4 takes the rate of 2, batch size 1 the better
of that rate and half of it. Gates of a
softmax have the rate that `normswap.param_groups` chooses. The steps of the other gates are limited by
`normswap.limit_gate_steps`, as in recipes.

**Seeds.** {_and(SEEDS)}; a seed determines the draw of the data, the new head and the order of the inputs. Where the
default and one of its two best rivals are within two standard errors or {CLOSE_POINTS:g} point, both get 5 and then
8 seeds.

**Standard errors** are pooled over the batch sizes of a setting: those of a mean over the runs of an arm, those of a
difference over the paired differences of two arms. A cell is *lost* if the default is below the best other arm by more
than {TOLERANCE:g} point and two standard errors; two standard errors count as at most {MAX_TOLERANCE:g} points.

**Records.** A run is known by a digest of what its arm computes in a few steps of a tiny network, of the code of the
setting, and of rates, batch size, steps and seed. A change of any of these makes `make evidence` run it again.
"""


def _status(records: Records) -> str:
    missing: list[Job] = [job for job in planned(records, tuple(SETTINGS)) if find(records, job) is None]
    if not missing:
        return "## Status\n\nAll runs are done.\n"
    counts = Counter((job.stage, job.setting) for job in missing)
    text = "; ".join(f"{stage} of {SETTINGS[setting].title}: {count}" for (stage, setting), count in counts.items())
    return f"## Status\n\n{len(missing)} runs are left (`make evidence STATUS=1` lists them): {text}.\n"


def _and(items: Iterable[object]) -> str:
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def _first_upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _described(docstring: str | None) -> str:
    return " ".join((docstring or "").split())
