"""The detectors of detection.toml: Faster R-CNN and RetinaNet on a feature pyramid over an ImageNet network."""

from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from normswap.checkpoints.architecture.registry import build_architecture
from normswap.finetune.pretrained import build_pretrained

# At 1/4, 1/8 and 1/16 of the resolution; a pyramid adds 1/32.
BACKBONE = "timm:tf_efficientnet_lite0,features_only=True,out_indices=(1,2,3)"
_LEVELS = ("0", "1", "2")
_ANCHORS = ((8,), (16,), (32,), (64,))


def build_model(
    network: str = "faster_rcnn", classes: int = 5, size: int = 96, width: int = 64, imagenet: bool = True
) -> nn.Module:
    """Return a detector.

    Args:
        network: `faster_rcnn` or `retinanet`.
        classes: their number, with the background.
        size: pixels per side to which images are resized.
        width: channels of the pyramid.
        imagenet: whether the backbone has the weights of ImageNet, or random ones.
    """
    backbone = Pyramid((build_pretrained if imagenet else build_architecture)(BACKBONE), width)
    images = {"min_size": size, "max_size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return {"faster_rcnn": _build_faster_rcnn, "retinanet": _build_retinanet}[network](backbone, classes, images)


class Pyramid(nn.Module):
    """A backbone and its feature pyramid, as torchvision's detectors expect them."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.out_channels = body, width
        self.fpn = FeaturePyramidNetwork(
            body.feature_info.channels(), width, extra_blocks=LastLevelMaxPool(), norm_layer=nn.BatchNorm2d
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of each level by name."""
        return self.fpn(dict(zip(_LEVELS, self.body(images), strict=True)))


def _build_faster_rcnn(backbone: Pyramid, classes: int, images: dict[str, Any]) -> nn.Module:
    return FasterRCNN(
        backbone,
        classes,
        rpn_anchor_generator=AnchorGenerator(_ANCHORS, ((0.5, 1.0, 2.0),) * len(_ANCHORS)),
        box_roi_pool=MultiScaleRoIAlign([*_LEVELS], output_size=5, sampling_ratio=2),
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=100,
        box_batch_size_per_image=64,
        **images,
    )


def _build_retinanet(backbone: Pyramid, classes: int, images: dict[str, Any]) -> nn.Module:
    sizes = tuple((size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))) for (size,) in _ANCHORS)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return RetinaNet(backbone, classes, anchor_generator=anchors, topk_candidates=200, **images)
