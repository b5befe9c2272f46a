"""What the configurations of several published repositories have in common.

The hub was out of reach where the families' `published` files were written. Their numbers come from
transformers' conversion scripts, which made those repositories (``convert_*_weights_to_hf.py``),
from the defaults of its classes and, for LLaVA-NeXT, from TensorRT-LLM's copy of
llava-v1.6-mistral-7b-hf's ``config.json``. The processors' settings are those that the scripts
load: CLIP's and SigLIP's own. Not verified: whether the published files have further keys that
matter, and the 13B variants, which have the 7B's numbers but for the LLM's. An export from weights
reads the repository's own files and none of this.
"""

from __future__ import annotations

from vzip.export.families import Config

CLIP_336: Config = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
SIGLIP_384: Config = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    # One fewer than google/siglip-so400m-patch14-384 has: the features are those of the layer
    # before its last, which was left out when the weights were converted.
    "num_hidden_layers": 26,
    "patch_size": 14,
    "vision_use_head": False,
}

# LlamaConfig's and MistralConfig's own sizes are those of a 7B, so theirs name none.
LLAMA_7B: Config = {"model_type": "llama", "vocab_size": 32064}
LLAMA_13B: Config = {
    **LLAMA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
MISTRAL_7B: Config = {"model_type": "mistral", "vocab_size": 32064}

# Qwen2Config's own sizes are no published model's. These are Qwen2's (arXiv 2407.10671, table 1),
# and for the two with as many key-value heads as heads Qwen1.5's, as its repositories have them.
# The vocabulary, with rows for added tokens, is that of LLaVA's conversion, to about a thousand.
QWEN1_5_0_5B: Config = {
    "model_type": "qwen2",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "tie_word_embeddings": True,
    "vocab_size": 152000,
}
QWEN1_5_7B: Config = {
    "model_type": "qwen2",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
    "vocab_size": 152000,
}
QWEN2_0_5B: Config = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 152000,
}
QWEN2_7B: Config = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 152000,
}

_RESCALED: Config = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}
CLIP_PROCESSOR_336: Config = {
    **_RESCALED,
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "size": {"shortest_edge": 336},
}
SIGLIP_PROCESSOR_384: Config = {
    **_RESCALED,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "size": {"height": 384, "width": 384},
}
