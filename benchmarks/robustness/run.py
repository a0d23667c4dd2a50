"""Damaged files: no traceback, no file on failure, no code executed -> docs/measured/fuzz.md.

Run by `make fuzz`; a part of it, and with it the kills of `kills.py`, runs in the tests. The same seed gives the same
mutations on the same versions of torch.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.paths import DOCS
from benchmarks.provenance import provenance
from benchmarks.robustness.files import KINDS, plant, register
from benchmarks.robustness.mutations import FOLDER_MUTATIONS, MUTATIONS
from benchmarks.robustness.trial import Bench, Trial
from benchmarks.robustness.workers import GIGABYTES, SECONDS, run_all

SEED = 4
_REFUSED = ("1", "2")


def main() -> int:
    """Carry out the mutations, print what failed, write the page; exit status 1 if anything failed."""
    options = _options()
    torch.set_num_threads(1)
    register()
    scratch = Path(tempfile.mkdtemp(prefix="normswap-fuzz-"))
    started = time.monotonic()
    trials: list[Trial] = []
    try:
        bench = Bench(scratch / "good", plant(scratch))
        count, seed = options.mutations, options.seed
        for trial in run_all(bench, count=count, seed=seed, workers=options.workers, scratch=scratch / "bad"):
            trials.append(trial)
            for failure in trial.failures:
                print(f"{trial.index} ({trial.kind}, {trial.mutation}): {failure}", file=sys.stderr)
            if len(trials) % 500 == 0:
                print(f"{len(trials)} of {count}, {time.monotonic() - started:.0f} s", file=sys.stderr)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if options.json:
        print(json.dumps([trial.to_dict() for trial in trials]))
    else:
        text = document(trials, seed=options.seed)
        (DOCS / "fuzz.md").write_text(text)
        print(text)
    return 1 if any(trial.failures for trial in trials) else 0


def document(trials: Sequence[Trial], *, seed: int) -> str:
    """The page: what was done, and per kind of file and mutation how many were refused and how many failed."""
    failed = [trial for trial in trials if trial.failures]
    slowest = max(trials, key=lambda trial: trial.seconds)
    lines = [
        "# Fuzzing",
        "",
        f"{len(trials):,} damaged files (seed {seed}) through `normswap inspect`, `normswap convert` and",
        "`normswap.load`; written by `make fuzz`. A failure is a traceback or more than one line of error, a file",
        "that was written although the command failed, planted code that ran, more than "
        f"{SECONDS:.0f} s or more than {GIGABYTES:.0f} GB.",
        "",
        provenance(),
        "",
        f"**{len(failed)} failures.** The slowest took {slowest.seconds:.1f} s ({slowest.kind}, {slowest.mutation}).",
        "",
        "Refused: exit status 1 or 2 of `convert`. The others are damaged in a way that leaves another, valid file:",
        "other weights, bytes between the members of an archive, parts that nobody reads. What is converted already, a",
        "pickled module, a training checkpoint and TorchScript are refused also where they are whole.",
        "",
    ]
    lines += _table("file", [kind.name for kind in KINDS], lambda trial: trial.kind, trials)
    lines += [
        "",
        *_table("mutation", [*MUTATIONS, *FOLDER_MUTATIONS, "unknown"], lambda trial: trial.mutation, trials),
        "",
    ]
    if failed:
        lines += [
            "## Failures",
            "",
            *(f"- {t.index} ({t.kind}, {t.mutation}): {'; '.join(t.failures)}" for t in failed),
        ]
    return "\n".join(lines)


def _table(heading: str, names: Sequence[str], name_of: Callable[[Trial], str], trials: Sequence[Trial]) -> list[str]:
    rows = [f"| {heading} | mutations | refused | converted | loaded | failures |", "|---|---|---|---|---|---|"]
    for name in names:
        own = [trial for trial in trials if name_of(trial) == name]
        answers = Counter(trial.answers.get("convert", "") for trial in own)
        refused = sum(answers[status] for status in _REFUSED)
        loaded = sum(trial.answers.get("load") == "loaded" for trial in own)
        failures = sum(bool(trial.failures) for trial in own)
        if own:
            rows.append(f"| {name} | {len(own)} | {refused} | {answers['0']} | {loaded} | {failures} |")
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=int, choices=(1, 2), default=2)
    parser.add_argument("--json", action="store_true", help="print all that came of it, and write no page")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
