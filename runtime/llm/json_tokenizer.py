"""A tokenizer's file as the package tokenizers reads it, without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from vzip.runtime.errors import CheckpointError, missing
from vzip.runtime.guard import door, guarded

_EXPORT_AGAIN: Final = "export the bundle again"


class JsonTokenizer:
    """A tokenizer of the package tokenizers, as `vzip.runtime.llm.prompts.Tokenizer`.

    Args:
        data: The bytes of a ``tokenizer.json``.
        bos: The beginning-of-sequence token as text; None if there is none.
        eos: The end-of-sequence token as text.
        needed_for: What it is needed for, for the message that the package is missing.
        extra: The extra of this distribution that brings it.

    Raises:
        MissingDependencyError: The package is not installed.
        CheckpointError: The file is none of a tokenizer, or has no such tokens.
    """

    def __init__(
        self, data: bytes, *, bos: str | None, eos: str, needed_for: str, extra: str
    ) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise missing("tokenizers", needed_for=needed_for, extra=extra) from error
        with guarded(
            CheckpointError,
            f"tokenizers {tokenizers.__version__} can't read the LLM's tokenizer",
            expected="a tokenizer.json of this version or an older one",
            cure="update tokenizers, or export the bundle again",
        ):
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(data.decode())
            eos_id = self._tokenizer.token_to_id(eos)
            lacks_bos = bos is not None and self._tokenizer.token_to_id(bos) is None
        if eos_id is None or lacks_bos:
            raise CheckpointError(
                f"the LLM's tokenizer lacks {eos!r} or {bos!r}",
                expected="both to be tokens of its",
                cause="the files are of different models",
                cure="export the bundle again",
            )
        self.bos, self.eos, self.eos_id = bos, eos, int(eos_id)

    @door(CheckpointError, "the LLM's tokenizer has no id {token_id}", cure=_EXPORT_AGAIN)
    def token(self, token_id: int) -> str | None:
        """Return a token as text; None for an id beyond the vocabulary.

        Raises:
            CheckpointError: The tokenizer is damaged.
        """
        if token_id < 0:
            return None
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    @door(CheckpointError, "the LLM's tokenizer can't take a text", cure=_EXPORT_AGAIN)
    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return a text's ids.

        Raises:
            CheckpointError: The tokenizer is damaged.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    @door(CheckpointError, "the LLM's tokenizer can't give a text", cure=_EXPORT_AGAIN)
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, without special tokens.

        Raises:
            CheckpointError: The tokenizer is damaged.
        """
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text
