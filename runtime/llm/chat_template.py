"""The words around questions, taken from a checkpoint's chat template and tokenizer.

Rendering it needs transformers' tokenizers and Jinja; what comes out, `Words`, needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from vzip.runtime.errors import CheckpointError
from vzip.runtime.guard import door
from vzip.runtime.llm.prompts import (
    FirstTurn,
    Kind,
    LaterTurn,
    Prompts,
    Words,
    llava_15_words,
)

# Stand for a question and an answer while the chat template is asked what surrounds them.
_QUESTION_MARK = "(the question)"
_ANSWER_MARK = "(the answer)"

_MISTYPED_EOS = "<\\s>"
_GIVE_WHOLE: Final = "give a whole llava-hf checkpoint with its tokenizer"


class HubTokenizer:
    """A tokenizer of transformers, as `vzip.runtime.llm.prompts.Tokenizer`.

    Args:
        name: The LLM's name, for messages.
        tokenizer: The checkpoint's tokenizer.

    Raises:
        CheckpointError: It has no end-of-sequence token.
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        if tokenizer.eos_token is None:
            raise CheckpointError(
                f"{name}: the LLM's tokenizer has no end-of-sequence token",
                expected="one, which a LLaVA checkpoint has",
                cause="the tokenizer's files are another model's or incomplete",
                cure="fetch the checkpoint again",
            )
        self.bos: str | None = tokenizer.bos_token
        self.eos: str = tokenizer.eos_token
        self.eos_id = int(tokenizer.eos_token_id)
        self._tokenizer = tokenizer

    @door(
        CheckpointError,
        "the LLM's tokenizer has no id {token_id}",
        cure=_GIVE_WHOLE,
    )
    def token(self, token_id: int) -> str | None:
        """Return a token as text; None for an id beyond the vocabulary."""
        token: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        return token

    @door(
        CheckpointError,
        "the LLM's tokenizer can't take a text",
        cure=_GIVE_WHOLE,
    )
    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return a text's ids."""
        # verbose=False: no warning beyond model_max_length, since we check the context ourselves
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False).input_ids
        return ids

    @door(
        CheckpointError,
        "the LLM's tokenizer can't give a text",
        cure=_GIVE_WHOLE,
    )
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, without special tokens."""
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def words_of(
    name: str, tokenizer: Any, placeholders: Mapping[Kind, int], template: str | None
) -> Words:
    """Ask a chat template what stands around questions, images and videos.

    Args:
        name: The LLM's name, for messages.
        tokenizer: The checkpoint's tokenizer, which renders it.
        placeholders: Id of each kind's placeholder.
        template: The chat template, in Jinja; ``None`` for LLaVA-1.5's words.

    Raises:
        CheckpointError: The template writes a question in more than one place or none, or has no
            place for an image.
    """
    if template is None:
        return llava_15_words(videos="video" in placeholders)

    def render(messages: list[dict[str, Any]]) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return text

    def split(text: str) -> tuple[str, str]:
        before, mark, end = text.partition(_QUESTION_MARK)
        if not mark or _QUESTION_MARK in end:
            raise CheckpointError(
                f"{name}: the LLM's chat template writes a question "
                f"{text.count(_QUESTION_MARK)} times",
                expected="once",
                cure="repair chat_template.jinja",
            )
        return before, end

    first: dict[Kind, FirstTurn] = {}
    for kind, token_id in placeholders.items():
        token = tokenizer.convert_ids_to_tokens(token_id)
        one, end = split(render([_user([kind])]))
        two, _ = split(render([_user([kind, kind])]))
        before, place, after = one.partition(token)
        if not place or token in after:
            continue
        between = two[len(before + token) : len(two) - len(token + after)]
        several = two == f"{before}{token}{between}{token}{after}"
        first[kind] = FirstTurn(before, between if several else None, after, end)
    if not first:
        raise CheckpointError(
            f"{name}: the LLM's chat template has no place for images",
            expected="one before or behind the question",
            cure="repair chat_template.jinja",
        )
    text = render(
        [
            {"role": "user", "content": [{"type": "text", "text": "(an earlier question)"}]},
            {"role": "assistant", "content": [{"type": "text", "text": _ANSWER_MARK}]},
            _user([]),
        ]
    )
    _, mark, text = text.partition(_ANSWER_MARK)
    if not mark:
        return Words(first, None)
    # The answer ends with eos, whether the template writes it (then what follows it is meant, white
    # space included), mistypes it (llava-hf's LLaVA-NeXT with Mistral) or leaves it out (published
    # LLaVA-1.5: a blank in its place).
    eos: str = tokenizer.eos_token
    text = text.lstrip()
    text = text.removeprefix(eos if text.startswith(eos) else _MISTYPED_EOS)
    return Words(first, LaterTurn(*split(text)))


@door(
    CheckpointError,
    "{name}: the LLM's chat template or tokenizer can't be used",
    cure="repair chat_template.jinja, or fetch the published checkpoint again",
)
def make_prompts(
    name: str, tokenizer: Any, placeholders: Mapping[Kind, int], template: str | None
) -> Prompts:
    """Return an LLM's prompts.

    Args:
        name: The LLM's name, for messages.
        tokenizer: The checkpoint's tokenizer.
        placeholders: Id of an image's placeholder; and of a video's, if the LLM has one.
        template: The chat template, in Jinja; ``None`` for LLaVA-1.5's words.

    Raises:
        CheckpointError: The tokenizer lacks a placeholder or an end-of-sequence token, or the
            template is not one of a LLaVA.
    """
    adapted = HubTokenizer(name, tokenizer)
    known = {k: i for k, i in placeholders.items() if adapted.token(i) is not None}
    # Without a placeholder there is nothing to ask the template; `Prompts` says which one it is.
    words = words_of(name, tokenizer, known, template if known else None)
    return Prompts(name, adapted, words, placeholders)


def _user(media: Sequence[Kind]) -> dict[str, Any]:
    content: list[dict[str, str]] = [{"type": kind} for kind in media]
    return {"role": "user", "content": [*content, {"type": "text", "text": _QUESTION_MARK}]}
