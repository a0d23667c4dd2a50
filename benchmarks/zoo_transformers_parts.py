"""What the rows of transformers architectures are made of: the record itself, and configurations inside others."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from zoo_transformers_inputs import Inputs


@dataclass(frozen=True)
class Row:
    """One configuration and the models built from it.

    `options` go to the configuration, `nested` into those inside it, by attribute path, after the stacks are cut to
    `depth`. `variant` tells rows of one class apart.
    """

    config: str
    models: str
    inputs: Inputs
    options: dict[str, Any] = field(default_factory=dict)
    nested: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    depth: int | None = 2
    view: Callable[[nn.Module], nn.Module] | None = None


def inner(name: str, **options: Any) -> dict[str, Any]:
    """A configuration inside another, as the dict that its owner takes."""
    return {"model_type": name, **options}


RESNET = inner("resnet", depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"])
# The strides of a detector: halved at each stage; the default is a recogniser's, which keeps the length of a line.
LCNET = inner(
    "pp_lcnet_v4",
    out_features=[f"stage{i}" for i in range(1, 5)],
    block_configs=[
        [[3, 96, 96, 1, True]],
        [[3, 96, 96, 2, False]],
        [[3, 96, 192, 2, False], [3, 192, 192, 1, True]],
        [[3, 192, 384, 2, False], [3, 384, 384, 1, True]],
    ],
)
QFORMER = inner("blip_2_qformer", encoder_hidden_size=1024, num_hidden_layers=1)
DINO = inner("dinov2", image_size=64, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
NARROW_VIT = {"hidden_size": 192, "num_attention_heads": 3}
NARROW = {**NARROW_VIT, "intermediate_size": 384}
SMALL_LANGUAGE_MODEL = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
LARGE_KERNELS = {
    "kernel_list": [3, 2, 2],
    "scale_factor_list": [1, 2, 4, 8],
    "intraclass_block_config": {
        "reduce_channel": [1, 1, 0],
        "return_channel": [1, 1, 0],
        **{
            f"{kind}_{ratio}ratio": [[a, b], [1, 1], [a // 2, b // 2]]
            for size, ratio in ((7, "long"), (5, "mid"), (3, "short"))
            for kind, a, b in (
                ("vertical_long_to_small_conv", size, 1),
                ("horizontal_small_to_long_conv", 1, size),
                ("symmetric_conv_long", size, size),
            )
        },
    },
}


class EncoderAndDecoder(nn.Module):
    """Emu3's image tokenizer without the choice of a code between its halves; it has no forward of its own."""

    def __init__(self, tokenizer: nn.Module) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, clip: Tensor) -> Tensor:
        """Return the clip (2, frames, 3, height, width) encoded and decoded."""
        latent = self.tokenizer.quant_conv(self.tokenizer.encoder(clip).permute(0, 2, 1, 3, 4))
        latent = latent.permute(0, 2, 1, 3, 4)
        restored = self.tokenizer.post_quant_conv(latent.permute(0, 2, 1, 3, 4)).permute(0, 2, 1, 3, 4)
        return self.tokenizer.decoder(restored, latent)
