"""What the transformers architectures are fed: images, mel features, waveforms, tokens and time series of batch 2.

Each function takes the model and returns its inputs as a list of dicts of keyword arguments, the small one first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from zoo_catalog import noise

BATCH = 2
SIZE = 128
DEFAULT = 224
TOKENS = 12
LOW_TOKEN = 5  # above the special tokens of most vocabularies
Inputs = Callable[[nn.Module], Sequence[Any]]


def tokens(length: int = TOKENS, *, high: int = 90, ending: int | None = None) -> Tensor:
    """Return token ids (2, length), with `ending` in the last place if it is given."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(LOW_TOKEN, high, (BATCH, length), generator=generator, device="cpu")
    if ending is not None:
        ids[:, -1] = ending
    return ids


def images(*sizes: int, channels: int = 3) -> Inputs:
    """Return `pixel_values` of 128 px, then of the default size, or of the sizes given."""

    def inputs(model: nn.Module) -> Sequence[Any]:
        wanted = sizes or (SIZE, _default_size(model.config))
        return [{"pixel_values": noise(BATCH, channels, size, size)} for size in dict.fromkeys(wanted)]

    return inputs


def _default_size(config: Any) -> int:
    for holder in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        size = getattr(holder, "image_size", None)
        if size:
            return int(size if isinstance(size, int) else size[0])
    return DEFAULT


def with_text(inputs: Inputs, *, masked: bool = True, ending: int | None = None) -> Inputs:
    """Return the same with `input_ids` and their mask beside them."""

    def both(model: nn.Module) -> Sequence[Any]:
        ids = tokens(ending=ending)
        text = {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if masked else {})
        return [text | found for found in inputs(model)]

    return both


def text(high: int = 90) -> Inputs:
    """Return `input_ids` below `high` and nothing else."""
    return lambda _model: [{"input_ids": tokens(high=high)}]


def features(*shapes: tuple[int, ...], name: str = "input_features", **more: Any) -> Inputs:
    """Return normal noise of the shapes given, without their batch axis, under a name."""
    return lambda _model: [{name: noise(BATCH, *shape)} | more for shape in shapes]


def with_decoder(inputs: Inputs) -> Inputs:
    """Return the same with the tokens of a decoder, whose cache is off, so that outputs are tensors."""
    return lambda model: [found | {"decoder_input_ids": tokens(), "use_cache": False} for found in inputs(model)]


def with_more(inputs: Inputs, make: Callable[[nn.Module], dict[str, Any]]) -> Inputs:
    """Return the same with further keyword arguments."""
    return lambda model: [found | make(model) for found in inputs(model)]


def audio_in_prompt(mels: int, frames: int = 96) -> Inputs:
    """Return a prompt whose placeholders take the audio features, as many as the model makes of them."""

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
    """Return a prompt whose placeholders take the image features, as many as the model makes of them."""

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
    """Return a batch of one: the position embeddings of TVP allow no other."""
    return [{"input_ids": tokens()[:1], "pixel_values": noise(1, 2, 3, 448, 448)}]


def spoken_labels(_model: nn.Module) -> dict[str, Tensor]:
    """Return what the tokens sound like: two frames each, of 80 mel bands, with pitch and energy."""
    return {
        "duration_labels": torch.full((BATCH, TOKENS), 2),
        "spectrogram_labels": noise(BATCH, 2 * TOKENS, 80),
        "pitch_labels": noise(BATCH, TOKENS, 1),
        "energy_labels": noise(BATCH, TOKENS, 1),
    }


def first_token(_model: nn.Module) -> dict[str, Tensor]:
    """Return the token that a transducer starts with."""
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
    """Return a past and a future with their time features."""
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
