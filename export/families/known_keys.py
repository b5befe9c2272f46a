"""Which keys of a ``config.json`` vzip knows: an unknown one of the vision side is refused.

A model made of LLaVA's code has LLaVA's keys and some of its own: a second tower, a resampler,
other scales. Read without those, it would be exported as a model that it isn't. So each key is

* known: read, or of no effect on what tower and projector compute;
* off: null, false, zero or empty, as transformers and LLaVA write what isn't used;
* of the vision side, by its name or because it stands in a part that is: refused by name;
* any other: named in a warning, and taken to be the language model's.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

from vzip.export.families import Config
from vzip.runtime.config_numbers import inside as _inside
from vzip.runtime.config_numbers import shown
from vzip.runtime.errors import CheckpointError, printable

_log = logging.getLogger(__name__)

OTHER_MODEL = "take a model of a family that 'vzip models' lists"
"""What to do about a model that is another than LLaVA."""

_COMPARE = "compare the file with the published one"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_GENERAL = _words("""
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _from_model_config _name_or_path add_cross_attention attention_dropout
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dropout dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label ignore_index initializer_factor initializer_range is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length model_type name_or_path
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    compression_config quantization quantization_config
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    use_return_dict architectures
""")
"""Keys of any transformers configuration, of its older versions too; none is read by a tower."""

_LLM = _words("""
    attention_bias attn_config clip_qkv d_model embedding_dropout embd_pdrop emb_pdrop
    expansion_ratio
    final_logit_softcapping head_dim hidden_act hidden_activation hidden_size intermediate_size
    layer_types learned_pos_emb logit_scale max_position_embeddings max_seq_len max_window_layers
    mlp_bias n_heads n_layers no_bias norm_type num_attention_heads num_experts_per_tok
    num_hidden_layers num_key_value_heads num_local_experts output_router_logits pos_skipping_range
    pretraining_tp query_pre_attn_scalar resid_pdrop rms_norm_eps rope_parameters rope_scaling
    rope_theta router_aux_loss_coef sliding_window text_config tokenizer_model_max_length
    tokenizer_padding_side use_pos_skipping use_sliding_window vocab_size
""")
"""Keys of the language models, which stand beside the vision keys in the original code's form."""

ORIGINAL = frozenset(
    {
        "hidden_size",
        "image_aspect_ratio",
        "image_crop_resolution",  # of image_aspect_ratio 'crop_split' and 'highres' alone
        "image_split_resolution",
        "image_grid_pinpoints",  # of 'anyres' alone
        "mm_hidden_size",
        "mm_projector_type",
        "mm_tunable_parts",
        "mm_use_im_patch_token",  # a word of the tokenizer that no prompt has
        "mm_vision_select_feature",
        "mm_vision_select_layer",
        "mm_vision_tower",
        "s2_scales",  # of s2 alone
        "unfreeze_mm_vision_tower",
        "use_mm_proj",
    }
)
"""Keys of the original code, read by its family or without effect."""

ORIGINAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "mm_patch_merge_type": ("flat",),
    "mm_resampler_type": (None,),
    "mm_use_im_start_end": (False,),  # else marks stand around a picture in the prompt
    "s2": (False,),
}
"""Those that have one value in LLaVA-1.5, which other models made of its code change."""

_VISION = re.compile(
    r"(^|_)(mm|multi|multimodal|vision|visual|vis|image|images|img|video|videos|frame|frames|fps"
    r"|tower|towers|projector|proj|connector|adapter|resampler|qformer|patch|patches|pixel|pixels"
    r"|clip|siglip|vit|dino\w*|sam|s2|tile|tiles|crop|crops|anyres|grid|aux|region|regions|roi|mask"
    r"|query|queries|interpolate|interpolation|resolution|resolutions|scales|spatial|temporal"
    r"|downsample|shuffle|merge|merger|merging|pool|pooling|compress|compression|feature|features)"
    r"(_|\d|$)"
)
# What was trained, and how, says nothing about what is computed.
_TRAINING = re.compile(r"^(tune|freeze|unfreeze|pretrain|train)_|_lr$")


