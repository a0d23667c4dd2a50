"""Compare all arms at batch size 2 on shifted digits with several seeds (`make evidence`) -> docs/measured/evidence.md.

All measurements are in benchmarks/results/evidence.json; `--rewrite` only writes the page from them. Exit code 1 if
the converted network differs from the original or its lead is below the target.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torchvision.utils import save_image

import normswap
from benchmarks.finetuning.arms import ARMS, convert
from benchmarks.finetuning.evidence_records import Evidence, Section, SwapComparison, choose, read_json, write_json
from benchmarks.finetuning.evidence_report import meets_targets, write_report
from benchmarks.finetuning.protocol import MAIN, OTHERS, SOURCE_TRAINING, Setting, architecture
from benchmarks.finetuning.training import Outcome, accuracy, relative_output_error, run_arm, train_source
from benchmarks.paths import PAGES, RESULTS
from benchmarks.provenance import machine
from normswap.finetune.data.digits import SHIFT, SPLIT, Digits, prepare_digits

Weights = dict[str, list[dict[str, float]]]


def main() -> int:
    """Run the evidence, or only write the page; return the exit code."""
    options = _options()
    raw = options.records
    if options.rewrite:
        evidence = read_json(raw)
    else:
        evidence = collect(options.seeds, (MAIN, *OTHERS) if options.sensitivity else (MAIN,))
        write_json(evidence, raw)
    write_report(evidence, options.output / "evidence.md")
    write_sample(options.output / "digits.png")
    passed = meets_targets(evidence)
    print(f"wrote {options.output / 'evidence.md'}: the targets are {'met' if passed else 'NOT MET'}")
    return 0 if passed else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run (default 0 1 2)")
    parser.add_argument("--output", type=Path, default=PAGES, help="existing folder (default docs/measured)")
    parser.add_argument(
        "--sensitivity", action="store_true", help="repeat with more steps and with AdamW (3 x the time)"
    )
    parser.add_argument("--rewrite", action="store_true", help="only write the page from evidence.json")
    options = parser.parse_args()
    if len(set(options.seeds)) != len(options.seeds) or min(options.seeds) < 0:
        parser.error(f"--seeds: expected distinct integers of at least 0, got {options.seeds}")
    if not options.output.is_dir():
        parser.error(f"--output: expected an existing folder, got {options.output}")
    options.records = (RESULTS if options.output == PAGES else options.output) / "evidence.json"
    if options.rewrite and not options.records.is_file():
        parser.error(f"--rewrite: expected the file {options.records}; first run without --rewrite")
    return options


def collect(seeds: list[int], settings: tuple[Setting, ...]) -> Evidence:
    """Run every setting with every seed, in one process per core. Seeds do not depend on each other."""
    start = time.monotonic()
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(run_seed, seeds, [settings] * len(seeds)))
    return Evidence(
        date=datetime.now(UTC).date().isoformat(),
        machine=machine(),
        versions=describe_versions(),
        seconds=time.monotonic() - start,
        seeds=seeds,
        protocol={
            "architecture": architecture(),
            "split": {" ".join(key): count for key, count in SPLIT.items()},
            "shift": asdict(SHIFT),
            "source_training": asdict(SOURCE_TRAINING),
        },
        after_swap=[run.after_swap for run in runs],
        weights=[run.weights for run in runs],
        sections=[
            Section(s.title, asdict(s.tuning), [o for run in runs for o in run.outcomes[s.title]]) for s in settings
        ],
    )


class SeedRun(NamedTuple):
    """The results of one seed: outcomes by setting, and the weights of the converted arm at its selected rate."""

    after_swap: SwapComparison
    outcomes: dict[str, list[Outcome]]
    weights: Weights


def run_seed(seed: int, settings: tuple[Setting, ...]) -> SeedRun:
    """Train the source network of one seed and run every arm of every setting with it."""
    torch.set_num_threads(1)  # small images are not faster with two threads; one thread sums in a fixed order
    digits = prepare_digits(seed=seed)
    network = train_source(digits, seed=seed)
    after_swap = compare_after_swap(network, digits, seed=seed)
    print(f"seed {seed}: {after_swap}", flush=True)
    weights: Weights = {}
    outcomes: dict[str, list[Outcome]] = {}
    for setting in settings:
        for name in setting.arms:
            runs = list(run_grid(name, setting, network, digits, seed=seed))
            outcomes.setdefault(setting.title, []).extend(outcome for outcome, _ in runs)
            if setting is settings[0] and name == "converted":
                best = choose(outcome for outcome, _ in runs)
                weights = next(learned for outcome, learned in runs if outcome is best)
    return SeedRun(after_swap, outcomes, weights)


def run_grid(
    name: str, setting: Setting, network: nn.Module, digits: Digits, *, seed: int
) -> Iterator[tuple[Outcome, Weights]]:
    """Yield the outcome and the learned importance weights of one arm at every learning rate."""
    for rate in setting.tuning.rates:
        model, outcome = run_arm(name, ARMS[name], network, digits, rate=rate, settings=setting.tuning, seed=seed)
        print(
            f"seed {seed} | {setting.title} | {ARMS[name].title} | rate {rate:g}: validation {outcome.validation:.1f}, "
            f"target {outcome.target:.1f}, source {outcome.source:.1f} "
            f"({outcome.seconds:.0f} s{'' if outcome.is_finite else ', DIVERGED'})",
            flush=True,
        )
        yield outcome, {site: [w.mean, w.var] for site, w in normswap.importance_weights(model).items()}


def compare_after_swap(network: nn.Module, digits: Digits, *, seed: int) -> SwapComparison:
    """Compare the trained network with its conversion on all test images, before the first step."""
    converted = convert(network)
    source, target = digits.source.test, digits.target.test
    return SwapComparison(
        seed=seed,
        source_original=accuracy(network, source),
        source_converted=accuracy(converted, source),
        target_original=accuracy(network, target),
        target_converted=accuracy(converted, target),
        relative_error=relative_output_error(network, converted, torch.cat([source.pixels, target.pixels])),
    )


def write_sample(path: Path, *, count: int = 12) -> None:
    """Write an image of `count` test images of the source above as many of the target."""
    digits = prepare_digits(seed=0)
    pixels = [domain.test.pixels[:count] for domain in (digits.source, digits.target)]
    save_image((torch.cat(pixels) + 1) / 2, path, nrow=count)


def describe_versions() -> dict[str, str]:
    """Return the versions of the packages that affect the results."""
    packages = ("torch", "timm", "scikit-learn", "normswap")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


if __name__ == "__main__":
    sys.exit(main())
