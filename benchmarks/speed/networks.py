"""Whole networks, original and converted: how they are built, and the work of a step."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import timm
import torch
import torchvision
from torch import Tensor, nn

import normswap
from benchmarks.speed.arms import move_gates
from benchmarks.speed.timing.rounds import Work

ORIGINAL = "original"
CONVERTED = "converted"
MOVED_GATES = "converted, moved gates"
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Network:
    """A network with random weights and the shape of its input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts to measure."""
        return tuple(FORMATS) if len(self.shape) == 4 else ("contiguous",)


def _convnext() -> nn.Module:
    model: nn.Module = timm.create_model("convnext_tiny", norm_layer="batchnorm2d", conv_mlp=True)
    return model


def _unet() -> nn.Module:
    import segmentation_models_pytorch as smp  # here, because it takes seconds

    model: nn.Module = smp.Unet("resnet18", encoder_weights=None)
    return model


NETWORKS = {
    "resnet50": Network(lambda: timm.create_model("resnet50"), (8, 3, 128, 128)),
    "efficientnet_b0": Network(lambda: timm.create_model("efficientnet_b0"), (8, 3, 128, 128)),
    "regnety_032": Network(lambda: timm.create_model("regnety_032"), (8, 3, 128, 128)),
    "convnext_tiny with BatchNorm": Network(_convnext, (8, 3, 128, 128)),
    "U-Net (resnet18)": Network(_unet, (1, 3, 128, 128)),
    "r3d_18": Network(lambda: torchvision.models.video.r3d_18(), (1, 3, 8, 64, 64)),
}


def build_forms(network: Network, device: str) -> tuple[dict[str, nn.Module], Tensor]:
    """Return the original, its conversion, and the conversion with moved gates, and an input."""
    original = network.build().to(device)
    x = torch.randn(network.shape, device=device)
    converted = normswap.convert(original, x).model
    return {ORIGINAL: original, CONVERTED: converted, MOVED_GATES: move_gates(copy.deepcopy(converted))}, x


def network_works(
    forms: dict[str, nn.Module], x: Tensor, layout: str, mode: str, precision: str = "fp32"
) -> dict[str, Work]:
    """Return a training step without optimizer or an evaluation of each form; `bf16` is by autocast."""
    if x.dim() == 4:
        x = x.contiguous(memory_format=FORMATS[layout])
    works = {}
    for name, model in forms.items():
        if x.dim() == 4:
            model.to(memory_format=FORMATS[layout])
        works[name] = Work(_step(model.train(mode == "train"), x, mode, precision))
    return works


def _step(model: nn.Module, x: Tensor, mode: str, precision: str) -> Callable[[], None]:
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    if precision == "bf16":
        autocast = lambda: torch.autocast(x.device.type, torch.bfloat16)  # noqa: E731

    def step() -> None:
        with autocast():
            y = model(x)
        y.float().sum().backward()
        model.zero_grad(set_to_none=True)

    def evaluate() -> None:
        with autocast(), torch.no_grad():
            model(x)

    return step if mode == "train" else evaluate
