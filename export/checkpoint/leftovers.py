"""Tensors that nothing was made of: each is known to change nothing, or it is refused by name.

A tower with a layer scale, a projector with a norm or an adapter beside its base weights has every
tensor that vzip looks for, and would be computed wrongly without a word.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable
from typing import Final

from vzip.export.checkpoint.dequantize import ACTIVATIONS
from vzip.export.checkpoint.schemes import Scheme, quantised, signs
from vzip.runtime.errors import CheckpointError, printable

_log = logging.getLogger(__name__)

_TOP: Final = r"(model\.)?(\w+_tower\.){0,2}"  # where a tower's own parts begin, not inside a layer
_HARMLESS: Final[tuple[tuple[str, str], ...]] = (
    (r"(.*\.)?position_ids", "counts 0, 1, 2 …, which older transformers saved"),
    (r"(.*\.)?num_batches_tracked", "counts training steps"),
    (rf"{_TOP}(text_model|text_projection|visual_projection)\..*", "CLIP's and SigLIP's text side"),
    (rf"{_TOP}(logit_scale|logit_bias)", "compares pictures with texts"),
    (r"(.*\.)?vision_model\.head\..*", "SigLIP's pooling head: features are taken before it"),
    (r"(.*\.)?(vision|video|image)_tower\.head\..*", "likewise, as transformers 5 calls it"),
    (r"(.*\.)?(scaled_fp8|__index_timestamp__)", "marks of the tool that wrote the file"),
)
"""Full names, what wraps them taken away → why they change nothing."""

_ROUNDED: Final = re.compile(rf".*\.({'|'.join(ACTIVATIONS)})")
"""Harmless in a quantised checkpoint alone: elsewhere a layer may have learnt such a scale."""

_LLM: Final = re.compile(
    r"(model\.)?(language_model|text_model|llm)\..*"
    r"|(model\.)?(layers|embed_tokens|tok_embeddings|norm|final_layernorm|rotary_emb|embed_positions)\..*"
    r"|(model\.)?(decoder|transformer|gpt_neox)\..*"
    r"|(lm_head|embed_out|output|score)\..*"
)
_VISION: Final = re.compile(
    r"vision|visual|image|video|(^|[._])(mm|vit|clip|siglip|eva|dino\w*|vlm|sam)(?=[._\d]|$)"
    r"|tower|multi_?modal|projector|projection|resampler|perceiver|connector|abstractor|qformer"
    r"|q_former|aligner|adapter|patch_embed|query_tokens|newline",
    re.IGNORECASE,
)
_ADAPTER: Final = re.compile(
    r"(^|\.)(lora_\w+|base_layer|modules_to_save|original_module|ia3_\w+|hada_\w+|lokr_\w+"
    r"|oft_\w+|vera_\w+|ranknum|dora_\w+)(\.|$)"
)


def is_llm(name: str) -> bool:
    """Say whether a tensor is of the language model."""
    return _LLM.fullmatch(name) is not None


def is_visual(name: str) -> bool:
    """Say whether a name outside tower and projector is of something that pictures go through."""
    return not is_llm(name) and _VISION.search(name) is not None


def is_adapter(name: str) -> bool:
    """Say whether a tensor is of PEFT's adapters."""
    return _ADAPTER.search(name) is not None


def check_leftovers(
    names: Iterable[str],
    *,
    roots: tuple[str, ...],
    harmless: tuple[str, ...],
    where: str,
    scheme: Scheme,
    dequantised: bool,
) -> None:
    """Raise unless what was left unread of a folder or file changes nothing.

    Args:
        names: Of the tensors that nothing was made of, what wraps them taken away.
        roots: What names of tower and projector begin with.
        harmless: What names begin with that were left out on purpose, such as another tower's.
        where: The folder or file.
        scheme: What its configuration says of quantisation.
        dequantised: Whether some of its weights were quantised.

    Raises:
        CheckpointError: One of them is of the tower, the projector or something else that pictures
            go through, and vzip doesn't know it.
    """
    left = [
        name for name in sorted(names) if not name.startswith(harmless) and not _is_harmless(name)
    ]
    if scheme.name or dequantised:
        left = [name for name in left if not _ROUNDED.fullmatch(name)]
    unknown = [name for name in left if name.startswith(roots) or is_visual(name)]
    if unknown:
        raise _refused(unknown, where, scheme)
    strange = [name for name in left if not is_llm(name)]
    if strange:
        _log.warning(
            "%s: nobody here knows %s (%d such tensors in all); they are not of the vision side by "
            "their names and were left out",
            printable(where),
            printable(", ".join(f"'{name}'" for name in strange[:3])),
            len(strange),
        )


def check_llm_leftovers(names: Iterable[str], *, where: str, signs_alone: bool = False) -> None:
    """Raise unless what was left unread of a language model's tensors changes nothing.

    Args:
        names: Of the tensors that nothing was made of.
        where: The folder or file.
        signs_alone: Whether only what is a sign of quantising or of an adapter counts.

    Raises:
        CheckpointError: One of them would change what the LLM computes.
    """
    left = [name for name in sorted(names) if is_llm(name) and not _is_harmless(name)]
    left = [name for name in left if not name.endswith(".rotary_emb.inv_freq")]  # of rope_theta
    left = [name for name in left if not _ROUNDED.fullmatch(name)]
    if signs_alone:
        left = [name for name in left if is_adapter(name) or signs(_leaves(name))]
    if not left:
        return
    shown = _listed(left)
    if any(map(is_adapter, left)):
        raise unmerged(f"{where} holds {shown}")
    sign = signs(leaf for name in left for leaf in _leaves(name))
    raise CheckpointError(
        f"{where} holds {shown}",
        expected="no tensor of the LLM but those of the architecture in config.json",
        cause=(
            "the LLM computes more than would be written"
            if sign is None
            else f"the LLM is quantised by {sign}"
        ),
        cure=(
            "take the LLM's checkpoint unchanged"
            if sign is None
            else "convert the checkpoint as it was before it was quantised; llama.cpp's "
            "llama-quantize makes a smaller GGUF of it"
        ),
    )


def _is_harmless(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern, _ in _HARMLESS)


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown + (f" … ({len(names)} in all)" if len(names) > 3 else "")


def _refused(names: list[str], where: str, scheme: Scheme) -> CheckpointError:
    shown = _listed(names)
    if any(map(is_adapter, names)):
        return unmerged(f"{where} holds {shown}")
    sign = signs(leaf for name in names for leaf in _leaves(name))
    if sign is not None:
        return quantised(f"{where} holds {shown}", scheme, sign)
    return CheckpointError(
        f"{where} holds {shown}",
        expected="no tensor of tower or projector but those of the architecture in config.json",
        cause="the model computes more than vzip would, and its tokens would be wrong",
        cure="export a model of a family that `vzip models` lists, unchanged",
    )


def unmerged(got: str) -> CheckpointError:
    """Return the error for an adapter that changes what tower or projector compute."""
    return CheckpointError(
        got,
        expected="weights that adapters were merged into",
        cause="a LoRA or another adapter of PEFT changes what tower or projector compute",
        cure=MERGE,
    )


MERGE: Final = (
    "merge it with PEFT, `PeftModel.from_pretrained(model, folder).merge_and_unload()`, save the "
    "model with save_pretrained and export that folder"
)


def _leaves(name: str) -> Collection[str]:
    """Return what may follow the module in a name: one part or two."""
    parts = name.split(".")
    return {parts[-1], ".".join(parts[-2:]), ".".join(parts[-3:])}
