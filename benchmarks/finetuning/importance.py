"""Draw the importance weights that the demo's network has learned -> docs/measured/importance.png.

`python -m benchmarks.finetuning.importance` converts the pretrained network of the demo and fine-tunes it as the demo
does (400 steps at batch size 2, one seed), unless an earlier run has left the file in demo-output/. The picture
contains its values as JSON, so that a test can compare them with what is drawn.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import normswap
from benchmarks.finetuning import demo
from benchmarks.finetuning.evidence.arms import ARMS
from benchmarks.finetuning.evidence.training import finetune
from benchmarks.paths import PAGES, ROOT
from normswap.reports.plots import draw_importance
from normswap.surgery.importance import SiteWeights

PICTURE = PAGES / "importance.png"
FINETUNED = demo.OUTPUT / "efficientnet-lite0.finetuned.pt"


def main() -> int:
    """Draw the picture; return the exit code."""
    if not (ROOT / FINETUNED).exists():
        write_finetuned(ROOT / FINETUNED)
    weights = normswap.importance_weights(normswap.load(ROOT / FINETUNED).model)
    draw(weights, f"{demo.task_name()}, {demo.STEPS} steps at batch size {demo.BATCH}", PICTURE)
    print(f"wrote {PICTURE}")
    return 0


def write_finetuned(path: Path) -> None:
    """Convert the pretrained network, fine-tune it as the demo does, and write it."""
    torch.set_num_threads(1)
    _, file = demo.load_efficientnet_lite0()
    path.parent.mkdir(exist_ok=True)
    normswap.convert_file(file, ROOT / demo.CONVERTED, overwrite=True)
    plan = normswap.load(ROOT / demo.CONVERTED).plan
    task, (rate, gate_rate) = demo.load_task(), demo.RATES["default"]
    torch.manual_seed(demo.SEED)
    model = demo.load_converted(task.network, task)
    finetune(
        ARMS["default"],
        model,
        task,
        rate=rate,
        gate_rate=gate_rate,
        steps=demo.STEPS,
        batch=demo.BATCH,
        seed=demo.SEED,
    )
    normswap.save(model, path, plan=plan, architecture="timm:tf_efficientnet_lite0,num_classes=10")


def draw(weights: Mapping[str, SiteWeights], caption: str, path: Path) -> None:
    """Draw the importance weights of all sites as stacked bars into a PNG file that contains them."""
    figure = Figure(figsize=(11.6, 5), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    draw_importance(figure.subplots(2, 1, sharex=True, sharey=True), weights)
    figure.suptitle(f"EfficientNet-Lite0 fine-tuned on shifted {caption}", fontsize=11)
    values = {fqn: site._asdict() for fqn, site in weights.items()}
    figure.savefig(path, metadata={"Description": json.dumps(values), "Software": "benchmarks.finetuning.importance"})


def read_values(path: Path = PICTURE) -> dict[str, SiteWeights]:
    """Return the importance weights that a picture contains."""
    with Image.open(path) as image:
        values = json.loads(image.info["Description"])
    return {fqn: SiteWeights(**site) for fqn, site in values.items()}


if __name__ == "__main__":
    sys.exit(main())
