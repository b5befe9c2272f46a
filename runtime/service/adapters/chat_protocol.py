"""OpenAI's chat protocol, as far as a LLaVA can serve it; no web framework is known here.

A request that asks for what would change the answer and can't be had here (sampling, tools, several
choices) is refused: answers are greedy.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vzip.runtime.errors import InvalidInputError
from vzip.runtime.guard import shown
from vzip.runtime.llm.contract import DEFAULT_MAX_NEW_TOKENS
from vzip.runtime.service.admission import RefusedError
from vzip.runtime.service.answering import Answered, Turn

DONE: Final = "data: [DONE]\n\n"
_LONGEST_ANSWER: Final = 2**16
# Options that don't change a greedy answer of one choice.
_OF_NO_MATTER: Final = frozenset(
    ("user", "seed", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
     "parallel_tool_calls")
)  # fmt: skip
# Options that change it, unless they have one of these values.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "temperature": (0, None),
    "top_p": (1, None),
    "n": (1, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logprobs": (False, None),
    "top_logprobs": (0, None),
    "stop": (None, []),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "logit_bias": (None, {}),
}
_READ: Final = frozenset(
    ("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens")
)


@dataclass(frozen=True)
class ChatRequest:
    """What is asked.

    Attributes:
        model: The model's name.
        pictures: What the URLs of the first message's pictures are, in order.
        clip: That of its clip; None without one.
        turns: Questions and answers before.
        question: The question.
        max_new_tokens: Longest answer.
        stream: Whether the answer is wanted piece by piece.
        usage: Whether a stream ends with what it took.
    """

    model: str
    pictures: tuple[str, ...]
    clip: str | None
    turns: tuple[Turn, ...]
    question: str
    max_new_tokens: int
    stream: bool
    usage: bool


class ParameterError(InvalidInputError):
    """A parameter of a request that can't be used.

    Attributes:
        parameter: Which.
    """

    parameter: str = ""


def _misfit(parameter: str, got: str, expected: str = "", cure: str = "") -> ParameterError:
    error = ParameterError(f"{parameter}: {got}", expected=expected, cure=cure)
    error.parameter = parameter
    return error


def read_chat(body: Mapping[str, Any]) -> ChatRequest:
    """Read a request.

    Raises:
        ParameterError: It is none, or asks for what can't be had.
    """
    for name, value in body.items():
        if name in _NEUTRAL:
            if not any(_same(value, each) for each in _NEUTRAL[name]):
                raise _misfit(
                    name,
                    f"got {_value(value)}",
                    f"{_value(_NEUTRAL[name][0])}, since answers are greedy and of text",
                    f"leave {name} out",
                )
        elif name not in _READ and name not in _OF_NO_MATTER:
            raise _misfit(shown(name), "is not known here", cure="leave it out")
    model = body.get("model")
    if not isinstance(model, str):
        raise _misfit("model", f"got {_value(model)}", "the name that GET /v1/models lists")
    stream = body.get("stream") or False
    if not isinstance(stream, bool):
        raise _misfit("stream", f"got {_value(stream)}", "true or false")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise _misfit("stream_options", f"got {_value(options)}", "an object")
    pictures, clip, turns, question = _messages(body.get("messages"))
    return ChatRequest(
        model=model,
        pictures=pictures,
        clip=clip,
        turns=turns,
        question=question,
        max_new_tokens=_limit(body),
        stream=stream,
        usage=options.get("include_usage") is True,
    )


def _same(value: object, other: object) -> bool:
    """Return whether two JSON values are equal; in Python, true is 1 as well."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _limit(body: Mapping[str, Any]) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        value = body.get(name)
        if value is not None:
            if type(value) is not int or not 1 <= value <= _LONGEST_ANSWER:
                raise _misfit(name, f"got {_value(value)}", f"1 to {_LONGEST_ANSWER}")
            return value
    return DEFAULT_MAX_NEW_TOKENS


