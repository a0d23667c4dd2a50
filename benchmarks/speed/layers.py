"""Single layers: the shapes, layouts and dtypes, and the work of each arm on an input."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.speed.arms import ARMS, COPY, Arm
from benchmarks.speed.memory import saved_bytes
from benchmarks.speed.timing.rounds import Work

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
SAVED = (8, 256, 56, 56)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"contiguous": {4: torch.contiguous_format, 5: torch.contiguous_format}} | {
    "channels_last": {4: torch.channels_last, 5: torch.channels_last_3d}
}


@dataclass(frozen=True)
class Setting:
    """A shape in one layout, dtype, number of threads and mode."""

    shape: Shape
    layout: str
    dtype: str
    threads: int
    mode: str

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """The setting of a `Comparison`."""
        return name_of(self.shape), self.layout, self.dtype, self.threads, self.mode


def shapes(batch: int) -> tuple[Shape, ...]:
    """Return the shapes to measure. `batch` is the batch size of the feature maps of ResNet-50."""
    return (*((batch, *shape) for shape in _RESNET), *_OTHERS)


def name_of(shape: Shape) -> str:
    """Return a shape as `NxCx...`."""
    return "x".join(map(str, shape))


def layer_works(setting: Setting, arms: Sequence[Arm] = ARMS, device: str = "cpu") -> dict[str, Work]:
    """Return the work of each arm, on one input for all, with new layers."""
    x = torch.randn(setting.shape, device=device).to(DTYPES[setting.dtype])
    x = x.to(memory_format=LAYOUTS[setting.layout][x.dim()]).requires_grad_()
    dy = torch.randn_like(x)
    trains = setting.mode == "train"
    works = {}
    for arm in arms:
        if setting.mode in arm.modes:
            layer = arm.build(x.shape[1], x.dim(), x.dtype).to(device).train(trains and not arm.is_frozen)
            works[arm.name] = Work(_step(layer, x, dy) if trains else _evaluation(layer, x), arm.every)
    if device == "cuda":
        source, target = x.detach(), torch.empty_like(x)
        works[COPY] = Work(lambda: target.copy_(source))
    return works


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Return a forward and backward pass with all gradients, which are dropped."""
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]

    def step() -> None:
        layer(x).backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return step


def _evaluation(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def evaluate() -> None:
        with torch.no_grad():
            layer(x)

    return evaluate


def saved_by_layers(arms: Sequence[Arm], device: str) -> dict[str, float]:
    """Return the bytes that each layer saves for backward on `SAVED` in float32, divided by the bytes of x."""
    x = torch.randn(SAVED, device=device, requires_grad=True)
    size = x.untyped_storage().nbytes()
    return {
        arm.name: saved_bytes(arm.build(x.shape[1], x.dim(), x.dtype).to(device).train(not arm.is_frozen), x) / size
        for arm in arms
    }
