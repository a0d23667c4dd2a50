"""Every model of timm's `list_models()`."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import timm
from torch import nn
from zoo_catalog import Entry, noise

BATCH = 2
SIZE = 128

# The smallest model of every file of timm.models that has batch norms, written by `python benchmarks/zoo.py --sample`.
SAMPLE: tuple[str, ...] = ()


def entries() -> Iterator[Entry]:
    """Return every registered model; its family is the file that defines it."""
    for name in timm.list_models():
        family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
        yield Entry("timm", name, family, partial(timm.create_model, name, pretrained=False), _inputs)


def _inputs(model: nn.Module) -> list[Any]:
    channels, height, width = model.pretrained_cfg["input_size"]  # type: ignore[index]
    sizes = [(min(height, SIZE), min(width, SIZE)), (height, width)]
    return [noise(BATCH, channels, *size) for size in dict.fromkeys(sizes)]
