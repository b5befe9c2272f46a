"""The command line `vzip`: its commands in groups, each imported only when it is called.

A command is a function ``main(argv: Sequence[str], *, prog: str) -> int`` that returns its exit
status; `vzip.runtime.console` says which there are. Nothing but the standard library is imported
here, so that ``vzip -h`` is quick and works wherever vzip is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from vzip.runtime.console import FAILED, complain, emit, run_command
from vzip.runtime.errors import VzipError

PROG = "vzip"


COMMANDS: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "make": {
            "export": "make a bundle from a checkpoint",
            "build": "compile a bundle's graph into an engine, and prove it",
            "calibrate": "quantise a bundle to int8 or fp8 with your images",
            "tune": "train a projector on compressed tokens",
            "convert": "write a checkpoint's language model as a GGUF",
            "triton": "write a bundle as a model repository of Triton",
        },
        "use": {
            "ask": "answer one question about an image or a clip",
            "chat": "answer questions until end of input",
            "show": "draw which patches of an image are kept",
            "encode": "write the tokens of images to a file",
            "serve": "serve tokens and answers over HTTP, with a page to try it",
        },
        "choose": {
            "plan": "estimate latency and memory for several budgets on a machine",
            "sweep": "measure several budgets side by side and recommend one",
            "models": "list the models that have a name",
            "targets": "list the machines that an export can be made for",
        },
        "judge": {
            "check": "compare a bundle with the untouched PyTorch model",
            "inspect": "print what a graph or an engine consists of",
            "report": "write a web page about a bundle",
            "bench": "time a bundle on this machine, beside its peers",
            "debug": "find where an engine first differs, with Polygraphy",
            "doctor": "say what this machine can run and what is missing",
            "firstcontact": "try everything on a GPU, and pack what came of it",
        },
    }
)
"""Group → command → what it does, in one line."""

ENTRY_POINTS: Final = "vzip.commands"
"""The group of entry points (`pyproject.toml`) that says where each command's function is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; ``None`` for those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _main(arguments), prog=PROG)


def _main(argv: list[str]) -> int:
    """Answer the options of `vzip` itself, or call the command."""
    if not argv:
        complain(_usage())
        return FAILED
    name, rest = argv[0], argv[1:]
    if name in ("-h", "--help"):
        emit(_usage())
        return 0
    if name == "--version":
        from vzip.runtime import __version__

        emit(f"{PROG} {__version__}")
        return 0
    if name not in _names():
        raise _unknown(name)
    return _load(name)(rest, prog=f"{PROG} {name}")


def _names() -> list[str]:
    """Return the names of all commands."""
    return [name for group in COMMANDS.values() for name in group]


def _load(name: str) -> Callable[..., int]:
    """Import a command's function."""
    from importlib import metadata

    found = metadata.entry_points(group=ENTRY_POINTS, name=name)
    if not found:
        raise VzipError(
            f"the command '{name}' is not installed",
            expected=f"an entry point of the group '{ENTRY_POINTS}'",
            cause=(
                "vzip was installed before the command was there, or runs from a folder that was "
                "never installed"
            ),
            cure="install it with: pip install -e .",
        )
    loaded: Callable[..., int] = next(iter(found)).load()
    return loaded


def _usage() -> str:
    """Return the text of ``vzip -h``."""
    width = max(map(len, _names())) + 2
    groups = [
        line
        for group, commands in COMMANDS.items()
        for line in (
            f"{group}:",
            *(f"  {name:<{width}}{text}" for name, text in commands.items()),
            "",
        )
    ]
    return "\n".join(
        [
            f"usage: {PROG} COMMAND ...",
            "",
            "An image as K tokens instead of hundreds, and an LLM that answers questions about it.",
            "",
            *groups,
            "options:",
            "  -h, --help  show this text",
            "  --version   show the version",
            "",
            f"'{PROG} COMMAND -h' describes one command.",
        ]
    )


def _unknown(name: str) -> VzipError:
    """Return the error about a word that is no command."""
    import difflib

    kind = "option" if name.startswith("-") else "command"
    close = difflib.get_close_matches(name, [*_names(), "--help", "--version"], n=1)
    cure = f"did you mean '{close[0]}'?" if close else f"'{PROG} -h' lists what there is"
    return VzipError(f"unknown {kind} '{name}'", cure=cure)


if __name__ == "__main__":
    sys.exit(main())