def check(
    config: Config,
    *,
    known: Collection[str],
    allowed: Mapping[str, tuple[object, ...]] | None = None,
    part: str = "",
) -> None:
    """Refuse keys of the vision side that are unknown, and known ones with unknown values.

    Unknown keys that are not the vision side's are named in a warning.

    Args:
        config: A ``config.json``, or a part of one.
        known: Keys that are read elsewhere or decide nothing.
        allowed: Key → the values that it may have, the expected one first; it may be off too.
        part: The part's name; with one, all its keys are of the vision side.

    Raises:
        CheckpointError: There is such a key, which the error names.
    """
    for key, values in (allowed or {}).items():
        got = config.get(key)
        if not _is_off(got) and not any(_same(got, value) for value in values):
            expected = " or ".join(map(_written, values)) or "none"
            raise refused(_inside(part, key), got, expected, cure=OTHER_MODEL)
    others = []
    for key in _unknown(config, {*known, *(allowed or {})}):
        if not part and not _VISION.search(key):
            others.append(key)
        else:
            raise CheckpointError(
                f"config.json has {_inside(part, key)} = {shown(config[key])}",
                expected="no such key",
                cause="vzip doesn't know what it changes on the vision side",
                cure=OTHER_MODEL,
            )
    if others := [key for key in others if key not in _LLM]:
        _warn(tuple(others))


@functools.cache  # once, however often a configuration is read
def _warn(keys: tuple[str, ...]) -> None:
    _log.warning(
        "config.json has keys that vzip doesn't know, %s: they are taken to be the LLM's",
        printable(", ".join(keys)),
    )


def _unknown(config: Config, known: Collection[str]) -> list[str]:
    """Return the keys that say something and are not known, in their order."""
    return [
        key
        for key, value in config.items()
        if key not in known
        and key not in _GENERAL
        and not key.startswith("_")
        and not _is_off(value)
        and not _TRAINING.search(key)
    ]


def check_class(config: Config, classes: Collection[str], *, part: str = "") -> None:
    """Refuse a model whose class is another, or which comes with code of its own.

    Args:
        config: Its ``config.json``; one that names no class is taken as it is.
        classes: What ``architectures`` may hold.
        part: The part's name.

    Raises:
        CheckpointError: It is another.
    """
    named = config.get("architectures")
    names = named if isinstance(named, list) else [named]
    if not _is_off(named) and any(name not in tuple(classes) for name in names):
        expected = " or ".join(map(repr, classes))
        raise refused(_inside(part, "architectures"), named, expected, cure=OTHER_MODEL)
    own = config.get("auto_map")
    for key, code in own.items() if isinstance(own, dict) else ():
        if key.startswith("AutoModel"):
            expected = "none, since vzip runs no code of a checkpoint"
            raise refused(_inside(part, f"auto_map.{key}"), code, expected, cure=OTHER_MODEL)


@functools.cache
def keys_of(config_class: Any) -> frozenset[str]:
    """Return the keys that a configuration class of transformers writes."""
    return frozenset(config_class().to_dict())


def refused(key: str, got: object, expected: str, *, cure: str = _COMPARE) -> CheckpointError:
    """Return the error for a value that a family can't have."""
    return CheckpointError(
        f"config.json has {key} = {shown(got)}",
        expected=f"{expected}",
        cause="vzip doesn't know this variant of the model",
        cure=cure,
    )


def _is_off(value: object) -> bool:
    return value is None or value is False or value in (0, "", [], {})


def _same(got: object, value: object) -> bool:
    return type(got) is type(value) and got == value


def _written(value: object) -> str:
    return "none" if value is None else str(value).lower() if type(value) is bool else repr(value)
