"""A process that renders a chat template, and nothing else: `rendering` starts it, and bounds it.

It is run as a script, without vzip and without the site's packages but those that it is told of.
Its template language is that of transformers' ``apply_chat_template``: Jinja's sandbox with
``{% generation %}``, ``{% break %}``, ``raise_exception`` and ``strftime_now``.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
from typing import Any

SECONDS = 2
"""Processor time that rendering may take; published templates take milliseconds."""

_MEMORY = 2**29  # bytes of address space; Python and Jinja take a tenth of it
_LONGEST = 2**20  # characters of a rendered conversation


def main() -> None:
    """Read a request from standard input, and write the answer to standard output.

    The request is an object with ``path`` (for `sys.path`), ``template``, ``variables`` and
    ``chats``, each with ``messages`` and ``generate``. The answer is a list with a pair for each of
    them: its text, or null and what went wrong.
    """
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    _bound()
    answer: list[tuple[str | None, str | None]]
    try:
        template = _environment().from_string(request["template"])
    except Exception as error:  # noqa: BLE001 - a hostile template can raise any
        answer = [(None, _fault(error))] * len(request["chats"])
    else:
        answer = [_rendered(template, request["variables"], **chat) for chat in request["chats"]]
    json.dump(answer, sys.stdout)


def _rendered(
    template: Any, variables: dict[str, Any], messages: list[Any], generate: bool
) -> tuple[str | None, str | None]:
    """Return a conversation's text, or None and what went wrong."""
    known = {"messages": messages, "tools": None, "documents": None}
    try:
        text = template.render(**{**variables, **known, "add_generation_prompt": generate})
    except Exception as error:  # noqa: BLE001 - a hostile template can raise any
        return None, _fault(error)
    if len(text) > _LONGEST:
        return None, f"it writes {len(text)} characters"
    return text, None


def _environment() -> Any:
    """Return Jinja as transformers sets it up."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """What stands in ``{% generation %}`` is written as it is."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja asks for it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Plain:
        """`dict`, with what a template may have of it."""

        fromkeys = staticmethod(dict.fromkeys)

        def __call__(self, *pairs: Any, **more: Any) -> dict[Any, Any]:
            return dict(*pairs, **more)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: dt.datetime.now().strftime(form),
        "dict": Plain(),
    }
    return environment


def _bound() -> None:
    """Let the system end this process where a template goes on without end."""
    try:
        import resource
    except ImportError:  # not on Windows, where whoever waits for the answer bounds the time
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _fault(error: BaseException) -> str:
    """Return the kind of an error and what it says, in one line."""
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


if __name__ == "__main__":
    main()
