"""Write valid files of every kind that normswap reads or refuses, and the code that must never run.

The mutations damage these files. A new kind of file is one line in `KINDS`.
"""

import argparse
import json
import pickle
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint

import normswap

ARCH = "timm:fuzzing_net"
SHAPE = (2, 3, 8, 8)
INPUT = "x".join(map(str, SHAPE))
_FORMAT = {"format": "pt"}


class FuzzingNet(nn.Module):
    """Two batch norms and few weights, so most damage affects the structure of a file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def fuzzing_net(pretrained: bool = False, **_: Any) -> FuzzingNet:
    """Build the network that `ARCH` names after `register()`."""
    return FuzzingNet()


def register() -> None:
    """Register `ARCH` with timm, so the command line can build it."""
    if not timm.is_model("fuzzing_net"):
        timm.models.register_model(fuzzing_net)


def net() -> FuzzingNet:
    """Return the network of all files, with random running statistics."""
    torch.manual_seed(0)
    model = FuzzingNet()
    for norm in (model.bn1, model.bn2):
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
    return model.eval()


def _state_dict(path: Path) -> None:
    torch.save(net().state_dict(), path)


def _legacy(path: Path) -> None:
    torch.save(net().state_dict(), path, _use_new_zipfile_serialization=False)


def _protocol_4(path: Path) -> None:
    torch.save(net().state_dict(), path, pickle_protocol=4)


def _safetensors(path: Path) -> None:
    safetensors.torch.save_file(net().state_dict(), path, metadata=_FORMAT)


def _module(path: Path) -> None:
    torch.save(net(), path)


def _converted(path: Path) -> None:
    x = torch.randn(SHAPE)
    conversion = normswap.convert(net(), x)
    verification = normswap.verify(net(), conversion.model, [x])
    normswap.save(conversion.model, path, plan=conversion.plan, architecture=ARCH, verification=verification)


def _training(path: Path) -> None:
    model = net().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(SHAPE)).sum().backward()
    optimizer.step()
    content = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "arch": "fuzzing_net"}
    torch.save(content, path)


def _full_training(path: Path) -> None:
    model = net().train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model(torch.randn(SHAPE)).sum().backward()
    optimizer.step()
    content = {
        "model": {f"module.{key}": value for key, value in model.state_dict().items()},
        "model_ema": torch.optim.swa_utils.AveragedModel(model).state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict(),
        "args": argparse.Namespace(model="fuzzing_net", lr=0.1),
    }
    torch.save(content, path)


def _torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net()).save(str(path))


def _exported(path: Path) -> None:
    torch.export.save(torch.export.export(net(), (torch.randn(SHAPE),)), path)


def _lightning(path: Path) -> None:
    """Write a file with the layout of `Trainer.save_checkpoint`."""
    model = net().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(SHAPE)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 1,
        "global_step": 4,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"net.{key}": value for key, value in model.state_dict().items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "a/b.ckpt"}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict()],
        "hyper_parameters": {"lr": 0.1, "layers": [4, 4]},
        "hparams_name": "hparams",
    }
    torch.save(content, path)


def _halves() -> list[dict[str, Tensor]]:
    items = list(net().state_dict().items())
    return [dict(items[:7]), dict(items[7:])]


def _sharded(path: Path, stem: str, ending: str, write: Callable[[dict[str, Tensor], Path], None]) -> None:
    path.mkdir()
    weight_map = {}
    for number, half in enumerate(_halves(), 1):
        name = f"{stem}-0000{number}-of-00002{ending}"
        write(half, path / name)
        weight_map |= dict.fromkeys(half, name)
    index = {"metadata": {"total_size": 1096}, "weight_map": weight_map}
    (path / f"{stem}{ending}.index.json").write_text(json.dumps(index))


def _safetensors_shards(path: Path) -> None:
    _sharded(path, "model", ".safetensors", lambda half, file: safetensors.torch.save_file(half, file, _FORMAT))


def _torch_shards(path: Path) -> None:
    _sharded(path, "pytorch_model", ".bin", torch.save)


def _distributed(path: Path) -> None:
    content = {"model": net().state_dict(), "epoch": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed_checkpoint.save(content, checkpoint_id=path, no_dist=True)


@dataclass(frozen=True)
class Kind:
    """A kind of file or folder.

    Attributes:
        make: writes a valid one.
        suffix: of its name.
        arch: value of `--arch`, or None for no option.
        written: suffix of the converted file if it differs.
    """

    name: str
    make: Callable[[Path], None]
    suffix: str = ".pt"
    arch: str | None = ARCH
    written: str | None = None


KINDS = (
    Kind("state dict", _state_dict),
    Kind("legacy pickle", _legacy),
    Kind("pickle protocol 4", _protocol_4),
    Kind("safetensors", _safetensors, ".safetensors"),
    Kind("pickled module", _module, arch=None),
    Kind("converted torch file", _converted, arch=None),
    Kind("converted safetensors", _converted, ".safetensors", arch=None),
    Kind("training checkpoint", _training),
    Kind("training checkpoint with EMA", _full_training),
    Kind("Lightning checkpoint", _lightning, ".ckpt"),
    Kind("safetensors shards", _safetensors_shards, ""),
    Kind("torch shards", _torch_shards, ""),
    Kind("distributed checkpoint", _distributed, ""),
    Kind("TorchScript", _torchscript),
    Kind(".pt2 of torch.export", _exported, ".pt2", written=".pt"),
)


@dataclass(frozen=True)
class Payloads:
    """Code that creates the file `marker` when it runs, as pickle opcodes and as names of architectures."""

    marker: Path
    calls: tuple[bytes, ...]
    architectures: tuple[str, ...]

    @property
    def pickles(self) -> tuple[bytes, ...]:
        """Return each call as a complete pickle."""
        return tuple(b"\x80\x02" + call + b"." for call in self.calls)


class Material(NamedTuple):
    """The input of a mutation: random numbers, another valid file, payloads."""

    random: Random
    other: bytes
    payloads: Payloads


Mutation = Callable[[bytes, Material], bytes | None]


class _Touching:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def plant(folder: Path) -> Payloads:
    """Write the files of the payloads to `folder` and return the payloads."""
    marker = folder / "code-ran"
    code = f"open({str(marker)!r}, 'w').close()"
    (folder / "payload.py").write_text(f"{code}\ndef build():\n    {code}\n")
    _plant_remote_code(folder / "remote", code)
    nested = folder / "payload.pkl"
    nested.write_bytes(pickle.dumps(_Touching(marker)))
    calls = (
        _call(b"posix\nsystem", f"touch {marker}"),
        _call(b"builtins\nexec", code),
        _call(b"builtins\neval", code),
        _call(b"subprocess\ngetoutput", f"touch {marker}"),
        _call(b"runpy\nrun_path", str(folder / "payload.py")),
        # The pickle module maps this Python 2 name to `builtins`.
        _call(b"__builtin__\neval", code),
    )
    file = folder / "payload.py"
    architectures = (
        f"{file}:build",
        "payload:build",
        "payload.py:build",
        f"timm:{file}:build",
        f"{ARCH},pretrained=True",
        f"{ARCH},checkpoint_path={nested}",
        f"{ARCH},x=__import__('os').system('touch {marker}')",
        f"torchvision:{file}:build",
        f"hf:{folder}",
        "timm:hf-hub:some/model",
        "timm:local-dir:" + str(folder),
        f"hf:{folder / 'remote'}",
        f"hf:{folder / 'remote'},trust_remote_code=True",
        f"hf:.,trust_remote_code=True,x={folder}",
        f"{ARCH},pretrained_cfg={{'file': {str(nested)!r}}}",
        f"{ARCH},act_layer={folder}/payload",
        f"{ARCH},num_classes={10**12}",
        f"{ARCH},layers={'(' * 3000}",
        "timm:resnet10t,num_classes=1000000",
        "timm:resnet10t,layers=(9000,1,1,1)",
    )
    return Payloads(marker, calls, architectures)


def _plant_remote_code(folder: Path, code: str) -> None:
    """Write a folder whose configuration names Python code, which transformers runs with trust_remote_code."""
    folder.mkdir(exist_ok=True)
    (folder / "conf.py").write_text(f"{code}\nfrom transformers import PretrainedConfig\nC = PretrainedConfig\n")
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["ResNetModel"], "model_type": "x", "auto_map": {"AutoConfig": "conf.C"}})
    )


def _call(name: bytes, argument: str) -> bytes:
    text = argument.encode()
    return b"c" + name + b"\nX" + struct.pack("<I", len(text)) + text + b"\x85R"
