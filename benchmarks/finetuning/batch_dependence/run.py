"""Fine-tune with a penalty on batch dependence (`make batch-dependence`) -> docs/measured/batch-dependence.md.

The loss is `loss + penalty * normswap.batch_dependence(model)`, with four penalties at four batch sizes on two tasks of
scanned digits. An interrupted run resumes; `--rewrite` only writes the page from the records.
"""

import argparse
import math
import time
from functools import cache
from pathlib import Path

import torch
from torch import nn

import normswap
from benchmarks.finetuning.batch_dependence.records import RATE, STEPS, Cell, Run, Study, cells, read_study, write_study
from benchmarks.finetuning.batch_dependence.report import write_report
from benchmarks.finetuning.batch_dependence.training import FineTuning, finetune
from benchmarks.finetuning.training import accuracy, prepare_transfer, train_source
from benchmarks.paths import PAGES, RESULTS
from benchmarks.provenance import provenance
from normswap.finetune.data.digits import IMAGE_SIZE, Digits, prepare_digits

PAGE = "batch-dependence"


def main() -> None:
    """Run what the records do not contain, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to run (default 0 1 2)")
    parser.add_argument("--output", type=Path, default=PAGES, help="existing folder (default docs/measured)")
    parser.add_argument("--rewrite", action="store_true", help="only write the page from the records")
    options = parser.parse_args()
    records = (RESULTS if options.output == PAGES else options.output) / f"{PAGE}.json"
    study = read_study(records) or Study(provenance(), [])
    torch.set_num_threads(1)  # small images are not faster with two threads; one thread sums in a fixed order
    known = {run.cell for run in study.runs}
    missing = [] if options.rewrite else [cell for cell in cells(options.seeds) if cell not in known]
    for number, cell in enumerate(missing, 1):
        study.runs.append(run_cell(cell))
        write_study(study, records)
        print(f"{number}/{len(missing)} {study.runs[-1]}", flush=True)
    write_report(study, options.output / f"{PAGE}.md", planned=len(list(cells(options.seeds))))
    print(f"wrote {options.output}/{PAGE}.md")


def run_cell(cell: Cell) -> Run:
    """Fine-tune one converted network and measure it."""
    start = time.monotonic()
    network, digits = trained_network(cell.task, cell.seed)
    model = convert(network, cell.statistics)
    settings = FineTuning(steps=STEPS, batch_size=cell.batch_size)
    losses = finetune(model, digits.target.train, rate=RATE, settings=settings, seed=cell.seed, penalty=cell.penalty)
    return Run(
        **cell._asdict(),
        accuracy=accuracy(model, digits.target.test),
        bn_share=bn_share(model),
        is_finite=math.isfinite(losses[-1]),
        seconds=time.monotonic() - start,
        steps=settings.steps,
        rate=RATE,
        gate_rate=settings.gate_rate,
    )


def convert(network: nn.Module, statistics: str) -> nn.Module:
    """Return the network converted by normswap with branches that are not matched, as these records were measured."""
    example = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    return normswap.convert(network, example, bn_statistics=statistics, match=False).model  # type: ignore[arg-type]


def bn_share(model: nn.Module) -> float:
    """Return the mean importance weight of BN over all sites and both gates."""
    sites = normswap.importance_weights(model).values()
    return sum(site.mean["bn"] + site.var["bn"] for site in sites) / (2 * len(sites))


@cache
def trained_network(task: str, seed: int) -> tuple[nn.Module, Digits]:
    """Return the BN network trained on the source of a task, with the head for its target, and the images."""
    digits = {"shift": prepare_digits, "transfer": prepare_transfer}[task](seed=seed)
    network = train_source(digits, seed=seed)
    if task == "transfer":
        torch.manual_seed(seed)
        network.reset_classifier(int(digits.target.train.labels.max()) + 1)  # type: ignore[operator]
    return network, digits
