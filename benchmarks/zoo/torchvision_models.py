"""Every model of `torchvision.models.list_models()`, and detectors with frozen backbones.

A detector with pretrained weights has `FrozenBatchNorm2d` in its backbone. Without a download, the same structure is
built here from random weights. Detectors select boxes, and a rounding error can change the selection, so their `view`
returns everything before the selection, and the outputs of the heads on given boxes.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.ops.misc import FrozenBatchNorm2d

from benchmarks.zoo.catalog import Entry, noise

BATCH = 2
SIZE, SMALL = 128, 64
DEFAULT = 224
FRAMES = 8
CLASSES = 5
KEYPOINTS = 17

# The smallest model of every family that has batch norms, printed by `python -m benchmarks.zoo.run --sample`.
SAMPLE = (
    "deeplabv3_mobilenet_v3_large",
    "densenet121",
    "efficientnet_b0",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fcn_resnet50",
    "fcos_resnet50_fpn",
    "googlenet",
    "inception_v3",
    "keypointrcnn_resnet50_fpn",
    "lraspp_mobilenet_v3_large",
    "maskrcnn_resnet50_fpn",
    "maxvit_t",
    "mc3_18",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "quantized_googlenet",
    "quantized_inception_v3",
    "quantized_mobilenet_v2",
    "quantized_mobilenet_v3_large",
    "quantized_resnet18",
    "quantized_shufflenet_v2_x0_5",
    "raft_large",
    "regnet_y_400mf",
    "resnet18",
    "retinanet_resnet50_fpn",
    "s3d",
    "shufflenet_v2_x0_5",
    "ssdlite320_mobilenet_v3_large",
    "vgg11_bn",
)

# Detectors with frozen norms in a pretrained backbone; the versions "v2" and ssdlite keep BatchNorm2d.
FROZEN = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "maskrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "fcos_resnet50_fpn",
)
_FROZEN_STAGES = ("conv1", "bn1", "layer1")


def entries() -> Iterator[Entry]:
    """Yield every registered model, then the detectors with frozen backbones."""
    for name in models.list_models():
        yield _entry(name)
    for name in FROZEN:
        yield _entry(name, frozen=True)


def _entry(name: str, *, frozen: bool = False) -> Entry:
    kind = _kind(name)
    detector = kind == "detection"
    resizing = detector and not name.startswith("ssd")  # SSDs have one fixed size
    options: dict[str, Any] = {"weights": None} | _OPTIONS.get(kind, {}) | _OPTIONS.get(name, {})
    options |= {"min_size": SIZE, "max_size": 160} if resizing else {}
    options |= _FEW_PROPOSALS if "rcnn" in name else {}
    build = partial(_build_frozen if frozen else models.get_model, name, **options)
    return Entry(
        zoo="torchvision",
        name=f"{name} (frozen backbone)" if frozen else name,
        family=_family(name) + (" (frozen backbone)" if frozen else ""),
        build=build,
        inputs=_INPUTS.get(kind, _images),
        smaller=_SMALLER.get(kind),
        view=BeforeSelection if detector else Encoders if kind == "optical_flow" else None,
        reduced="images resized to 128-160 px inside" + ", few proposals" * ("rcnn" in name) if resizing else "",
    )


def _kind(name: str) -> str:
    module = models.get_model_builder(name).__module__.split(".")
    return module[2] if len(module) > 3 else "classification"


def _family(name: str) -> str:
    """Return the file that defines a model."""
    return models.get_model_builder(name).__module__.removeprefix("torchvision.models.")


_OPTIONS: dict[str, dict[str, Any]] = {
    "detection": {"weights_backbone": None, "num_classes": CLASSES},
    "segmentation": {"weights_backbone": None, "aux_loss": True},
    "lraspp_mobilenet_v3_large": {"aux_loss": False},
    "googlenet": {"init_weights": False, "aux_logits": True},
    "inception_v3": {"init_weights": False, "aux_logits": True},
    "quantized_googlenet": {"init_weights": False, "aux_logits": True},
    "quantized_inception_v3": {"init_weights": False, "aux_logits": True},
}


# Each proposal needs a pass through the heads, and the checks run the model dozens of times.
_FEW_PROPOSALS = {
    **dict.fromkeys(("rpn_pre_nms_top_n_train", "rpn_pre_nms_top_n_test"), 40),
    **dict.fromkeys(("rpn_post_nms_top_n_train", "rpn_post_nms_top_n_test"), 20),
    "box_batch_size_per_image": 16,
    "box_detections_per_img": 8,
}


def _build_frozen(name: str, **options: Any) -> nn.Module:
    """Build a detector with the structure of a pretrained one: frozen norms in the backbone and frozen first stages."""
    model = models.get_model(name, **options)
    body: nn.Module = model.backbone.body
    for path, module in list(body.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            owner, _, child = path.rpartition(".")
            setattr(body.get_submodule(owner), child, FrozenBatchNorm2d(module.num_features, module.eps))
    for path, parameter in body.named_parameters():
        if path.split(".")[0] in _FROZEN_STAGES:
            parameter.requires_grad_(False)
    return model


def _images(model: nn.Module) -> Sequence[Any]:
    size = {"Inception3": 299, "QuantizableInception3": 299}.get(type(model).__name__, DEFAULT)
    return [noise(BATCH, 3, s, s) for s in (SIZE, size)]


def _videos(_model: nn.Module) -> Sequence[Any]:
    return [noise(BATCH, 3, FRAMES, 64, 64), noise(BATCH, 3, 16, 112, 112), noise(BATCH, 3, 16, DEFAULT, DEFAULT)]


def _image_pairs(_model: nn.Module) -> Sequence[Any]:
    pair = {"image1": noise(BATCH, 3, SIZE, SIZE), "image2": noise(BATCH, 3, SIZE, SIZE, seed=1)}
    return [pair | {"num_flow_updates": 2}]


def _images_and_targets(_model: nn.Module) -> Sequence[Any]:
    images = [noise(3, SIZE, SIZE, seed=seed) for seed in range(BATCH)]
    return [(images, [_target() for _ in images])]


def _target() -> dict[str, Tensor]:
    boxes = torch.tensor([[8.0, 8.0, 60.0, 70.0], [30.0, 40.0, 120.0, 110.0]], device="cpu")
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8, device="cpu")
    masks[0, 10:60, 10:50] = 1
    masks[1, 50:100, 40:110] = 1
    keypoints = torch.ones(2, KEYPOINTS, 3, device="cpu")
    keypoints[0, :, :2], keypoints[1, :, :2] = 30.0, 75.0
    return {"boxes": boxes, "labels": torch.tensor([1, 2], device="cpu"), "masks": masks, "keypoints": keypoints}


def _small_images(_model: nn.Module) -> Tensor:
    return noise(BATCH, 3, SMALL, SMALL)


def _small_videos(_model: nn.Module) -> Tensor:
    return noise(BATCH, 3, FRAMES // 2, 48, 48)


_SMALLER = dict.fromkeys(("classification", "segmentation", "quantization"), _small_images) | {"video": _small_videos}
_INPUTS = {"detection": _images_and_targets, "video": _videos, "optical_flow": _image_pairs}


class BeforeSelection(nn.Module):
    """A torchvision detector before the selection: features, outputs of the dense head, and heads on given boxes."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> list[Any]:
        """Return all outputs that do not depend on a selection of boxes."""
        batch, resized = self.detector.transform(images, targets)
        features = self.detector.backbone(batch.tensors)
        maps = [features] if isinstance(features, Tensor) else list(features.values())
        if not hasattr(self.detector, "roi_heads"):
            return [*maps, self.detector.head(maps)]
        heads = self.detector.roi_heads
        found: list[Any] = [*maps, self.detector.rpn.head(maps)]
        boxes = [target["boxes"] for target in resized]
        for part in ("box", "mask", "keypoint"):
            pool = getattr(heads, f"{part}_roi_pool", None)
            if pool is not None:
                pooled = getattr(heads, f"{part}_head")(pool(features, boxes, batch.image_sizes))
                found.append(getattr(heads, f"{part}_predictor")(pooled))
        return found


class Encoders(nn.Module):
    """The encoders of RAFT, which contain its norms. The rest always computes in float32."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, image1: Tensor, image2: Tensor, num_flow_updates: int) -> list[Tensor]:
        """Return the features of both images and the context of the first."""
        return [self.flow.feature_encoder(torch.cat([image1, image2])), self.flow.context_encoder(image1)]
