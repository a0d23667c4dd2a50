"""Every model of timm's `list_models()`."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import timm
from torch import nn
from zoo_catalog import Entry, noise

BATCH = 2
SIZE, MIDDLE, SMALL = 128, 192, 64

# The smallest model of every file of timm.models that has batch norms, written by `python benchmarks/zoo.py --sample`.
SAMPLE: tuple[str, ...] = ()


def entries() -> Iterator[Entry]:
    """Return every registered model; its family is the file that defines it."""
    for name in timm.list_models():
        config = timm.get_pretrained_cfg(name)
        fixed = config is not None and config.fixed_input_size and min(config.input_size[1:]) > SIZE
        yield Entry(
            zoo="timm",
            name=name,
            family=timm.model_entrypoint(name).__module__.rpartition(".")[2],
            build=partial(_build_for_size if fixed else _build, name),
            inputs=_inputs,
            smaller=_small_input,
        )


def _build(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=False)


def _build_for_size(name: str) -> nn.Module:
    """A model that is built for one image size: for the small one, where its code lets one say so."""
    try:
        return timm.create_model(name, pretrained=False, img_size=SIZE)
    except (TypeError, ValueError, AssertionError, RuntimeError):
        return _build(name)


def _inputs(model: nn.Module) -> list[Any]:
    channels, height, width = model.pretrained_cfg["input_size"]  # type: ignore[index]
    sizes = [(min(height, SIZE), min(width, SIZE)), (min(height, MIDDLE), min(width, MIDDLE)), (height, width)]
    return [noise(BATCH, channels, *size) for size in dict.fromkeys(sizes)]


def _small_input(model: nn.Module) -> Any:
    return noise(BATCH, model.pretrained_cfg["input_size"][0], SMALL, SMALL)  # type: ignore[index]
