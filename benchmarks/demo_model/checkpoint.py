"""The demo model's parts and how they are written: an ordinary Hugging Face LLaVA checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vzip.calibration.demo import dialogue, scenes
from vzip.calibration.demo.accuracy import MEAN, STD

if TYPE_CHECKING:
    from collections.abc import Iterator

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")

# LLaVA-1.5's conversation, in which every answer ends with </s>.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% elif message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the demo model.

    Attributes:
        image: Side of the tower's input in pixels.
        patch: Side of a patch in pixels.
        tower_width: Width of the tower.
        tower_layers: Its layers; the last one is unused, as in LLaVA.
        tower_heads: Its attention heads.
        llm_width: Width of the language model.
        llm_layers: Its layers.
        llm_heads: Its attention heads.
        llm_hidden: Width of its feed-forward part.
        context: Longest sequence in tokens.
        vocabulary: Largest number of entries of the tokenizer, special ones included.
    """

    image: int = 112
    patch: int = 8
    tower_width: int = 128
    tower_layers: int = 6
    tower_heads: int = 4
    llm_width: int = 128
    llm_layers: int = 4
    llm_heads: int = 4
    llm_hidden: int = 352
    context: int = 1024
    vocabulary: int = 448

    def __post_init__(self) -> None:
        if self.image % self.patch:
            raise ValueError(f"image side {self.image} is no multiple of the patch {self.patch}")
        for part in ("tower", "llm"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            if width % (8 * heads):
                raise ValueError(f"{part}: {width} / {heads} heads is no multiple of 8")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image // self.patch


def build_tokenizer(size: Size) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the questions' words; any other text becomes bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=size.context,
        clean_up_tokenization_spaces=False,
    )


def build_processor(size: Size, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """CLIP's image processor at the tower's resolution, with the tokenizer."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size.image},
        crop_size={"height": size.image, "width": size.image},
        resample=3,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=size.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(size: Size, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Transformers' own LLaVA with fresh weights, FP32; random state is torch's global one."""
    vision = CLIPVisionConfig(
        hidden_size=size.tower_width,
        intermediate_size=4 * size.tower_width,
        num_hidden_layers=size.tower_layers,
        num_attention_heads=size.tower_heads,
        image_size=size.image,
        patch_size=size.patch,
        projection_dim=size.tower_width,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        hidden_size=size.llm_width,
        intermediate_size=size.llm_hidden,
        num_hidden_layers=size.llm_layers,
        num_attention_heads=size.llm_heads,
        num_key_value_heads=size.llm_heads,
        head_dim=size.llm_width // size.llm_heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=size.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=size.grid**2,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def published_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a LLaVA model under the names of the published checkpoints.

    Args:
        state: ``state_dict()`` of transformers 5's ``LlavaForConditionalGeneration``.
    """
    renamed = {}
    for name, tensor in state.items():
        for prefix, published in (
            ("model.vision_tower.", "vision_tower.vision_model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
        ):
            if name.startswith(prefix):
                renamed[published + name.removeprefix(prefix)] = tensor
                break
        else:
            raise ValueError(f"no published name for {name!r}")
    return renamed


def save(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    folder: Path,
    record: dict[str, Any],
) -> None:
    """Write the checkpoint, FP16, whole or not at all.

    Args:
        model: The model, of any floating-point type.
        processor: Its processor.
        folder: Where it goes; an earlier checkpoint there is replaced.
        record: How it was made, kept beside it as ``training.json``.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    staging.chmod(0o755)
    try:
        processor.save_pretrained(staging)
        # Both homes of the image processor's settings: transformers 5 reads the first, older
        # versions and other programs the second.
        _portable_tokenizer(staging / "tokenizer_config.json")
        image_settings = json.loads((staging / "processor_config.json").read_text())
        _write_json(staging / "preprocessor_config.json", image_settings["image_processor"])
        config = model.config.to_dict()
        _strip(config)
        config["architectures"] = ["LlavaForConditionalGeneration"]
        config["dtype"] = "float16"
        _write_json(staging / "config.json", config)
        text = model.config.text_config
        GenerationConfig(
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            pad_token_id=text.pad_token_id,
            do_sample=False,
            max_new_tokens=16,
        ).save_pretrained(staging)
        tensors = {
            name: tensor.detach().to(torch.float16).contiguous()
            for name, tensor in published_names(model.state_dict()).items()
        }
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        (staging / "model.safetensors").chmod(0o644)
        _write_json(staging / "training.json", record)
        if folder.exists():
            retired = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
            folder.rename(retired / "old")
            staging.rename(folder)
            shutil.rmtree(retired)
        else:
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _portable_tokenizer(path: Path) -> None:
    """Name the tokenizer's class as every version of transformers knows it."""
    config = json.loads(path.read_text())
    config.pop("backend", None)
    config.pop("extra_special_tokens", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(path, config)


def _strip(config: dict[str, Any]) -> None:
    """Drop what says where or by what the file was made rather than what the model is."""
    for key in ("_name_or_path", "dtype"):
        config.pop(key, None)
    for value in config.values():
        if isinstance(value, dict):
            _strip(value)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _corpus() -> Iterator[str]:
    """Every wording and answer, without repetition of the whole product."""
    for _ in range(20):
        yield dialogue.BEFORE_IMAGE
    for wordings in scenes.WORDINGS.values():
        for wording in wordings:
            for name, color in zip(scenes.NAMES, 3 * tuple(scenes.COLORS), strict=False):
                question = wording.format(name=name, color=color, what=f"{color} {name}")
                yield dialogue.FIRST_TURN.format(question=question)
                yield dialogue.LATER_TURN.format(question=question)
    for answer in (*scenes.NAMES, *scenes.COLORS, *scenes.CORNERS, "yes", "no"):
        for _ in range(200):  # often enough for an entry of its own
            yield f" {answer}"
