"""Races of whole networks: a step of the original against one of its conversion."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import timm
import torch
from speed_records import Race
from speed_timing import Clock, Entrant, medians, race, ratios
from torch import Tensor, nn

import normswap

NETWORKS = ("resnet50", "efficientnet_b0", "regnety_032")
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def network_races(
    names: Sequence[str], batch: int, precisions: Sequence[str], *, device: str, clock: Clock, seconds: float
) -> Iterator[Race]:
    """Race timm networks of random weights at 224 pixels, in training and in evaluation, in both layouts.

    Args:
        precisions: `fp32`, or `bf16` for autocast.
        seconds: about how long one race may take.
    """
    threads = torch.get_num_threads()
    for name in names:
        original: nn.Module = timm.create_model(name).to(device)
        x = torch.randn(batch, 3, 224, 224, device=device)
        forms = {"original": original, "converted": normswap.convert(original, x).model}
        for layout, memory_format in _FORMATS.items():
            x = x.contiguous(memory_format=memory_format)
            for precision in precisions:
                for mode in ("train", "eval"):
                    entrants = {
                        form: _entrant(model.to(memory_format=memory_format), x, precision, mode)
                        for form, model in forms.items()
                    }
                    found = race(entrants, clock, seconds)
                    setting = (name, layout, precision, threads, mode, len(found["original"]))
                    yield Race(*setting, medians(found), ratios(found, "original"))


def _entrant(model: nn.Module, x: Tensor, precision: str, mode: str) -> Entrant:
    model.train(mode == "train")
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    if precision == "bf16":
        autocast = lambda: torch.autocast(x.device.type, torch.bfloat16)  # noqa: E731

    def step() -> None:
        with autocast():
            y = model(x)
        y.float().sum().backward()

    def evaluate() -> None:
        with autocast(), torch.no_grad():
            model(x)

    return Entrant(step if mode == "train" else evaluate, lambda: model.zero_grad(set_to_none=True))
