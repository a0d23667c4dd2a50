"""Every model of `timm.list_models()`."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import timm
from torch import nn

from benchmarks.zoo.catalog import Entry, noise

BATCH = 2
SIZE, MIDDLE, SMALL = 128, 192, 64

# The smallest model of every file of timm.models that has batch norms, printed by `python -m
# benchmarks.zoo.run --sample`.
SAMPLE = (
    "convmixer_768_32",
    "cpubone_nano",
    "cs3darknet_focus_s",
    "cspnext_tiny",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "ese_vovnet19b_slim_dw",
    "fasternet_t0",
    "fastvit_t8",
    "ghostnet_050",
    "halonet_h1",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "legacy_seresnet18",
    "legacy_xception",
    "levit_128s",
    "lowformer_b0",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "nasnetalarge",
    "nextvit_small",
    "pnasnet5large",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "resnetv2_18",
    "rexnet_100",
    "selecsls42",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "test_byobnet",
    "test_coatnet",
    "test_efficientnet",
    "test_resnet",
    "tiny_vit_5m_224",
    "tresnet_m",
    "vgg11_bn",
    "visformer_tiny",
    "vit_small_resnet50d_s16_224",
    "volo_d1_224",
    "xception41p",
    "xcit_large_24_p8_224",
)
SAMPLED_FROM = "1.0.31"


def entries() -> Iterator[Entry]:
    """Yield every model that timm defines. Its family is the file that defines it."""
    for name in timm.list_models():
        if not timm.model_entrypoint(name).__module__.startswith("timm."):
            continue  # registered by another package
        config = timm.get_pretrained_cfg(name)
        fixed = config is not None and config.fixed_input_size and min(config.input_size[1:]) > SIZE
        yield Entry(
            zoo="timm",
            name=name,
            family=timm.model_entrypoint(name).__module__.rpartition(".")[2],
            build=partial(_build_for_size if fixed else _build, name),
            inputs=_inputs,
            smaller=_small_input,
        )


def _build(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=False)


def _build_for_size(name: str) -> nn.Module:
    """Build a model with a fixed image size for the small size, if it has an argument for it."""
    try:
        return timm.create_model(name, pretrained=False, img_size=SIZE)
    except (TypeError, ValueError, AssertionError, RuntimeError):
        return _build(name)


def _inputs(model: nn.Module) -> list[Any]:
    channels, height, width = model.pretrained_cfg["input_size"]  # type: ignore[index]
    sizes = [(min(height, SIZE), min(width, SIZE)), (min(height, MIDDLE), min(width, MIDDLE)), (height, width)]
    return [noise(BATCH, channels, *size) for size in dict.fromkeys(sizes)]


def _small_input(model: nn.Module) -> Any:
    return noise(BATCH, model.pretrained_cfg["input_size"][0], SMALL, SMALL)  # type: ignore[index]
