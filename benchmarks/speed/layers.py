"""Compare single layers over shapes, layouts, dtypes and threads, and whole networks with their conversions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
from torch import Tensor, nn

import normswap
from benchmarks.speed.competitors import Competitor, competitors, compiled
from benchmarks.speed.memory import saved_bytes
from benchmarks.speed.records import BASE, COPY, Race
from benchmarks.speed.timing import Clock, Entrant, medians, race, ratios

Shape = tuple[int, ...]

# Feature maps of ResNet-50 at 224 pixels, without the batch.
_RESNET = (
    (64, 112, 112),
    (64, 56, 56),
    (256, 56, 56),
    (128, 28, 28),
    (512, 28, 28),
    (256, 14, 14),
    (1024, 14, 14),
    (512, 7, 7),
    (2048, 7, 7),
)
_OTHERS = ((1, 64, 256, 256), (1, 32, 64, 64, 64), (2, 512, 7, 7), (2, 2048, 7, 7))
_QUICK = ((8, 256, 56, 56), (8, 512, 7, 7), (2, 512, 7, 7))
_SAVED = (8, 256, 56, 56)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"contiguous": {4: torch.contiguous_format, 5: torch.contiguous_format}} | {
    "channels_last": {4: torch.channels_last, 5: torch.channels_last_3d}
}

NETWORKS = ("resnet50", "efficientnet_b0", "regnety_032")
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def shapes(batch: int, *, quick: bool) -> tuple[Shape, ...]:
    """Return the shapes to measure. `batch` is the batch size of the feature maps of ResNet-50."""
    return _QUICK if quick else (*((batch, *shape) for shape in _RESNET), *_OTHERS)


def name_of(shape: Shape) -> str:
    """Return a shape as `NxCx...`."""
    return "x".join(map(str, shape))


def layer_races(
    measured: Sequence[Shape],
    dtypes: Sequence[str],
    threads: Sequence[int],
    *,
    device: str,
    clock: Clock,
    seconds: float,
    with_compiled: bool,
) -> Iterator[Race]:
    """Compare all layers, in training and in evaluation.

    Args:
        seconds: approximate time of one comparison.
        with_compiled: also measure layers compiled by `torch.compile`, in float32.
    """
    for count in threads:
        torch.set_num_threads(count)
        for dtype in dtypes:
            entered = competitors(device) + (compiled() if with_compiled and dtype == "fp32" else [])
            for layout, formats in LAYOUTS.items():
                for shape in measured:
                    torch.compiler.reset()  # otherwise new shapes count as recompilations of the same layer
                    x = torch.randn(shape, device=device).to(DTYPES[dtype])
                    x = x.to(memory_format=formats[len(shape)]).requires_grad_()
                    dy = torch.randn_like(x)
                    built = {c: c.build(x.shape[1], x.dim(), x.dtype).to(device) for c in entered}
                    for mode in ("train", "eval"):
                        found = race(_entrants(built, x, dy, mode), clock, seconds)
                        rounds = len(found[BASE])
                        setting = (name_of(shape), layout, dtype, count, mode, rounds)
                        yield Race(*setting, medians(found), ratios(found, BASE))


def _entrants(built: Mapping[Competitor, nn.Module], x: Tensor, dy: Tensor, mode: str) -> dict[str, Entrant]:
    works = {"train": _step, "eval": _evaluation}
    entrants = {
        competitor.name: Entrant(
            works[mode](layer.train(mode == "train"), x, dy), _zero_gradients(layer, x), competitor.around
        )
        for competitor, layer in built.items()
    }
    if x.is_cuda:
        target = torch.empty_like(x)
        entrants[COPY] = Entrant(lambda: target.copy_(x.detach()), lambda: None)
    return entrants


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Return a forward and backward pass with all gradients."""
    return lambda: layer(x).backward(dy)


def _evaluation(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    def evaluate() -> None:
        with torch.no_grad():
            layer(x)

    return evaluate


def _zero_gradients(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    def zero_gradients() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)

    return zero_gradients


def saved_by_layers(device: str) -> tuple[str, dict[str, float]]:
    """Return a shape and the bytes that each layer saves for backward on it in float32, divided by the bytes of x."""
    x = torch.randn(_SAVED, device=device, requires_grad=True)
    size = x.untyped_storage().nbytes()
    found = {}
    for competitor in competitors(device):
        layer = competitor.build(x.shape[1], x.dim(), x.dtype).to(device)
        with competitor.around():
            found[competitor.name] = saved_bytes(layer, x) / size
    return name_of(_SAVED), found


def network_races(
    names: Sequence[str], batch: int, precisions: Sequence[str], *, device: str, clock: Clock, seconds: float
) -> Iterator[Race]:
    """Compare timm networks with random weights at 224 pixels, in training and evaluation, in both layouts.

    Args:
        precisions: `fp32`, or `bf16` for autocast.
        seconds: approximate time of one comparison.
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
                        form: _network_entrant(model.to(memory_format=memory_format), x, precision, mode)
                        for form, model in forms.items()
                    }
                    found = race(entrants, clock, seconds)
                    setting = (name, layout, precision, threads, mode, len(found["original"]))
                    yield Race(*setting, medians(found), ratios(found, "original"))


def _network_entrant(model: nn.Module, x: Tensor, precision: str, mode: str) -> Entrant:
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
