"""Checks of architectures that come from a file: only models of installed zoos, only keywords from a fixed list.

A record, the metadata of safetensors and a `config.json` may come from an untrusted source. An architecture in them is
built only if building it cannot run code, download or open anything: it needs a known name, listed keywords, and
numbers or plain words as values. Everything else needs `trust=True`. `limit_allocation` bounds the memory that building
a model may allocate, in proportion to the file.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from normswap.errors import ArchitectureError

# --- names, keywords and configurations

_MAX_NUMBER = 1_000_000  # such as a number of classes
_MAX_ITEMS, _MAX_DEPTH = 256, 3  # of tuples
_PLAIN_WORD = re.compile(r"[A-Za-z0-9_+-]{0,40}")  # never the name of a file, a repository or a module
# Keywords of models in timm and torchvision that accept numbers, booleans and tuples of these.
_NUMERIC_KEYWORD_LIST = """
    abs_win_pos_embed aa_stem_only always_partition attention_dropout attn attn_drop_rate attn_groups
    attn_head_dim_reduction attn_mlp attn_mlp_ratio attn_only_layer_scale attn_pool_mlp_ratio attn_pool_num_heads
    attn_ratio aux_logits aux_loss avg_down base_dim base_dims base_width basic bg_iou_thresh bias bidirectional
    block_channels block_config block_layers block_reduce_first bn_eps bn_momentum bn_size bottle_ratio
    bottleneck_width_ratio box_batch_size_per_image box_bg_iou_thresh box_detections_per_img box_fg_iou_thresh
    box_nms_thresh box_positive_fraction box_score_thresh cardinality center_sampling_radius ch_div channel_attention
    channel_attn_v2 channel_multiplier channels class_token cls_attn_layers cls_ratio conv_bias conv_init conv_mlp
    conv_ratio cpe_act crop_scale crpe_window d2_scales deepen_factor depth depth_list depth_mult depth_multiplier
    depth_token_only depths detections_per_img dims dim dim_mul dim_reduced distillation distilled down_kernel_size
    down_pad down_patch_size down_stride downsample_block downsample_expand_ratios downsample_kernel_size
    downsample_padding downsample_ratio downsamples drop drop_block_rate drop_block_size drop_connect_rate
    drop_path_rate drop_rate dropout dropout_aux dynamic_img_pad dynamic_img_size embed_dim embed_dims eta expand_groups
    expand_ratio expansion_ratio extra_norm_period extra_norm_stage fc_norm feature_dim features_only ffn ffn_ratio
    fg_iou_thresh final_chs final_norm first_stride fix_init fix_stem fix_group_size focal_levels focal_windows
    fused_conv fused_downsample global_att_blocks global_attn_indexes global_block_counts global_pos_size group groups
    group_size growth_rate growth_rates head_bias head_conv head_dim head_hidden_size head_init_scale head_mul head_norm
    head_norm_first head_widths heads hidden_dim hidden_size hidden_sizes image_mean image_size image_std img_scale
    img_size in_channels in_chans in_features inc_sec init_channels init_values init_weights initial_chs inner_dim
    inplanes input_3x3 input_size inter_channels intermediate_size iou_thresh is_downsample_block k_r k_sec kernel_size
    kernel_sizes kernels key_dim last_channel layer_scale layer_scale_init_value layer_scale_init_values layers
    layerscale_value legacy levels linear lkc_use_act local_conv_size local_up_to_layer locality_strength ls_init_value
    mask_unit_attn mask_unit_size max_size mbconv_expand_ratio memory_efficient merge_size min_size mix_block_ratio
    mlp_bias mlp_dim mlp_dropout mlp_ratio mlp_ratio_token_only mlp_ratios msfa_indices msfa_output_resolution
    multi_conv n_div named_blocks neck_chans nlhb nms_thresh no_embed_class norm_eps norm_momentum normalize_modulator
    num_anchors num_blocks num_blocks_list num_classes num_convs num_features num_heads num_heads_inner
    num_heads_outer num_init_features num_keypoints num_kv_heads num_labels num_layers num_levels num_reg_tokens
    num_rnn_layers num_vit out_features out_indices outlook_attention output_stride parallel_depth partial_dim
    partition_size patch_drop_rate patch_embed_kernel patch_embed_padding patch_embed_stride patch_kernel patch_norm
    patch_padding patch_size patch_sizes patch_stride pool_include_prefix pool_size pooling_kernel_size pooling_scale
    pos_drop_rate pos_embed_grid_size position_embedding_size positive_fraction post_layers pre_norm preact
    prior_probability proj_bias proj_drop_rate q_pool q_stride qk_dim qk_norm qkv_bias qkv_fused quantize reduction
    ref_feat_shape reg_tokens rel_pos_dim rel_pos_embed reparam replace_stem_pool replace_stride_with_dilation
    repmixer_kernel_size representation_size res_scale_init_values residual_pool residual_with_cls_embed
    rope_grid_offset rope_jitter_coords rope_mrope_section rope_rescale_coords rope_rotate_half rope_shift_coords
    rope_temperature rope_theta round_limit round_nearest rpn_batch_size_per_image rpn_bg_iou_thresh rpn_fg_iou_thresh
    rpn_nms_thresh rpn_positive_fraction rpn_post_nms_top_n_test rpn_post_nms_top_n_train rpn_pre_nms_top_n_test
    rpn_pre_nms_top_n_train rpn_score_thresh scale scale_attn_inner scale_attn_norm scale_mlp scale_mlp_norm
    score_thresh se_downsamples se_from_exp se_ratio sep_pos_embed sequential_attn serial_depths shared_rel_pos
    shortcut_root size small small_kernels spatial_size split_bn squeeze_ratio sr_ratios ssd_expand stages
    stages_out_channels stages_repeats standardize state_dim stem_bias stem_channels stem_chs stem_expand_ratio
    stem_hidden_dim stem_kernel_size stem_mid_norm stem_norm stem_size stem_stride stem_use_scale_branch stem_width
    stochastic_depth_prob strict_img_size stride strides swiglu_align_to swiglu_mlp temporal_size tokens_norm
    topk_candidates transform_input transformer_depths transformer_drop_path transition_compression_ratio
    use_abs_pos use_abs_pos_emb use_aux_head use_checkpoint use_clipped_linears use_conv use_expand_proj use_fc_norm
    use_grn use_lab use_layer_scale use_mix_token use_mlp_head use_msfa use_overlap_down use_pos_emb use_pos_embed
    use_post_norm use_post_norm_in_modulation use_post_transformer_norm use_pre_transformer_norm use_rel_pos
    use_rel_pos_bias use_rope use_rot_pos_emb use_shared_rel_pos_bias v2 vit_stem widen_factor width width_factor
    width_list width_mult width_per_group widths window_ratio window_size window_sizes window_spec with_fc
    zero_init_last zero_init_residual
    """
_NUMERIC_KEYWORDS = frozenset(_NUMERIC_KEYWORD_LIST.split())
# Keywords that also accept words, which these packages look up in their own tables.
_TEXT_KEYWORD_LIST = """
    aa_layer act_layer attn_act_layer attn_stage attn_type attn_types attn_upsample block_type conv_layer down_op
    downsample dw_act_layer embed_norm_layer encoder_pool fc_act_layer fc_norm feature_location global_pool head head_fn
    local_mbconv_norm mlp_act norm_layer norm_layer_cl output_fmt pad_type pconv_fw_type pool_type pos_embed
    post_layers qk_norm rel_pos_type rope_grid_indexing rope_type se_layer spatial_conv stem_type token_mixers types
    union version weight_init
    """
_TEXT_KEYWORDS = frozenset(_TEXT_KEYWORD_LIST.split())
# Keys of a config.json with which transformers runs code, downloads or opens something, for any model.
_FORBIDDEN_KEY = re.compile(
    r"auto_map|trust_remote_code|custom_\w+|\w*checkpoint_(path|file|url)|pretrained\w*_(path|file|url)|cache_dir"
    r"|_?(attn|experts)_implementation\w*|quantization_config|adapter_\w+|use_kernels|kernel_config"
)
# Keys of a config.json without effect on the model, such as the names of classes.
_IGNORED_KEYS = frozenset(
    (
        "_name_or_path", "name_or_path", "_commit_hash", "id2label", "label2id", "label_names", "license", "url",
        "labels", "pretrained_cfg", "finetuning_task", "torchscript", "transformers_version", "task_specific_params",
    )
)  # fmt: skip
_PLAIN_TEXT = re.compile(r"[^/\\:\x00-\x1f]{0,200}")


def check_keywords(what: str, keywords: Mapping[str, Any]) -> None:
    """Refuse keywords that a file may not set.

    Args:
        what: the subject of the error message, such as `"it"`.
        keywords: the keywords for the builder of a model.

    Raises:
        ArchitectureError: a keyword is not in the list, or its value is not a number, a plain word or a tuple of these.
    """
    for key, value in keywords.items():
        if key not in _NUMERIC_KEYWORDS and key not in _TEXT_KEYWORDS:
            raise ArchitectureError(f"{what} has the keyword {key[:60]!r}, which a file may not set")
        if not _is_plain_value(value, words=key in _TEXT_KEYWORDS):
            expected = "numbers or a plain word" if key in _TEXT_KEYWORDS else "numbers"
            raise ArchitectureError(
                f"{what} has {key}={value!r:.60}, expected {expected} up to {_MAX_NUMBER:,} from a file"
            )


def check_configuration(what: str, config: Any, *, models: Callable[[], Sequence[str]]) -> dict[str, Any]:
    """Return a `config.json` of transformers or timm without the keys that have no effect on the model.

    Args:
        what: the name of the file for the error message.
        config: its content.
        models: returns the names of timm's models.

    Raises:
        ArchitectureError: it is not an object, or would run code, download or open something.
    """
    if not isinstance(config, dict):
        raise ArchitectureError(f"{what}: expected a JSON object, got {type(config).__name__}")
    for key, value in _iter_entries(config):
        if _FORBIDDEN_KEY.fullmatch(key) and value not in (None, False, {}, []):
            raise ArchitectureError(f"{what} has {key!r}, which may run code or download files")
        if key == "model_args":
            if not isinstance(value, dict | None):
                raise ArchitectureError(f"{what} has model_args={value!r:.60}, expected an object of keywords")
            check_keywords(f"{what}: model_args", value or {})
        elif key in ("architecture", "backbone") and value is not None:
            _check_model(f"{what} has {key}={value!r:.60}", value, models())
        elif isinstance(value, str) and not _PLAIN_TEXT.fullmatch(value):
            raise ArchitectureError(f"{what} has {key}={value!r:.60}, expected a plain value, not a path or a URL")
    labels = config.get("num_labels")
    if labels is not None and not _is_plain_value(labels, words=False):
        raise ArchitectureError(f"{what} has num_labels={labels!r:.60}, expected at most {_MAX_NUMBER:,}")
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "name_or_path")}
    # The weights come from the checkpoint, so the backbone needs none of its own.
    return kept | ({"use_pretrained_backbone": False} if "use_pretrained_backbone" in kept else {})


def check_folder_configuration(
    folder: Path, config: Mapping[str, Any], *, models: Callable[[], Sequence[str]]
) -> dict[str, Any]:
    """Return the `config.json` of a folder as `check_configuration` does, after a check of timm's top-level keywords.

    Raises:
        ArchitectureError: as `check_configuration`, with advice for the user.
    """
    what = f"hf:{folder}: config.json"
    try:
        checked = check_configuration(what, config, models=models)
        if "architecture" in checked:
            check_keywords(what, {key: checked[key] for key in ("num_classes", "global_pool") if key in checked})
    except ArchitectureError as error:
        raise ArchitectureError(
            f"{error}: pass the architecture with architecture=, or trust=True if you trust the source of the folder"
        ) from None
    return checked


def _check_model(what: str, value: Any, models: Sequence[str]) -> None:
    model_name = value.partition(".")[0] if isinstance(value, str) and _PLAIN_TEXT.fullmatch(value) else ""
    if model_name not in models:
        matches = difflib.get_close_matches(model_name, models, n=3) or ["none, see timm.list_models()"]
        raise ArchitectureError(f"{what}, expected a model of timm; nearest: {', '.join(matches)}")


def _iter_entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All keys with their values at any depth; each string in a list has the key of the list."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in _IGNORED_KEYS:
                yield name, item
                yield from () if name == "model_args" else _iter_entries(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from [(key, item)] if isinstance(item, str) else _iter_entries(item, key)


def _is_plain_value(value: Any, *, words: bool, depth: int = 0) -> bool:
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int | float):
        return (
            math.isfinite(value) and abs(value) <= _MAX_NUMBER
            if isinstance(value, float)
            else abs(value) <= _MAX_NUMBER
        )
    if isinstance(value, str):
        return words and _PLAIN_WORD.fullmatch(value) is not None
    if isinstance(value, tuple | list) and depth < _MAX_DEPTH and len(value) <= _MAX_ITEMS:
        return all(_is_plain_value(item, words=words, depth=depth + 1) for item in value)
    return False


# --- memory

# Room for dtypes wider than in the file, buffers that no file has, and temporaries of the initialization.
_MEMORY_FACTOR, _MIN_BYTES = 16, 2**30
_CALLS_PER_TENSOR, _MIN_CALLS = 16, 1_000


@contextmanager
def limit_allocation(path: Path, tensors: int) -> Iterator[None]:
    """Limit the memory that building a model in this block may allocate, in proportion to the file at `path`.

    Args:
        path: the file or folder with the weights.
        tensors: its number of tensors.

    Raises:
        ArchitectureError: the block exceeds the limit.
    """
    files = [entry for entry in path.iterdir() if entry.is_file()] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    with _AllocationLimit(size * _MEMORY_FACTOR + _MIN_BYTES, tensors * _CALLS_PER_TENSOR + _MIN_CALLS):
        yield


class _AllocationLimit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, size: int, calls: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._size = self._remaining_bytes = size
        self._remaining_calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if not func.is_view and not func._schema.is_mutable:
            self._remaining_calls -= 1
            self._remaining_bytes -= _estimate_result_bytes(func, args, options)
            if self._remaining_bytes < 0 or self._remaining_calls < 0:
                raise ArchitectureError(
                    f"building it needs more than {self._size / 1e6:,.0f} MB, or thousands of tensors more than the "
                    "file has, so it is not the architecture of this file"
                )
        return func(*args, **options)


def _estimate_result_bytes(func: Any, args: Any, options: dict[str, Any]) -> int:
    """The bytes that a call would allocate, computed on the meta device; 0 if the operation does not support it."""
    if any(argument.name == "device" for argument in func._schema.arguments):
        options = {**options, "device": "meta"}
    try:
        with torch.no_grad():
            result = func(*tree_map(_to_meta, args), **tree_map(_to_meta, options))
    except Exception:  # noqa: BLE001 - not every operation works without values
        return 0
    return sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def _to_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
