"""Fuzz the commands with damaged files (`make fuzz`) -> docs/measured/fuzz.md.

A damaged file must not cause a traceback, an output file after a failure, or the execution of code. The same seed gives
the same mutations if the version of torch is the same. The tests run a small number of mutations.
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

from benchmarks.paths import PAGES
from benchmarks.provenance import provenance
from benchmarks.robustness.files import KINDS, plant, register
from benchmarks.robustness.mutations import FOLDER_MUTATIONS, MUTATIONS
from benchmarks.robustness.trial import Bench, Trial
from benchmarks.robustness.workers import GIGABYTES, SECONDS, run_all

SEED = 4
_REFUSED = ("1", "2")


def main() -> int:
    """Run the mutations, print the failures, write the page; exit code 1 if there are failures."""
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
        (PAGES / "fuzz.md").write_text(text)
        print(text)
    return 1 if any(trial.failures for trial in trials) else 0


def document(trials: Sequence[Trial], *, seed: int) -> str:
    """Return the page: the method, and the counts of results for each kind of file and each mutation."""
    failed = [trial for trial in trials if trial.failures]
    slowest = max(trials, key=lambda trial: trial.seconds)
    lines = [
        "# Fuzzing",
        "",
        f"{len(trials):,} damaged files (seed {seed}), read by `normswap inspect`, `normswap convert` and",
        "`normswap.load`. `make fuzz` writes this page. A failure is a traceback, an error message of more than one",
        "line, an output file of a command that failed, the execution of planted code, more than "
        f"{SECONDS:.0f} s or more than {GIGABYTES:.0f} GB.",
        "",
        provenance(),
        "",
        f"**{len(failed)} failures.** Slowest trial: {slowest.seconds:.1f} s ({slowest.kind}, {slowest.mutation}).",
        "",
        "Refused means exit code 1 or 2 of `convert`. Other files are still valid after the damage: it changed",
        "weights, bytes between the members of an archive, or parts that normswap does not read. `convert` also",
        "refuses converted files, pickled modules, training checkpoints and TorchScript files without damage.",
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
        results = Counter(trial.answers.get("convert", "") for trial in own)
        refused = sum(results[status] for status in _REFUSED)
        loaded = sum(trial.answers.get("load") == "loaded" for trial in own)
        failures = sum(bool(trial.failures) for trial in own)
        if own:
            rows.append(f"| {name} | {len(own)} | {refused} | {results['0']} | {loaded} | {failures} |")
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", metavar="N", type=int, default=10_000, help="(default 10000)")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the mutations (default %(default)s)")
    parser.add_argument("--workers", type=int, choices=(1, 2), default=2, help="parallel processes (default 2)")
    parser.add_argument("--json", action="store_true", help="print all results as JSON and write no page")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
