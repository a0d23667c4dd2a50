"""The networks of segmentation.toml: an ImageNet encoder, and a decoder of torchvision or of another library."""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCNHead

from normswap.checkpoints.architecture.registry import build_architecture
from normswap.finetune.pretrained import build_pretrained

ENCODER = "timm:tf_efficientnet_lite0,features_only=True"
_AUXILIARY, _LAST = 2, -1  # stages of the encoder


def build_model(network: str = "deeplabv3", classes: int = 5, imagenet: bool = True) -> nn.Module:
    """Return a network with logits for each pixel.

    Args:
        network: `deeplabv3` or `unet`.
        imagenet: whether the encoder has the weights of ImageNet, or random ones.
    """
    build = build_pretrained if imagenet else build_architecture
    model = {"deeplabv3": _build_deeplab, "unet": _build_unet}[network](build, classes)
    # With the mean and the standard deviation of the images that the encoder was trained on.
    model.pretrained_cfg = build_architecture(ENCODER).pretrained_cfg
    return model


class Stages(nn.Module):
    """Two stages of the encoder by the names that torchvision's decoders expect."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of two stages."""
        features = self.encoder(images)
        return OrderedDict(out=features[_LAST], aux=features[_AUXILIARY])


def _build_deeplab(build: Callable[[str], nn.Module], classes: int) -> nn.Module:
    encoder = build(f"{ENCODER},output_stride=16")
    channels = encoder.feature_info.channels()
    return DeepLabV3(
        Stages(encoder), DeepLabHead(channels[_LAST], classes, (2, 4, 6)), FCNHead(channels[_AUXILIARY], classes)
    )


def _build_unet(build: Callable[[str], nn.Module], classes: int) -> nn.Module:
    import segmentation_models_pytorch

    name = ENCODER.removeprefix("timm:").partition(",")[0]
    model = segmentation_models_pytorch.Unet(f"tu-{name}", encoder_weights=None, classes=classes)
    model.encoder.model.load_state_dict(build(ENCODER).state_dict())
    return model