def _messages(
    messages: object,
) -> tuple[tuple[str, ...], str | None, tuple[Turn, ...], str]:
    """Return pictures, clip, earlier turns and the question of a request's messages."""
    if not isinstance(messages, list) or not messages:
        raise _misfit("messages", f"got {_value(messages)}", "one message or more")
    pictures: list[str] = []
    clips: list[str] = []
    said: list[str] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise _misfit(where, f"got {_value(message)}", "an object")
        role, wanted = message.get("role"), ("user", "assistant")[number % 2]
        if role != wanted:
            raise _misfit(
                f"{where}.role",
                f"got {_value(role)}",
                f"{wanted!r}: questions and answers in turns, the first a question",
                "put what a system message says into the first question",
            )
        text, shows, plays = _content(f"{where}.content", message.get("content"))
        if (shows or plays) and number:
            raise _misfit(
                f"{where}.content",
                "holds a picture or a clip",
                "them in the first message alone",
                "begin a new conversation about it",
            )
        pictures += shows
        clips += plays
        said.append(text)
    if len(said) % 2 == 0:
        raise _misfit("messages", "end with an answer", "a question as the last")
    if not pictures and not clips:
        raise _misfit("messages", "show nothing", "a part 'image_url' in the first message")
    if len(clips) > 1 or (clips and pictures):
        raise _misfit("messages", "show a clip and something else", "pictures, or one clip")
    turns = tuple((said[at].strip(), said[at + 1].strip()) for at in range(0, len(said) - 1, 2))
    return tuple(pictures), (clips[0] if clips else None), turns, said[-1]


def _content(where: str, content: object) -> tuple[str, list[str], list[str]]:
    """Return the text of a message, and the URLs of its pictures and clips."""
    if isinstance(content, str):
        return content, [], []
    if not isinstance(content, list):
        raise _misfit(where, f"got {_value(content)}", "a text, or a list of parts")
    texts: list[str] = []
    media: dict[str, list[str]] = {"image_url": [], "video_url": []}
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get(kind) if isinstance(part, dict) and isinstance(kind, str) else None
        if kind == "text" and isinstance(value, str):
            texts.append(value)
            continue
        url = value.get("url") if isinstance(value, dict) else value
        if kind not in media or not isinstance(url, str):
            raise _misfit(
                f"{where}[{number}]",
                f"got a part of type {_value(kind)}",
                "one of text, image_url and video_url",
            )
        media[str(kind)].append(url)
    return "\n".join(texts), media["image_url"], media["video_url"]


def _value(value: object) -> str:
    """Return a value for a message."""
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(shown(value))


class Reply:
    """The answer of a request in the protocol's forms.

    Args:
        model: The model's name.
    """

    def __init__(self, model: str) -> None:
        self._same = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answered: Answered, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Return a whole answer."""
        message = {"role": "assistant", "content": answered.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": answered.finish,
        }
        return {
            **self._same,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage_of(answered),
            "vzip": extra,
        }

    def piece(self, text: str, *, first: bool = False) -> str:
        """Return the event of a piece."""
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        return self._event([_choice(delta, None)])

    def end(self, answered: Answered, extra: Mapping[str, Any], *, usage: bool) -> str:
        """Return the events that end a stream."""
        events = self._event([_choice({}, answered.finish)], vzip=extra)
        if usage:
            events += self._event([], usage=usage_of(answered))
        return events + DONE

    def _event(self, choices: Sequence[Any], **more: Any) -> str:
        event = {**self._same, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(event, separators=(',', ':'), allow_nan=False)}\n\n"


def _choice(delta: Mapping[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


def usage_of(answered: Answered) -> dict[str, int] | None:
    """Return what an answer took, where its tokens were counted."""
    if answered.prompt_tokens is None or answered.tokens is None:
        return None
    return {
        "prompt_tokens": answered.prompt_tokens,
        "completion_tokens": answered.tokens,
        "total_tokens": answered.prompt_tokens + answered.tokens,
    }


def error_object(error: Exception, status: int) -> dict[str, Any]:
    """Return an error in the protocol's form."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    code = error.code if isinstance(error, RefusedError) else None
    parameter = getattr(error, "parameter", None) or None
    return {"error": {"message": str(error), "type": kind, "param": parameter, "code": code}}
