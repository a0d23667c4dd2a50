"""Small checkpoint files, good and bad, for the tests of the rooms that read and write them."""

import pathlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

ARCH = "timm:test_resnet,num_classes=7"
SHAPE = (2, 3, 64, 64)
SITES = 15


def scrambled(model: nn.Module) -> nn.Module:
    """Give every BN running statistics and affine parameters that matter."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    return model


def small_model() -> nn.Module:
    """The network that `ARCH` names, in evaluation."""
    return scrambled(timm.create_model("test_resnet", num_classes=7)).eval()


class TiedNet(nn.Module):
    """Two names for one BN, and one weight shared by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.again = self.norm
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.again(self.norm(self.stem(x))).mean((2, 3))))


class FunctionalNet(nn.Module):
    """A functional norm site beside a module site."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        return nn.functional.batch_norm(x, self.mean, self.var, training=self.training)


class Payload:
    """Creates the file `marker` when it is unpickled: what must never happen."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (self.marker,)


def _legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _protocol_4(content: Any, path: Path) -> None:
    torch.save(content, path, pickle_protocol=4)


def _plain(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


# Every way in which a pickle can be wrapped, by name.
PICKLED: dict[str, Callable[[Any, Path], None]] = {
    "torch zip": torch.save,
    "legacy": _legacy,
    "protocol 4": _protocol_4,
    "plain pickle": _plain,
}


def hostile_contents(marker: Path) -> dict[str, Any]:
    """Objects that create `marker` when they are unpickled."""
    state = small_model().state_dict()
    return {
        "the payload itself": Payload(marker),
        "among tensors": {**state, "extra": Payload(marker)},
        "as a key": {**state, ("a", Payload(marker)): torch.zeros(1)},
    }
