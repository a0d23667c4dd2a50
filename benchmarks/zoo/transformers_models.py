"""The transformers architectures with batch norms, randomly initialized from their configurations.

They were found by building every class of the auto mappings on `meta`, and by searching the modeling files for norms
that an option enables. Transformer stacks are cut to two layers; other reductions are in the rows.
"""

from collections.abc import Iterator
from functools import partial, reduce
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.zoo.catalog import Entry
from benchmarks.zoo.transformers_parts import (
    BATCH,
    QFORMER,
    SMALL_LANGUAGE_MODEL,
    EncoderAndDecoder,
    Row,
    audio_in_prompt,
    clip,
    features,
    first_token,
    image_in_prompt,
    images,
    inner,
    noise,
    series,
    spoken_labels,
    text,
    timed_series,
    with_decoder,
    with_more,
    with_text,
)
from benchmarks.zoo.transformers_vision import VISION_ROWS

_AUDIO = [
    Row("ClapConfig", "ClapModel", with_text(features((1, 1001, 64)))),
    Row("ClapAudioConfig", "ClapAudioModel ClapAudioModelWithProjection", features((1, 1001, 64)), depth=None),
    Row(
        "ClapAudioConfig",
        "ClapAudioModel",
        features((4, 1001, 64), is_longer=torch.ones(BATCH, 1, dtype=torch.bool)),
        {"enable_fusion": True},
        variant="fusion",
        depth=None,
    ),
    Row("CanaryConfig", "CanaryModel CanaryForConditionalGeneration", with_decoder(features((96, 128)))),
    Row("CohereAsrConfig", "CohereAsrModel CohereAsrForConditionalGeneration", with_decoder(features((96, 128)))),
    Row("FastSpeech2ConformerConfig", "FastSpeech2ConformerModel", with_more(text(high=70), spoken_labels)),
    Row(
        "FastSpeech2ConformerWithHifiGanConfig",
        "FastSpeech2ConformerWithHifiGan",
        with_more(text(high=70), spoken_labels),
    ),
    Row(
        "GraniteSpeechConfig",
        "GraniteSpeechForConditionalGeneration",
        audio_in_prompt(160),
        {
            "text_config": inner("granite", **SMALL_LANGUAGE_MODEL),
            "audio_token_index": 190,
            "projector_config": QFORMER,
        },
    ),
    Row(
        "GraniteSpeechPlusConfig",
        "GraniteSpeechPlusForConditionalGeneration",
        audio_in_prompt(160),
        {
            "text_config": inner("granite", **SMALL_LANGUAGE_MODEL),
            "audio_token_index": 190,
            "projector_config": QFORMER,
        },
    ),
    Row("GraniteSpeech5EncoderConfig", "GraniteSpeech5Encoder", features((96, 320))),
    Row("GraniteSpeech5CTCConfig", "GraniteSpeech5ForCTC", features((96, 320))),
    Row(
        "HubertConfig",
        "HubertModel HubertForCTC",
        features((4000,), name="input_values"),
        {"conv_pos_batch_norm": True},
    ),
    Row("LasrEncoderConfig", "LasrEncoder", features((96, 128))),
    Row("LasrCTCConfig", "LasrForCTC", features((96, 128))),
    Row("ParakeetEncoderConfig", "ParakeetEncoder", features((96, 80))),
    Row("ParakeetCTCConfig", "ParakeetForCTC", features((96, 80))),
    Row("ParakeetTDTConfig", "ParakeetForTDT", with_more(features((96, 80)), first_token)),
    Row("ParakeetRNNTConfig", "ParakeetForRNNT", with_more(features((96, 80)), first_token)),
    Row(
        "SeamlessM4TConfig",
        "SeamlessM4TForSpeechToText SeamlessM4TModel",
        with_decoder(features((48, 160))),
        {
            "vocab_size": 200,
            "t2u_vocab_size": 200,
            "hidden_size": 256,
            "speech_encoder_intermediate_size": 512,
            "encoder_ffn_dim": 512,
            "decoder_ffn_dim": 512,
        },
    ),
    Row(
        "SpeechT5Config",
        "SpeechT5ForTextToSpeech",
        with_more(text(high=70), lambda _: {"decoder_input_values": noise(BATCH, 8, 80), "use_cache": False}),
    ),
    Row(
        "Wav2Vec2ConformerConfig",
        "Wav2Vec2ConformerModel Wav2Vec2ConformerForCTC Wav2Vec2ConformerForSequenceClassification "
        "Wav2Vec2ConformerForAudioFrameClassification Wav2Vec2ConformerForXVector Wav2Vec2ConformerForPreTraining",
        features((4000,), (16000,), name="input_values"),
        {"vocab_size": 100},
    ),
]

