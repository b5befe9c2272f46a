"""The words around questions, taken from a checkpoint's chat template and tokenizer.

Rendering it needs transformers' tokenizers and Jinja; what comes out, `Words`, needs neither.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from vzip.runtime.llm.rendering import Chat, Rendered, render

# Stand for questions and answers while the chat template is asked what surrounds them. Whatever
# changes or prints a text changes these: upper case, escapes, quotes, line breaks.
_QUESTION, _LATER_QUESTION, _LAST_QUESTION, _ANSWER, _LATER_ANSWER = (
    f'the "{each}" isn\'t <plain> & caf\u00e9 \\ here\nat All?'
    for each in ("Question", "Later question", "Last question", "Answer", "Later answer")
)

_MISTYPED_EOS = "<\\s>"
_log = logging.getLogger(__name__)
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
        """Return a token as text; None for an id beyond the vocabulary.

        Raises:
            CheckpointError: The tokenizer is damaged.
        """
        token: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        return token

    @door(
        CheckpointError,
        "the LLM's tokenizer can't take a text",
        cure=_GIVE_WHOLE,
    )
    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return a text's ids.

        Raises:
            CheckpointError: The tokenizer is damaged.
        """
        # verbose=False: no warning beyond model_max_length, since we check the context ourselves
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False).input_ids
        return ids

    @door(
        CheckpointError,
        "the LLM's tokenizer can't give a text",
        cure=_GIVE_WHOLE,
    )
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, without special tokens.

        Raises:
            CheckpointError: The tokenizer is damaged.
        """
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def warn_of_date(name: str, template: str | None) -> None:
    """Say that words which are written into a file hold a date, where they do.

    Args:
        name: The file, for the message.
        template: The chat template that the words are taken from.
    """
    if template is not None and "strftime_now" in template:
        _log.warning(
            "%s: the LLM's chat template writes today's date, and the file keeps it",
            name,
        )


def words_of(
    name: str,
    tokenizer: Any,
    placeholders: Mapping[Kind, int],
    template: str | None,
    *,
    home: str = "",
) -> Words:
    """Ask a chat template what stands around questions, images and videos.

    Templates of LLaVAs take a message as a list of parts. Those of text alone take a text, in which
    a placeholder stands on a line of its own above the question, as in LLaVA's training, or which
    the template puts there itself. The forms are tried in this order.

    Args:
        name: The LLM's name, for messages.
        tokenizer: The checkpoint's tokenizer.
        placeholders: Id of each kind's placeholder.
        template: The chat template, in Jinja; ``None`` for LLaVA-1.5's words.
        home: The template's file, for messages; empty where it isn't known.

    Raises:
        MissingDependencyError: Jinja is not installed.
        CheckpointError: The template can't be rendered; writes a question in more than one place or
            none, or changes it; or has no place for an image.
    """
    if template is None:
        return llava_15_words(videos="video" in placeholders)
    tokens = {
        kind: str(tokenizer.convert_ids_to_tokens(each)) for kind, each in placeholders.items()
    }
    asked = _Asked(name, home, tokenizer, template, tokens)
    first: dict[Kind, FirstTurn] = {}
    later: LaterTurn | None = None
    faults = []
    for kind in tokens:
        for form in _FORMS:
            try:
                turn = asked.first(kind, form)
            except _FaultError as fault:
                faults.append(fault)
                if fault.final:
                    break
                continue
            if not first:
                later = asked.later(kind, form)
            first[kind] = turn
            break
    if not first:
        rendered = [fault for fault in faults if fault.rendered]
        raise (rendered or faults)[0].error(asked)
    return Words(first, later)


class _FaultError(Exception):
    """Why a form of messages isn't a template's.

    Attributes:
        rendered: Whether the template takes messages of that form, and it is the result that is
            wrong.
        final: Whether no other form is to be tried.
    """

    def __init__(
        self, got: str, expected: str = "", *, rendered: bool = False, final: bool = False
    ) -> None:
        super().__init__(got)
        self.got, self.expected, self.rendered, self.final = got, expected, rendered, final

    def error(self, asked: _Asked) -> CheckpointError:
        """Return the error that names the template."""
        return CheckpointError(
            f"{asked.called} {self.got}",
            expected=self.expected,
            cure=f"repair {asked.home or 'it'}, or take the published one of the model",
        )


@dataclass(frozen=True)
class _Form:
    """How messages are written.

    Attributes:
        shown: Whether the message with images is a list of parts; else it is a text.
        questions: Whether later questions are lists of parts.
        answers: Whether answers are lists of parts.
        places: Whether a text has a line with each placeholder; else the template writes it.
    """

    shown: bool
    questions: bool
    answers: bool
    places: bool = True

    def user(self, places: Sequence[tuple[Kind, str]], question: str) -> dict[str, Any]:
        """Return a question's message, with (kind, placeholder) of what it shows."""
        if self.shown if places else self.questions:
            content = [{"type": kind} for kind, _ in places]
            return {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        lines = [token for _, token in places] if self.places else []
        return {"role": "user", "content": "\n".join([*lines, question])}

    def assistant(self, answer: str) -> dict[str, Any]:
        """Return an answer's message."""
        parts = [{"type": "text", "text": answer}]
        return {"role": "assistant", "content": parts if self.answers else answer}


_PARTS: Final = _Form(shown=True, questions=True, answers=True)
_TEXTS: Final = _Form(shown=False, questions=False, answers=False)
_FORMS: Final = (_PARTS, _TEXTS, replace(_TEXTS, places=False))

# Beside all parts: templates whose answers are texts (Pixtral's), or all that shows nothing.
_MIXED: Final = (_Form(True, True, False), _Form(True, False, False))


@dataclass(frozen=True)
class _Asked:
    """A chat template that is asked for its words.

    Attributes:
        name: The LLM's name.
        home: The template's file, or nothing.
        tokenizer: The checkpoint's.
        template: In Jinja.
        tokens: Placeholders as text.
    """

    name: str
    home: str
    tokenizer: Any
    template: str
    tokens: Mapping[Kind, str]

    @property
    def called(self) -> str:
        """What messages call the template."""
        return f"{self.name}: the LLM's chat template" + (f" ({self.home})" if self.home else "")

    def first(self, kind: Kind, form: _Form) -> FirstTurn:
        """Return the words of a first turn.

        Raises:
            _FaultError: The template has none in this form.
        """
        token = self.tokens[kind]
        place = (kind, token)
        chats = [[form.user([place] * count, _QUESTION)] for count in (1, 2, 3, 0)]
        one, two, three, none, strange = self._render(*map(Chat, chats), Chat(_strange(chats[0])))
        if one.text is None:
            raise _FaultError(f"can't be rendered ({one.fault})")
        if strange.text != one.text:
            raise _FaultError("writes messages as Python prints them", "their text")
        before_question, end = _split(one.text)
        before, found, after = before_question.partition(token)
        if not found or token in after:
            written = _written(before_question, none.text)
            word, whose = written.strip(), "the template writes"
            _check_id(self.name, self.tokenizer, kind, token, word=word, whose=whose)
            raise _no_place(kind, token, written, rendered=form.shown)
        between = None
        if two.text is not None:
            middle = two.text[
                len(before + token) : len(two.text) - len(token + after + _QUESTION + end)
            ]
            # A template that counts images ("Picture 2: ") writes something else between others.
            places = (middle.join([token] * count) for count in (2, 3))
            turns = [f"{before}{place}{after}{_QUESTION}{end}" for place in places]
            if turns == [two.text, three.text]:
                between = middle
        return FirstTurn(before, between, after, end)

    def later(self, kind: Kind, form: _Form) -> LaterTurn | None:
        """Return the words of later turns; None where there are none that follow earlier ones.

        A conversation grows at its end, so that it is the template's alone where that writes the
        turns before as it wrote them when they were asked.
        """
        place = (kind, self.tokens[kind])
        for each in (form, *(_MIXED if form.shown else ())):
            turns = [
                each.user([place], _QUESTION),
                each.assistant(_ANSWER),
                each.user([], _LATER_QUESTION),
                each.assistant(_LATER_ANSWER),
                each.user([], _LAST_QUESTION),
            ]
            one, two, three, closed, strange = self._render(
                *(Chat(turns[:count]) for count in (1, 3, 5)),
                Chat(turns[:2], generate=False),
                Chat(_strange(turns)),
            )
            if one.text is None or two.text is None or strange.text != three.text:
                continue
            lead, found, tail = two.text.partition(_ANSWER)
            between, asked, end = tail.partition(_LATER_QUESTION)
            if not found or not asked or lead.rstrip() != one.text.rstrip():
                continue
            whole = f"{lead}{_ANSWER}{between}{_LATER_QUESTION}{end}"
            gap = lead[len(lead.rstrip()) :]
            whole = f"{whole.rstrip()}{gap}{_LATER_ANSWER}{between}{_LAST_QUESTION}{end}"
            if three.text != whole:
                continue
            _, _, last = (closed.text or "").partition(_ANSWER)
            close, before = self._closed(between, last.strip())
            return LaterTurn(before, end, close)
        return None

    def _closed(self, between: str, last: str) -> tuple[str, str]:
        """Divide what stands between an answer and the next question at the answer's end.

        The first is empty where the tokenizer's end-of-sequence token ends an answer: the template
        writes it, mistypes it (llava-hf's LLaVA-NeXT with Mistral) or leaves it out (published
        LLaVA-1.5: a blank in its place). What follows it is meant, white space included.

        Args:
            between: What stands there.
            last: What a template writes behind the last answer of all.
        """
        rest = between.lstrip()
        space = between[: len(between) - len(rest)]
        eos: str = self.tokenizer.eos_token
        if rest.startswith(eos):
            return f"{space}{eos}" if space else "", rest.removeprefix(eos)
        if rest.startswith(_MISTYPED_EOS):
            return "", rest.removeprefix(_MISTYPED_EOS)
        added = sorted(map(str, self.tokenizer.added_tokens_decoder.values()), key=len)
        start = {self.tokenizer.bos_token, *self.tokens.values(), ""}
        for end in (*reversed(added), last):
            if rest.startswith(end) and end not in start:
                return f"{space}{end}", rest.removeprefix(end)
        return "", rest

    def _render(self, *chats: Chat) -> list[Rendered]:
        return render(self.called, self.template, self.tokenizer.special_tokens_map, chats)


def _strange(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with a key more in every object, which shows only where these are printed."""
    strange = []
    for turn in turns:
        content = turn["content"]
        if not isinstance(content, str):
            content = [{**part, "vzip": "a part"} for part in content]
        strange.append({**turn, "content": content, "vzip": "a message"})
    return strange


def _split(text: str) -> tuple[str, str]:
    """Divide a rendered turn at its question.

    Raises:
        _FaultError: It doesn't stand there once.
    """
    before, mark, end = text.partition(_QUESTION)
    if not mark or _QUESTION in end:
        times = text.count(_QUESTION)
        # A template that drops it, or changes it: upper case, without line breaks, escaped.
        raise _FaultError(f"writes a question {times} times", "once, as it is", rendered=True)
    return before, end


def _written(before: str, none: str | None) -> str:
    """Return what a template writes for an image, by what it writes without one."""
    if none is None:
        return ""
    without = none.partition(_QUESTION)[0]
    start = _common(before, without)
    end = _common(before[start:][::-1], without[start:][::-1])
    return before[start : len(before) - end]


def _check_id(name: str, tokenizer: Any, kind: Kind, token: str, *, word: str, whose: str) -> None:
    """Refuse a configuration whose placeholder is another token than the word that is meant.

    Args:
        name: The LLM's name.
        tokenizer: The checkpoint's.
        kind: What the placeholder is for.
        token: That of the configuration's id.
        word: What stands for an image in a prompt; no token of the tokenizer is no contradiction.
        whose: Who says so, for the message.
    """
    ids: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
    if word != token and word in ids:
        own = tokenizer.convert_tokens_to_ids(token)
        raise CheckpointError(
            f"{name}: config.json's id of an {kind}, {own}, is {token!r} in the tokenizer, and "
            f"{whose} {word!r}, which is {ids[word]}",
            expected="the same token of both",
            cause="configuration and tokenizer are of two versions of the model",
            cure=f"set {kind}_token_index in config.json to {ids[word]} if the rest is right, or "
            "take all files of the published checkpoint",
        )


def _no_place(kind: Kind, token: str, written: str, *, rendered: bool) -> _FaultError:
    """Return the fault of a template that writes something else for an image, or nothing."""
    instead = f", but writes {written[:80]!r} there" if written else ""
    return _FaultError(
        f"has no place for {kind}s{instead}",
        f"{token!r} once for each {kind}, before the question",
        rendered=rendered,
        final=rendered and bool(instead),
    )


def _common(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    return sum(
        1
        for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    )


@door(
    CheckpointError,
    "{name}: the LLM's chat template or tokenizer can't be used",
    cure="repair chat_template.jinja, or fetch the published checkpoint again",
)
def make_prompts(
    name: str,
    tokenizer: Any,
    placeholders: Mapping[Kind, int],
    template: str | None,
    *,
    home: str = "",
) -> Prompts:
    """Return an LLM's prompts.

    Args:
        name: The LLM's name, for messages.
        tokenizer: The checkpoint's tokenizer.
        placeholders: Id of an image's placeholder; and of a video's, if the LLM has one.
        template: The chat template, in Jinja; ``None`` for LLaVA-1.5's words.
        home: The template's file, for messages; empty where it isn't known.

    Raises:
        MissingDependencyError: Jinja is not installed.
        CheckpointError: The tokenizer lacks a placeholder or an end-of-sequence token, or the
            template is not one of a LLaVA.
    """
    adapted = HubTokenizer(name, tokenizer)
    known = {k: i for k, i in placeholders.items() if adapted.token(i) is not None}
    for kind in known if template is None else ():
        token = str(tokenizer.convert_ids_to_tokens(known[kind]))
        _check_id(name, tokenizer, kind, token, word=f"<{kind}>", whose="LLaVA's word is")
    # Without a placeholder there is nothing to ask the template; `Prompts` says which one it is.
    words = words_of(name, tokenizer, known, template if known else None, home=home)
    return Prompts(name, adapted, words, placeholders)
