"""`vzip chat`: a question per line of standard input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from vzip.runtime.cli import asking
from vzip.runtime.console import complain, emit
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files.names import typed

if TYPE_CHECKING:
    from vzip.runtime.llm import Conversation

_MAX_LINE: Final = 2**20
"""Characters; /dev/zero has no end of line, and no question is as long."""


def main(argv: Sequence[str], *, prog: str) -> int:
    """Run ``vzip chat``: a question per line of stdin, its answer on stdout as it is made."""
    parser = asking.parser_of(
        prog,
        "Answer questions about images or a video, one per line of standard input, until it "
        "ends. They are encoded once, and every question sees the ones before it.",
    )
    arguments = parser.read(argv, intermixed=True)
    asking.check_numbers("chat", arguments)
    if sys.stdin is None:
        raise InvalidInputError(
            "chat: standard input is closed, so there are no questions",
            cure="start it without '<&-'",
        )
    conversations = asking.conversations(arguments)
    for question in _questions():
        _answer(conversations, question, arguments)
    return 0


def _answer(
    conversations: Sequence[Conversation], question: str, arguments: argparse.Namespace
) -> None:
    """Print an answer as it is made; or two, one after the other."""
    try:
        for conversation in conversations:
            pieces = conversation.stream(question, max_new_tokens=arguments.max_new_tokens)
            if label := asking.label(conversation, arguments):
                emit(label, end="")
            for piece in pieces:
                emit(piece, end="")
            emit("")
    except InvalidInputError as error:
        # At a terminal there is somebody to ask again; in a pipe a lost answer would shift all
        # that follow.
        if not sys.stdin.isatty():
            raise
        complain(f"vzip: error: {error}")


def _questions() -> Iterator[str]:
    """Yield the lines of standard input that are not blank, with a prompt on a terminal."""
    while True:
        if sys.stdin.isatty():
            complain("> ", end="")
        try:
            line = sys.stdin.readline(_MAX_LINE)
        except UnicodeDecodeError as error:
            raise InvalidInputError(
                f"chat: standard input is not UTF-8 text ({error.reason})",
                cure="convert the questions to UTF-8",
            ) from error
        if len(line) == _MAX_LINE and not line.endswith("\n"):
            raise InvalidInputError(
                f"chat: a line of standard input has {_MAX_LINE} characters or more",
                expected="one question a line",
                cure="give the questions as text, each on a line of its own",
            )
        if not line:
            if sys.stdin.isatty():
                complain("")
            return
        if line.strip():
            yield typed(line)
