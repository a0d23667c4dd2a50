"""Fashion-MNIST: 70,000 photographs of clothes, 28 x 28, in 10 classes (MIT licence), from the Debian package.

The package is installed nowhere: its files are unpacked into a cache folder. `benchmarks.finetuning.shift` renders the
images for a network.
"""

import gzip
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

PACKAGE = "dataset-fashion-mnist"
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_INSTALLED = Path("/usr/share/datasets/fashion-mnist")
_FILES = {"train": "train", "test": "t10k"}


def cache_folder() -> Path:
    """Return the folder for data that benchmarks unpack or train: `normswap` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normswap"


def load(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Return the images (N, 28, 28) of 8 bits and the labels (N,): 60,000 of "train", 10,000 of "test".

    Raises:
        FileNotFoundError: the files are not here and cannot be downloaded; the message tells what to do.
    """
    folder = locate()
    images = _read(folder / f"{_FILES[split]}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
    labels = _read(folder / f"{_FILES[split]}-labels-idx1-ubyte.gz", header=8)
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def locate() -> Path:
    """Return the folder with the four files; download and unpack the Debian package if there is none."""
    unpacked = cache_folder() / "fashion-mnist"
    for folder in (_INSTALLED, unpacked):
        if _is_complete(folder):
            return folder
    try:
        _unpack(unpacked)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise FileNotFoundError(
            f"expected Fashion-MNIST in {_INSTALLED} or {unpacked}, and the Debian package {PACKAGE} could not be "
            f"downloaded ({reason}); run `apt-get install {PACKAGE}`, or put the four files "
            f"{{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte.gz into {unpacked}"
        ) from error
    return unpacked


def _is_complete(folder: Path) -> bool:
    names = (f"{part}-{kind}-ubyte.gz" for part in _FILES.values() for kind in ("images-idx3", "labels-idx1"))
    return all((folder / name).is_file() for name in names)


def _unpack(target: Path) -> None:
    """Download the package and move its data files to `target`, all at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        for command in (["apt-get", "download", PACKAGE], ["sh", "-c", "dpkg -x *.deb unpacked"]):
            subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True)
        unpacked = Path(scratch, "unpacked", *_INSTALLED.parts[1:])
        if not _is_complete(target):  # another process may have been faster
            target.mkdir(exist_ok=True)
            for file in unpacked.iterdir():
                os.replace(file, target / file.name)


def _read(path: Path, *, header: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), dtype=np.uint8)[header:].copy()
