"""What image tokens cost the language model: work of the prefill, and memory of its KV cache.

Read from the checkpoint's configuration alone, so no weight of the language model is needed. The
prefill's form is the paper's (arXiv 2412.04467): T · (4nd² + 2n²d + 2ndm). It counts a
multiply-add as one, takes keys and values to be as wide as queries, and the feed-forward part to
have two matrices; a Llama's has three. So it compares budgets; it is not what a profiler counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vzip.runtime.config_numbers import check_numbers
from vzip.runtime.errors import CheckpointError

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_ASSUMED = "float16"  # what published checkpoints have, where a configuration names none


@dataclass(frozen=True)
class LlmShape:
    """Sizes of a decoder.

    Attributes:
        model_type: Its architecture, such as ``llama``.
        layers: T.
        hidden_size: d.
        intermediate_size: m, width of the feed-forward part.
        kv_heads: Heads of keys and values.
        head_dim: Width of one.
        dtype: Of the cache: that of the checkpoint.
        dtype_assumed: Whether the configuration names no dtype, and float16 was taken for it.
    """

    model_type: str
    layers: int
    hidden_size: int
    intermediate_size: int
    kv_heads: int
    head_dim: int
    dtype: str
    dtype_assumed: bool

    def __post_init__(self) -> None:
        for name in ("layers", "hidden_size", "intermediate_size", "kv_heads", "head_dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise CheckpointError(
                    f"config.json: the language model's {name} is {value!r}",
                    expected="an integer above 0",
                    cause="it is damaged, or of a model that vzip doesn't know",
                )
        if self.dtype not in _BYTES:
            raise CheckpointError(
                f"config.json: the dtype is {self.dtype!r}",
                expected=f"one of {', '.join(_BYTES)}",
                cause="what its KV cache takes isn't known",
            )

    def prefill_flops(self, tokens: int) -> int:
        """Return the work of a prefill of n tokens, text and image: T · (4nd² + 2n²d + 2ndm)."""
        n, d, m = tokens, self.hidden_size, self.intermediate_size
        return self.layers * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)

    def kv_bytes(self, tokens: int) -> int:
        """Return the cache of n tokens: 2 · T · kv heads · head width · bytes of a number · n."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _BYTES[self.dtype] * tokens

    def to_json(self) -> dict[str, Any]:
        """Return the fields as values that `json` writes."""
        return asdict(self)


def llm_shape(config: Mapping[str, Any]) -> LlmShape:
    """Read the language model's sizes in a checkpoint's ``config.json``.

    Args:
        config: As for `text_config`.

    Raises:
        CheckpointError: A size is missing or impossible, or as `text_config`.
    """
    dtype = config.get("dtype") or config.get("torch_dtype")
    text: Any = text_config(config)
    if "vision_config" in config:
        own = config.get("text_config") or {}
        dtype = own.get("dtype") or own.get("torch_dtype") or dtype
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    width = text.get("head_dim")
    if width is None and type(hidden) is int and type(heads) is int and heads > 0:
        width = hidden // heads
    kv_heads = text.get("num_key_value_heads")
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    return LlmShape(
        model_type=str(text.get("model_type")),
        layers=text.get("num_hidden_layers"),
        hidden_size=text.get("hidden_size"),
        intermediate_size=text.get("intermediate_size"),
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=width,
        dtype=name or _ASSUMED,
        dtype_assumed=name is None,
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a checkpoint's ``config.json``.

    Args:
        config: In Hugging Face's form, with a ``text_config``; what it lacks has the defaults of
            transformers' classes. Or in that of original LLaVA, whose top level is the language
            model's.

    Raises:
        CheckpointError: transformers can't read it.
    """
    check_numbers(config)
    if "vision_config" not in config:
        return config
    import transformers

    kind = config.get("model_type")
    rest = {key: value for key, value in config.items() if key != "model_type"}
    try:
        whole: Any = transformers.AutoConfig.for_model(kind, **rest)
        found: dict[str, Any] = whole.get_text_config().to_dict()
    except Exception as error:  # transformers' checks raise many kinds
        raise CheckpointError(
            f"config.json: transformers can't read the {kind!r} configuration "
            f"({(str(error).splitlines() or [''])[0]})",
            cure="update transformers or the checkpoint",
        ) from error
    return found
