"""Measure how much of a trained network is left without BN and without a step of training -> docs/measured/start.md.

Photographs: the share of crops to which ImageNet's EfficientNet-Lite0 gives the same class as before. Digits: the
accuracy of the networks of the evidence on their own clean digits. `--rewrite` only writes the page from the records.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from benchmarks.finetuning.evidence.norms import group_norm, replace
from benchmarks.finetuning.evidence.settings import digits
from benchmarks.finetuning.evidence.settings.task import accuracy
from benchmarks.finetuning.pretrained import IMAGE_SIZE, load_efficientnet_lite0, to_input
from benchmarks.paths import PAGES, RESULTS
from benchmarks.provenance import provenance
from benchmarks.records import read_document, write_document
from normswap.finetune.data.digits import prepare_digits

RECORDS, PAGE = RESULTS / "start.json", PAGES / "start.md"
PHOTOGRAPHS = ("cat", "coffee", "rocket")
CROPS, SIDES = 40, (0.7, 1.0)  # of each photograph; shares of its short side
SEEDS = (0, 1, 2)
BATCH = 20
# Targets for start="ln", in percent: all crops, those of each photograph, and the share of the accuracy on digits.
LEAST_AGREEMENT, LEAST_PER_PHOTOGRAPH, LEAST_ACCURACY = 85.0, 60.0, 97.0

Build = Callable[[nn.Module, Tensor], nn.Module]


def _converted(network: nn.Module, example: Tensor, **options: Any) -> nn.Module:
    return normswap.convert(network, example, **options).model


STARTS: Mapping[str, tuple[str, Build]] = {
    "ln": ('`start="ln"`', partial(_converted, start="ln")),
    "gn": ('`start="gn"`, 32 groups', partial(_converted, start="gn")),
    "raw_ln": ('`start="ln"`, `match=False`', partial(_converted, start="ln", match=False)),
    "carried_gn": (
        "GroupNorm of 32 groups with the scale and shift of BN",
        lambda model, _: replace(model, group_norm),
    ),
}


def main() -> int:
    """Measure what the records do not contain, and write the page; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewrite", action="store_true", help="only write the page from the records")
    torch.set_num_threads(1)  # one thread sums in a fixed order
    found: dict[str, Any] = read_document(RECORDS) or {"photographs": [], "digits": []}
    if not parser.parse_args().rewrite:
        found["provenance"] = provenance()
        for record in _missing(found):
            print(record, flush=True)
            write_document(RECORDS, found)
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


