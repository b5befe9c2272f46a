"""Compressed tokens into an LLM: one protocol over local LLMs and LLM servers.

`protocol` is what every LLM offers, `conversation` the turns, `text_side` what a prompt is made of,
`shown` what is shown, with the checks before a call. `opening` is what ``--llm`` can name. `local`
runs LLMs in this process, `server` asks those of LLM servers; what nobody ran yet is in
`experimental`.
"""

from __future__ import annotations

from vzip.runtime.llm.contract import DEFAULT_MAX_NEW_TOKENS, LLM, Conversation
from vzip.runtime.llm.conversation import check_max_new_tokens, check_question
from vzip.runtime.llm.shown import Shown, TokenSpec

__all__ = [
    "DEFAULT_MAX_NEW_TOKENS",
    "LLM",
    "Conversation",
    "Shown",
    "TokenSpec",
    "check_max_new_tokens",
    "check_question",
]
