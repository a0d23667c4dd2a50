"""Write docs/measured/coverage.md and zoo-output/coverage.json from the records."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.paths import PAGES
from benchmarks.provenance import provenance
from benchmarks.zoo.catalog import ZOOS
from benchmarks.zoo.records import (
    ACCEPTED_REASONS,
    CONVERTED,
    FAILED,
    MODEL_FAILS,
    NO_NORM,
    OUTPUT,
    PARTLY,
    PLANNED,
    UNFINISHED,
    Record,
)

_CHECKS = ("outputs in evaluation", "outputs in training", "gradients", "running statistics")
_LIMIT = 1e-9
_TARGET_SHARE = 99.5

_METHOD = """
Each model is built with random parameters. Its batch norms get random weights and biases, and perturbed statistics of
the input. The model is converted with an example input of batch size 2 and checked: verification compares both models
in evaluation and in training with a fixed seed, in float64, or in float32 for the models listed below; nothing else in
the model may change; every batch norm must be in the plan; gates must get correct gradients; a converted model must
stay the same when converted again, and reverting must restore the original. The input has the default size of the
model, at most 128 px, or 64 px if 128 px needs more than 0.3 G multiply-adds. Models that amplify rounding errors too
much at 64 px are repeated at the full size. `zoo-output/coverage.json` has the input of each model.
""".strip().splitlines()

_REASONS = """
Any other reason is a failure. Quantized and fused intrinsic modules contain no separate batch norm. A batch norm call
on a *kernel* standardizes weights, not activations. With one spatial position and few channels, instance and layer norm
remove the signal. An original model that cannot be built or run cannot be checked.
""".strip().splitlines()


def write_report(records: dict[str, Record]) -> str:
    """Write both files and return the Markdown."""
    found = sorted(records.values(), key=lambda record: (ZOOS.index(record.zoo), record.name))
    with_norms = [record for record in found if record.outcome != NO_NORM]
    text = _document(found, with_norms)
    (PAGES / "coverage.md").write_text(text)
    (OUTPUT / "coverage.json").write_text(_machine_readable(found, with_norms))
    return text


def _document(found: Sequence[Record], with_norms: Sequence[Record]) -> str:
    parts = [
        "# Coverage: every model of three zoos, converted and verified",
        "",
        "Written by `make zoo` (`python -m benchmarks.zoo.run`); `zoo-output/coverage.json` has one line per model.",
        f"{provenance()} {_transformers_version()}",
        f"Code: {', '.join(f'{c} ({n} models)' for c, n in Counter(r.commit for r in with_norms).most_common(4))}.",
        "",
        *_METHOD,
        _reference_line(with_norms),
        "",
        *_table("By zoo", _zoo_rows(found)),
        *_table("By tracing path", _path_rows(with_norms)),
        *_table("Skips by reason", _reason_rows(with_norms)),
        *_REASONS,
        "",
        *_table("Verification", _error_rows(with_norms)),
        "Errors are relative L2 distances. The own response of a model is the change of its outputs if its input",
        "changes by one unit in the last place. An error above the limit is accepted up to ten times the own response;",
        f"this clause was needed for {sum(map(_needs_clause, with_norms))} models.",
        "",
        *_table("Time", _time_rows(with_norms)),
        "The ratio is (plan + swap) / (build + one forward pass) on the small input; it is lower at the default size.",
        "",
        *_section("Partly converted", [_partly_line(r) for r in with_norms if r.outcome == PARTLY]),
        *_section("Failed", [_failure_line(r) for r in with_norms if r.outcome in (FAILED, UNFINISHED)]),
        *_section("The original model fails", [_note_line(r) for r in with_norms if r.outcome == MODEL_FAILS]),
        *_section(
            "Too large: only planned, on the meta device", [_size_line(r) for r in with_norms if r.outcome == PLANNED]
        ),
        *_section("Not verified yet", [f"`{r.key}`" for r in with_norms if r.is_unverified]),
        *_section("Verified in float32", [_precision_line(r) for r in with_norms if r.precision == "float32"]),
        *_section("The original fails in training", _skipped_lines(with_norms)),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _transformers_version() -> str:
    try:
        return f"transformers {version('transformers')}."
    except PackageNotFoundError:
        return ""


def _table(title: str, rows: Sequence[Sequence[Any]]) -> list[str]:
    head, *body = rows
    lines = [f"| {' | '.join(map(str, row))} |" for row in body]
    return [f"## {title}", "", f"| {' | '.join(map(str, head))} |", "|---" * len(head) + "|", *lines, ""]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title} ({len(lines)})", "", *(f"- {line}" for line in lines), *([""] if lines else ["None.", ""])]


def _zoo_rows(found: Sequence[Record]) -> list[list[Any]]:
    rows: list[list[Any]] = [
        ["zoo", "models", "with BN", "fully swapped", "partly", "planned on meta", "original fails", "failed"]
        + ["verified", "sites", "swapped", "%"]
    ]
    for zoo in (*ZOOS, "all"):
        records = [record for record in found if zoo in (record.zoo, "all")]
        outcomes = Counter(record.outcome for record in records)
        sites, swapped = sum(r.sites for r in records), sum(r.swapped for r in records)
        rows.append(
            [zoo, len(records), len(records) - outcomes[NO_NORM], outcomes[CONVERTED], outcomes[PARTLY]]
            + [outcomes[PLANNED], outcomes[MODEL_FAILS], outcomes[FAILED] + outcomes[UNFINISHED]]
            + [sum(r.is_verified and not r.failures for r in records), sites, swapped, f"{_share(swapped, sites):.2f}"]
        )
    return rows


def _share(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 100.0


def _path_rows(records: Sequence[Record]) -> list[list[Any]]:
    rows: list[list[Any]] = [["path", "models", "sites", "why earlier paths failed (most frequent)"]]
    for path, count in Counter(record.path for record in records if record.path).most_common():
        those = [record for record in records if record.path == path]
        reasons = Counter(_short(record.path_reason, 90) for record in those if record.path_reason).most_common(3)
        texts = "; ".join(f"{reason} ({number})" for reason, number in reasons)
        rows.append([path, count, sum(record.sites for record in those), texts])
    return rows


def _reason_rows(records: Sequence[Record]) -> list[list[Any]]:
    counted: Counter[str] = Counter()
    models: dict[str, set[str]] = {}
    for record in records:
        for *_, reason in record.skips:
            counted[reason] += 1
            models.setdefault(reason, set()).add(record.key)
    names = [*ACCEPTED_REASONS, MODEL_FAILS, *sorted(counted.keys() - {*ACCEPTED_REASONS, MODEL_FAILS})]
    return [["reason", "sites", "models"]] + [[n, counted[n], len(models.get(n, ()))] for n in names]


def _error_rows(records: Sequence[Record]) -> list[list[Any]]:
    rows: list[list[Any]] = [["check in float64", "models", "median", "worst", "in", "accepted by own response"]]
    for name in _CHECKS:
        those = [(c[1], c[3], r.name) for r in records for c in r.checks if c[0] == name and c[5] != "float32"]
        known = [(error, own, model) for error, own, model in those if error is not None]
        rows.append([name, *_spread([(error, model) for error, _, model in known]), _clause(known)])
    for index, mode in enumerate(("evaluation", "training")):
        known_sites = [
            (r.site_errors[index], r.name)
            for r in records
            if len(r.site_errors) > index and r.site_errors[index] is not None
        ]
        rows.append([f"worst single site, {mode}", *_spread(known_sites), "-"])
    single = [(r.fp32_error, r.name) for r in records if r.fp32_error is not None]
    rows.append(["outputs in float32, for information", *_spread(single), "-"])
    return rows


def _spread(values: Sequence[tuple[Any, str]]) -> list[Any]:
    if not values:
        return [0, "-", "-", "-"]
    worst, model = max(values)
    return [len(values), f"{statistics.median(value for value, _ in values):.1e}", f"{worst:.1e}", model]


def _clause(known: Iterable[tuple[float, float | None, str]]) -> int:
    return sum(own is not None and error > _LIMIT for error, own, _ in known)


def _needs_clause(record: Record) -> bool:
    """Return true if an error of the model in float64 is only accepted by its own response."""
    checks = [(c[1], c[3], record.name) for c in record.checks if c[0] in _CHECKS and c[5] != "float32"]
    return _clause(check for check in checks if check[0] is not None) > 0


def _time_rows(records: Sequence[Record]) -> list[list[Any]]:
    rows: list[list[Any]] = [["", "models", "median", "90 %", "worst", "in"]]
    for name in ("build", "forward", "plan", "swap", "verify", "total"):
        rows.append([f"{name}, s", *_quantiles([(r.seconds[name], r.name) for r in records if name in r.seconds])])
    rows.append(["**ratio**", *_quantiles([(r.ratio, r.name) for r in records if r.ratio is not None])])
    return rows


def _quantiles(values: Sequence[tuple[Any, str]]) -> list[Any]:
    if not values:
        return [0, "-", "-", "-", "-"]
    ordered = sorted(values)
    median, high = (ordered[min(int(q * len(ordered)), len(ordered) - 1)][0] for q in (0.5, 0.9))
    return [len(ordered), f"{median:.2f}", f"{high:.2f}", f"{ordered[-1][0]:.2f}", ordered[-1][1]]


def _short(text: str, length: int) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= length else text[: length - 3] + "..."


def _partly_line(record: Record) -> str:
    reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(skip[3] for skip in record.skips).items())
    names = ", ".join(f"`{skip[0]}`" for skip in record.skips[:3]) + (", ..." if len(record.skips) > 3 else "")
    return f"`{record.key}`: {record.swapped} of {record.sites}; {reasons} ({names})"


def _failure_line(record: Record) -> str:
    more = f" (+{len(record.failures) - 1} more)" if len(record.failures) > 1 else ""
    first = record.failures[0] if record.failures else f"unfinished, in the stage: {record.stage}"
    return f"`{record.key}`: {_short(first, 300)}{more}"


def _note_line(record: Record) -> str:
    return f"`{record.key}` ({record.norms} batch norms): {_short('; '.join(record.notes), 200)}"


def _size_line(record: Record) -> str:
    return f"`{record.key}`: {record.parameters / 1e6:.0f} million parameters, {record.swapped} of {record.sites} sites"


def _precision_line(record: Record) -> str:
    why = next((note for note in record.notes if note.startswith("float64:")), "")
    size = f"{record.parameters / 1e6:.0f} million parameters"
    return f"`{record.key}`: {_short(why, 160) or size}"


def _skipped_lines(records: Sequence[Record]) -> list[str]:
    skipped = [(record, check) for record in records for check in record.checks if check[4] is None]
    return list(dict.fromkeys(f"`{record.key}`: {_short(str(check[5]), 160)}" for record, check in skipped))


def _reference_line(records: Sequence[Record]) -> str:
    counts = Counter(record.training_reference for record in records if record.is_verified)
    names = {"frozen": "whose norms are in evaluation (frozen)", "mixed": "with some norms in evaluation"}
    found = ", ".join(f"{names.get(name, 'as it trains')} ({n} models)" for name, n in counts.most_common())
    return f"In training, converted models are compared with the original {found}."


def _machine_readable(found: Sequence[Record], with_norms: Sequence[Record]) -> str:
    head = {"measured": provenance(), "models": len(found), "with batch norms": len(with_norms)}
    head["share of sites swapped"] = _share(sum(r.swapped for r in with_norms), sum(r.sites for r in with_norms))
    head["target share"] = _TARGET_SHARE
    lines = ",\n".join(json.dumps(_row(record)) for record in with_norms)
    return json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n'


def _row(record: Record) -> dict[str, Any]:
    return {
        "model": record.key,
        "outcome": record.outcome,
        "parameters": record.parameters,
        "inputs": record.inputs,
        "reduced": record.reduced,
        "sites": record.sites,
        "swapped": record.swapped,
        "skips": dict(Counter(skip[3] for skip in record.skips)),
        "other norms": record.other_norms,
        "path": record.path,
        "precision": record.precision,
        "verification": {check[0]: check[1:4] for check in record.checks},
        "single sites": record.site_errors,
        "float32 error": record.fp32_error,
        "gates checked": record.gates_checked,
        "ratio": record.ratio and round(record.ratio, 3),
        "seconds": record.seconds,
        "failures": record.failures,
        "notes": record.notes,
        "commit": record.commit,
    }
