"""Train with BN, convert, verify, fine-tune at batch size 2, and show what the gates learned (`make demo`).

All figures are measured in this run, with one seed; the files are in demo-output/. `make evidence` compares the arms
over several seeds, with a learning rate selected for each arm.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import normswap
from benchmarks.finetuning.arms import ARMS, Arm
from benchmarks.finetuning.protocol import DEMO_ARMS, DEMO_RATE, DEMO_SEED, FINE_TUNING, architecture
from benchmarks.finetuning.training import Outcome, accuracy, relative_output_error, run_arm, train_source
from benchmarks.paths import ROOT
from normswap.finetune.data.digits import IMAGE_SIZE, Digits, prepare_digits
from normswap.finetune.run_files import read_journal

OUTPUT = Path("demo-output")
ORIGINAL, CONVERTED = OUTPUT / "model.pt", OUTPUT / "model.normswap.pt"
RECIPE, TUNED = "digits_small_batch", OUTPUT / "finetune"
BRANCHES = ("in", "ln", "bn")


def main() -> int:
    """Run the demo; return the exit code."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)  # images this small gain nothing from a second thread
    start = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 118, highlight=False)

    def log(text: str) -> None:
        console.print(f"[bold]\\[{time.monotonic() - start:4.0f} s][/bold] {text}")

    log("load scanned digits: clean (source) and with random colours, texture, contrast and noise (target)")
    digits = prepare_digits(seed=DEMO_SEED)
    log(f"train {architecture()} with Batch Normalization on {len(digits.source.train.labels)} clean digits")
    network = train_source(digits, seed=DEMO_SEED)
    (ROOT / OUTPUT).mkdir(exist_ok=True)
    torch.save(network.state_dict(), ROOT / ORIGINAL)
    log(f"saved {ORIGINAL}: {accuracy(network, digits.source.test):.1f} % on clean test digits")

    common = ["--arch", architecture(), "--input", f"2x3x{IMAGE_SIZE}x{IMAGE_SIZE}"]
    log("convert the file and verify the result")
    run_normswap(console, "convert", str(ORIGINAL), *common, "-o", str(CONVERTED), "--force")
    run_normswap(console, "verify", str(ORIGINAL), str(CONVERTED), *common)
    converted = normswap.load(ROOT / CONVERTED).model
    log(check_same(network, converted, digits))

    tuning = FINE_TUNING
    log(f"fine-tune on the target: {tuning.steps} steps at batch size {tuning.batch_size}, learning rate {DEMO_RATE:g}")
    outcomes = [finetune_arm(name, ARMS[name], network, digits, log) for name in DEMO_ARMS if name != "converted"]
    log("  converted by normswap: a short run of the recipe")
    run_normswap(console, "finetune", RECIPE, *recipe_keys(), "--force")
    tuned = normswap.load(ROOT / TUNED / "model.pt").model
    outcomes.append(outcome_of_recipe(converted, tuned, digits))
    console.print(outcome_table(outcomes), importance_table(tuned))
    log("done. `make evidence` repeats the comparison over several seeds with a learning rate selected for each arm.")
    return 0


def run_normswap(console: Console, *arguments: str) -> None:
    """Run the normswap command in this environment; stop the demo if it fails."""
    console.print(f"\n[green]$[/green] normswap {' '.join(arguments)}", soft_wrap=True)
    # The command prints to the same terminal, so print everything before it.
    sys.stdout.flush()
    status = subprocess.run([sys.executable, "-m", "normswap", *arguments], cwd=ROOT, check=False).returncode
    if status != 0:
        raise SystemExit(f"error: `normswap {arguments[0]}` failed with exit code {status}; see its message above")
    console.print()


def check_same(original: nn.Module, converted: nn.Module, digits: Digits) -> str:
    """Compare the two networks after conversion; return a line with their accuracies.

    Raises:
        RuntimeError: their accuracies differ.
    """
    pairs = [
        (name, accuracy(original, domain.test), accuracy(converted, domain.test))
        for name, domain in (("source", digits.source), ("target", digits.target))
    ]
    if any(before != after for _, before, after in pairs):
        raise RuntimeError(f"expected equal accuracies after conversion, got (name, original, converted): {pairs}")
    figures = ", ".join(f"{name} {before:.1f} = {after:.1f} %" for name, before, after in pairs)
    error = relative_output_error(original, converted, digits.source.test.pixels)
    return f"accuracy, original = converted: {figures}; relative output error in float32 {error:.1e}"


def recipe_keys() -> list[str]:
    """Return the options that set the file, the batch size and the number of steps of the demo in the recipe."""
    keys = {
        "model.checkpoint": CONVERTED,
        "data.batch_size": FINE_TUNING.batch_size,
        "train.epochs": "none",
        "train.steps": FINE_TUNING.steps,
        "train.lr": DEMO_RATE,
        "train.seed": DEMO_SEED,
        "run.output": TUNED,
    }
    return [argument for key, value in keys.items() for argument in ("--set", f"{key}={value}")]


def outcome_of_recipe(converted: nn.Module, tuned: nn.Module, digits: Digits) -> Outcome:
    """Measure the network trained by the recipe in the same way as the arms."""
    entries = read_journal(ROOT / TUNED)
    return Outcome(
        arm="converted",
        seed=DEMO_SEED,
        rate=DEMO_RATE,
        source_before=accuracy(converted, digits.source.test),
        target_before=accuracy(converted, digits.target.test),
        validation=accuracy(tuned, digits.target.validation),
        target=accuracy(tuned, digits.target.test),
        source=accuracy(tuned, digits.source.test),
        is_finite=True,  # otherwise the recipe fails
        seconds=next(record["seconds"] for record in reversed(entries) if "seconds" in record),
    )


def finetune_arm(name: str, arm: Arm, network: nn.Module, digits: Digits, log: Callable[[str], None]) -> Outcome:
    """Fine-tune and measure one arm, and print its accuracy."""
    _, outcome = run_arm(name, arm, network, digits, rate=DEMO_RATE, settings=FINE_TUNING, seed=DEMO_SEED)
    log(f"  {arm.title}: {outcome.target:.1f} % on the target")
    return outcome


def outcome_table(outcomes: list[Outcome]) -> Table:
    """Return the test accuracies in percent, one row per arm."""
    title = f"Test accuracy (%), before and after {FINE_TUNING.steps} steps at batch size {FINE_TUNING.batch_size}"
    table = Table(title=title, title_justify="left")
    table.add_column("arm")
    for column in ("source, before", "target, before", "target, after", "source, after"):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        figures = (outcome.source_before, outcome.target_before, outcome.target, outcome.source)
        style = "bold" if outcome.arm == "converted" else None
        table.add_row(ARMS[outcome.arm].title, *(f"{figure:.1f}" for figure in figures), style=style)
    return table


def importance_table(model: nn.Module) -> Table:
    """Return the importance weights of every site, for means and for variances."""
    title = "Learned importance weights (all started at bn = 1)"
    table = Table(title=title, title_justify="left")
    table.add_column("site")
    for kind in ("mean", "variance"):
        for branch in BRANCHES:
            table.add_column(f"{kind} {branch}", justify="right")
    for site, weights in normswap.importance_weights(model).items():
        values = [kind.get(branch) for kind in weights for branch in BRANCHES]
        table.add_row(site, *("-" if value is None else f"{value:.2f}" for value in values))
    return table


if __name__ == "__main__":
    sys.exit(main())
