"""`vzip ask`: one question about images or a video."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vzip.runtime.cli import asking
from vzip.runtime.console import emit
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.files.names import typed
from vzip.runtime.llm import check_question


def main(argv: Sequence[str], *, prog: str) -> int:
    """Run ``vzip ask``: print the answer to one question, and nothing else, on stdout.

    With ``--positions both`` these are two lines, each with the positions in front.
    """
    parser = asking.parser_of(prog, "Answer one question about images or a video.")
    parser.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    # Several images, an option and the question: plain parsing takes the last image for it.
    arguments = parser.read(argv, intermixed=True)
    # Not Path.is_file, which fails on a text that is too long for a name.
    if os.path.isfile(arguments.question):  # noqa: PTH113
        raise InvalidInputError(
            f"the last argument is the file '{arguments.question}'",
            expected="a question",
            cure='ask in quotes, such as "What is that?"',
        )
    question = typed(arguments.question)
    check_question("ask", question)
    asking.check_numbers("ask", arguments)
    for conversation in asking.conversations(arguments):
        answer = conversation.ask(question, max_new_tokens=arguments.max_new_tokens)
        emit(asking.label(conversation, arguments) + answer)
    return 0