_SERIES = [
    Row(
        "InformerConfig",
        "InformerModel",
        timed_series,
        {"prediction_length": 8, "context_length": 54, "num_time_features": 1, "distil": True},
    ),
    Row("PatchTSTConfig", "PatchTSTModel PatchTSTForClassification PatchTSTForRegression", series(1, 32)),
    Row("PatchTSMixerConfig", "PatchTSMixerModel PatchTSMixerForPrediction", series(1, 32), {"norm_mlp": "BatchNorm"}),
]

# An object, because the default misspells the architecture and a dict of it fails its validation.
_REPVIT = transformers.TimmWrapperConfig(
    architecture="repvit_m1", model_args={"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}
)
_OTHERS = [
    Row("AlignConfig", "AlignModel", with_text(images()), nested={"vision_config.depth_coefficient": 1.0}),
    Row("EdgeTamVisionConfig", "EdgeTamVisionModel", images(256), {"backbone_config": _REPVIT}),
    Row(
        "EdgeTamConfig",
        "EdgeTamModel",
        with_more(images(1024), lambda _: {"input_points": torch.full((BATCH, 1, 1, 2), 500.0)}),
        {"vision_config": {"backbone_config": _REPVIT}},
    ),
    Row(
        "EfficientLoFTRConfig",
        "EfficientLoFTRModel EfficientLoFTRForKeypointMatching",
        features((2, 3, 128, 128), name="pixel_values"),
    ),
    Row("Emu3VQVAEConfig", "Emu3VQVAE", clip, {"base_channels": 32, "hidden_size": 128}, view=EncoderAndDecoder),
    Row(
        "FastVlmConfig",
        "FastVlmForConditionalGeneration",
        image_in_prompt(256),
        {"text_config": inner("qwen2", **SMALL_LANGUAGE_MODEL), "image_token_id": 190},
    ),
    Row("GroupViTConfig", "GroupViTModel", with_text(images())),
    Row(
        "PerceiverConfig",
        "PerceiverForImageClassificationConvProcessing",
        images(224),
        {"num_cross_attention_heads": 1, "num_self_attends_per_block": 2, "num_latents": 32, "d_latents": 64},
    ),
    Row("Sam3LiteTextTextConfig", "Sam3LiteTextTextModel", text()),
    Row("SuperGlueConfig", "SuperGlueForKeypointMatching", features((2, 3, 64, 64), name="pixel_values")),
]

ROWS = (*VISION_ROWS, *_AUDIO, *_SERIES, *_OTHERS)

SAMPLE: tuple[str, ...] = ()

_DEPTH_NAMES = (
    "num_hidden_layers",
    "encoder_layers",
    "decoder_layers",
    "num_layers",
    "speech_encoder_layers",
    "num_attention_layers",
)
# Stacks with other names for the number of layers are cut in their rows.


def entries() -> Iterator[Entry]:
    """Yield every model of every row. A family is a modeling file."""
    for row in ROWS:
        for name in row.models.split():
            cls = getattr(transformers, name)
            yield Entry(
                zoo="transformers",
                name=f"{name} ({row.variant})" if row.variant else name,
                family=cls.__module__.split(".")[2],
                build=partial(_build, name, row),
                inputs=row.inputs,
                reduced=_reduction(row),
            )


def _build(name: str, row: Row) -> nn.Module:
    config = configuration(row)
    model = getattr(transformers, name)._from_config(config)
    return row.view(model) if row.view else model


def configuration(row: Row) -> Any:
    """Return the configuration of a row with its options, nested options and depth."""
    config = getattr(transformers, row.config)(**row.options)
    if row.depth is not None:
        _cut_depth(config, row.depth, set())
    for path, value in row.nested.items():
        *owners, name = path.split(".")
        setattr(reduce(getattr, owners, config), name, value)
    return config


def _cut_depth(config: Any, depth: int, seen: set[int]) -> None:
    if id(config) in seen:
        return
    seen.add(id(config))
    for name in _DEPTH_NAMES:
        value = vars(config).get(name)
        if isinstance(value, int) and value > depth:
            setattr(config, name, depth)
            for listed in ("layer_types", "mlp_layer_types"):
                if isinstance(vars(config).get(listed), list):
                    setattr(config, listed, vars(config)[listed][:depth])
    for value in list(vars(config).values()):
        if isinstance(value, transformers.PreTrainedConfig):
            _cut_depth(value, depth, seen)


def _reduction(row: Row) -> str:
    parts = [f"stacks of {row.depth} layers"] if row.depth is not None else []
    return "; ".join([*parts, *(f"{name}={value!r}" for name, value in (row.options | row.nested).items())])
