"""Chat templates rendered in a process of their own, whose time and memory are bounded.

A chat template is a program that somebody wrote. Jinja's sandbox keeps it from files and from
Python; it bounds neither loops in loops nor texts that double. So the system does.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from vzip.runtime.errors import CheckpointError, MissingDependencyError, missing
from vzip.runtime.llm import jinja_child

_LONGEST_TEMPLATE: Final = 2**20  # characters; published ones have up to 20,000
_PATIENCE: Final = 60  # seconds of the clock; the child's processor time is bounded by itself
_OLDEST: Final = (3, 1, 6)  # of Jinja: templates get out of the sandbox of older ones


@dataclass(frozen=True)
class Chat:
    """A conversation to be rendered.

    Attributes:
        messages: As for transformers' ``apply_chat_template``.
        generate: Whether an answer is to follow (``add_generation_prompt``).
    """

    messages: Sequence[Mapping[str, Any]]
    generate: bool = True


@dataclass(frozen=True)
class Rendered:
    """What a template made of a conversation.

    Attributes:
        text: The text; None where it failed.
        fault: What went wrong; empty where nothing did.
    """

    text: str | None
    fault: str


def render(
    name: str, template: str, variables: Mapping[str, str], chats: Sequence[Chat]
) -> list[Rendered]:
    """Render conversations, as transformers' ``apply_chat_template`` would.

    Args:
        name: The template's name, for messages.
        template: The chat template, in Jinja.
        variables: What it knows beside the messages: the tokenizer's special tokens.
        chats: The conversations.

    Raises:
        MissingDependencyError: Jinja is not installed, or too old.
        CheckpointError: The template is too long, or rendering it has no end.
    """
    _check_jinja()
    if len(template) > _LONGEST_TEMPLATE:
        raise CheckpointError(
            f"{name} has {len(template)} characters",
            expected=f"at most {_LONGEST_TEMPLATE}",
            cause="it is none",
            cure="take the published template of the model",
        )
    request = {
        "path": sys.path,
        "template": template,
        "variables": dict(variables),
        "chats": [{"messages": chat.messages, "generate": chat.generate} for chat in chats],
    }
    return list(_answer(name, json.dumps(request)))


@functools.lru_cache(maxsize=64)
def _answer(name: str, request: str) -> tuple[Rendered, ...]:
    """Return what the child makes of a request; a template is opened more than once."""
    try:
        done = subprocess.run(  # noqa: S603 - this Python, and a module of ours
            [sys.executable, "-I", "-S", str(Path(jinja_child.__file__))],
            input=request.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _endless(name) from error
    except OSError as error:
        raise CheckpointError(
            f"{name} can't be rendered: Python can't be started ({os.strerror(error.errno or 0)})",
            cure="free memory, or allow more processes",
        ) from error
    if done.returncode:
        raise _endless(name)
    return tuple(Rendered(text, fault or "") for text, fault in json.loads(done.stdout))


def _check_jinja() -> None:
    """Refuse a machine without Jinja, or with one whose sandbox has holes."""
    try:
        found = metadata.version("jinja2")
    except metadata.PackageNotFoundError as error:
        raise missing("jinja2", needed_for="a chat template", extra="export") from error
    if tuple(int(part) for part in found.split(".")[:3] if part.isdecimal()) < _OLDEST:
        raise MissingDependencyError(
            f"jinja2 {found} is installed",
            expected="3.1.6 or newer",
            cause="templates get out of the sandbox of older ones",
            cure="upgrade it: pip install -U jinja2",
        )


def _endless(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} can't be rendered in {jinja_child.SECONDS} seconds and half a gigabyte",
        expected="a template that takes milliseconds",
        cause="its loops or texts have no end",
        cure="take the published template of the model",
    )
