"""The parts of the rows of transformers architectures: the row, nested configurations, and example inputs.

An input function gets the model and returns a list of dicts of keyword arguments, smallest input first, batch size 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.catalog import noise

BATCH = 2
SIZE = 128
DEFAULT = 224
TOKENS = 12
LOW_TOKEN = 5  # above the special tokens of most vocabularies
Inputs = Callable[[nn.Module], Sequence[Any]]


@dataclass(frozen=True)
class Row:
    """One configuration and the models built from it.

    Attributes:
        options: arguments of the configuration.
        nested: attributes of nested configurations by path, set after the stacks are cut to `depth`.
        variant: distinguishes rows of the same class.
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
    """Return a nested configuration as a dict."""
    return {"model_type": name, **options}


RESNET = inner("resnet", depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"])
# The strides of a detector, which halve the size at each stage; the default is for text recognition.
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
    """The image tokenizer of Emu3 without quantization; it has no forward method."""

    def __init__(self, tokenizer: nn.Module) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, clip: Tensor) -> Tensor:
        """Return the clip (2, frames, 3, height, width) encoded and decoded."""
        latent = self.tokenizer.quant_conv(self.tokenizer.encoder(clip).permute(0, 2, 1, 3, 4))
        latent = latent.permute(0, 2, 1, 3, 4)
        restored = self.tokenizer.post_quant_conv(latent.permute(0, 2, 1, 3, 4)).permute(0, 2, 1, 3, 4)
        return self.tokenizer.decoder(restored, latent)


def tokens(length: int = TOKENS, *, high: int = 90, ending: int | None = None) -> Tensor:
    """Return token ids (2, length), with `ending` as the last token if given."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(LOW_TOKEN, high, (BATCH, length), generator=generator, device="cpu")
    if ending is not None:
        ids[:, -1] = ending
    return ids


def images(*sizes: int, channels: int = 3) -> Inputs:
    """Return `pixel_values` of 128 px, then of the default size, or of the sizes given."""

    def inputs(model: nn.Module) -> Sequence[Any]:
        chosen = sizes or (SIZE, _default_size(model.config))
        return [{"pixel_values": noise(BATCH, channels, size, size)} for size in dict.fromkeys(chosen)]

    return inputs


def _default_size(config: Any) -> int:
    for holder in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        size = getattr(holder, "image_size", None)
        if size:
            return int(size if isinstance(size, int) else size[0])
    return DEFAULT


def with_text(inputs: Inputs, *, masked: bool = True, ending: int | None = None) -> Inputs:
    """Return the inputs with `input_ids` and their mask added."""

    def both(model: nn.Module) -> Sequence[Any]:
        ids = tokens(ending=ending)
        text = {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if masked else {})
        return [text | found for found in inputs(model)]

    return both


def text(high: int = 90) -> Inputs:
    """Return only `input_ids` below `high`."""
    return lambda _model: [{"input_ids": tokens(high=high)}]


def features(*shapes: tuple[int, ...], name: str = "input_features", **more: Any) -> Inputs:
    """Return normal noise of the given shapes, without the batch axis, under a name."""
    return lambda _model: [{name: noise(BATCH, *shape)} | more for shape in shapes]


def with_decoder(inputs: Inputs) -> Inputs:
    """Return the inputs with tokens for the decoder and no cache, so outputs are tensors."""
    return lambda model: [found | {"decoder_input_ids": tokens(), "use_cache": False} for found in inputs(model)]


def with_more(inputs: Inputs, make: Callable[[nn.Module], dict[str, Any]]) -> Inputs:
    """Return the inputs with more keyword arguments."""
    return lambda model: [found | make(model) for found in inputs(model)]


def audio_in_prompt(mels: int, frames: int = 96) -> Inputs:
    """Return a prompt with one placeholder for each audio feature of the model."""

    def inputs(model: nn.Module) -> Sequence[Any]:
        config = model.config
        window, query = config.window_size, config.window_size // config.downsample_rate
        places = -(-frames // window) * query
        ids = torch.cat([torch.full((BATCH, places), config.audio_token_index), tokens(4)], 1)
        mask = torch.ones(BATCH, places, dtype=torch.bool)
        return [
            {
                "input_ids": ids,
                "input_features": noise(BATCH, frames, mels),
                "input_features_mask": mask,
                "attention_mask": torch.ones_like(ids),
                "use_cache": False,
            }
        ]

    return inputs


def image_in_prompt(size: int) -> Inputs:
    """Return a prompt with one placeholder for each image feature of the model."""

    def inputs(model: nn.Module) -> Sequence[Any]:
        config = model.config
        picture = noise(BATCH, 3, size, size)
        with torch.no_grad():
            found = model.get_image_features(picture)
        rows = found.pooler_output if hasattr(found, "pooler_output") else found
        places = sum(row.shape[0] for row in rows) // BATCH
        ids = torch.cat([torch.full((BATCH, places), config.image_token_id), tokens(4)], 1)
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": picture, "use_cache": False}]

    return inputs


def series(channels: int, length: int, **more: Any) -> Inputs:
    """Return `past_values` (2, length, channels)."""
    return lambda _model: [{"past_values": noise(BATCH, length, channels)} | more]


def clip(_model: nn.Module) -> list[dict[str, Tensor]]:
    """Return a clip of four frames."""
    return [{"clip": noise(BATCH, 4, 3, 32, 32)}]


def one_film(_model: nn.Module) -> list[dict[str, Tensor]]:
    """Return a batch of one video; the position embeddings of TVP require it."""
    return [{"input_ids": tokens()[:1], "pixel_values": noise(1, 2, 3, 448, 448)}]


def spoken_labels(_model: nn.Module) -> dict[str, Tensor]:
    """Return labels for the tokens: two frames each, of 80 mel bands, with pitch and energy."""
    return {
        "duration_labels": torch.full((BATCH, TOKENS), 2),
        "spectrogram_labels": noise(BATCH, 2 * TOKENS, 80),
        "pitch_labels": noise(BATCH, TOKENS, 1),
        "energy_labels": noise(BATCH, TOKENS, 1),
    }


def first_token(_model: nn.Module) -> dict[str, Tensor]:
    """Return the first token of a transducer."""
    return {"decoder_input_ids": torch.full((BATCH, 1), 7)}


def classes_and_tasks(_model: nn.Module) -> dict[str, Tensor]:
    """Return one class and one task per image, as tokens."""
    ids = tokens()
    return {
        "classes_input_ids": ids,
        "classes_attention_mask": torch.ones_like(ids),
        "tasks_input_ids": ids,
        "tasks_attention_mask": torch.ones_like(ids),
        "classes_structure": torch.ones(BATCH, dtype=torch.long),
    }


def timed_series(model: nn.Module) -> list[dict[str, Tensor]]:
    """Return past and future values with their time features."""
    length = model.config.context_length + max(model.config.lags_sequence)
    ahead = model.config.prediction_length
    return [
        {
            "past_values": noise(BATCH, length),
            "past_time_features": noise(BATCH, length, 1),
            "past_observed_mask": torch.ones(BATCH, length),
            "future_values": noise(BATCH, ahead, seed=1),
            "future_time_features": noise(BATCH, ahead, 1),
            "use_cache": False,
        }
    ]
