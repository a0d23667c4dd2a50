"""Run the recipe for small batches and measure its training loop (`make recipes`) -> docs/measured/small-batch.md.

The recipe, the recipe with batch statistics (an ablation), and plain BN run at three batch sizes over three seeds. The
training loop is compared with a loop written by hand. An interrupted run resumes; `--rewrite` only writes the page from
the records. `--peak engine|hand` prints the peak memory of one loop.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import normswap
from benchmarks.paths import PAGES, RESULTS, ROOT
from benchmarks.provenance import provenance
from benchmarks.records import read_document, write_document
from benchmarks.speed.memory import process_memory
from normswap.finetune.data.datasets import Data
from normswap.finetune.optimization import build_optimizer
from normswap.finetune.recipe import Recipe, read_recipe
from normswap.finetune.setup import prepare
from normswap.surgery.importance import gate_parameters

RECIPE, SOURCE = "digits_small_batch", "digits_source"
SEEDS, BATCHES = (0, 1, 2), (1, 2, 4)
# What the recipe was before: the `bn` branch uses the batch in training, and branches are not matched.
_BATCH = ("convert.bn_statistics=batch", "convert.match=false")
ARMS = {
    "recipe": ("the recipe", ()),
    "batch, penalty": ("batch statistics, penalty 0.03", (*_BATCH, "train.batch_penalty=0.03")),
    "batch": ("batch statistics", (*_BATCH, "train.batch_penalty=0.0")),
    "bn": ("BN in training mode", ("convert.enabled=false", "train.batch_penalty=0.0")),
}
# Targets: largest loss of the recipe from batch size 4 to 1 in points, smallest loss of BN, largest cost of the loop.
MAX_LOSS, MIN_LOSS_OF_BN, MAX_COST = 2.0, 30.0, 1.03
_COST_STEPS, _COST_ROUNDS = 40, 5


def main() -> None:
    """Run what the records do not contain, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewrite", action="store_true", help="only write the page from the records")
    parser.add_argument("--peak", choices=("engine", "hand"), help="print the peak memory of one loop in bytes")
    options = parser.parse_args()
    torch.set_num_threads(1)  # small images are not faster with two threads; one thread sums in a fixed order
    if options.peak:
        print(_peak(options.peak))
        return
    records = RESULTS / "small-batch.json"
    found: dict[str, Any] = read_document(records) or {"runs": []}
    if not options.rewrite:
        found["provenance"] = provenance()
        with tempfile.TemporaryDirectory() as folder:
            for _ in _measure(found, Path(folder)):
                write_document(records, found)
    (PAGES / "small-batch.md").write_text(_page(found))
    print(f"wrote {PAGES / 'small-batch.md'}")


def _measure(found: dict[str, Any], folder: Path) -> Iterator[None]:
    """Add the missing results to the records, one after the other."""
    known = {(run["arm"], run["batch"], run["seed"]) for run in found["runs"]}
    for arm, seed, batch in product(ARMS, SEEDS, BATCHES):
        if (arm, batch, seed) not in known:
            found["runs"].append(_run(arm, batch, seed, folder))
            print(found["runs"][-1], flush=True)
            yield
    if "cost" not in found:
        found["cost"] = _cost(folder)
        yield