def _missing(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Add the records that are missing, one after the other."""
    for kind, measure in (("photographs", photographs_after), ("digits", digits_after)):
        known = {(record["start"], record["seed"]) for record in found[kind]}
        for seed in SEEDS:
            for start in STARTS:
                if (start, seed) not in known:
                    found[kind].append({"start": start, "seed": seed, **measure(start, seed)})
                    yield found[kind][-1]


# --- photographs ------------------------------------------------------------------------------------------------------


def photographs_after(start: str, seed: int, *, crops: int = CROPS) -> dict[str, Any]:
    """Return the share of crops of each photograph with the same first class as before, in percent; and the error.

    The error is the relative L2 difference of all outputs.
    """
    network, _ = load_efficientnet_lite0()
    images = {name: crops_of(name, crops, seed=seed) for name in PHOTOGRAPHS}
    model = STARTS[start][1](network, images["cat"][:2]).eval()
    before, after = ({name: _outputs(each, inputs) for name, inputs in images.items()} for each in (network, model))
    same = {name: accuracy(after[name].argmax(1), before[name].argmax(1)) for name in images}
    difference = sum(float((after[name] - before[name]).square().sum()) for name in images)
    norm = sum(float(before[name].square().sum()) for name in images)
    return {"same": same, "error": (difference / norm) ** 0.5}


def crops_of(name: str, count: int, *, seed: int) -> Tensor:
    """Return random square crops of a photograph of scikit-image as inputs of the network."""
    import skimage.data

    image = torch.tensor(getattr(skimage.data, name)()).permute(2, 0, 1)[None].float()
    generator = torch.Generator().manual_seed(1000 * seed + PHOTOGRAPHS.index(name))
    return to_input(torch.cat([_crop(image, generator) for _ in range(count)]))


def _crop(image: Tensor, generator: torch.Generator) -> Tensor:
    height, width = image.shape[-2:]
    share = SIDES[0] + (SIDES[1] - SIDES[0]) * float(torch.rand((), generator=generator))
    side = round(share * min(height, width))
    top, left = (int(torch.randint(length - side + 1, (), generator=generator)) for length in (height, width))
    square = image[..., top : top + side, left : left + side]
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return F.interpolate(square, size=size, mode="bilinear", antialias=True, align_corners=False).round().clamp(0, 255)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([model(chunk) for chunk in inputs.split(BATCH)])


# --- digits -----------------------------------------------------------------------------------------------------------


def digits_after(start: str, seed: int) -> dict[str, Any]:
    """Return the accuracy on clean and on shifted digits, in percent, before and after."""
    task = digits.shifted(seed)
    clean = prepare_digits(seed=seed).source.test
    model = STARTS[start][1](task.network, task.example()).eval()
    return {
        name: {
            "clean": accuracy(_outputs(each, clean.pixels).argmax(1), clean.labels),
            "shifted": task.evaluate(each, task.test),
        }
        for name, each in (("before", task.network), ("after", model))
    }


# --- the page ---------------------------------------------------------------------------------------------------------


def summary(found: Mapping[str, Any], start: str) -> dict[str, float]:
    """Return the means of the seeds for one start: agreement of all crops and of each photograph, and of accuracy."""
    crops = [record for record in found["photographs"] if record["start"] == start]
    runs = [record for record in found["digits"] if record["start"] == start]
    same = {name: statistics.fmean(record["same"][name] for record in crops) for name in PHOTOGRAPHS}
    return {
        "all": statistics.fmean(same.values()),
        **same,
        "error": statistics.fmean(record["error"] for record in crops),
        "kept": statistics.fmean(100 * run["after"]["clean"] / run["before"]["clean"] for run in runs),
        "least kept": min(100 * run["after"]["clean"] / run["before"]["clean"] for run in runs),
        **{
            f"{when} {kind}": statistics.fmean(run[when][kind] for run in runs)
            for when in ("before", "after")
            for kind in ("clean", "shifted")
        },
    }


def page(found: Mapping[str, Any]) -> str:
    """Return the page."""
    rows = {start: summary(found, start) for start in STARTS}
    ours = rows["ln"]
    titles = {start: title for start, (title, _) in STARTS.items()}
    columns = ("all", *PHOTOGRAPHS)
    photographs = [
        f"| {titles[start]} | {' | '.join(f'{row[name]:.0f}' for name in columns)} | {row['error']:.2f} |"
        for start, row in rows.items()
    ]
    digit_rows = [
        f"| {titles[start]} | {row['after clean']:.1f} | {row['after shifted']:.1f} | "
        f"{row['kept']:.1f} ({row['least kept']:.1f}) |"
        for start, row in rows.items()
    ]
    return _PAGE.format(
        provenance=found["provenance"],
        sides=f"{SIDES[0]:.0%} to {SIDES[1]:.0%}",
        seeds=len(SEEDS),
        crops=CROPS,
        header=" | ".join(columns),
        photographs="\n".join(photographs),
        agreement=f"{LEAST_AGREEMENT:.0f} of all crops ({_met(ours['all'], LEAST_AGREEMENT)})",
        each=f"{LEAST_PER_PHOTOGRAPH:.0f} of each photograph "
        f"({_met(min(ours[name] for name in PHOTOGRAPHS), LEAST_PER_PHOTOGRAPH)})",
        bn=f"| BN | {ours['before clean']:.1f} | {ours['before shifted']:.1f} | 100 |",
        digits="\n".join(digit_rows),
        kept=f"{LEAST_ACCURACY:.0f} with every seed ({_met(ours['least kept'], LEAST_ACCURACY)})",
    )


_PAGE = """# Without BN and without a step of training

Written by `python -m benchmarks.finetuning.start`. {provenance}

`normswap.convert(model, x, start="ln")` replaces every BN by a layer without batch statistics whose branches are
matched to the running statistics. Nothing is trained, and no data are read.

## Photographs

EfficientNet-Lite0 with ImageNet weights: the share of random crops ({sides} of the short side) of three photographs of
scikit-image to which it gives the same first class of 1,000 as before, in percent, and the relative L2 difference of
the outputs. Mean of {seeds} seeds of {crops} crops per photograph.

| norms | {header} | output difference |
|---|---|---|---|---|---|
{photographs}

Target for `start="ln"`: at least {agreement} and {each}.

## Digits

A small ResNet, trained with BN on clean digits. Accuracy in percent on clean digits and on digits with other colours,
texture, contrast and noise, mean of {seeds} seeds. The last column is the share of the accuracy on clean digits that is
left, with the least of the seeds.

| norms | clean | shifted | left |
|---|---|---|---|
{bn}
{digits}

Target for `start="ln"`: at least {kept}.
"""


def _met(value: float, target: float) -> str:
    return "met" if value >= target else "missed"


if __name__ == "__main__":
    sys.exit(main())