def _run(arm: str, batch: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run the recipe, starting from the source network of the seed."""
    source = folder / f"source-{seed}"
    if not source.exists():
        normswap.run_recipe(read_recipe(SOURCE, [f"run.output={source}", f"train.seed={seed}"]))
    output = folder / f"{arm.replace(' ', '-')}-{batch}-{seed}"
    overrides = (f"run.output={output}", f"train.seed={seed}", f"data.batch_size={batch}")
    recipe = read_recipe(RECIPE, [f"model.checkpoint={source / 'model.pt'}", *overrides, *ARMS[arm][1]])
    start = time.thread_time()
    outcome = normswap.run_recipe(recipe)
    shares = [share for site in outcome.importance.values() for share in (site.mean["bn"], site.var["bn"])]
    return {
        "arm": arm,
        "batch": batch,
        "seed": seed,
        "before": outcome.before.accuracy,
        "after": outcome.after.accuracy,
        "bn_share": statistics.mean(shares) if shares else None,
        "steps": outcome.steps,
        "cpu_seconds": time.thread_time() - start,
    }


# --- the cost of the loop ---------------------------------------------------------------------------------------------


def _cost(folder: Path) -> dict[str, Any]:
    """Return ratios of the loop of the package to one written by hand: CPU time and peak memory of a process."""
    ratios = []
    for number in range(_COST_ROUNDS):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            recipe = _cost_recipe(Path(scratch))
            times = {name: _time(loop, recipe) for name, loop in _in_turn(number)}
        ratios.append(times["engine"] / times["hand"])
    peaks: dict[str, list[int]] = {"engine": [], "hand": []}
    for name in ("engine", "hand") * 3:
        command = [sys.executable, "-m", "benchmarks.finetuning.recipes", "--peak", name]
        peaks[name].append(int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout))
    engine, hand = (statistics.median(peaks[name]) for name in ("engine", "hand"))
    return {"time": statistics.median(ratios), "times": ratios, "peaks": [engine, hand], "memory": engine / hand}


def _in_turn(number: int) -> list[tuple[str, Callable[..., None]]]:
    loops = [("engine", _by_engine), ("hand", _by_hand)]
    return loops if number % 2 else loops[::-1]


def _cost_recipe(folder: Path) -> Recipe:
    """Return a recipe for a converted resnet18 with 8 images of 64 pixels: steps are short, so the loop matters."""
    model = folder / "model.pt"
    if not model.exists():
        network, plan, _ = normswap.convert(prepare(_plain_recipe(folder)).model, torch.randn(2, 3, 64, 64))
        normswap.save(network, model, plan=plan, architecture="timm:resnet18,num_classes=10")
    return read_recipe(RECIPE, [*_cost_keys(folder), f"model.checkpoint={model}"])


def _plain_recipe(folder: Path) -> Recipe:
    architecture = "model.architecture=timm:resnet18,num_classes=10"
    return read_recipe(RECIPE, [*_cost_keys(folder), "model.checkpoint=none", architecture, "convert.enabled=false"])


def _cost_keys(folder: Path) -> list[str]:
    keys = {
        "data.image_size": 64,
        "data.batch_size": 8,
        "data.evaluation_batch_size": 2,
        "train.epochs": "none",
        "train.steps": _COST_STEPS,
        "run.output": folder / "run",
    }
    return [f"{key}={value}" for key, value in keys.items()]


def _time(loop: Callable[..., None], recipe: Recipe) -> float:
    """Return the CPU seconds of all steps after the first 5."""
    marks: list[float] = []
    loop(recipe, lambda *_: marks.append(time.process_time()))
    return marks[-1] - marks[4]


def _by_engine(recipe: Recipe, on_step: Callable[[int, int], None]) -> None:
    normswap.run_recipe(recipe, overwrite=True, on_step=on_step)


def _by_hand(recipe: Recipe, on_step: Callable[[int, int], None]) -> None:
    """Run the same steps as in a short script, without log, run files or signal handlers."""
    prepared, train = prepare(recipe), recipe.train
    model = prepared.model.train()
    optimizer = build_optimizer(model, train)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-9, _COST_STEPS)
    gates = set(gate_parameters(model).values())
    network = [parameter for parameter in model.parameters() if parameter not in gates]
    for step, (images, labels) in zip(range(_COST_STEPS), _batches(prepared.training), strict=False):
        loss = F.cross_entropy(model(images), labels) + train.batch_penalty * normswap.batch_dependence(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network, train.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        loss.item()  # every training loop reads the loss
        on_step(step, _COST_STEPS)


def _batches(data: Data) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    epoch = 0
    while True:
        yield from data.epoch(epoch)
        epoch += 1


def _peak(name: str) -> int:
    """Return the peak memory of the process in bytes, at the end of the last step."""
    peak = 0

    def measure(*_: int) -> None:
        nonlocal peak
        peak = process_memory("VmHWM")

    with tempfile.TemporaryDirectory() as folder:
        {"engine": _by_engine, "hand": _by_hand}[name](_cost_recipe(Path(folder)), measure)
    return peak


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(found: dict[str, Any]) -> str:
    after = {(arm, batch): _of(found, arm, batch, "after") for arm, batch in product(ARMS, BATCHES)}
    lines = [
        "# Accuracy of the recipe for small batches",
        "",
        f"Written by `make recipes` (`python -m benchmarks.finetuning.recipes`). {found.get('provenance', '')}",
        "",
        "`normswap finetune digits_small_batch`: a network trained with Batch Normalization on clean digits is",
        "fine-tuned on digits with other colours, texture, contrast and noise, for 4 epochs of 400 images at every",
        "batch size. Accuracy on 250 test images in percent, mean of the seeds (one value per seed). The columns with",
        "batch statistics are ablations: there the `bn` branch normalizes with the batch in training, as BN does.",
        "",
        "| batch size | " + " | ".join(title for title, _ in ARMS.values()) + " |",
        "|---|" + "---|" * len(ARMS),
        *(f"| {batch} | " + " | ".join(_mean_and_seeds(after[arm, batch]) for arm in ARMS) + " |" for batch in BATCHES),
        "",
        *_verdicts(after),
        "",
        "Before training, the recipe: " + _mean_and_seeds(_of(found, "recipe", 1, "before")) + ".",
        "",
        *_cost_lines(found.get("cost")),
    ]
    return "\n".join(lines) + "\n"


def _of(found: dict[str, Any], arm: str, batch: int, key: str) -> list[float]:
    return [run[key] for run in found["runs"] if (run["arm"], run["batch"]) == (arm, batch)]


def _mean_and_seeds(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


def _verdicts(after: dict[tuple[str, int], list[float]]) -> list[str]:
    """Compare the loss of accuracy from batches of 4 to single images with the targets."""
    lost = {arm: statistics.mean(after[arm, 4]) - statistics.mean(after[arm, 1]) for arm in ARMS if after[arm, 1]}
    targets = {
        "recipe": (lost.get("recipe", 0) <= MAX_LOSS, f"target at most {MAX_LOSS:g}"),
        "bn": (lost.get("bn", 0) >= MIN_LOSS_OF_BN, f"expected at least {MIN_LOSS_OF_BN:g}"),
    }
    lines = ["Loss of accuracy from batches of 4 to single images, in points:", ""]
    for arm, points in lost.items():
        verdict = ""
        if arm in targets:
            met, text = targets[arm]
            verdict = f" ({text}: {'met' if met else '**not met**'})"
        lines.append(f"- {ARMS[arm][0]}: {points:.1f}{verdict}")
    return lines


def _cost_lines(cost: dict[str, Any] | None) -> list[str]:
    if cost is None:
        return []

    def verdict(ratio: float) -> str:
        return f"{ratio:.3f}, {'met' if ratio <= MAX_COST else '**not met**'}"

    return [
        "## Cost of the training loop",
        "",
        f"Ratio to the same steps written by hand (converted `resnet18`, 8 images of 64 pixels, {_COST_STEPS} steps);",
        f"target at most {MAX_COST:g}:",
        "",
        f"- CPU time, median of {len(cost['times'])} ratios in one process: {verdict(cost['time'])}",
        f"- peak memory of a process, {cost['peaks'][0] / 1e6:.0f} to {cost['peaks'][1] / 1e6:.0f} MB, medians of 3: "
        f"{verdict(cost['memory'])}",
    ]


if __name__ == "__main__":
    main()
